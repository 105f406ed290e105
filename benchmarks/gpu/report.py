"""Writes the tables of docs/gpu.md from the results of the measurements on a GPU."""

import argparse
import json
import re
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

from free_transformer.reporting.table import Table

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
PAGE = ROOT / "docs" / "gpu.md"
PARTS = ("training", "plan_gradient", "generation", "peers", "learning")
NOT_RUN = "Not run."
NAMES = {
    "llama": "Llama",
    "llama_chunked": "Llama, loss in chunks",
    "token": "Free Transformer, one plan per token",
    "sequence": "Free Transformer, one plan per sequence",
    "llama_again": "Llama, measured again at the end",
    "x_transformers": "x-transformers",
    "free_transformer_012": "free-transformer 0.1.2",
}
LENGTHS = (2048, 4096)
PLAN_PART = "plan sampling, codebook, straight-through gradient"
Results = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="results folder (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to update (default: %(default)s)")
    parser.add_argument("--print", action="store_true", help="print the tables and leave the page as it is")
    options = parser.parse_args()
    results = read_results(options.folder)
    tables = {name: write(results) for name, write in SECTIONS.items()}
    if options.print:
        print("\n\n".join(f"## {name}\n{text}" for name, text in tables.items()))
        return
    page = options.page.read_text() if options.page.exists() else new_page()
    options.page.write_text(with_tables(page, tables))


def read_results(folder: Path) -> Results:
    """The results of each part, and `tests`; what was not run is empty."""
    found: Results = {}
    for part in PARTS:
        path = folder / f"{part}.json"
        found[part] = json.loads(path.read_text()) if path.exists() else {}
    found["tests"] = read_tests(folder / "tests.xml")
    return found


def read_tests(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    suites = list(xml.etree.ElementTree.parse(path).getroot().iter("testsuite"))
    names = ("tests", "failures", "errors", "skipped")
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}
    seconds = sum(float(suite.get("time", 0)) for suite in suites)
    cases = [case for suite in suites for case in suite.iter("testcase")]
    bad = [case.get("name", "") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {**counts, "seconds": seconds, "failed": bad}


def new_page() -> str:
    sections = "\n\n".join(f"## {name.capitalize()}\n\n<!-- gpu {name} -->\n<!-- end -->" for name in SECTIONS)
    return f"# Measurements on one GPU\n\nCommand: `make gpu`.\n\n{sections}\n"


def with_tables(page: str, tables: dict[str, str]) -> str:
    """The page with each table between `<!-- gpu NAME -->` and `<!-- end -->`."""
    for name, text in tables.items():
        mark = f"<!-- gpu {name} -->"
        page = re.sub(f"{mark}.*?<!-- end -->", lambda _, t=text, m=mark: f"{m}\n{t}\n<!-- end -->", page, flags=re.S)
    return page


def table(head: list[str], rows: list[list[str]]) -> str:
    return Table(head, rows).to_markdown()


def number(value: Any, digits: int = 2, unit: str = "", scale: float = 1.0) -> str:
    return "not run" if value is None else f"{value * scale:,.{digits}f}{unit}"


def value_of(results: dict[str, Any], *names: str) -> Any:
    """A value inside of nested results, None where it was not measured."""
    found: Any = results
    for name in names:
        if not isinstance(found, dict) or name not in found:
            return None
        found = found[name]
    return found


def ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def why_not(measured: Any) -> str:
    """Why there is no value: its error, or that it was not run."""
    error = value_of(measured or {}, "error")
    return "not run" if error is None or error.startswith("not measured") else f"failed: {error[:80]}"


def machine(results: Results) -> str:
    found = next((each["card"] for each in results.values() if "bf16_tflops" in each.get("card", {})), None)
    if found is None:
        return NOT_RUN
    trial = " **A trial with tiny shapes: do not use these figures.**" if found["small"] else ""
    memory = f", {found['memory_gb']:.0f} GB, driver {found['driver']}" if "memory_gb" in found else ""
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "triton") if found[name])
    return (
        f"{found['card']}{memory}, {versions}. Measured limits of the card: {found['bf16_tflops']:.0f} TFLOP/s in a "
        f"bf16 matmul of 8192³ on random data, {found['copy_tb_s']:.2f} TB/s in a copy, read and written.{trial}"
    )


def tests(results: Results) -> str:
    found = results["tests"]
    if not found:
        return NOT_RUN
    bad = found["failures"] + found["errors"]
    passed = found["tests"] - bad - found["skipped"]
    names = f" Failed: {', '.join(f'`{name}`' for name in found['failed'][:20])}." if found["failed"] else ""
    return (
        f"**{passed} of {found['tests'] - found['skipped']} tests pass** on the GPU ({found['skipped']} skipped, "
        f"{found['seconds']:.0f} s).{names}"
    )


def lengths_of(training: dict[str, Any]) -> list[int]:
    found = {int(match[1]) for name in training if (match := re.fullmatch(r"llama_(\d+)", name))}
    return sorted(found) or list(LENGTHS)


