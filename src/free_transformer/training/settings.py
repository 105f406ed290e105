"""The settings of a run: YAML, dotted overrides, and errors that a person can act on."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import LlamaConfig, PreTrainedConfig

from free_transformer.config import FreeTransformerConfig
from free_transformer.errors import SettingsError
from free_transformer.files import first_line

Precision = Literal["fp32", "bf16", "fp16", "auto"]
Schedule = Literal["constant", "linear", "cosine", "cyclical"]
TableOptimizer = Literal["auto", "adamw", "sparse_adam"]
ROPE = {"rope_theta", "rope_scaling"}  # older names of what `rope_parameters` holds
LLAMA_NAMES = {*LlamaConfig.__dataclass_fields__, *FreeTransformerConfig.attribute_map, *ROPE}
SHAPE = {"hidden_dim", "num_layers", "num_heads"}
OF_THE_PLAN = {"latent_dim", "plan_span", "free_bits", "min_bits", "aggregate_weight"}
DECIDED_BY = {"kl_weight": "training.kl_weight", "vocab_size": "data.tokenizer"}  # names of the model, set elsewhere
MAY_CHANGE = {"max_seq_len", "max_position_embeddings", "dropout", "attention_dropout"}  # whatever the weights are
Sources = list[str] | dict[str, Annotated[float, Field(gt=0)]]  # all texts of several, or shares of a mixture
MEMBER = re.compile(r"(constrained-)?int|(literal|function|list|dict).*\[.*")  # of a union, in pydantic's words


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: `1e-3` is one, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+0123456789.")
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class ModelSettings(Section):
    """Besides these, every setting of `LlamaConfig` under its own name (rope_parameters, rms_norm_eps, ...)."""

    model_config = ConfigDict(extra="allow", validate_assignment=True, allow_inf_nan=False)

    kind: Literal["free", "baseline"] = Field("free", description="free, or baseline: the same Llama without a plan")
    pretrained: str | None = Field(
        None,
        description="folder, or name on the hub, of a Llama, Mistral, Qwen 2 or 3 to start from, or of a Free "
        "Transformer; its shape is then the model's",
    )
    hidden_dim: int = Field(256, ge=2, description="width of the residual stream")
    num_layers: int = Field(6, ge=1, description="decoder layers; the plan enters at half depth")
    num_heads: int = Field(4, ge=1, description="attention heads; hidden_dim / num_heads must be even")
    latent_dim: int = Field(16, ge=1, description="bits of one plan, 1 to 64; free_bits bounds what it may know")
    plan_span: int | Literal["sequence"] = Field(
        "sequence", description="tokens that a plan covers: 1 (the paper), n, or sequence (a document or window)"
    )
    free_bits: float = Field(2.0, ge=0, description="KL in bits per plan that costs nothing; higher uses the plan more")
    min_bits: float = Field(0.0, ge=0, description="bits that each plan must spend, up to free_bits; 0 is the paper")
    aggregate_weight: float = Field(
        0.0,
        ge=0,
        description="draws all texts' plans together to the uniform prior; 1 with min_bits, 0 the paper",
    )

    def build(self, **changes: Any) -> FreeTransformerConfig:
        """The model's configuration. `SettingsError` for a name or value that it refuses."""
        values = {**self.model_dump(exclude={"kind", "pretrained"}), **changes}
        try:
            if self.pretrained is None:
                return FreeTransformerConfig(**values)
            return FreeTransformerConfig.from_pretrained(self.pretrained, **values)
        except (ValueError, OSError) as error:
            raise SettingsError(f"model: {error}") from error

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


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StageSettings(Section):
    """A part of a curriculum. What it leaves out is as `training`, `model` and `data` say."""

    steps: int = Field(0, ge=0, description="optimizer steps of the stage; 0 for an equal part of those that are left")
    seq_len: int | None = Field(
        None, ge=2, description="tokens of a row, up to training.seq_len; a step then has more rows, the same tokens"
    )
    kl_weight: float | None = Field(None, ge=0, description="training.kl_weight of the stage")
    free_bits: float | None = Field(None, ge=0, description="model.free_bits of the stage")
    data: Sources | None = Field(None, description="data.train of the stage, such as simple texts first")

    _sources = field_validator("data", mode="before")(_one_or_many)


