"""Injection of the plan into the decoder: a Llama layer with queries from X, and keys and values from X + R."""

from typing import Any

from torch import Tensor

from .layers import DecoderLayer


class InjectedDecoderLayer(DecoderLayer):
    """
    A decoder layer that receives the plan (paper, section 3.1).

    The residual stream continues from X, so with a zero plan vector (R = 0) this is a plain Llama layer.
    """

    def forward(self, hidden_states: Tensor, plan_states: Tensor | None = None, **kwargs: Any) -> Tensor:
        """
        Args:
            hidden_states: X, (B, T, D).
            plan_states: R of each token, (B, T, D); None: zeros.
        """
        queries = self.input_layernorm(hidden_states)
        key_values = queries if plan_states is None else self.input_layernorm(hidden_states + plan_states)
        return self.attend(hidden_states, queries, key_values, **kwargs)
