"""What each process, and each of its workers, reads of the training text."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from free_transformer.data import Rows, build_rows, prefetched, read_documents, streamed_batches
from free_transformer.data.rows import Batch, MixedRows, TrainingRows
from free_transformer.training.processes import Processes
from free_transformer.training.settings import DataSettings, Settings, SettingsError, Sources
from free_transformer.training.stages import Stage, stages_of


@dataclass
class Documents:
    """Documents that can be read again and again, one pass an epoch; of `parts`, only this one's."""

    sources: list[str]
    column: str
    part: int = 0
    parts: int = 1

    def __iter__(self) -> Iterator[str]:
        return itertools.islice(read_documents(self.sources, self.column), self.part, None, self.parts)


@dataclass
class Stream:
    """Text to read while training: the documents of each source, and the shares in which their rows are drawn."""

    documents: list[Documents]
    shares: list[float]


TrainingData = TrainingRows | Stream  # in memory, or to stream


def load_validation(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Rows | None:
    """Held-out text where there is any. `SettingsError` for text that cannot be used."""
    data, training = settings.data, settings.training
    if not data.validation:
        return None
    try:
        rows = build_rows(read_documents(data.validation, data.column), tokenizer, training.seq_len)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return rows.sample(training.eval_rows)


def load_training(settings: Settings, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> list[TrainingData]:
    """The text of each stage, read once where several share it. `SettingsError` for text that cannot be used."""
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
    """`SettingsError` where the text of a stage does not fill one of its batches."""
    for stage, of_stage in zip(stages_of(settings), data, strict=True):
        if not isinstance(of_stage, Stream):
            try:
                next(of_stage.shuffled(stage.batch_size, settings.training.seed))
            except ValueError as error:
                raise SettingsError(str(error)) from error


def _load(stage: Stage, settings: Settings, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> TrainingData:
    stream = _stream(stage.sources, settings.data)
    if settings.data.streaming:
        readers = processes.data_size * max(1, settings.data.workers)
        for documents in stream.documents:
            if sum(1 for _ in itertools.islice(documents, readers)) < readers:
                raise ValueError(
                    f"data.streaming: fewer documents in {', '.join(documents.sources)} than the {readers} processes "
                    "and workers that read them; take fewer data.workers, or streaming=false"
                )
        return stream
    parts = [build_rows(documents, tokenizer, stage.seq_len) for documents in stream.documents]
    return parts[0] if len(parts) == 1 else MixedRows(parts, stream.shares)


def _stream(sources: Sources, data: DataSettings) -> Stream:
    if isinstance(sources, list):
        return Stream([Documents(sources, data.column)], [1.0])
    total = sum(sources.values())
    return Stream(
        [Documents([source], data.column) for source in sources], [share / total for share in sources.values()]
    )


def training_batches(
    data: TrainingData,
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    processes: Processes,
    start: int = 0,
) -> Iterator[Batch]:
    """Micro-batches of a stage without end from number `start` on: this process' share of the rows of each."""
    source = _Source(
        *(data, stage, tokenizer, settings, start),
        *(processes.share_of(stage.batch_size), processes.data_rank, processes.data_size),
    )
    return prefetched(source, settings.data.workers)


@dataclass
class _Source:
    """The batches of each worker of one process, see `prefetched`."""

    data: TrainingData
    stage: Stage
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    start: int
    share: slice  # of the rows of a batch
    part: int  # of `parts` processes
    parts: int

    def __call__(self, worker: int, workers: int) -> Iterator[Batch]:
        seed, first = self.settings.training.seed, self.start + worker
        if not isinstance(self.data, Stream):
            return self.data.shuffled(self.stage.batch_size, seed, first, workers, self.share)
        part = self.part * workers + first % workers  # the same documents whatever the batch to start with
        own = [replace(documents, part=part, parts=self.parts * workers) for documents in self.data.documents]
        return streamed_batches(
            *(own, self.data.shares, self.tokenizer, self.stage.seq_len, self.share.stop - self.share.start),
            *(self.settings.data.shuffle_buffer, seed, first // workers),
        )
