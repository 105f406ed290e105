"""The settings of a run, a class for each section of the file."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError
from transformers import LlamaConfig, PreTrainedConfig

from free_transformer.errors import SettingsError
from free_transformer.files import first_line
from free_transformer.model.configuration import FreeTransformerConfig
from free_transformer.settings.paths import Folder, PathText, SourceList, Sources, absolute_sources
from free_transformer.settings.words import TYPES, either, shown
from free_transformer.settings.yaml_text import dump_yaml

Precision = Literal["fp32", "bf16", "fp16", "auto"]
Schedule = Literal["constant", "linear", "cosine", "cyclical"]
TableOptimizer = Literal["auto", "adamw", "sparse_adam"]
ROPE = {"rope_theta", "rope_scaling"}  # older names of what `rope_parameters` holds
LLAMA_NAMES = {*LlamaConfig.__dataclass_fields__, *FreeTransformerConfig.attribute_map, *ROPE}
SHAPE = {"hidden_dim", "num_layers", "num_heads"}
OF_THE_PLAN = {"latent_dim", "plan_span", "free_bits", "min_bits", "aggregate_weight"}
DECIDED_BY = {"kl_weight": "training.kl_weight", "vocab_size": "data.tokenizer"}  # names of the model, set elsewhere
MAY_CHANGE = {"max_seq_len", "max_position_embeddings", "dropout", "attention_dropout"}  # whatever the weights are
MAX_SEED = 2**63 - 1
MAX_WARMUP, WARMUP_SHARE = 100, 10  # the default warm-up: a tenth of the steps, at most 100


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    other_names: ClassVar[dict[str, str]] = {}  # further names of settings, and the name that each is kept under

    @classmethod
    def renamed(cls, values: dict[Any, Any]) -> dict[Any, Any]:
        """
        The values under the names that settings are kept under.

        Raises:
            ValueError: for a setting that is given under two names.
        """
        given: dict[Any, Any] = {}
        for name in values:
            if (other := given.setdefault(cls.other_names.get(name, name), name)) != name:
                raise ValueError(f"{other} and {name} are two names of one setting; keep one")
        return {kept: values[name] for kept, name in given.items()}

    @model_validator(mode="before")
    @classmethod
    def _fill_empty(cls, values: Any) -> Any:
        """A section with its name alone has its defaults."""
        if values is None:
            return {}
        return cls.renamed(values) if isinstance(values, dict) else values

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes True for 1, and so does pydantic."""
        if isinstance(value, bool) and bool not in leaves(cls.model_fields[str(info.field_name)].annotation):
            raise PydanticCustomError("boolean", "true and false are not allowed")  # `_requirement` says what is
        return value


def leaves(kind: Any) -> set[Any]:
    """The types that an annotation is made of."""
    members = get_args(kind) if get_origin(kind) is not Literal else ()
    return set().union(*map(leaves, members)) if members else {kind}


class ModelSettings(Section):
    """Besides these, every setting of `LlamaConfig` under its own name (rope_parameters, rms_norm_eps, ...)."""

    model_config = ConfigDict(extra="allow", validate_assignment=True, allow_inf_nan=False)
    other_names = {full: short for short, full in FreeTransformerConfig.attribute_map.items()}

    kind: Literal["free", "baseline"] = Field(
        "free", description="Model to train: `free` (with a plan), or `baseline` (the same Llama without a plan)."
    )
    pretrained: PathText | None = Field(
        None,
        description="Folder or Hub name of the model to start from: a Llama, Mistral, Qwen 2, Qwen 3 or Free "
        "Transformer. It decides the shape of the model. Default: new weights.",
    )
    hidden_dim: int = Field(256, ge=2, description="Width of the residual stream, at least 2.")
    num_layers: int = Field(6, ge=1, description="Number of decoder layers, at least 1. The plan enters at half depth.")
    num_heads: int = Field(
        4, ge=1, description="Number of attention heads, at least 1. `hidden_dim / num_heads` must be even."
    )
    latent_dim: int = Field(
        16,
        ge=1,
        description="Number of bits per plan, 1 to 64. The information a plan carries is limited by `free_bits`.",
    )
    plan_span: int | Literal["sequence"] = Field(
        "sequence",
        description="Number of tokens per plan: 1 (the paper), a larger number, or `sequence` (one plan per document "
        "or row).",
    )
    free_bits: float = Field(
        2.0,
        ge=0,
        description="KL in bits per plan that costs nothing, at least 0. A higher value lets plans carry more "
        "information.",
    )
    min_bits: float = Field(
        0.0,
        ge=0,
        description="Minimum KL in bits per plan, from 0 (the paper) to `free_bits`. A plan with less is penalized.",
    )
    aggregate_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the term that makes the aggregate posterior uniform, at least 0. Use 1 together with "
        "`min_bits`; 0 gives the paper's objective.",
    )

    def build(self, **changes: Any) -> FreeTransformerConfig:
        """The model's configuration. `SettingsError` for a name or value that it refuses."""
        values = {**self.model_dump(exclude={"kind", "pretrained"}), **changes}
        _check_rope(values)
        try:
            if self.pretrained is None:
                return FreeTransformerConfig(**values)
            return FreeTransformerConfig.from_pretrained(self.pretrained, **values)
        except (ValueError, OSError) as error:
            raise SettingsError(_explain_config(error, values)) from error

    def adopt(self) -> None:
        """Takes over what a pretrained model decides, if any. `SettingsError` where something else was asked for."""
        if self.pretrained is None:
            return
        try:
            values, _ = PreTrainedConfig.get_config_dict(self.pretrained)
            config = FreeTransformerConfig.from_dict(values)
        except (ValueError, OSError) as error:
            raise SettingsError(f"model.pretrained={self.pretrained}: {first_line(error)}") from error
        brings_plan = values["model_type"] == config.model_type
        fixed = LLAMA_NAMES - MAY_CHANGE | ({"latent_dim"} if brings_plan else set())
        for name in sorted(self.model_fields_set & fixed):
            if (asked := getattr(self, name)) != (known := getattr(config, name, config.rope_parameters)):
                raise SettingsError(f"model.{name}={asked}: {self.pretrained} has {known}; leave it out")
        for name in SHAPE | (OF_THE_PLAN - self.model_fields_set if brings_plan else set()):
            setattr(self, name, getattr(config, name))


