"""Measures how well plans control text: mutual information of plans and labels, and labels of generated texts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.model.layout import num_plans
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.plan import bits_to_codes

Share = tuple[float, float]  # a share and its standard error
Classifier = Callable[[Sequence[str]], np.ndarray]  # texts -> (N,) integer labels


def contingency(codes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes that occur, (C,), and how often each occurs with each label, (C, labels)."""
    seen, rows = np.unique(codes, return_inverse=True)
    table = np.zeros((len(seen), int(labels.max()) + 1), dtype=np.int64)
    np.add.at(table, (rows, labels), 1)
    return seen, table


def mutual_information(codes: np.ndarray, labels: np.ndarray) -> float:
    """
    Mutual information of the empirical joint distribution of codes, (N,), and labels, (N,), in bits.

    It is biased upwards by about (codes - 1)(labels - 1) / (2 N ln 2), see `mutual_information_bias`.
    """
    _, table = contingency(codes, labels)
    joint = table / table.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def mutual_information_bias(codes: np.ndarray, labels: np.ndarray) -> float:
    """Expected `mutual_information` of independent codes and labels (Miller-Madow), in bits."""
    _, table = contingency(codes, labels)
    return float((table.shape[0] - 1) * (table.shape[1] - 1) / (2 * len(codes) * np.log(2)))


def agreement(labels: np.ndarray) -> Share:
    """
    Share of texts with the most common label of their plan, and its standard error over plans.

    Args:
        labels: (plans, texts) integers.
    """
    shares = np.array([np.bincount(row).max() / len(row) for row in labels])
    return float(shares.mean()), float(shares.std(ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else float("nan")


def share_in_class(labels: np.ndarray, wanted: np.ndarray) -> Share:
    """Share of texts whose label, (N,), is the wanted one, (N,), and its standard error."""
    hits = labels == wanted
    return float(hits.mean()), float((hits.mean() * (1 - hits.mean()) / len(hits)) ** 0.5)


@torch.no_grad()
def sampled_codes(model: FreeTransformer, batches: Iterable[Mapping[str, Tensor]]) -> np.ndarray:
    """Samples plans from the posteriors of these texts and returns their codes, (N, P)."""
    codes = [
        bits_to_codes(model.plan_mapper(model.infer_plan(batch["input_ids"].to(model.device)))) for batch in batches
    ]
    return torch.cat(codes).cpu().numpy()


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    temperature: float = 1.0,
    batch_size: int = 128,
    plan: Tensor | None = None,
    prior: str | None = None,
) -> list[str]:
    """
    Generates texts from an empty prompt, with a Free Transformer or a baseline.

    Args:
        count: number of texts.
        length: tokens per text, including begin-of-text.
        plan: plans of the texts, (count, P, H) bool. Omit it for a baseline.
        prior: prior of the plans if none are given, `"uniform"` or `"aggregate"`. Omit it for a baseline.
    """
    options: dict[str, Tensor | str] = {} if prior is None else {"prior": prior}
    texts: list[str] = []
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        prompt = torch.full((size, 1), tokenizer.bos_token_id, device=model.device)
        if plan is not None:
            options["plan"] = plan[start : start + size]
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=length - 1,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            **options,
        )
        texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


@dataclass
class Control:
    """
    How well plans control text. Shares come with their standard errors.

    Attributes:
        agreement: share of texts generated under a random plan that have the most common label of that plan.
        agreement_shuffled: the same if each text has its own plan, which is the level of chance.
        agreement_baseline: the same for texts of the baseline, without a plan. None without a baseline.
        transfer: share of texts generated under the plan of an example that have the label of the example.
        transfer_shuffled: the same with plans shuffled among the examples, which is the level of chance.
        mutual_information: of the plans and labels of held-out texts, in bits.
        mutual_information_shuffled: the same with shuffled labels.
        label_entropy: upper bound of the mutual information, in bits.
        plans: (plans, P, H) bool, the random plans.
        verdicts: (plans, texts), the labels of the texts generated under these plans.
        transferred: (examples, 2), the label of each example and of the text generated under its plan.
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
    baseline: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
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
    Generates texts under random plans and under the plans of examples, and classifies them.

    Args:
        baseline: the same Llama without a plan, or None.
        classify: texts -> (N,) integer labels. The classifier sees only the text.
        tokens: (N, T), held-out texts of equal length.
        labels: (N,) integers, the labels of the held-out texts.
        plans: number of random plans.
        texts_per_plan: number of texts generated under each of them.
        examples_per_label: maximum number of held-out texts per label whose plans are transferred.
        prior: prior of the random plans, `"uniform"` or `"aggregate"`.
    """
    length = tokens.shape[1]
    count = plans * texts_per_plan

    def classified(generator: PreTrainedModel, plan: Tensor | None = None) -> np.ndarray:
        texts = generate_texts(generator, tokenizer, count, length, temperature, plan=plan)
        return classify(texts).reshape(plans, texts_per_plan)

    plans_per_text = num_plans(model.config.plan_span, length)
    random_plans = model.sample_plan(plans, plans_per_text, prior=prior)
    verdicts = classified(model, random_plans.repeat_interleave(texts_per_plan, 0))
    shuffled = classified(model, model.sample_plan(count, plans_per_text, prior=prior))

    rng = np.random.default_rng(0)
    kinds = np.unique(labels)
    examples = np.concatenate([rng.permutation(np.flatnonzero(labels == kind))[:examples_per_label] for kind in kinds])
    read = model.infer_plan(tokens[torch.from_numpy(examples)].to(model.device)) > 0
    order = torch.from_numpy(rng.permutation(len(examples)))
    wanted = labels[examples]
    seen, seen_shuffled = (
        classify(generate_texts(model, tokenizer, len(examples), length, temperature, plan=plan))
        for plan in (read, read[order])
    )
    codes = sampled_codes(model, ({"input_ids": part} for part in tokens.split(64)))[:, 0]
    frequencies = np.bincount(labels)[kinds] / len(labels)
    return Control(
        agreement=agreement(verdicts),
        agreement_shuffled=agreement(shuffled),
        agreement_baseline=None if baseline is None else agreement(classified(baseline)),
        transfer=share_in_class(seen, wanted),
        transfer_shuffled=share_in_class(seen_shuffled, wanted),
        mutual_information=mutual_information(codes, labels),
        mutual_information_shuffled=mutual_information(codes, rng.permutation(labels)),
        label_entropy=float(-(frequencies * np.log2(frequencies)).sum()),
        plans=random_plans,
        verdicts=verdicts,
        transferred=np.stack([wanted, seen], 1),
    )
