"""
Sources of a text's plans: given by the caller, inferred from the prompt by the encoder, or sampled from the prior.

An empty prompt (only the begin-of-text token) always uses the prior. `runtime.plan_source` implements the same rule in
NumPy.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import PlanCache, PlanState
from .compat import Cache
from .configuration import FreeTransformerConfig
from .errors import InputError
from .layout import num_plans, plan_to_token
from .outputs import LowerOutput
from .plan import as_plan, draw_stratified
from .stratified import chance_of_bits

if TYPE_CHECKING:
    from .modeling import FreeTransformer

NO_PREFIX_TUNING = "PEFT prefix tuning is not supported, since its virtual tokens have no plan: use LoRA"
UNKNOWN_PLAN = (
    "cache: it holds tokens but not their plan. Pass that plan too, plan=..., or "
    f"continue from the cache that this model returns ({NO_PREFIX_TUNING})"
)


def known_plans(
    config: FreeTransformerConfig,
    plan: Tensor | str | Sequence[str] | PlanState | None,
    cache: Cache | None,
    lower: LowerOutput,
    prompt_plan: str | None,
    prior: str | None,
) -> PlanState:
    """Returns the plans given by the caller, or those of the cache, or none yet."""
    if isinstance(plan, PlanState):
        if plan.plan is None and lower.layout is None:
            raise InputError(UNKNOWN_PLAN)
        return plan
    held = cache.state if isinstance(cache, PlanCache) else None
    if prior is None:
        prior = "uniform" if held is None else held.prior
    if plan is not None:
        given = as_plan(plan, len(lower.hidden_states), config.latent_dim, config.plan_names)
        if prompt_plan is None and given.shape[1] != lower.num_plans:
            raise InputError(
                f"plan of shape {tuple(given.shape)} for texts of {lower.num_plans} plans each "
                f"(plan_span={config.plan_span!r}): expected ({lower.num_plans}, {config.latent_dim}), or pass "
                "prompt_plan='prior' to sample the missing plans"
            )
        return PlanState(plan=given, prompt_plan=prompt_plan or "prior", prior=prior)
    if held is not None:
        held.prior = prior
        return held
    if lower.layout is None:
        raise InputError(UNKNOWN_PLAN)
    return PlanState(prompt_plan=prompt_plan or "prior", prior=prior)


def complete_plans(
    model: "FreeTransformer", state: PlanState, lower: LowerOutput, is_text: Callable[[], Tensor]
) -> PlanState:
    """
    Adds the plans that these tokens need. For a prompt, also adds those of all tokens that may follow.

    Args:
        is_text: returns (B, T) bool, False for tokens that carry no text; see the function `is_text`.
    """
    is_prompt, wanted = state.columns is None, lower.num_plans
    if state.dropped_plans is not None:
        wanted += int(state.dropped_plans.max())
    if not is_prompt and state.plan is not None and state.plan.shape[1] >= wanted:
        return state
    device, batch = lower.hidden_states.device, len(lower.hidden_states)
    known = torch.empty(batch, 0, model.config.latent_dim, dtype=torch.bool, device=device)
    if state.plan is not None:
        known = state.plan.to(device)
        known = known.repeat_interleave(max(1, batch // len(known)), 0)  # several texts for each prompt
    if is_prompt:
        if known.shape[1] < wanted:
            known = torch.cat([known, _plans_of_prompt(model, state, lower, is_text(), known.shape[1])], 1)
        state.columns = lower.num_tokens
        if lower.layout is not None:
            state.first_position = lower.layout.plan_position[:, :1]
            state.padded = lower.layout.token_mask is not None
        wanted = num_plans(model.config.plan_span, lower.num_tokens + state.new_tokens)
    stream = state.stream(device) if state.new_tokens else None  # seeded before the first token is sampled
    if known.shape[1] < wanted:
        missing = wanted - known.shape[1]
        known = torch.cat([known, _new_plans(model, state, batch, missing, stream or state.stream(device))], 1)
    state.plan, state.vectors = known, None
    return state


def _new_plans(model: "FreeTransformer", state: PlanState, batch: int, missing: int, stream: torch.Generator) -> Tensor:
    """Samples plans from the prior, (B, missing, H) bool, consuming random numbers plan after plan."""
    if state.texts_per_prompt > 1:
        return model.plan_prior.sample(batch, missing, state.prior, stream, samples_per_set=state.texts_per_prompt)
    return model.plan_prior.sample(missing, batch, state.prior, stream).transpose(0, 1)


def _plans_of_prompt(
    model: "FreeTransformer", state: PlanState, lower: LowerOutput, is_text: Tensor, known: int
) -> Tensor:
    """Samples the prompt's plans, except the first `known` ones, from the posterior or the prior."""
    batch, missing = len(lower.hidden_states), lower.num_plans - known
    logits = lower.hidden_states.new_zeros(batch, missing, model.config.latent_dim, dtype=torch.float32)
    read = torch.zeros(batch, missing, dtype=torch.bool, device=logits.device)
    if state.prompt_plan == "posterior" and lower.layout is not None:
        if lower.layout.token_mask is not None:
            is_text = is_text & lower.layout.token_mask
        read = lower.layout.plan_mask[:, -missing:] & is_text.any(1, keepdim=True)
        logits = torch.where(read[..., None], model.encode(lower)[:, -missing:].to(logits.dtype), logits)
    texts = state.texts_per_prompt
    plans: Tensor = model.plan_mapper(logits) if texts == 1 else _stratified_posterior(logits, texts)
    if state.prior != "uniform":
        from_prior = model.plan_prior.sample(batch, missing, state.prior, device=logits.device, samples_per_set=texts)
        plans = torch.where(read[..., None], plans, from_prior)
    return plans


