"""The configuration of a Free Transformer: a Llama's, plus the plan."""

import difflib
import functools
import inspect
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, LlamaConfig, PreTrainedConfig

from .errors import InputError
from .hub_code import write_code
from .plan_text import check_plan_names
from .warm_start import convert_config, plain_config

logger = logging.getLogger(__name__)

MAX_CODE_BITS = 20  # 2^20 rows of width 1024 in fp32 are already 4 GiB
PAPER_CODE_BITS = 16
EXACT_GRADIENT_BITS = 10
PLAN_GRADIENTS = ("exact", "sampled", "auto")
BYTE_VOCABULARY = 259  # of `byte_tokenizer`: 256 bytes and three special tokens
BYTE_SPECIAL_TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
NOT_GIVEN = -1  # default of a special token that the caller does not set
TABLE_INITS = ("bit_linear", "normal", "zero")
OBJECTIVE = {"free_bits": 2.5, "min_bits": 2.0, "aggregate_weight": 1.0}  # effective with one plan per sequence
PAPER: dict[str, float] = {
    "latent_dim": 16,
    "plan_span": 1,
    "free_bits": 0.5,
    "min_bits": 0.0,
    "aggregate_weight": 0.0,
}

# Names that `transformers` accepts in addition to the fields of a configuration, mostly from files of older versions.
_ALSO_ACCEPTED = {
    *("torch_dtype", "num_labels", "rope_theta", "rope_scaling", "name_or_path", "output_attentions"),
    *("attn_implementation", "experts_implementation", "per_layer_config", "model_type", "return_unused_kwargs"),
    *("_name_or_path", "_commit_hash"),  # from `to_dict`
    *("auto_map", "quantization_config"),
    *GenerationConfig._get_default_generation_params(),
}


def plan_objective(plan_span: int | str, latent_dim: int, given: Mapping[str, float]) -> dict[str, float]:
    """
    Completes the weights of the objective with defaults.

    The defaults for one plan per sequence make each plan carry 2 to 2.5 bits and make all plans equally common
    (docs/plan.md). The other defaults are the paper's.
    """
    defaults = OBJECTIVE if plan_span == "sequence" else {name: PAPER[name] for name in OBJECTIVE}
    found = {**defaults, **given}
    if "min_bits" not in given:
        found["min_bits"] = min(found["min_bits"], found["free_bits"], latent_dim)
    return found


