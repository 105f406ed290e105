"""Processes started by `torchrun`, for commands that share work between them."""

import os
from contextlib import AbstractContextManager

from free_transformer.distributed.processes import Processes, join_processes
from free_transformer.settings import DistributedSettings


def evaluation_processes() -> AbstractContextManager[Processes]:
    """Joins processes that share the texts of an evaluation, each with a shard of the model."""
    return join_processes(DistributedSettings(fsdp=True))


def generation_processes() -> AbstractContextManager[Processes]:
    """Joins processes that generate the same texts together, each with a part of every matrix."""
    return join_processes(DistributedSettings(tensor=int(os.environ.get("WORLD_SIZE", 1))))
