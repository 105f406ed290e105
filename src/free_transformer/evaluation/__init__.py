"""Honest evaluation: what the plan costs, whether it is used, and whether it steers."""

from free_transformer.evaluation.comparison import Comparison, compare
from free_transformer.evaluation.control import agreement, mutual_information, share_in_class
from free_transformer.evaluation.likelihood import Likelihood, evaluate_likelihood
from free_transformer.evaluation.usage import PlanUsage, plan_usage, usage_warning

__all__ = [
    "Comparison",
    "Likelihood",
    "PlanUsage",
    "agreement",
    "compare",
    "evaluate_likelihood",
    "mutual_information",
    "plan_usage",
    "share_in_class",
    "usage_warning",
]
