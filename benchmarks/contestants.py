"""
A process that builds one implementation and takes a turn per request: one line of JSON in, one line of JSON out.

Each process runs in its own environment with its own dependencies. `comparison.py` starts them and sends requests in
rounds, so that load on the machine affects all of them. A process imports only what its contestant needs.

    {"do": "train"}                                -> {"seconds": ...} of a step: forward, loss, backward, AdamW
    {"do": "generate", "batch": 8, "new": 256}     -> {"seconds": ...}
    {"do": "peak"}                                 -> {"bytes": ...} since before the model was built
    {"do": "count"}                                -> {"parameters": ..., "table": ...}
"""

import contextlib
import json
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 4096
PROMPT = 32


class Contestant:
    """
    Interface of every implementation. `spec` contains width, layers, heads, ffn, length, batch, bits and more, and
    optionally device and vocabulary.
    """

    def __init__(self, spec: dict[str, Any]):
        self.spec = spec
        self.device, self.vocabulary = spec.get("device", "cpu"), spec.get("vocabulary", VOCABULARY)
        torch.manual_seed(0)
        self.model: Any = self.build().to(self.device)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.tokens = torch.randint(3, self.vocabulary, (spec["batch"], spec["length"]), device=self.device)

    @staticmethod
    def load() -> None:
        """Imports the implementation, before memory is measured."""
        raise NotImplementedError

    def build(self) -> Any:
        raise NotImplementedError

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)]

    def loss(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def generate(self, prompt: Tensor, new: int) -> None:
        raise NotImplementedError

    def table_values(self) -> int:
        return 0

    def train_step(self) -> None:
        self.model.train()
        self.optimizers = self.optimizers or self.build_optimizers()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.spec.get("bf16", False)):
            loss = self.loss(self.tokens)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def generate_text(self, batch: int, prompt: int, new: int) -> None:
        self.model.eval()
        with torch.no_grad():
            self.generate(torch.randint(3, self.vocabulary, (batch, prompt), device=self.device), new)


class Llama(Contestant):
    """`LlamaForCausalLM` of transformers, unchanged."""

    @staticmethod
    def load() -> None:
        import transformers.models.llama.modeling_llama  # noqa: F401

        import free_transformer.training.optimizers  # noqa: F401

    def build(self) -> Any:
        from free_transformer.model.initialization import build_baseline

        return build_baseline(self.config())

    def config(self) -> Any:
        from free_transformer import FreeTransformerConfig

        spec = self.spec
        return FreeTransformerConfig(
            vocab_size=self.vocabulary,
            hidden_dim=spec["width"],
            num_layers=spec["layers"],
            num_heads=spec["heads"],
            ffn_hidden_dim=spec["ffn"],
            max_seq_len=max(spec["length"], 2048),
            latent_dim=spec["bits"],
            plan_span=spec.get("span", 1),
        )

    def loss(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, labels=tokens, use_cache=False).loss

    def generate(self, prompt: Tensor, new: int) -> None:
        from transformers import CompileConfig

        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "pad_token_id": 0, **self.options()}
        if self.spec.get("compiled"):
            compiling = CompileConfig(mode="default")
            compiling._compile_all_devices = True
            options |= {"cache_implementation": "static", "compile_config": compiling}
        self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    def options(self) -> dict[str, Any]:
        """Additional options of `generate`."""
        return {}


class Free(Llama):
    """This library. Large codebooks use the optimizer of its training loop."""

    def build(self) -> Any:
        from free_transformer import FreeTransformer

        return FreeTransformer(self.config())

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        from free_transformer.settings import Settings
        from free_transformer.training.optimizers import build_optimizers

        return build_optimizers(
            self.model, Settings.model_validate({"training": {"learning_rate": 1e-4, "optimizer": "adamw"}})
        )

    def loss(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, labels=tokens, mode="training", skip_logits=True).loss

    def options(self) -> dict[str, Any]:
        return {"prompt_plan": self.spec.get("prompt_plan", "posterior")}

    def table_values(self) -> int:
        return self.model.plan_table.weight.numel()


