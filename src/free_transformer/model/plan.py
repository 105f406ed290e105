"""
The plan: its bits, their codes, sampling, and the codebook that maps a code to a vector.

A *plan* is H bits, bool. Its *code* is the integer with these bits, bit 0 the least significant.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .errors import InputError
from .losses import kl_bits
from .plan_text import parse_plan
from .sampling import PRIORS, check_choice
from .straight_through import StraightThrough, group_runs
from .stratified import BitChance, chance_of_prior, numbers_per_set, stratify

MAX_CODE_BITS_INT64 = 63
MAX_COUNTED_BITS = 12  # up to 2^12 codes are counted individually; longer plans are counted per bit
UNIFORM_SHARE = 0.01  # of the aggregate prior, so that no plan is impossible


def bits_to_codes(bits: Tensor) -> Tensor:
    """(..., H) bool or 0/1 -> (...) int64, bit 0 the least significant. `ValueError` above 63 bits."""
    if bits.shape[-1] > MAX_CODE_BITS_INT64:
        raise InputError(f"{bits.shape[-1]} bits do not fit an int64 code: at most {MAX_CODE_BITS_INT64}")
    powers = 1 << torch.arange(bits.shape[-1], device=bits.device)  # AOTInductor gets `2 **` wrong (PyTorch 2.13)
    return (bits.long() * powers).sum(-1)


def codes_to_bits(codes: Tensor, num_bits: int) -> Tensor:
    """(...) integers in [0, 2^num_bits) -> (..., num_bits) bool, bit 0 the least significant."""
    if num_bits > MAX_CODE_BITS_INT64:
        raise InputError(f"{num_bits} bits do not fit an int64 code: at most {MAX_CODE_BITS_INT64}")
    if codes.numel() and (codes.min() < 0 or codes.max() > 2**num_bits - 1):
        raise InputError(f"codes from {codes.min()} to {codes.max()}: {num_bits} bits hold 0 to {2**num_bits - 1}")
    return (codes.long()[..., None] >> torch.arange(num_bits, device=codes.device)) % 2 == 1


def as_plan(
    plan: Tensor | str | Sequence[str], batch_size: int, latent_dim: int, names: Mapping[str, str] | None = None
) -> Tensor:
    """
    Checks a plan given by a caller and returns it as (B, P, H) bool.

    Args:
        plan: bits, (P, H) or (B, P, H), bool or 0/1; or text such as `"0110"`, bit 0 first, for all rows, or a list
            with one text per row. A longer text holds several plans.

    Raises:
        ValueError: for another shape, or values other than bits.
    """
    if isinstance(plan, str):
        plan = parse_plan(plan, latent_dim, names)
    elif isinstance(plan, list | tuple) and plan and all(isinstance(each, str) for each in plan):
        rows = [parse_plan(each, latent_dim, names) for each in plan]
        if len({len(each) for each in rows}) > 1:
            raise InputError(
                f"plan {list(plan)!r}: texts of {sorted({len(each) for each in rows})} plans; all need the same number"
            )
        plan = torch.stack(rows)
    try:
        plan = torch.as_tensor(plan)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"plan of type {type(plan).__name__}: pass bits, (P, {latent_dim}), or text such as '0110'"
        ) from error
    if plan.ndim == 2:
        plan = plan.expand(batch_size, -1, -1)
    if plan.ndim != 3 or plan.shape[0] != batch_size or plan.shape[2] != latent_dim or plan.shape[1] == 0:
        raise InputError(
            f"plan of shape {tuple(plan.shape)}: expected (P, {latent_dim}) or ({batch_size}, P, {latent_dim}), "
            f"P plans of {latent_dim} bits for {batch_size} texts"
        )
    if plan.dtype != torch.bool and not ((plan == 0) | (plan == 1)).all():
        raise InputError("the plan holds values other than bits (bool or 0/1)")
    return plan.bool()


class BinaryMapper(nn.Module):
    """Samples each bit independently, `bit_h ~ Bernoulli(sigmoid(logit_h))` (paper, section 3.3)."""

    def forward(self, plan_logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(..., H) logits -> (..., H) bool. Logits of 0 sample from the uniform prior."""
        dtype = torch.promote_types(plan_logits.dtype, torch.float32)
        uniform = torch.rand(plan_logits.shape, dtype=dtype, device=plan_logits.device, generator=generator)
        return uniform < plan_logits.to(dtype).sigmoid()


