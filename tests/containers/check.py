"""
Builds every image and serves from it, where no Docker engine runs: `make docker-check`, as root.

It needs buildah and debootstrap (Debian's packages). The base is a Debian of its own; what pip needs to find packages
here goes into the builds by BUILDAH_BUILD_OPTIONS, as in `--volume /etc/pip.conf:/etc/pip.conf:ro`, and TORCH_INDEX.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
from openai import OpenAI

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.data import byte_tokenizer
from free_transformer.export.onnx import export_onnx

ROOT = Path(__file__).parents[2]
DOCKER = "tests/containers/docker"
BASE, PORT = "localhost/free-transformer-base", 8765
TARGETS = ("onnx", "serve", "full")
SUITE = "bookworm"  # of Python 3.11, with which the tests run
PACKAGES = "python3,python3-venv,ca-certificates"
START_SECONDS = 120


def main() -> None:
    missing = [program for program in ("buildah", "debootstrap") if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        sys.exit(f"docker-check: needs {' and '.join(missing) or 'root'}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_base(folder / "base")
        models = write_models(folder)
        options = f"--build-arg BASE={BASE} --build-arg TORCH_INDEX={os.environ.get('TORCH_INDEX', '')}"
        for target in TARGETS:
            make("docker-build-cpu", f"TARGET={target}", f"DOCKER_BUILD_OPTIONS={options}")
            check_server(target, models["onnx" if target == "onnx" else "torch"])
        make("docker-build", f"DOCKER_BUILD_OPTIONS=--build-arg BASE={BASE}")
        run("free-transformer:gpu", "python", "-c", "import torch, free_transformer.serving.torch_batch")
    base = size(BASE)
    for image in (*(f"free-transformer:cpu-{target}" for target in TARGETS), "free-transformer:gpu"):
        print(f"{image}: {size(image) - base:.0f} MB on a base of {base:.0f} MB")


def build_base(folder: Path) -> None:
    if subprocess.run(["buildah", "inspect", "--type", "image", BASE], capture_output=True).returncode == 0:
        return
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(folder), "/")
    buildah("commit", "--quiet", container, BASE)
    buildah("rm", container)


def write_models(folder: Path) -> dict[str, Path]:
    """A small model as a folder and as an ONNX export."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_dim": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}
    config = FreeTransformerConfig(**sizes, latent_dim=4, plan_span="sequence", eos_token_id=None)
    model = FreeTransformer(config).eval()
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    export_onnx(model, folder / "export", byte_tokenizer())
    folder.chmod(0o755)  # for the images' user
    (folder / "model" / "model.safetensors").chmod(0o644)
    return {"torch": folder / "model", "onnx": folder / "export"}


def check_server(target: str, model: Path) -> None:
    """Requests a text under a plan from an image's server, started like `make docker-run-cpu`."""
    assert run(f"free-transformer:cpu-{target}", "id", "-u").strip() == "1000"
    if target == "onnx":
        find = "import importlib.util; print(importlib.util.find_spec('torch'))"
        assert run("free-transformer:cpu-onnx", "python", "-c", find).strip() == "None"
    started = time.monotonic()
    with server("docker-run-cpu", f"TARGET={target}", f"RUN={model}", f"PORT={PORT}") as process:
        wait_for_health(process)
        seconds = time.monotonic() - started
        client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none")
        answer = client.completions.create(model=model.name, prompt="Hello", max_tokens=8, extra_body={"plan": "0110"})
    choice = answer.choices[0]
    assert choice.plan == "0110" and choice.finish_reason == "length" and answer.usage.completion_tokens == 8, answer
    print(f"{target}: answers {seconds:.0f} s after its start: {json.dumps(choice.text)}", flush=True)


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(["make", f"DOCKER={DOCKER}", *arguments], cwd=ROOT)
    try:
        yield process
    finally:
        # the server itself, as an engine would: buildah prints a long message when it ends
        subprocess.run(["pkill", "-TERM", "-f", rf"^/opt/venv/bin/python\S* .*serve .*--port {PORT}"])
        process.wait()


def wait_for_health(process: subprocess.Popen) -> None:
    for _ in range(START_SECONDS):
        if process.poll() is not None:
            sys.exit("the server has ended")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health").read()
            return
        time.sleep(1)
    sys.exit(f"no answer in {START_SECONDS} seconds")


def make(*arguments: str) -> None:
    subprocess.run(["make", f"DOCKER={DOCKER}", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def run(image: str, *command: str) -> str:
    return subprocess.run([ROOT / DOCKER, "run", image, *command], check=True, text=True, stdout=subprocess.PIPE).stdout


def buildah(*arguments: str) -> str:
    return subprocess.run(["buildah", *arguments], check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


def size(image: str) -> float:
    """Of all its layers, unpacked, in MB."""
    images = json.loads(buildah("images", "--json", image))
    number, unit = images[0]["size"].split()
    return float(number) * {"MB": 1, "GB": 1000}[unit]


if __name__ == "__main__":
    main()
