"""Distributes a model over processes."""

import functools
import itertools
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from free_transformer.distributed.processes import Processes
from free_transformer.model.compat import GradientCheckpointingLayer
from free_transformer.model.encoder import PlanEncoder
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.plan import BinaryMapper
from free_transformer.settings import SettingsError

IN_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
IN_ROWS = ("o_proj", "down_proj")
OTHER_ENTRIES = ("lower_layers", "encode", "upper_layers")  # entry points besides `forward`


def parallelize(
    model: PreTrainedModel,
    processes: Processes,
    gradient_checkpointing: bool = False,
    compile_blocks: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """
    Distributes a model over processes, in place.

    The order is: tensor parallelism -> activation checkpointing -> compilation of each block -> `fully_shard` of each
    block, the encoder, the codebook, the embedding and the head -> move to the device.

    Args:
        dtype: dtype of computation with several data processes; weights and gradient sums stay in fp32.

    Raises:
        SettingsError: if the heads cannot be divided among the tensor processes.
    """
    if processes.size > 1 and isinstance(model, FreeTransformer):
        spread_plans(model, processes)
    if processes.tensor > 1:
        assert processes.mesh is not None
        split_matrices(model, processes.mesh["tensor"])
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if compile_blocks:
        for block in blocks(model):
            block.compile()
        if isinstance(model, FreeTransformer):
            model.lm_head.fused_loss = True
    if processes.data_size > 1:
        shard(model, processes, dtype)
    model.to(processes.device)


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the decoder layers, and the encoder if there is one."""
    return [*model.model.layers, *([model.encoder] if isinstance(model, FreeTransformer) else [])]


def split_matrices(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Applies tensor parallelism: splits heads and hidden units, and the vocabulary of embedding and head."""
    config, count = model.config, mesh.size()
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (heads := getattr(config, name)) % count:
            raise SettingsError(f"distributed.tensor={count}: does not divide the model's {heads} {name}")
    for block in blocks(model):
        if isinstance(block, GradientCheckpointingLayer | PlanEncoder):  # a custom encoder is not split
            names = [name for name, _ in block.named_modules()]
            columns = {name: ColwiseParallel() for name in names if name.endswith(IN_COLUMNS)}
            rows = {name: RowwiseParallel() for name in names if name.endswith(IN_ROWS)}
            parallelize_module(block, mesh, {**columns, **rows})
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)
    model.lm_head.in_columns = True
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def shard(model: PreTrainedModel, processes: Processes, dtype: torch.dtype | None = None) -> None:
    """Applies `fully_shard` within each replica. Replicas of one process each are equivalent to DDP."""
    assert processes.mesh is not None
    warnings.filterwarnings("ignore", ".*returned a view tensor.*")  # emitted by evaluations, which have no backward
    hybrid = processes.mesh["replicate"].size() > 1
    mesh = processes.mesh["replicate", "shard"] if hybrid else processes.mesh["shard"]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    parts = blocks(model)
    if isinstance(model, FreeTransformer):
        parts.append(model.plan_table)
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    if not model.config.tie_word_embeddings:  # a tied matrix must stay in the module that contains both users
        fully_shard(model.model.embed_tokens, mesh=mesh, mp_policy=policy)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    # The model's inputs are integers, and loss weights that must not be rounded.
    policy = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for name in OTHER_ENTRIES:
        if hasattr(model, name):
            _gather_outside_of_training(model, name)


def _gather_outside_of_training(model: PreTrainedModel, name: str) -> None:
    """
    Lets an evaluation call a part of the model directly, since `fully_shard` gathers weights only before `forward`.

    During training, parts are called from `forward`, and additional hooks would reduce gradients too early.
    """
    plain = getattr(model, name)
    register_fsdp_forward_method(model, name)
    gathering = getattr(model, name)

    @functools.wraps(plain)
    def either(*args: object, **kwargs: object) -> object:
        return (plain if torch.is_grad_enabled() else gathering)(*args, **kwargs)

    setattr(model, name, either)


