"""Whether the plan steers: known labels against plans, and labels of what is written under a plan."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from free_transformer.model.layout import num_plans
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.plan import bits_to_codes

Share = tuple[float, float]
Classifier = Callable[[Sequence[str]], np.ndarray]


def contingency(codes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes that occur, (C,), and how often each goes with each label, (C, labels)."""
    seen, rows = np.unique(codes, return_inverse=True)
    table = np.zeros((len(seen), int(labels.max()) + 1), dtype=np.int64)
    np.add.at(table, (rows, labels), 1)
    return seen, table


def mutual_information(codes: np.ndarray, labels: np.ndarray) -> float:
    """
    Mutual information of the empirical joint distribution, in bits.

    It overestimates by about (codes - 1)(labels - 1) / (2 N ln 2), which `mutual_information_bias` gives.
    """
    _, table = contingency(codes, labels)
    joint = table / table.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def mutual_information_bias(codes: np.ndarray, labels: np.ndarray) -> float:
    """What independent codes and labels would show by chance (Miller-Madow), in bits."""
    _, table = contingency(codes, labels)
    return float((table.shape[0] - 1) * (table.shape[1] - 1) / (2 * len(codes) * np.log(2)))


def agreement(labels: np.ndarray) -> tuple[float, float]:
    """
    Share of texts that carry the commonest label of their plan, and its standard error over plans.

    Args:
        labels: (plans, texts) of integers.
    """
    shares = np.array([np.bincount(row).max() / len(row) for row in labels])
    return float(shares.mean()), float(shares.std(ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else float("nan")


def share_in_class(labels: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Share of texts that carry the label wanted of them, and its standard error."""
    hits = labels == wanted
    return float(hits.mean()), float((hits.mean() * (1 - hits.mean()) / len(hits)) ** 0.5)


@torch.no_grad()
def sampled_codes(model: FreeTransformer, batches: Iterable[Mapping[str, Tensor]]) -> np.ndarray:
    """Codes of plans drawn from the posteriors of these texts, (N, P)."""
    codes = [
        bits_to_codes(model.plan_mapper(model.infer_plan(batch["input_ids"].to(model.device)))) for batch in batches
    ]
    return torch.cat(codes).cpu().numpy()


def write_texts(
    model: Any, tokenizer: Any, count: int, length: int, temperature: float = 1.0, batch_size: int = 128, **plan: Any
) -> list[str]:
    """
    Texts from an empty prompt, by a Free Transformer or a baseline.

    Args:
        length: tokens of each, begin-of-text included.
        plan: `plan=`, (count, P, H), or `prior=`, as `generate` takes them; neither for a baseline.
    """
    plans = plan.pop("plan", None)
    texts: list[str] = []
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        prompt = torch.full((size, 1), tokenizer.bos_token_id, device=model.device)
        if plans is not None:
            plan["plan"] = plans[start : start + size]
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=length - 1,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            **plan,
        )
        texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


@dataclass
class Control:
    """
    Whether plans steer; shares with their standard errors.

    Attributes:
        agreement: texts of one random plan that carry the plan's commonest label, and what that comes to under
            shuffled plans (each text a plan of its own) and without a plan (the baseline).
        transfer: texts written under the plan of an example that carry the example's label, and the same when the
            plans are shuffled among the examples.
        mutual_information: of plan and label of held-out texts, in bits, and of shuffled labels; `label_entropy` is
            the most it can be.
        plans: (plans, P, H), the random ones; verdicts: (plans, texts), the labels of what they wrote.
        transferred: (examples, 2), label wanted and label seen.
    """

    agreement: Share
    agreement_shuffled: Share
    agreement_baseline: Share | None
    transfer: Share
    transfer_shuffled: Share
    mutual_information: float
    mutual_information_shuffled: float
    label_entropy: float
    plans: Tensor
    verdicts: np.ndarray
    transferred: np.ndarray


def measure_control(
    model: FreeTransformer,
    baseline: Any,
    tokenizer: Any,
    classify: Classifier,
    tokens: Tensor,
    labels: np.ndarray,
    plans: int = 16,
    texts_per_plan: int = 8,
    examples_per_label: int = 48,
    temperature: float = 1.0,
    prior: str = "uniform",
) -> Control:
    """
    Writes texts under random plans and under plans of examples, and asks a classifier what they are.

    Args:
        baseline: the same Llama without a plan, or None.
        classify: texts -> their labels, integers; it never sees a plan.
        tokens: (N, T), held-out texts of one length; labels: (N,), integers, theirs.
        prior: what the random plans are drawn from.
    """
    length = tokens.shape[1]
    count = plans * texts_per_plan

    def verdicts_of(writer: Any, **plan: Any) -> np.ndarray:
        texts = write_texts(writer, tokenizer, count, length, temperature, **plan)
        return classify(texts).reshape(plans, texts_per_plan)

    plans_a_text = num_plans(model.config.plan_span, length)
    drawn = model.sample_plan(plans, plans_a_text, prior=prior)
    verdicts = verdicts_of(model, plan=drawn.repeat_interleave(texts_per_plan, 0))
    shuffled = verdicts_of(model, plan=model.sample_plan(count, plans_a_text, prior=prior))

    rng = np.random.default_rng(0)
    kinds = np.unique(labels)
    examples = np.concatenate([rng.permutation(np.flatnonzero(labels == kind))[:examples_per_label] for kind in kinds])
    read = model.infer_plan(tokens[torch.from_numpy(examples)].to(model.device)) > 0
    order = rng.permutation(len(examples))
    wanted = labels[examples]
    seen, seen_shuffled = (
        classify(write_texts(model, tokenizer, len(examples), length, temperature, plan=plan))
        for plan in (read, read[torch.from_numpy(order)])
    )
    codes = sampled_codes(model, ({"input_ids": part} for part in tokens.split(64)))[:, 0]
    frequencies = np.bincount(labels)[kinds] / len(labels)
    return Control(
        agreement=agreement(verdicts),
        agreement_shuffled=agreement(shuffled),
        agreement_baseline=None if baseline is None else agreement(verdicts_of(baseline)),
        transfer=share_in_class(seen, wanted),
        transfer_shuffled=share_in_class(seen_shuffled, wanted),
        mutual_information=mutual_information(codes, labels),
        mutual_information_shuffled=mutual_information(codes, rng.permutation(labels)),
        label_entropy=float(-(frequencies * np.log2(frequencies)).sum()),
        plans=drawn,
        verdicts=verdicts,
        transferred=np.stack([wanted, seen], 1),
    )