class PlanPrior(nn.Module):
    """
    The prior of plans: uniform (the method), or *aggregate*, the distribution of the plans of training texts.

    The aggregate is gathered after training and saved with the model. Plans of one text are independent. Up to 12 bits
    the aggregate is a distribution over codes, above that over each bit separately. 1 % of it is uniform, so that no
    plan is impossible.

    Attributes:
        log_aggregate: log-probabilities of the codes, (2^H,), or of each bit's values 0 and 1, (2, H); all zero before
            they are gathered. They stay in fp32 or better when the model is cast, since KL and likelihood are computed
            from them.
    """

    log_aggregate: Tensor

    def __init__(self, latent_dim: int):
        super().__init__()
        self.latent_dim = latent_dim
        self.counts_codes = latent_dim <= MAX_COUNTED_BITS
        shape = (2**latent_dim,) if self.counts_codes else (2, latent_dim)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("log_aggregate", torch.zeros(shape, dtype=dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PlanPrior":
        exact = self.log_aggregate
        super()._apply(fn, recurse)
        if self.log_aggregate.dtype.itemsize < torch.float32.itemsize:
            self.log_aggregate = exact.to(self.log_aggregate.device, torch.float32)
        return self

    @property
    def gathered(self) -> bool:
        return bool(self.log_aggregate.any())

    def checked(self, prior: str) -> str:
        """Returns `prior`. Raises `ValueError` for an unknown name, and for an aggregate that was never gathered."""
        check_choice("prior", prior, PRIORS)
        # Offloaded buffers can be read only inside `forward`.
        if prior == "aggregate" and not self.log_aggregate.is_meta and not self.gathered:
            raise InputError(
                "prior='aggregate': this model has no aggregate prior; call model.gather_prior(batches) first"
            )
        return prior

    @torch.no_grad()
    def gather(self, plan_logits: Iterable[Tensor]) -> None:
        """Gathers the aggregate from the posterior logits of training texts, batches of (N, H)."""
        counts = torch.zeros(self.log_aggregate.shape, dtype=torch.float64, device=self.log_aggregate.device)
        total = 0
        for logits in plan_logits:
            p = logits.to(counts).sigmoid()
            counts += code_probabilities(p).sum(0) if self.counts_codes else torch.stack([1 - p, p]).sum(1)
            total += len(p)
        if total == 0:
            raise InputError("there are no plans to gather a prior from")
        outcomes = len(counts)
        self.log_aggregate.copy_(((1 - UNIFORM_SHARE) * counts / total + UNIFORM_SHARE / outcomes).log())

    def forward(
        self,
        batch_size: int,
        num_plans: int,
        prior: str = "uniform",
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        samples_per_set: int = 1,
    ) -> Tensor:
        """
        Samples plans, (B, P, H) bool, on the device of the generator, or on `device`.

        Args:
            samples_per_set: number of consecutive texts whose plans are stratified together (`stratified.py`); with 1,
                all are independent. The plans of one text are always independent of each other. Stratified plans
                consume random numbers plan after plan, so with more plans the first ones stay the same.
        """
        device = generator.device if generator is not None else device or self.log_aggregate.device
        shape = (batch_size, num_plans)
        if samples_per_set > 1:
            known = None if self.checked(prior) == "uniform" else self.log_aggregate.cpu().numpy()
            distribution, sets = chance_of_prior(known, self.latent_dim), (num_plans, batch_size // samples_per_set)
            plans = draw_stratified(distribution, sets, samples_per_set, self.latent_dim, device, generator)
            return plans.flatten(1, 2).transpose(0, 1)
        if self.checked(prior) == "aggregate" and self.counts_codes:
            draws = batch_size * num_plans
            chances = self.log_aggregate.exp().to(device)
            codes = torch.multinomial(chances, draws, replacement=True, generator=generator)
            return codes_to_bits(codes.view(shape), self.latent_dim)
        chance = self.log_aggregate[1].exp().to(device) if prior == "aggregate" else 0.5
        return torch.rand(*shape, self.latent_dim, device=device, generator=generator) < chance

    def sample(self, *args: object, **kwargs: object) -> Tensor:
        """Calls the module itself, so that the hooks of offloading load its buffers. Arguments as in `forward`."""
        return self(*args, **kwargs)

    def log_prob(self, plan: Tensor, prior: str = "uniform") -> Tensor:
        """Returns log p(z) in nats: (..., H) bool -> (...)."""
        if self.checked(prior) == "uniform":
            return torch.full(plan.shape[:-1], -math.log(2) * self.latent_dim, device=plan.device)
        if self.counts_codes:
            return self.log_aggregate[bits_to_codes(plan)]
        return torch.where(plan, self.log_aggregate[1], self.log_aggregate[0]).sum(-1)

    def kl(self, plan_logits: Tensor, prior: str = "uniform") -> Tensor:
        """Returns the exact KL of each plan's posterior from the prior, in bits: (N, H) -> (N,)."""
        kl = kl_bits(plan_logits)
        if self.checked(prior) == "uniform":
            return kl
        p = plan_logits.to(self.log_aggregate.dtype).sigmoid()
        if self.counts_codes:
            expected = code_probabilities(p) @ self.log_aggregate
        else:
            expected = (p * self.log_aggregate[1] + (1 - p) * self.log_aggregate[0]).sum(-1)
        return kl - self.latent_dim - expected / math.log(2)


def draw_stratified(
    chance: BitChance,
    sets: tuple[int, int],
    num_samples: int,
    latent_dim: int,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Samples sets of k plans, (*sets, k, H) bool, each set stratified separately; see `stratified.stratify`."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    shape = (*sets, numbers_per_set(num_samples, latent_dim))
    uniform = torch.rand(shape, dtype=dtype, device=device, generator=generator).cpu().double().numpy()
    return torch.from_numpy(stratify(chance, num_samples, latent_dim, uniform)).to(device)


def code_probabilities(p: Tensor) -> Tensor:
    """Returns the probability of every code if bit h is 1 with probability `p[..., h]`: (N, H) -> (N, 2^H)."""
    total = torch.ones_like(p[:, :1])
    for bit in range(p.shape[1]):
        one = p[:, bit : bit + 1]
        total = torch.cat([total * (1 - one), total * one], dim=1)
    return total


class PlanTable(nn.Module):
    """
    The codebook: one row per code of each group of bits. A plan's vector is the sum over the groups.

    One group gives the paper's codebook of shape `(2^H, D)`; groups of one bit give a linear map of the bits. `weight`
    stacks the rows of all groups.

    Args:
        group_bits: bits of each group.
        hidden_dim: D.
        gradient: gradient of `plan_logits`, `"exact"` or `"sampled"`, see `straight_through.py`.
        chunk_bytes: maximum memory for this gradient, in bytes.
        start: initialization, `"bit_linear"`, `"normal"` or `"zero"`.

    Attributes:
        sparse: whether `weight.grad` is a sparse tensor of the sampled rows, for `training.optimizers.RowAdamW` and
            other optimizers that accept one; False by default. A dense gradient has the size of the codebook.
    """

    def __init__(
        self,
        group_bits: list[int],
        hidden_dim: int,
        gradient: str = "exact",
        chunk_bytes: int = 24 * 2**20,
        start: str = "bit_linear",
    ):
        super().__init__()
        self.group_bits = list(group_bits)
        self.gradient = gradient
        self.chunk_bytes = chunk_bytes
        self.start = start
        self.sparse = False
        self.weight = nn.Parameter(torch.empty(sum(2**bits for bits in self.group_bits), hidden_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, scale: float = 1.0) -> None:
        """
        Initializes rows with RMS `scale`. It should match the RMS of X because `norm(X + R)` depends on their ratio.

        The bit-linear initialization is what makes the model use the plan. With independent random rows, the encoder's
        gradient is initially pure noise, and the model learns to ignore the plan before the gradient becomes useful.
        """
        if self.weight.is_meta:  # `from_pretrained` loads weights or calls this again
            return
        if self.start == "zero":
            init.zeros_(self.weight)
        elif self.start == "normal":
            init.normal_(self.weight, std=scale / len(self.group_bits) ** 0.5)
        else:
            rows = []
            for bits in self.group_bits:
                signs = codes_to_bits(torch.arange(2**bits), bits).to(self.weight) * 2 - 1  # (2^bits, bits)
                directions = torch.randn(bits, self.weight.shape[1], dtype=self.weight.dtype)
                rows.append(signs @ directions.to(self.weight) * (scale / sum(self.group_bits) ** 0.5))
            init.copy_(self.weight, torch.cat(rows))

    def group_codes(self, plan: Tensor) -> Tensor:
        """Returns the row of `weight` that each group of bits selects: (..., H) bool -> (..., groups)."""
        if len(self.group_bits) == 1:
            return bits_to_codes(plan).unsqueeze(-1)
        codes, first_bit, first_row = [], 0, 0
        for bits, groups in group_runs(self.group_bits):
            run = plan[..., first_bit : first_bit + bits * groups].unflatten(-1, (groups, bits))
            codes.append(bits_to_codes(run) + first_row + 2**bits * torch.arange(groups, device=plan.device))
            first_bit += bits * groups
            first_row += 2**bits * groups
        return torch.cat(codes, dim=-1)

    def _sum_rows(self, codes: Tensor) -> Tensor:
        if len(self.group_bits) == 1:
            return F.embedding(codes.squeeze(-1), self.weight, sparse=self.sparse)
        if torch.compiler.is_exporting():  # ONNX has no EmbeddingBag
            return F.embedding(codes, self.weight).sum(-2)
        # sums without materializing the rows of all G groups: 1/G of the memory
        states = F.embedding_bag(codes.flatten(0, -2), self.weight, mode="sum", sparse=self.sparse)
        return states.view(*codes.shape[:-1], -1)

    def forward(self, plan: Tensor, plan_logits: Tensor | None = None) -> Tensor:
        """
        Args:
            plan: (B, P, H) bool, the sampled bits.
            plan_logits: (B, P, H) of the distribution they were sampled from; they receive the straight-through
                gradient. The codebook's own gradient is that of a lookup of the sampled rows.

        Returns:
            R, (B, P, D).
        """
        codes = self.group_codes(plan)
        states = self._sum_rows(codes)
        if plan_logits is None or not plan_logits.requires_grad:
            return states
        settings = (self.group_bits, self.gradient, self.chunk_bytes)
        return StraightThrough.apply(states, plan_logits, self.weight, plan, codes, *settings)
