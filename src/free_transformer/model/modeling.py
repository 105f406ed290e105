"""
The Free Transformer: a Llama that draws a plan at lower depth and writes the rest under it.

    tokens -> layers 0..K-1 -> X ----------------------------> layer K .. L-1 -> norm -> head -> logits
                               |                                  ^
                               +-> encoder -> logits -> plan -> table[plan] = R   (keys and values from X + R)
                                   (or uniform prior)

F. Fleuret, "The Free Transformer", arXiv:2510.17558.
"""

import copy
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .attention import rotary, takes_boundaries
from .cache import PlanCache, PlanState
from .compat import (
    CACHE_NAME,
    BothCacheNames,
    Cache,
    CausalLMOutputWithPast,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
    OwnInitialization,
    create_causal_mask,
    is_flash_attention_requested,
)
from .configuration import FreeTransformerConfig
from .encoder import PlanEncoder
from .generation import PlanGenerationMixin
from .hub_code import name_code
from .initialization import init_module
from .injection import InjectedDecoderLayer
from .layers import DecoderLayer, Head, RMSNorm, is_observed
from .layout import (
    PlanLayout,
    find_boundaries,
    is_packed,
    num_plans,
    plan_layout,
    plan_to_token,
    same_document,
    token_ranks,
)
from .losses import objective
from .plan import BinaryMapper, PlanPrior, PlanTable, as_plan
from .sampling import PROMPT_PLANS, check_choice, check_token_ids
from .warm_start import warm_start

MODES = ("training", "inference")
NO_PREFIX_TUNING = "prefix tuning of PEFT, whose virtual tokens have no plan, is not supported: use LoRA"
NO_ENCODER_GRADIENT = (
    "called in training mode without labels: the plan is drawn from the prior, and the encoder gets no gradient. Give "
    "labels or mode='training', or mode='inference' if this is meant. (Trainers on preferences or rewards, such as DPO "
    "and GRPO of TRL, are not supported)"
)
UNKNOWN_PLAN = (
    "cache: it holds tokens, but not the plan that they were generated under. Give that plan too, plan=..., or "
    f"continue from the cache that this model returns ({NO_PREFIX_TUNING})"
)


@dataclass
class FreeTransformerOutput(BothCacheNames, CausalLMOutputWithPast):
    """
    What `FreeTransformer.forward` returns, beside the fields of `CausalLMOutputWithPast`.

    Losses are in nats per predicted token, `kl` and `hinge` in bits per plan. The cache can be read as `cache` and as
    `past_key_values`.
    """

    plan: Tensor | None = None  # (B, P, H) bool, the plan used
    plan_logits: Tensor | None = None  # (B, P, H) of the posterior, where the encoder ran for training
    plan_mask: Tensor | None = None  # (B, P) bool, False for a plan that covers only padding
    reconstruction: Tensor | None = None
    kl: Tensor | None = None
    hinge: Tensor | None = None  # what a plan spends beyond its free bits
    kl_per_bit: Tensor | None = None  # (H,), means over plans as the two before


@dataclass
class LowerOutput:
    """Output of the lower layers, and what the upper layers need besides."""

    hidden_states: Tensor  # X, (B, T, D)
    layout: PlanLayout | None  # None while a cache holds the beginning of the text
    token_plan: Tensor  # (B, T) or (1, T), the plan of each token
    num_plans: int  # of the text so far
    num_tokens: int  # of the text so far, padding included
    layer_arguments: dict[str, Any]
    all_hidden_states: list[Tensor] | None = None  # the input of each layer, where it was asked for

    @property
    def last_row_suffices(self) -> bool:
        """Whether the last row of the attention mask describes the attention of the last token alone."""
        if self.layer_arguments.keys() & {"boundaries", "cu_seq_lens_q", "attentions"}:
            return False  # documents are told apart without a mask, or all tokens' attention is asked for
        mask, cache = self.layer_arguments["attention_mask"], self.layer_arguments["cache"]
        if mask is None:  # a causal one, which also hides what a static cache has not written yet
            return cache is None or not cache.is_compileable
        return isinstance(mask, Tensor) and mask.dim() == 4


