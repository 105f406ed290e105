"""`PlanTrainer` for `transformers.Trainer` and TRL; the code is in `integrations/trainer.py`."""

from free_transformer.integrations.trainer import PlanTrainer

__all__ = ["PlanTrainer"]
