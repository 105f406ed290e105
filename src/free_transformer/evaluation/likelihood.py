"""
Likelihood of held-out text, comparable between models.

The cross-entropy under the posterior's plan (`reconstruction`) is not a language-model loss, because the encoder has
read the text. `elbo` and `nll` are upper bounds of the true negative log-likelihood. Only these two can be compared
with the loss of a baseline.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from free_transformer.errors import InputError
from free_transformer.evaluation.inputs import baseline_inputs, labels_of, run_lower_layers
from free_transformer.evaluation.particle_filter import particle_filter
from free_transformer.evaluation.usage import PlanUsage, plan_usage
from free_transformer.model.layout import PlanLayout, is_packed, plan_layout
from free_transformer.model.losses import IGNORED
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.outputs import LowerOutput
from free_transformer.model.plan import codes_to_bits

MAX_ENUMERATED_BITS = 10
MAX_PRIOR_PLANS = 4  # per text; more would make `prior` and `gap` more precise but validation slower
METHODS = ("importance", "particle_filter", "exact")

_Part = tuple[dict[str, Tensor], Tensor | None]  # sums over each document of a batch, and its plan logits, (N, H)


@dataclass
class Likelihood:
    """
    Results of `evaluate_likelihood`, in nats per predicted token unless noted. Values that need a plan are None for a
    baseline.

    Attributes:
        nll: negative log-likelihood: its exact value, or an upper bound from `num_samples` plans (see `method`).
        tokens: number of predicted tokens.
        documents: number of documents.
        method: `"importance"`, `"particle_filter"` or `"exact"`.
        num_samples: number of plans or particles per document.
        plan_prior: prior of the plans, `"uniform"` or `"aggregate"`.
        reconstruction: cross-entropy with plans from the posterior. Do not compare it with a baseline.
        kl: KL of the posterior from the prior, in bits per plan.
        kl_per_token: the same in bits per token.
        elbo: reconstruction + KL, an upper bound of the NLL.
        prior: cross-entropy with a plan sampled from the prior, as in generation; mean of up to 4 samples.
        gap: prior - reconstruction. Without a gap, the plan is not used.
        usage: how many bits of the plan are used.
        standard_errors: standard error of each of these values, over documents.
        per_document: sums of each document in nats, by the same names, and its number of `tokens`.
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
    Evaluates the likelihood of held-out text. Each batch has its own random stream, seeded from torch's generator, so
    the result does not depend on which process evaluates it.

    Args:
        model: a `FreeTransformer`, or any causal language model of `transformers`, for which only `nll` is computed.
        batches: dicts with `input_ids`, and optionally `attention_mask`, `position_ids` (packed rows) and `labels`,
            (B, T) each.
        num_samples: number of plans sampled from the posterior for each document.
        method: `"importance"`, `-log mean_k p(x|z_k) p(z_k) / q(z_k|x)` (IWAE: its expectation decreases with k and
            never exceeds the ELBO); `"particle_filter"`, a much tighter bound for documents with many plans, in time
            proportional to `num_samples` times the number of plans; or `"exact"`, the sum over all plans, for documents
            with one plan of at most 10 bits.
        prior: `"uniform"` (the paper), or `"aggregate"` if the model has gathered it. `kl`, `elbo`, `nll` and `prior`
            are those of a model that samples its plans from this prior.
        group: processes that share the work. Each receives all batches and evaluates some of them; all return the same
            result. The model may be sharded over them.

    Raises:
        InputError: for an unknown method or prior, `num_samples` below 1, too many plans for the exact method, or no
            tokens to predict.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r}: one of {METHODS}")
    if isinstance(model, FreeTransformer):
        model.plan_prior.checked(prior)
    if num_samples < 1:
        raise InputError(f"num_samples={num_samples}: must be at least 1")
    was_training = model.training
    model.eval()
    seed = int(torch.randint(2**62, ()))

    def evaluate(index: int, batch: Mapping[str, Tensor]) -> _Part:
        torch.manual_seed(seed + index)
        return _evaluate_batch(model, batch, num_samples, method, prior)

    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            # The number of steps of a particle filter depends on the batch, so sharded models would get out of step.
            shared = group if method != "particle_filter" else None
            parts = _evaluate_all(evaluate, batches, shared)
    finally:
        model.train(was_training)
    if not parts or sum(float(sums["tokens"].sum()) for sums, _ in parts) == 0:
        raise InputError("the batches contain no labels: there are no tokens to predict")
    sums = {name: torch.cat([part[name] for part, _ in parts]).cpu().double().numpy() for name in parts[0][0]}
    kept = sums["tokens"] > 0
    sums = {name: values[kept] for name, values in sums.items()}
    logits = [each for _, each in parts if each is not None]
    plan_logits = torch.cat(logits).cpu() if logits else None
    free_bits = model.config.free_bits or 0.0 if isinstance(model, FreeTransformer) else 0.0
    result = _summary(sums, plan_logits, free_bits, method, num_samples)
    result.plan_prior = prior
    return result


