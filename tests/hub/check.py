"""
Loads a model in a separate environment, with torch and `transformers` and without this package.

    python tests/hub/check.py            a model trained for this, of seconds
    python tests/hub/check.py RUN        the model of a run
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from load_alone import computed

sys.path.insert(0, str(Path(__file__).parents[1]))

from alone import environment_alone, install_alone
from free_transformer.training import Run, load_settings, train
from pages import ROOT

TOKENS = 20


def main(*arguments: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = Run(arguments[0]) if arguments else trained(folder / "run")
        shutil.copytree(run.model_folder, folder / "model")
        model, some = run.load_model(), torch.Generator().manual_seed(0)
        tokens = torch.randint(3, model.config.vocab_size - 9, (2, TOKENS), generator=some)
        torch.save(computed(model, tokens), folder / "computed.pt")
        python = install_alone(folder / "venv", "torch", "transformers")
        listing = [python, "-m", "pip", "--disable-pip-version-check", "list", "--format", "freeze"]
        listed = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
        assert "torch==" in listed and "free" not in listed, listed
        print(f"installed: {' '.join(listed.split())}", flush=True)
        environment = environment_alone(HF_MODULES_CACHE=str(folder / "modules"), HF_HUB_OFFLINE="1")
        command = [python, "-I", ROOT / "tests" / "hub" / "load_alone.py", "model", "computed.pt", "out"]
        subprocess.run(command, check=True, cwd=folder, env=environment)


def trained(folder: Path) -> Run:
    text = folder.with_suffix(".txt")
    text.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    changes = [f"run_dir={folder}", f"data.train={text}", f"data.validation={text}", "training.max_steps=20"]
    changes += ["model.hidden_dim=32", "model.num_layers=2", "model.num_heads=2", "model.plan_span=8"]
    return train(load_settings(ROOT / "configs" / "free_transformer.yaml", changes), quiet=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
