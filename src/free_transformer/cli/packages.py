"""Optional packages that some commands need."""

import contextlib
from collections.abc import Iterator

from free_transformer.errors import MissingDependency


@contextlib.contextmanager
def optional_packages(what: str, extra: str) -> Iterator[None]:
    """
    If an import in the `with` block fails, raises an error that names the extra to install.

    Args:
        what: beginning of the message, such as "a server needs".
        extra: the extra of this library that installs the package.

    Raises:
        MissingDependency: for a third-party package that cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "free_transformer":  # a bug in this library
            raise
        raise MissingDependency(f"{what} {error.name}: pip install 'free-transformer-lm[{extra}]'") from error
