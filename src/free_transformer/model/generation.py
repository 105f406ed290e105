"""`generate` with plans: given by the caller, read from the prompt, or sampled from the prior."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .cache import PlanCache, PlanState
from .compat import (
    CACHE_NAME,
    CACHE_NAMES,
    BothCacheNames,
    GenerateDecoderOnlyOutput,
    GenerationHooks,
    ModelArguments,
    create_masks_for_generate,
)
from .configuration import FreeTransformerConfig
from .context import check_plan_changes, context_limit
from .errors import InputError, NotSupported
from .layout import num_plans
from .long_text import TextContext, begin_text, prepare_inputs
from .plan import PlanPrior, as_plan
from .sampling import (
    MIN_TEMPERATURE,
    PLANS,
    PROMPT_PLANS,
    check_choice,
    check_plan_count,
    check_temperature,
    check_token_ids,
    check_top_k,
    check_top_p,
    length_warning,
    trained_length,
)

if TYPE_CHECKING:
    from .modeling import FreeTransformer


@dataclass
class PlanGenerationOutput(BothCacheNames, GenerateDecoderOnlyOutput):
    """Output of `generate` with `return_dict_in_generate=True`."""

    plan: Tensor | None = None  # (B, P, H) bool, the plans of the texts in `sequences`


class PlanGenerationMixin(GenerationHooks):
    """
    `generate()` of `transformers` with plans, for texts of any length.

    When the prompt is read, the plans of all tokens that may follow are sampled at once. A decoding step then costs as
    much as a Llama's, plus the lookup of a plan vector. A text that exceeds the trained length keeps its plans: the
    cache is dropped, and the last half of its tokens is read again (see `context`).
    """

    config: FreeTransformerConfig
    plan_prior: PlanPrior

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        plan: Tensor | str | Sequence[str] | None = None,
        prompt_plan: str = "posterior",
        prior: str = "uniform",
        plan_changes: Mapping[int, Tensor | str] | None = None,
        plans: str = "independent",
        **kwargs: Any,
    ) -> Any:
        """
        `GenerationMixin.generate` (all options except beams, assistants and guidance), plus:

        Args:
            inputs: (B, T) tokens of the prompt, padded on either side as `attention_mask` marks. A row that contains
                only the begin-of-text token is an empty prompt. If a prompt exceeds the trained length, only its end
                is read.
            plan: bits, (P, H) or (B, P, H), text such as `"0110"`, or a name of the configuration's `plan_names`. Plan
                0 covers the first token of the text. Missing plans come from the prompt and, for new text, from the
                prior.
            prompt_plan: source of the prompt's plans: `"posterior"` runs the encoder on the prompt (the paper's
                pre-filling), `"prior"` does not run it. An empty prompt always uses the prior.
            prior: `"uniform"` (the method), or `"aggregate"`, the distribution of the plans of training texts as
                collected by `gather_prior`.
            plan_changes: later plans, keyed by the number of new tokens after which they apply, such as
                `{2000: "1001"}`. At that point the last half context is read again under the new plan. Requires one
                plan per text.
            plans: how to sample the plans of the `num_return_sequences=k` texts of one prompt: `"independent"`, or
                `"stratified"`, where the k texts together cover the plans while each text has the same distribution
                as before (`stratified.py`). It applies to plans of new text from the prior and to plans of the prompt
                from its posterior, which are equal if the encoder is certain. With `plan_span="sequence"` the prompt
                determines the only plan of the text; use `prompt_plan="prior"` to give the k texts different plans.
                If a text has several plans, each position is stratified separately (a Latin hypercube), since plans
                of one text are independent under the prior. Plans passed by the caller are shared by all k texts.

        Returns:
            as in `transformers`. With `return_dict_in_generate=True` the output also has `plan`, (B, P, H) bool: the
            plans of the texts in `sequences` (the last one if the plan changed). Its cache can be continued.

        Raises:
            ValueError: for a plan of another shape or with values other than bits, an unknown `prompt_plan`, `prior` or
                `plans`, sampling settings out of range (see `sampling`), token ids outside the vocabulary, an
                unsupported option, and a cache that holds tokens but not their plan.
        """
        check_choice("prompt_plan", prompt_plan, PROMPT_PLANS)
        check_choice("plans", plans, PLANS)
        self.plan_prior.checked(prior)
        self._refuse_unsupported(kwargs)
        _check_sampling(kwargs)
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is not None:
            _check_prompt(prompt, self.config.vocab_size)
        caches = [kwargs.pop(name) for name in CACHE_NAMES if kwargs.get(name) is not None]
        if len(caches) > 1:
            raise InputError("cache and past_key_values are two names of one argument: pass only one of them")
        state = PlanState(prompt_plan=prompt_plan, prior=prior)
        if plan is not None:
            given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            batch = next((len(tokens) for tokens in given if tokens is not None), 1)
            state.plan = self._given_plan(plan, batch)
        for start, given_plan in check_plan_changes(plan_changes, self.config.plan_span).items():
            state.changes[start] = self._given_plan(given_plan, 1 if prompt is None else len(prompt))
        if caches:
            kwargs[CACHE_NAME] = caches[0]
            _continue(caches[0], state, prompt)
        elif prompt is not None:
            inputs, kwargs = self._padded_on_the_left(prompt, inputs, kwargs)
        texts = self._generation_setting("num_return_sequences", kwargs) or 1
        if plans == "stratified":
            state.texts_per_prompt = texts
        if texts > 1 and not self._generation_setting("do_sample", kwargs):
            inputs, kwargs = _repeated_prompts(texts, inputs, kwargs)
        output = super().generate(inputs, *args, plan=state, **kwargs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        if prompt is not None and not caches:
            repeats = len(sequences) // len(prompt)  # num_return_sequences
            sequences[:, : prompt.shape[1]] = prompt.to(sequences.device).repeat_interleave(repeats, 0)
        self._warn_past_trained_length(state, sequences)
        if output is sequences:
            return sequences
        return PlanGenerationOutput(**output, plan=self._plan_of(state, sequences))

    def generate_batch(self, *args: Any, **kwargs: Any) -> object:
        """Not supported: the continuous batching of `transformers` does not store plans."""
        raise NotSupported(
            "generate_batch: the continuous batching of transformers does not support plans. Use generate with a "
            "padded batch, or `free-transformer serve`, which batches requests continuously"
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> object:
        """Not supported; see `generate_batch`."""
        return self.generate_batch()

    def new_cache(self, max_length: int) -> PlanCache:
        return PlanCache(self.config, max_length)

    @property
    def context_limit(self) -> int | None:
        """Maximum number of tokens of a text that the model sees; None for no limit. See `context`."""
        config = self.config
        return context_limit(config.max_position_embeddings, config.plan_span, config.sliding_window)

    def cache_length(self, model_kwargs: ModelArguments, max_length: int) -> int:
        limit = None if model_kwargs.get("inputs_embeds") is not None else self.context_limit
        return max_length if limit is None else min(max_length, limit)

    def before_prompt(self, model_kwargs: ModelArguments, prompt: Tensor, new_tokens: int) -> None:
        state = model_kwargs["plan"]
        state.prompt_length, state.new_tokens = prompt.shape[1], new_tokens
        if prompt.shape[1] == 0 and state.changes:
            raise InputError(
                "plan_changes: a prompt of embeddings cannot be read again under another plan; pass tokens"
            )
        if prompt.shape[1]:
            begin_text(cast("FreeTransformer", self), state, prompt, model_kwargs)

    def before_step(self, input_ids: Tensor, model_kwargs: ModelArguments) -> tuple[Tensor, ModelArguments]:
        state = model_kwargs.get("plan")
        if not isinstance(state, PlanState) or state.context is None:
            return input_ids, model_kwargs
        return prepare_inputs(cast("FreeTransformer", self), state, input_ids, model_kwargs)

    def changed_arguments(self, model_kwargs: ModelArguments) -> ModelArguments:
        context: TextContext | None = model_kwargs["plan"].context
        if context is None:
            return {}
        changed, context.arguments = context.arguments, {}
        return changed

    def create_masks_for_generate(
        self, attention_mask: Tensor | None = None, is_first_iteration: bool = False, **kwargs: Any
    ) -> Any:
        """Keeps the prompt's mask as (B, T), since `forward` needs it to find padding."""
        if is_first_iteration:
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, **kwargs)

    def _padded_on_the_left(
        self, prompt: Tensor, inputs: Tensor | None, kwargs: ModelArguments
    ) -> tuple[Tensor | None, ModelArguments]:
        """Moves the padding of each row to its left, so that new tokens follow the text."""
        mask, pad = kwargs.get("attention_mask"), self.generation_config.pad_token_id
        if mask is None and pad is not None and pad != self.generation_config.eos_token_id:
            mask = prompt.ne(pad).long()  # as `transformers` infers it
        if mask is None or mask.shape != prompt.shape or mask[:, -1].all():
            return inputs, kwargs
        rank = torch.arange(prompt.shape[1], device=mask.device).expand_as(mask)
        last = torch.where(mask.bool(), rank, -1).amax(1, keepdim=True)
        order = (rank + last + 1) % prompt.shape[1]  # each row is rotated until its last real token is the last
        moved = {"attention_mask": mask.gather(1, order)}
        if kwargs.get("position_ids") is not None:
            moved["position_ids"] = kwargs["position_ids"].expand_as(mask).gather(1, order)
        tokens = prompt.gather(1, order.to(prompt.device))
        if inputs is None:
            return None, {**kwargs, **moved, "input_ids": tokens}
        return tokens, {**kwargs, **moved}

    def _plan_of(self, state: PlanState, sequences: Tensor) -> Tensor | None:
        """Returns the plans of the prompt and of the tokens in `sequences`, which may not include the prompt."""
        if state.plan is None or state.columns is None:
            return state.plan
        length = state.columns + sequences.shape[1] - state.prompt_length
        return state.plan[:, : num_plans(self.config.plan_span, length)]

    def _generation_setting(self, name: str, kwargs: ModelArguments) -> Any:
        config = kwargs.get("generation_config") or self.generation_config
        return kwargs.get(name, getattr(config, name, None))

    def _refuse_unsupported(self, kwargs: ModelArguments) -> None:
        def setting(name: str) -> Any:
            return self._generation_setting(name, kwargs)

        if (setting("num_beams") or 1) > 1:
            raise InputError(f"num_beams={setting('num_beams')}: beams reorder the cache but not the plans; use 1")
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
            if setting(name):
                raise InputError(f"{name}: crops the cache but not the plans; generate without an assistant")
        if setting("prefill_chunk_size"):
            raise InputError(
                "prefill_chunk_size: the encoder needs the whole prompt, not chunks of it; remove this option"
            )
        if setting("guidance_scale") not in (None, 1):
            raise InputError(
                f"guidance_scale={setting('guidance_scale')}: the unconditional branch of the guidance has no plan; "
                "remove it, and pass a plan to steer the text"
            )

    def _given_plan(self, plan: Tensor | str | Sequence[str], batch: int) -> Tensor:
        given = as_plan(plan, batch, self.config.latent_dim, self.config.plan_names)
        check_plan_count(given.shape[1], self.config.plan_span)
        return given

    def _warn_past_trained_length(self, state: PlanState, sequences: Tensor) -> None:
        length, trained = sequences.shape[1], trained_length(vars(self.config))
        if trained is not None and length - 1 > trained and state.context is None:
            warnings.warn(length_warning(length, trained), stacklevel=3)


