"""Prefetching: worker processes prepare batches ahead of time."""

import signal
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from free_transformer.data.rows import Batch

BatchesOf = Callable[[int, int], Iterator[Batch]]  # (worker, workers) -> every `workers`-th batch


def prefetched(batches_of: BatchesOf, workers: int) -> Iterator[Batch]:
    """
    Yields the batches of `workers` processes in turn. With 0 workers, this process prepares them.

    Args:
        batches_of: called as `batches_of(worker, workers)`, in the worker process.
    """
    if workers == 0:
        return batches_of(0, 1)
    loader: DataLoader[Batch] = DataLoader(
        _WorkerBatches(batches_of),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # otherwise the loader advances torch's generator
    )
    return iter(loader)


class _WorkerBatches(IterableDataset[Batch]):
    def __init__(self, batches_of: BatchesOf):
        self.batches_of = batches_of

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        assert worker is not None
        return self.batches_of(worker.id, worker.num_workers)


def _ignore_signals(_: int) -> None:
    """Ignores signals that terminals and clusters send to all processes; only the main process handles them."""
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # Windows only has SIGINT
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
