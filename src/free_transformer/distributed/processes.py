"""The processes of a run: how they find each other, what they agree on, and what they do when one of them is lost."""

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
ROLL_CALL = 3.0  # seconds in which the processes that are left say so


class ProcessLost(RunError):
    """A process of the run does not respond any more; the message names it."""


@dataclass
class Processes:
    """
    A run's processes as a mesh of data x tensor: those of a tensor group read the same rows, each with its share of
    every matrix. A run of one process has no mesh and does not communicate.

    Attributes:
        mesh: dimensions `replicate`, `shard` and `tensor`; the first two together are data.
        data_group: the processes that read other rows than this one, and itself.
        timeout: how long one waits for another.
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
        """Which of so many rows are this process'; the first processes have one more where they do not divide."""
        least, more = divmod(rows, self.data_size)
        start = self.data_rank * least + min(self.data_rank, more)
        return slice(start, start + least + (self.data_rank < more))

    def sum(self, values: Tensor) -> Tensor:
        """Summed over the processes that read different rows."""
        if self.data_size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.data_group)
        return values

    def exchange(self, *numbers: int) -> list[list[int]]:
        """The numbers of all processes by rank; on the CPU, so that no accelerator is waited for."""
        own = torch.tensor(numbers)
        if self.size == 1:
            return [own.tolist()]
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [each.tolist() for each in found]

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """The largest of each over all processes; on the CPU, so that no accelerator is waited for."""
        values = torch.tensor(numbers)
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.tolist()

    def barrier(self) -> None:
        self.all_reduce_max(0)


@contextlib.contextmanager
def join_processes(settings: DistributedSettings, device: str = "auto") -> Iterator[Processes]:
    """
    The processes that `torchrun` has started (according to its environment variables), or only this one.

    Raises:
        SettingsError: where their number does not fit the settings, or the device is not there.
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
    except RuntimeError as error:  # what the backends raise
        if not isinstance(error, dist.DistError) and not _is_of_a_backend(error):
            raise
        raise ProcessLost(_who_is_missing(store, rank, size, error)) from error
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def find_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one. `SettingsError` for a device that is not on this machine."""
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
    """gloo raises plain errors where a connection breaks or times out; they name its own files."""
    return any(name in str(error) for name in ("gloo", "ProcessGroup", "NCCL", "Connection closed", "TCPStore"))


def _who_is_missing(store: dist.Store, rank: int, size: int, error: Exception) -> str:
    """A roll call through the store that brought the processes together: who fails too is there."""
    try:
        store.set(f"left-{rank}", "1")
        time.sleep(ROLL_CALL)
        missing = [str(other) for other in range(size) if not store.check([f"left-{other}"])]
    except (RuntimeError, OSError):
        missing = ["0"]  # the store went with it, or with its machine
    if not missing:
        return f"the processes have lost each other: {first_line(error)}"
    return (
        f"rank {', '.join(missing)} of {size} ended or does not answer (killed, out of memory, a machine or a line "
        "lost; its own message, if any, says why). The same command resumes from the last checkpoint"
    )
