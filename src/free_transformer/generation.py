"""Plans while text is written: completed as the text grows, given by the caller, or read from the prompt."""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.masking_utils import create_masks_for_generate

from .attention import SplitAttention
from .cache import GrowingCache
from .config import FreeTransformerConfig
from .layers import MLP
from .layout import num_plans
from .plan import as_plan

PROMPT_PLANS = ("posterior", "prior")


class PlanGenerationMixin(GenerationMixin):
    """
    `generate()` of `transformers` with plans.

    When the prompt has been read, the plans of all that may be written are drawn at once, `plan`, (B, P, H), and the
    rows of the table that they point to, `plan_rows`, (B, P, groups): a step of generation is then the plain Llama's
    and a lookup. (The vectors of all plans would take a twelfth of the memory of a cache of 6 layers.)
    """

    config: FreeTransformerConfig

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        plan: Tensor | None = None,
        prompt_plan: str = "posterior",
        prior: str = "uniform",
        **kwargs: Any,
    ) -> Any:
        """
        `GenerationMixin.generate` (every option but beams and assistants), plus:

        Args:
            inputs: (B, T) tokens of the prompt; a row with nothing but the begin-of-text token is an empty prompt.
            plan: (P, H) or (B, P, H) bits, plan 0 covering the first token of the text. Plans that are missing come
                from the prompt and, for new text, from the prior.
            prompt_plan: where the plans of the prompt come from: `"posterior"`, the encoder run on the prompt alone
                (the paper's pre-filling), or `"prior"`, with no encoder at all. An empty prompt has nothing to read
                and takes the prior.
            prior: `"uniform"` (the method), or `"aggregate"`, the plans that training texts took, gathered by
                `gather_prior`.

        Raises:
            ValueError: for a plan of another shape or of other values than bits, an unknown `prompt_plan` or
                `prior`, beam search, assisted decoding, and a cache without the plan that wrote it.
        """
        if prompt_plan not in PROMPT_PLANS:
            raise ValueError(f"prompt_plan={prompt_plan!r}: one of {PROMPT_PLANS}")
        self.plan_prior.checked(prior)
        self._refuse_unsupported(kwargs)
        if plan is not None:
            given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            batch = next((len(tokens) for tokens in given if tokens is not None), 1)
            plan = as_plan(plan, batch, self.config.latent_dim).to(self.device)
            if self.config.plan_span == "sequence" and plan.shape[1] > 1:
                raise ValueError(f"{plan.shape[1]} plans a text: this model takes one (plan_span='sequence')")
        elif (cache := kwargs.get("past_key_values")) is not None and cache.get_seq_length() > 0:
            raise ValueError("past_key_values were written under a plan: give that plan too, plan=...")
        self.lay_together()
        output = super().generate(inputs, *args, plan=plan, prompt_plan=prompt_plan, prior=prior, **kwargs)
        self._warn_past_trained_length(output if isinstance(output, Tensor) else output.sequences)
        return output

    def lay_together(self) -> None:
        """Prepares the matrices for products with few rows, see `products`: what `generate` does first."""
        for module in self.modules():
            if isinstance(module, SplitAttention | MLP):
                module.lay_together()

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> Any:
        """Reads the prompt, and draws the plans of what may follow."""
        outputs = super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        read = num_plans(self.config.plan_span, generation_config.max_length - 1)  # the last token is never read
        missing = read - outputs.plan.shape[1]
        # A stream of its own, plan after plan: a longer text then begins as a shorter one of the same seed does.
        stream = torch.Generator(self.device).manual_seed(int(torch.randint(2**62, ())))
        if missing > 0:
            drawn = self.plan_prior.sample(missing, len(outputs.plan), model_kwargs["prior"], stream)
            outputs.plan = torch.cat([outputs.plan, drawn.transpose(0, 1)], dim=1)
        return outputs

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> dict:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs.get("plan_rows") is None:  # the prompt has been read just now, or all is read each time
            model_kwargs.update(plan=outputs.plan, prompt_plan="prior")
            if model_kwargs.get("use_cache"):
                model_kwargs["plan_rows"] = self.plan_table.group_codes(outputs.plan)
        return model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        sizes = (batch_size, max_cache_length)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *sizes)
        cache = model_kwargs.get("past_key_values")
        by_default = generation_config.cache_implementation in (None, "dynamic")
        if by_default and type(cache) is DynamicCache and not getattr(cache, "_is_user_defined", False):
            model_kwargs["past_key_values"] = GrowingCache(self.config, max_cache_length)

    def create_masks_for_generate(
        self, attention_mask: Tensor | None = None, is_first_iteration: bool = False, **kwargs: Any
    ) -> Any:
        """The prompt's mask stays (B, T): `forward` tells padding from it."""
        if is_first_iteration:
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, **kwargs)

    def _refuse_unsupported(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config") or self.generation_config

        def setting(name: str) -> Any:
            return kwargs.get(name, getattr(config, name, None))

        if (setting("num_beams") or 1) > 1:
            raise ValueError(f"num_beams={setting('num_beams')}: beams reorder the cache but not the plans; use 1")
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
            if setting(name):
                raise ValueError(f"{name}: this crops the cache but not the plans; generate without an assistant")
        if setting("prefill_chunk_size"):
            raise ValueError("prefill_chunk_size: the encoder reads a prompt whole, so it cannot be read in chunks")

    def _warn_past_trained_length(self, sequences: Tensor) -> None:
        length, trained = sequences.shape[1], self.config.max_position_embeddings
        if length > trained:
            warnings.warn(
                f"{length} tokens were written, the model was built for {trained} (max_seq_len): "
                "the text goes on, but its quality past that length is untested",
                stacklevel=3,
            )
