"""Free Transformer: a Llama that samples a latent plan and generates every token conditioned on it."""

import importlib
from typing import TYPE_CHECKING

from free_transformer.auto_classes import register_soon

if TYPE_CHECKING:
    from free_transformer.model.configuration import FreeTransformerConfig
    from free_transformer.model.encoder import PlanEncoder
    from free_transformer.model.initialization import build_baseline
    from free_transformer.model.modeling import FreeTransformer
    from free_transformer.model.outputs import FreeTransformerOutput
    from free_transformer.model.plan import BinaryMapper, PlanTable, bits_to_codes, codes_to_bits

__version__ = "0.1.0"

__all__ = [
    "BinaryMapper",
    "FreeTransformer",
    "FreeTransformerConfig",
    "FreeTransformerOutput",
    "PlanEncoder",
    "PlanTable",
    "bits_to_codes",
    "build_baseline",
    "codes_to_bits",
]
_HOMES = {
    "model.configuration": ("FreeTransformerConfig",),
    "model.encoder": ("PlanEncoder",),
    "model.initialization": ("build_baseline",),
    "model.modeling": ("FreeTransformer",),
    "model.outputs": ("FreeTransformerOutput",),
    "model.plan": ("BinaryMapper", "PlanTable", "bits_to_codes", "codes_to_bits"),
}

register_soon()


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
