"""Settings of the model."""

import re
from typing import Literal

from pydantic import ConfigDict, Field, model_validator
from transformers import LlamaConfig, PreTrainedConfig

from free_transformer.errors import SettingsError
from free_transformer.files import first_line
from free_transformer.model.configuration import OBJECTIVE, PAPER, FreeTransformerConfig, plan_objective
from free_transformer.settings.paths import PathText
from free_transformer.settings.section import Section
from free_transformer.settings.words import TYPES, either, shown

ROPE = {"rope_theta", "rope_scaling"}  # older names of values in `rope_parameters`
LLAMA_NAMES = {*LlamaConfig.__dataclass_fields__, *FreeTransformerConfig.attribute_map, *ROPE}
SHAPE = {"hidden_dim", "num_layers", "num_heads"}
WINDOW = {"sliding_window"}
OF_THE_PLAN = {"latent_dim", "plan_span", "free_bits", "min_bits", "aggregate_weight"}
DECIDED_BY = {
    "kl_weight": "training.kl_weight",
    "vocab_size": "data.tokenizer",
}  # model settings that are set elsewhere
MAY_CHANGE = {
    "max_seq_len",
    "max_position_embeddings",
    "dropout",
    "attention_dropout",
}  # may differ from the pretrained configuration


class ModelSettings(Section):
    """Also accepts every setting of `LlamaConfig` under its own name (rope_parameters, rms_norm_eps, ...)."""

    model_config = ConfigDict(extra="allow", validate_assignment=True, allow_inf_nan=False)
    other_names = {full: short for short, full in FreeTransformerConfig.attribute_map.items()}

    kind: Literal["free", "baseline"] = Field(
        "free", description="Model to train: `free` (with a plan), or `baseline` (the same Llama without a plan)."
    )
    pretrained: PathText | None = Field(
        None,
        description="Folder or Hub name of the model to start from: a Llama, Mistral, Qwen 2, Qwen 3 or Free "
        "Transformer. It determines the shape of the model. Default: new weights.",
    )
    hidden_dim: int = Field(
        FreeTransformerConfig.hidden_size, ge=2, description="Width of the residual stream, at least 2."
    )
    num_layers: int = Field(
        FreeTransformerConfig.num_hidden_layers,
        ge=1,
        description="Number of decoder layers, at least 1. The plan enters at half depth.",
    )
    num_heads: int = Field(
        FreeTransformerConfig.num_attention_heads,
        ge=1,
        description="Number of attention heads, at least 1. `hidden_dim / num_heads` must be even.",
    )
    sliding_window: int | None = Field(
        FreeTransformerConfig.sliding_window,
        ge=1,
        description="Number of tokens that a token attends to in each decoder layer, itself included, at least 1. The "
        "encoder reads the whole row. A window of `training.seq_len` or more affects only longer texts. Default: all "
        "tokens, or the window of `pretrained`.",
    )
    preset: Literal["steering", "paper"] = Field(
        "steering",
        description="Defaults of the plan: `steering` (8 bits, one plan per sequence, uniform use of the plans) or "
        "`paper` (16 bits, one plan per token, the paper's objective). Explicit settings take precedence.",
    )
    latent_dim: int = Field(
        FreeTransformerConfig.latent_dim,
        ge=1,
        description="Number of bits per plan, 1 to 64. The information a plan carries is limited by `free_bits`.",
    )
    plan_span: int | Literal["sequence"] = Field(
        FreeTransformerConfig.plan_span,  # type: ignore[arg-type]
        description="Number of tokens per plan: 1 (the paper), a larger number, or `sequence` (one plan per document "
        "or row).",
    )
    free_bits: float = Field(
        OBJECTIVE["free_bits"],
        ge=0,
        description="KL in bits per plan that is not penalized, at least 0. A higher value lets plans carry more "
        "information. Default: 2.5 with one plan per sequence, else 0.5.",
    )
    min_bits: float = Field(
        OBJECTIVE["min_bits"],
        ge=0,
        description="Minimum KL in bits per plan, from 0 (the paper) to `free_bits`. A plan with less is penalized. "
        "Default: 2.0 with one plan per sequence, else 0.",
    )
    aggregate_weight: float = Field(
        OBJECTIVE["aggregate_weight"],
        ge=0,
        description="Weight of the term that makes the aggregate posterior uniform, at least 0. Use 1 together with "
        "`min_bits`; 0 gives the paper's objective. Default: 1 with one plan per sequence, else 0.",
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("preset") == "paper":
            return {**PAPER, **values}
        return values

    @model_validator(mode="after")
    def _default_objective(self) -> "ModelSettings":
        """Fills in defaults that depend on other settings."""
        given = {name: getattr(self, name) for name in OBJECTIVE if name in self.model_fields_set}
        self.__dict__.update(plan_objective(self.plan_span, self.latent_dim, given))
        return self

    def build(self, **changes: object) -> FreeTransformerConfig:
        """Builds the model's configuration. Raises `SettingsError` for an invalid name or value."""
        values = {**self.model_dump(exclude={"kind", "pretrained", "preset"}), **changes}
        _check_rope(values)
        try:
            if self.pretrained is None:
                return FreeTransformerConfig(**values)
            return FreeTransformerConfig.from_pretrained(self.pretrained, **values)
        except (ValueError, OSError) as error:
            raise SettingsError(_explain_config(error, values)) from error

    def adopt(self) -> None:
        """Adopts the settings of a pretrained model, if any. Raises `SettingsError` for contradictory settings."""
        if self.pretrained is None:
            return
        try:
            values, _ = PreTrainedConfig.get_config_dict(self.pretrained)
            config = FreeTransformerConfig.from_dict(values)
        except (ValueError, OSError) as error:
            raise SettingsError(f"model.pretrained={self.pretrained}: {first_line(error)}") from error
        brings_plan = values["model_type"] == config.model_type
        fixed = LLAMA_NAMES - MAY_CHANGE | ({"latent_dim"} if brings_plan else set())
        if self.kind == "baseline":  # a baseline is loaded unchanged
            fixed |= WINDOW
        for name in sorted(self.model_fields_set & fixed):
            if (asked := getattr(self, name)) != (known := getattr(config, name, config.rope_parameters)):
                raise SettingsError(f"model.{name}={asked}: {self.pretrained} has {known}; remove this setting")
        open_to_both = WINDOW | (OF_THE_PLAN if brings_plan else set())
        for name in SHAPE | (open_to_both - self.model_fields_set):
            setattr(self, name, getattr(config, name))


def _check_rope(values: dict[str, object]) -> None:
    """Rejects booleans inside RoPE settings, which `LlamaConfig` does not check."""
    for name in (*ROPE, "rope_parameters"):
        value = values.get(name)
        inside = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        for full, each in inside.items():
            if isinstance(each, bool) and not full.endswith(".truncate"):
                raise SettingsError(f"model.{full}={shown(each)}: must be a number")


def _explain_config(error: Exception, values: dict[str, object]) -> str:
    """Rephrases type errors of `transformers`, which name Python types. Other errors already name the setting."""
    found = re.match(
        r"Field '(\w+)' (?:with value .* doesn't match any type in \((?P<many>.*)\)\. |expected (?P<one>\w+),)",
        str(error),
    )
    if not found:
        return f"model: {first_line(error)}"
    name = ModelSettings.other_names.get(found[1], found[1])
    kinds = re.findall(r"\b(int|float|str|bool|list)\b", found["many"] or found["one"])
    words = {**TYPES, "float": "a float such as 1.0"}
    allowed = dict.fromkeys(words[kind] for kind in kinds)
    return f"model.{name}={shown(values.get(name))}: must be {either(list(allowed))}"
