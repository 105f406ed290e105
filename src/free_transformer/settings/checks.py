"""Settings that contradict each other, and settings that have no effect."""

from collections.abc import Iterable
from typing import Any

from free_transformer.errors import SettingsError
from free_transformer.model.configuration import FreeTransformerConfig
from free_transformer.settings.paths import absolute_sources, check_distinct
from free_transformer.settings.sections import DECIDED_BY, SECTIONS, Settings, TrainingSettings
from free_transformer.settings.words import shown


def check_together(settings: Settings) -> None:
    """Cross-field checks."""
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
    _check_steps(training)
    _check_mixtures(settings)
    if training.keeps_best and not (settings.data.validation and training.eval_every):
        raise SettingsError(
            "training.early_stopping and keep_best go by validations: name data.validation, and an eval_every over 0"
        )


def _check_steps(training: TrainingSettings) -> None:
    named = sum(stage.steps for stage in training.stages)
    unnamed = sum(stage.steps == 0 for stage in training.stages)
    if training.stages and (named + unnamed > training.max_steps or (not unnamed and named < training.max_steps)):
        raise SettingsError(
            f"training.stages: their steps come to {named}{f' and {unnamed} without' * (unnamed > 0)}, "
            f"training.max_steps is {training.max_steps}; let the last stage leave out steps"
        )


def _check_mixtures(settings: Settings) -> None:
    mixtures = {"data.train": settings.data.train}
    mixtures |= {f"training.stages.{i}.data": each.data or [] for i, each in enumerate(settings.training.stages)}
    for name, sources in mixtures.items():
        if isinstance(sources, dict):
            try:
                check_distinct({each: absolute_sources([each])[0] for each in sources})
            except ValueError as error:
                raise SettingsError(f"{name}: {error}") from error


def settings_warnings(settings: Settings) -> list[str]:
    """
    One line for each combination of settings that is allowed and surely not meant.

    Settings with their default value are not warned of: the `config.yaml` of a run has them all.
    """
    training = settings.training
    warnings = []
    if 0 < training.max_steps <= training.warmup_steps:
        warnings.append(
            f"training.warmup_steps={training.warmup_steps}: the warm-up is not shorter than "
            f"training.max_steps={training.max_steps}, so the learning rate never gets beyond the warm-up; lower it"
        )
    if _schedules(training) and training.anneal_steps > training.max_steps:
        warnings.append(
            f"training.anneal_steps={training.anneal_steps}: the schedules end after training.max_steps="
            f"{training.max_steps}, so their final values are never reached; lower it"
        )
    if training.early_stopping and training.eval_every and not training.stages:
        count = -(-training.max_steps // training.eval_every)
        if training.early_stopping >= count:
            warnings.append(
                f"training.early_stopping={training.early_stopping}: the run has only {count} evaluations, so it never "
                "stops early; lower it, or training.eval_every"
            )
    return warnings + _unused(settings)


def _schedules(training: TrainingSettings) -> set[str]:
    return {each for each in (training.kl_schedule, training.free_bits_schedule) if each != "constant"}


def _unused(settings: Settings) -> list[str]:
    """Settings that have no effect, each of them once."""
    told: set[str] = set()
    warnings = []
    for names, unused, reason in _effects(settings):
        set_here = [name for name in names if unused and name not in told and _is_set(settings, name)]
        told.update(set_here)
        if set_here:
            values = [f"{name}={shown(_get(settings, name))}" for name in set_here]
            warnings.append(f"{', '.join(values)}: no effect, because {reason}")
    return warnings


def _effects(settings: Settings) -> Iterable[tuple[list[str], bool, str]]:
    """Names of settings, whether they have no effect, and why."""
    training, data = settings.training, settings.data
    schedules = _schedules(training)
    return [
        (["training.muon_learning_rate"], training.optimizer != "muon", "training.optimizer is not muon"),
        (["training.kl_weight_start"], training.kl_schedule == "constant", "training.kl_schedule is constant"),
        (
            ["training.free_bits_start"],
            training.free_bits_schedule == "constant",
            "training.free_bits_schedule is constant",
        ),
        (["training.anneal_steps"], not schedules, "both schedules are constant"),
        (["training.anneal_cycles"], "cyclical" not in schedules, "no schedule is cyclical"),
        (["training.max_skipped"], training.nonfinite == "stop", "training.nonfinite is stop"),
        (["data.shuffle_buffer"], not data.streaming, "data.streaming is false"),
    ]


def _get(settings: Settings, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(settings, section), key, None)


def _is_set(settings: Settings, name: str) -> bool:
    """Whether a setting is given with another value than its default."""
    section, _, key = name.partition(".")
    if key not in getattr(settings, section).model_fields_set:
        return False
    field = SECTIONS[section].model_fields.get(key)
    default = getattr(FreeTransformerConfig, key, None) if field is None else field.default
    return bool(_get(settings, name) != default)