def _check_rope(values: dict[str, Any]) -> None:
    """`LlamaConfig` checks the types of its fields, but not of what is inside these."""
    for name in (*ROPE, "rope_parameters"):
        value = values.get(name)
        inside = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        for full, each in inside.items():
            if isinstance(each, bool) and not full.endswith(".truncate"):
                raise SettingsError(f"model.{full}={shown(each)}: must be a number")


class StageSettings(Section):
    """One stage of a curriculum. Settings that are left out have the values of `training`, `model` and `data`."""

    steps: int = Field(
        0,
        ge=0,
        description="Number of optimizer steps of the stage. 0: an equal share of the steps that other stages leave.",
    )
    seq_len: int | None = Field(
        None,
        ge=2,
        description="Tokens per row, from 2 to `training.seq_len`. Shorter rows give more rows per step, with the same "
        "number of tokens. Default: `training.seq_len`.",
    )
    kl_weight: float | None = Field(
        None, ge=0, description="KL weight in this stage, at least 0. Default: `training.kl_weight`."
    )
    free_bits: float | None = Field(
        None, ge=0, description="Free bits per plan in this stage, at least 0. Default: `model.free_bits`."
    )
    data: Sources | None = Field(
        None, description="Training text of this stage, in any form of `data.train`. Default: `data.train`."
    )


