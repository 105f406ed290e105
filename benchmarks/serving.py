"""
Measures a server under load: 200 requests at once compared with one by one, whether each response equals the response
to the request alone, latency, and memory over 2,000 requests. `make bench-serving`; docs/performance.md.

With `--beside COMMIT`, the servers of this checkout and of a commit receive the same requests in turn, and the ratios
of their times are printed.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from comparison_report import table
from openai import AsyncOpenAI

from free_transformer.data import begin_token, encode
from free_transformer.export.onnx import export_onnx
from free_transformer.files import write_json
from free_transformer.training import Run

ROOT = Path(__file__).parent.parent
REQUESTS, LONG_RUN, ROUNDS = 200, 2000, 3
AT_A_TIME = 64  # of the long run
PROMPT_CHARACTERS, NEW_TOKENS = (10, 60), (16, 96)


@dataclass
class Load:
    """One round of requests: seconds for all, for each, and the responses."""

    seconds: float
    latencies: list[float]
    answers: list[dict[str, Any]]

    @property
    def tokens(self) -> int:
        return sum(answer["tokens"] for answer in self.answers)


def build_requests(run_folder: Path, count: int) -> list[dict[str, Any]]:
    """Prompts of held-out text, each with its own seed, length and plan: given, of an example, or of the prompt."""
    rng = random.Random(0)
    lines = (run_folder / "text" / "validation.jsonl").read_text().splitlines()
    held_out = [json.loads(line)["text"] for line in lines]
    texts = [text[rng.randrange(max(1, len(text) - 200)) :][:200] for text in rng.choices(held_out, k=count)]
    requests = []
    for number, text in enumerate(texts):
        request: dict[str, Any] = {
            "prompt": text[: rng.randint(*PROMPT_CHARACTERS)],
            "max_tokens": rng.randint(*NEW_TOKENS),
            "temperature": rng.choice([0.0, 0.7, 1.0]),
            "seed": number,
        }
        steering = [{"plan": [rng.randint(0, 1) for _ in range(8)]}, {"plan_from": rng.choice(texts)}, {}]
        requests.append({**request, "extra_body": steering[number % 3]})
    return requests


@contextlib.contextmanager
def server(arguments: list[str], source: Path | None = None) -> Iterator[str]:
    """Starts a server in its own process, of this checkout or another source folder, and yields its address."""
    environment = os.environ if source is None else {**os.environ, "PYTHONPATH": str(source)}
    command = [sys.executable, "-u", "-m", "free_transformer", "serve", "--port", "0", *arguments]
    with tempfile.TemporaryFile("a+") as log:  # not a pipe, which would fill up
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            yield _address(process, log)
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen, log: IO[str]) -> str:
    while process.poll() is None:
        log.seek(0)
        if found := re.search(r"http://\S+/v1", log.read()):
            return found[0]
        time.sleep(0.1)
    raise RuntimeError("the server did not start")


async def ask(client: AsyncOpenAI, request: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    started = time.perf_counter()
    answer = await client.completions.create(model=None, **request)  # type: ignore[call-overload]
    choice = answer.choices[0]
    told = {"text": choice.text, "plan": choice.plan, "end": choice.finish_reason}
    return time.perf_counter() - started, {**told, "tokens": answer.usage.completion_tokens}


async def send(client: AsyncOpenAI, requests: list[dict[str, Any]], at_a_time: int) -> Load:
    places = asyncio.Semaphore(at_a_time)

    async def one(request: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        async with places:
            return await ask(client, request)

    started = time.perf_counter()
    found = await asyncio.gather(*map(one, requests))
    return Load(time.perf_counter() - started, [each[0] for each in found], [each[1] for each in found])


def memory(address: str) -> float:
    """Memory of the server's process in MB."""
    page = urllib.request.urlopen(address.replace("/v1", "/metrics")).read().decode()
    return float(re.findall(r"^process_resident_memory_bytes (\S+)", page, re.M)[0]) / 1e6


