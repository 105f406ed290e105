"""Public names of the plan; the code is in `model/plan.py`."""

from free_transformer.model.plan import BinaryMapper, PlanPrior, PlanTable, bits_to_codes, codes_to_bits

__all__ = ["BinaryMapper", "PlanPrior", "PlanTable", "bits_to_codes", "codes_to_bits"]
