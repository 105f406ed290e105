"""
How likely a model finds held-out text, in numbers that may be compared.

The cross-entropy under the posterior's plan (`reconstruction`) is no language-model loss: the encoder has read the
answer. `elbo` and `nll` are upper bounds of the true negative log-likelihood; only they stand beside a baseline's.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from free_transformer.evaluation.particle_filter import particle_filter
from free_transformer.evaluation.usage import PlanUsage, plan_usage
from free_transformer.model.layout import is_packed, plan_layout
from free_transformer.model.losses import IGNORED
from free_transformer.model.modeling import FreeTransformer, LowerOutput
from free_transformer.model.plan import codes_to_bits

MAX_ENUMERATED_BITS = 10
MOST_PRIOR_PLANS = 4  # a text; more would sharpen `prior` and `gap` at the cost of every validation
METHODS = ("importance", "particle_filter", "exact")

_Part = tuple[dict[str, Tensor], Tensor | None]  # sums over each document of a batch, and the logits of its plans


@dataclass
class Likelihood:
    """
    Nats per predicted token, but for `kl` (bits per plan) and `kl_per_token` (bits). None where a baseline has none.

    Attributes:
        reconstruction: cross-entropy with plans from the posterior; never to be compared with a baseline.
        elbo: reconstruction + KL, an upper bound of the NLL.
        nll: a bound by `num_samples` plans, importance weights or a particle filter, or the exact value (`method`).
        prior: cross-entropy with a plan drawn from the prior, what one generation sees; mean of up to 4 draws.
        gap: prior - reconstruction; without a gap the plan is not used.
        standard_errors: of each of these, documents being the units.
        per_document: nats of each document by the same names, and its `tokens`.
    """

    nll: float
    tokens: int
    documents: int
    method: str
    num_samples: int
    plan_prior: str = "uniform"
    reconstruction: float | None = None
    kl: float | None = None
    kl_per_token: float | None = None
    elbo: float | None = None
    prior: float | None = None
    gap: float | None = None
    usage: PlanUsage | None = None
    standard_errors: dict[str, float] = field(default_factory=dict)
    per_document: dict[str, np.ndarray] = field(default_factory=dict, repr=False)


@torch.no_grad()
def evaluate_likelihood(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    num_samples: int = 16,
    method: str = "importance",
    prior: str = "uniform",
    group: dist.ProcessGroup | None = None,
) -> Likelihood:
    """
    Each batch has random numbers of its own, which follow from torch's: who reads it changes nothing.

    Args:
        model: a `FreeTransformer`, or any causal language model of `transformers`: then only `nll` is there.
        batches: dicts with `input_ids`, and optionally `attention_mask`, `position_ids` (packed rows) and `labels`.
        num_samples: plans drawn from the posterior for each document.
        method: `"importance"`, `-log mean_k p(x|z_k) p(z_k) / q(z_k|x)` (IWAE: its expectation falls as k grows and
            never passes the ELBO); `"particle_filter"`, a far tighter bound where a document has many plans, in time
            that grows with `num_samples` times their number; or `"exact"`, the sum over all plans, where a document
            has one plan of at most 10 bits.
        prior: `"uniform"` (the method), or `"aggregate"` where the model has gathered it: then `kl`, `elbo`, `nll`
            and `prior` are of a model that draws its plans from that.
        group: processes that share the work: each is given all batches and reads some, and all get the same result.
            The model may be sharded over them.

    Raises:
        ValueError: for an unknown method or prior, too many plans for the exact one, or nothing to predict.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: one of {METHODS}")
    if isinstance(model, FreeTransformer):
        model.plan_prior.checked(prior)
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: at least 1")
    was_training = model.training
    model.eval()
    seed = int(torch.randint(2**62, ()))

    def evaluate(index: int, batch: Mapping[str, Tensor]) -> _Part:
        torch.manual_seed(seed + index)
        return _evaluate_batch(model, batch, num_samples, method, prior)

    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            # Particle filters take as many steps as a batch has plans, which a sharded model could not follow.
            shared = group if method != "particle_filter" else None
            parts = _evaluate_all(evaluate, batches, shared)
    finally:
        model.train(was_training)
    if not parts or sum(float(sums["tokens"].sum()) for sums, _ in parts) == 0:
        raise ValueError("there is nothing to predict in these batches")
    sums = {name: torch.cat([part[name] for part, _ in parts]).cpu().double().numpy() for name in parts[0][0]}
    kept = sums["tokens"] > 0
    sums = {name: values[kept] for name, values in sums.items()}
    logits = [each for _, each in parts if each is not None]
    plan_logits = torch.cat(logits).cpu() if logits else None
    result = _summary(sums, plan_logits, model.config, method, num_samples)
    result.plan_prior = prior
    return result


