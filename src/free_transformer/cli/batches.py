"""Loads the model of `free-transformer serve`, in PyTorch or in onnxruntime without torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from free_transformer.errors import InputError
from free_transformer.files import not_a_folder

if TYPE_CHECKING:
    from free_transformer.serving.batch import Batch


def served_folder(run: Path | None, onnx: Path | None) -> Path:
    """Returns the folder to serve. Raises `InputError` unless exactly one is given and it exists."""
    folder = onnx or run
    if folder is None or (run is not None and onnx is not None):
        raise InputError("give either a RUN or an export with --onnx FOLDER")
    if problem := not_a_folder(folder):
        created_by = "train" if onnx is None else "export"
        raise InputError(f"{folder}: {problem}; give a folder created by `free-transformer {created_by}`")
    return folder


def torch_batch(
    folder: Path, rows: int | None, length: int | None, threads: int | None, plan_strength: float | None = None
) -> "Batch":
    """
    Loads a run or a saved model for the server.

    Args:
        rows: maximum number of texts generated together. Default: 32.
        length: maximum number of tokens per text. Default: the model's, at most 2,048.
        threads: CPU threads per matrix product. Default: one per core.
        plan_strength: factor of plan vectors. Default: the configuration's.

    Raises:
        InputError: for a baseline, and a `length` greater than the model's.
    """
    import torch

    from free_transformer.distributed.processes import find_device
    from free_transformer.export.load import load_with_tokenizer
    from free_transformer.model.modeling import FreeTransformer
    from free_transformer.serving.torch_batch import TorchBatch

    model, tokenizer = load_with_tokenizer(folder, plan_strength)
    if not isinstance(model, FreeTransformer):
        raise InputError(f"{folder}: a baseline has no plan; serve needs a Free Transformer")
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchBatch(model.to(find_device("auto")), tokenizer, rows or 32, length)


def onnx_batch(folder: Path, rows: int | None, length: int | None, threads: int | None) -> "Batch":
    """Loads an ONNX export for the server; arguments as for `torch_batch`, with 8 rows by default."""
    from free_transformer.runtime.onnx_model import OnnxFreeTransformer
    from free_transformer.serving.onnx_batch import OnnxBatch

    return OnnxBatch(OnnxFreeTransformer(folder, threads=threads), rows or 8, length)
