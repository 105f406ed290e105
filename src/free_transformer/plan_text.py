"""Plans as people write them, and plans read from an example's text."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from free_transformer.data import begin_token, encode
from free_transformer.model import FreeTransformer


def parse_plan(text: str, latent_dim: int) -> Tensor:
    """
    `"01101001"`, bit 0 first, spaces and commas ignored -> (P, H) bool; a longer text holds several plans.

    Raises:
        ValueError: for other characters, or a length that is no multiple of `latent_dim`.
    """
    digits = "".join(text.replace(",", " ").split())
    if set(digits) - {"0", "1"} or not digits:
        raise ValueError(f"plan {text!r}: write its bits as 0 and 1, bit 0 first")
    if len(digits) % latent_dim:
        raise ValueError(f"plan {text!r} has {len(digits)} bits: a plan of this model has {latent_dim}")
    return torch.tensor([digit == "1" for digit in digits]).view(-1, latent_dim)


def format_plan(plan: Tensor) -> str:
    """(P, H) or (H,) -> its bits, bit 0 first, plans apart by a space; of many plans the first four."""
    rows = plan.view(-1, plan.shape[-1])
    text = " ".join("".join("1" if bit else "0" for bit in row.tolist()) for row in rows[:4])
    return text if len(rows) <= 4 else f"{text} … ({len(rows)} plans)"


def plan_of_text(model: FreeTransformer, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The likeliest plans of a text, (P, H) bool, read from as much of it as the model was built for."""
    ids = [begin_token(tokenizer), *encode(tokenizer, [text])[0]]
    tokens = torch.tensor([ids[: model.config.max_position_embeddings]], device=model.device)
    return model.infer_plan(tokens)[0] > 0
