"""Opens the model of `free-transformer explore`: a run, a model folder or an ONNX export, with its baseline."""

import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from free_transformer.errors import InputError
from free_transformer.explorer.survey import UNLABELED, Passage, PlanSurvey, survey_plans
from free_transformer.runtime.sessions import EXPORT_FILE
from free_transformer.serving.batch import Batch

BASELINE_FOLDER = "baseline"  # in the folder of a model
MAX_PASSAGES = 512
MAX_DOCUMENTS = 4096  # if there are no labels
MAX_DOCUMENT = 1024  # rows per document
ROWS = 32  # texts at a time, more than a grid has


@dataclass
class Opened:
    """
    The model that the page shows.

    Attributes:
        folder: of a run, a saved model or an ONNX export.
        baseline: folder of a run or a saved model without a plan; None without one.
        held_out: data sources of text for the survey of plans.
    """

    name: str
    folder: Path
    baseline: Path | None
    held_out: list[str]

    @property
    def is_onnx(self) -> bool:
        return (self.folder / EXPORT_FILE).is_file()

    def build(self) -> Batch:
        """Loads the model, ready to generate."""
        if self.is_onnx:
            from free_transformer.runtime.onnx_model import OnnxFreeTransformer
            from free_transformer.serving.onnx_batch import OnnxBatch

            return OnnxBatch(OnnxFreeTransformer(self.folder, threads=self.threads), ROWS)
        return _torch_batch(_model_folder(self.folder), self.threads)

    def build_baseline(self) -> Batch:
        """Loads the baseline as a Free Transformer with R = 0."""
        assert self.baseline is not None
        return _torch_batch(_model_folder(self.baseline), self.threads)

    @property
    def threads(self) -> int | None:
        """CPU threads per operation: half of the cores if the model and its baseline run at the same time."""
        return None if self.baseline is None else max(1, (os.cpu_count() or 1) // 2)


def open_model(folder: Path, baseline: Path | None = None, data: Sequence[str] = (), name: str | None = None) -> Opened:
    """
    Args:
        folder: of a run, a saved model or an ONNX export.
        baseline: folder of a run or a saved model without a plan. Default: see `_find_baseline`.
        data: held-out text, default that of the run.

    Raises:
        InputError: for a folder that is none of these.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a run, a saved model or an ONNX export")
    if baseline is None:
        baseline = _find_baseline(folder)
    found = Opened(name or folder.resolve().name, folder, baseline, list(data) or _held_out(folder))
    if not found.is_onnx:
        _model_folder(folder)
    if baseline is not None:
        _model_folder(baseline)
    return found


def survey(opened: Opened, batch: Batch, max_seconds: float, progress: Callable[[int], None]) -> PlanSurvey | None:
    """Loads the survey of plans from the model's folder, or makes one from held-out text. None without either."""
    stored = PlanSurvey.load(opened.folder, batch.latent_dim)
    if stored is not None or not opened.held_out:
        return stored
    window = _row_length(opened.folder, batch)
    passages = list(_passages(opened.held_out, batch, window))
    random.Random(0).shuffle(passages)
    return survey_plans(batch, passages[:MAX_PASSAGES], max_seconds, progress)


def _passages(sources: Sequence[str], batch: Batch, window: int) -> Iterator[Passage]:
    """Yields passages of `window` tokens, and shorter texts unchanged."""
    from free_transformer.data import read_documents, read_labeled

    by_source = read_labeled(sources) or {
        UNLABELED: list(itertools.islice(read_documents(sources, split="validation"), MAX_DOCUMENTS))
    }
    for source, texts in by_source.items():
        for text in texts:
            tokens = batch.encode(text, MAX_DOCUMENT * window)[1:]
            for start in range(0, max(1, len(tokens) - window + 2), window - 1):
                piece = tokens[start : start + window - 1]
                if len(piece) == window - 1 or start == 0:
                    yield Passage([batch.begin, *piece], source)


def _row_length(folder: Path, batch: Batch) -> int:
    """Returns the row length of training in tokens, if known, limited to the model's context."""
    from free_transformer.runs.run import Run

    try:
        length = Run.open(folder).settings.training.seq_len
    except InputError:
        length = batch.max_length
    return max(2, min(length, batch.max_length))


def _held_out(folder: Path) -> list[str]:
    from free_transformer.runs.run import Run

    try:
        return list(Run.open(folder).settings.data.validation)
    except InputError:
        return []


def model_files(folder: Path) -> list[Path]:
    """Returns the files of a model, excluding subfolders."""
    if not (folder / EXPORT_FILE).is_file():
        folder = _model_folder(folder)
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _find_baseline(folder: Path) -> Path | None:
    """Finds `baseline` in the folder of a model, or the run of `train --baseline` next to it; None without a model."""
    folder = folder.resolve()
    places = [folder / BASELINE_FOLDER, folder.with_name(f"{folder.name}-{BASELINE_FOLDER}")]
    return next((each for each in places if _trained_model(each) is not None), None)


def _trained_model(folder: Path) -> Path | None:
    """Returns the folder of a saved model, or that of a run's trained model; None without one."""
    return next((each for each in (folder, folder / "model") if (each / "config.json").is_file()), None)


def _model_folder(folder: Path) -> Path:
    """Same as `_trained_model`, but raises `InputError` for a folder without a model."""
    found = _trained_model(folder)
    if found is not None:
        return found
    raise InputError(f"{folder}: neither a trained run nor a saved model nor an ONNX export")


def _torch_batch(folder: Path, threads: int | None) -> Batch:
    """Loads a saved model with or without a plan. On a CPU it computes in float32."""
    import torch

    from free_transformer.data import load_tokenizer
    from free_transformer.distributed.processes import find_device
    from free_transformer.model.modeling import FreeTransformer
    from free_transformer.runs.load_model import load_pretrained
    from free_transformer.serving.torch_batch import TorchBatch

    if threads is not None:
        torch.set_num_threads(threads)
    device = find_device("auto")
    model = load_pretrained(folder, FreeTransformer)
    assert isinstance(model, FreeTransformer)
    return TorchBatch((model.float() if device.type == "cpu" else model).to(device), load_tokenizer(str(folder)), ROWS)
