"""Weight initialization, shared by the Free Transformer and its baseline so that they differ only in the plan."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers import initialization as init

from .configuration import FreeTransformerConfig
from .encoder import PlanEncoder
from .plan import PlanPrior, PlanTable


def stream_scale(config: LlamaConfig) -> float:
    """Returns the scale of X: as measured, else 1, or with tied embeddings the one that gives logits of scale 1."""
    measured = getattr(config, "stream_scale", None)
    if measured is not None:
        return measured
    return config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0


@torch.no_grad()
def init_module(module: nn.Module, config: LlamaConfig) -> None:
    """
    Initializes the parameters of one module. Children must come before their parents, as in `nn.Module.apply`.

    Embeddings have the scale of the residual stream and linear layers `fan_in^-1/2`. The output of each block is
    divided by `sqrt(2 (L + 1))`, so X keeps its scale through all layers and the plan vectors can match it.
    """
    scale = stream_scale(config)
    residual = scale / (2 * (config.num_hidden_layers + 1)) ** 0.5
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=scale)
    elif isinstance(last := _last_of_block(module), nn.Linear):
        init.normal_(last.weight, std=residual * last.in_features**-0.5)
    elif isinstance(module, PlanTable):
        module.reset_parameters(scale)
    elif isinstance(module, PlanPrior):
        init.zeros_(module.log_aggregate)
    elif isinstance(module, PlanEncoder):
        init.normal_(module.query, std=scale)
        init.normal_(module.readout.weight, std=config.readout_init_scale * config.hidden_size**-0.5)


def _last_of_block(module: nn.Module) -> object:
    """Returns the output projection of an attention or MLP module, found by its name, which all baselines share."""
    return getattr(module, "o_proj", getattr(module, "down_proj", None))


def build_baseline(config: FreeTransformerConfig) -> PreTrainedModel:
    """Builds the baseline: the same Llama, Mistral or Qwen without a plan, initialized in the same way."""
    model = AutoModelForCausalLM.from_config(config.to_llama())
    model.apply(lambda module: init_module(module, model.config))
    return model
