"""
Converts a pretrained model to a Free Transformer: its configuration, and the initialization of the new parts.

It supports models that compute like a Llama: Llama, Mistral with its sliding window, and Qwen 2 and 3, which differ by
a bias or by a norm of queries and keys. With a zero plan vector (R = 0) the logits are those of the pretrained model.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .errors import InputError

if TYPE_CHECKING:
    from .configuration import FreeTransformerConfig
    from .modeling import FreeTransformer

# Properties that the configurations of these models do not state.
SUPPORTED_BASES: dict[str, dict[str, object]] = {
    "llama": {"sliding_window": None},
    "mistral": {},
    "qwen2": {"attention_bias": True, "attention_output_bias": False},
    "qwen3": {"query_key_norm": True},
}
# Defaults for a pretrained model (docs/pretrained.md): initially the plan has no effect. Plan vectors are sums over
# bits, so every bit gets a gradient from half of the texts. The encoder's bits differ between texts.
START = {"table_init": "zero", "code_bits": 1, "readout_init_scale": 1.0}
PROBE_TOKENS = 64


def convert_config(values: dict[str, object], known: set[str]) -> dict[str, object]:
    """
    Converts the `config.json` of a pretrained model to settings of a Free Transformer whose plan has no effect yet.

    Args:
        known: names of the settings of a Free Transformer.

    Raises:
        ValueError: for a model of another kind.
    """
    kind = values.get("model_type", "")
    if kind not in SUPPORTED_BASES:
        raise InputError(f"model_type={kind!r}: a Free Transformer can be built from {', '.join(SUPPORTED_BASES)}")
    own = CONFIG_MAPPING[kind].from_dict(dict(values))
    adopted = {
        name: value
        for name, value in own.to_dict().items()
        if name in known - {"architectures", "auto_map", "model_type"}
    }
    adopted["sliding_window"] = _uniform_window(own)
    return {**adopted, **SUPPORTED_BASES[kind], **START, "model_type": "free_transformer"}


def _uniform_window(config: PreTrainedConfig) -> int | None:
    """Returns the sliding window shared by all layers of a pretrained model, or None if they have none."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise InputError(
            f"layer_types: the layers of this {config.model_type} differ ({', '.join(sorted(kinds))}); a Free "
            "Transformer can be built from models with one sliding window for all layers, or none"
        )
    return None if kinds == {"full_attention"} else getattr(config, "sliding_window", None)


def plain_config(config: "FreeTransformerConfig") -> PreTrainedConfig:
    """Returns the configuration of the same model without a plan: Llama, or the model type that has such layers."""
    kind, options = "llama", {}
    if config.query_key_norm:
        kind = "qwen3"
    elif config.attention_bias and config.attention_output_bias is False:
        kind = "qwen2"
    if config.sliding_window is not None and kind != "llama":
        options = {"use_sliding_window": True, "max_window_layers": 0}
    elif config.sliding_window is not None:
        kind = "mistral"
        if config.attention_bias or config.mlp_bias:
            raise InputError(
                f"sliding_window={config.sliding_window} with attention_bias or mlp_bias: no baseline supports both; "
                "remove one of them"
            )
    plain = CONFIG_MAPPING[kind]
    kept = {name: value for name, value in config.to_dict().items() if name in plain.__dataclass_fields__}
    return plain(**{name: kept[name] for name in kept if name not in ("architectures", "model_type")}, **options)


@torch.no_grad()
def warm_start(model: "FreeTransformer") -> None:
    """
    Initializes the new parts of a pretrained model. The encoder becomes a copy of the layer that receives the plan.

    An encoder with random weights would hardly distinguish texts, since X is dominated by a few directions and by the
    first token. The output of a copied layer varies thirty times more between texts.
    """
    layer: Any = model.model.layers[model.config.plan_layer]
    encoder: Any = model.encoder
    if not all(parameter.is_floating_point() and not parameter.is_meta for parameter in layer.parameters()):
        return  # weights that are quantized or not loaded yet cannot be copied
    encoder.attention.load_state_dict(layer.self_attn.state_dict())
    encoder.mlp.load_state_dict(layer.mlp.state_dict())
    encoder.query_norm.weight.copy_(layer.input_layernorm.weight)
    encoder.key_value_norm.weight.copy_(layer.input_layernorm.weight)
    encoder.mlp_norm.weight.copy_(layer.post_attention_layernorm.weight)
    model.config.stream_scale = measured_scale(model)


@torch.no_grad()
def measured_scale(model: "FreeTransformer") -> float:
    """
    Measures the root mean square of X, to two digits.

    It is the median over tokens, since the first token and a few others are far larger. Random tokens suffice, because
    the scale depends little on the text.
    """
    states: Tensor = model.lower_layers(random_tokens(model)).hidden_states[0]
    return float(f"{states.float().square().mean(-1).sqrt().median().item():.2g}")


def random_tokens(model: "FreeTransformer") -> Tensor:
    """Returns a text of random tokens, (1, 64), the same for every model with this vocabulary size."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, PROBE_TOKENS), generator=generator).to(model.device)


@dataclass
class NewPart:
    """A part that the pretrained model does not have, its number of parameters, and its initialization."""

    name: str
    parameters: int
    start: str


def new_parts(model: "FreeTransformer") -> list[NewPart]:
    """Returns the parts that have to be trained."""
    starts = {
        "encoder.query": "random",
        "encoder": f"a copy of layer {model.config.plan_layer}, attention and MLP, with its norms",
        "encoder.readout": "random",
        "plan_table": f"zero, {len(model.plan_table.weight):,} vectors: plans have no effect yet",
    }
    counts = dict.fromkeys(starts, 0)
    for name, parameter in model.named_parameters():
        part = max((part for part in starts if f"{name}.".startswith(f"{part}.")), key=len, default=None)
        if part is not None:
            counts[part] += parameter.numel()
    return [NewPart(part, counts[part], start) for part, start in starts.items()]
