"""One entry point for all export formats."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.errors import InputError
from free_transformer.export.aot import export_aot
from free_transformer.export.files import Difference
from free_transformer.export.onnx import export_onnx
from free_transformer.export.quantize import quantize as save_quantized
from free_transformer.reporting.table import Table

FORMATS = ("onnx", "torch", "aot")


def check_format(to: str, quantize: str | None, static: tuple[int, int] | None) -> None:
    """Raises `InputError` for an unknown format, or options that it does not support."""
    if to not in FORMATS:
        raise InputError(f"--to {to}: onnx, torch or aot")
    if to == "torch" and (quantize is None or static is not None):
        raise InputError("--to torch is for --quantize, and takes no --static")
    if to == "aot" and (static is None or quantize is not None):
        raise InputError("--to aot needs --static BATCH LENGTH, and takes no --quantize")


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    to: str = "onnx",
    quantize: str | None = None,
    static: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> list[Difference]:
    """
    Exports a model, and returns how far the outputs of the export differ from the model's; empty for `to="torch"`.

    Args:
        to: one of `FORMATS`.
        quantize: `"int8-weight"` or `"int8-dynamic"`; required by `"torch"`.
        static: numbers of texts and of tokens of fixed shapes; required by `"aot"`.
        overwrite: replace the folder whatever it contains. Otherwise it must be new, empty or an earlier export.

    Raises:
        InputError: for options that cannot be combined, a model without a plan, and a folder with other files.
        MissingDependency: for a package that the format needs.
        RunError: if an output differs from the model's by more than the tolerance.
    """
    check_format(to, quantize, static)
    if to == "torch":
        save_quantized(model, quantize, folder, tokenizer, overwrite)
        return []
    if to == "aot":
        assert static is not None
        return export_aot(model, folder, static, tokenizer, overwrite).differences
    return export_onnx(model, folder, tokenizer, static, quantize, overwrite=overwrite).differences


def difference_table(differences: Sequence[Difference]) -> Table:
    """Builds a table of the largest difference of each output over all shapes, without the cache."""
    by_output: dict[tuple[str, str], list[Difference]] = {}
    for each in differences:
        if not each.output.startswith("present"):
            by_output.setdefault((each.graph, each.output), []).append(each)
    rows = []
    for name, tried in by_output.items():
        shapes = ", ".join(dict.fromkeys(f"{each.texts} x {each.tokens}" for each in tried))
        rows.append([*name, f"{max(each.difference for each in tried):.2g}", shapes])
    return Table(["graph", "output", "largest difference", "texts x tokens, with and without padding"], rows)
