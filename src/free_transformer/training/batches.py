"""What each process, and each of its workers, reads of the training text."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from free_transformer.data import Rows, build_rows, prefetched, read_documents, streamed_batches
from free_transformer.data.rows import Batch
from free_transformer.training.processes import Processes
from free_transformer.training.settings import Settings, SettingsError


@dataclass
class Documents:
    """Documents that can be read again and again, one pass an epoch; of `parts`, only this one's."""

    sources: list[str]
    column: str
    part: int = 0
    parts: int = 1

    def __iter__(self) -> Iterator[str]:
        return itertools.islice(read_documents(self.sources, self.column), self.part, None, self.parts)


TrainingData = Rows | Documents  # in memory, or to stream


def load_data(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> tuple[TrainingData, Rows | None]:
    """Training text, and held-out text where there is any. `SettingsError` for text that cannot be used."""
    data, training = settings.data, settings.training
    try:
        documents = Documents(data.train, data.column)
        train: TrainingData = documents if data.streaming else build_rows(documents, tokenizer, training.seq_len)
        validation = None
        if data.validation:
            validation = build_rows(read_documents(data.validation, data.column), tokenizer, training.seq_len)
            validation = validation.sample(training.eval_rows)
        if isinstance(train, Rows):
            next(train.shuffled(training.batch_size, training.seed))
        else:
            readers = processes.data_size * max(1, data.workers)
            if sum(1 for _ in itertools.islice(documents, readers)) < readers:
                raise ValueError(
                    f"data.streaming: fewer documents than the {readers} processes and workers that read them; take "
                    "fewer data.workers, or streaming=false"
                )
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return train, validation


def training_batches(
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    processes: Processes,
    start: int = 0,
) -> Iterator[Batch]:
    """Micro-batches without end from number `start` on: this process' share of the rows of each."""
    source = _Source(
        *(data, tokenizer, settings, start),
        *(processes.share_of(settings.training.batch_size), processes.data_rank, processes.data_size),
    )
    return prefetched(source, settings.data.workers)


@dataclass
class _Source:
    """The batches of each worker of one process, see `prefetched`."""

    data: Any
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    start: int
    share: slice  # of the rows of a batch
    part: int  # of `parts` processes
    parts: int

    def __call__(self, worker: int, workers: int) -> Iterator[Batch]:
        training, first = self.settings.training, self.start + worker
        if isinstance(self.data, Rows):
            return self.data.shuffled(training.batch_size, training.seed, first, workers, self.share)
        part = self.part * workers + first % workers  # the same documents whatever the batch to start with
        documents = Documents(self.data.sources, self.data.column, part, self.parts * workers)
        rows = self.share.stop - self.share.start
        return streamed_batches(
            *(documents, self.tokenizer, training.seq_len, rows),
            *(self.settings.data.shuffle_buffer, training.seed, first // workers),
        )
