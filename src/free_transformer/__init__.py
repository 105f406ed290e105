"""Free Transformer: a Llama that draws a plan before it writes."""

from transformers import AutoConfig, AutoModelForCausalLM

from free_transformer.config import FreeTransformerConfig
from free_transformer.encoder import PlanEncoder
from free_transformer.model import FreeTransformer, FreeTransformerOutput, build_baseline
from free_transformer.plan import BinaryMapper, PlanTable, bits_to_codes, codes_to_bits

__version__ = "0.1.0"

AutoConfig.register(FreeTransformerConfig.model_type, FreeTransformerConfig, exist_ok=True)
AutoModelForCausalLM.register(FreeTransformerConfig, FreeTransformer, exist_ok=True)

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
