"""Plans while text is written: completed as the text grows, given by the caller, or read from the prompt."""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from free_transformer.config import FreeTransformerConfig
from free_transformer.plan import as_plan

PROMPT_PLANS = ("posterior", "prior")


class PlanGenerationMixin(GenerationMixin):
    """
    `generate()` of `transformers` with plans.

    The plans travel from step to step as `plan`, (B, P, H): each step draws those that its tokens lack and never
    changes one that is there, so that cached and uncached generation read the same plans.
    """

    config: FreeTransformerConfig

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        plan: Tensor | None = None,
        prompt_plan: str = "posterior",
        **kwargs: Any,
    ) -> Any:
        """
        `GenerationMixin.generate` (every option but beams and assistants), plus:

        Args:
            inputs: (B, T) tokens of the prompt; a row with nothing but the begin-of-text token is an empty prompt.
            plan: (P, H) or (B, P, H) bits, plan 0 covering the first token of the text. Plans that are missing come
                from the prompt and, for new text, from the uniform prior.
            prompt_plan: where the plans of the prompt come from: `"posterior"`, the encoder run on the prompt alone
                (the paper's pre-filling), or `"prior"`, with no encoder at all. An empty prompt has nothing to read
                and takes the prior.

        Raises:
            ValueError: for a plan of another shape or of other values than bits, an unknown `prompt_plan`, beam
                search, assisted decoding, and a cache without the plan that wrote it.
        """
        if prompt_plan not in PROMPT_PLANS:
            raise ValueError(f"prompt_plan={prompt_plan!r}: one of {PROMPT_PLANS}")
        self._refuse_unsupported(kwargs)
        tokens = inputs if inputs is not None else kwargs.get("input_ids")
        if plan is not None:
            plan = as_plan(plan, 1 if tokens is None else len(tokens), self.config.latent_dim).to(self.device)
        elif (cache := kwargs.get("past_key_values")) is not None and cache.get_seq_length() > 0:
            raise ValueError("past_key_values were written under a plan: give that plan too, plan=...")
        output = super().generate(inputs, *args, plan=plan, prompt_plan=prompt_plan, **kwargs)
        self._warn_past_trained_length(output if isinstance(output, Tensor) else output.sequences)
        return output

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> dict:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        model_kwargs["plan"] = outputs.plan
        model_kwargs["prompt_plan"] = "prior"  # the prompt has been read
        return model_kwargs

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Keeps the mask as (B, T): `forward` tells padding from it, and makes the attention masks itself."""
        return attention_mask

    def _refuse_unsupported(self, kwargs: dict[str, Any]) -> None:
        settings = kwargs.get("generation_config") or self.generation_config
        beams = kwargs.get("num_beams", getattr(settings, "num_beams", 1)) or 1
        if beams > 1:
            raise ValueError(
                f"num_beams={beams}: beams reorder the cache but not the plans; use num_beams=1 or sampling"
            )
        if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens"):
            raise ValueError("assisted decoding crops the cache but not the plans: generate without an assistant")

    def _warn_past_trained_length(self, sequences: Tensor) -> None:
        length, trained = sequences.shape[1], self.config.max_position_embeddings
        if length > trained:
            warnings.warn(
                f"{length} tokens were written, the model was built for {trained} (max_seq_len): "
                "the text goes on, but its quality past that length is untested",
                stacklevel=3,
            )
