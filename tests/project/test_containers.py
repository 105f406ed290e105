"""The recipes of images name existing files; `make docker-check` builds and runs them."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_what_is_copied_is_there_and_reaches_the_build(name):
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / name).read_text(), re.M)
    for path in " ".join(copied).split():
        assert (ROOT / path).exists() and any(fnmatch(path, pattern) for pattern in sent)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_no_image_runs_as_root_or_without_a_health_check(name):
    text = (ROOT / name).read_text()
    assert re.search(r"^USER user$", text, re.M) and re.search(r"^HEALTHCHECK", text, re.M)


def test_compose_and_make_build_stages_that_are_there():
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile.cpu").read_text(), re.M))
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert services["serve"]["build"]["target"] in stages
    assert {"onnx", "serve", "full"} <= stages
    for service in services.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
