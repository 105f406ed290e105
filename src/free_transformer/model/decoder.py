"""The decoder: the embedding, layers and final norm of a Llama, some of whose layers can receive a plan."""

from typing import NoReturn

import torch
from torch import Tensor, nn

from .attention import rotary
from .compat import Cache, LlamaPreTrainedModel, LlamaRotaryEmbedding, OwnInitialization
from .configuration import FreeTransformerConfig
from .errors import InputError
from .initialization import init_module
from .injection import InjectedDecoderLayer
from .layers import DecoderLayer, RMSNorm, is_observed
from .layout import PlanLayout, plan_of_rank
from .outputs import LowerOutput


class Initialization(OwnInitialization):
    """Initializes weights with `init_module` in every part that `transformers` treats as a separate model."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # norms and rotary buffers
        init_module(module, self.config)


class Decoder(Initialization, LlamaPreTrainedModel):
    """Layers 0 to K-1 compute X, which the encoder reads. Layers K to L-1 compute the output under a plan."""

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

    def forward(self, *args: object, **kwargs: object) -> NoReturn:
        raise InputError(
            "the decoder alone has no plan, but trainers of TRL compute their loss from it. SFTTrainer is supported "
            "with free_transformer.trainer.PlanTrainer: class PlanSFTTrainer(PlanTrainer, SFTTrainer). "
            "Trainers on preferences or rewards (DPO, GRPO, KTO, ...) are not supported"
        )

    def run_lower(
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
        **kwargs: object,
    ) -> LowerOutput:
        """
        Runs layers 0 to K-1.

        Args:
            hidden_states: embeddings, (B, T, D).
            attention_mask: in the form that the attention backend takes.
            position_ids: (B, T), or (1, T) if they are the same in all rows.
            plans: number of plans of the text so far.
            token_plan: (B, T), index of the plan of each token; by default it follows from the position.
            num_tokens: number of tokens of the text so far.
        """
        if token_plan is None:
            token_plan = plan_of_rank(self.config.plan_span, position_ids) if layout is None else layout.token_plan
        arguments = {
            "attention_mask": attention_mask,
            "position_ids": position_ids.expand(hidden_states.shape[0], -1),
            "position_embeddings": rotary(self.rotary_emb, hidden_states, position_ids),
            "cache": cache,
            **kwargs,
        }
        if output_attentions:
            if self.config._attn_implementation != "eager":
                raise InputError(
                    f"output_attentions=True: attn_implementation={self.config._attn_implementation!r} computes no "
                    "attention weights; call model.set_attn_implementation('eager')"
                )
            arguments["attentions"] = []
        all_states = [hidden_states] if output_hidden_states else None
        for layer in self.layers[: self.config.plan_layer]:
            hidden_states = layer(hidden_states, **arguments)
            if all_states is not None:
                all_states.append(hidden_states)
        return LowerOutput(hidden_states, layout, token_plan, plans, num_tokens, arguments, all_states)

    def run_upper(self, lower: LowerOutput, plan_vectors: Tensor, last_only: bool = False) -> Tensor:
        """
        Runs layers K to L-1.

        Args:
            plan_vectors: R of each token, (B, T, D).
            last_only: let the last layer compute only the output of the last token, unless something observes it.

        Returns:
            the input of the final norm, (B, T, D) or (B, 1, D).
        """
        hidden_states, arguments = lower.hidden_states, lower.layer_arguments
        last_only = last_only and hidden_states.shape[1] > 1 and lower.last_row_suffices
        plan_vectors = plan_vectors.to(hidden_states.dtype)
        if self.config.plan_strength != 1:
            plan_vectors = plan_vectors * self.config.plan_strength
        layers = self.layers[self.config.plan_layer :]
        for layer in layers:
            if last_only and layer is layers[-1] and (torch.compiler.is_compiling() or not is_observed(layer)):
                arguments = {**arguments, "last_only": True}
            # positional: reentrant checkpointing tracks gradients only through positional arguments
            inputs = (hidden_states, plan_vectors) if isinstance(layer, InjectedDecoderLayer) else (hidden_states,)
            hidden_states = layer(*inputs, **arguments)
            if lower.all_hidden_states is not None:
                lower.all_hidden_states.append(hidden_states)
        return hidden_states
