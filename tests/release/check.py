"""
Builds the release and uses it as a user does: only the wheel, in a separate environment.

    python tests/release/check.py

Once with the versions of `constraints.txt` and once with the newest that the wheel allows, as `pip install` takes them.
The commands are those of the first run in docs/install.md, with fewer steps of training.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from alone import environment_alone, install_alone
from pages import ROOT, blocks_in

CONFIG = Path("configs") / "free_transformer.yaml"
STEPS = "training.max_steps=20"


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT], check=True)
        (wheel,), (source,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
        names = zipfile.ZipFile(wheel).namelist()
        assert "free_transformer/py.typed" in names and any(name.endswith("LICENSE") for name in names), names
        assert not [name for name in names if not name.startswith("free_transformer")], names

        for constrained in (True, False):
            print("with constraints.txt" if constrained else "without constraints", flush=True)
            use(folder / f"constrained-{constrained}", wheel, constrained)
        print(f"{source.name} and {wheel.name} are ready")


def use(folder: Path, wheel: Path, constrained: bool) -> None:
    """Installs the wheel in a separate folder and runs the commands there."""
    python = install_alone(folder / "venv", f"{wheel}[train]", constrained=constrained)
    (folder / "work" / "configs").mkdir(parents=True)
    (folder / "work" / CONFIG).write_text((ROOT / CONFIG).read_text(encoding="utf-8"), encoding="utf-8")
    environment = environment_alone(PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    versions = "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
    for command in [["python", "-c", versions], *quick_start(), ["python", "-c", blocks_in("README.md", "python")[0]]]:
        print("$", shlex.join(command) if len(command[-1]) < 99 else "a block of Python", flush=True)
        subprocess.run(command, check=True, cwd=folder / "work", env=environment)


def quick_start() -> list[list[str]]:
    first_run = next(block for block in blocks_in("docs/install.md", "") if block.startswith("free-transformer train"))
    commands = [shlex.split(line) for line in first_run.splitlines()]
    assert [command[1] for command in commands] == ["train", "evaluate", "generate", "plan"], commands
    return [[*command, STEPS] if command[1] == "train" else command for command in commands]


if __name__ == "__main__":
    main()
