"""
The Free Transformer: a Llama that draws a plan at half depth and writes the rest under it.

    tokens -> layers 0..K-1 -> X ----------------------------> layer K .. L-1 -> norm -> head -> logits
                               |                                  ^
                               +-> encoder -> logits -> plan -> table[plan] = R   (keys and values from X + R)
                                   (or fair coins)

F. Fleuret, "The Free Transformer", arXiv:2510.17558.
"""

import copy
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import ModelOutput
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel, LlamaRotaryEmbedding
from transformers.utils.generic import is_flash_attention_requested

from .attention import rotary
from .config import FreeTransformerConfig
from .encoder import PlanEncoder
from .generation import PROMPT_PLANS, PlanGenerationMixin
from .initialization import init_module
from .injection import InjectedDecoderLayer
from .layers import DecoderLayer, Head, RMSNorm
from .layout import (
    PlanLayout,
    flash_boundaries,
    is_packed,
    num_plans,
    plan_layout,
    plan_to_token,
    same_document,
)
from .losses import objective
from .plan import BinaryMapper, PlanPrior, PlanTable, as_plan
from .pretrained import warm_start
from .rounding import ROUNDING
from .sharing import name_code

MODES = ("training", "inference")


@dataclass
class FreeTransformerOutput(ModelOutput):
    """What `FreeTransformer.forward` returns; losses are in nats per predicted token, `kl` in bits per plan."""

    loss: Tensor | None = None  # reconstruction + kl_weight * hinge
    logits: Tensor | None = None  # (B, T, V)
    past_key_values: Cache | None = None
    plan: Tensor | None = None  # (B, P, H) bool, the plan used
    plan_logits: Tensor | None = None  # (B, P, H) of the posterior, where the encoder ran for training
    plan_mask: Tensor | None = None  # (B, P) bool, False for a plan that covers only padding
    reconstruction: Tensor | None = None
    kl: Tensor | None = None
    hinge: Tensor | None = None  # what a plan spends beyond its free bits
    kl_per_bit: Tensor | None = None  # (H,), means over plans as the two before


@dataclass
class FirstHalf:
    """What the layers before the plan have made of the tokens, and all that the second half needs besides."""

    hidden_states: Tensor  # X, (B, T, D)
    layout: PlanLayout | None  # None while a cache holds the beginning of the text
    token_plan: Tensor  # (B, T), the plan of each token
    num_plans: int
    layer_arguments: dict[str, Any]

    @property
    def lets_one_ask(self) -> bool:
        """Whether attention of the last token alone can be told by the last row of the mask."""
        if ROUNDING.as_llama or "cu_seq_lens_q" in self.layer_arguments:  # Flash Attention's documents
            return False
        mask, cache = self.layer_arguments["attention_mask"], self.layer_arguments["past_key_values"]
        if mask is None:  # a causal one, which also hides what a static cache has not written yet
            return cache is None or not cache.is_compileable
        return isinstance(mask, Tensor) and mask.dim() == 4


class _OwnStart:
    """Starts weights by `init_module`, in every part that `transformers` takes for a model of its own."""

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # As custom code, modules without parameters of their own (attention, MLP) would be passed over.
        super()._initialize_weights(module, is_custom_code=False)  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]  # norms and rotary buffers
        init_module(module, self.config)  # type: ignore[attr-defined]


class Decoder(_OwnStart, LlamaPreTrainedModel):
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
            "the decoder alone has no plan. TRL computes its loss from it: put free_transformer.trainer.PlanTrainer "
            "first, class PlanSFTTrainer(PlanTrainer, SFTTrainer)"
        )


