"""The base class of the sections of settings."""

from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from free_transformer.errors import InputError

# Settings that files may still give in `training`, and their current places.
MOVED = {
    "optimizer": ("optimizer", "name"),
    "table_optimizer": ("optimizer", "codebook"),
    **{name: ("optimizer", name) for name in ("weight_decay", "muon_learning_rate", "min_lr_ratio")},
    "plan_learning_rate": ("optimizer", "plan_learning_rate"),
    **{name: ("checkpoint", name) for name in ("save_total", "keep_best", "async_save")},
    "keep_checkpoints": ("checkpoint", "save_total"),
    "eval_rows": ("evaluation", "rows"),
    **{name: ("evaluation", name) for name in ("early_stopping", "prior_rows")},
    "stages": ("curriculum", "stages"),
    **{name: ("curriculum", name) for name in ("kl_schedule", "kl_weight_start", "anneal_steps", "anneal_cycles")},
    **{name: ("curriculum", name) for name in ("free_bits_schedule", "free_bits_start")},
}


def relocated(values: dict[str, Any]) -> dict[str, Any]:
    """
    Moves the settings in `MOVED` from `training` to their current sections.

    Raises:
        InputError: for a setting that is given in both places.
    """
    training = values.get("training")
    if not isinstance(training, dict) or not training.keys() & MOVED.keys():
        return values
    values = {**values, "training": {name: value for name, value in training.items() if name not in MOVED}}
    for name in training.keys() & MOVED.keys():
        section, key = MOVED[name]
        given = values.get(section)
        given = given.model_dump(exclude_unset=True) if isinstance(given, Section) else dict(given or {})
        if key in given:
            raise InputError(f"training.{name} and {section}.{key} are two names of one setting; keep one")
        values[section] = {**given, key: training[name]}
    return values


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    other_names: ClassVar[dict[str, str]] = {}  # alternative names of settings -> current name

    @classmethod
    def renamed(cls, values: dict[str, object]) -> dict[str, object]:
        """
        Returns the values under the current names of settings.

        Raises:
            ValueError: for a setting that is given under two names.
        """
        given: dict[str, str] = {}
        for name in values:
            if (other := given.setdefault(cls.other_names.get(name, name), name)) != name:
                raise InputError(f"{other} and {name} are two names of one setting; keep one")
        return {kept: values[name] for kept, name in given.items()}

    @model_validator(mode="before")
    @classmethod
    def _fill_empty(cls, values: object) -> object:
        """Treats an empty section as one with default values."""
        if values is None:
            return {}
        return cls.renamed(values) if isinstance(values, dict) else values

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: object, info: ValidationInfo) -> object:
        """Rejects booleans for numbers, which pydantic accepts as 0 and 1."""
        if isinstance(value, bool) and bool not in leaves(cls.model_fields[str(info.field_name)].annotation):
            raise PydanticCustomError(
                "boolean", "true and false are not allowed"
            )  # `_requirement` adds what is allowed
        return value


def leaves(kind: object) -> set[object]:
    """Returns the types that an annotation consists of."""
    members = get_args(kind) if get_origin(kind) is not Literal else ()
    return set().union(*map(leaves, members)) if members else {kind}


def replace_checked(section: Section, **values: object) -> None:
    """Sets checked values without expanding variables in them or marking them as given by the user."""
    section.__dict__.update(values)
