"""Evaluates a model during training without affecting the training."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.data import begin_token
from free_transformer.distributed.parallelize import reshard


@contextlib.contextmanager
def evaluation_mode(model: PreTrainedModel, device: torch.device, seed: int) -> Iterator[None]:
    """
    Puts the model in eval mode with separate random numbers, so that a resumed run does not differ.

    The model runs uncompiled, because each new shape would be compiled. Sharded weights are released afterwards.
    """
    model.eval()
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.compiler.set_stance("force_eager"),
    ):
        torch.manual_seed(seed)
        yield
    model.train()
    reshard(model)


def generate_sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device, num_tokens: int
) -> str:
    """Generates a text of up to `num_tokens` tokens from an empty prompt. All processes must call it together."""
    prompt = torch.tensor([[begin_token(tokenizer)]], device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_tokens, do_sample=True
        )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