def _continue(cache: Any, state: PlanState, prompt: Tensor | None) -> None:
    """Takes the plans from a cache that holds tokens. Resets a cache that has dropped the beginning of its text."""
    if cache.get_seq_length() == 0:
        return
    held = cache.state if isinstance(cache, PlanCache) else None
    if state.plan is None:
        if held is None:
            raise InputError("cache: it holds tokens but not their plan. Pass that plan too, plan=...")
        state.plan = held.plan
    context: TextContext | None = getattr(cache, "text_context", None)
    if context is not None:
        given = 0 if prompt is None else prompt.shape[1]
        if given <= context.columns:
            raise InputError(
                f"{given} tokens: the cache has dropped the beginning of a text of {context.columns} tokens. Pass the "
                "whole text and what follows it"
            )
        cache.reset()


def _check_sampling(kwargs: ModelArguments) -> None:
    """Checks the sampling settings. Turns a temperature of 0, which `transformers` rejects, into greedy decoding."""
    for name, check in (("temperature", check_temperature), ("top_k", check_top_k), ("top_p", check_top_p)):
        if kwargs.get(name) is not None:
            kwargs[name] = check(kwargs[name])  # a float, since `transformers` rejects integers
    if kwargs.get("temperature") is not None and kwargs["temperature"] < MIN_TEMPERATURE:
        for name in ("temperature", "top_k", "top_p"):
            kwargs.pop(name, None)
        kwargs["do_sample"] = False


def _repeated_prompts(texts: int, inputs: Tensor | None, kwargs: ModelArguments) -> tuple[Tensor | None, dict]:
    """
    Repeats each prompt in the arguments.

    `transformers` rejects several greedy texts per prompt because they would be equal. Here their plans differ.
    """

    def repeated(value: Any) -> Any:
        return value.repeat_interleave(texts, 0) if isinstance(value, Tensor) else value

    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    changes = {name: repeated(kwargs[name]) for name in names if name in kwargs}
    return repeated(inputs), {**kwargs, **changes, "num_return_sequences": 1}


def _check_prompt(prompt: Tensor, vocab_size: int) -> None:
    if prompt.ndim != 2 or prompt.numel() == 0:
        raise InputError(
            f"tokens of shape {tuple(prompt.shape)}: expected (B, T) with at least one token per row; an empty prompt "
            "is the begin-of-text token alone"
        )
    check_token_ids(int(prompt.min()), int(prompt.max()), vocab_size)