def _evaluate_all(
    evaluate: Callable[[int, Mapping[str, Tensor]], _Part],
    batches: Iterable[Mapping[str, Tensor]],
    group: dist.ProcessGroup | None,
) -> list[_Part]:
    """
    All batches' parts in order, each read by one process of the group.

    All take the same number of steps, as a sharded model asks: where batches run out, the last is read once more.
    """
    numbered = enumerate(batches)
    if group is None:
        return [evaluate(index, batch) for index, batch in numbered]
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own: dict[int, _Part] = {}
    while round_of := list(islice(numbered, size)):
        index, batch = round_of[min(rank, len(round_of) - 1)]
        sums, logits = evaluate(index, batch)
        own[index] = ({name: values.cpu() for name, values in sums.items()}, None if logits is None else logits.cpu())
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, own, group=group)
    parts = {index: part for each in gathered for index, part in each.items()}
    return [parts[index] for index in sorted(parts)]


def _summary(
    sums: dict[str, np.ndarray], plan_logits: Tensor | None, config: Any, method: str, num_samples: int
) -> Likelihood:
    """From nats of each document to means per token."""
    tokens = sums["tokens"]
    result = Likelihood(
        nll=float(sums["nll"].sum() / tokens.sum()),
        tokens=int(tokens.sum()),
        documents=len(tokens),
        method="exact" if plan_logits is None else method,
        num_samples=num_samples,
        per_document=sums,
    )
    result.standard_errors["nll"] = ratio_standard_error(sums["nll"], tokens)
    if plan_logits is None:
        return result
    sums["gap"] = sums["prior"] - sums["reconstruction"]
    for name in ("reconstruction", "elbo", "prior", "gap"):
        setattr(result, name, float(sums[name].sum() / tokens.sum()))
        result.standard_errors[name] = ratio_standard_error(sums[name], tokens)
    for name, units in (("kl", sums["plans"]), ("kl_per_token", tokens)):
        setattr(result, name, float(sums["kl_bits"].sum() / units.sum()))
        result.standard_errors[name] = ratio_standard_error(sums["kl_bits"], units)
    result.usage = plan_usage(plan_logits, config.free_bits)
    return result


def ratio_standard_error(totals: np.ndarray, sizes: np.ndarray) -> float:
    """Standard error of `totals.sum() / sizes.sum()` over independent documents (linearised ratio estimator)."""
    count = len(totals)
    if count < 2:
        return math.nan
    residuals = totals - sizes * (totals.sum() / sizes.sum())
    return float(np.sqrt((residuals**2).sum() * count / (count - 1)) / sizes.sum())


@dataclass
class _Units:
    """The documents of a batch, numbered through: what each token and each plan belongs to."""

    of_column: Tensor  # (B, T)
    of_plan: Tensor  # (B, P)
    count: int

    def sum_tokens(self, values: Tensor) -> Tensor:
        """(B, T - 1), of the predicted tokens."""
        return self._sum(values, self.of_column[:, 1:])

    def sum_columns(self, values: Tensor) -> Tensor:
        return self._sum(values, self.of_column)

    def sum_plans(self, values: Tensor) -> Tensor:
        return self._sum(values, self.of_plan)

    def _sum(self, values: Tensor, unit: Tensor) -> Tensor:
        total = torch.zeros(self.count, dtype=torch.float64, device=values.device)
        return total.index_add_(0, unit.flatten(), values.double().flatten())


def _units(token_document: Tensor | None, plan_document: Tensor | None, tokens: Tensor, plans: int) -> _Units:
    batch = len(tokens)
    if token_document is None or plan_document is None:
        token_document = torch.zeros_like(tokens)
        plan_document = tokens.new_zeros(batch, plans)
    width = int(token_document.max()) + 1
    first = width * torch.arange(batch, device=tokens.device)[:, None]
    return _Units(token_document + first, plan_document + first, batch * width)


