"""Optional packages that some commands need."""

import contextlib
from collections.abc import Iterator

from free_transformer.errors import MissingDependency


@contextlib.contextmanager
def optional_packages(what: str, extra: str) -> Iterator[None]:
    """
    Names the extra to install when an import in the `with` block fails.

    Args:
        what: what needs the package, the beginning of the message.
        extra: the extra of this library that has the package.

    Raises:
        MissingDependency: for a package of others that cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "free_transformer":  # a fault of this library
            raise
        raise MissingDependency(f"{what} {error.name}: pip install 'free-transformer-lm[{extra}]'") from error
