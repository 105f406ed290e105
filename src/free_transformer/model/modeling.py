"""
The Free Transformer: a Llama that samples a plan at half depth and conditions its upper layers on it.

    tokens -> layers 0..K-1 -> X ----------------------------> layer K .. L-1 -> norm -> head -> logits
                               |                                  ^
                               +-> encoder -> logits -> plan -> codebook[plan] = R   (keys and values from X + R)
                                   (or uniform prior)

`forward` reads in this order: `lower_layers`, `encode`, the plan, `upper_layers`, the losses. `decode_step` is one step
of generation.

F. Fleuret, "The Free Transformer", arXiv:2510.17558.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_layout, check_loss_arguments, continues, resolve_cache, resolve_mode, warn_of_lost_gradient
from .cache import PlanCache, PlanState
from .compat import Cache
from .configuration import FreeTransformerConfig
from .decoder import Decoder, Initialization
from .encoder import PlanEncoder
from .errors import InputError
from .generation import PlanGenerationMixin
from .layers import Head, is_observed
from .layout import PlanLayout, is_packed, num_plans, plan_layout, plan_of_rank, plan_to_token, token_ranks
from .losses import LossWeights, objective, predicted_tokens, reconstruction_loss
from .masks import causal_mask, mask_of_layout, mask_of_text, token_mask
from .outputs import FreeTransformerOutput, LowerOutput, model_output
from .plan import BinaryMapper, PlanPrior, PlanTable
from .plan_methods import PlanMethods
from .plan_source import NO_PREFIX_TUNING, complete_plans, is_text, known_plans, plan_vectors
from .saving import SavingMixin


class FreeTransformer(Initialization, SavingMixin, PlanMethods, PlanGenerationMixin):
    """
    Args:
        config: see `FreeTransformerConfig`.
        encoder: any `nn.Module` instead of `PlanEncoder`. Its `forward(hidden_states, mask)` receives X, (B, T, D),
            and `mask`, (B, P, T) bool, the tokens that each plan may read, and returns the bits' logits, (B, P, H). If
            it has an argument named `layout`, it also receives the `PlanLayout`. Its weights are saved with the model.
            Pass the module again to load: `FreeTransformer.from_pretrained(d, encoder=MyEncoder(config))`.
    """

    config_class = FreeTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # the Trainer passes `num_items_in_batch`
    _no_split_modules = ["DecoderLayer", "InjectedDecoderLayer", "PlanEncoder"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = {"plan_prior"}
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Set if processes share a batch, see `losses.objective`.
    gather_plans: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FreeTransformerConfig, encoder: nn.Module | None = None):
        if encoder is None and config.encoder_class is not None:
            raise InputError(f"this model has a custom encoder: pass encoder={config.encoder_class}(...)")
        if encoder is not None:  # do not change the caller's configuration
            config = copy.deepcopy(config)
            config.encoder_class = type(encoder).__qualname__
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # makes the Trainer count predicted tokens, without a row's first label
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.plan_mapper = BinaryMapper()
        self.plan_prior = PlanPrior(config.latent_dim)
        self.plan_table = PlanTable(
            config.group_bits, config.hidden_size, config.plan_gradient, config.plan_chunk_bytes, config.table_init
        )
        if encoder is not None:
            for module in encoder.modules():  # a custom encoder initializes itself
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.encoder = PlanEncoder(config) if encoder is None else encoder
        # Inspect before PEFT wraps it: the wrapper accepts any argument and passes all of them on.
        wanted = inspect.signature(self.encoder.forward).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())
        self._encoder_arguments = [name for name in ("mask", "layout") if anything or name in wanted]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mode: str | None = None,
        plan: Tensor | str | Sequence[str] | PlanState | None = None,
        prompt_plan: str | None = None,
        prior: str | None = None,
        num_items_in_batch: int | Tensor | None = None,
        loss_weights: LossWeights | None = None,
        skip_logits: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        layout: PlanLayout | None = None,
        **kwargs: Any,
    ) -> FreeTransformerOutput | tuple:
        """
        Args:
            input_ids: (B, T) tokens.
            attention_mask: (B, T), 0 on padding, which may be on the left, on the right or in holes. With a cache
                (B, past + T). A custom mask, (B, 1, T, past + T), bool or additive, is also accepted; a token that may
                not attend to itself counts as padding. A custom mask replaces the sliding window, but cannot reach
                tokens that the cache no longer holds.
            position_ids: (B, T); non-consecutive positions separate the documents of a packed row.
            cache: keys and values of the earlier tokens; `past_key_values` is another name for it. A cache created by
                this model also stores its plans. Any other cache that holds tokens needs `plan`.
            labels: (B, T); they are shifted by the model, and -100 is ignored.
            use_cache: whether to return a cache. Default: the configuration's `use_cache`, and False with labels.
            mode: `"training"` samples the plan from the encoder's posterior. `"inference"` samples it from the prior
                and does not run the encoder. Default: training if there are labels and no plan. It does not follow
                `self.training`, since evaluation needs the posterior too.
            plan: the plan to use: bits, (P, H) or (B, P, H), or text such as `"0110"`. It must cover all tokens, unless
                `prompt_plan` is given.
            prompt_plan: source of the plans missing in `plan` in inference mode: `"posterior"` or `"prior"`.
            prior: distribution of plans in inference mode: `"uniform"` (the method), or `"aggregate"`, the plans of
                training texts as collected by `gather_prior`. Default: that of the cache, or uniform.
            num_items_in_batch: number of predicted tokens to divide the losses by, default the number in `labels`.
            loss_weights: weights that replace those of the configuration, for a schedule.
            skip_logits: return the loss without logits, so that the logits of all tokens are never held together. This
                saves memory and time in training, but the gradients cannot be differentiated again.
            output_hidden_states: return the embeddings and the output of each layer, the last one normalized.
            output_attentions: return the attention weights of each layer, (B, heads, T, past + T). Needs
                `attn_implementation="eager"`.
            return_dict: False to return a tuple of the fields that are not None.
            layout: result of `batch_layout`, instead of `attention_mask` and `position_ids`. A training loop computes
                it before it copies a batch to a GPU, so that the model never waits for the GPU.

        Raises:
            ValueError: for contradictory arguments, and for a cache that holds tokens but not their plan.
        """
        if past_key_values is not None and cache is not None:
            raise InputError(
                f"cache and past_key_values are two names of one argument: pass only one of them ({NO_PREFIX_TUNING})"
            )
        check_loss_arguments(labels, num_items_in_batch, skip_logits)
        warn_of_lost_gradient(self, labels, mode, plan)
        mode = resolve_mode(mode, plan, labels, prompt_plan)
        cache = resolve_cache(self, cache if past_key_values is None else past_key_values, use_cache, labels, mode)
        options: dict[str, Any] = {
            "output_hidden_states": self._option("output_hidden_states", output_hidden_states),
            "output_attentions": self._option("output_attentions", output_attentions),
            **kwargs,
        }
        state = plan if isinstance(plan, PlanState) else None
        if state is not None and labels is None and cache is not None and continues(state, position_ids):
            assert position_ids is not None
            step = (state, cache, input_ids, position_ids, attention_mask, inputs_embeds)
            output = self.decode_step(*step, logits_to_keep=logits_to_keep, **options)
            return output if self._option("return_dict", return_dict) else output.to_tuple()

        lower = self.lower_layers(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, layout=layout, **options
        )
        plan_logits = None
        if mode == "training":
            plan_logits = self.encode(lower)
            sampled = self.plan_mapper(plan_logits)
            state = PlanState(plan=sampled, prior=prior or "uniform")
            vectors = self.plan_vectors(lower, sampled, plan_logits)
        else:
            state = known_plans(self.config, plan, cache, lower, prompt_plan, prior)
            state = complete_plans(self, state, lower, lambda: is_text(self, input_ids, inputs_embeds))
            vectors = plan_vectors(self, state, lower)
        if isinstance(cache, PlanCache):
            cache.state = state

        logits, losses = None, {}
        if labels is not None and skip_logits and self._head_takes_labels:
            states = self._upper_states(lower, vectors)
            reconstruction = self.lm_head(states, labels=labels)
        else:
            logits = self.compute_logits(lower, vectors, logits_to_keep)
            reconstruction = None if labels is None else reconstruction_loss(logits, labels)
        if labels is not None:
            losses = self._losses(
                reconstruction,
                predicted_tokens(labels) if num_items_in_batch is None else num_items_in_batch,
                plan_logits,
                None if lower.layout is None else lower.layout.plan_mask,
                loss_weights,
            )
        output = model_output(lower, state, cache, None if skip_logits else logits, plan_logits, losses)
        return output if self._option("return_dict", return_dict) else output.to_tuple()

    def lower_layers(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        layout: PlanLayout | None = None,
        **options: Any,
    ) -> LowerOutput:
        """Runs layers 0 to K-1, whose output does not depend on the plan. Arguments as in `forward`."""
        hidden_states = self._embed(input_ids, inputs_embeds)
        batch, tokens = hidden_states.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        if past and getattr(cache, "packed", False):
            raise InputError("cache: it holds packed rows of several documents, which cannot be continued")
        token_plan = None
        if layout is not None:
            check_layout(layout, (batch, tokens), past, attention_mask, position_ids)
            plans, position_ids = layout.num_plans, layout.position_ids
            mask, own = mask_of_layout(self.config, layout, hidden_states, cache)
        else:
            real = token_mask(attention_mask, batch, past, tokens)
            packed = position_ids is not None and past == 0 and is_packed(position_ids, real)
            ranks = token_ranks(real, past, tokens, hidden_states.device)
            if position_ids is None:
                position_ids = ranks
            if past == 0:
                layout = plan_layout(self.config.plan_span, position_ids.expand(batch, -1), real, packed)
                plans = layout.num_plans
            else:
                plans = num_plans(self.config.plan_span, past + tokens)
                token_plan = plan_of_rank(self.config.plan_span, ranks)
            of_row = layout if packed else None
            mask, own = mask_of_text(self.config, attention_mask, real, of_row, hidden_states, cache)
        if isinstance(cache, PlanCache):
            cache.packed = layout is not None and layout.token_document is not None
        return self.model.run_lower(
            hidden_states,
            mask,
            position_ids,
            cache,
            layout=layout,
            plans=plans,
            token_plan=token_plan,
            num_tokens=past + tokens,
            **(options | own),
        )

    def encode(self, lower: LowerOutput) -> Tensor:
        """Returns the posterior's logits, (B, P, H), from the output of the lower layers."""
        if lower.layout is None:
            raise InputError(
                f"mode='training' needs an empty cache: the encoder reads whole texts ({NO_PREFIX_TUNING})"
            )
        arguments: dict[str, object] = {}
        if "mask" in self._encoder_arguments:
            arguments["mask"] = lower.layout.mask
        if "layout" in self._encoder_arguments:
            arguments["layout"] = lower.layout
        logits = self.encoder(lower.hidden_states, **arguments)
        expected = (*lower.layout.plan_mask.shape, self.config.latent_dim)
        if logits.shape != expected:
            raise InputError(
                f"the encoder returned logits of shape {tuple(logits.shape)}: expected (B, P, H) = {expected}"
            )
        return logits

    def upper_layers(
        self,
        lower: LowerOutput,
        plan: Tensor,
        plan_logits: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """
        Runs layers K to L-1, norm and head under a plan.

        Args:
            plan: (B, P, H) bool.
            plan_logits: logits that receive the straight-through gradient, if any.

        Returns:
            logits, (B, T, V).
        """
        return self.compute_logits(lower, self.plan_vectors(lower, plan, plan_logits), logits_to_keep)

    def upper_states(self, lower: LowerOutput, plan: Tensor) -> Tensor:
        """Returns the head's input, (B, T, D), under a plan, (B, P, H), for callers that compute logits in parts."""
        return self._upper_states(lower, self.plan_vectors(lower, plan))

    def plan_vectors(self, lower: LowerOutput, plan: Tensor, plan_logits: Tensor | None = None) -> Tensor:
        """Returns R of each token, (B, T, D), from the plans of the text, (B, P, H)."""
        if plan_logits is None:
            return plan_vectors(self, PlanState(plan=plan), lower)
        return plan_to_token(self.plan_table(plan, plan_logits), lower.token_plan)

    def decode_step(
        self,
        state: PlanState,
        cache: Cache,
        input_ids: Tensor | None,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> FreeTransformerOutput:
        """
        Runs one step of generation for texts whose plans are all known. It does not read tensor values.

        Args:
            state: the plans.
            cache: keys and values of the earlier tokens.
            input_ids: (B, T); position_ids: (B, T).
            attention_mask: (B, past + T), or a mask that the attention backend takes.
        """
        assert state.plan is not None
        hidden_states = self._embed(input_ids, inputs_embeds)
        tokens = hidden_states.shape[1]
        if self.config.plan_span == "sequence":
            ranks = position_ids
        elif state.padded and attention_mask is not None and attention_mask.dim() == 2:
            ranks = token_ranks(attention_mask.bool(), attention_mask.shape[1] - tokens, tokens, attention_mask.device)
        else:
            ranks = position_ids if state.first_position is None else position_ids - state.first_position
        mask = None
        if tokens > 1 or cache.is_compileable or (attention_mask is not None and state.padded):
            mask, _ = causal_mask(self.config, hidden_states, cache, attention_mask)
        lower = self.model.run_lower(
            hidden_states,
            mask,
            position_ids,
            cache,
            None,
            state.plan.shape[1],
            plan_of_rank(self.config.plan_span, ranks),
            **options,
        )
        logits = self.compute_logits(lower, plan_vectors(self, state, lower), logits_to_keep)
        if isinstance(cache, PlanCache):
            cache.state = state
        return model_output(lower, state, cache, logits)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if inputs_embeds is not None and input_ids is None:
            return inputs_embeds
        if input_ids is None or inputs_embeds is not None:
            raise InputError("give either input_ids or inputs_embeds")
        return self.model.embed_tokens(input_ids)

    def _upper_states(self, lower: LowerOutput, plan_vectors: Tensor) -> Tensor:
        states = self.model.norm(self.model.run_upper(lower, plan_vectors))
        if lower.all_hidden_states is not None:
            lower.all_hidden_states[-1] = states
        return states

    def compute_logits(self, lower: LowerOutput, plan_vectors: Tensor, logits_to_keep: int | Tensor = 0) -> Tensor:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if lower.all_hidden_states is not None:
            return self.lm_head(self._upper_states(lower, plan_vectors)[:, kept])
        only_last = isinstance(logits_to_keep, int) and logits_to_keep == 1
        hidden_states = self.model.run_upper(lower, plan_vectors, only_last)
        return self.lm_head(self.model.norm(hidden_states[:, kept]))

    @property
    def _head_takes_labels(self) -> bool:
        """Whether the head can compute the loss without logits: no other code observes or replaces it."""
        if type(self.lm_head) is not Head or self.lm_head.in_columns:
            return False
        return torch.compiler.is_compiling() or not is_observed(self.lm_head)

    def _option(self, name: str, value: bool | None) -> bool:
        return bool(getattr(self.config, name) if value is None else value)

    def _losses(
        self,
        reconstruction: Tensor,
        num_tokens: int | Tensor,
        plan_logits: Tensor | None,
        plan_mask: Tensor | None,
        weights: LossWeights | None,
    ) -> dict[str, Tensor | None]:
        """Returns the objective and its parts by name."""
        weights = LossWeights.of(self.config) if weights is None else weights
        found = objective(reconstruction, num_tokens, plan_logits, plan_mask, weights, self.gather_plans)
        return {each.name: getattr(found, each.name) for each in fields(found)}