def complete_plans_of_long_prompt(
    model: "FreeTransformer", state: PlanState, tokens: Tensor, mask: Tensor | None, prompt_plans: int, num_tokens: int
) -> None:
    """
    Completes plans like `complete_plans`, for prompts of which the model sees only the end.

    The encoder reads this end. The plans of earlier tokens have no effect and are sampled from the prior.

    Args:
        tokens: (B, T), the tokens that the model sees, padded on the left; mask: (B, T) bool, False on padding.
        prompt_plans: number of plans of the longest prompt.
        num_tokens: number of tokens of the longest text, new tokens included.
    """
    batch, device = len(tokens), tokens.device
    given = torch.empty(batch, 0, model.config.latent_dim, dtype=torch.bool, device=device)
    if state.plan is not None:
        given = state.plan.to(device).repeat_interleave(max(1, batch // len(state.plan)), 0)
    wanted = max(num_plans(model.config.plan_span, num_tokens), given.shape[1])
    read, places = given[:, :0], torch.zeros(batch, 0, dtype=torch.long, device=device)
    if given.shape[1] < prompt_plans:
        lower = model.lower_layers(tokens, mask)
        read = _plans_of_prompt(model, state, lower, is_text(model, tokens, None), 0)
        first = 0 if state.dropped_plans is None else state.dropped_plans
        places = first + torch.arange(read.shape[1], device=device).expand(batch, -1)
        wanted = max(wanted, int(places.max()) + 1)
    plan = _new_plans(model, state, batch, wanted, state.stream(device)).contiguous()
    plan.scatter_(1, places[..., None].expand_as(read), read)
    plan[:, : given.shape[1]] = given
    state.plan, state.vectors = plan, None


def _stratified_posterior(logits: Tensor, texts: int) -> Tensor:
    """Samples plans, (B, P, H) bool, stratified over each `texts` consecutive rows, which repeat one prompt."""
    chance = chance_of_bits(logits[::texts].double().sigmoid().cpu().numpy())
    prompts, num_plans, latent_dim = len(logits) // texts, *logits.shape[1:]
    plans = draw_stratified(chance, (prompts, num_plans), texts, latent_dim, logits.device)  # (B / texts, P, texts, H)
    return plans.transpose(1, 2).flatten(0, 1)


def is_text(model: "FreeTransformer", input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """
    Returns (B, T) bool, False for the token that begins a text. A prompt with no other token is empty.

    As in tokenizers, this is the end-of-text token if there is no begin-of-text token.
    """
    begin = _first_of(model.config.bos_token_id)
    if begin < 0:
        begin = _first_of(model.config.eos_token_id)
    if input_ids is not None:
        return input_ids != begin
    assert inputs_embeds is not None
    if begin < 0:
        return torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    return (inputs_embeds != model.model.embed_tokens(torch.tensor([[begin]], device=inputs_embeds.device))).any(-1)


def plan_vectors(model: "FreeTransformer", state: PlanState, lower: LowerOutput) -> Tensor:
    """Returns R of each token, (B, T, D)."""
    plan, tokens, token_plan = state.plan, lower.hidden_states.shape[1], lower.token_plan
    assert plan is not None
    if plan.shape[1] > 1:
        if state.dropped_plans is not None:
            token_plan = token_plan + state.dropped_plans
        if plan.shape[1] <= tokens:
            return plan_to_token(model.plan_table(plan), token_plan)
        return model.plan_table(plan_to_token(plan, token_plan))
    if state.vectors is None or torch.is_grad_enabled():
        state.vectors = model.plan_table(plan)
    return state.vectors.expand(-1, tokens, -1)


def _first_of(token_id: int | list[int] | None) -> int:
    if isinstance(token_id, list):
        return token_id[0]
    return -1 if token_id is None else token_id
