"""Settings of training: steps and batches, the optimizer, checkpoints, evaluations, and the curriculum."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from free_transformer.settings.paths import Sources
from free_transformer.settings.section import Section

Precision = Literal["fp32", "bf16", "fp16", "auto"]
Schedule = Literal["constant", "linear", "cosine", "cyclical"]
OptimizerName = Literal["auto", "adamw", "muon"]
CodebookOptimizer = Literal["auto", "adamw", "sparse_adam"]
MAX_SEED = 2**63 - 1
MAX_WARMUP, WARMUP_SHARE = 100, 10  # default warm-up: a tenth of the steps, at most 100


class TrainingSettings(Section):
    max_steps: int = Field(1000, ge=1, description="Number of optimizer steps, at least 1.")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        32,
        description="Rows per micro-batch over all processes, at least 1, or `auto`: as many as fit in memory.",
    )
    seq_len: int = Field(256, ge=2, description="Tokens per row, at least 2, including the begin-of-text token.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW, above 0.")
    freeze_first_half: bool = Field(
        False,
        description="Keep the pretrained embeddings and the layers before the plan fixed, which saves time. Needs "
        "`model.pretrained`.",
    )
    lora_rank: int = Field(
        0,
        ge=0,
        description="Rank of LoRA adapters, which are trained instead of the decoder's weights. 0: train the weights. "
        "Needs `model.pretrained`.",
    )
    warmup_steps: int = Field(
        MAX_WARMUP,
        ge=0,
        description="Number of optimizer steps in which the learning rate rises linearly to its peak; 0: none. "
        "Default: `min(100, max_steps // 10)`.",
    )
    grad_clip: float = Field(1.0, ge=0, description="Maximum gradient norm; 0: no clipping.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Number of micro-batches per optimizer step, at least 1."
    )
    precision: Precision = Field(
        "fp32",
        description="Number format of matmuls: `fp32`, `bf16`, `fp16` (with loss scaling, for a GPU without bf16), or "
        "`auto` (`bf16` if the hardware supports it, else `fp32`).",
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
    save_every: int = Field(
        200, ge=0, description="Optimizer steps between checkpoints, and one at the end. 0: only at the end."
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="Response to a loss or gradient that is NaN or infinite: `stop` the run, or `skip` the step.",
    )
    max_skipped: int = Field(
        10, ge=0, description="Number of steps that `nonfinite=skip` may skip before the run stops, at least 0."
    )
    kl_weight: float = Field(1.0, ge=0, description="Weight of the KL above the free bits, at least 0.")
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
        """`batch_size` as a number; `auto` must be resolved."""
        assert isinstance(self.batch_size, int), "batch_size=auto must be resolved first"
        return self.batch_size


class OptimizerSettings(Section):
    name: OptimizerName = Field(
        "auto",
        description="Optimizer: `adamw`, `muon` for the matrices in the blocks with AdamW for the rest, or `auto` "
        "(`muon` for new weights, `adamw` with `model.pretrained`).",
    )
    weight_decay: float = Field(
        0.1, ge=0, description="Weight decay of matrices, at least 0. Norms, biases and the codebook have none."
    )
    muon_learning_rate: float = Field(0.02, gt=0, description="Peak learning rate of Muon, above 0. Used by Muon only.")
    plan_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of the encoder and the codebook, above 0. Default: `training.learning_rate`, "
        "or ten times that with `model.pretrained`, where the codebook's rate is derived from it.",
    )
    codebook: CodebookOptimizer = Field(
        "auto",
        description="Optimizer of the codebook: `adamw`, `sparse_adam` (updates only the rows of sampled plans), or "
        "`auto` (`sparse_adam` above 4096 rows).",
    )
    min_lr_ratio: float = Field(
        0.02, ge=0, le=1, description="Final learning rate of the cosine decay as a share of the peak, 0 to 1."
    )


class CheckpointSettings(Section):
    save_total: int = Field(
        2,
        ge=1,
        description="Number of newest checkpoints to keep, at least 1. With `keep_best` the best one is kept too.",
    )
    keep_best: bool = Field(
        False,
        description="Keep the checkpoint with the best held-out ELBO and write `model/` from it. "
        "`evaluation.early_stopping` implies it.",
    )
    async_save: bool = Field(
        False, description="Write checkpoints in the background from a copy in memory while training continues."
    )


class EvaluationSettings(Section):
    """Evaluations during training."""

    rows: int = Field(256, ge=1, description="Maximum number of held-out rows per evaluation, at least 1.")
    early_stopping: int = Field(
        0,
        ge=0,
        description="Number of consecutive evaluations without a better held-out ELBO after which the run ends. "
        "0: never.",
    )
    prior_rows: int = Field(
        1024,
        ge=0,
        description="Number of training rows from which the aggregate prior over plans is computed at the end. "
        "0: no aggregate prior.",
    )


class StageSettings(Section):
    """One stage of a curriculum. Omitted settings have the values of `training`, `model` and `data`."""

    steps: int = Field(
        0,
        ge=0,
        description="Number of optimizer steps of the stage. 0: an equal share of the remaining steps.",
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


class CurriculumSettings(Section):
    """Stages, or schedules of the KL weight and of the free bits."""

    stages: list[StageSettings] = Field(
        default_factory=list,
        description="Stages, in order, as in `[{seq_len: 64}, {seq_len: 128}, {}]`. Default: one stage "
        "with the settings of the run.",
    )
    kl_schedule: Schedule = Field(
        "constant",
        description="Schedule of the KL weight from `kl_weight_start` to `training.kl_weight`: `constant`, "
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
        0, ge=0, description="Number of optimizer steps of both schedules. 0: half of `training.max_steps`."
    )
    anneal_cycles: int = Field(
        4, ge=1, description="Number of cycles of a cyclical schedule within these steps, at least 1."
    )
