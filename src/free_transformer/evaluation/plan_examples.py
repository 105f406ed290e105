"""Examples of what plans do: one prompt under several plans, the effect of flipped bits, and plans by source."""

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from free_transformer.data import Rows, begin_token, encode
from free_transformer.evaluation.bits import BitEffect, bit_effects
from free_transformer.evaluation.inputs import run_lower_layers
from free_transformer.evaluation.plan_ops import flip_bit
from free_transformer.model.layout import num_plans
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.plan_text import format_plan

NUM_PLANS = 4
NUM_FLIPPED = 8  # bits whose flipped text is generated
NUM_TOKENS = 160  # per text, prompt included
MAX_PROMPT = 16  # characters; a longer word would determine the text more than the plan does
TEMPERATURE = 0.7
ROWS_PER_SOURCE = 64
FLIPPED_ROWS = 512  # rows times bits for which the effect of a flip is measured
ROWS_PER_BATCH = 8
MAX_SHOWN_PLANS = 12


@dataclass
class PlanText:
    """
    Attributes:
        plan: bits as text; at most four plans are shown.
        share: share of held-out texts with the live bits of this plan, None for a plan sampled from the prior.
        text: text generated under the plan, prompt included.
    """

    plan: str
    share: float | None
    text: str


@dataclass
class FlippedBit:
    """A bit with its effect (see `BitEffect`), and `text`: the first text with this bit flipped, if generated."""

    bit: int
    spent: float
    effect: float
    standard_error: float
    dead: str | None
    text: str | None


@dataclass
class PlanSources:
    """
    The plans of held-out texts by source.

    Attributes:
        labels: names of the S sources.
        plans: the most common plans, up to 12, sorted by source; then `other` if there are more. Bits that are not
            live, whose values are random, are shown as `·`.
        shares: for each source, the share of its texts that have each of `plans`.
        texts: number of texts of each source.
    """

    labels: list[str]
    plans: list[str]
    shares: list[list[float]]
    texts: list[int]


@dataclass
class PlanExamples:
    """
    Attributes:
        prompt: beginning of all texts: the most common word of the held-out text.
        temperature: sampling temperature. All texts use the same random numbers, so they differ only in their plans.
        texts: texts under four plans: the most common plans of held-out texts, then samples from the prior.
        live: indices of the live bits.
        bits: all bits, those with the largest effect first.
        sources: None if the sources of the text are not known, or a text has several plans.
    """

    prompt: str
    temperature: float
    texts: list[PlanText]
    live: list[int]
    bits: list[FlippedBit]
    sources: PlanSources | None


