"""The folder of a run, and what is in it."""

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.data import Rows, build_rows, load_tokenizer, read_documents
from free_transformer.evaluation.comparison import Comparison
from free_transformer.evaluation.control import Control
from free_transformer.evaluation.likelihood import Likelihood
from free_transformer.evaluation.usage import usage_warning
from free_transformer.files import (
    claimed_folder,
    files_in,
    is_in_use,
    new_folder,
    read_marker,
    update_marker,
    write_json,
    write_text,
)
from free_transformer.runs.load_model import load_pretrained
from free_transformer.runs.model_card import write_model_card
from free_transformer.settings import Settings, SettingsError, load_settings


def titles_of(runs: Sequence["Run"]) -> list[str]:
    """The folders' names, or their paths where names are not enough."""
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


class Run:
    """
    `config.yaml` as used, `metrics.jsonl`, `history.jsonl`, `checkpoints/step-N/`, `model/`, `metrics.json`,
    `report.html`.

    A `config.yaml` in the folder that somebody else wrote or edited is left alone; the settings as used are then in
    `config.used.yaml`.

    Raises:
        SettingsError: by `settings`, `load_model` and the like, where the folder is no run or has no model yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics_file = self.path / "metrics.jsonl"
        self.history_file = self.path / "history.jsonl"
        self.evaluation_file = self.path / "metrics.json"
        self.comparison_file = self.path / "comparison.json"
        self.control_file = self.path / "control.json"
        self.report_file = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.model_folder = self.path / "model"
        self.adapter_folder = self.path / "adapter"  # of a run with training.lora_rank; model/ has it merged

    @property
    def config_file(self) -> Path:
        """The settings as used."""
        return self._used_config if self._used_config.exists() else self.path / "config.yaml"

    @cached_property
    def settings(self) -> Settings:
        if not self.config_file.is_file():
            raise SettingsError(f"{self.path}: not a run (it has no config.yaml); a run is what train writes")
        return load_settings(self.config_file, to_train=False)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """
        Holds the folder for this process while it trains.

        Raises:
            SettingsError: where another process trains in it, or where it holds a model or other files that no run
                wrote.
        """
        written = [
            *(self.metrics_file, self.history_file, self.evaluation_file, self.comparison_file, self.control_file),
            *(self.report_file, self.checkpoints, self.model_folder, self.adapter_folder, self._used_config),
        ]
        with claimed_folder(self.path, "run", [path.name for path in written]):
            yield

    @property
    def has_ended(self) -> bool:
        """Whether the last training has come to its end and `model/` is of it."""
        return (self.model_folder / "config.json").is_file() and read_marker(self.path).get("ended", True)

    @property
    def in_use(self) -> bool:
        """Whether a process is training in this folder."""
        return is_in_use(self.path)

    @property
    def model(self) -> dict[str, Any]:
        """
        What `model/` is: its `id`, new with every training; the `step` of its weights; and the step that `trained` has
        reached, which is later where the best weights were kept. Empty where that is not known.
        """
        return read_marker(self.path).get("model") or {}

    def load_model(self) -> PreTrainedModel:
        """The trained model, in eval mode."""
        return load_pretrained(self._trained_model())

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(str(self._trained_model()))

    def _trained_model(self) -> Path:
        _ = self.settings  # a folder that is no run is told so
        if not self.model_folder.is_dir():
            raise SettingsError(f"{self.path}: the run has no model yet; train it to its end first")
        return self.model_folder

    def held_out_rows(self, tokenizer: PreTrainedTokenizerBase, sources: list[str] | None = None) -> Rows:
        """The text of `sources`, default the run's own held-out text, in rows of the length that it trained on."""
        data = self.settings.data
        sources = sources or data.validation
        if not sources:
            raise SettingsError(f"{self.path}: data.validation names no text; give some with --data")
        documents = read_documents(sources, data.column, "validation", data.max_bad_rows)
        return build_rows(documents, tokenizer, self.settings.training.seq_len)

    def write_config(self, settings: Settings) -> None:
        """Records the settings as used. Paths in them are absolute, so that they hold wherever a command runs."""
        text = settings.with_absolute_paths().to_yaml()
        marker = read_marker(self.path)
        file = self.config_file
        if file != self._used_config and file.exists() and _digest(file.read_bytes()) != marker.get("config"):
            file = self._used_config
        write_text(file, text)
        update_marker(self.path, kind="run", config=_digest(text.encode()))

    @contextmanager
    def new_model(self, step: int, trained: int) -> Iterator[Path]:
        """
        A folder to fill that becomes `model/`. Files in the old one that no training wrote are kept.

        Args:
            step, trained: as in `model`.
        """
        ours = self.model.get("files", [])
        model = {"id": uuid.uuid4().hex, "step": step, "trained": trained, "files": ours}
        update_marker(self.path, model=model, ended=False)  # from now on, earlier results are of another model
        with new_folder(self.model_folder, ours) as folder:
            yield folder
            model["files"] = files_in(folder)
        update_marker(self.path, model=model, ended=True)

    def begin_training(self) -> None:
        """Records that `model/`, if there is one, is going to be that of a shorter training."""
        update_marker(self.path, ended=False)

    def read_results(self, file: Path) -> dict[str, Any] | None:
        """
        What `metrics.json`, `comparison.json` or `control.json` hold; None where there is no such file, or one that
        was written by something else.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return values if isinstance(values, dict) and values.keys() & {"nll", "transfer", "agreement"} else None

    def is_current(self, file: Path, results: dict[str, Any]) -> bool:
        """Whether results were measured on the model that is in `model/` now, not on an earlier one."""
        if results.get("model"):
            return results["model"].get("id") == self.model.get("id")
        newer = file.stat().st_mtime >= (self.model_folder / "config.json").stat().st_mtime
        return self.has_ended and newer  # results that were not written by us

    def append_history(self, step: int, **values: Any) -> None:
        """Records a training from `step` on. Records of attempts from that step on left nothing, and are dropped."""
        kept = [line for line in self.read_history() if line["step"] < step]
        write_text(self.history_file, "".join(json.dumps(line) + "\n" for line in [*kept, {"step": step, **values}]))

    def read_history(self) -> list[dict[str, Any]]:
        """A line for each time that training began: the step, when, by which version, and which settings changed."""
        return _read_lines(self.history_file)

    def write_evaluation(
        self, likelihood: Likelihood, bytes_per_token: float, data: Sequence[str] | None = None
    ) -> str | None:
        """Writes `metrics.json` and the model's card, and returns what the first warns of. `data`: if not the run's."""
        values = {name: value for name, value in asdict(likelihood).items() if name != "per_document"}
        warning = usage_warning(likelihood)
        values |= {"bytes_per_token": bytes_per_token, "warning": warning}
        values["data"] = list(data or self.settings.data.validation)
        write_json(self.evaluation_file, {**values, "model": self._measured_model})
        write_model_card(self)
        return warning

    def write_comparison(self, comparison: Comparison, bytes_per_token: float) -> None:
        """Writes `comparison.json` and the model's card."""
        values = {**asdict(comparison), "bytes_per_token": bytes_per_token, "model": self._measured_model}
        write_json(self.comparison_file, values)
        write_model_card(self)

    def write_control(self, control: Control) -> None:
        """Writes `control.json`, all numbers of `control`, and the model's card."""
        listed = ("plans", "verdicts", "transferred")
        values = {name: value for name, value in vars(control).items() if name not in listed}
        write_json(self.control_file, {**values, "model": self._measured_model})
        write_model_card(self)

    def append_metrics(self, **values: Any) -> None:
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:  # a full disk does not say which file it has no room for
            raise OSError(error.errno, error.strerror, str(self.metrics_file)) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; a last line that a crash cut short is left out."""
        return _read_lines(self.metrics_file)

    def forget_metrics_after(self, step: int) -> None:
        """Drops what an interrupted run has logged beyond the checkpoint that it resumes from."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_text(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))

    @property
    def _used_config(self) -> Path:
        return self.path / "config.used.yaml"

    @property
    def _measured_model(self) -> dict[str, Any]:
        return {name: self.model.get(name) for name in ("id", "step")}


def _read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
