"""Environments without this checkout, for checks of what others install."""

import os
import subprocess
import venv
from pathlib import Path

from pages import ROOT


def install_alone(folder: Path, *packages: str) -> Path:
    """The Python of a new environment that holds these packages, of the versions of `constraints.txt`."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-qc", ROOT / "constraints.txt"]
    subprocess.run([*pip, *packages], check=True)
    return python


def environment_alone(**changes: str) -> dict[str, str]:
    """The variables of this process but `PYTHONPATH`, which would bring the checkout along."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | changes
