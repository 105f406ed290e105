"""`free-transformer train`."""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from free_transformer.cli.options import ConfigArgument
from free_transformer.cli.output import print_line, print_table, print_verdict, print_warning
from free_transformer.files import check_own_file

if TYPE_CHECKING:
    from free_transformer.settings import Settings


class TrainCommand(TyperCommand):
    """Describes all settings at the end of the help; they are imported only then."""

    def format_help(self, *args: Any) -> None:  # click's classes have different names in versions of typer
        from free_transformer.settings import describe_settings

        self.epilog = "Settings, as section.name=value:\n\n" + describe_settings()
        super().format_help(*args)


def train(
    config: ConfigArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings that replace those of CONFIG, such as training.learning_rate=3e-4.",
            metavar="[SECTION.NAME=VALUE]...",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Run a few steps, report parameters, memory, tokens and time, and exit without training."
        ),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            help="Setting that may differ from the resumed run although training then continues on other text, such as "
            "data.train or training.seed; `all` for every setting; can be repeated.",
            metavar="SECTION.NAME",
        ),
    ] = None,
) -> None:
    """
    Train a Free Transformer (`model.kind=free`) or its baseline, or resume an interrupted run.

    Examples:

    - `free-transformer train config.yaml`
    - `free-transformer train config.yaml training.max_steps=2000`
    """
    from free_transformer.runs.run import Run
    from free_transformer.settings import load_settings
    from free_transformer.training.loop import train as train_run

    settings = load_settings(config, overrides)
    if dry_run:
        _show_preview(settings)
        return
    check_own_file(Run(settings.run_dir).report_file)
    run = train_run(settings, allow_change=allow_change or ())
    if os.environ.get("RANK", "0") == "0":
        from free_transformer.runs.report import write_run_report
        from free_transformer.runs.verdict import verdict_of

        print_verdict(verdict_of(run))
        print_line(f"report: {write_run_report(run.path)}")


def _show_preview(settings: "Settings") -> None:
    from free_transformer.training.preview import preview

    found = preview(settings)
    if found is None:
        return
    for table in (found.parameter_table(), found.stage_table(), found.cost_table()):
        print_table(table)
    for group in found.groups:
        print_line(group)
    for warning in found.warnings:
        print_warning(warning)
