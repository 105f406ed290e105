"""Finds the settings of a run that differ from their defaults, or from those of other runs."""

from collections.abc import Mapping, Sequence

from free_transformer.settings.sections import Settings
from free_transformer.settings.words import shown

FOLLOWED = (
    "model.preset",
    "model.plan_span",
    "model.latent_dim",
    "training.max_steps",
)  # other defaults depend on these
DECIDED = {"optimizer.codebook", "model.plan_gradient"}  # `auto` is stored as its resolved value
NOT_A_CHOICE = {"run_dir"}


def changed_settings(settings: Settings) -> list[tuple[str, str, str]]:
    """Returns name, value and default of every setting that differs from its default, in the order of the file."""
    preset = {"model": {"preset": settings.model.preset}}
    values = {**_flat(settings), "optimizer.name": settings.optimizer_name}
    plain = _flat(Settings.model_validate(preset))
    given = {"preset": settings.model.preset, "plan_span": settings.model.plan_span}
    model = {**given, "latent_dim": settings.model.latent_dim, "pretrained": settings.model.pretrained}
    follow = Settings.model_validate({"model": model, "training": {"max_steps": settings.training.max_steps}})
    defaults = {**_flat(follow), **{name: plain[name] for name in FOLLOWED[1:]}, "model.preset": "steering"}
    defaults |= {"model.pretrained": None, "optimizer.name": follow.optimizer_name}
    return [
        (name, _text(value), _text(defaults.get(name)))
        for name, value in values.items()
        if value != defaults.get(name) and name not in DECIDED | NOT_A_CHOICE
    ]


def differing_settings(runs: Sequence[Settings]) -> list[tuple[str, list[str]]]:
    """Returns name and values of every setting that differs between these runs."""
    flat = [_flat(settings) for settings in runs]
    names = dict.fromkeys(name for values in flat for name in values if name not in NOT_A_CHOICE)
    found = {name: [_text(values.get(name)) for values in flat] for name in names}
    return [(name, values) for name, values in found.items() if len(set(values)) > 1]


def _text(value: object) -> str:
    return value if isinstance(value, str) else shown(value)


def _flat(settings: Settings) -> dict[str, object]:
    """Flattens settings to values by `section.name`."""
    found: dict[str, object] = {}
    for section, values in settings.model_dump(mode="json").items():
        if isinstance(values, Mapping):
            found |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            found[section] = values
    return found