class TrainingSettings(Section):
    max_steps: int = Field(1000, ge=1, description="optimizer steps")
    stages: list[StageSettings] = Field(
        default_factory=list,
        description="a curriculum: one stage after the other, as in [{seq_len: 64}, {seq_len: 128}, {}]",
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        32, description="rows of one micro-batch, over all processes; auto: the most that fit the memory"
    )
    seq_len: int = Field(256, ge=2, description="tokens of a row, begin-of-text included")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    plan_learning_rate: float | None = Field(
        None,
        gt=0,
        description="that of the encoder and the plan's table; default learning_rate, or ten times it where "
        "model.pretrained brings the rest",
    )
    freeze_first_half: bool = Field(
        False, description="leave the embeddings and layers before the plan as model.pretrained brings them: less time"
    )
    lora_rank: int = Field(
        0, ge=0, description="rank of LoRA adapters in place of the decoder's own weights; 0 trains those"
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="what the cosine ends at, as a share of the peak")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.1, ge=0, description="decay of weight matrices; norms, biases and tables have none")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw; or muon for the matrices inside the blocks, with AdamW for the rest"
    )
    table_optimizer: TableOptimizer = Field(
        "auto",
        description="adamw; or sparse_adam, which moves the rows of drawn plans alone; auto: so above 4096 rows",
    )
    muon_learning_rate: float = Field(0.02, gt=0, description="peak learning rate of Muon")
    grad_clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 does not clip")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches of an optimizer step")
    precision: Precision = Field(
        "fp32",
        description="fp32; bf16; fp16 (a GPU without bf16, with loss scaling); auto: bf16 where the hardware has it",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more time")
    compile: bool = Field(False, description="torch.compile; on a CPU the first step then takes a minute or more")
    device: str = Field("auto", description="auto (a GPU where there is one), cpu, cuda, cuda:1, mps")
    seed: int = Field(0, description="seed of the weights, the order of the data and the plans")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    eval_every: int = Field(200, ge=0, description="steps between validations; 0 for none")
    eval_rows: int = Field(256, ge=1, description="held-out rows of a validation")
    save_every: int = Field(200, ge=0, description="steps between checkpoints; 0 for the last alone")
    save_total: int = Field(
        2,
        ge=1,
        description="checkpoints that stay on disk, besides the best where that is kept",
        validation_alias=AliasChoices("save_total", "keep_checkpoints"),  # its name in older runs
    )
    early_stopping: int = Field(
        0, ge=0, description="validations without a better held-out ELBO that end the run; 0 never"
    )
    keep_best: bool = Field(
        False,
        description="keep the checkpoint with the best held-out ELBO, and write model/ from it; early_stopping does",
    )
    async_save: bool = Field(False, description="write checkpoints while training goes on, from a copy in memory")
    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="what a loss or gradient that is no number does: stop the run, or skip that step"
    )
    max_skipped: int = Field(10, ge=0, description="steps that skip may leave out before the run stops all the same")
    kl_weight: float = Field(1.0, ge=0, description="weight of the KL beyond the free bits")
    kl_schedule: Schedule = Field(
        "constant", description="way of kl_weight from kl_weight_start: constant, linear, cosine or cyclical"
    )
    kl_weight_start: float = Field(
        0.0, ge=0, description="where that begins: below kl_weight to go up, above to go down"
    )
    free_bits_schedule: Schedule = Field(
        "constant", description="way of model.free_bits from free_bits_start: constant, linear, cosine or cyclical"
    )
    free_bits_start: float = Field(0.0, ge=0, description="where that begins")
    anneal_steps: int = Field(0, ge=0, description="steps until both have arrived; 0 for half of max_steps")
    anneal_cycles: int = Field(4, ge=1, description="cycles of a cyclical schedule within these steps")
    prior_rows: int = Field(
        1024, ge=0, description="training rows whose plans the aggregate prior is gathered from at the end; 0 for none"
    )
    resume: str = Field("auto", description="auto (from the newest checkpoint of run_dir, if any), or never")

    @property
    def rows(self) -> int:
        """`batch_size`, where it is decided."""
        assert isinstance(self.batch_size, int), "batch_size=auto is resolved before anything is read"
        return self.batch_size

    @property
    def keeps_best(self) -> bool:
        return self.keep_best or self.early_stopping > 0

    @field_validator("resume")
    @classmethod
    def _known_resume(cls, value: str) -> str:
        if value not in ("auto", "never"):
            raise ValueError(f"{value!r}: auto or never")
        return value


