"""
README and documentation as written: their blocks, in order, each page in its own folder with runs of a few steps.
Always the Python and YAML that needs no command before it; everything with `make test-docs`.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from free_transformer.data import build_rows, byte_tokenizer
from free_transformer.training import Run, load_settings, train
from pages import PAGES, ROOT, blocks, lines_of_shell

ALONE = ["README", "index", "contributing", "evaluation", "faq", "hub", "long-text", "pretrained", "steering"]
ELSEWHERE = {  # commands that no test runs as written, and what covers them
    r"git clone|python3 -m venv|source |\S*pip install": "make release-check",
    r"make demo +# seed 0|.*demo.py --seed 1": "the README's command",
    r"make (test|test-docs|quality|hooks)\b": "before every commit",
    r"make (docker|bench|demo-pretrained|warm-start)|docker ": "make docker-check; hours: the pages they write",
    r"make gpu": "needs a GPU",
    r"(make|free-transformer) explore": "tests/explorer: it serves a page until it is stopped",
    r"free-transformer generate runs/pretrained/": "make demo-pretrained: 40 minutes",
    r"make diversity": "tests/project/test_diversity_benchmarks.py: half an hour",
    r"hf upload": "tests/model/test_hub.py: no hub here",
    r"torchrun --nnodes": "tests/distributed/test_distributed.py: several machines",
    r"free-transformer lm-eval .*arc_easy": "tests/integrations/test_harness.py: tasks that are downloaded",
}
TASK = """task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: '{{q}}'
doc_to_choice: choices
doc_to_target: gold
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A repository in use: texts, two short runs, a Llama, a task."""
    folder = tmp_path_factory.mktemp("pages") / "prepared"
    copy_repository(folder)
    write_texts(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).save_pretrained(folder / "LLAMA")
    byte_tokenizer().save_pretrained(folder / "LLAMA")
    shutil.copytree(ROOT / "models", folder / "models")
    text = [f"data.train={folder / 'texts'}", f"data.validation={folder / 'held_out'}", "training.seq_len=256"]
    for name, kind in (("mine", "free"), ("mine-baseline", "baseline")):
        overrides = [f"run_dir={folder / 'runs' / name}", f"model.kind={kind}", *text]
        train(load_settings(folder / "my.yaml", overrides), quiet=True)
    shutil.copytree(folder / "runs" / "mine", folder / "runs" / "my-run")
    shutil.copytree(folder / "runs" / "mine" / "model", folder / "somebody" / "my-run")
    return folder


def copy_repository(folder: Path) -> None:
    """Files that commands read, shortened settings, and this environment with everything installed."""
    for name in ("configs", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder)
    for config in (folder / "configs").iterdir():
        shorter = with_few_steps(config.read_text(encoding="utf-8"))
        config.write_text(re.sub(r"letters:(\d+)00:", r"letters:\1:", shorter), encoding="utf-8")
    shutil.copy(folder / "configs" / "free_transformer.yaml", folder / "my.yaml")
    (folder / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith("."):
            (folder / ".venv" / part.name).symlink_to(part)
    for extra in ("train", "demo", "dev"):
        (folder / ".venv" / f".{extra}").touch()


def with_few_steps(settings: str) -> str:
    return re.sub(r"max_steps: \d+", "max_steps: 4", settings)


def write_texts(folder: Path) -> None:
    for name in ("texts", "held_out"):
        (folder / name).mkdir()
        for number in range(9):
            (folder / name / f"{number}.txt").write_text(f"The {number} ways to be, or not to be. " * 60)
    shutil.copy(folder / "texts" / "0.txt", folder / "example.txt")
    for language in ("french", "german"):
        (folder / "held_out" / language).mkdir()
        shutil.copy(folder / "texts" / "0.txt", folder / "held_out" / language / "dpkg-query.1")
    for name in ("simple", "complex"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"a {name} text " * 99}) + "\n")
    questions = folder / "my_tasks" / "questions.jsonl"
    questions.parent.mkdir()
    questions.write_text('{"q": "The cat", "choices": ["sat", "ran"], "gold": 0}\n')
    (folder / "my_tasks" / "my_task.yaml").write_text(TASK.replace("DATA", str(questions)))


@pytest.fixture
def workspace(prepared, tmp_path, monkeypatch) -> Path:
    """A copy of `prepared` as the current folder, with the commands of this environment first in PATH."""
    folder = shutil.copytree(prepared, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return folder


def names() -> dict[str, object]:
    """Names that pages use without defining them."""
    model, baseline, tokenizer = Run("runs/mine").load_model(), Run("runs/mine-baseline").load_model(), byte_tokenizer()
    tokens = torch.randint(0, 256, (4, 64))
    texts = [f"{number} times to be or not" for number in range(24)]
    return {
        "torch": torch,
        "model": model,
        "baseline": baseline,
        "reference": baseline,
        "tokenizer": tokenizer,
        "texts": texts,
        "tokens": tokens,
        "examples": tokens,
        "batches": [{"input_ids": tokens}],
        "labels": np.array([0, 0, 1, 1]),
        "rows": build_rows(texts, tokenizer, 64),
        "held_out": build_rows(texts[:4], tokenizer, 64),
        "classify": lambda texts: np.array([len(text) % 2 for text in texts]),
        "out": model(tokens, labels=tokens),
        **{name: model.sample_plan(1, 1) for name in ("plan", "plan_a", "plan_b")},
    }


def run_line(line: str, running: contextlib.ExitStack) -> None:
    if any(re.match(pattern, line) for pattern in ELSEWHERE):
        return
    if " serve " in line:
        server = running.enter_context(subprocess.Popen(["bash", "-c", f"exec {line}"]))
        running.callback(server.terminate)
        wait_for(8000)
    else:
        if " train " in line and (run := re.search(r"run_dir=(\S+)", line)):  # of a reader who has not trained it yet
            shutil.rmtree(f"{run[1]}-baseline" if "--baseline" in line else run[1], ignore_errors=True)
        subprocess.run(["bash", "-c", line], check=True, timeout=1200)


def wait_for(port: int) -> None:
    for _ in range(600):
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens at {port}")


def run_page(page: Path, languages: tuple[str, ...]) -> None:
    known = names() if "python" in languages else {}
    with contextlib.ExitStack() as running:
        for number, (language, block) in enumerate(blocks(page)):
            if language not in languages:
                continue
            if language == "python":
                shorter = block.replace("max_steps=1000", "max_steps=100")
                exec(compile(shorter, f"{page.name}[{number}]", "exec"), known)
            elif language == "yaml":
                named = re.match(r"# (\w+\.yaml)\n", block)  # a file that the commands below it read
                file = Path(named[1] if named else "block.yaml")
                file.write_text(with_few_steps(block), encoding="utf-8")
                load_settings(str(file))
            for line in lines_of_shell(block) if language == "" else ():
                run_line(line, running)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem in ALONE], ids=lambda page: page.stem)
def test_python_and_yaml_of_a_page(page, workspace):
    run_page(page, ("python", "yaml"))


WITH_YAML = [page for page in PAGES if page.stem not in ALONE and any(kind == "yaml" for kind, _ in blocks(page))]


@pytest.mark.parametrize("page", WITH_YAML, ids=lambda page: page.stem)
def test_settings_of_a_page_are_valid(page, workspace):
    run_page(page, ("yaml",))


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_everything_on_a_page(page, workspace):
    run_page(page, ("python", "yaml", ""))