class _Initialization(OwnInitialization):
    """Initializes weights by `init_module`, in every part that `transformers` takes for a model of its own."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]  # norms and rotary buffers
        init_module(module, self.config)


class Decoder(_Initialization, LlamaPreTrainedModel):
    """The embedding, the layers and the norm of a Llama, some of its layers ready to receive a plan."""

    config_class = FreeTransformerConfig

    def __init__(self, config: FreeTransformerConfig):
        super().__init__(config)
        receiving = config.injection_layers or []
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            (InjectedDecoderLayer if layer in receiving else DecoderLayer)(config, layer)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "the decoder alone has no plan, and trainers of TRL compute their loss from it. SFTTrainer is supported, "
            "with free_transformer.trainer.PlanTrainer first: class PlanSFTTrainer(PlanTrainer, SFTTrainer). "
            "Trainers on preferences or rewards (DPO, GRPO, KTO, ...) are not supported"
        )


class FreeTransformer(_Initialization, PreTrainedModel, PlanGenerationMixin):
    """
    Args:
        config: see `FreeTransformerConfig`.
        encoder: any `nn.Module` in the place of `PlanEncoder`. Its `forward(hidden_states, mask)` gets X, (B, T, D),
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
            raise ValueError(f"this model has an encoder of its own: give it, encoder={config.encoder_class}(...)")
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
            for module in encoder.modules():  # its start is its own
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.encoder = PlanEncoder(config) if encoder is None else encoder
        # Read before anything is wrapped around it: a wrapper (PEFT's) takes any argument and hands all of them on.
        wanted = inspect.signature(self.encoder.forward).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())
        self._encoder_arguments = [name for name in ("mask", "layout") if anything or name in wanted]
        self.post_init()

    @property
    def device(self) -> torch.device:
        """Where the model computes: also where `accelerate` has moved its weights elsewhere until they are needed."""
        device = super().device
        if device.type == "meta":
            for module in self.modules():
                hook = getattr(module, "_hf_hook", None)
                for each in getattr(hook, "hooks", [hook]):
                    if getattr(each, "execution_device", None) is not None:
                        return torch.device(each.execution_device)
        return device

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *args: Any, encoder: nn.Module | None = None, **kwargs: Any
    ) -> Any:
        """
        `PreTrainedModel.from_pretrained`, also from the folder of a Llama, Mistral, Qwen 2 or Qwen 3 without a plan.

        Such a one keeps its logits: the table starts at zero, the encoder as a copy of the layer that takes the plan.

        Raises:
            ValueError: for the folder of another kind of model.
        """
        tells = kwargs.pop("output_loading_info", False)
        own = {}
        if encoder is not None:  # `transformers` replaces buffers that no checkpoint holds by uninitialised memory
            own = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
            kwargs["encoder"] = encoder
        model, loading = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        for name in kwargs.keys() & vars(model.generation_config).keys() - vars(GenerationConfig()).keys():
            delattr(model.generation_config, name)  # settings of the model, which `transformers` stores there too
        stored = model.encoder.state_dict() if own else {}
        for name, buffer in own.items():
            if name not in stored:
                model.encoder.get_buffer(name).copy_(buffer)
        if encoder is None and "encoder.query" in loading["missing_keys"]:
            warm_start(model)
        return (model, loading) if tells else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in `transformers`, and the code of the model beside its weights, unless a part of it is your own."""
        name = type(self).__name__.removeprefix("FSDP")  # the class that sharding makes of this one
        name_code(self.config, wanted=name == FreeTransformer.__name__ and self.config.encoder_class is None)
        super().save_pretrained(save_directory, *args, **kwargs)

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
        kl_weight: float | Tensor | None = None,
        free_bits: float | Tensor | None = None,
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
                counts as padding.
            position_ids: (B, T); positions that do not count on by 1 mark the documents of a packed row.
            cache: keys and values of the tokens before these; `past_key_values` is another name for it. A cache that
                this model has made also knows its plans. Any other one that holds tokens needs `plan`.
            labels: (B, T), shifted inside, -100 ignored.
            use_cache: whether to return a cache. Default: the configuration's `use_cache`, and False with labels.
            mode: `"training"`, the plan is drawn from the encoder's posterior, or `"inference"`, the plan is drawn
                from the prior and the encoder does not run. Default: training where labels are given and no
                plan is. It does not follow `self.training`: an evaluation needs the posterior too.
            plan: bits, (P, H) or (B, P, H), or text such as `"0110"`, the plan to use. It must cover the tokens, unless
                `prompt_plan` is given.
            prompt_plan: `"posterior"` or `"prior"`, where plans that `plan` lacks are drawn from in inference mode.
            prior: what plans are drawn from in inference mode: `"uniform"` (the method), or `"aggregate"`, the plans
                that training texts took, where `gather_prior` has gathered them. Default: that of the cache, or
                uniform.
            num_items_in_batch: predicted tokens to divide the losses by, default those of `labels`.
            kl_weight, free_bits: instead of the configuration's, for a schedule.
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
            raise ValueError(
                f"cache and past_key_values are two names of one argument: give one of them ({NO_PREFIX_TUNING})"
            )
        self._check_loss_arguments(labels, num_items_in_batch, skip_logits)
        self._warn_of_a_lost_gradient(labels, mode, plan)
        mode = self._checked_mode(mode, plan, labels, prompt_plan)
        cache = self._cache(cache if past_key_values is None else past_key_values, use_cache, labels, mode)
        state = plan if isinstance(plan, PlanState) else None
        if state is not None and state.columns is not None and cache is not None:
            read: Callable[..., LowerOutput] = functools.partial(self._decode_lower, state)
        else:
            read = functools.partial(self.lower_layers, layout=layout)
        lower = read(
            *(input_ids, attention_mask, position_ids, cache, inputs_embeds),
            output_hidden_states=self._asked("output_hidden_states", output_hidden_states),
            output_attentions=self._asked("output_attentions", output_attentions),
            **kwargs,
        )
        in_chunks = skip_logits and self._scores_in_chunks
        plan_logits = None
        if mode == "training":
            plan_logits = self.encode(lower)
            drawn = self.plan_mapper(plan_logits)
            state = PlanState(plan=drawn, prior=prior or "uniform")
            scored = self.upper_layers(lower, drawn, plan_logits, logits_to_keep, labels if in_chunks else None)
        else:
            state = self._plan_state(plan, cache, lower, prompt_plan, prior)
            state = self._complete(state, lower, input_ids, inputs_embeds)
            vectors = self._vectors_of_tokens(state, lower)
            scored = self.run_upper_layers(lower, vectors, logits_to_keep, labels if in_chunks else None)
        if isinstance(cache, PlanCache):
            cache.state = state
        plan_mask = None if lower.layout is None else lower.layout.plan_mask
        losses: dict[str, Tensor | None] = {}
        if labels is not None:
            losses = self._losses(
                *(None if in_chunks else scored, scored if in_chunks else None, labels, plan_logits, plan_mask),
                *(kl_weight, free_bits, num_items_in_batch),
            )
        output = FreeTransformerOutput(
            **losses,
            logits=None if skip_logits else scored,
            hidden_states=None if lower.all_hidden_states is None else tuple(lower.all_hidden_states),
            attentions=tuple(lower.layer_arguments["attentions"]) if "attentions" in lower.layer_arguments else None,
            plan=state.plan if state.plan is None else state.plan[:, : lower.num_plans],
            plan_logits=plan_logits,
            plan_mask=plan_mask,
            **{CACHE_NAME: cache},
        )
        return output if self._asked("return_dict", return_dict) else output.to_tuple()

    def lower_layers(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        layout: PlanLayout | None = None,
        **kwargs: Any,
    ) -> LowerOutput:
        """Layers 0 to K-1: what the encoder reads, the same under every plan. Arguments as in `forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens = hidden_states.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        if past and getattr(cache, "packed", False):
            raise ValueError("cache: it holds packed rows of several documents, which cannot be continued")
        token_plan = None
        if layout is not None:
            self._check_layout(layout, (batch, tokens), past, attention_mask, position_ids)
            plans, position_ids = layout.num_plans, layout.position_ids
            mask, own = self._mask_of_layout(layout, hidden_states, cache)
        else:
            token_mask = _token_mask(attention_mask, batch, past, tokens)
            packed = position_ids is not None and past == 0 and is_packed(position_ids, token_mask)
            ranks = token_ranks(token_mask, past, tokens, hidden_states.device)
            if position_ids is None:
                position_ids = ranks
            if past == 0:
                layout = plan_layout(self.config.plan_span, position_ids.expand(batch, -1), token_mask, packed)
                plans = layout.num_plans
            else:
                plans, token_plan = num_plans(self.config.plan_span, past + tokens), self._plan_of_rank(ranks)
            mask, own = self._mask_of_text(attention_mask, token_mask, layout if packed else None, hidden_states, cache)
        if isinstance(cache, PlanCache):
            cache.packed = layout is not None and layout.token_document is not None
        return self.run_lower_layers(
            *(hidden_states, mask, position_ids, cache, layout, plans, token_plan),
            num_tokens=past + tokens,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **(kwargs | own),
        )

    def _mask_of_text(
        self,
        attention_mask: Tensor | None,
        token_mask: Tensor | None,
        packed: PlanLayout | None,
        hidden_states: Tensor,
        cache: Cache | None,
    ) -> tuple[Any, dict[str, Any]]:
        """The mask of the lower and upper layers, and arguments of the attention backend in the place of a mask."""
        if attention_mask is not None and attention_mask.dim() == 4:
            return self._checked_mask(attention_mask, hidden_states), {}
        if packed is not None:
            packed.boundaries = find_boundaries(packed) if takes_boundaries(self.config, hidden_states) else None
            return self._mask_of_layout(packed, hidden_states, cache)
        # without positions: documents are told apart here, padding or not
        return create_causal_mask(self.config, hidden_states, token_mask, cache, position_ids=None), {}

    def _mask_of_layout(
        self, layout: PlanLayout, hidden_states: Tensor, cache: Cache | None
    ) -> tuple[Any, dict[str, Any]]:
        """`_mask_of_text` of a layout, without reading values: padding is masked as a document of its own."""
        if layout.boundaries is not None and takes_boundaries(self.config, hidden_states):
            if is_flash_attention_requested(self.config):
                return None, layout.boundaries.for_flash_attention()
            return None, {"boundaries": layout.boundaries}
        inside = None
        if layout.token_mask is not None or layout.token_document is not None:
            if is_flash_attention_requested(self.config):
                raise ValueError(
                    f"attn_implementation={self.config._attn_implementation!r} takes no packed rows with padding "
                    "inside a document; call model.set_attn_implementation('sdpa')"
                )
            groups, _ = layout.attention_groups
            inside = same_document(groups, groups)
        mask = create_causal_mask(self.config, hidden_states, None, cache, position_ids=None, and_mask_function=inside)
        return mask, {}

    def _check_layout(
        self,
        layout: PlanLayout,
        shape: tuple[int, int],
        past: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> None:
        if past or attention_mask is not None or position_ids is not None:
            raise ValueError("layout replaces attention_mask and position_ids, and takes no cache that holds tokens")
        if layout.token_plan.shape != shape:
            raise ValueError(f"layout of {tuple(layout.token_plan.shape)} tokens for a batch of {shape}")

    def _decode_lower(
        self,
        state: PlanState,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> LowerOutput:
        """`lower_layers` of tokens that continue a text whose plans are all known. It reads no tensor's values."""
        if position_ids is None or state.plan is None:
            return self.lower_layers(input_ids, attention_mask, position_ids, cache, inputs_embeds, **kwargs)
        hidden_states = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = hidden_states.shape[1]
        if self.config.plan_span == "sequence":
            ranks = position_ids
        elif state.padded and attention_mask is not None and attention_mask.dim() == 2:
            ranks = token_ranks(attention_mask.bool(), attention_mask.shape[1] - tokens, tokens, attention_mask.device)
        else:
            ranks = position_ids if state.first_position is None else position_ids - state.first_position
        if tokens > 1 or cache.is_compileable or (attention_mask is not None and state.padded):
            attention_mask = create_causal_mask(self.config, hidden_states, attention_mask, cache)
        else:
            attention_mask = None
        return self.run_lower_layers(
            *(hidden_states, attention_mask, position_ids, cache, None, state.plan.shape[1], self._plan_of_rank(ranks)),
            **kwargs,
        )

    def run_lower_layers(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        layout: PlanLayout | None = None,
        plans: int = 0,
        token_plan: Tensor | None = None,
        num_tokens: int = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> LowerOutput:
        """Layers 0 to K-1; positions are (B, T), or (1, T) where all rows have the same."""
        if token_plan is None:
            token_plan = self._plan_of_rank(position_ids) if layout is None else layout.token_plan
        rotation = rotary(self.model.rotary_emb, hidden_states, position_ids)
        arguments = {
            "attention_mask": attention_mask,
            "position_ids": position_ids.expand(hidden_states.shape[0], -1),
            "position_embeddings": rotation,
            "cache": cache,
            **kwargs,
        }
        if output_attentions:
            if self.config._attn_implementation != "eager":
                raise ValueError(
                    f"output_attentions=True: attn_implementation={self.config._attn_implementation!r} computes no "
                    "attention weights; call model.set_attn_implementation('eager')"
                )
            arguments["attentions"] = []
        states = [hidden_states] if output_hidden_states else None
        for layer in self.model.layers[: self.config.plan_layer]:
            hidden_states = layer(hidden_states, **arguments)
            if states is not None:
                states.append(hidden_states)
        return LowerOutput(hidden_states, layout, token_plan, plans, num_tokens, arguments, states)

    def encode(self, lower: LowerOutput) -> Tensor:
        """The posterior's logits, (B, P, H), from the output of the first lower."""
        if lower.layout is None:
            raise ValueError(
                f"mode='training' takes no cache that holds tokens: the encoder reads whole texts ({NO_PREFIX_TUNING})"
            )
        arguments: dict[str, Any] = {}
        if "mask" in self._encoder_arguments:
            arguments["mask"] = lower.layout.mask
        if "layout" in self._encoder_arguments:
            arguments["layout"] = lower.layout
        logits = self.encoder(lower.hidden_states, **arguments)
        expected = (*lower.layout.plan_mask.shape, self.config.latent_dim)
        if logits.shape != expected:
            raise ValueError(f"the encoder returned logits of shape {tuple(logits.shape)}, (B, P, H) is {expected}")
        return logits

    def upper_layers(
        self,
        lower: LowerOutput,
        plan: Tensor,
        plan_logits: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        labels: Tensor | None = None,
        with_head: bool = True,
    ) -> Tensor:
        """
        Layers K to L-1, norm and head, under a plan.

        Args:
            plan: (B, P, H) bool; plan_logits: where the straight-through gradient goes, if anywhere.
            labels: (B, T), to get the sum of their cross-entropies instead of the logits.
            with_head: False leaves the head out.

        Returns:
            logits, (B, T, V).
        """
        if plan_logits is None:
            vectors = self._vectors_of_tokens(PlanState(plan=plan), lower)
        else:
            vectors = plan_to_token(self.plan_table(plan, plan_logits), lower.token_plan)
        return self.run_upper_layers(lower, vectors, logits_to_keep, labels, with_head)

    def run_upper_layers(
        self,
        lower: LowerOutput,
        plan_states: Tensor,
        logits_to_keep: int | Tensor = 0,
        labels: Tensor | None = None,
        with_head: bool = True,
    ) -> Tensor:
        """
        `upper_layers`, from the vector of each token's plan, (B, T, D).

        Args:
            with_head: False returns what the head would read, (B, T, D), for who computes logits a few at a time.
        """
        hidden_states, layers = lower.hidden_states, self.model.layers[self.config.plan_layer :]
        plan_states = plan_states.to(hidden_states.dtype)
        arguments, states = lower.layer_arguments, lower.all_hidden_states
        only_last = labels is None and states is None and isinstance(logits_to_keep, int) and logits_to_keep == 1
        for layer in layers:
            if only_last and layer is layers[-1] and self._can_skip_tokens(lower, layer):
                arguments = {**arguments, "last_only": True}
            # by position: reentrant checkpointing follows gradients through positional arguments only
            inputs = (hidden_states, plan_states) if isinstance(layer, InjectedDecoderLayer) else (hidden_states,)
            hidden_states = layer(*inputs, **arguments)
            if states is not None:
                states.append(hidden_states)
        if labels is not None:
            return self.lm_head(self.model.norm(hidden_states), labels=labels)
        if not with_head:
            return self.model.norm(hidden_states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if states is None:
            return self.lm_head(self.model.norm(hidden_states[:, kept]))
        states[-1] = self.model.norm(hidden_states)
        return self.lm_head(states[-1][:, kept])

    @torch.no_grad()
    def infer_plan(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """
        The posterior's logits, (B, P, H), of the plans of these texts; `> 0` is the most likely plan.

        Raises:
            ValueError: for token ids outside the vocabulary.
        """
        if not torch.compiler.is_compiling() and input_ids.numel():
            check_token_ids(int(input_ids.min()), int(input_ids.max()), self.config.vocab_size)
        return self.encode(self.lower_layers(input_ids, attention_mask, position_ids))

    def sample_plan(
        self,
        batch_size: int,
        num_plans: int = 1,
        generator: torch.Generator | None = None,
        prior: str = "uniform",
    ) -> Tensor:
        """Plans from the prior, (B, P, H) bool; `prior` as in `forward`."""
        return self.plan_prior.sample(batch_size, num_plans, prior, generator)

    @torch.no_grad()
    def gather_prior(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """
        Gathers the aggregate prior, the plans that texts take together, which is then saved with the model.

        Args:
            batches: of training text, dicts with `input_ids` and optional `attention_mask` and `position_ids`.
        """

        def plan_logits() -> Iterator[Tensor]:
            for batch in batches:
                inputs: dict[str, Any] = {
                    name: each.to(self.device) for name, each in batch.items() if name != "labels"
                }
                lower = self.lower_layers(**inputs)
                assert lower.layout is not None
                yield self.encode(lower)[lower.layout.plan_mask]

        self.plan_prior.gather(plan_logits())

    def _plan_of_rank(self, ranks: Tensor) -> Tensor:
        span = self.config.plan_span
        return torch.zeros_like(ranks) if span == "sequence" else ranks // int(span)

    def _plan_state(
        self,
        plan: Tensor | str | Sequence[str] | PlanState | None,
        cache: Cache | None,
        lower: LowerOutput,
        prompt_plan: str | None,
        prior: str | None,
    ) -> PlanState:
        """The plans that the caller gives, or those that the cache was written under, or none yet."""
        if isinstance(plan, PlanState):
            if plan.plan is None and lower.layout is None:
                raise ValueError(UNKNOWN_PLAN)
            return plan
        held = cache.state if isinstance(cache, PlanCache) else None
        if prior is None:
            prior = "uniform" if held is None else held.prior
        if plan is not None:
            given = as_plan(plan, len(lower.hidden_states), self.config.latent_dim)
            if prompt_plan is None and given.shape[1] != lower.num_plans:
                raise ValueError(
                    f"plan of shape {tuple(given.shape)} for texts of {lower.num_plans} plans each "
                    f"(plan_span={self.config.plan_span!r}): ({lower.num_plans}, {self.config.latent_dim}) is needed, "
                    "or prompt_plan='prior' to draw those that are missing"
                )
            return PlanState(plan=given, prompt_plan=prompt_plan or "prior", prior=prior)
        if held is not None:
            held.prior = prior
            return held
        if lower.layout is None:
            raise ValueError(UNKNOWN_PLAN)
        return PlanState(prompt_plan=prompt_plan or "prior", prior=prior)

    def _complete(
        self, state: PlanState, lower: LowerOutput, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> PlanState:
        """Draws the plans that these tokens need and, with those of the prompt, those of all tokens that may follow."""
        begins, wanted = state.columns is None, lower.num_plans
        if not begins and state.plan is not None and state.plan.shape[1] >= wanted:
            return state
        device, batch = lower.hidden_states.device, len(lower.hidden_states)
        known = torch.empty(batch, 0, self.config.latent_dim, dtype=torch.bool, device=device)
        if state.plan is not None:
            known = state.plan.to(device)
            known = known.repeat_interleave(max(1, batch // len(known)), 0)  # several texts for each prompt
        if begins:
            if known.shape[1] < wanted:
                text = self._is_text(input_ids, inputs_embeds)
                known = torch.cat([known, self._plan_of_prompt(state, lower, text, known.shape[1])], 1)
            state.columns = lower.num_tokens
            if lower.layout is not None:
                state.first_position = lower.layout.plan_position[:, :1]
                state.padded = lower.layout.token_mask is not None
            wanted = num_plans(self.config.plan_span, lower.num_tokens + state.new_tokens)
        stream = state.stream(device) if state.new_tokens else None  # seeded now: before the first token is drawn
        if known.shape[1] < wanted:
            drawn = self.plan_prior.sample(wanted - known.shape[1], batch, state.prior, stream or state.stream(device))
            known = torch.cat([known, drawn.transpose(0, 1)], 1)
        state.plan, state.vectors = known, None
        return state

    def _is_text(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, T) bool, False for the begin-of-text token: alone, it is a prompt without anything to read."""
        begin = _first_of(self.config.bos_token_id)
        if input_ids is not None:
            return input_ids != begin
        assert inputs_embeds is not None
        if begin < 0:
            return torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        return (inputs_embeds != self.model.embed_tokens(torch.tensor([[begin]], device=inputs_embeds.device))).any(-1)

    def _plan_of_prompt(self, state: PlanState, lower: LowerOutput, text: Tensor, known: int) -> Tensor:
        """Plans of tokens already there, from the posterior or the prior: all but the first `known` ones."""
        batch, missing = len(lower.hidden_states), lower.num_plans - known
        logits = lower.hidden_states.new_zeros(batch, missing, self.config.latent_dim, dtype=torch.float32)
        read = torch.zeros(batch, missing, dtype=torch.bool, device=logits.device)
        if state.prompt_plan == "posterior" and lower.layout is not None:
            if lower.layout.token_mask is not None:
                text = text & lower.layout.token_mask
            read = lower.layout.plan_mask[:, -missing:] & text.any(1, keepdim=True)
            logits = torch.where(read[..., None], self.encode(lower)[:, -missing:].to(logits.dtype), logits)
        drawn = self.plan_mapper(logits)
        if state.prior != "uniform":
            from_prior = self.plan_prior.sample(batch, missing, state.prior, device=logits.device)
            drawn = torch.where(read[..., None], drawn, from_prior)
        return drawn

    def _vectors_of_tokens(self, state: PlanState, lower: LowerOutput) -> Tensor:
        """R of each token, (B, T, D)."""
        plan, tokens = state.plan, lower.hidden_states.shape[1]
        assert plan is not None
        if plan.shape[1] > 1:
            if plan.shape[1] <= tokens:
                return plan_to_token(self.plan_table(plan), lower.token_plan)
            return self.plan_table(plan_to_token(plan, lower.token_plan))
        if state.vectors is None or torch.is_grad_enabled():
            state.vectors = self.plan_table(plan)
        return state.vectors.expand(-1, tokens, -1)

    def _cache(self, given: Cache | None, use_cache: bool | None, labels: Tensor | None, mode: str) -> Cache | None:
        if self.training and torch.is_grad_enabled() and self.model.layers[0].gradient_checkpointing:
            if given is not None and int(given.get_seq_length()) > 0:
                raise ValueError(
                    "cache: gradient checkpointing computes layers twice, so it takes no cache with tokens"
                )
            return None
        if given is not None:
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and mode == "inference"
        return PlanCache(self.config) if use_cache else None

    @property
    def _scores_in_chunks(self) -> bool:
        """Whether the head may compute the loss without the logits: nothing else watches or replaces it."""
        if type(self.lm_head) is not Head or self.lm_head.in_columns:
            return False
        return torch.compiler.is_compiling() or not is_observed(self.lm_head)

    @staticmethod
    def _can_skip_tokens(lower: LowerOutput, layer: nn.Module) -> bool:
        """Whether a layer may compute the output of the last token only: nothing else watches it."""
        if lower.hidden_states.shape[1] == 1 or not lower.last_row_suffices:
            return False
        return torch.compiler.is_compiling() or not is_observed(layer)

    def _asked(self, name: str, value: bool | None) -> bool:
        return bool(getattr(self.config, name) if value is None else value)

    def _checked_mask(self, mask: Tensor, hidden_states: Tensor) -> Tensor:
        """A mask of four dimensions in the form that the attention backend takes."""
        backend = self.config._attn_implementation
        if is_flash_attention_requested(self.config):
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)}: attn_implementation={backend!r} takes masks of two "
                "dimensions only; call model.set_attn_implementation('sdpa')"
            )
        if mask.is_floating_point() or (backend == "sdpa" and mask.dtype == torch.bool):
            return mask
        additive = hidden_states.new_zeros(mask.shape)
        return additive.masked_fill(~mask.bool(), torch.finfo(additive.dtype).min)

    def _losses(
        self,
        logits: Tensor | None,
        reconstruction: Tensor | None,
        labels: Tensor,
        plan_logits: Tensor | None,
        plan_mask: Tensor | None,
        kl_weight: float | Tensor | None,
        free_bits: float | Tensor | None,
        num_items: int | Tensor | None,
    ) -> dict[str, Tensor | None]:
        """The objective and its parts by name, from the logits or from the sum of the cross-entropies."""
        config = self.config
        found = objective(
            *(logits, labels, plan_logits, plan_mask),
            free_bits=config.free_bits if free_bits is None else free_bits,
            kl_weight=config.kl_weight if kl_weight is None else kl_weight,
            num_tokens=num_items,
            min_bits=config.min_bits,
            aggregate_weight=config.aggregate_weight,
            gather_plans=self.gather_plans,
            reconstruction=reconstruction,
        )
        return {each.name: getattr(found, each.name) for each in fields(found)}

    def _warn_of_a_lost_gradient(self, labels: Tensor | None, mode: str | None, plan: Any) -> None:
        trains = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if trains and mode is None and plan is None and labels is None:
            warnings.warn(NO_ENCODER_GRADIENT, stacklevel=3)

    @staticmethod
    def _check_loss_arguments(labels: Tensor | None, num_items: int | Tensor | None, skip_logits: bool) -> None:
        if labels is not None:
            return
        if skip_logits:
            raise ValueError("skip_logits=True: without labels the logits are all there is to return")
        if num_items is not None:
            raise ValueError(
                "num_items_in_batch without labels: label_smoothing_factor and compute_loss_func of a Trainer keep the "
                "labels from the model, so that its encoder would not be trained. Leave them out; the model computes "
                "the loss itself"
            )

    def _checked_mode(self, mode: str | None, plan: Any, labels: Tensor | None, prompt_plan: str | None) -> str:
        if mode is None:
            mode = "training" if labels is not None and plan is None else "inference"
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: one of {MODES}")
        if mode == "training" and plan is not None:
            raise ValueError("mode='training' draws the plan from the posterior: give a plan in mode='inference'")
        if prompt_plan is not None:
            check_choice("prompt_plan", prompt_plan, PROMPT_PLANS)
        return mode


def build_baseline(config: FreeTransformerConfig) -> PreTrainedModel:
    """The Llama of the same configuration, started in the same way: the model to compare with."""
    model = AutoModelForCausalLM.from_config(config.to_llama())
    model.apply(lambda module: init_module(module, model.config))
    return model


def _token_mask(attention_mask: Tensor | None, batch: int, past: int, tokens: int) -> Tensor | None:
    """(B, past + T) bool, False on padding; None where there is none, or where that is not known."""
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        if attention_mask.shape[1] != past + tokens:
            cached = f" ({past} of them in the cache)" if past else ""
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: ({batch}, {past + tokens}) is needed, a "
                f"column for each token{cached}"
            )
        mask = attention_mask.bool()
    elif attention_mask.dim() == 4 and past == 0:
        own = attention_mask[:, 0].diagonal(dim1=1, dim2=2)
        lowest = torch.finfo(own.dtype).min / 2 if own.is_floating_point() else 0
        mask = (own > lowest).expand(batch, -1)
    elif attention_mask.dim() == 4:
        return None
    else:
        raise ValueError(f"attention_mask of shape {tuple(attention_mask.shape)}: 2 or 4 dimensions are needed")
    if torch.compiler.is_compiling():  # which cannot ask for values
        return mask
    return None if mask.all() else mask


def _first_of(token_id: int | list[int] | None) -> int:
    if isinstance(token_id, list):
        return token_id[0]
    return -1 if token_id is None else token_id