@torch.no_grad()
def make_plan_examples(
    model: FreeTransformer,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    by_source: Mapping[str, Rows] | None = None,
    seed: int = 0,
) -> PlanExamples:
    """
    Generates texts under plans and measures the effect of each bit.

    It takes little time compared to an evaluation: one batch of up to 12 texts of 160 tokens, and `FLIPPED_ROWS` passes
    of the upper layers over a row.

    Args:
        rows: held-out text.
        by_source: held-out text of each source.
    """
    measured = rows.sample(max(1, FLIPPED_ROWS // model.config.latent_dim), seed)
    effects = sorted(bit_effects(model, measured.in_order(ROWS_PER_BATCH)), key=lambda each: -each.effect)
    live = sorted(each.bit for each in effects if each.dead is None)
    sources, shares = None, dict[str, float]()
    if model.config.plan_span == "sequence":
        parts = {label: each.sample(ROWS_PER_SOURCE, seed) for label, each in (by_source or {}).items()}
        sample = parts or {"": rows.sample(NUM_PLANS * ROWS_PER_SOURCE, seed)}
        codes = {label: posterior_codes(model, each) for label, each in sample.items()}
        shares = common_plans([code for each in codes.values() for code in each], live)
        sources = plans_by_source(codes, live) if parts else None
    prompt = common_word(tokenizer.batch_decode(rows.sample(ROWS_PER_SOURCE, seed).tokens, skip_special_tokens=True))
    texts, flipped = _generate(model, tokenizer, prompt, shares, effects, seed)
    bits = [FlippedBit(**vars(effect), text=flipped.get(effect.bit)) for effect in effects]
    return PlanExamples(prompt, TEMPERATURE, texts, live, bits, sources)


def posterior_codes(model: FreeTransformer, rows: Rows) -> list[str]:
    """Returns the most likely plan of each text in these rows, as text, for models with one plan per text."""
    codes = []
    for batch in rows.in_order(ROWS_PER_BATCH):
        inputs = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
        lower = run_lower_layers(model, inputs)
        assert lower.layout is not None
        codes += [format_plan(plan) for plan in model.encode(lower)[lower.layout.plan_mask] > 0]
    return codes


def live_part(code: str, live: Collection[int]) -> str:
    """Replaces each bit that is not live by `·`. Returns the plan unchanged if no bit is live."""
    return "".join(bit if index in live or not live else "·" for index, bit in enumerate(code))


def common_plans(codes: Sequence[str], live: Collection[int]) -> dict[str, float]:
    """Returns up to four common plans with different live bits, and the shares of texts that have their live bits."""
    groups = Counter(live_part(code, live) for code in codes)
    full = Counter(codes).most_common()
    return {
        next(code for code, _ in full if live_part(code, live) == group): count / len(codes)
        for group, count in groups.most_common(NUM_PLANS)
    }


def plans_by_source(codes: Mapping[str, Iterable[str]], live: Collection[int]) -> PlanSources:
    """Computes the shares of plans by source. `codes` has the plans of the texts of each source, as text."""
    counts = {label: Counter(live_part(plan, live) for plan in plans) for label, plans in codes.items()}
    totals = [each.total() for each in counts.values()]
    common = [code for code, _ in sum(counts.values(), Counter()).most_common(MAX_SHOWN_PLANS)]
    shares = np.array([[each[code] for code in common] for each in counts.values()]) / np.array(totals)[:, None]
    order = np.lexsort((-shares.max(0), shares.argmax(0)))
    plans, shares = [common[index] for index in order], shares[:, order]
    rest = 1 - shares.sum(1, keepdims=True)
    if (rest > 1e-9).any():
        plans, shares = [*plans, "other"], np.hstack([shares, rest.clip(min=0)])
    return PlanSources(list(counts), plans, shares.tolist(), totals)


def common_word(texts: Iterable[str]) -> str:
    """Returns the most common word of up to 16 letters, or `""`. Words are separated by white space."""
    counts = Counter(word for text in texts for word in text.split() if len(word) <= MAX_PROMPT and word.isalpha())
    return counts.most_common(1)[0][0] if counts else ""


class SharedNoise(LogitsProcessor):
    """
    Adds the same Gumbel noise to the logits of every row. The most likely token of each row is then a sample from its
    distribution, and rows differ only by their logits.
    """

    def __init__(self, temperature: float, seed: int):
        self.temperature, self.generator = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = -torch.empty(scores.shape[-1]).exponential_(generator=self.generator).clamp(min=1e-30).log()
        return scores / self.temperature + noise.to(scores)


def _generate(
    model: FreeTransformer,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    shares: Mapping[str, float],
    effects: list[BitEffect],
    seed: int,
) -> tuple[list[PlanText], dict[int, str]]:
    """Continues the prompt under the plans of `shares`, plans from the prior, and the first plan with flipped bits."""
    ids = [begin_token(tokenizer), *(encode(tokenizer, [prompt])[0] if prompt else [])]
    length = min(NUM_TOKENS, model.config.max_position_embeddings)
    ids = ids[: max(1, length - 1)]
    generator = torch.Generator(model.device).manual_seed(seed)
    plans = model.sample_plan(NUM_PLANS, num_plans(model.config.plan_span, length), generator).cpu()
    for row, code in enumerate(shares):
        plans[row] = torch.tensor([bit == "1" for bit in code])
    bits = [effect.bit for effect in effects[:NUM_FLIPPED]]
    under = torch.stack([*plans, *(flip_bit(plans[0], bit) for bit in bits)])
    tokens = torch.tensor([ids] * len(under), device=model.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sequences = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            plan=under.to(model.device),
            max_new_tokens=max(1, length - len(ids)),
            do_sample=False,
            logits_processor=LogitsProcessorList([SharedNoise(TEMPERATURE, seed)]),
        )
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    known = [*shares.values(), *[None] * (NUM_PLANS - len(shares))]
    shown = [PlanText(format_plan(plan), share, text) for plan, share, text in zip(plans, known, texts, strict=False)]
    return shown, dict(zip(bits, texts[NUM_PLANS:], strict=True))
