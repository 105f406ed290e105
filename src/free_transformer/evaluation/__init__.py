"""Evaluation: likelihood, plan usage, and how well the plan controls the generated text."""

from free_transformer.evaluation.bits import BitEffect, bit_effects
from free_transformer.evaluation.coherence import Coherence, measure_coherence
from free_transformer.evaluation.comparison import Comparison, compare
from free_transformer.evaluation.control import (
    Control,
    agreement,
    generate_texts,
    measure_control,
    mutual_information,
    sampled_codes,
    share_in_class,
)
from free_transformer.evaluation.diversity import Diversity, measure_diversity
from free_transformer.evaluation.likelihood import Likelihood, evaluate_likelihood
from free_transformer.evaluation.plan_examples import PlanExamples, make_plan_examples
from free_transformer.evaluation.usage import PlanUsage, collapse_warning, plan_usage, usage_warning

__all__ = [
    "BitEffect",
    "Coherence",
    "Comparison",
    "Control",
    "Diversity",
    "Likelihood",
    "PlanExamples",
    "PlanUsage",
    "agreement",
    "bit_effects",
    "collapse_warning",
    "compare",
    "evaluate_likelihood",
    "generate_texts",
    "make_plan_examples",
    "measure_coherence",
    "measure_control",
    "measure_diversity",
    "mutual_information",
    "plan_usage",
    "sampled_codes",
    "share_in_class",
    "usage_warning",
]
