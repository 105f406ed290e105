"""The folder of a run: its files, and how they are read and written."""

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.data import Rows, build_rows, load_tokenizer, read_documents
from free_transformer.evaluation.comparison import Comparison
from free_transformer.evaluation.control import Control
from free_transformer.evaluation.likelihood import Likelihood
from free_transformer.evaluation.plan_examples import PlanExamples
from free_transformer.evaluation.usage import usage_warning
from free_transformer.files import (
    claimed_folder,
    few,
    files_in,
    is_in_use,
    new_folder,
    not_a_folder,
    read_marker,
    update_marker,
    write_json,
    write_text,
)
from free_transformer.runs.lines import JsonObject, append_line, read_lines, write_lines
from free_transformer.runs.load_model import load_pretrained
from free_transformer.runs.model_card import write_model_card
from free_transformer.runtime.arrays import check_vocabulary
from free_transformer.settings import Settings, SettingsError, load_settings

RESULTS = {"nll", "transfer", "agreement", "texts"}  # keys that distinguish our results from files of other programs


def titles_of(runs: Sequence["Run"]) -> list[str]:
    """Returns the names of the runs' folders, or their paths if the names are not unique."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


class Run:
    """
    The folder of a run. `Run.open` opens an existing run; `Run(path)` may also be a new folder to train in.

    It contains `config.yaml` with the settings as used, `metrics.jsonl`, `history.jsonl`, `checkpoints/step-N/`,
    `model/`, results (`metrics.json`, `comparison.json`, `control.json`, `plan_examples.json`) and `report.html`.
    A `config.yaml` that the user wrote or edited is not replaced: the settings as used are then in `config.used.yaml`.

    Raises:
        SettingsError: from `settings`, `load_model` and others, if the folder is not a run or has no model yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics_file = self.path / "metrics.jsonl"
        self.history_file = self.path / "history.jsonl"
        self.evaluation_file = self.path / "metrics.json"
        self.comparison_file = self.path / "comparison.json"
        self.control_file = self.path / "control.json"
        self.examples_file = self.path / "plan_examples.json"
        self.report_file = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.model_folder = self.path / "model"
        self.adapter_folder = self.path / "adapter"  # only with training.lora_rank; model/ has the adapters merged

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """
        Opens the folder of an existing run.

        Raises:
            SettingsError: if the folder is not a run, or its settings cannot be read.
        """
        run = cls(path)
        _ = run.settings
        return run

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name

    @property
    def config_file(self) -> Path:
        """The file with the settings as used."""
        return self._used_config if self._used_config.exists() else self.path / "config.yaml"

    @cached_property
    def settings(self) -> Settings:
        if not self.config_file.is_file():
            raise SettingsError(_explain_no_run(self.path))
        return load_settings(self.config_file, to_train=False)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """
        Claims the folder for this process while it trains.

        Raises:
            SettingsError: if another process trains in it, or if it contains a model or other files that no run wrote.
        """
        written = [
            *(self.metrics_file, self.history_file, self.evaluation_file, self.comparison_file, self.control_file),
            *(
                self.examples_file,
                self.report_file,
                self.checkpoints,
                self.model_folder,
                self.adapter_folder,
                self._used_config,
            ),
        ]
        with claimed_folder(self.path, "run", [path.name for path in written]):
            yield

    @property
    def has_ended(self) -> bool:
        """Whether the last training is complete and `model/` is its result."""
        return (self.model_folder / "config.json").is_file() and read_marker(self.path).get("ended", True)

    @property
    def in_use(self) -> bool:
        """Whether a process is training in this folder."""
        return is_in_use(self.path)

    @property
    def model(self) -> JsonObject:
        """
        Description of `model/`; empty if unknown.

        `id` is new for every training. `step` is the step of the weights. `trained` is the last step of the training,
        which is later than `step` if the best weights were kept.
        """
        return read_marker(self.path).get("model") or {}

    def load_model(self) -> PreTrainedModel:
        """Loads the trained model, in eval mode."""
        return load_pretrained(self._trained_model())

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(str(self._trained_model()))

    def load_with_tokenizer(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Loads the model, in eval mode, and its tokenizer. `InputError` if token ids exceed its vocabulary."""
        model, tokenizer = self.load_model(), self.load_tokenizer()
        check_vocabulary(tokenizer, model.config.vocab_size, self.path)
        return model, tokenizer

    def _trained_model(self) -> Path:
        _ = self.settings  # raises if the folder is not a run
        if not self.model_folder.is_dir():
            raise SettingsError(f"{self.path}: the run has no model yet; finish training first")
        return self.model_folder

    def held_out_rows(self, tokenizer: PreTrainedTokenizerBase, sources: list[str] | None = None) -> Rows:
        """Reads rows from `sources`, default the run's held-out text, with the row length of its training."""
        data = self.settings.data
        sources = sources or data.validation
        if not sources:
            raise SettingsError(f"{self.path}: data.validation is empty; pass held-out text with --data")
        documents = read_documents(sources, data.column, "validation", data.max_bad_rows)
        return build_rows(documents, tokenizer, self.settings.training.seq_len)

    def write_config(self, settings: Settings) -> None:
        """Writes the settings as used, with absolute paths, so that commands can run in any folder."""
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
        Yields an empty folder that becomes `model/`. Files in the old one that no training wrote are kept.

        Args:
            step, trained: as in `model`.
        """
        ours = self.model.get("files", [])
        model = {"id": uuid.uuid4().hex, "step": step, "trained": trained, "files": ours}
        update_marker(self.path, model=model, ended=False)  # earlier results belong to another model
        with new_folder(self.model_folder, ours) as folder:
            yield folder
            model["files"] = files_in(folder)
        update_marker(self.path, model=model, ended=True)

    def begin_training(self) -> None:
        """Records that training is in progress, so an existing `model/` is not its result."""
        update_marker(self.path, ended=False)

    def read_results(self, file: Path) -> JsonObject | None:
        """Returns the contents of a results file, or None if it does not exist or another program wrote it."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return values if isinstance(values, dict) and values.keys() & RESULTS else None

    def current_results(self, file: Path) -> JsonObject | None:
        """Same as `read_results`, but also returns None for results that were measured on an earlier model."""
        results = self.read_results(file)
        return results if results is not None and self.is_current(file, results) else None

    def is_current(self, file: Path, results: JsonObject) -> bool:
        """Whether results were measured on the current `model/`."""
        if results.get("model"):
            return results["model"].get("id") == self.model.get("id")
        if not self.has_ended:
            return False
        return file.stat().st_mtime >= (self.model_folder / "config.json").stat().st_mtime  # other programs write no id

    def append_history(self, step: int, **values: object) -> None:
        """Records a training that starts at `step`. Drops records from that step on, which left no checkpoint."""
        kept = [line for line in self.read_history() if line["step"] < step]
        write_lines(self.history_file, [*kept, {"step": step, **values}])

    def read_history(self) -> list[JsonObject]:
        """Returns one line per start of training: step, time, host, version and changed settings."""
        return read_lines(self.history_file)

    def write_evaluation(
        self, likelihood: Likelihood, bytes_per_token: float, data: Sequence[str] | None = None
    ) -> str | None:
        """
        Writes `metrics.json` and the model card.

        Args:
            data: sources of the text, default the run's held-out text.

        Returns:
            the reason if the plan is not used, else None.
        """
        values = {name: value for name, value in asdict(likelihood).items() if name != "per_document"}
        warning = usage_warning(likelihood)
        values |= {"bytes_per_token": bytes_per_token, "warning": warning}
        values["data"] = list(data or self.settings.data.validation)
        write_json(self.evaluation_file, {**values, "model": self._measured_model})
        write_model_card(self)
        return warning

    def write_comparison(
        self, comparison: Comparison, bytes_per_token: float, baseline: str | None = None, method: str | None = None
    ) -> None:
        """
        Writes `comparison.json` and the model card.

        Args:
            baseline: name of the baseline's run.
            method: how the NLL of this run was computed, as in `Likelihood`.
        """
        values = {**asdict(comparison), "bytes_per_token": bytes_per_token, "baseline": baseline, "method": method}
        write_json(self.comparison_file, {**values, "model": self._measured_model})
        write_model_card(self)

    def write_control(self, control: Control) -> None:
        """Writes `control.json`, all numbers of `control`, and the model card."""
        listed = ("plans", "verdicts", "transferred")
        values = {name: value for name, value in vars(control).items() if name not in listed}
        write_json(self.control_file, {**values, "model": self._measured_model})
        write_model_card(self)

    def write_examples(self, examples: PlanExamples) -> None:
        """Writes `plan_examples.json`."""
        write_json(self.examples_file, {**asdict(examples), "model": self._measured_model})

    def append_metrics(self, **values: object) -> None:
        append_line(self.metrics_file, values)

    def read_metrics(self) -> list[JsonObject]:
        """Returns the lines of `metrics.jsonl`, without an incomplete last line left by a crash."""
        return read_lines(self.metrics_file)

    def forget_metrics_after(self, step: int) -> None:
        """Drops the metrics that an interrupted run logged after the checkpoint from which it resumes."""
        write_lines(self.metrics_file, [line for line in self.read_metrics() if line["step"] <= step])

    @property
    def _used_config(self) -> Path:
        return self.path / "config.used.yaml"

    @property
    def _measured_model(self) -> JsonObject:
        return {name: self.model.get(name) for name in ("id", "step")}


def check_folder_of_run(path: Path) -> None:
    """Raises `SettingsError` if a path is not a folder, for commands that check their output folder first."""
    if not_a_folder(path):
        raise SettingsError(_explain_no_run(path))


def _explain_no_run(path: Path) -> str:
    problem = f"not a run ({not_a_folder(path) or 'it has no config.yaml'})"
    runs = sorted(str(file.parent) for file in path.glob("*/config.yaml"))
    if runs:
        return f"{path}: {problem}; it contains {few(runs)}: choose one of them"
    return f"{path}: {problem}; give a folder created by `free-transformer train`"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
