"""The processes of a run: how they connect, exchange values, and handle the loss of one of them."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from free_transformer.errors import RunError
from free_transformer.files import first_line
from free_transformer.settings import DistributedSettings, SettingsError

MESH = ("replicate", "shard", "tensor")
ROLL_CALL = 3.0  # seconds for the remaining processes to report


class ProcessLost(RunError):
    """A process of the run no longer responds; the message names it."""


@dataclass
class Processes:
    """
    The processes of a run, as a mesh of data x tensor.

    Processes of a tensor group read the same rows, and each has a part of every matrix. A run with one process has no
    mesh and does not communicate.

    Attributes:
        mesh: dimensions `replicate`, `shard` and `tensor`; the first two together are the data dimension.
        data_group: this process and those that read different rows.
        timeout: maximum time to wait for another process.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    tensor: int = 1
    mesh: DeviceMesh | None = None
    data_group: dist.ProcessGroup | None = None
    timeout: timedelta | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        return self.size // self.tensor

    def local_slice(self, rows: int) -> slice:
        """Returns this process's slice of `rows` rows. The first processes get one more if it is uneven."""
        least, more = divmod(rows, self.data_size)
        start = self.data_rank * least + min(self.data_rank, more)
        return slice(start, start + least + (self.data_rank < more))

    def sum(self, values: Tensor) -> Tensor:
        """Sums values over the processes that read different rows."""
        if self.data_size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.data_group)
        return values

    def exchange(self, *numbers: int) -> list[list[int]]:
        """Returns the numbers of all processes by rank. Runs on the CPU, without waiting for a GPU."""
        own = torch.tensor(numbers)
        if self.size == 1:
            return [own.tolist()]
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [each.tolist() for each in found]

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Returns the maximum of each number over all processes. Runs on the CPU, without waiting for a GPU."""
        values = torch.tensor(numbers)
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.tolist()

    def barrier(self) -> None:
        self.all_reduce_max(0)


@contextlib.contextmanager
def join_processes(settings: DistributedSettings, device: str = "auto") -> Iterator[Processes]:
    """
    Joins the processes started by `torchrun` (according to its environment variables), or returns only this one.

    Raises:
        SettingsError: if their number does not match the settings, or the device does not exist.
        ProcessLost: in all remaining processes, when one has ended or does not respond within `timeout` seconds.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        _data_processes(settings, 1)
        yield Processes(find_device(device))
        return
    where = _own_device(device)
    timeout = timedelta(seconds=settings.timeout)
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    data = _data_processes(settings, size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    try:
        replicas = settings.replicas if settings.fsdp else data
        mesh = init_device_mesh(where.type, (replicas, data // replicas, settings.tensor), mesh_dim_names=MESH)
        groups = [dist.new_group(list(range(i, size, settings.tensor)), timeout) for i in range(settings.tensor)]
        # `set_timeout` is public from PyTorch 2.14 on.
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        for name in MESH:  # the mesh creates its own groups, with a timeout of half an hour
            set_timeout(timeout, mesh.get_group(name))
        yield Processes(where, rank, size, settings.tensor, mesh, groups[rank % settings.tensor], timeout)
    except RuntimeError as error:  # raised by the backends
        if not isinstance(error, dist.DistError) and not _is_of_a_backend(error):
            raise
        raise ProcessLost(_who_is_missing(store, rank, size, error)) from error
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def find_device(name: str) -> torch.device:
    """Returns a device; `auto` is a GPU if there is one. Raises `SettingsError` for a device that does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"training.device={name!r}: not on this machine (auto, cpu, cuda, mps)") from error


def _own_device(name: str) -> torch.device:
    device = find_device(name)
    if device.type != "cuda":
        if device.type != "cpu":
            raise SettingsError(f"training.device={name!r}: several processes run on cuda or on cpu")
        return device
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise SettingsError(
            f"{os.environ.get('LOCAL_WORLD_SIZE')} processes on a machine of {count} GPUs: one for each, "
            "torchrun --nproc_per_node=auto"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _data_processes(settings: DistributedSettings, size: int) -> int:
    data = size // settings.tensor if settings.data == "auto" else settings.data
    if data * settings.tensor != size:
        raise SettingsError(
            f"distributed: data={settings.data} and tensor={settings.tensor} ask for other processes than the {size} "
            f"that run: use data=auto and a tensor that divides {size}, or start more with torchrun --nproc_per_node=N"
        )
    if settings.replicas > 1 and not settings.fsdp:
        raise SettingsError(f"distributed.replicas={settings.replicas}: copies of a sharded model, with fsdp=true")
    if data % settings.replicas:
        raise SettingsError(f"distributed.replicas={settings.replicas}: does not divide the {data} data processes")
    return data


def _is_of_a_backend(error: RuntimeError) -> bool:
    """Whether a backend raised the error. gloo raises plain errors for lost connections and timeouts."""
    return any(name in str(error) for name in ("gloo", "ProcessGroup", "NCCL", "Connection closed", "TCPStore"))


def _who_is_missing(store: dist.Store, rank: int, size: int, error: Exception) -> str:
    """Finds missing processes: every remaining process fails as well and reports to the rendezvous store."""
    try:
        store.set(f"left-{rank}", "1")
        time.sleep(ROLL_CALL)
        missing = [str(other) for other in range(size) if not store.check([f"left-{other}"])]
    except (RuntimeError, OSError):
        missing = ["0"]  # the store was lost together with rank 0
    if not missing:
        return f"the processes have lost each other: {first_line(error)}"
    return (
        f"rank {', '.join(missing)} of {size} ended or does not answer (killed, out of memory, a machine or a line "
        "lost; its own message, if any, says why). The same command resumes from the last checkpoint"
    )
