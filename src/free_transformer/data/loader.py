"""Batches prepared ahead, by processes of their own."""

import signal
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from free_transformer.data.rows import Batch

BatchesOf = Callable[[int, int], Iterator[Batch]]  # the batches of worker i of n, which are every nth of all


def prefetched(batches_of: BatchesOf, workers: int) -> Iterator[Batch]:
    """
    The batches of `workers` processes in turn, those of one that works alone where it is 0.

    Args:
        batches_of: called as `batches_of(worker, workers)`, in the worker.
    """
    if workers == 0:
        return batches_of(0, 1)
    loader: DataLoader = DataLoader(
        _OfOneWorker(batches_of),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_run,
        generator=torch.Generator(),  # or the loader would draw from torch's own, and a resumed run would differ
    )
    return iter(loader)


class _OfOneWorker(IterableDataset):
    def __init__(self, batches_of: BatchesOf):
        self.batches_of = batches_of

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        assert worker is not None
        return self.batches_of(worker.id, worker.num_workers)


def _leave_signals_to_the_run(_: int) -> None:
    """Terminals and clusters send these to every process of a run; the run itself decides when its workers end."""
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # Windows has the first alone
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