class FreeTransformer(_OwnStart, PreTrainedModel, PlanGenerationMixin):
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
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    gather_plans: Callable[[Tensor], Tensor] | None = None  # where processes share a batch, see `losses.objective`
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
        plan: Tensor | None = None,
        prompt_plan: str | None = None,
        prior: str = "uniform",
        plan_rows: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        kl_weight: float | Tensor | None = None,
        free_bits: float | Tensor | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> FreeTransformerOutput:
        """
        Args:
            input_ids: (B, T) tokens.
            attention_mask: (B, T), 0 on padding, left or right.
            position_ids: (B, T); positions that start again at 0 mark the documents of a packed row.
            labels: (B, T), shifted inside, -100 ignored.
            mode: `"training"`, the plan is drawn from the encoder's posterior, or `"inference"`, the plan is drawn
                from the prior and the encoder does not run. Default: training where labels are given and no
                plan is. It does not follow `self.training`: an evaluation needs the posterior too.
            plan: (P, H) or (B, P, H) bits, the plan to use. It must cover the tokens, unless `prompt_plan` is given.
            prompt_plan: `"posterior"` or `"prior"`, where plans that `plan` lacks are drawn from in inference mode.
            prior: what plans are drawn from in inference mode: `"uniform"` (the method), or `"aggregate"`, the plans
                that training texts took, where `gather_prior` has gathered them.
            plan_rows: (B, P, groups), the table's rows of all plans of a text of which `past_key_values` hold the
                beginning: what a step of `generate` gives in the place of `plan`.
            num_items_in_batch: predicted tokens to divide the losses by, default those of `labels`.
            kl_weight, free_bits: instead of the configuration's, for a schedule.
            skip_logits: returns no logits with the loss, so that those of all tokens are never held together: less
                memory and time in training. The gradients cannot be differentiated again then.
        """
        if skip_logits and labels is None:
            raise ValueError("skip_logits=True: without labels the logits are all there is to return")
        if plan_rows is not None:
            half = self._next_half(input_ids, attention_mask, position_ids, past_key_values, **kwargs)
            plan_states = self.plan_table.look_up(plan_to_token(plan_rows, half.token_plan))
            return FreeTransformerOutput(
                logits=self.under_plan(half, plan_states, logits_to_keep), past_key_values=past_key_values
            )
        mode = self._checked_mode(mode, plan, labels, prompt_plan)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        half = self.first_half(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)
        plan_logits = None
        if mode == "training":
            plan_logits = self.encode(half)
            plan = self.plan_mapper(plan_logits)
        else:
            plan = self._complete_plan(plan, half, input_ids, prompt_plan, prior)
        in_chunks = skip_logits and type(self.lm_head) is Head and not self.lm_head.in_columns
        read = self.second_half(half, plan, plan_logits, logits_to_keep, labels if in_chunks else None)
        logits = None if in_chunks else read
        reconstruction = read if in_chunks else None

        output = FreeTransformerOutput(
            logits=None if skip_logits else logits,
            past_key_values=past_key_values,
            plan=plan,
            plan_logits=plan_logits,
        )
        if half.layout is not None:
            output.plan_mask = half.layout.plan_mask
        if labels is not None:
            config = self.config
            losses = objective(
                *(logits, labels, plan_logits, output.plan_mask),
                free_bits=config.free_bits if free_bits is None else free_bits,
                kl_weight=config.kl_weight if kl_weight is None else kl_weight,
                num_tokens=num_items_in_batch,
                min_bits=config.min_bits,
                aggregate_weight=config.aggregate_weight,
                gather_plans=self.gather_plans,
                reconstruction=reconstruction,
            )
            for name, value in vars(losses).items():
                setattr(output, name, value)
        return output

    def first_half(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> FirstHalf:
        """Layers 0 to K-1: what the encoder reads, the same under every plan. Arguments as in `forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        columns = past + hidden_states.shape[1]
        token_mask = None
        if attention_mask is not None and not attention_mask.all():
            token_mask = attention_mask.bool()
        packed = position_ids is not None and past_key_values is None and is_packed(position_ids, token_mask)
        if position_ids is None:
            position_ids = _positions(token_mask, past, hidden_states)
        layout, plans = None, num_plans(self.config.plan_span, columns)
        if past == 0:
            every_row = position_ids.expand(len(hidden_states), -1)
            layout = plan_layout(self.config.plan_span, every_row, token_mask, packed)
            plans = layout.num_plans
        documents = layout.token_document if layout is not None else None
        if documents is not None and is_flash_attention_requested(self.config):
            attention_mask = None
            kwargs |= flash_boundaries(documents, token_mask)
        else:
            attention_mask = create_causal_mask(
                self.config,
                hidden_states,
                token_mask,
                past_key_values,
                position_ids=None,  # documents are told apart here, padding or not
                and_mask_function=None if documents is None else same_document(documents, documents),
            )
        return self.below_plan(hidden_states, attention_mask, position_ids, past_key_values, layout, plans, **kwargs)

    def _next_half(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> FirstHalf:
        """`first_half` of tokens that go on from a cache, and nothing that asks a tensor for its values."""
        if input_ids is None or position_ids is None or past_key_values is None:
            raise ValueError("plan_rows go with input_ids, position_ids and the past_key_values of what was read")
        hidden_states = self.model.embed_tokens(input_ids)
        if attention_mask is not None or hidden_states.shape[1] > 1 or past_key_values.is_compileable:
            attention_mask = create_causal_mask(self.config, hidden_states, attention_mask, past_key_values)
        return self.below_plan(hidden_states, attention_mask, position_ids, past_key_values, **kwargs)

    def below_plan(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Cache | None,
        layout: PlanLayout | None = None,
        plans: int = 0,
        **kwargs: Any,
    ) -> FirstHalf:
        """Layers 0 to K-1; positions are (B, T), or (1, T) where all rows have the same."""
        rotation = rotary(self.model.rotary_emb, hidden_states, position_ids)
        position_ids = position_ids.expand(hidden_states.shape[0], -1)
        arguments = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "position_embeddings": rotation,
            "past_key_values": past_key_values,
            **kwargs,
        }
        for layer in self.model.layers[: self.config.plan_layer]:
            hidden_states = layer(hidden_states, **arguments)
        span = self.config.plan_span
        if layout is not None:
            token_plan = layout.token_plan
        else:
            token_plan = torch.zeros_like(position_ids) if span == "sequence" else position_ids // int(span)
        return FirstHalf(hidden_states, layout, token_plan, plans, arguments)

    def encode(self, half: FirstHalf) -> Tensor:
        """The posterior's logits, (B, P, H), from the output of the first half."""
        if half.layout is None:
            raise ValueError("the encoder reads whole texts: mode='training' takes no cache that holds tokens")
        arguments: dict[str, Any] = {}
        if "mask" in self._encoder_arguments:
            arguments["mask"] = half.layout.mask
        if "layout" in self._encoder_arguments:
            arguments["layout"] = half.layout
        logits = self.encoder(half.hidden_states, **arguments)
        expected = (*half.layout.plan_mask.shape, self.config.latent_dim)
        if logits.shape != expected:
            raise ValueError(f"the encoder returned logits of shape {tuple(logits.shape)}, (B, P, H) is {expected}")
        return logits

    def second_half(
        self,
        half: FirstHalf,
        plan: Tensor,
        plan_logits: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        labels: Tensor | None = None,
    ) -> Tensor:
        """
        Layers K to L-1, norm and head, under a plan.

        Args:
            plan: (B, P, H) bool; plan_logits: where the straight-through gradient goes, if anywhere.
            labels: (B, T), to get the sum of their cross-entropies in the place of the logits.

        Returns:
            logits, (B, T, V).
        """
        if plan_logits is None:  # bits first: a step of generation looks up its own token's plan only
            plan_states = self.plan_table(plan_to_token(plan, half.token_plan))
        else:
            plan_states = plan_to_token(self.plan_table(plan, plan_logits), half.token_plan)
        return self.under_plan(half, plan_states, logits_to_keep, labels)

    def under_plan(
        self, half: FirstHalf, plan_states: Tensor, logits_to_keep: int | Tensor = 0, labels: Tensor | None = None
    ) -> Tensor:
        """`second_half`, from the vector of each token's plan, (B, T, D)."""
        hidden_states = half.hidden_states
        plan_states = plan_states.to(hidden_states.dtype)
        arguments = half.layer_arguments
        one_asks = labels is None and isinstance(logits_to_keep, int) and logits_to_keep == 1
        for layer in self.model.layers[self.config.plan_layer :]:
            if one_asks and layer is self.model.layers[-1] and half.lets_one_ask:
                arguments = {**arguments, "last_only": True}
            # by position: reentrant checkpointing follows gradients through positional arguments only
            inputs = (hidden_states, plan_states) if isinstance(layer, InjectedDecoderLayer) else (hidden_states,)
            hidden_states = layer(*inputs, **arguments)
        if labels is not None:
            return self.lm_head(self.model.norm(hidden_states), labels=labels)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return self.lm_head(self.model.norm(hidden_states[:, kept]))

    @torch.no_grad()
    def infer_plan(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """The posterior's logits, (B, P, H), of the plans of these texts; `> 0` is the likeliest plan."""
        return self.encode(self.first_half(input_ids, attention_mask, position_ids))

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
                inputs = {name: values.to(self.device) for name, values in batch.items() if name != "labels"}
                half = self.first_half(**inputs)
                assert half.layout is not None
                yield self.encode(half)[half.layout.plan_mask]

        self.plan_prior.gather(plan_logits())

    def _complete_plan(
        self, plan: Tensor | None, half: FirstHalf, input_ids: Tensor | None, prompt_plan: str | None, prior: str
    ) -> Tensor:
        """The caller's plans, and drawn ones for the tokens that they do not cover: (B, P, H) bool."""
        batch = len(half.hidden_states)
        given = torch.empty(batch, 0, self.config.latent_dim, dtype=torch.bool, device=half.hidden_states.device)
        if plan is not None:
            given = as_plan(plan, batch, self.config.latent_dim).to(half.hidden_states.device)
            if prompt_plan is None and given.shape[1] != half.num_plans:
                raise ValueError(
                    f"plan of shape {tuple(given.shape)} for texts of {half.num_plans} plans each "
                    f"(plan_span={self.config.plan_span!r}): ({half.num_plans}, {self.config.latent_dim}) is needed"
                )
        missing = half.num_plans - given.shape[1]
        if missing <= 0:
            return given
        logits = torch.zeros(batch, missing, self.config.latent_dim, device=given.device)  # fair coins
        written = torch.zeros(batch, missing, dtype=torch.bool, device=given.device)
        if prompt_plan == "posterior" and half.layout is not None:
            written = half.layout.plan_mask[:, -missing:]
            if input_ids is not None:  # a prompt of nothing but begin-of-text has no text to read a plan from
                text = input_ids != _first_of(self.config.bos_token_id)
                if half.layout.token_mask is not None:
                    text = text & half.layout.token_mask
                written = written & text.any(1, keepdim=True)
            logits = torch.where(written[..., None], self.encode(half)[:, -missing:].to(logits.dtype), logits)
        drawn = self.plan_mapper(logits)
        if prior != "uniform":
            drawn = torch.where(written[..., None], drawn, self.sample_plan(batch, missing, prior=prior))
        return torch.cat([given, drawn], dim=1)

    def _checked_mode(
        self, mode: str | None, plan: Tensor | None, labels: Tensor | None, prompt_plan: str | None
    ) -> str:
        if mode is None:
            mode = "training" if labels is not None and plan is None else "inference"
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: one of {MODES}")
        if mode == "training" and plan is not None:
            raise ValueError("mode='training' draws the plan from the posterior: give a plan in mode='inference'")
        if prompt_plan is not None and prompt_plan not in PROMPT_PLANS:
            raise ValueError(f"prompt_plan={prompt_plan!r}: one of {PROMPT_PLANS}")
        return mode


def build_baseline(config: FreeTransformerConfig) -> PreTrainedModel:
    """The Llama of the same configuration, started in the same way: the model to compare with."""
    model = AutoModelForCausalLM.from_config(config.to_llama())
    model.apply(lambda module: init_module(module, model.config))
    return model


def _positions(token_mask: Tensor | None, past: int, hidden_states: Tensor) -> Tensor:
    if token_mask is None:
        return (torch.arange(hidden_states.shape[1], device=hidden_states.device) + past)[None]
    return (token_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def _first_of(token_id: int | list[int] | None) -> int:
    if isinstance(token_id, list):
        return token_id[0]
    return -1 if token_id is None else token_id
