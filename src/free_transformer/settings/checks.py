"""Checks for settings that contradict each other, and warnings about settings that have no effect."""

from collections.abc import Iterable

from free_transformer.errors import SettingsError
from free_transformer.model.configuration import FreeTransformerConfig
from free_transformer.settings.model_section import DECIDED_BY
from free_transformer.settings.paths import absolute_sources, check_distinct
from free_transformer.settings.sections import SECTIONS, Settings
from free_transformer.settings.words import shown


def check_together(settings: Settings) -> None:
    """Raises `SettingsError` for settings that contradict each other."""
    training, curriculum, least = settings.training, settings.curriculum, settings.model.min_bits
    for name, value in (settings.model.model_extra or {}).items():
        if name in DECIDED_BY:
            raise SettingsError(f"model.{name}={value}: determined by {DECIDED_BY[name]}; set that instead")
    for name in ("freeze_first_half", "lora_rank"):
        if getattr(training, name) and settings.model.pretrained is None:
            raise SettingsError(f"training.{name}={getattr(training, name)}: needs model.pretrained")
    starts = {}
    if curriculum.free_bits_schedule != "constant":
        starts["curriculum.free_bits_start"] = curriculum.free_bits_start
    for number, stage in enumerate(curriculum.stages):
        name = f"curriculum.stages.{number}"
        if stage.free_bits is not None:
            starts[f"{name}.free_bits"] = stage.free_bits
        if stage.seq_len is not None and stage.seq_len > training.seq_len:
            raise SettingsError(f"{name}.seq_len={stage.seq_len}: must be at most training.seq_len={training.seq_len}")
        for value, schedule in (("kl_weight", "kl_schedule"), ("free_bits", "free_bits_schedule")):
            if getattr(stage, value) is not None and getattr(curriculum, schedule) != "constant":
                raise SettingsError(f"{name}.{value}: needs curriculum.{schedule}=constant; set only one of the two")
    for name, bits in starts.items():
        if bits < least:
            raise SettingsError(
                f"{name}={bits}: must be at least model.min_bits={least}; raise it, or lower model.min_bits"
            )
    _check_steps(settings)
    _check_mixtures(settings)
    if settings.keeps_best and not (settings.data.validation and training.eval_every):
        raise SettingsError(
            "evaluation.early_stopping and checkpoint.keep_best need evaluations: set data.validation, and "
            "training.eval_every above 0"
        )


def _check_steps(settings: Settings) -> None:
    training, curriculum = settings.training, settings.curriculum
    named = sum(stage.steps for stage in curriculum.stages)
    unnamed = sum(stage.steps == 0 for stage in curriculum.stages)
    if curriculum.stages and (named + unnamed > training.max_steps or (not unnamed and named < training.max_steps)):
        raise SettingsError(
            f"curriculum.stages: their steps add up to {named}"
            f"{f', with {unnamed} stages without steps' * (unnamed > 0)}, but training.max_steps={training.max_steps}; "
            "leave out the steps of the last stage"
        )


def _check_mixtures(settings: Settings) -> None:
    mixtures = {"data.train": settings.data.train}
    mixtures |= {f"curriculum.stages.{i}.data": each.data or [] for i, each in enumerate(settings.curriculum.stages)}
    for name, sources in mixtures.items():
        if isinstance(sources, dict):
            try:
                check_distinct({each: absolute_sources([each])[0] for each in sources})
            except ValueError as error:
                raise SettingsError(f"{name}: {error}") from error


def settings_warnings(settings: Settings) -> list[str]:
    """
    Returns a warning for each combination of settings that is valid but certainly unintended.

    Settings with their default value cause no warning, since the `config.yaml` of a run contains all settings.
    """
    training, curriculum, patience = settings.training, settings.curriculum, settings.evaluation.early_stopping
    warnings = []
    if 0 < training.max_steps <= training.warmup_steps:
        warnings.append(
            f"training.warmup_steps={training.warmup_steps}: the warm-up is not shorter than "
            f"training.max_steps={training.max_steps}, so the learning rate never gets beyond the warm-up; lower it"
        )
    if _schedules(settings) and curriculum.anneal_steps > training.max_steps:
        warnings.append(
            f"curriculum.anneal_steps={curriculum.anneal_steps}: the schedules end after training.max_steps="
            f"{training.max_steps}, so their final values are never reached; lower it"
        )
    if patience and training.eval_every and not curriculum.stages:
        count = -(-training.max_steps // training.eval_every)
        if patience >= count:
            warnings.append(
                f"evaluation.early_stopping={patience}: the run has only {count} evaluations, so it never "
                "stops early; lower it, or training.eval_every"
            )
    return warnings + _unused(settings)


def _schedules(settings: Settings) -> set[str]:
    curriculum = settings.curriculum
    return {each for each in (curriculum.kl_schedule, curriculum.free_bits_schedule) if each != "constant"}


def _unused(settings: Settings) -> list[str]:
    """Returns warnings about settings that have no effect, once per setting."""
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
    """Returns names of settings, whether they have no effect, and the reason."""
    training, curriculum, data = settings.training, settings.curriculum, settings.data
    schedules = _schedules(settings)
    return [
        (["optimizer.muon_learning_rate"], settings.optimizer_name != "muon", "optimizer.name is not muon"),
        (["curriculum.kl_weight_start"], curriculum.kl_schedule == "constant", "curriculum.kl_schedule is constant"),
        (
            ["curriculum.free_bits_start"],
            curriculum.free_bits_schedule == "constant",
            "curriculum.free_bits_schedule is constant",
        ),
        (["curriculum.anneal_steps"], not schedules, "both schedules are constant"),
        (["curriculum.anneal_cycles"], "cyclical" not in schedules, "no schedule is cyclical"),
        (["training.max_skipped"], training.nonfinite == "stop", "training.nonfinite is stop"),
        (["data.shuffle_buffer"], not data.streaming, "data.streaming is false"),
    ]


def _get(settings: Settings, name: str) -> object:
    section, _, key = name.partition(".")
    return getattr(getattr(settings, section), key, None)


def _is_set(settings: Settings, name: str) -> bool:
    """Whether a setting is given with a value other than its default."""
    section, _, key = name.partition(".")
    if key not in getattr(settings, section).model_fields_set:
        return False
    field = SECTIONS[section].model_fields.get(key)
    default = getattr(FreeTransformerConfig, key, None) if field is None else field.default
    return bool(_get(settings, name) != default)
