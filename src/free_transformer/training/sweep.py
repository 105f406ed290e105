"""Sweeps: a sequence of runs with different settings, and a table of all results."""

import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from free_transformer.errors import InputError
from free_transformer.files import check_claimable, check_own_results, claimed_folder, first_line, write_json
from free_transformer.reporting.console import stderr_console
from free_transformer.runs.evaluate import evaluate_run
from free_transformer.runs.run import Run
from free_transformer.settings import Settings, SettingsError, load_settings
from free_transformer.settings.yaml_text import YamlError, split_yaml_list
from free_transformer.training.checkpoint import CheckpointFailed, list_checkpoints
from free_transformer.training.identity import flat
from free_transformer.training.loop import TrainingFailed, train
from free_transformer.training.sweep_summary import (
    SEED,
    Sweep,
    SweepRun,
    short_names,
    write_summary,
    write_sweep_report,
)

LONGEST_NAME = 100  # characters in the name of a folder
FAILURES = (TrainingFailed, CheckpointFailed, ValueError, OSError, torch.OutOfMemoryError)  # reported in one line

# Settings that do not change the results of a run.
HARMLESS = re.compile(
    r"logging\..*|data\.workers|training\.(device|compile|log_every|save_every|resume)|checkpoint\.(save_total|async_save)"
)


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """
    Parses `section.name=value,value,...` to the names of settings and their values as text, in the given order.

    A comma in brackets, braces or quotes is part of its value.

    Raises:
        SettingsError: for text that cannot be parsed.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not name:
            raise SettingsError(f"{text!r}: the grid needs section.name=value,value,... such as model.latent_dim=8,16")
        if name in grid:
            raise SettingsError(
                f"{name}: appears twice in the grid; give all its values at once, as in {name}=value,value"
            )
        grid[name] = _split_values(text, values)
    if len(grid.get("run_dir", [])) > 1:
        raise SettingsError(
            f"run_dir={','.join(grid['run_dir'])}: a sweep has a single folder with a subfolder per run; give one"
        )
    return grid


def _split_values(setting: str, text: str) -> list[str]:
    try:
        values = split_yaml_list(text)
    except YamlError as error:
        raise SettingsError(
            f"{setting!r}: not comma-separated YAML values (is a value empty, or a bracket or quote not closed?)"
        ) from error
    if not values or text.rstrip().endswith(","):
        raise SettingsError(f"{setting!r}: a value is empty; use '' for empty text, or null for no value")
    for value in values:
        if values.count(value) > 1:
            raise SettingsError(f"{setting!r}: {value} appears twice; give each value once")
    return values


def load_sweep(config: str | Path, grid: Sequence[str]) -> Sweep:
    """
    Loads a run for every combination of the grid's values, with its settings and any existing results.

    It does not write any files.

    Args:
        config: YAML file of settings; its `run_dir`, or the grid's, is the sweep's folder.
        grid: texts for `parse_grid`; a setting with one value has this value in all runs.

    Raises:
        SettingsError: for a grid or setting that cannot be used, or folders that contain something else.
    """
    values = parse_grid(grid)
    varied = [name for name in values if len(values[name]) > 1]
    folder, runs = Path(), []
    for combination in itertools.product(*values.values()):
        overrides = dict(zip(values, combination, strict=True))
        settings = load_settings(config, [f"{name}={value}" for name, value in overrides.items()])
        folder = settings.run_dir
        settings.run_dir = folder / _folder_name({name: overrides[name] for name in sorted(varied)})
        runs.append(SweepRun(overrides, settings))
    sweep = Sweep(folder, varied, runs)
    _check(sweep)
    for run in runs:
        _read_figures(run)
    return sweep


def _folder_name(values: dict[str, str]) -> str:
    """Returns a unique name for these values, which does not change if the grid grows or is reordered."""
    full = ",".join(f"{name}={value}" for name, value in zip(short_names(values), values.values(), strict=True))
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "_", full)
    if name != full or len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"
    return name or "run"


def _check(sweep: Sweep) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SettingsError("sweep needs a single process; start it without torchrun, or train each run with torchrun")
    if Run(sweep.folder).config_file.exists():
        raise SettingsError(
            f"{sweep.folder} is the folder of a run; choose another folder, such as run_dir={sweep.folder}-sweep"
        )
    check_claimable(sweep.folder, "sweep", ["sweep.json", "report.html"])
    check_own_results(sweep.folder / "sweep.json", "varied", "runs", "groups")
    if SEED in sweep.varied and importlib.util.find_spec("scipy") is None:
        raise SettingsError("confidence intervals over seeds need scipy: pip install scipy")
    known: dict[str, SweepRun] = {}
    for run in sweep.runs:
        other = known.setdefault(json.dumps(_flat(run.settings), sort_keys=True), run)
        if other is not run:
            raise SettingsError(f"{other.name} and {run.name} have the same settings; give each value once")
        _check_folder(run)


def _check_folder(run: SweepRun) -> None:
    """Raises `SettingsError` if training would continue with weights from other settings."""
    trained = Run(run.settings.run_dir)
    if not (list_checkpoints(trained.checkpoints) or _figures_file(run).is_file()):
        return
    old, new = _flat(trained.settings), _flat(run.settings.with_absolute_paths())
    for name in sorted(old.keys() | new.keys()):
        # config.yaml holds the resolved values of automatic settings
        left_open = new.get(name) == "auto" or (name == "model.plan_gradient" and name not in new)
        left_open |= name == "training.warmup_steps" and "warmup_steps" not in run.settings.training.model_fields_set
        raised = name == "training.max_steps" and old[name] < new[name]
        if old.get(name) != new.get(name) and not (left_open or raised or HARMLESS.fullmatch(name)):
            raise SettingsError(
                f"{trained.path}: was trained with {name}={old.get(name)}, not {new.get(name)}; choose another run_dir "
                "for the sweep, or delete this folder"
            )


def _flat(settings: Settings) -> dict[str, Any]:
    """Flattens settings to `section.name` and value, without `run_dir`."""
    return flat(settings.model_dump(mode="json", exclude={"run_dir"}))


def run_sweep(sweep: Sweep, quiet: bool = False) -> None:
    """
    Trains and evaluates, in order, the runs that are not done.

    A run that fails for any reason does not affect the others (see `sweep.failed`). `sweep.json` is updated after each
    run; `report.html` is written at the end.

    To continue a sweep that was stopped, load and run it again: finished runs are skipped, an interrupted run resumes
    from its checkpoint, and failed runs are retried.

    Raises:
        SettingsError: if another process is running the same sweep.
        TrainingStopped: after Ctrl-C or a termination signal, once the state of the run is saved.
    """
    console = stderr_console(quiet)
    with claimed_folder(sweep.folder, "sweep", ["sweep.json", "report.html"]):
        write_summary(sweep)
        for number, run in enumerate(sweep.runs, 1):
            title = f"run {number} of {len(sweep.runs)}, {run.name}"
            if run.status == "done":
                console.print(f"{title}: already done", soft_wrap=True)
                continue
            console.print(title, soft_wrap=True)
            _run_one(run, quiet, console)
            write_summary(sweep)
        write_sweep_report(sweep)


def _run_one(run: SweepRun, quiet: bool, console: Console) -> None:
    """Trains and evaluates a run, and records its status."""
    try:
        _train_and_evaluate(run, quiet)
        run.status, run.reason = "done", None
    except Exception as error:
        run.status, run.reason = "failed", first_line(error)
        if not isinstance(error, FAILURES):  # a bug or a machine fault: show the traceback
            run.reason = f"{type(error).__name__}: {run.reason}"
            console.print(traceback.format_exc().rstrip(), soft_wrap=True)
        console.print(f"{run.name} failed: {run.reason}", style="yellow", soft_wrap=True)


def _train_and_evaluate(run: SweepRun, quiet: bool) -> None:
    folder = Run(run.settings.run_dir)
    for file in (_figures_file(run), folder.evaluation_file):  # left over from a training with fewer steps
        file.unlink(missing_ok=True)
    train(run.settings, quiet)
    figures = _evaluate(folder) if run.settings.data.validation else _training_figures(folder)
    run.figures = {name: value for name, value in figures.items() if value is not None}
    write_json(_figures_file(run), run.figures)


def _figures_file(run: SweepRun) -> Path:
    """Returns the file of a run's figures, which exists only if the run is done."""
    return run.settings.run_dir / "figures.json"


def _read_figures(run: SweepRun) -> None:
    folder, file = Run(run.settings.run_dir), _figures_file(run)
    if not (file.is_file() and folder.model_folder.is_dir()):
        return
    if folder.settings.training.max_steps == run.settings.training.max_steps:
        run.status, run.figures = "done", json.loads(file.read_text(encoding="utf-8"))


def _training_figures(run: Run) -> dict[str, float | None]:
    lines = [line for line in run.read_metrics() if line["split"] == "train"]
    return {f"training_{name}": lines[-1].get(name) for name in ("loss", "kl") if lines}


def _evaluate(run: Run) -> dict[str, float | None]:
    """Evaluates a run, writes `metrics.json` as `evaluate` does, and returns the figures."""
    evaluation = evaluate_run(run, quiet=True)
    likelihood = evaluation.likelihood
    if not math.isfinite(likelihood.nll):
        raise InputError(f"the NLL of the held-out text is {likelihood.nll}")
    run.write_evaluation(likelihood, evaluation.bytes_per_token)
    figures = {name: getattr(likelihood, name) for name in ("nll", "elbo", "kl", "gap")}
    return {**figures, "live_bits": likelihood.usage and likelihood.usage.live_bits}
