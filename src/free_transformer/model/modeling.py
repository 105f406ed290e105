"""
The Free Transformer: a Llama that samples a plan at half depth and computes the rest under it.

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
        encoder: any `nn.Module` instead of `PlanEncoder`. Its `forward(hidden_states, mask)` gets X, (B, T, D),
            and `mask`, (B, P, T) bool, which tokens each plan may read, and returns the bits' logits, (B, P, H). An
            argument named `layout` gets the `PlanLayout`. Its weights are saved with the model; give the module
            again to load: `FreeTransformer.from_pretrained(d, encoder=MyEncoder(config))`.
    """

    config_class = FreeTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # the loss is divided by `num_items_in_batch`, where the Trainer gives it
    _no_split_modules = ["DecoderLayer", "InjectedDecoderLayer", "PlanEncoder"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = {"plan_prior"}
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Where processes share a batch, see `losses.objective`.
    gather_plans: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FreeTransformerConfig, encoder: nn.Module | None = None):
        if encoder is None and config.encoder_class is not None:
            raise InputError(f"this model has a custom encoder: pass it, encoder={config.encoder_class}(...)")
        if encoder is not None:  # the caller's configuration stays as it is
            config = copy.deepcopy(config)
            config.encoder_class = type(encoder).__qualname__
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # the Trainer then counts predicted tokens, a row's first label left out
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.plan_mapper = BinaryMapper()
        self.plan_prior = PlanPrior(config.latent_dim)
        self.plan_table = PlanTable(
            config.group_bits, config.hidden_size, config.plan_gradient, config.plan_chunk_bytes, config.table_init
        )
        if encoder is not None:
            for module in encoder.modules():  # it initializes itself
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.encoder = PlanEncoder(config) if encoder is None else encoder
        # Read before anything is wrapped around it: a wrapper (PEFT's) takes any argument and hands all of them on.
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
            attention_mask: (B, T), 0 on padding: on the left, on the right or in holes. With a cache (B, past + T).
                Or a mask of your own, (B, 1, T, past + T), bool or additive; a token that may not attend to itself
                counts as padding. It also takes the place of the sliding window, but cannot reach tokens that the
                cache no longer holds.
            position_ids: (B, T); positions that do not count on by 1 mark the documents of a packed row.
            cache: keys and values of the tokens before these; `past_key_values` is another name for it. A cache that
                this model has made also knows its plans. Any other one that holds tokens needs `plan`.
            labels: (B, T), shifted inside, -100 ignored.
            use_cache: whether to return a cache. Default: the configuration's `use_cache`, and False with labels.
            mode: `"training"`, the plan is sampled from the encoder's posterior, or `"inference"`, the plan is sampled
                from the prior and the encoder does not run. Default: training where labels are given and no plan is.
                It does not follow `self.training`: an evaluation needs the posterior too.
            plan: bits, (P, H) or (B, P, H), or text such as `"0110"`, the plan to use. It must cover the tokens, unless
                `prompt_plan` is given.
            prompt_plan: `"posterior"` or `"prior"`, where plans that `plan` lacks come from in inference mode.
            prior: what plans are sampled from in inference mode: `"uniform"` (the method), or `"aggregate"`, the plans
                of training texts, where `gather_prior` has gathered them. Default: that of the cache, or uniform.
            num_items_in_batch: predicted tokens to divide the losses by, default those of `labels`.
            loss_weights: instead of the configuration's, for a schedule.
            skip_logits: returns no logits with the loss, so that those of all tokens are never held together: less
                memory and time in training. The gradients cannot be differentiated again then.
            output_hidden_states: return the embeddings and the output of each layer, the last one normalized.
            output_attentions: return the attention weights of each layer, (B, heads, T, past + T). Needs
                `attn_implementation="eager"`.
            return_dict: False for a tuple of the fields that are not None.
            layout: what `batch_layout` finds in `attention_mask` and `position_ids`, in their place. A training loop
                computes it before a batch goes to a GPU, and the model then never waits for the GPU.

        Raises:
            ValueError: for arguments that contradict each other, and a cache of tokens whose plan is not known.
        """
        if past_key_values is not None and cache is not None:
            raise InputError(
                f"cache and past_key_values are two names of one argument: give one of them ({NO_PREFIX_TUNING})"
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
        """Layers 0 to K-1, whose output the encoder reads: the same under every plan. Arguments as in `forward`."""
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
        """The posterior's logits, (B, P, H), from the output of the lower layers."""
        if lower.layout is None:
            raise InputError(
                f"mode='training' takes no cache that holds tokens: the encoder reads whole texts ({NO_PREFIX_TUNING})"
            )
        arguments: dict[str, object] = {}
        if "mask" in self._encoder_arguments:
            arguments["mask"] = lower.layout.mask
        if "layout" in self._encoder_arguments:
            arguments["layout"] = lower.layout
        logits = self.encoder(lower.hidden_states, **arguments)
        expected = (*lower.layout.plan_mask.shape, self.config.latent_dim)
        if logits.shape != expected:
            raise InputError(f"the encoder returned logits of shape {tuple(logits.shape)}, (B, P, H) is {expected}")
        return logits

    def upper_layers(
        self,
        lower: LowerOutput,
        plan: Tensor,
        plan_logits: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """
        Layers K to L-1, norm and head, under a plan.

        Args:
            plan: (B, P, H) bool; plan_logits: where the straight-through gradient goes, if anywhere.

        Returns:
            logits, (B, T, V).
        """
        return self.compute_logits(lower, self.plan_vectors(lower, plan, plan_logits), logits_to_keep)

    def upper_states(self, lower: LowerOutput, plan: Tensor) -> Tensor:
        """What the head reads, (B, T, D), under a plan, (B, P, H): for callers that compute a few logits at a time."""
        return self._upper_states(lower, self.plan_vectors(lower, plan))

    def plan_vectors(self, lower: LowerOutput, plan: Tensor, plan_logits: Tensor | None = None) -> Tensor:
        """R of each token, (B, T, D), from the plans of the text, (B, P, H)."""
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
        One step of generation: new tokens of texts whose plans are all known. It reads no tensor's values.

        Args:
            state: the plans; cache: keys and values of the tokens before.
            input_ids: (B, T); position_ids: (B, T).
            attention_mask: (B, past + T), or one that the attention backend takes.
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
        """Whether the head may compute the loss without the logits: nothing else watches or replaces it."""
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
        """The objective and its parts, by name."""
        weights = LossWeights.of(self.config) if weights is None else weights
        found = objective(reconstruction, num_tokens, plan_logits, plan_mask, weights, self.gather_plans)
        return {each.name: getattr(found, each.name) for each in fields(found)}