class DataSettings(Section):
    train: Sources = Field(
        default_factory=list,
        description="text files, folders, .jsonl or .parquet files, or names of data sets (name or name:config); or a "
        "mixture, {a.jsonl: 3, b.jsonl: 1}, whose rows are drawn in these shares",
    )
    validation: list[str] = Field(default_factory=list, description="held-out text, of the same kinds")
    tokenizer: str = Field(
        "auto",
        description="bytes, the folder of any AutoTokenizer, or its name on the hub; auto: model.pretrained's, "
        "without one bytes",
    )
    column: str = Field("text", description="column of the text in .jsonl, .parquet and data sets")
    streaming: bool = Field(False, description="read while training, for text that does not fit in memory")
    shuffle_buffer: int = Field(10_000, ge=1, description="rows that streaming shuffles among")
    workers: int = Field(0, ge=0, description="processes that prepare batches ahead; 0 prepares them in between")

    _sources = field_validator("train", "validation", mode="before")(_one_or_many)


class LoggingSettings(Section):
    tensorboard: bool = Field(True, description="write TensorBoard events to run_dir/tensorboard, where installed")
    wandb: bool = Field(False, description="log to Weights & Biases: pip install 'free-transformer-lm[wandb]'")
    trackio: bool = Field(False, description="log to trackio, on this machine: the extra [trackio]")
    project: str = Field("free-transformer", description="name under which these two keep the run")
    sample_every: int = Field(200, ge=0, description="steps between samples of text; 0 for none")
    sample_tokens: int = Field(120, ge=1, description="length of a sample")


class DistributedSettings(Section):
    """Processes are started by `torchrun`; one alone needs none of this."""

    fsdp: bool = Field(
        False, description="shard weights, gradients and optimizer state over processes; false: each has a copy (DDP)"
    )
    data: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="processes that share each batch; auto: all that tensor leaves"
    )
    tensor: int = Field(1, ge=1, description="processes that share each matrix; must divide the heads")
    replicas: int = Field(
        1, ge=1, description="copies of the model among the data processes, each sharded over its own (hybrid sharding)"
    )
    timeout: float = Field(
        600, gt=0, description="seconds that processes wait for one of them before all end and name it"
    )


