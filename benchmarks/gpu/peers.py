"""
Training steps of a 124M shape on one GPU, bf16 by autocast and not compiled: this library, the Llama, and the public
implementations of the method.

Each runs in a process of its own: `free-transformer` 0.1.2 has the import name of this library. The processes import
together and then measure one after the other.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
SHAPE = {"width": 768, "layers": 12, "heads": 12, "ffn": 2048, "batch": 8, "length": 1024, "vocabulary": 50304}
SMALL = {"width": 32, "layers": 2, "heads": 2, "ffn": 64, "batch": 2, "length": 16, "vocabulary": 128}
CONTESTANTS = {  # label: class of contestants.py, and the span of a plan
    "llama": ("Llama", 1),
    "token": ("Free", 1),
    "sequence": ("Free", "sequence"),
    "x_transformers": ("XTransformers", 1),
    "free_transformer_012": ("FreeTransformer012", 1),
}
PEERS = {"XTransformers": "x_transformers", "FreeTransformer012": "free_transformer_012"}  # and their options
BITS = (8, 16)
LIMIT = 60  # seconds of a contestant
WARM_UP, STEPS = 4, 10


def main() -> None:
    from common import Results, card, options_of, parser_of

    parser = parser_of(__doc__, "peers.json", 50)
    parser.add_argument("--x-transformers", type=Path, help="folder that x-transformers is installed in")
    parser.add_argument("--free-transformer-012", type=Path, help="folder that free-transformer 0.1.2 is installed in")
    options = options_of(__doc__, "peers.json", 50, parser)
    results = Results(options.out, options.seconds)
    running: dict[str, subprocess.Popen[str] | None] = {}
    try:
        for label, name, spec in cases(options):
            installed = name not in PEERS or folder_of(name, options) is not None
            running[label] = start(name, spec, options) if installed else None
        results.record("card", lambda: card(options.device, options.small))
        for label, process in running.items():
            results.record(label, lambda process=process: answer(process))
    finally:
        for process in filter(None, running.values()):
            process.kill()
            process.wait()


def cases(options: argparse.Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    """Label, contestant and its sizes. The Llama has no plan and runs once."""
    found = []
    for place, bits in enumerate((4,) if options.small else BITS):
        for label, (name, span) in CONTESTANTS.items():
            if label == "llama" and place > 0:
                continue
            spec = {**(SMALL if options.small else SHAPE), "bits": bits, "span": span, "bf16": True}
            found.append((f"{label}_{bits}", name, {**spec, "device": options.device.type}))
    return found


def folder_of(name: str, options: argparse.Namespace) -> Path | None:
    """Where a public implementation is installed."""
    return getattr(options, PEERS[name]) if name in PEERS else None


def start(name: str, spec: dict[str, Any], options: argparse.Namespace) -> subprocess.Popen[str]:
    """Starts the process of a contestant. It imports at once and measures on request."""
    folder = folder_of(name, options)
    ours = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    # A peer does not see this library, whose name one of them has.
    environment = {**os.environ, "PYTHONPATH": ours if folder is None else str(folder.resolve())}
    steps = WARM_UP + (2 if options.small else STEPS)
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--contestant", name]
    command += [json.dumps(spec), str(steps)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def answer(process: subprocess.Popen[str] | None) -> dict[str, Any]:
    """Lets a process measure, and returns the result. Raises `RuntimeError` if it failed."""
    if process is None:
        raise RuntimeError("this implementation is not installed: give its folder")
    output, errors = process.communicate("go\n", timeout=LIMIT)
    if process.returncode:
        said = [line.strip() for line in errors.splitlines() if line.strip()]
        raise RuntimeError(said[-1] if said else f"the process ended with code {process.returncode}")
    return json.loads(output.splitlines()[-1])


def contestant(name: str, spec: dict[str, Any], steps: int) -> None:
    """Runs in the process of a contestant. Nothing here imports this library, unless it is the contestant."""
    import statistics
    import time

    import torch

    sys.path.append(str(ROOT / "benchmarks"))
    from contestants import CONTESTANTS as classes

    classes[name].load()
    sys.stdin.readline()
    chosen = classes[name](spec)
    on_gpu, seconds = spec["device"] == "cuda", []
    for _ in range(steps):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        chosen.train_step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    low, middle, high = statistics.quantiles(seconds[WARM_UP:], n=4, method="inclusive")
    tokens = spec["batch"] * spec["length"]
    found = {"seconds": middle, "low": low, "high": high, "tokens_per_second": tokens / middle}
    found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    found["parameters"] = sum(each.numel() for each in chosen.model.parameters())
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contestant"]:
        contestant(sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