class TrainingSettings(Section):
    other_names = {"keep_checkpoints": "save_total"}  # its name in older runs

    max_steps: int = Field(1000, ge=1, description="Number of optimizer steps, at least 1.")
    stages: list[StageSettings] = Field(
        default_factory=list,
        description="Stages of a curriculum, in order, as in `[{seq_len: 64}, {seq_len: 128}, {}]`. Default: one stage "
        "with the settings of the run.",
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        32,
        description="Rows per micro-batch over all processes, at least 1, or `auto`: as many as fit in memory.",
    )
    seq_len: int = Field(256, ge=2, description="Tokens per row, at least 2, including the begin-of-text token.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW, above 0.")
    plan_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of the encoder and the plan table, above 0. Default: `learning_rate`, or ten "
        "times that with `model.pretrained`, where the table's rate follows from it.",
    )
    freeze_first_half: bool = Field(
        False,
        description="Keep the pretrained embeddings and the layers before the plan fixed, which saves time. Needs "
        "`model.pretrained`.",
    )
    lora_rank: int = Field(
        0,
        ge=0,
        description="Rank of LoRA adapters, which are trained in place of the decoder's weights. 0: train the weights. "
        "Needs `model.pretrained`.",
    )
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="Final learning rate of the cosine decay as a share of the peak, 0 to 1."
    )
    warmup_steps: int = Field(
        MAX_WARMUP,
        ge=0,
        description="Number of optimizer steps in which the learning rate rises linearly to its peak; 0: none. "
        "Default: `min(100, max_steps // 10)`.",
    )
    weight_decay: float = Field(
        0.1, ge=0, description="Weight decay of matrices, at least 0. Norms, biases and the plan table have none."
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="Optimizer: `adamw`, or `muon` for the matrices in the blocks with AdamW for the rest."
    )
    table_optimizer: TableOptimizer = Field(
        "auto",
        description="Optimizer of the plan table: `adamw`, `sparse_adam` (updates only the rows of sampled plans), or "
        "`auto` (`sparse_adam` above 4096 rows).",
    )
    muon_learning_rate: float = Field(
        0.02, gt=0, description="Peak learning rate of Muon, above 0. Used with `optimizer=muon`."
    )
    grad_clip: float = Field(1.0, ge=0, description="Maximum gradient norm; 0: no clipping.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Number of micro-batches per optimizer step, at least 1."
    )
    precision: Precision = Field(
        "fp32",
        description="Number format of matmuls: `fp32`, `bf16`, `fp16` (with loss scaling, for a GPU without bf16), or "
        "`auto` (`bf16` where the hardware has it, else `fp32`).",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    compile: bool = Field(
        False,
        description="Compile the model with `torch.compile`. On a CPU the first step then takes a minute or more.",
    )
    device: str = Field("auto", description="Device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` or `mps`.")
    seed: int = Field(
        0, ge=0, le=MAX_SEED, description="Seed of weights, data order and sampled plans, 0 to 2**63 - 1."
    )
    log_every: int = Field(10, ge=1, description="Optimizer steps between lines of `metrics.jsonl`, at least 1.")
    eval_every: int = Field(
        200, ge=0, description="Optimizer steps between evaluations on `data.validation`, and one at the end. 0: never."
    )
    eval_rows: int = Field(256, ge=1, description="Maximum number of held-out rows per evaluation, at least 1.")
    save_every: int = Field(
        200, ge=0, description="Optimizer steps between checkpoints, and one at the end. 0: only at the end."
    )
    save_total: int = Field(
        2,
        ge=1,
        description="Number of newest checkpoints to keep, at least 1. With `keep_best` the best one is kept too.",
    )
    early_stopping: int = Field(
        0,
        ge=0,
        description="Number of consecutive evaluations without a better held-out ELBO after which the run ends. "
        "0: never.",
    )
    keep_best: bool = Field(
        False,
        description="Keep the checkpoint with the best held-out ELBO and write `model/` from it. `early_stopping` "
        "implies it.",
    )
    async_save: bool = Field(
        False, description="Write checkpoints in the background from a copy in memory while training continues."
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="Response to a loss or gradient that is NaN or infinite: `stop` the run, or `skip` the step.",
    )
    max_skipped: int = Field(
        10, ge=0, description="Number of steps that `nonfinite=skip` may skip before the run stops, at least 0."
    )
    kl_weight: float = Field(1.0, ge=0, description="Weight of the KL above the free bits, at least 0.")
    kl_schedule: Schedule = Field(
        "constant",
        description="Schedule of the KL weight from `kl_weight_start` to `kl_weight`: `constant` (always `kl_weight`), "
        "`linear`, `cosine` or `cyclical`.",
    )
    kl_weight_start: float = Field(
        0.0, ge=0, description="Initial KL weight of the schedule, at least 0, below or above `kl_weight`."
    )
    free_bits_schedule: Schedule = Field(
        "constant",
        description="Schedule of the free bits from `free_bits_start` to `model.free_bits`: `constant` (always "
        "`model.free_bits`), `linear`, `cosine` or `cyclical`.",
    )
    free_bits_start: float = Field(
        0.0, ge=0, description="Initial free bits per plan of the schedule, at least `model.min_bits`."
    )
    anneal_steps: int = Field(
        0, ge=0, description="Number of optimizer steps of both schedules. 0: half of `max_steps`."
    )
    anneal_cycles: int = Field(
        4, ge=1, description="Number of cycles of a cyclical schedule within these steps, at least 1."
    )
    prior_rows: int = Field(
        1024,
        ge=0,
        description="Number of training rows from which the aggregate prior over plans is computed at the end. "
        "0: no aggregate prior.",
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="Resume: `auto` (from the newest checkpoint in `run_dir`, if there is one), or `never`."
    )

    @model_validator(mode="after")
    def _fit_warmup(self) -> "TrainingSettings":
        if "warmup_steps" not in self.model_fields_set:
            self.__dict__["warmup_steps"] = min(MAX_WARMUP, self.max_steps // WARMUP_SHARE)
        return self

    @property
    def rows(self) -> int:
        """`batch_size`, where it is decided."""
        assert isinstance(self.batch_size, int), "batch_size=auto is resolved before anything is read"
        return self.batch_size

    @property
    def keeps_best(self) -> bool:
        return self.keep_best or self.early_stopping > 0


class DataSettings(Section):
    train: Sources = Field(
        default_factory=list,
        description="Training text: text files, folders, `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` and `.parquet` "
        "files (each also compressed as `.gz`, `.bz2`, `.xz` or `.zst`), and names of data sets, `name` or "
        "`name:configuration`, with a split as in `name[test]` (default: `train`). The prefix `hub:` marks the name of "
        "a data set. A list uses all of its texts. A mapping such as `{a.jsonl: 3, b.jsonl: 1}` is a mixture, whose "
        "rows are drawn in these shares.",
    )
    validation: SourceList = Field(
        default_factory=list,
        description="Held-out text: a list in the same forms. The default split of a data set is `validation`.",
    )
    tokenizer: PathText = Field(
        "auto",
        description="Tokenizer: `bytes`, or the folder or Hub name of any AutoTokenizer. `auto`: that of "
        "`model.pretrained`, or else `bytes`.",
    )
    column: str = Field(
        "text",
        min_length=1,
        description="Column that holds the text in `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` and `.parquet` files "
        "and in data sets.",
    )
    max_bad_rows: int = Field(
        100,
        ge=0,
        description="Number of rows of a table without text that are skipped before reading fails, at least 0.",
    )
    streaming: bool = Field(
        False, description="Read the text during training. Use it for text that does not fit in memory."
    )
    shuffle_buffer: int = Field(
        10_000, ge=1, description="Number of rows in the shuffle buffer of `streaming`, at least 1."
    )
    workers: int = Field(
        0, ge=0, description="Number of processes that prepare batches. 0: the training process prepares them."
    )


class LoggingSettings(Section):
    tensorboard: bool = Field(
        True, description="Write TensorBoard events to `run_dir/tensorboard`, if TensorBoard is installed."
    )
    wandb: bool = Field(False, description="Log to Weights & Biases. Needs `pip install 'free-transformer-lm[wandb]'`.")
    trackio: bool = Field(
        False, description="Log to trackio on this machine. Needs `pip install 'free-transformer-lm[trackio]'`."
    )
    project: str = Field("free-transformer", description="Project name in Weights & Biases and trackio.")
    sample_every: int = Field(200, ge=0, description="Optimizer steps between text samples. 0: never.")
    sample_tokens: int = Field(120, ge=1, description="Number of tokens per text sample, at least 1.")


class DistributedSettings(Section):
    """For several processes, started by `torchrun`. One process needs none of these settings."""

    fsdp: bool = Field(
        False,
        description="Shard weights, gradients and optimizer state over processes (FSDP). `false`: each process has a "
        "copy (DDP).",
    )
    data: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Number of processes that share each batch, at least 1. `auto`: all processes divided by `tensor`.",
    )
    tensor: int = Field(
        1, ge=1, description="Number of processes that share each matrix, at least 1. Must divide the number of heads."
    )
    replicas: int = Field(
        1,
        ge=1,
        description="Number of copies of the model among the `data` processes, at least 1. Each copy is sharded over "
        "its own processes (hybrid sharding).",
    )
    timeout: float = Field(
        600, gt=0, description="Seconds to wait for another process before all processes stop and name it, above 0."
    )


class Settings(Section):
    run_dir: Folder = Field(Path("runs/free-transformer"), description="Folder of the run.")
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    data: DataSettings = DataSettings()
    logging: LoggingSettings = LoggingSettings()
    distributed: DistributedSettings = DistributedSettings()

    @model_validator(mode="after")
    def _known_tokenizer(self) -> "Settings":
        if self.data.tokenizer == "auto":
            replace_checked(self.data, tokenizer=self.model.pretrained or "bytes")
        return self

    def to_yaml(self) -> str:
        """Text that `load_settings` reads as equal settings, whatever the environment variables are then."""
        return dump_yaml(self.model_dump(mode="json"))

    def with_absolute_paths(self) -> "Settings":
        """A copy that means the same files and folders wherever it is read: relative paths start at this folder."""
        copy = self.model_copy(deep=True)
        replace_checked(copy, run_dir=self.run_dir.absolute())
        data = self.data
        replace_checked(copy.data, train=absolute_sources(data.train), validation=absolute_sources(data.validation))
        for stage in copy.training.stages:
            replace_checked(stage, data=absolute_sources(stage.data))
        if data.tokenizer != "bytes" and Path(data.tokenizer).is_dir():
            replace_checked(copy.data, tokenizer=str(Path(data.tokenizer).absolute()))
        if self.model.pretrained is not None and Path(self.model.pretrained).is_dir():
            replace_checked(copy.model, pretrained=str(Path(self.model.pretrained).absolute()))
        return copy


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def replace_checked(section: Section, **values: Any) -> None:
    """Sets values that are checked already: a dollar sign in them is no variable, and they are not the person's."""
    section.__dict__.update(values)


def _explain_config(error: Exception, values: dict[str, Any]) -> str:
    """The errors of type that `transformers` finds name Python's types; others are ours and name the setting."""
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
