"""How a model is spread over processes: one function, one order."""

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
OTHER_ENTRIES = ("lower_layers", "encode", "upper_layers")  # of the model, in addition to `forward`


def parallelize(
    model: PreTrainedModel,
    processes: Processes,
    gradient_checkpointing: bool = False,
    compile_blocks: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """
    Spreads a model over processes, in place: matrices over tensor processes -> activation checkpointing -> compile
    block by block -> `fully_shard`, of each block, the encoder, the codebook, the embedding and the head -> the device.

    Args:
        dtype: of the computation where data processes share the model; weights and sums of gradients stay fp32.

    Raises:
        SettingsError: where the heads cannot be shared.
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
    """The decoder layers, and the encoder where there is one."""
    return [*model.model.layers, *([model.encoder] if isinstance(model, FreeTransformer) else [])]


def split_matrices(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Tensor parallelism: whole heads and hidden units to each process, the vocabulary cut at both ends."""
    config, count = model.config, mesh.size()
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (heads := getattr(config, name)) % count:
            raise SettingsError(f"distributed.tensor={count}: does not divide the model's {heads} {name}")
    for block in blocks(model):
        if isinstance(block, GradientCheckpointingLayer | PlanEncoder):  # a user's own encoder stays whole
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
    """`fully_shard` over the data processes: within each replica, or with replicas of one process each, DDP."""
    assert processes.mesh is not None
    warnings.filterwarnings("ignore", ".*returned a view tensor.*")  # of evaluations, which have no backward
    hybrid = processes.mesh["replicate"].size() > 1
    mesh = processes.mesh["replicate", "shard"] if hybrid else processes.mesh["shard"]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    parts = blocks(model)
    if isinstance(model, FreeTransformer):
        parts.append(model.plan_table)
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    if not model.config.tie_word_embeddings:  # a matrix that two modules share stays with what holds both
        fully_shard(model.model.embed_tokens, mesh=mesh, mp_policy=policy)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    # What comes from outside are integers, and weights of the objective that must not be rounded.
    policy = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for name in OTHER_ENTRIES:
        if hasattr(model, name):
            _gather_outside_of_training(model, name)


def _gather_outside_of_training(model: PreTrainedModel, name: str) -> None:
    """
    Lets an evaluation call one of the model's parts directly: `fully_shard` gathers weights before `forward` only.

    While training they are called from `forward`, and hooks inside its own would reduce gradients too soon.
    """
    plain = getattr(model, name)
    register_fsdp_forward_method(model, name)
    gathering = getattr(model, name)

    @functools.wraps(plain)
    def either(*args: object, **kwargs: object) -> object:
        return (plain if torch.is_grad_enabled() else gathering)(*args, **kwargs)

    setattr(model, name, either)


def reshard(model: nn.Module) -> None:
    """Gives up what an evaluation has gathered, so that `parameters()` are the shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def synchronize_gradients(model: nn.Module, last: bool) -> None:
    """Gradients are summed over replicas only after the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def whole_state_dict(model: nn.Module) -> dict[str, object]:
    """All weights on the main process' CPU, a tied one once; empty elsewhere. All processes must call it."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    once = {name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers())}
    return {name: value for name, value in whole.items() if name in once}


def spread_plans(model: FreeTransformer, processes: Processes) -> None:
    """Plans are sampled and compared as in one process with all rows, so the number of processes does not matter."""
    model.plan_mapper = SharedBinaryMapper(processes).train(model.training)
    if processes.data_size > 1:
        model.gather_plans = functools.partial(_plans_of_all, mapper=model.plan_mapper)


@dataclass
class PlanPlace:
    """Where a process' rows of a micro-batch are among those of all processes that share it."""

    first_row: int
    rows: int  # of all processes
    plans: int  # maximum over the rows of all processes


class SharedBinaryMapper(BinaryMapper):
    """
    In training, samples the plans of all processes' rows from a stream that is the same in each, and keeps its own.

    Attributes:
        generator: that stream. It continues the random numbers of a single process after building its model.
        place: of the next batch, where the training loop has told it; otherwise the processes ask each other.
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
        """Of values of this process' plans, (B, P, ...)."""
        if self.place is not None:
            return self.place
        return plan_places(self.processes.exchange(*values.shape[:2])[:: self.processes.tensor], self.processes)[0]

    def among_all(self, values: Tensor) -> Tensor:
        """(B, P, X) of this process' plans -> (rows, plans, X) of all processes, with zeros in the others' places."""
        place = self.place_of(values)
        padded = values.new_zeros(place.rows, place.plans, values.shape[-1])
        padded[place.first_row : place.first_row + len(values), : values.shape[1]] = values
        return padded


def plan_places(shapes: list[list[int]], processes: Processes) -> list[PlanPlace]:
    """
    This process' place in each micro-batch.

    Args:
        shapes: of each data process, the rows and plans of each micro-batch, one after the other.
    """
    places = []
    for micro in range(len(shapes[0]) // 2):
        rows = [each[2 * micro] for each in shapes]
        plans = [each[2 * micro + 1] for each in shapes]  # packed rows have as many as their documents ask for
        places.append(PlanPlace(sum(rows[: processes.data_rank]), sum(rows), max(plans)))
    return places


def random_state(device: torch.device) -> Tensor:
    """State of torch's own stream on a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _plans_of_all(plan_logits: Tensor, used: Tensor, mapper: SharedBinaryMapper) -> tuple[Tensor, Tensor]:
    """(B, P, H) and (B, P) of this process -> those of all, in the order of the rows, by one collective."""
    own = torch.cat([plan_logits, used[..., None].to(plan_logits.dtype)], -1)
    whole = _Sum.apply(mapper.among_all(own), mapper.processes.data_group)
    return whole[..., :-1], whole[..., -1] > 0


class _Sum(torch.autograd.Function):
    """Sum over processes, whose gradients are summed as well."""

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
