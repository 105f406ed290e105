"""One thread (two busy threads on two shared cores were seen six times slower), one seed, and a tiny model."""

import gc
import importlib
import os
import re
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

import pytest
import torch
from hypothesis import settings

from free_transformer import FreeTransformer, FreeTransformerConfig

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=50)
settings.load_profile("repeatable")

TINY = {
    "vocab_size": 32,
    "hidden_dim": 16,
    "ffn_hidden_dim": 32,
    "num_layers": 4,
    "num_heads": 2,
    "num_kv_heads": 1,
    "max_seq_len": 64,
    "latent_dim": 4,
    "plan_span": 1,
    "free_bits": 0.5,
    "min_bits": 0.0,
    "aggregate_weight": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "readout_init_scale": 3.0,  # posteriors that differ, where the default start is nearly the prior
}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spares garbage collection the modules, which stay: 5 % of the time of the tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # it compiles one function for at most 8 models before it gives up
        torch._dynamo.reset()


@pytest.fixture
def tiny_config():
    def build(**changes) -> FreeTransformerConfig:
        return FreeTransformerConfig(**{**TINY, **changes})

    return build


@pytest.fixture
def tiny_model(tiny_config):
    """float64, so that tolerances are those of the fp32 inside `LlamaRMSNorm` and the rotary positions only."""

    def build(dtype: torch.dtype = torch.float64, **changes) -> FreeTransformer:
        return FreeTransformer(tiny_config(**changes)).to(dtype).eval()

    return build


@pytest.fixture
def tokens_like():
    """Random tokens without the special ones, `tokens_like(batch, length)`."""

    def build(*shape: int) -> torch.Tensor:
        return torch.randint(3, TINY["vocab_size"], shape)

    return build


@pytest.fixture
def outside_references():
    """What an HTML page would load from the network or the disk. Empty for a self-contained page."""

    def find(page: str) -> list[str]:
        parts = re.findall(r"<[^<>]*>", page) + re.findall(r"<style[^>]*>(.*?)</style>", page, flags=re.S)
        own = r"""["']?(?!\#|data:)[^\s>"')]+"""
        asked = rf"\s(?:src|href|xlink:href)\s*=\s*{own}|url\({own}|@import|<(?:script|link|iframe)\b"
        return [found for part in parts for found in re.findall(asked, part)]

    return find


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a benchmark by name, and removes modules of its folder afterwards."""
    root = Path(__file__).parents[1]
    folders = [root / "benchmarks", root / "examples" / "three_styles"]
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent in folders:
            del sys.modules[name]
