"""Settings of a training run; the code is in `free_transformer.settings`."""

from free_transformer.settings import *  # noqa: F403
from free_transformer.settings import __all__ as __all__
