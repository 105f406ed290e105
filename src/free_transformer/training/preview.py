"""`free-transformer train --dry-run`: parameters, memory, tokens and time of a run before it starts."""

from dataclasses import dataclass, field
from datetime import timedelta

from transformers import PreTrainedModel

from free_transformer.data import load_tokenizer
from free_transformer.distributed.processes import Processes, join_processes
from free_transformer.model.modeling import FreeTransformer
from free_transformer.reporting.table import Table
from free_transformer.runs.run import Run
from free_transformer.runs.trackers import check_trackers
from free_transformer.settings import Settings, settings_warnings
from free_transformer.settings.curriculum import Stage, stages_of
from free_transformer.training.batch_size import (
    MIB,
    StepCosts,
    StepTime,
    decide_batch_size,
    memory_budget,
    not_compiled,
    time_steps,
    try_steps,
)
from free_transformer.training.batches import Stream, load_training, load_validation, overlap_warning
from free_transformer.training.optimizers import describe_groups
from free_transformer.training.state import new_state


@dataclass
class Preview:
    """
    Attributes:
        parameters: number of parameters by part of the model.
        groups: descriptions of the optimizers' parameter groups.
        stages: stages of the run.
        text: predicted tokens of the training text of each stage, None if it is streamed.
        costs: memory of one process, measured in trial steps with few rows.
        time: measured time of an optimizer step. None if the run does not fit in memory.
        budget: bytes that a process may use.
        rows: rows per micro-batch in one process.
    """

    settings: Settings
    parameters: dict[str, int]
    groups: list[str]
    stages: list[Stage]
    text: list[int | None]
    costs: StepCosts
    budget: int
    rows: int
    time: StepTime | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> int:
        training = self.settings.training
        return training.rows * training.seq_len * training.gradient_accumulation_steps

    @property
    def bytes(self) -> int:
        """Estimated peak memory of a process."""
        return self.costs.bytes(self.rows)

    def parameter_table(self) -> Table:
        total = sum(self.parameters.values())
        rows = [[part, f"{count:,}", f"{count / total:.1%}"] for part, count in self.parameters.items()]
        return Table(["parameters", "", ""], [*rows, ["all", f"{total:,}", ""]])

    def stage_table(self) -> Table:
        rows = []
        for stage, text in zip(self.stages, self.text, strict=True):
            read = (stage.end - stage.start) * self.tokens_per_step
            passes = "streamed" if text is None else f"{read / text:.1f}"
            rows.append([f"{stage.start} to {stage.end}", f"{stage.batch_size} x {stage.seq_len}", f"{read:,}", passes])
        return Table(["steps", "rows x tokens", "tokens", "passes over the text"], rows)

    def cost_table(self) -> Table:
        rows = [
            ["tokens per step", f"{self.tokens_per_step:,}"],
            ["memory per process, estimated", f"{self.bytes / MIB:,.0f} MiB of {self.budget / MIB:,.0f} available"],
            ["of which weights, gradients, optimizer", f"{self.costs.state_bytes / MIB:,.0f} MiB"],
        ]
        if self.time is not None:
            seconds, steps, max_steps = self.time.seconds, self.time.steps, self.settings.training.max_steps
            speed = f"{self.tokens_per_step / seconds:,.0f} tokens/s"
            duration = timedelta(seconds=round(max_steps * seconds))
            rows += [
                [f"time per step, measured over {steps} steps", f"{seconds:.3g} s ({speed})"],
                [
                    f"{max_steps:,} steps at this speed",
                    f"{duration} + evaluations",
                ],
            ]
        return Table(["cost", ""], rows)


def preview(settings: Settings, quiet: bool = False) -> Preview | None:
    """
    Reads the text, builds the model and runs a few steps, without writing files.

    Returns:
        the preview in the main process, None in the others.

    Raises:
        SettingsError: see `train`.
    """
    with join_processes(settings.distributed, settings.training.device) as processes:
        found = _preview(settings, processes, quiet)
        return found if processes.main else None


def _preview(settings: Settings, processes: Processes, quiet: bool) -> Preview:
    check_trackers(settings)
    tokenizer = load_tokenizer(settings.data.tokenizer)
    settings, loaded, tried = decide_batch_size(settings, tokenizer, processes, None, quiet)
    data = loaded or load_training(settings, tokenizer, processes)
    validation = load_validation(settings, tokenizer)
    rows = -(-settings.training.rows // processes.data_size)
    costs, budget = tried or try_steps(settings, tokenizer, processes, data, rows), memory_budget(processes)
    state = new_state(not_compiled(settings), tokenizer, processes)
    found = Preview(
        settings=settings,
        parameters=parameters_by_part(state.model),
        groups=describe_groups(state.optimizers),
        stages=stages_of(settings),
        text=[None if isinstance(each, Stream) else each.predicted_tokens for each in data],
        costs=costs,
        budget=budget,
        rows=rows,
    )
    if processes.all_reduce_max(found.bytes > budget)[0]:
        found.warnings.append(
            "the run does not fit in memory, so no time was measured: use a smaller training.batch_size with more "
            "gradient_accumulation_steps, training.gradient_checkpointing=true, or a smaller model"
        )
    else:
        found.time = time_steps(settings, tokenizer, processes, data, state)
    found.warnings += settings_warnings(settings)
    if overlap := overlap_warning(data, validation, settings):
        found.warnings.append(overlap)
    if settings.training.compile:
        found.warnings.append("training.compile: the time was measured without compilation")
    if (path := Run(settings.run_dir).checkpoints).is_dir():
        found.warnings.append(f"{path.parent} contains a run: without --dry-run, train resumes it")
    return found


def parameters_by_part(model: PreTrainedModel) -> dict[str, int]:
    """Counts the parameters of each part, in the order of the forward pass. Tied matrices count once."""
    free = isinstance(model, FreeTransformer)
    half = model.config.plan_layer if free else model.config.num_hidden_layers
    names = {"embed_tokens": "embedding", "encoder": "encoder", "plan_table": "codebook", "lm_head": "head"}
    order = ["embedding", "layers before the plan" if free else "layers", "encoder", "codebook"]
    counts = dict.fromkeys([*order, "layers after the plan", "last norm", "head"], 0)
    for name, parameter in model.named_parameters():
        part = next((label for key, label in names.items() if key in name), "last norm")
        if ".layers." in f".{name}":
            index = int(name.split("layers.")[1].split(".")[0])
            part = order[1] if index < half else "layers after the plan"
        counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}