class XTransformers(Contestant):
    """`x_transformers.free_transformer`, with the gated unit of the same width and fused attention."""

    @staticmethod
    def load() -> None:
        import x_transformers.free_transformer  # noqa: F401

    def build(self) -> Any:
        from x_transformers.free_transformer import FreeTransformer

        spec = self.spec
        half = spec["layers"] // 2
        return FreeTransformer(
            num_tokens=self.vocabulary,
            dim=spec["width"],
            dec_head_depth=half,
            dec_tail_depth=spec["layers"] - half,
            max_seq_len=max(spec["length"], 2048),
            attn_dim_head=spec["width"] // spec["heads"],
            heads=spec["heads"],
            latent_bits=spec["bits"],
            per_token_latents=True,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            ff_mult=spec["ffn"] / spec["width"],
            attn_flash=True,
        )

    def loss(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def generate(self, prompt: Tensor, new: int) -> None:
        self.model.generate(prompt, prompt.shape[1] + new)

    def table_values(self) -> int:
        return self.model.from_latent_to_condition.weight.numel()


class FreeTransformer012(Contestant):
    """`free-transformer` 0.1.2; its `generate` has no cache."""

    @staticmethod
    def load() -> None:
        import free_transformer.model.losses
        import free_transformer.model.modeling  # noqa: F401

    def build(self) -> Any:
        from free_transformer.model.configuration import ModelConfig
        from free_transformer.model.modeling import FreeTransformer

        spec = self.spec
        return FreeTransformer(
            ModelConfig(
                vocab_size=self.vocabulary,
                hidden_dim=spec["width"],
                num_layers=spec["layers"],
                num_heads=spec["heads"],
                ffn_hidden_dim=spec["ffn"],
                max_seq_len=max(spec["length"], 2048),
                latent_dim=spec["bits"],
            )
        )

    def loss(self, tokens: Tensor) -> Tensor:
        from free_transformer.model.losses import compute_vae_loss

        logits, plan_logits = self.model(tokens, mode="training")
        arguments = (logits[:, :-1].contiguous(), tokens[:, 1:].contiguous(), plan_logits)
        return compute_vae_loss(*arguments, latent_dim=self.spec["bits"])[0]

    def generate(self, prompt: Tensor, new: int) -> None:
        self.model.generate(prompt, max_new_tokens=new)

    def table_values(self) -> int:
        return 2 ** self.spec["bits"] * self.spec["width"]


CONTESTANTS = {each.__name__: each for each in (Llama, Free, XTransformers, FreeTransformer012)}


def status(name: str) -> int:
    """Memory of this process in bytes: `VmRSS`, or `VmHWM` for the peak."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def answer(contestant: Contestant, request: dict[str, Any], before: int) -> dict[str, Any]:
    if request["do"] == "count":
        return {
            "parameters": sum(each.numel() for each in contestant.model.parameters()),
            "table": contestant.table_values(),
        }
    if request["do"] == "peak":
        return {"bytes": status("VmHWM") - before}
    started = time.perf_counter()
    if request["do"] == "train":
        contestant.train_step()
    else:
        contestant.generate_text(request["batch"], request.get("prompt", PROMPT), request["new"])
    return {"seconds": time.perf_counter() - started}


def main() -> None:
    warnings.filterwarnings("ignore")
    name, spec = sys.argv[1], json.loads(sys.argv[2])
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # only responses go to standard output
        CONTESTANTS[name].load()
        torch.nn.Linear(64, 64)(torch.randn(64, 64)).sum().backward()  # loads libraries, starts threads
        before = status("VmRSS")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        contestant = CONTESTANTS[name](spec)
        print(json.dumps({"ready": True}), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(contestant, json.loads(line), before)), file=out, flush=True)


if __name__ == "__main__":
    main()
