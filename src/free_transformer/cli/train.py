"""`free-transformer train`."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from free_transformer.cli.options import ConfigArgument
from free_transformer.cli.output import print_line, print_table, print_verdict, print_warning
from free_transformer.files import check_own_file

if TYPE_CHECKING:
    from free_transformer.settings import Settings


def train(
    config: ConfigArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings that replace those of CONFIG, such as training.learning_rate=3e-4.",
            metavar="[SECTION.NAME=VALUE]...",
        ),
    ] = None,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline",
            help="Train the baseline of these settings, the same Llama without a plan, in the folder "
            "`RUN_DIR-baseline` (in RUN_DIR if its name ends with `baseline`).",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Run a few steps, report parameters, memory, tokens and the measured time per step, and exit without "
            "creating files.",
        ),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            help="Setting that may differ from the resumed run even if training then continues on different rows, "
            "such as data.train or training.seed; `all` allows every setting; can be repeated.",
            metavar="SECTION.NAME",
        ),
    ] = None,
) -> None:
    """
    Train a Free Transformer or its baseline, or resume an interrupted run.

    Examples:

    - `free-transformer train config.yaml`
    - `free-transformer train config.yaml run_dir=runs/own-text data.train=texts/ data.validation=held_out/`
    - `free-transformer train config.yaml --baseline`
    """
    from free_transformer.runs.run import Run
    from free_transformer.settings import load_baseline_settings, load_settings, override_warnings
    from free_transformer.training.loop import train as train_run

    settings = (load_baseline_settings if baseline else load_settings)(config, overrides)
    warnings = override_warnings(settings, overrides or [], config)
    if dry_run:
        _show_preview(settings, warnings)
        return
    check_own_file(Run(settings.run_dir).report_file)
    run = train_run(settings, allow_change=allow_change or (), warnings=warnings)
    if os.environ.get("RANK", "0") == "0":
        from free_transformer.runs.report import write_run_report
        from free_transformer.runs.verdict import verdict_of

        print_verdict(verdict_of(run))
        print_line(f"report: {write_run_report(run.path)}")


def _show_preview(settings: "Settings", warnings: Sequence[str]) -> None:
    from free_transformer.training.preview import preview

    found = preview(settings)
    if found is None:
        return
    for table in (found.parameter_table(), found.stage_table(), found.cost_table()):
        print_table(table)
    for group in found.groups:
        print_line(group)
    for warning in (*found.warnings, *warnings):
        print_warning(warning)