def goals(results: Results) -> str:
    if not results["training"]:
        return NOT_RUN
    training = results["training"]
    rows = []
    for length in lengths_of(training):

        def step(variant: str, what: str = "seconds", length: int = length) -> float | None:
            return value_of(training, f"{variant}_{length}", what)

        both = [each for each in (step("llama"), step("llama_again")) if each is not None]
        llama = sum(both) / len(both) if both else None
        for variant, goal in (("token", 0.04), ("sequence", 0.02)):
            cost = f"extra time of a step, {NAMES[variant].split(', ')[1]}, {length} tokens per row"
            paper = " (paper: 3.6 %)" if variant == "token" else ""
            found = [ratio(step(variant), base) for base in (llama, step("llama_chunked"))]
            rows.append([cost, f"≤ {goal:.0%}{paper}", *(_percent_more(each) for each in found)])
        rows.append([f"MFU, one plan per token, {length}", "≥ 45 %", number(step("token", "mfu"), 1, " %", 100), ""])
        memory = [ratio(step("token", "peak_gb"), step(base, "peak_gb")) for base in ("llama", "llama_chunked")]
        cells = [number(each, 3, " ×") for each in memory]
        rows.append([f"peak memory, one plan per token, {length}", "≤ 1.05 ×", *cells])
    caption = (
        "Goals and measured values, relative to the Llama of `transformers` and to the same with our chunked loss."
    )
    return f"{caption}\n\n" + table(
        ["", "goal", "measured, against the Llama", "against the Llama, loss in chunks"], rows
    )


def _percent_more(value: float | None) -> str:
    return "not run" if value is None else f"{100 * (value - 1):+.1f} %"


def training_table(results: Results) -> str:
    if not results["training"]:
        return NOT_RUN
    training = results["training"]
    rows = []
    for length in lengths_of(training):
        rows.append([f"*{length} tokens per row*", *[""] * 7])
        llama = training.get(f"llama_{length}", {})
        for variant in ("llama", "llama_chunked", "token", "sequence", "llama_again"):
            found = training.get(f"{variant}_{length}", {})
            if "seconds" not in found:
                if variant != "llama_again":
                    rows.append([NAMES[variant], why_not(found), *[""] * 6])
                continue
            rows.append([NAMES[variant], *_training_cells(found, llama)])
    head = ["", "ms per step (quartiles)", "tokens/s", "time, Llama = 1", "FLOPs, Llama = 1", "MFU, %"]
    caption = (
        "Training steps of the paper's 1.5B shape (28 layers, width 1536, vocabulary 2^17, H = 16), 8,192 tokens per "
        "step, bf16, compiled blocks, AdamW. MFU is relative to the measured matmul rate."
    )
    return f"{caption}\n\n" + table([*head, "peak memory, GB", "memory, Llama = 1"], rows)


def _training_cells(found: dict[str, Any], llama: dict[str, Any]) -> list[str]:
    spread = f"{1e3 * found['seconds']:.1f} ({1e3 * found['low']:.1f}–{1e3 * found['high']:.1f})"
    return [
        *(spread, f"{found['tokens_per_second']:,.0f}"),
        f"**{number(ratio(found['seconds'], llama.get('seconds')), 3)}**",
        number(ratio(found["flops_per_token"], llama.get("flops_per_token")), 3),
        *(number(found["mfu"], 1, scale=100), number(found["peak_gb"], 1)),
        number(ratio(found["peak_gb"], llama.get("peak_gb")), 3),
    ]


def profile_table(results: Results) -> str:
    if not results["training"]:
        return NOT_RUN
    profiles = {name: results["training"].get(f"profile_{name}", {}) for name in ("llama", "token")}
    rows = []
    for kind, title in (("parts_ms", "by part"), ("groups_ms", "by kernel")):
        rows.append([f"*{title}*", "", "", ""])
        found = {name: value_of(each, kind) or {} for name, each in profiles.items()}
        totals = {name: sum(each.values()) for name, each in found.items()}
        for label in dict.fromkeys([*found["token"], *found["llama"]]):
            own = found["token"].get(label)
            share = number(ratio(own, totals["token"]), 1, " %", 100) if own is not None else ""
            cells = [number(each.get(label), 2) if label in each or not each else "" for each in found.values()]
            rows.append([label, *cells, share])
    caption = "Where a training step spends the GPU's time, ms per step (2,048 tokens per row, two profiled steps)."
    return f"{caption}\n\n" + table(["", "Llama", "one plan per token", "share"], rows)


def syncs_table(results: Results) -> str:
    if not results["training"]:
        return NOT_RUN
    training, rows, places = results["training"], [], {}
    for name in ("syncs_compiled_llama", "syncs_compiled_token", "syncs_token", "syncs_sequence"):
        found = training.get(name, {})
        cases = {"whole": found} if "count" in found else found if "error" not in found else {}
        label = name.removeprefix("syncs_").replace("_", " ")
        if not cases:
            rows.append([label, "", why_not(found)])
        for kind, each in cases.items():
            rows.append([label, kind.replace("_", " "), number(each["count"], 0)])
            places |= each["places"]
    text = table(["model", "rows", "waits per step"], rows)
    listed = "\n".join(f"- `{' < '.join(place.split(' < ')[:4])}`" for place in list(places)[:12])
    caption = "How often a training step makes the CPU wait for the GPU."
    return f"{caption}\n\n{text}" + (f"\n\nPlaces, innermost call first:\n\n{listed}" if listed else "")