async def measure(address: str, requests: list[dict[str, Any]], rounds: int, long_run: int) -> dict[str, Any]:
    async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:
        await client.models.list()
        await send(client, requests[:8], 1)  # warm-up
        alone, together = [], []
        for _ in range(rounds):
            alone.append(await send(client, requests, 1))
            together.append(await send(client, requests, len(requests)))
        resident = [memory(address)]
        for _ in range(max(1, long_run // len(requests))):
            await send(client, requests, AT_A_TIME)
            resident.append(memory(address))
    different = sum(
        one != other
        for load in [*alone[1:], *together]
        for one, other in zip(alone[0].answers, load.answers, strict=True)
    )
    latencies = sorted(each for load in together for each in load.latencies)
    return {
        "requests": len(requests),
        "answers_that_differ": different,
        "tokens": alone[0].tokens,
        "one_by_one_seconds": statistics.median(load.seconds for load in alone),
        "together_seconds": statistics.median(load.seconds for load in together),
        "ratio": statistics.median(one.seconds / all_.seconds for one, all_ in zip(alone, together, strict=True)),
        "latency_alone_p50": statistics.median(each for load in alone for each in load.latencies),
        "latency_p50": statistics.median(latencies),
        "latency_p99": latencies[int(0.99 * len(latencies))],
        "memory_mb": resident,
    }


def time_generate(run_folder: Path, requests: list[dict[str, Any]]) -> float:
    """Seconds that `generate` takes for the same requests one by one, without a server."""
    run = Run(run_folder / "free")
    model, tokenizer = run.load_model(), run.load_tokenizer()
    started = time.perf_counter()
    for request in requests:
        tokens = torch.tensor([[begin_token(tokenizer), *encode(tokenizer, [request["prompt"]])[0]]])
        sampling = {"do_sample": True, "temperature": request["temperature"], "top_k": 0}
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=request["max_tokens"],
            **(sampling if request["temperature"] else {}),
        )
    return time.perf_counter() - started


async def measure_beside(addresses: list[str], requests: list[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Times of the first server relative to the second: medians of the ratios of each round."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncOpenAI(base_url=each, api_key="none", max_retries=0, timeout=600))
            for each in addresses
        ]
        for client in clients:
            await send(client, requests[:32], 1)
        loads: dict[int, list[list[Load]]] = {1: [], len(requests): []}
        for number in range(rounds):
            order = [0, 1] if number % 2 else [1, 0]
            for at_a_time, found in loads.items():
                by_server = {index: await send(clients[index], requests, at_a_time) for index in order}
                found.append([by_server[0], by_server[1]])

    def ratio(pairs: list[list[Load]], value: Callable[[Load], float]) -> float:
        return statistics.median(value(new) / value(old) for new, old in pairs)

    alone, together = loads.values()
    return {
        "one by one": ratio(alone, lambda load: load.seconds),
        "all at once": ratio(together, lambda load: load.seconds),
        "latency alone, p50": ratio(alone, lambda load: statistics.median(load.latencies)),
        "latency, p50": ratio(together, lambda load: statistics.median(load.latencies)),
        "latency, p99": ratio(together, lambda load: sorted(load.latencies)[int(0.99 * len(load.latencies))]),
        "responses that differ": sum(
            one != other
            for new, old in [*alone, *together]
            for one, other in zip(new.answers, old.answers, strict=True)
        ),
    }


def beside(commit: str, served: dict[str, list[str]], requests: list[dict[str, Any]], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, commit], check=True)
        try:
            for name, arguments in served.items():
                with server(arguments) as new, server(arguments, Path(folder) / "src") as old:
                    found = asyncio.run(measure_beside([new, old], requests, rounds))
                print(
                    f"{name}, this checkout over {commit}: ", {what: round(value, 3) for what, value in found.items()}
                )
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/three_styles"), help="folder of `make demo`")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--long-run", type=int, default=LONG_RUN, help="number of requests during which memory is measured"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/serving.json"))
    parser.add_argument("--beside", metavar="COMMIT", help="print times relative to COMMIT, and create no files")
    options = parser.parse_args()
    requests = build_requests(options.run, options.requests)
    export = options.run / "free" / "onnx"
    if not export.is_dir():
        run = Run(options.run / "free")
        export_onnx(run.load_model(), export, run.load_tokenizer())
    served = {"PyTorch": [str(options.run / "free")], "onnxruntime": ["--onnx", str(export)]}
    if options.beside:
        beside(options.beside, served, requests, options.rounds)
        return
    results: dict[str, Any] = {}
    for name, arguments in served.items():
        with server(arguments) as address:
            results[name] = asyncio.run(measure(address, requests, options.rounds, options.long_run))
        if name == "PyTorch":
            results[name]["generate_seconds"] = time_generate(options.run, requests)
        write_json(options.out, results)
    rows = []
    for name, found in results.items():
        latency = f"{found['latency_alone_p50']:.2f}", f"{found['latency_p50']:.2f}", f"{found['latency_p99']:.2f}"
        grown = f"{found['memory_mb'][0]:.0f} to {found['memory_mb'][-1]:.0f}"
        rows.append([name, str(found["answers_that_differ"]), f"{found['ratio']:.1f} x", *latency, grown])
    header = ["", "responses that differ", "throughput", "p50 alone, s", "p50, s", "p99, s", "memory, MB"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
