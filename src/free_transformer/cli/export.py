"""`free-transformer export`."""

from pathlib import Path
from typing import Annotated

import typer

from free_transformer.cli import output
from free_transformer.cli.options import OverwriteOption, PlanStrengthOption, RunArgument
from free_transformer.files import check_replaceable


def export(
    run: RunArgument,
    to: Annotated[
        str,
        typer.Option(
            help="Format: onnx (graphs for onnxruntime and TensorRT), torch (a model folder; needs --quantize) or aot "
            "(ahead-of-time compiled packages for C++; needs --static)."
        ),
    ] = "onnx",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Quantization: int8-weight (8-bit weights) or int8-dynamic (also multiplies in integers). Default: "
            "none."
        ),
    ] = None,
    static: Annotated[
        tuple[int, int] | None,
        typer.Option(
            help="Fixed number of texts and of tokens per text, for TensorRT. Default: any.", metavar="BATCH LENGTH"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to create, or an earlier export to replace. Default: RUN/TO-QUANTIZE-BATCHxLENGTH."),
    ] = None,
    plan_strength: PlanStrengthOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """
    Export a trained model as ONNX graphs, 8-bit weights or compiled packages, and compare the result with the model.

    Examples:

    - `free-transformer export runs/my-run`
    - `free-transformer export runs/my-run --to torch --quantize int8-weight`
    """
    from free_transformer.export.formats import check_format, difference_table, export_model
    from free_transformer.export.load import load_with_tokenizer
    from free_transformer.runs.run import check_folder_of_run

    check_folder_of_run(run)
    check_format(to, quantize, static)
    sizes = "x".join(map(str, static or ()))
    folder = out or run / "-".join(part for part in (to, quantize, sizes) if part)
    check_replaceable(folder, "export", overwrite, [run, run / "model"])
    model, tokenizer = load_with_tokenizer(run, plan_strength)
    with output.status(f"exporting to {folder}"):
        differences = export_model(
            model, tokenizer, folder, to=to, quantize=quantize, static=static, overwrite=overwrite
        )
    output.print_table(difference_table(differences))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    output.print_line(f"{size / 1e6:.1f} MB, saved to {folder}")
