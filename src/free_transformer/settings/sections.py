"""The settings of a run, with a class for each section of the file."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from free_transformer.settings.model_section import ModelSettings
from free_transformer.settings.paths import Folder, PathText, SourceList, Sources, absolute_sources
from free_transformer.settings.section import Section, relocated, replace_checked
from free_transformer.settings.training_sections import (
    CheckpointSettings,
    CurriculumSettings,
    EvaluationSettings,
    OptimizerSettings,
    TrainingSettings,
)
from free_transformer.settings.yaml_text import dump_yaml


class DataSettings(Section):
    train: Sources = Field(
        default_factory=list,
        description="Training text: text files, folders, `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` and `.parquet` "
        "files (each also compressed as `.gz`, `.bz2`, `.xz` or `.zst`), and names of data sets, `name` or "
        "`name:configuration`, with a split as in `name[test]` (default: `train`). The prefix `hub:` marks the name of "
        "a data set. A list uses all of its texts. A mapping such as `{a.jsonl: 3, b.jsonl: 1}` is a mixture, whose "
        "rows are sampled in these shares.",
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
        description="Maximum number of rows without text to skip per table before reading fails, at least 0.",
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
    """Settings for several processes, started by `torchrun`. A single process needs none of them."""

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
    optimizer: OptimizerSettings = OptimizerSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    data: DataSettings = DataSettings()
    logging: LoggingSettings = LoggingSettings()
    distributed: DistributedSettings = DistributedSettings()

    @model_validator(mode="before")
    @classmethod
    def _relocate(cls, values: object) -> object:
        return relocated(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _known_tokenizer(self) -> "Settings":
        if self.data.tokenizer == "auto":
            replace_checked(self.data, tokenizer=self.model.pretrained or "bytes")
        return self

    @property
    def keeps_best(self) -> bool:
        return self.checkpoint.keep_best or self.evaluation.early_stopping > 0

    @property
    def optimizer_name(self) -> Literal["adamw", "muon"]:
        """`optimizer.name`, with `auto` resolved."""
        if self.optimizer.name != "auto":
            return self.optimizer.name
        return "muon" if self.model.pretrained is None else "adamw"

    def to_yaml(self) -> str:
        """Returns YAML text that `load_settings` reads as equal settings, for any environment variables."""
        return dump_yaml(self.model_dump(mode="json"))

    def with_absolute_paths(self) -> "Settings":
        """Returns a copy with absolute paths, so that it can be read from any working directory."""
        copy = self.model_copy(deep=True)
        replace_checked(copy, run_dir=self.run_dir.absolute())
        data = self.data
        replace_checked(copy.data, train=absolute_sources(data.train), validation=absolute_sources(data.validation))
        for stage in copy.curriculum.stages:
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
