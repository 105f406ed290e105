"""The part of the training text that each process, and each of its workers, reads."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from free_transformer.data import (
    Rows,
    build_rows,
    is_path_source,
    prefetched,
    read_documents,
    source_files,
    streamed_batches,
)
from free_transformer.data.rows import Batch, MixedRows, TrainingRows
from free_transformer.distributed.processes import Processes
from free_transformer.errors import InputError
from free_transformer.files import few
from free_transformer.settings import DataSettings, Settings, SettingsError, Sources
from free_transformer.settings.curriculum import Stage, stages_of


@dataclass
class Documents:
    """Documents that can be read repeatedly, once per epoch; only part number `part` of `parts`."""

    sources: list[str]
    column: str
    max_bad_rows: int
    part: int = 0
    parts: int = 1

    def __iter__(self) -> Iterator[str]:
        documents = read_documents(self.sources, self.column, max_bad_rows=self.max_bad_rows)
        return itertools.islice(documents, self.part, None, self.parts)


@dataclass
class Stream:
    """Streamed text: the documents of each source, and the shares with which their rows are sampled."""

    documents: list[Documents]
    shares: list[float]


TrainingData = TrainingRows | Stream  # in memory, or to stream


def load_validation(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Rows | None:
    """Loads the held-out text; None without any. Raises `SettingsError` for text that cannot be used."""
    data = settings.data
    if not data.validation:
        return None
    try:
        documents = read_documents(data.validation, data.column, "validation", data.max_bad_rows)
        return build_rows(documents, tokenizer, settings.training.seq_len)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def overlap_warning(training: list[TrainingData], validation: Rows | None, settings: Settings) -> str | None:
    """Returns a warning if held-out text is also in the training text, else None."""
    if validation is None:
        return None
    shared = _shared_documents(training, validation) or _shared_sources(training, settings.data.validation)
    if not shared:
        return None
    return (
        f"data.validation: {shared} also in the training text, so the held-out loss, early stopping and the best "
        "checkpoint measure memorization; use text that is not in the training text"
    )


def _shared_documents(training: list[TrainingData], validation: Rows) -> str:
    parts = [part for data in training if not isinstance(data, Stream) for part in rows_of(data)]
    if not parts:
        return ""
    known = np.concatenate([part.documents for part in parts])
    count = int(np.isin(validation.documents, known).sum())
    return f"{count} of {len(validation.documents)} documents are" if count else ""


def _shared_sources(training: list[TrainingData], validation: list[str]) -> str:
    """Compares files and data sets by name, since the documents of a stream are not known in advance."""
    streamed = [
        source for data in training if isinstance(data, Stream) for each in data.documents for source in each.sources
    ]
    names = _data_sets(streamed, "train") & _data_sets(validation, "validation")
    names |= {str(file) for file in _files(streamed) & _files(validation)}
    return f"{few(sorted(names))} {'is' if len(names) == 1 else 'are'}" if names else ""


def _data_sets(sources: list[str], split: str) -> set[str]:
    """Returns the sources that are not files, each with the split that is read."""
    names = [source for source in sources if not is_path_source(source)]
    return {name if name.endswith("]") or name.startswith("letters:") else f"{name}[{split}]" for name in names}


def rows_of(data: TrainingRows) -> list[Rows]:
    """Returns the rows of each source of a mixture, or of the single source."""
    return data.parts if isinstance(data, MixedRows) else [data]


def _files(sources: Iterable[str]) -> set[Path]:
    return {file.resolve() for file in source_files(list(sources))}


def load_training(settings: Settings, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> list[TrainingData]:
    """Loads the text of each stage; equal texts are shared. Raises `SettingsError` for text that cannot be used."""
    loaded: list[tuple[Stage, TrainingData]] = []
    try:
        for stage in stages_of(settings):
            known = next((data for other, data in loaded if stage.reads_as(other)), None)
            loaded.append((stage, known or _load(stage, settings, tokenizer, processes)))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    found = [data for _, data in loaded]
    check_batches(found, settings)
    return found


def check_batches(data: list[TrainingData], settings: Settings) -> None:
    """Raises `SettingsError` if the text of a stage does not fill one of its batches."""
    for stage, of_stage in zip(stages_of(settings), data, strict=True):
        if not isinstance(of_stage, Stream):
            try:
                next(of_stage.shuffled(stage.batch_size, settings.training.seed))
            except ValueError as error:
                raise SettingsError(str(error)) from error


def _load(stage: Stage, settings: Settings, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> TrainingData:
    if not stage.sources:
        raise SettingsError("data.train is empty; set it to files, folders or data sets, such as data.train=texts/")
    stream = _stream(stage.sources, settings.data)
    if settings.data.streaming:
        readers = processes.data_size * max(1, settings.data.workers)
        for documents in stream.documents:
            if sum(1 for _ in itertools.islice(documents, readers)) < readers:
                raise InputError(
                    f"data.streaming: {', '.join(documents.sources)} has fewer documents than the {readers} processes "
                    "and workers that read them; use fewer data.workers, or data.streaming=false"
                )
        return stream
    parts = [build_rows(documents, tokenizer, stage.seq_len) for documents in stream.documents]
    return parts[0] if len(parts) == 1 else MixedRows(parts, stream.shares)


def _stream(sources: Sources, data: DataSettings) -> Stream:
    if isinstance(sources, list):
        return Stream([Documents(sources, data.column, data.max_bad_rows)], [1.0])
    total = sum(sources.values())
    documents = [Documents([source], data.column, data.max_bad_rows) for source in sources]
    return Stream(documents, [share / total for share in sources.values()])


def training_batches(
    data: TrainingData,
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    processes: Processes,
    start: int = 0,
) -> Iterator[Batch]:
    """
    Returns an endless stream of a stage's micro-batches, with this process's share of the rows of each.

    Args:
        start: number of rows of the stage's text that all processes together have already read.
    """
    source = _Source(
        *(data, stage, tokenizer, settings, start),
        *(processes.local_slice(stage.batch_size), processes.data_rank, processes.data_size),
    )
    return prefetched(source, settings.data.workers)


@dataclass
class _Source:
    """The batches of each worker of one process; see `prefetched`."""

    data: TrainingData
    stage: Stage
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    start: int
    share: slice  # of the rows of a batch
    part: int  # of `parts` processes
    parts: int

    def __call__(self, worker: int, workers: int) -> Iterator[Batch]:
        seed, batch_size = self.settings.training.seed, self.stage.batch_size
        if not isinstance(self.data, Stream):
            return self.data.shuffled(batch_size, seed, self.start, worker, workers, self.share)
        first = self.start // batch_size + worker  # index of this worker's first batch
        part = self.part * workers + first % workers  # the same documents for any first batch
        own = [replace(documents, part=part, parts=self.parts * workers) for documents in self.data.documents]
        rows = self.share.stop - self.share.start
        read = first // workers * rows if self.parts * workers > 1 else self.start
        return streamed_batches(
            *(own, self.data.shares, self.tokenizer, self.stage.seq_len, rows),
            *(self.settings.data.shuffle_buffer, seed, read),
        )