class Settings(Section):
    run_dir: Path = Field(Path("runs/free-transformer"), description="folder of the run")
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    data: DataSettings = DataSettings()
    logging: LoggingSettings = LoggingSettings()
    distributed: DistributedSettings = DistributedSettings()

    @model_validator(mode="after")
    def _known_tokenizer(self) -> "Settings":
        if self.data.tokenizer == "auto":
            self.data.tokenizer = self.model.pretrained or "bytes"
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_settings(path: str | Path, overrides: list[str] | None = None, to_train: bool = True) -> Settings:
    """
    Args:
        path: a YAML file.
        overrides: `section.name=value`, the value in YAML.
        to_train: look at `model.pretrained`, which whoever reads the settings of a trained run may not have.

    Raises:
        SettingsError: one line that names the setting, what it holds and what is allowed.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read as text ({error})") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: sections of settings are needed (model, training, data, ...)")
    for override in overrides or []:
        _override(values, override)
    return parse_settings(values, str(path), to_train)


def parse_settings(values: dict[str, Any], source: str = "settings", to_train: bool = True) -> Settings:
    """`Settings` from plain values; arguments and errors as in `load_settings`."""
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(f"{source}: " + "; ".join(map(_explain, _nearest(error.errors())))) from error
    try:
        if settings.model.pretrained is None or to_train:
            settings.model.adopt()
            settings.model.build()
        _check_together(settings)
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from error
    return settings


def _check_together(settings: Settings) -> None:
    """What no setting can tell by itself."""
    training, least = settings.training, settings.model.min_bits
    for name, value in (settings.model.model_extra or {}).items():
        if name in DECIDED_BY:
            raise SettingsError(f"model.{name}={value}: {DECIDED_BY[name]} decides it; set that")
    for name in ("freeze_first_half", "lora_rank"):
        if getattr(training, name) and settings.model.pretrained is None:
            raise SettingsError(f"training.{name}={getattr(training, name)}: only with model.pretrained")
    starts = {"training.free_bits_start": training.free_bits_start} if training.free_bits_schedule != "constant" else {}
    for number, stage in enumerate(training.stages):
        name = f"training.stages.{number}"
        if stage.free_bits is not None:
            starts[f"{name}.free_bits"] = stage.free_bits
        if stage.seq_len is not None and stage.seq_len > training.seq_len:
            raise SettingsError(f"{name}.seq_len={stage.seq_len}: at most training.seq_len={training.seq_len}")
        for value, schedule in (("kl_weight", "kl_schedule"), ("free_bits", "free_bits_schedule")):
            if getattr(stage, value) is not None and getattr(training, schedule) != "constant":
                raise SettingsError(f"{name}.{value}: with training.{schedule}=constant alone; take one or the other")
    for name, bits in starts.items():
        if bits < least:
            raise SettingsError(
                f"{name}={bits}: at least model.min_bits={least}, since a plan cannot spend more and less at once"
            )
    named = sum(stage.steps for stage in training.stages)
    unnamed = sum(stage.steps == 0 for stage in training.stages)
    if training.stages and (named + unnamed > training.max_steps or (not unnamed and named < training.max_steps)):
        raise SettingsError(
            f"training.stages: their steps come to {named}{f' and {unnamed} without' * (unnamed > 0)}, "
            f"training.max_steps is {training.max_steps}; let the last stage leave out steps"
        )
    if training.keeps_best and not (settings.data.validation and training.eval_every):
        raise SettingsError(
            "training.early_stopping and keep_best go by validations: name data.validation, and an eval_every over 0"
        )


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise SettingsError(f"{override!r}: an override is section.name=value, as in training.learning_rate=3e-4")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SettingsError(f"{override!r}: the value is not YAML") from error
    *sections, last = name.split(".")
    for section in sections:
        if values.get(section) is None:  # absent, or empty in the file
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise SettingsError(f"{override!r}: {section!r} is a setting, not a section")
    values[last] = value


def _nearest(errors: list[Any]) -> list[Any]:
    """Of a list or mapping with something wrong inside, that alone, and not that it is no mapping or list."""
    of_types = [error for error in errors if error["type"] in ("list_type", "dict_type")]
    inside = {error["loc"][:2] for error in errors if error not in of_types}
    return [error for error in errors if error not in of_types or error["loc"][:2] not in inside]


def _explain(error: Any) -> str:
    """One pydantic error as a person would say it."""
    location = [str(part) for part in error["loc"]]
    if error["type"] != "extra_forbidden":  # then the location may end in the member of a union
        location = [part for part in location if not MEMBER.fullmatch(part)]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        section: Any = Settings
        for part in location[:-1]:
            section = get_args(section)[0] if part.isdigit() else section.model_fields[part].annotation
        near = difflib.get_close_matches(location[-1], section.model_fields, n=1, cutoff=0.5)
        known = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(section.model_fields)}"
        return f"unknown setting {name!r}: {known}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}={error['input']!r}: {message[0].lower() + message[1:]}"


def describe_settings() -> str:
    """Every setting with its default and what it does, for `--help`."""
    lines = []
    for name, section in Settings.model_fields.items():
        if isinstance(section.annotation, type) and issubclass(section.annotation, BaseModel):
            lines += _describe(name, section.annotation)
        else:
            lines.append(f"{name} = {section.default}  {section.description}")
    return "\n\n".join(lines)


def _describe(name: str, section: type[BaseModel]) -> list[str]:
    lines = []
    for key, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        lines.append(f"{name}.{key} = {default!r}  {field.description}")
        if field.annotation == list[StageSettings]:
            lines += _describe(f"{name}.{key}[]", StageSettings)
    return lines
