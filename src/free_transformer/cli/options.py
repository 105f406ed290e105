"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from free_transformer.model.sampling import check_seed

PATH_OPTIONS = ("--out", "--output", "--onnx", "--include-path", "--plan-from", "--baseline", "--space")

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file of settings.", metavar="CONFIG")]
RunArgument = Annotated[Path, typer.Argument(help="Folder of a run, created by `train`.", metavar="RUN")]
RunsArgument = Annotated[list[Path], typer.Argument(help="Folders of runs, created by `train`.", metavar="RUN...")]
ModelArgument = Annotated[Path, typer.Argument(help="Folder of a run, a saved model or an export.", metavar="RUN")]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data", help="File, folder or data set of held-out text; can be repeated. Default: the run's data.validation."
    ),
]
NumPlansOption = Annotated[int, typer.Option(min=1, help="Number of plans sampled for each text, at least 1.")]
MethodOption = Annotated[
    str,
    typer.Option(
        help="Estimator of the likelihood: importance (an upper bound of the NLL), particle_filter (a tighter bound "
        "for texts with many plans) or exact (for texts with one plan of at most 10 bits)."
    ),
]
PriorOption = Annotated[
    str, typer.Option(help="Prior of the plans: uniform, or aggregate (the plans of the training texts).")
]
PromptPlanOption = Annotated[
    str, typer.Option(help="Source of the prompt's plans: posterior (the encoder reads the prompt) or prior.")
]
PlanStrengthOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Factor of the plan's vectors: above 1 strengthens the effect of the plan, 0 removes it. Default: the "
        "model's own, normally 1.",
    ),
]
RowsOption = Annotated[int, typer.Option(min=1, help="Maximum number of rows, sampled at random from the text.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Number of rows per batch, at least 1.")]
SeedOption = Annotated[
    int, typer.Option(help="Seed of all random numbers, from -2^63 to 2^64 - 1.", callback=check_seed)
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace existing files of any kind.")]
