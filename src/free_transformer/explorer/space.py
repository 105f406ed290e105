"""Writes a folder for a Hugging Face Space: the model, its page, and their requirements."""

import shutil
from pathlib import Path

from free_transformer import __version__
from free_transformer.explorer.sources import BASELINE_FOLDER, Opened, model_files
from free_transformer.explorer.survey import PlanSurvey
from free_transformer.files import own_folder, write_text

README = """---
title: {name}
emoji: 🗺️
colorFrom: blue
colorTo: green
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
---

Plans of the Free Transformer `{name}`: grids of texts, bits as switches, a map of plans.

On any machine: `pip install -r requirements.txt`, then `python app.py`.
"""
APP = '''"""Serves the page on the port that a Space expects."""

from pathlib import Path

from free_transformer.explorer.app import serve_explorer
from free_transformer.explorer.sources import open_model

if __name__ == "__main__":
    serve_explorer(open_model(Path(__file__).parent / "model", name={name!r}), "0.0.0.0", 7860)
'''
REQUIREMENTS = "--extra-index-url https://download.pytorch.org/whl/cpu\nfree-transformer-lm[{extras}]=={version}\n"


def write_space(opened: Opened, survey: PlanSurvey | None, folder: Path, overwrite: bool = False) -> None:
    """
    Writes the folder.

    Args:
        survey: survey of the model's plans, since the Space has no held-out text.

    Raises:
        SettingsError: if the folder contains other files.
    """
    import gradio

    protected = [opened.folder, *([] if opened.baseline is None else [opened.baseline])]
    with own_folder(folder, "space", overwrite, protected) as new:
        write_text(new / "README.md", README.format(name=opened.name, gradio=gradio.__version__))
        write_text(new / "app.py", APP.format(name=opened.name))
        extras = "explore,export" if opened.is_onnx else "explore"
        write_text(new / "requirements.txt", REQUIREMENTS.format(extras=extras, version=__version__))
        copy_model(opened.folder, new / "model")
        if opened.baseline is not None:
            copy_model(opened.baseline, new / "model" / BASELINE_FOLDER)
        if survey is not None:
            survey.save(new / "model")


def copy_model(folder: Path, target: Path) -> None:
    """Copies the files of a model, or of a run's trained model."""
    for source in model_files(folder):
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / source.name)
