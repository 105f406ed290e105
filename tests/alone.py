"""Environments without this checkout, for checks of installed packages."""

import os
import subprocess
import venv
from pathlib import Path

from pages import ROOT


def install_alone(folder: Path, *packages: str, constrained: bool = True) -> Path:
    """
    The Python of a new environment that holds these packages.

    Args:
        constrained: take the versions of `constraints.txt`, else the newest that the packages allow.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    constraints = ["-c", ROOT / "constraints.txt"] if constrained else []
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *constraints]
    subprocess.run([*pip, *packages], check=True)
    return python


def environment_alone(**changes: str) -> dict[str, str]:
    """The variables of this process but `PYTHONPATH`, which would bring the checkout along."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | changes
