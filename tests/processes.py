"""Processes of a run, started as `torchrun` would but quickly: forked from one that has read the library."""

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["free_transformer.cli.main", "free_transformer.training", "torch.distributed.fsdp"])
SECONDS = 120

SENTENCES = ["the cat sat on the mat. ", "a dog ran home again. ", "all work and no play. ", "rain in spain falls. "]
TINY = {
    "model": {"hidden_dim": 16, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "latent_dim": 3, "plan_span": 5}
    | {"free_bits": 0.25, "readout_init_scale": 3.0},
    "training": {
        "optimizer": "adamw",
        "min_lr_ratio": 0.1,
        "max_steps": 6,
        "batch_size": 6,
        "seq_len": 16,
        "warmup_steps": 2,
        "log_every": 1,
        "eval_every": 3,
    }
    | {"learning_rate": 3e-3, "save_every": 2, "device": "cpu", "prior_rows": 12, "eval_rows": 12},
    "logging": {"tensorboard": False, "sample_every": 6, "sample_tokens": 2},
}


def tiny_values(folder: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run of a second, its text being short documents, packed and padded."""
    text = folder / "text.jsonl"
    if not text.exists():
        documents = ["".join(SENTENCES[(i + j) % 4] for j in range(i % 5 + 1))[: 9 + 7 * i] for i in range(40)]
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    values = {section: {**TINY.get(section, {}), **sections.get(section, {})} for section in {*TINY, *sections}}
    return {"run_dir": str(folder / name), "data": {"train": [str(text)], "validation": [str(text)]}, **values}


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without machine-dependent values."""
    from free_transformer.training import Run

    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in Run(run_dir).read_metrics()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(count: int, target: Callable[..., None], *arguments: Any, log: Path) -> list[Any]:
    """`target(*arguments)` in `count` connected processes; their output goes to `log`, `log.1`, ..."""
    port = free_port()
    processes = []
    for rank in range(count):
        of_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment = {**of_torchrun, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if count > 1 else {}
        own_log = log.with_suffix(f".{rank}") if rank else log
        processes.append(CONTEXT.Process(target=_run, args=(environment, own_log, target, arguments)))
        processes[-1].start()
    return processes


def finish(processes: list[Any]) -> list[int | None]:
    """Their exit codes. A process that does not end in time is killed."""
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def run(count: int, target: Callable[..., None], *arguments: Any, log: Path) -> None:
    """As `start`, to the end; all must succeed."""
    codes = finish(start(count, target, *arguments, log=log))
    assert codes == [0] * count, f"{codes}: {log.read_text()}"


def _run(environment: dict[str, Any], log: Path, target: Callable[..., None], arguments: tuple) -> None:
    import torch

    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    target(*arguments)


def train_tiny(values: dict[str, Any]) -> None:
    """A run, with errors as the command line shows them."""
    from free_transformer.cli.exit_status import as_command
    from free_transformer.settings import parse_settings
    from free_transformer.training import train

    with as_command():
        train(parse_settings(values))


def command(*arguments: str) -> None:
    """The command line."""
    from free_transformer.cli.main import main

    sys.argv = ["free-transformer", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
