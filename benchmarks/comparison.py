"""
Compares this library with `LlamaForCausalLM` and the public implementations, at the same shapes, in the same rounds.

Every contestant is a process in its own environment (`make bench` prepares them) and takes one turn per round. Ratios
compare turns of the same round, and the tables show their medians and quartiles. Memory is the peak growth of a fresh
process. Results are saved part by part in benchmarks/results/comparison.json, and docs/performance.md is updated from
them.
"""

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from comparison_report import RESULTS, machine, write_report
from rich.console import Console
from rich.progress import Progress

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PEERS = {"XTransformers": "x-transformers", "FreeTransformer012": "free-transformer"}
SMALL = {"width": 256, "layers": 6, "heads": 4, "ffn": 688}
LARGE = {"width": 512, "layers": 12, "heads": 8, "ffn": 1376}
LENGTHS = {256: 8, 1024: 2}  # row length: number of rows, 2,048 tokens per step
BITS = (8, 16)
BATCHES = (1, 8, 32)
NEW = 256
TURN_LIMIT = 90.0  # seconds after which a contestant counts as failed
LONG_TURN = 10.0  # seconds of a turn without warm-up; a turn four times as long is not repeated
MEMORY_STEPS = 2
ALLOCATORS: dict[str | None, dict[str, str]] = {  # settings of glibc's allocator
    None: {},
    "exact": {"MALLOC_MMAP_THRESHOLD_": "65536"},  # returns freed memory at once
    "keeps": {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"},
}
PARTS = ("training", "allocator", "memory", "generation", "compiled", "bf16", "machine")
CONSOLE = Console(width=120)


class Failed(Exception):
    """A contestant that gave no response, with the reason."""


class Worker:
    """One contestant in its process. `contestants.py` documents its requests and responses."""

    def __init__(self, name: str, spec: dict[str, Any]):
        self.name, self.spec = name, spec
        python = ROOT / ".venv" / ("peers/" + PEERS[name] if name in PEERS else "") / "bin" / "python"
        if not python.exists():
            raise Failed("no environment: make bench prepares it")
        source = {"PYTHONPATH": spec["source"]} if "source" in spec else {}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open as long as the worker
        self.process = subprocess.Popen(
            [python, FOLDER / "contestants.py", name, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **ALLOCATORS[spec.get("allocator")], **source},
        )
        self._read(TURN_LIMIT)

    def ask(self, limit: float = TURN_LIMIT, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._read(limit)

    def _read(self, limit: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.close()
            raise Failed(f"no response within {limit:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            said = [each.strip() for each in self.log if each.strip()]
            killed = self.process.returncode == -9
            raise Failed("killed: out of memory" if killed else said[-1][:160] if said else "ended without output")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


@dataclass
class Group:
    """Contestants that take turns."""

    title: str
    specs: dict[str, tuple[str, dict[str, Any]]]  # by label: contestant, spec
    request: dict[str, Any]
    rounds: int
    seconds: dict[str, list[float | None]] = field(default_factory=dict)  # by label, of each round
    failed: dict[str, str] = field(default_factory=dict)

    def run(self, progress: Progress) -> None:
        task = progress.add_task(self.title, total=(self.rounds + 1) * len(self.specs))
        workers: dict[str, Worker] = {}
        for label, (name, spec) in self.specs.items():
            try:
                workers[label] = Worker(name, spec)
            except Failed as failure:
                self.failed[label] = str(failure)
        self.seconds = {label: [] for label in workers}
        for turn in range(self.rounds + 1):  # the first is a warm-up
            for label in list(workers):
                self._take_turn(workers, label, turn)
                progress.advance(task)
        for worker in workers.values():
            worker.close()

    def _take_turn(self, workers: dict[str, Worker], label: str, turn: int) -> None:
        worker, taken = workers[label], self.seconds[label]
        if turn and taken[0] is not None and taken[0] > 4 * LONG_TURN:
            taken.append(None)
            return
        try:
            limit = 6 * TURN_LIMIT if worker.spec.get("compiled") and not turn else TURN_LIMIT
            seconds = worker.ask(limit, **self.request)["seconds"]
        except Failed as failure:
            self.failed[label] = str(failure)
            workers.pop(label)
            self.seconds.pop(label)
            return
        taken.append(seconds if turn or seconds > LONG_TURN else None)


def spec(shape: dict[str, int], bits: int, length: int = 256, **more: Any) -> dict[str, Any]:
    return {**shape, "bits": bits, "length": length, "batch": LENGTHS[length], **more}


def everyone(base: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        "Llama": ("Llama", base),
        "Free Transformer, one plan per token": ("Free", base),
        "Free Transformer, one plan per sequence": ("Free", {**base, "span": "sequence"}),
        "x-transformers": ("XTransformers", base),
        "free-transformer 0.1.2": ("FreeTransformer012", base),
    }


def shapes() -> list[tuple[dict[str, int], int, int]]:
    return [(shape, length, bits) for shape in (SMALL, LARGE) for bits in BITS for length in LENGTHS]


def name_of(shape: dict[str, int]) -> str:
    return f"{shape['layers']} layers of width {shape['width']}"


def title_of_step(shape: dict[str, int], bits: int, length: int = 256) -> str:
    return f"{name_of(shape)}, {LENGTHS[length]} x {length} tokens, H = {bits}"


def training(quick: bool) -> list[Group]:
    groups = []
    for shape, length, bits in shapes()[: 1 if quick else None]:
        rounds = 2 if quick else (15 if (shape, length, bits) == (SMALL, 256, 8) else 4 if shape is SMALL else 3)
        title = title_of_step(shape, bits, length)
        groups.append(Group(title, everyone(spec(shape, bits, length)), {"do": "train"}, rounds))
    return groups


def generation(quick: bool) -> list[Group]:
    groups = []
    for shape in (SMALL, LARGE)[: 1 if quick else None]:
        for bits in BITS[: 1 if quick else None]:
            contestants = everyone(spec(shape, bits))
            contestants.pop("Free Transformer, one plan per sequence")
            for batch in BATCHES[: 1 if quick else None]:
                title = f"{name_of(shape)}, H = {bits}, batch {batch}"
                rounds = 1 if quick else (7 if (shape, bits) == (SMALL, 8) else 3 if shape is SMALL else 1)
                request = {"do": "generate", "batch": batch, "new": 32 if quick else NEW}
                groups.append(Group(title, contestants, request, rounds))
            title = f"{name_of(shape)}, H = {bits}, first token after 1,024"
            request = {"do": "generate", "batch": 1, "new": 1, "prompt": 64 if quick else 1024}
            without_encoder = ("Free", spec(shape, bits, prompt_plan="prior"))
            contestants["Free Transformer, prompt plans from the prior"] = without_encoder
            groups.append(Group(title, contestants, request, 1 if quick else 9))
    return groups


def compiled(quick: bool) -> list[Group]:
    base = {**spec(SMALL, 8), "compiled": True}
    names = {"Llama": ("Llama", base), "Free Transformer, one plan per token": ("Free", base)}
    request = {"do": "generate", "new": 16 if quick else NEW}
    return [
        Group(f"{name_of(SMALL)}, H = 8, batch {batch}", names, {**request, "batch": batch}, 1 if quick else 5)
        for batch in BATCHES[: 1 if quick else None]
    ]


def step_at(shape: dict[str, int], rounds: int, **more: Any) -> Group:
    title = title_of_step(shape, 8) + (", bf16" if more.get("bf16") else "")
    return Group(title, everyone(spec(shape, 8, **more)), {"do": "train"}, rounds)


def bf16(quick: bool) -> list[Group]:
    if quick:
        return [step_at(SMALL, 2, bf16=True)]
    return [step_at(SMALL, 7, bf16=True), step_at(LARGE, 6, bf16=True)]


def allocator(quick: bool) -> list[Group]:
    """A step with an allocator that never returns memory, so that no page is touched for the first time."""
    if quick:
        return [step_at(SMALL, 2, allocator="keeps")]
    return [
        step_at(SMALL, 9, allocator="keeps"),
        step_at(LARGE, 4, allocator="keeps"),
        step_at(LARGE, 6, allocator="keeps", bf16=True),
    ]


MAKERS = {"training": training, "allocator": allocator, "generation": generation, "compiled": compiled, "bf16": bf16}


def memory(quick: bool) -> list[tuple[str, dict[str, tuple[str, dict[str, Any]]], list[dict[str, Any]]]]:
    """Titles, contestants and requests: training at every shape, generation at two batch sizes."""
    cases = []
    for shape, length, bits in shapes()[: 1 if quick else None]:
        title = title_of_step(shape, bits, length)
        cases.append((title, everyone(spec(shape, bits, length, allocator="exact")), [{"do": "train"}] * MEMORY_STEPS))
    for batch in (1, 32)[: 0 if quick else None]:
        contestants = everyone(spec(SMALL, 8, allocator="exact"))
        contestants.pop("Free Transformer, one plan per sequence")
        title = f"{name_of(SMALL)}, H = 8, generating {NEW} tokens at batch {batch}"
        cases.append((title, contestants, [{"do": "generate", "batch": batch, "new": NEW}]))
    return cases


def peaks(contestants: dict[str, tuple[str, dict[str, Any]]], requests: list[dict[str, Any]]) -> dict[str, Any]:
    bytes_of: dict[str, dict[str, int]] = {}
    failed: dict[str, str] = {}
    for label, (name, of_contestant) in contestants.items():
        try:
            worker = Worker(name, of_contestant)
            for request in requests:
                worker.ask(**request)
            counted = worker.ask(do="count")
            kept = 4 * (3 if requests[0]["do"] == "train" else 1)  # a weight, and in training Adam's state of it
            bytes_of[label] = {"peak": worker.ask(do="peak")["bytes"], "table": kept * counted["table"]}
            worker.close()
        except Failed as failure:
            failed[label] = str(failure)
        CONSOLE.print(f"[dim]{label}: {failed.get(label) or bytes_of[label]}")
    return {"bytes": bytes_of, "failed": failed}


def merged(before: list[dict[str, Any]], found: dict[str, Any], titles: list[str]) -> list[dict[str, Any]]:
    """Adds a result, or replaces that of the same title, and sorts by `titles`."""
    groups = {group["title"]: group for group in [*before, found]}
    return [groups[title] for title in titles if title in groups]


def keep(results: dict[str, Any], quick: bool) -> None:
    if not quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def matmul_rates() -> dict[str, float]:
    """FLOP/s of a raw matmul, median of 15."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
        taken = []
        for _ in range(16):
            started = time.perf_counter()
            left @ right
            taken.append(time.perf_counter() - started)
        rates[str(dtype).removeprefix("torch.")] = 2 * 2048**3 / statistics.median(taken[1:])
    return rates


def beside(commit: str, parts: list[str], only: str) -> None:
    """Ratios to Llama of this checkout and of another commit, in the same rounds. Prints them and creates no files."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, commit], check=True)
        try:
            for group in [group for part in parts for group in MAKERS[part](False) if only in group.title]:
                (name, base) = group.specs["Llama"]
                contestants = {"Llama": (name, base)}
                for span in (1, "sequence"):
                    for label, source in (("now", ROOT), (commit, Path(folder))):
                        contestants[f"plan_span={span}, {label}"] = (
                            "Free",
                            {**base, "span": span, "source": f"{source}/src"},
                        )
                group.specs, group.rounds = contestants, 9 if base["width"] == SMALL["width"] else 3
                with Progress(console=CONSOLE, transient=True) as progress:
                    group.run(progress)
                show_ratios(group)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def show_ratios(group: Group) -> None:
    """Prints median and quartiles over rounds of each contestant's time relative to Llama's."""
    CONSOLE.print(f"{group.title}; {machine()['cpu']}, {torch.get_num_threads()} threads")
    for label, seconds in group.seconds.items():
        pairs = zip(seconds, group.seconds["Llama"], strict=True)
        ratios = [own / llama for own, llama in pairs if own is not None and llama is not None]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        CONSOLE.print(f"  {label:32} {middle:.3f} ({low:.3f} to {high:.3f}) x Llama")
    for label, reason in group.failed.items():
        CONSOLE.print(f"  {label}: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (default: all)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="check that the script works, with one shape and few rounds; does not update the report",
    )
    parser.add_argument("--only", default="", help="measure only groups whose title contains this")
    parser.add_argument("--beside", metavar="COMMIT", help="print ratios to Llama of this checkout and of COMMIT")
    options = parser.parse_args()
    if options.beside:
        return beside(options.beside, [part for part in options.parts if part in MAKERS], options.only)
    RESULTS.parent.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.quick else {}
    for part in options.parts:
        CONSOLE.rule(part)
        if part == "memory":
            cases = memory(options.quick)
            for title, contestants, requests in cases:
                if options.only in title:
                    found = {"title": title, **peaks(contestants, requests)}
                    results[part] = merged(results.get(part, []), found, [case[0] for case in cases])
                    keep(results, options.quick)
        elif part == "machine":
            results[part] = machine()
        else:
            groups = MAKERS[part](options.quick)
            titles = [group.title for group in groups]
            rates = results.setdefault("rates", {})
            rates[part] = [matmul_rates()]
            with Progress(console=CONSOLE) as progress:
                for group in groups:
                    if options.only not in group.title:
                        continue
                    group.run(progress)
                    found = {key: value for key, value in asdict(group).items() if key != "specs"}
                    results[part] = merged(results.get(part, []), found, titles)
                    keep(results, options.quick)
            rates[part].append(matmul_rates())
        keep(results, options.quick)
    if options.quick:
        json.dump(results, sys.stdout, indent=1)
    else:
        write_report(results)


if __name__ == "__main__":
    main()
