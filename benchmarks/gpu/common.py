"""Shared by all measurements on one GPU: the results file, timing, and the measured limits of the card."""

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from free_transformer.files import write_text

MATMUL_SIZE = 8192
COPY_BYTES = 2**30
MAX_FRAMES = 4  # of a recorded error
TIME_IS_UP = "not measured: the time budget was used up"


class Results:
    """
    Measurements by name, kept in a JSON file.

    The file is replaced after each measurement, so that an interrupted run keeps its results.

    Attributes:
        ends: value of `time.monotonic()` after which no measurement starts.
    """

    def __init__(self, path: Path, seconds: float):
        self.path, self.ends = path, time.monotonic() + seconds
        self.values: dict[str, Any] = {}

    def record(self, name: str, measure: Callable[[], Any]) -> Any:
        """
        Measures and stores the value, or `{"error": ...}` where the measurement failed or the time is up.

        Returns:
            the value, None for an error.
        """
        started = time.monotonic()
        value = self.values[name] = self.guarded(measure)
        write_text(self.path, json.dumps(self.values, indent=1) + "\n")
        print(f"{name} ({time.monotonic() - started:.1f} s): {json.dumps(_short(value))[:600]}", flush=True)
        return None if failed(value) else value

    def guarded(self, measure: Callable[[], Any]) -> Any:
        """The value of a measurement, or its error."""
        if time.monotonic() > self.ends:
            return {"error": TIME_IS_UP}
        try:
            return measure()
        except Exception as error:
            frames = [
                f"{each.filename}:{each.lineno} {each.name}" for each in traceback.extract_tb(error.__traceback__)
            ]
            message = " ".join(str(error).split())[:400]
            return {"error": f"{type(error).__name__}: {message}", "frames": frames[-MAX_FRAMES:]}


def failed(value: Any) -> bool:
    return isinstance(value, dict) and "error" in value


def _short(value: Any) -> Any:
    """A value without its lists, for one line on the terminal."""
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items() if not isinstance(each, list) or name == "frames"}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def parser_of(description: str | None, name: str, seconds: float) -> argparse.ArgumentParser:
    """A parser with `--out`, `--seconds` and `--small`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu") / name, help="results file (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="start no measurement after this time (default: %(default)s s)"
    )
    parser.add_argument("--small", action="store_true", help="use tiny shapes, uncompiled, to try the script on a CPU")
    return parser


def options_of(
    description: str | None, name: str, seconds: float, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """The options of the command line, and `device`: the GPU, or with `--small` the CPU where there is none."""
    parser = parser or parser_of(description, name, seconds)
    options = parser.parse_args()
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.device.type == "cpu" and not options.small:
        parser.error("no GPU found: use --small to try the script on a CPU")
    return options


def card(device: torch.device, small: bool) -> dict[str, Any]:
    """Name, memory and versions, and the measured limits: bf16 matmul rate, and bandwidth of a device copy."""
    found: dict[str, Any] = {"card": "CPU", "small": small, "torch": torch.__version__}
    found |= {"transformers": transformers.__version__, "triton": _triton_version()}
    found["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "memory_gb": properties.total_memory / 1e9}
        found |= {"multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda, "driver": _driver()}
    found |= _limits(device, small)
    forget(device)
    return found


def _limits(device: torch.device, small: bool) -> dict[str, float]:
    size, copied = (256, 2**20) if small else (MATMUL_SIZE, COPY_BYTES)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    matmul = timed(lambda: torch.mm(left, right, out=product), device, steps=20)
    copy = timed(lambda: target.copy_(source), device, steps=20)
    return {
        "bf16_tflops": 2 * size**3 / matmul["seconds"] / 1e12,
        "copy_tb_s": 2 * copied / copy["seconds"] / 1e12,  # read and written
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True, timeout=20).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def timed(step: Callable[[], Any], device: torch.device, steps: int = 10, warm_up: int = 4) -> dict[str, float]:
    """
    Seconds of a step: median and quartiles, and those of the very first one, which compiles.

    On a GPU the steps follow each other without a synchronization, as they do in training. An event marks the end of
    each.
    """
    started = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - started
    for _ in range(warm_up - 1):
        step()
    seconds = _on_gpu(step, device, steps) if device.type == "cuda" else _on_cpu(step, steps)
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"seconds": middle, "low": low, "high": high, "first_s": first}


def _on_gpu(step: Callable[[], Any], device: torch.device, steps: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]


def _on_cpu(step: Callable[[], Any], steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget(device: torch.device) -> None:
    """Frees the remains of earlier measurements: compiled code, cached memory, and the peak so far."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def compilations() -> dict[str, int]:
    """Statistics of `torch.compile` since `forget`."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }


def peak_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
