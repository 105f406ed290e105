"""Results in a run's folder, as objects."""

import math
from dataclasses import fields

from free_transformer.evaluation.likelihood import Likelihood
from free_transformer.evaluation.usage import PlanUsage
from free_transformer.runs.lines import JsonObject
from free_transformer.runs.model_card import count_parameters
from free_transformer.runs.run import Run


def stored_likelihood(values: JsonObject) -> Likelihood | None:
    """Returns the likelihood in `metrics.json`, without values per document; None if another program wrote it."""
    if not values.keys() >= {"nll", "tokens", "documents", "method", "num_samples", "standard_errors"}:
        return None
    found = {field.name: values[field.name] for field in fields(Likelihood) if field.name in values}
    errors = found["standard_errors"].items()
    found["standard_errors"] = {name: math.nan if error is None else error for name, error in errors}
    if found.get("usage"):
        found["usage"] = PlanUsage(**found["usage"])
    return Likelihood(**found)


def num_parameters(run: Run) -> int | None:
    """Counts the parameters of a run's model, or returns their number at the start of training; None if unknown."""
    if run.has_ended:
        return count_parameters(run.model_folder)
    history = run.read_history()
    return history[-1].get("parameters") if history else None