def plan_gradient_table(results: Results) -> str:
    found, rows = results["plan_gradient"], []
    names = [name for name in found if re.match(r"(sampled|exact|plan_part|update)", name)]
    for name in names:
        each = found[name]
        if "seconds" not in each:
            rows.append([name.replace("_", " "), why_not(each), "", ""])
            continue
        memory = each.get("extra_gb", each.get("peak_gb"))
        share = "" if each.get("share_of_step") is None else number(each["share_of_step"], 2, " %", 100)
        cells = [number(each["seconds"], 3, scale=1e3), "" if memory is None else number(memory), share]
        rows.append([name.replace("_", " "), *cells])
    if not rows:
        return NOT_RUN
    errors = found.get("relative_error", {})
    listed = ", ".join(
        f"{name.replace('_', ' ')} {each:.1e}" for name, each in errors.items() if isinstance(each, float)
    )
    caption = "Straight-through gradient of 2^16 codes of width 1536, by number of plans, and the codebook's optimizer."
    head = ["", "ms", "memory, GB", "share of a training step"]
    return f"{caption}\n\n{table(head, rows)}\n\nRelative error against float64: {listed or 'not run'}."


def generation_table(results: Results) -> str:
    found, rows = results["generation"], []
    for case in [name for name in found if re.fullmatch(r"(static|dynamic)_\d+", name)]:
        cache, batch = case.split("_")
        kind = "static cache, compiled" if cache == "static" else "default cache, uncompiled"
        for model in ("llama", "token", "sequence"):
            each = found[case].get(model, found[case])
            if "tokens_per_second" not in each:
                rows.append([kind, batch, NAMES[model], why_not(each), "", ""])
                continue
            speed, compiled = f"{each['tokens_per_second']:,.0f}", f"{each['graphs']} / {each['graph_breaks']}"
            rows.append([kind, batch, NAMES[model], speed, f"**{number(each.get('speed_ratio'), 3)}**", compiled])
    if not rows:
        return NOT_RUN
    caption = "Generation of 128 tokens after a prompt of 32, 124M shape, bf16. A ratio above 1 is faster than Llama."
    head = ["", "batch", "model", "tokens/s", "speed, Llama = 1", "compiled graphs / breaks"]
    return f"{caption}\n\n{table(head, rows)}"


def peers_table(results: Results) -> str:
    found, rows = results["peers"], []
    llama = next((each for name, each in found.items() if name.startswith("llama_")), {})
    for name, each in found.items():
        if name == "card":
            continue
        label, bits = name.rsplit("_", 1)
        shown = NAMES.get(label, label) + ("" if label == "llama" else f", H = {bits}")
        if "seconds" not in each:
            rows.append([shown, why_not(each), "", "", ""])
            continue
        cells = [number(each["seconds"], 1, scale=1e3), number(ratio(each["seconds"], llama.get("seconds")), 3)]
        memory = [number(each["peak_gb"], 2), number(ratio(each["peak_gb"], llama.get("peak_gb")), 3)]
        rows.append([shown, *cells, *memory])
    if not rows:
        return NOT_RUN
    caption = "Training steps of a 124M shape (12 layers, width 768, vocabulary 50,304), 8 × 1,024 tokens, uncompiled."
    head = ["", "ms per step", "time, Llama = 1", "peak memory, GB", "memory, Llama = 1"]
    return f"{caption}\n\n{table(head, rows)}"


def learning_table(results: Results) -> str:
    found = results["learning"]
    if not found:
        return NOT_RUN
    parts = (found.get(part, {}) for part in ("likelihood", "control"))
    likelihood, control = ({} if "error" in each else each for each in parts)
    rows = []
    for name in ("nll", "baseline_nll", "difference", "kl", "gap"):
        error = number(likelihood.get("standard_error"), 4) if name == "difference" else ""
        rows.append([name.replace("_", " "), number(likelihood.get(name), 4), error])
    for name, each in control.items():
        if isinstance(each, list) and len(each) == 2:
            rows.append([name.replace("_", " "), *(number(part, 3) for part in each)])
        elif isinstance(each, float):
            rows.append([name.replace("_", " "), number(each, 3), ""])
    steps = value_of(found, "train", "steps")
    caption = f"Learning of a 26M model on the demo's text, {steps or 'no'} steps; likelihoods in nats per byte."
    return f"{caption}\n\n" + table(["", "value", "standard error"], rows)


SECTIONS: dict[str, Callable[[Results], str]] = {
    "machine": machine,
    "correctness": tests,
    "goals": goals,
    "training": training_table,
    "profile": profile_table,
    "synchronizations": syncs_table,
    "plan gradient": plan_gradient_table,
    "generation": generation_table,
    "peers": peers_table,
    "learning": learning_table,
}

if __name__ == "__main__":
    main()