def _evaluate_all(
    evaluate: Callable[[int, Mapping[str, Tensor]], _Part],
    batches: Iterable[Mapping[str, Tensor]],
    group: dist.ProcessGroup | None,
) -> list[_Part]:
    """
    Evaluates all batches, each in one process of the group, and returns their parts in order.

    All processes take the same number of steps, which a sharded model requires: if there are not enough batches in the
    last step, the last batch is evaluated more than once.
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
    gathered: list[dict[int, _Part]] = [{} for _ in range(size)]
    dist.all_gather_object(gathered, own, group=group)
    parts = {index: part for each in gathered for index, part in each.items()}
    return [parts[index] for index in sorted(parts)]


def _summary(
    sums: dict[str, np.ndarray], plan_logits: Tensor | None, free_bits: float, method: str, num_samples: int
) -> Likelihood:
    """Computes means per token from the sums of each document."""
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
    result.usage = plan_usage(plan_logits, free_bits)
    return result


def ratio_standard_error(totals: np.ndarray, sizes: np.ndarray) -> float:
    """Standard error of `totals.sum() / sizes.sum()` over independent documents (linearized ratio estimator)."""
    count = len(totals)
    if count < 2:
        return math.nan
    residuals = totals - sizes * (totals.sum() / sizes.sum())
    return float(np.sqrt((residuals**2).sum() * count / (count - 1)) / sizes.sum())


@dataclass
class _Units:
    """The documents of a batch, numbered consecutively: the document of each token and of each plan."""

    of_column: Tensor  # (B, T)
    of_plan: Tensor  # (B, P)
    count: int

    def sum_tokens(self, values: Tensor) -> Tensor:
        """Sums values of the predicted tokens, (B, T - 1), over each document, (documents,)."""
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


@dataclass
class _PlannedBatch:
    """A batch with the output of the lower layers and the posterior of its plans."""

    model: FreeTransformer
    lower: LowerOutput
    layout: PlanLayout
    units: _Units
    plan_logits: Tensor  # (B, P, H) fp32
    target: Tensor  # (B, T - 1)
    prior: str

    def nats(self, plan: Tensor) -> Tensor:
        """Cross-entropy of each document under a plan, (documents,)."""
        return self.units.sum_tokens(_nats(self.model.upper_layers(self.lower, plan)[:, :-1], self.target))

    def log_posterior(self, plan: Tensor) -> Tensor:
        """log q(z|x) of each plan, (B, P)."""
        return F.logsigmoid(torch.where(plan, self.plan_logits, -self.plan_logits)).sum(-1) * self.layout.plan_mask

    def log_prior(self, plan: Tensor) -> Tensor:
        """log p(z) of each plan, (B, P)."""
        return self.model.plan_prior.log_prob(plan, self.prior) * self.layout.plan_mask

    def kl_bits(self) -> Tensor:
        """KL of the posterior from the prior, in bits per document, (documents,)."""
        mask = self.layout.plan_mask
        per_plan = self.model.plan_prior.kl(self.plan_logits.flatten(0, 1), self.prior).view(mask.shape)
        return self.units.sum_plans(per_plan * mask)


def _evaluate_batch(
    model: PreTrainedModel, batch: Mapping[str, Tensor], num_samples: int, method: str, prior: str
) -> _Part:
    """Returns the sums over each document of the batch, in nats, and the logits of its plans."""
    batch = {name: values.to(model.device) for name, values in batch.items()}
    target = labels_of(batch)[:, 1:]
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    if not isinstance(model, FreeTransformer):
        return _evaluate_baseline(model, inputs, target), None

    lower = run_lower_layers(model, inputs)
    layout = lower.layout
    assert layout is not None
    units = _units(layout.token_document, layout.plan_document, inputs["input_ids"], layout.num_plans)
    planned = _PlannedBatch(model, lower, layout, units, model.encode(lower).float(), target, prior)
    reconstructions, log_weights = [], []
    for _ in range(1 if method == "particle_filter" else num_samples):
        plan = model.plan_mapper(planned.plan_logits)
        reconstructions.append(planned.nats(plan))
        log_ratio = units.sum_plans(planned.log_prior(plan) - planned.log_posterior(plan))
        log_weights.append(log_ratio - reconstructions[-1])
    reconstruction, kl = torch.stack(reconstructions).mean(0), planned.kl_bits()
    nll = _nll(planned, torch.stack(log_weights), method, num_samples)
    priors = []
    for _ in range(min(num_samples, MAX_PRIOR_PLANS)):
        priors.append(planned.nats(model.sample_plan(len(target), layout.num_plans, prior=prior)))
    sums = {
        **_text_sums(units, target),
        "plans": units.sum_plans(layout.plan_mask),
        "reconstruction": reconstruction,
        "kl_bits": kl,
        "elbo": reconstruction + math.log(2) * kl,
        "nll": nll,
        "prior": torch.stack(priors).mean(0),
    }
    return sums, planned.plan_logits[layout.plan_mask]


def _nll(planned: _PlannedBatch, log_weights: Tensor, method: str, num_samples: int) -> Tensor:
    """
    Negative log-likelihood of each document, (documents,), by one of `METHODS`.

    Args:
        log_weights: (samples, documents), log p(x, z) - log q(z|x).
    """
    if method == "exact":
        return -_log_likelihood_exact(planned)
    if method == "particle_filter":
        following = F.pad(planned.target, (0, 1), value=IGNORED)
        estimates = particle_filter(
            planned.model, planned.lower, planned.plan_logits, _nats, following, num_samples, planned.prior
        )
        return -planned.units.sum_columns(estimates)
    return math.log(num_samples) - log_weights.logsumexp(0)


def _nats(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropies of (B, T, V) against (B, T), 0 where nothing is predicted."""
    return F.cross_entropy(logits.float().transpose(1, 2), target, ignore_index=IGNORED, reduction="none")


def _log_likelihood_exact(planned: _PlannedBatch) -> Tensor:
    """log p(x) of each document, (documents,), summed over all plans."""
    bits, mask = planned.model.config.latent_dim, planned.layout.plan_mask
    most = int(planned.units.sum_plans(mask).max())
    if most > 1 or bits > MAX_ENUMERATED_BITS:
        raise InputError(
            f"method='exact' needs one plan of at most {MAX_ENUMERATED_BITS} bits per document; these have {most} "
            f"of {bits} bits: use method='importance'"
        )
    total = None
    for code in range(2**bits):
        plan = codes_to_bits(torch.tensor(code, device=mask.device), bits).expand(*mask.shape, -1)
        nats = planned.nats(plan)
        log_joint = planned.units.sum_plans(planned.log_prior(plan)) - nats
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
    """Number of predicted tokens per document, and a fingerprint to check that two evaluations used the same text."""
    weight = torch.arange(target.shape[1], device=target.device) * 7919 % 10007 + 1
    predicted = target != IGNORED
    return {
        "tokens": units.sum_tokens(predicted),
        "fingerprint": units.sum_tokens((target + 1) * weight * predicted),
    }
