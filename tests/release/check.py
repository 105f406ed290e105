"""
Builds what would be published and uses it as whoever installs it does: the wheel alone, in an environment of its own.

    python tests/release/check.py

The commands are those of the documentation's first page, the steps of training fewer.
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

        python = install_alone(folder / "venv", f"{wheel}[train]")
        (folder / "work" / "configs").mkdir(parents=True)
        (folder / "work" / CONFIG).write_text((ROOT / CONFIG).read_text(encoding="utf-8"), encoding="utf-8")
        environment = environment_alone(PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}")
        for command in [*quick_start(), ["python", "-c", blocks_in("README.md", "python")[0]]]:
            print("$", shlex.join(command) if len(command[-1]) < 99 else "the README's ten lines", flush=True)
            subprocess.run(command, check=True, cwd=folder / "work", env=environment)
        print(f"{source.name} and {wheel.name} are ready")


def quick_start() -> list[list[str]]:
    lines = blocks_in("docs/index.md", "")[0].splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("free-transformer")]
    assert [command[1] for command in commands] == ["train", "evaluate", "generate", "plan"], commands
    return [[*command, STEPS] if command[1] == "train" else command for command in commands]


if __name__ == "__main__":
    main()
