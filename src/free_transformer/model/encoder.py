"""The encoder: reads the whole text and predicts each bit of its plan."""

import torch
from torch import Tensor, nn

from .attention import SplitAttention, has_varlen_kernel, rotary, takes_boundaries
from .compat import LlamaRotaryEmbedding, create_bidirectional_mask, is_flash_attention_requested
from .configuration import FreeTransformerConfig
from .layers import MLP, RMSNorm
from .layout import PlanLayout, same_document


class PlanEncoder(nn.Module):
    """
    A non-causal Transformer block that maps a learned query to the logits of each bit (paper, section 3.2).

    Rotary positions distinguish the plans of a sequence, whose queries are otherwise equal.
    """

    def __init__(self, config: FreeTransformerConfig):
        super().__init__()
        self.config = config
        eps = config.rms_norm_eps
        self.query = nn.Parameter(torch.empty(config.hidden_size))  # ζ
        self.query_norm = RMSNorm(config.hidden_size, eps)
        self.key_value_norm = RMSNorm(config.hidden_size, eps)
        self.attention = SplitAttention(config, layer_idx=0)
        self.attention.is_causal = False  # SDPA with no mask falls back to this flag
        self.mlp_norm = RMSNorm(config.hidden_size, eps)
        self.mlp = MLP(config)
        self.norm = RMSNorm(config.hidden_size, eps)
        self.readout = nn.Linear(config.hidden_size, config.latent_dim)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(self, hidden_states: Tensor, layout: PlanLayout) -> Tensor:
        """
        Args:
            hidden_states: X, (B, T, D), the output of the decoder's first half.

        Returns:
            (B, P, H), the logit of each bit of each plan.
        """
        query = self.query.to(hidden_states.dtype).expand(1, 1, -1)  # the same for all plans before rotation
        attended, _ = self.attention(
            self.query_norm(query),
            rotary(self.rotary_emb, query, layout.plan_position),
            key_value_states=self.key_value_norm(hidden_states),
            key_value_position_embeddings=rotary(self.rotary_emb, hidden_states, layout.position_ids),
            **self._readable(hidden_states, layout),
        )
        plans = query + attended
        plans = plans + self.mlp(self.mlp_norm(plans))
        return self.readout(self.norm(plans))

    def _readable(self, hidden_states: Tensor, layout: PlanLayout) -> dict[str, object]:
        """Returns the attention arguments that restrict which tokens each plan may read."""
        masked = layout.token_document is not None or layout.token_mask is not None
        by_boundaries = layout.boundaries is not None and takes_boundaries(self.config, hidden_states)
        if by_boundaries and has_varlen_kernel(self.config, hidden_states):
            return {"boundaries": layout.boundaries}
        if is_flash_attention_requested(self.config):  # it would apply the tokens' padding to the plans
            return {"attention_mask": layout.mask[:, None], "implementation": "sdpa"} if masked else {}
        inside, padding = None, layout.token_mask
        if layout.token_document is not None or layout.boundaries is not None:
            tokens, plans = layout.attention_groups
            inside, padding = same_document(plans, tokens), None  # no value is read then
        mask = create_bidirectional_mask(
            self.config,
            hidden_states[:, :1].expand(-1, layout.num_plans, -1),  # has the shape of the queries
            padding,
            encoder_hidden_states=hidden_states,
            and_mask_function=inside,
        )
        return {"attention_mask": mask}