def _evaluate_batch(
    model: PreTrainedModel, batch: Mapping[str, Tensor], num_samples: int, method: str, prior: str
) -> _Part:
    """Sums over each document of the batch, in nats, and the logits of its plans."""
    batch = {name: values.to(model.device) for name, values in batch.items()}
    labels = _labels(batch)
    inputs: dict[str, Any] = {name: values for name, values in batch.items() if name != "labels"}
    target = labels[:, 1:]

    if not isinstance(model, FreeTransformer):
        return _evaluate_baseline(model, inputs, target), None

    lower = model.lower_layers(**inputs)
    layout = lower.layout
    assert layout is not None
    units = _units(layout.token_document, layout.plan_document, inputs["input_ids"], layout.num_plans)
    plan_logits = model.encode(lower).float()
    mask = layout.plan_mask

    def log_probability(plan: Tensor) -> Tensor:  # log q(z|x) of each plan, (B, P)
        return F.logsigmoid(torch.where(plan, plan_logits, -plan_logits)).sum(-1) * mask

    def log_prior(plan: Tensor) -> Tensor:
        return model.plan_prior.log_prob(plan, prior) * mask

    reconstructions, log_weights = [], []
    for _ in range(1 if method == "particle_filter" else num_samples):
        plan = model.plan_mapper(plan_logits)
        reconstructions.append(units.sum_tokens(_nats(model.upper_layers(lower, plan)[:, :-1], target)))
        log_weights.append(units.sum_plans(log_prior(plan) - log_probability(plan)) - reconstructions[-1])
    reconstruction = torch.stack(reconstructions).mean(0)
    per_plan = model.plan_prior.kl(plan_logits.flatten(0, 1), prior).view(mask.shape)
    kl = units.sum_plans(per_plan * mask)
    if method == "exact":
        nll = -_log_likelihood_exact(model, lower, units, target, prior)
    elif method == "particle_filter":
        following = F.pad(target, (0, 1), value=IGNORED)
        estimates = particle_filter(model, lower, plan_logits, _nats, following, num_samples, prior)
        nll = -units.sum_columns(estimates)
    else:
        nll = math.log(num_samples) - torch.stack(log_weights).logsumexp(0)
    priors = []
    for _ in range(min(num_samples, MOST_PRIOR_PLANS)):
        plan = model.sample_plan(len(labels), layout.num_plans, prior=prior)
        priors.append(units.sum_tokens(_nats(model.upper_layers(lower, plan)[:, :-1], target)))
    sums = {
        **_text_sums(units, target),
        "plans": units.sum_plans(mask),
        "reconstruction": reconstruction,
        "kl_bits": kl,
        "elbo": reconstruction + math.log(2) * kl,
        "nll": nll,
        "prior": torch.stack(priors).mean(0),
    }
    return sums, plan_logits[mask]


def _nats(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropies of (B, T, V) against (B, T), 0 where nothing is predicted."""
    return F.cross_entropy(logits.float().transpose(1, 2), target, ignore_index=IGNORED, reduction="none")


def _log_likelihood_exact(
    model: FreeTransformer, lower: LowerOutput, units: _Units, target: Tensor, prior: str
) -> Tensor:
    """log p(x) of each document, summed over all plans."""
    bits = model.config.latent_dim
    layout = lower.layout
    assert layout is not None
    most = int(units.sum_plans(layout.plan_mask).max())
    if most > 1 or bits > MAX_ENUMERATED_BITS:
        raise ValueError(
            f"method='exact' enumerates one plan of at most {MAX_ENUMERATED_BITS} bits a document; these have {most} "
            f"of {bits} bits: use method='importance'"
        )
    total = None
    for code in range(2**bits):
        plan = codes_to_bits(torch.tensor(code, device=model.device), bits).expand(*layout.plan_mask.shape, -1)
        nats = _nats(model.upper_layers(lower, plan)[:, :-1], target)
        log_joint = units.sum_plans(model.plan_prior.log_prob(plan, prior) * layout.plan_mask) - units.sum_tokens(nats)
        total = log_joint if total is None else torch.logaddexp(total, log_joint)
    assert total is not None
    return total


def _evaluate_baseline(model: PreTrainedModel, inputs: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
    input_ids, position_ids = inputs["input_ids"], inputs.get("position_ids")
    document = None
    if position_ids is not None:
        mask = inputs.get("attention_mask")
        token_mask = None if mask is None else mask.bool()
        if is_packed(position_ids, token_mask):
            document = plan_layout("sequence", position_ids, token_mask, packed=True).token_document
    units = _units(document, document, input_ids, 1)
    logits = model(**baseline_inputs(inputs)).logits
    return {**_text_sums(units, target), "nll": units.sum_tokens(_nats(logits[:, :-1], target))}


def _text_sums(units: _Units, target: Tensor) -> dict[str, Tensor]:
    """Predicted tokens of each document, and a fingerprint that tells whether two evaluations read the same text."""
    weight = torch.arange(target.shape[1], device=target.device) * 7919 % 10007 + 1
    predicted = target != IGNORED
    return {
        "tokens": units.sum_tokens(predicted),
        "fingerprint": units.sum_tokens((target + 1) * weight * predicted),
    }


def baseline_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """
    A batch as a plain Llama takes it.

    `transformers` tells packed documents apart by their positions only where there is neither an `attention_mask`
    nor a cache; padding on the right needs no mask, and comes out as documents of one token.
    """
    packed = "position_ids" in batch
    inputs: dict[str, Any] = {name: values for name, values in batch.items() if name != "attention_mask" or not packed}
    return {**inputs, "use_cache": False}


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    if "labels" in batch:
        return batch["labels"]
    labels, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        # with padding on the left, the first real token has no past to be predicted from
        labels = labels.masked_fill((mask == 0) | ((mask.cumsum(1) == 1) & (mask == 1)), IGNORED)
    if positions is not None:  # nor has the first of a packed document
        starts = torch.ones_like(positions, dtype=torch.bool)
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        labels = labels.masked_fill(starts, IGNORED)
    return labels
