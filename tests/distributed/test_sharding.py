"""The table sharded by `fully_shard` over two processes of gloo, against one process."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.training.optimizers import RowAdamW
from processes import free_port

PROCESSES = 2


def build(gradient: str) -> tuple[FreeTransformer, torch.Tensor]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_dim": 16, "num_layers": 4, "num_heads": 2}
    plan = {"latent_dim": 11, "plan_span": 1, "code_bits": 6, "plan_gradient": gradient, "plan_chunk_bytes": 2000}
    model = FreeTransformer(FreeTransformerConfig(**sizes, **plan, readout_init_scale=3.0))
    model.plan_mapper.forward = lambda plan_logits, generator=None: plan_logits > 0  # the same plans on any process
    return model, torch.randint(0, 32, (4, 12))


def gradients(model: FreeTransformer, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model(tokens, labels=tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def updated_table(model: FreeTransformer) -> torch.Tensor:
    """The codebook after a step for the rows that have a gradient."""
    table = model.plan_table.weight
    RowAdamW([{"params": [table], "by_row": True}], lr=0.1, eps=1e-3, fused=True).step()
    return (table.full_tensor() if isinstance(table, DTensor) else table).detach()


def shard_and_compare(rank: int, port: int, expected: dict[str, dict[str, torch.Tensor]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    try:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for gradient, whole in expected.items():
            model, tokens = build(gradient)
            for part in (model.plan_table, model.encoder, *model.model.layers, model):
                fully_shard(part, mesh=mesh)
            assert isinstance(model.plan_table.weight, DTensor)
            rows = sum(2**bits for bits in model.config.group_bits)
            assert model.plan_table.weight.to_local().shape[0] == rows // PROCESSES
            for name, grad in gradients(model, tokens[rank::PROCESSES]).items():
                assert isinstance(grad, DTensor), name
                assert_close(grad.full_tensor(), whole[name], msg=lambda text, name=name: f"{name}: {text}")
            assert_close(updated_table(model), whole["updated table"])
    finally:
        dist.destroy_process_group()


def test_sharded_table_has_the_gradients_and_updates_of_one_process():
    expected = {}
    for gradient in ("exact", "sampled"):
        model, tokens = build(gradient)
        before = model.plan_table.weight.detach().clone()
        whole = expected[gradient] = gradients(model, tokens)
        whole["updated table"] = updated_table(model)
        moved = (whole["updated table"] != before).any(1)
        assert torch.equal(moved, whole["plan_table.weight"].any(1)) and not moved.all()
        assert whole["encoder.readout.weight"].any() and whole["plan_table.weight"].any()
    mp.spawn(shard_and_compare, (free_port(), expected), nprocs=PROCESSES)
