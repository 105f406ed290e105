"""
Measures how long `free-transformer explore` takes to fill its grid with texts of 200 tokens, with the model in PyTorch
and with its ONNX export in turns, without a browser: `python benchmarks/explorer_grid.py models/three-styles`.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from fastapi.testclient import TestClient

from free_transformer.data import load_tokenizer
from free_transformer.explorer.app import create_explorer
from free_transformer.explorer.explored import COLUMNS, ROWS, Explored
from free_transformer.explorer.sources import open_model
from free_transformer.export.onnx import export_onnx
from free_transformer.runs.load_model import load_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("--tokens", type=int, default=200, help="length of each text")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "onnx"
        export_onnx(load_pretrained(options.model), export, load_tokenizer(str(options.model)))
        seconds: dict[str, list[float]] = {"PyTorch": [], "ONNX": []}
        apps = [create_explorer(open_model(place, options.model / "baseline")) for place in (options.model, export)]
        with TestClient(apps[0]), TestClient(apps[1]):
            for turn in range(options.rounds + 1):  # the first round is not counted
                for found, app in zip(seconds.values(), apps, strict=True):
                    found.append(asyncio.run(fill(app.state.explored, options.tokens, turn)))
    for name, found in seconds.items():
        counted = found[1:]
        print(
            f"{name}: {ROWS} x {COLUMNS} texts of {options.tokens} tokens and a row of the baseline in "
            f"{statistics.median(counted):.2f} s ({min(counted):.2f} to {max(counted):.2f} in {len(counted)} rounds)"
        )


async def fill(explored: Explored, tokens: int, turn: int) -> float:
    """Seconds until the grid's last text is complete."""
    choices = replace(explored.start(), length=tokens, words=100 * turn)
    started = time.perf_counter()
    async for _ in explored.grid(choices, False, {}):
        pass
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
