"""Where a training step spends the GPU's time, by kernel and by part of the model, and where it waits for the GPU."""

import collections
import contextlib
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from free_transformer import FreeTransformer
from free_transformer.model import layers
from free_transformer.training import step as training_step_module
from free_transformer.training.optimizers import RowAdamW

STEPS = 2
LONGEST = 25  # kernels that are listed
KERNEL_GROUPS = {  # the first that matches
    "attention": r"flash|fmha|sdpa|attention",
    "matmul": r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk",
    "optimizer and clipping": r"adam|multi_tensor|lpnorm",
    "copies": r"memcpy|memset",
    "loss": r"softmax|nll_loss|cross_entropy",
    "norms and elementwise, compiled": r"triton",
    "lookups": r"index|gather|scatter|embedding|sort|radix|unique",
    "norms and elementwise, not compiled": r"elementwise|reduce|norm|cat",
}
PARTS = {  # events by name; ranges that `ranges` opens begin with "part:"
    "encoder": r"^part:encoder$",
    "plan sampling, codebook, straight-through gradient": r"^part:(codebook|mapper)$",
    "losses of the plan": r"^part:losses$",
    "head and reconstruction": r"^part:head$|_ChunkedLoss",
    "gradient clipping": r"^part:clipping$",
    "codebook optimizer": r"^part:rows$",
    "optimizer": r"^Optimizer\.step#",
}
REST = "layers and the rest"
BACKWARD = "autograd::engine::evaluate_function"


def profile_steps(model: Any, step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Milliseconds of one step by groups of kernels and by parts of the model, and the longest kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with ranges(model):
        step()
        with profile(activities=activities) as profiler:
            for _ in range(STEPS):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    events = list(profiler.events() or [])
    kernels = kernel_times(events)
    groups: dict[str, float] = collections.defaultdict(float)
    for name, (milliseconds, _) in kernels.items():
        groups[group_of(name)] += milliseconds
    longest = sorted(kernels.items(), key=lambda each: -each[1][0])[:LONGEST]
    parts = part_times(events, device.type == "cuda")
    return {
        "kernel_ms": sum(groups.values()),
        "groups_ms": dict(sorted(groups.items(), key=lambda each: -each[1])),
        "parts_ms": parts,
        "parts_share": {name: each / max(sum(parts.values()), 1e-9) for name, each in parts.items()},
        "longest": [{"kernel": name[:120], "ms": ms, "calls": calls} for name, (ms, calls) in longest],
    }


def group_of(kernel: str) -> str:
    return next((name for name, words in KERNEL_GROUPS.items() if re.search(words, kernel, re.I)), "other")


@contextlib.contextmanager
def ranges(model: Any) -> Iterator[None]:
    """Names the parts of a step in the profile. The compiled blocks are not touched."""
    with contextlib.ExitStack() as stack:

        def name_calls(owner: Any, attribute: str, part: str) -> None:
            plain = getattr(owner, attribute)

            def named(*args: Any, **kwargs: Any) -> Any:
                with record_function(f"part:{part}"):
                    return plain(*args, **kwargs)

            stack.enter_context(mock.patch.object(owner, attribute, named))

        name_calls(training_step_module, "clip_gradients", "clipping")
        name_calls(RowAdamW, "_update_rows", "rows")
        if isinstance(model, FreeTransformer):
            name_calls(layers, "chunked_reconstruction_loss", "head")
            name_calls(model, "encode", "encoder")
            name_calls(model.plan_mapper, "forward", "mapper")
            name_calls(model.plan_table, "forward", "codebook")
            name_calls(model, "_losses", "losses")
        elif hasattr(model, "lm_head"):
            name_calls(model.lm_head, "forward", "head")
            model._loss_function = model.loss_function  # what its property returns
            stack.callback(delattr, model, "_loss_function")
            name_calls(model, "_loss_function", "head")
        yield


def kernel_times(events: list[Any]) -> dict[str, tuple[float, int]]:
    """Milliseconds and calls of each kernel in one step; ranges, which the GPU's timeline repeats, are left out."""
    on_cpu = {event.name for event in events if event.device_type == torch.autograd.DeviceType.CPU}
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name not in on_cpu:
            found[event.name].append(event.time_range.elapsed_us() / 1000)
    return {name: (sum(times) / STEPS, len(times) // STEPS) for name, times in found.items()}


def part_times(events: list[Any], on_gpu: bool) -> dict[str, float]:
    """
    Milliseconds of one step by part, of kernels or on a CPU of operators.

    A kernel belongs to the part in which it was launched. In the backward pass that is the part whose forward pass made
    the node: the profiler gives both the same sequence number.
    """
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    events.sort(key=lambda event: event.time_range.start)
    names = {event.name for event in events}  # ranges are listed among the kernels too
    part_of: dict[int, str | None] = {}
    node_of: dict[int, Any] = {}  # the backward node in which an event runs
    made_by: dict[int, str | None] = {}  # sequence number -> part
    for event in events:  # parents start before their children
        parent = event.cpu_parent
        own = next((part for part, words in PARTS.items() if re.search(words, event.name)), None)
        part_of[id(event)] = own or (part_of.get(id(parent)) if parent is not None else None)
        node = event if event.name.startswith(BACKWARD) else None
        node_of[id(event)] = node or (node_of.get(id(parent)) if parent is not None else None)
        if node_of[id(event)] is None and event.sequence_nr >= 0:
            made_by[event.sequence_nr] = part_of[id(event)]  # the last operator with a number makes the node
    found: dict[str, float] = collections.defaultdict(float)
    for event in events:
        part, node = part_of[id(event)], node_of[id(event)]
        if part is None and node is not None:
            part = made_by.get(node.sequence_nr)
        kernels = [each.duration for each in event.kernels if each.name not in names]
        spent = sum(kernels) if on_gpu else event.self_cpu_time_total
        found[part or REST] += spent / 1000 / STEPS
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def host_syncs(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """
    How often a step makes the CPU wait for the GPU, and from where.

    Returns:
        `count`, and `places`: the innermost frames of each, innermost first, and how often.
    """
    places: dict[str, int] = collections.Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            places[_where()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return {"count": sum(places.values()), "places": dict(places)}


def _where(frames: int = 6) -> str:
    stack = [each for each in traceback.extract_stack()[:-2] if not each.filename.endswith("warnings.py")]
    short = (re.sub(r"^.*?/(src|site-packages|benchmarks)/", "", each.filename) for each in stack)
    lines = [f"{name}:{each.lineno} {each.name}" for name, each in zip(short, stack, strict=True)]
    return " < ".join(reversed(lines[-frames:]))
