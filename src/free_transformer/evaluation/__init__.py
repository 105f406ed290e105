"""Honest evaluation: what the plan costs, whether it is used, and whether it steers."""

from free_transformer.evaluation.bits import BitEffect, bit_effects
from free_transformer.evaluation.comparison import Comparison, compare
from free_transformer.evaluation.control import (
    Control,
    agreement,
    measure_control,
    mutual_information,
    sampled_codes,
    share_in_class,
    write_texts,
)
from free_transformer.evaluation.diversity import Diversity, measure_diversity
from free_transformer.evaluation.likelihood import Likelihood, evaluate_likelihood
from free_transformer.evaluation.usage import PlanUsage, collapse_warning, plan_usage, usage_warning

__all__ = [
    "BitEffect",
    "Comparison",
    "Control",
    "Diversity",
    "Likelihood",
    "PlanUsage",
    "agreement",
    "bit_effects",
    "collapse_warning",
    "compare",
    "evaluate_likelihood",
    "measure_control",
    "measure_diversity",
    "mutual_information",
    "plan_usage",
    "sampled_codes",
    "share_in_class",
    "usage_warning",
    "write_texts",
]