def reshard(model: nn.Module) -> None:
    """Releases the weights gathered by an evaluation, so that `parameters()` returns the shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def synchronize_gradients(model: nn.Module, last: bool) -> None:
    """Enables the sum of gradients over replicas only for the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def whole_state_dict(model: nn.Module) -> dict[str, object]:
    """Returns all weights on the main process's CPU, tied ones once; empty elsewhere. All processes must call it."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    once = {name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers())}
    return {name: value for name, value in whole.items() if name in once}


def spread_plans(model: FreeTransformer, processes: Processes) -> None:
    """Makes plans independent of the number of processes: they are sampled and compared as in a single process."""
    model.plan_mapper = SharedBinaryMapper(processes).train(model.training)
    if processes.data_size > 1:
        model.gather_plans = functools.partial(_plans_of_all, mapper=model.plan_mapper)


@dataclass
class PlanPlace:
    """Position of a process's rows within a micro-batch shared by several processes."""

    first_row: int
    rows: int  # total over all processes
    plans: int  # maximum over the rows of all processes


class SharedBinaryMapper(BinaryMapper):
    """
    In training, samples the plans of all processes from a shared random stream, and keeps those of this process.

    Attributes:
        generator: random stream, identical in all processes. It continues the stream of a single process after building
            its model.
        place: place of the next batch, if set by the training loop; otherwise the processes exchange it.
    """

    def __init__(self, processes: Processes):
        super().__init__()
        self.processes = processes
        self.place: PlanPlace | None = None
        self.generator = torch.Generator(processes.device)
        self.generator.set_state(random_state(processes.device))

    def forward(self, plan_logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if not self.training:
            return super().forward(plan_logits, generator)
        rows, plans = plan_logits.shape[:2]
        own = slice(self.place_of(plan_logits).first_row, None)
        drawn = super().forward(self.among_all(plan_logits.detach()), self.generator)
        return drawn[own][:rows, :plans]

    def place_of(self, values: Tensor) -> PlanPlace:
        """Returns the place of values of this process's plans, (B, P, ...)."""
        if self.place is not None:
            return self.place
        return plan_places(self.processes.exchange(*values.shape[:2])[:: self.processes.tensor], self.processes)[0]

    def among_all(self, values: Tensor) -> Tensor:
        """Pads values of this process's plans, (B, P, X), with zeros to those of all processes, (rows, plans, X)."""
        place = self.place_of(values)
        padded = values.new_zeros(place.rows, place.plans, values.shape[-1])
        padded[place.first_row : place.first_row + len(values), : values.shape[1]] = values
        return padded


def plan_places(shapes: list[list[int]], processes: Processes) -> list[PlanPlace]:
    """
    Returns this process's place in each micro-batch.

    Args:
        shapes: for each data process, the numbers of rows and plans of all micro-batches, concatenated.
    """
    places = []
    for micro in range(len(shapes[0]) // 2):
        rows = [each[2 * micro] for each in shapes]
        plans = [each[2 * micro + 1] for each in shapes]  # packed rows have as many plans as their documents need
        places.append(PlanPlace(sum(rows[: processes.data_rank]), sum(rows), max(plans)))
    return places


def random_state(device: torch.device) -> Tensor:
    """Returns the state of torch's global random stream on a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _plans_of_all(plan_logits: Tensor, used: Tensor, mapper: SharedBinaryMapper) -> tuple[Tensor, Tensor]:
    """Gathers (B, P, H) and (B, P) from all processes, in the order of the rows, in one collective."""
    own = torch.cat([plan_logits, used[..., None].to(plan_logits.dtype)], -1)
    whole = _Sum.apply(mapper.among_all(own), mapper.processes.data_group)
    return whole[..., :-1], whole[..., -1] > 0


class _Sum(torch.autograd.Function):
    """Sum over processes; its backward also sums gradients over processes."""

    @staticmethod
    def forward(ctx, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        values = values.contiguous().clone()
        dist.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
