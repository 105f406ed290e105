"""
Everything in this package that relies on internals of `transformers`, in one place.

Only names exported by the top-level `transformers` package are covered by its deprecation policy. The other names used
by this package are imported here, each with a comment on what it is needed for, and the rest of the package imports
them from here. When a new release of `transformers` breaks something, this module is where to look first. The tested
range is in `pyproject.toml`: `make test-oldest` and `make test-newest` run the test suite at both ends of it.

The old and the new name of the cache
    `transformers` 5.24 renamed the argument and output field `past_key_values` to `cache`. A Free Transformer accepts
    and returns both names with every supported release.
"""

from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel

# The class of Llama's activation, to detect a replacement by the user.
from transformers.activations import ACT2FN

# The base class of all caches, and the layer types that `GrowingLayer` and `WindowLayer` extend.
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

# The output of `generate`, to which ours adds the plan.
from transformers.generation.utils import GenerateDecoderOnlyOutput

# Attention masks for every attention backend.
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_masks_for_generate,
    create_sliding_window_causal_mask,
)

# Gradient checkpointing of a decoder layer, as the Trainer switches it on.
from transformers.modeling_layers import GradientCheckpointingLayer

# Output with the fields that other software expects from a causal language model.
from transformers.modeling_outputs import CausalLMOutputWithPast

# The attention backends by name.
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Llama's own modules, which ours extend under the same weight names.
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)

# The base class of all outputs of models.
from transformers.utils import ModelOutput

# Whether a configuration asks for one of the Flash Attention backends, which take boundaries instead of masks.
from transformers.utils.generic import is_flash_attention_requested

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "CACHE_NAME",
    "CACHE_NAMES",
    "BothCacheNames",
    "Cache",
    "CausalLMOutputWithPast",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerateDecoderOnlyOutput",
    "GenerationHooks",
    "GradientCheckpointingLayer",
    "LlamaAttention",
    "LlamaMLP",
    "LlamaPreTrainedModel",
    "LlamaRMSNorm",
    "LlamaRotaryEmbedding",
    "ModelArguments",
    "OwnInitialization",
    "SiLU",
    "create_bidirectional_mask",
    "create_causal_mask",
    "create_masks_for_generate",
    "create_sliding_window_causal_mask",
    "eager_attention_forward",
    "is_flash_attention_requested",
]

# Keyword arguments of a model, as the loop of `generate` holds them.
ModelArguments = dict[str, Any]

CACHE_NAMES = ("cache", "past_key_values")
SiLU = type(ACT2FN["silu"])
# The name that the installed release gives to the cache in outputs and in `generate`.
CACHE_NAME = next(each.name for each in fields(CausalLMOutputWithPast) if each.name in CACHE_NAMES)


class BothCacheNames(ModelOutput):
    """Mixin for outputs whose cache can be read as `cache` and as `past_key_values`, with every release."""

    if CACHE_NAME == "past_key_values":

        @property
        def cache(self) -> Cache | None:
            return self.past_key_values

        def __getitem__(self, key: object) -> object:
            return super().__getitem__("past_key_values" if key == "cache" else key)

        def __contains__(self, key: object) -> bool:
            return super().__contains__("past_key_values" if key == "cache" else key)

        def get(self, key: str, default: object = None) -> object:
            return super().get("past_key_values" if key == "cache" else key, default)


class GenerationHooks(GenerationMixin):
    """Hooks into the steps of `generate`, for which `GenerationMixin` has only private methods."""

    def new_cache(self, max_length: int) -> DynamicCache:
        """Creates the default cache, for texts of at most `max_length` tokens."""
        raise NotImplementedError

    def before_prompt(self, model_kwargs: ModelArguments, prompt: Tensor, new_tokens: int) -> None:
        """
        Called before the prompt is read.

        Args:
            model_kwargs: the model's arguments for the whole text.
            prompt: (B, T) tokens; T = 0 for a prompt of embeddings.
            new_tokens: maximum number of tokens after the prompt.
        """

    def before_step(self, input_ids: Tensor, model_kwargs: ModelArguments) -> tuple[Tensor, ModelArguments]:
        """
        Called before each step. Returns the texts, (B, T), and the model's arguments for the whole text.
        """
        return input_ids, model_kwargs

    def changed_arguments(self, model_kwargs: ModelArguments) -> ModelArguments:
        """Called after each step. Returns the model's arguments that the loop has to replace."""
        return {}

    def cache_length(self, model_kwargs: ModelArguments, max_length: int) -> int:
        """Returns the cache size, in tokens, for texts of at most `max_length` tokens."""
        return max_length

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        *args: object,
        **kwargs: object,
    ) -> object:
        self.before_prompt(model_kwargs, input_ids, generation_config.max_length - input_ids.shape[1])
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: object,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        given = model_kwargs.get(CACHE_NAME)
        max_cache_length = self.cache_length(model_kwargs, max_cache_length)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        by_default = generation_config.cache_implementation in (None, "dynamic")
        if given is None and by_default and type(model_kwargs.get(CACHE_NAME)) is DynamicCache:
            model_kwargs[CACHE_NAME] = self.new_cache(max_cache_length)

    def _get_stopping_criteria(self, *args: object, **kwargs: object) -> Any:
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for each in criteria:
            if hasattr(each, "max_position_embeddings"):  # it would warn about longer texts
                each.max_position_embeddings = None
        return criteria

    def prepare_inputs_for_generation(
        self, input_ids: Any, *args: object, inputs_embeds: Any = None, **kwargs: Any
    ) -> ModelArguments:  # `transformers` looks for the name `inputs_embeds`
        input_ids, kwargs = self.before_step(input_ids, kwargs)
        inputs: ModelArguments = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: ModelArguments, *args: object, **kwargs: object
    ) -> ModelArguments:
        model_kwargs.update(self.changed_arguments(model_kwargs))
        updated: ModelArguments = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return updated


class OwnInitialization(PreTrainedModel):
    """Makes `transformers` initialize every module of a model through the model's own `_init_weights`."""

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside of `transformers` it would skip modules without direct parameters (attention, MLP).
        super()._initialize_weights(module, is_custom_code=False)
