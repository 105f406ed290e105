"""
How the layers that are Llama's round: as fast as they can be, or as `transformers` has them, to the bit.

The two differ in the last digits (1e-6 of a log-likelihood in single precision). A comparison with a Llama that is
meant to be exact has to round as that Llama does.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class Rounding:
    as_llama = False


ROUNDING = Rounding()


@contextmanager
def like_llama() -> Iterator[None]:
    """Inside, steps without gradients give the values of `LlamaForCausalLM`'s own operations, in their order."""
    before, ROUNDING.as_llama = ROUNDING.as_llama, True
    try:
        yield
    finally:
        ROUNDING.as_llama = before