def _one_line_errors(config_class: Any) -> Any:
    """Converts the type and value errors that `strict` raises into one-line `InputError`s."""
    construct = config_class.__init__

    @functools.wraps(construct)
    def __init__(self: object, *args: object, **kwargs: object) -> None:
        try:
            construct(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise InputError(" ".join(str(error.__cause__ or error).split())) from error

    config_class.__init__ = __init__
    return config_class


@_one_line_errors
@strict
class FreeTransformerConfig(LlamaConfig):
    r"""
    All fields of `LlamaConfig`, under its names or the shorter ones of `attribute_map`, and the fields of the plan.

    Attributes:
        latent_dim: bits per plan, H, 1 to 64. `free_bits` limits the information in a plan. 8 bits were enough in all
            measurements; large models often use 16 to 64.
        plan_span: tokens that one plan covers: `"sequence"` (one plan per document, the default), n, or 1 (the paper).
        code_bits: bits per group; each group has `2^code_bits` rows of the codebook. Default: one group up to 16
            bits (the paper), else groups of 8. The last group may be shorter.
        free_bits: κ, the KL in bits per plan that is not penalized (paper: 1/4 to 4). Default: 2.5 with one plan per
            sequence, else 0.5.
        kl_weight: weight of the KL beyond the free bits.
        min_bits: minimum bits of information per plan, at most `free_bits`; 0 in the paper. Default: 2 with one plan
            per sequence (less with fewer bits), else 0.
        aggregate_weight: weight of the divergence of the aggregate posterior from the uniform prior; 0 in the paper.
            It makes every plan from the prior one that texts use. Use it with `min_bits`. Default: 1 with one plan
            per sequence, else 0.
        injection_layers: layers whose keys and values receive the plan, default `[num_layers // 2]`. Earlier layers
            are not allowed, since the encoder reads their output. `"all"` selects all layers from there on.
        plan_gradient: `"exact"` over all codes, `"sampled"` (2H rows, unbiased), or `"auto"`, which selects
            `"exact"` up to 10 bits per group and `"sampled"` above.
        plan_chunk_bytes: maximum memory for the gradient of the plan, in bytes. It is computed in chunks of this size.
        table_init: initialization of the codebook: `"bit_linear"` (each bit adds or subtracts its own vector),
            `"normal"` (independent rows) or `"zero"` (the plan has no effect, for pretrained models).
        readout_init_scale: initial scale of the encoder's readout, relative to `fan_in^-1/2`.
        stream_scale: measured root mean square of X, for example of a pretrained model. It scales the initialization
            of the codebook and its learning rate. None: 1, or `hidden_dim^-1/2` with tied embeddings.
        query_key_norm: whether to normalize each head's queries and keys, as in Qwen 3.
        sliding_window: number of tokens that a token attends to in each decoder layer, itself included, as in
            `MistralConfig`. None: no limit. Distances are in columns of the input, padding included. The encoder
            always reads the whole text.
        plan_strength: factor of the plan's vectors R, at least 0. 1: as trained; 0: R = 0. A factor above 1 makes the
            text follow its plan more closely, which helps long texts at a low temperature (docs/long-text.md).
        attention_output_bias: whether attention's output has a bias, default `attention_bias`. Qwen 2 has only the
            other biases.
        encoder_class: name of the class of a custom encoder; set by the model so that loading can ask for it.
        plan_names: names of plans, such as `{"recipe": "01101001"}`, accepted wherever a plan is given as text.
        bos_token_id, eos_token_id, pad_token_id: special tokens. Default: those of the byte tokenizer (256, 257, 258)
            with its vocabulary of 259 (the default), else None.

    Raises:
        ValueError: for an unknown name (the message suggests the nearest known one) or a value out of range.
    """

    model_type = "free_transformer"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_dim": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "ffn_hidden_dim": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "tie_embeddings": "tie_word_embeddings",
        "dropout": "attention_dropout",
    }

    # Output fields, besides the loss, that a Trainer leaves out of its predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *("cache", "past_key_values", "plan", "plan_logits", "plan_mask"),
        *("reconstruction", "kl", "hinge", "kl_per_bit"),
    ]

    vocab_size: int = BYTE_VOCABULARY
    bos_token_id: int | None = NOT_GIVEN
    eos_token_id: int | list[int] | None = NOT_GIVEN
    pad_token_id: int | None = NOT_GIVEN
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    latent_dim: int = 8
    plan_span: int | str = "sequence"
    code_bits: int | None = None
    free_bits: float | int | None = None
    kl_weight: float | int = 1.0
    min_bits: float | int | None = None
    aggregate_weight: float | int | None = None
    injection_layers: list[int] | str | None = None
    plan_gradient: str = "auto"
    plan_chunk_bytes: int = 24 * 2**20
    table_init: str = "bit_linear"
    readout_init_scale: float | int = 0.1
    stream_scale: float | int | None = None
    query_key_norm: bool = False
    sliding_window: int | None = None
    plan_strength: float | int = 1.0
    attention_output_bias: bool | None = None
    encoder_class: str | None = None
    plan_names: dict[str, str] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        if unknown := set(kwargs) - _ALSO_ACCEPTED:
            raise InputError(self._unknown_names(unknown))
        if self.num_hidden_layers < 1 or self.num_attention_heads < 1 or self.hidden_size < 1 or self.vocab_size < 1:
            raise InputError(
                f"hidden_dim={self.hidden_size}, num_layers={self.num_hidden_layers}, "
                f"num_heads={self.num_attention_heads} and vocab_size={self.vocab_size} must all be at least 1"
            )
        for name, token in BYTE_SPECIAL_TOKENS.items():
            if getattr(self, name) == NOT_GIVEN:
                setattr(self, name, token if self.vocab_size == BYTE_VOCABULARY else None)
        if self.intermediate_size is None:  # Llama's 8/3, rounded up to a multiple of 32
            self.intermediate_size = -(-8 * self.hidden_size // 96) * 32
        if self.injection_layers is None:
            self.injection_layers = [self.plan_layer]
        elif self.injection_layers == "all":
            self.injection_layers = list(range(self.plan_layer, self.num_hidden_layers))
        given = {name: getattr(self, name) for name in OBJECTIVE if getattr(self, name) is not None}
        for name, value in plan_objective(self.plan_span, self.latent_dim, given).items():
            setattr(self, name, value)
        if self.code_bits is None:
            self.code_bits = self.latent_dim if self.latent_dim <= PAPER_CODE_BITS else 8
        if self.hidden_size % self.num_attention_heads:
            raise InputError(f"hidden_dim={self.hidden_size} is not a multiple of num_heads={self.num_attention_heads}")
        self._check_values()
        if self.plan_gradient == "auto":
            self.plan_gradient = "exact" if max(self.group_bits) <= EXACT_GRADIENT_BITS else "sampled"
        super().__post_init__(**kwargs)
        self._check_heads()

    @property
    def plan_layer(self) -> int:
        """K, the first layer that can receive the plan: `num_layers // 2`."""
        return self.num_hidden_layers // 2

    @property
    def group_bits(self) -> list[int]:
        """Bits of each group of the plan; the last group may have fewer than `code_bits`."""
        assert self.code_bits is not None
        full, rest = divmod(self.latent_dim, self.code_bits)
        return [self.code_bits] * full + [rest] * (rest > 0)

    @classmethod
    def paper(cls, **changes: object) -> "FreeTransformerConfig":
        """Returns the paper's settings: 16 bits per plan, one plan per token, and the paper's objective."""
        return cls(**{**PAPER, **changes})

    def to_llama(self) -> PreTrainedConfig:
        """Returns the configuration of the same Llama (or Qwen) without a plan, which is the baseline."""
        return plain_config(self)

    @classmethod
    def get_config_dict(cls, *args: object, **kwargs: object) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in `transformers`, but converts the configuration of a pretrained model without a plan."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return cls._adopted(config_dict), kwargs

    @classmethod
    def _adopted(cls, config_dict: dict[str, object]) -> dict[str, object]:
        if config_dict.get("model_type", cls.model_type) in (cls.model_type, FreeTransformerConfig.model_type):
            return config_dict
        return convert_config(config_dict, cls._known_names() | _ALSO_ACCEPTED)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: object) -> Any:
        """As in `transformers`, but drops unknown names in a *file* with a warning."""
        known = cls._known_names() | _ALSO_ACCEPTED
        config_dict = cls._adopted(config_dict)
        unknown = {name for name in config_dict if name not in known and not name.startswith("_")}
        if unknown:
            logger.warning("config.json: ignored %s", ", ".join(sorted(unknown)))
        # Apply the caller's changes before defaults that depend on them. The loader handles dtypes.
        changes = {name: kwargs.pop(name) for name in cls._known_names() & kwargs.keys() - {"dtype"}}
        config_dict = {k: v for k, v in config_dict.items() if k not in unknown and not k.startswith("_")}
        return super().from_dict({**config_dict, **changes}, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: object, **kwargs: object) -> None:
        """As in `transformers`; if `auto_map` names the model's code, copies that too (see `hub_code`)."""
        if hasattr(self, "auto_map") and not write_code(Path(save_directory)):
            del self.auto_map
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoConfig") -> None:
        """As in `transformers`, for subclasses only: the code of this class is saved with its model's (`hub_code`)."""
        if cls is not FreeTransformerConfig:
            super().register_for_auto_class(auto_class)

    @classmethod
    def _known_names(cls) -> set[str]:
        return set(inspect.signature(cls.__init__).parameters) | set(cls.__dataclass_fields__) | set(cls.attribute_map)

    @classmethod
    def _unknown_names(cls, names: set[str]) -> str:
        known = sorted(name for name in cls._known_names() if name not in ("self", "kwargs", "args"))
        lines = []
        for name in sorted(names):
            near = difflib.get_close_matches(name, known, n=1)
            lines.append(f"unknown setting {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        return "; ".join(lines)

    def _check_values(self) -> None:
        assert self.code_bits is not None and self.injection_layers is not None
        assert self.free_bits is not None and self.min_bits is not None and self.aggregate_weight is not None
        layers = range(self.plan_layer, self.num_hidden_layers)
        span = self.plan_span
        checks = [
            (self.latent_dim >= 1, f"latent_dim={self.latent_dim}: at least 1 bit"),
            (
                1 <= self.code_bits <= MAX_CODE_BITS,
                f"code_bits={self.code_bits}: 1 to {MAX_CODE_BITS}, the codebook has 2^code_bits rows per group",
            ),
            (
                span == "sequence" or (isinstance(span, int) and not isinstance(span, bool) and span >= 1),
                f"plan_span={span!r}: a number of tokens, at least 1, or 'sequence'",
            ),
            (self.free_bits >= 0, f"free_bits={self.free_bits}: at least 0 bits"),
            (self.kl_weight >= 0, f"kl_weight={self.kl_weight}: at least 0"),
            (
                0 <= self.min_bits <= min(self.free_bits, self.latent_dim),
                f"min_bits={self.min_bits}: 0 to free_bits={self.free_bits}, and at most latent_dim={self.latent_dim}",
            ),
            (self.aggregate_weight >= 0, f"aggregate_weight={self.aggregate_weight}: at least 0"),
            (self.plan_gradient in PLAN_GRADIENTS, f"plan_gradient={self.plan_gradient!r}: one of {PLAN_GRADIENTS}"),
            (self.plan_chunk_bytes >= 1, f"plan_chunk_bytes={self.plan_chunk_bytes}: at least 1"),
            (self.table_init in TABLE_INITS, f"table_init={self.table_init!r}: one of {TABLE_INITS}"),
            (
                len(self.injection_layers) > 0 and all(layer in layers for layer in self.injection_layers),
                f"injection_layers={self.injection_layers}: layers from {layers.start} to {layers.stop - 1}, or 'all'",
            ),
            (
                self.sliding_window is None or self.sliding_window >= 1,
                f"sliding_window={self.sliding_window}: a number of tokens, at least 1, or None for all tokens",
            ),
            (
                0 <= self.plan_strength < math.inf,
                f"plan_strength={self.plan_strength}: a number, at least 0; 1 applies plans as trained",
            ),
        ]
        for passed, message in checks:
            if not passed:
                raise InputError(message)
        check_plan_names(self.plan_names or {}, self.latent_dim)

    def _check_heads(self) -> None:
        if self.head_dim is not None and self.head_dim % 2:
            raise InputError(
                f"hidden_dim={self.hidden_size} with num_heads={self.num_attention_heads} gives heads of "
                f"{self.head_dim}: rotary positions need an even size"
            )
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise InputError(f"num_heads={self.num_attention_heads} is not a multiple of {self.num_key_value_heads=}")
