"""The folder of a run, and what is in it."""

import json
from collections.abc import Sequence
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
from free_transformer.files import write_json, write_text
from free_transformer.loading import load_pretrained
from free_transformer.training.model_card import write_model_card
from free_transformer.training.settings import Settings, SettingsError, load_settings


def titles_of(runs: Sequence["Run"]) -> list[str]:
    """The folders' names, or their paths where names are not enough."""
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


class Run:
    """
    `config.yaml` as used, `metrics.jsonl`, `checkpoints/step-N/`, `model/`, `metrics.json`, `report.html`.

    Raises:
        SettingsError: by `settings`, `load_model` and the like, where the folder is no run or has no model yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.evaluation_file = self.path / "metrics.json"
        self.comparison_file = self.path / "comparison.json"
        self.control_file = self.path / "control.json"
        self.report_file = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.model_folder = self.path / "model"
        self.adapter_folder = self.path / "adapter"  # of a run with training.lora_rank; model/ has it merged

    @cached_property
    def settings(self) -> Settings:
        if not self.config_file.is_file():
            raise SettingsError(f"{self.path}: not a run (it has no config.yaml); a run is what train writes")
        return load_settings(self.config_file, to_train=False)

    @property
    def has_ended(self) -> bool:
        """Whether `model/` is of the settings in the folder, rather than of a shorter training before."""
        model = self.model_folder / "config.json"
        return model.is_file() and model.stat().st_mtime >= self.config_file.stat().st_mtime

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
        return build_rows(read_documents(sources, data.column), tokenizer, self.settings.training.seq_len)

    def write_config(self, settings: Settings) -> None:
        write_text(self.config_file, settings.to_yaml())

    def write_evaluation(
        self, likelihood: Likelihood, bytes_per_token: float, data: Sequence[str] | None = None
    ) -> str | None:
        """Writes `metrics.json` and the model's card, and returns what the first warns of. `data`: if not the run's."""
        values = {name: value for name, value in asdict(likelihood).items() if name != "per_document"}
        warning = usage_warning(likelihood)
        values |= {"bytes_per_token": bytes_per_token, "warning": warning}
        write_json(self.evaluation_file, {**values, "data": list(data or self.settings.data.validation)})
        write_model_card(self)
        return warning

    def write_comparison(self, comparison: Comparison, bytes_per_token: float) -> None:
        """Writes `comparison.json` and the model's card."""
        write_json(self.comparison_file, {**asdict(comparison), "bytes_per_token": bytes_per_token})
        write_model_card(self)

    def write_control(self, control: Control) -> None:
        """Writes `control.json`, all numbers of `control`, and the model's card."""
        listed = ("plans", "verdicts", "transferred")
        write_json(self.control_file, {name: value for name, value in vars(control).items() if name not in listed})
        write_model_card(self)

    def append_metrics(self, **values: Any) -> None:
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:  # a full disk does not say which file it has no room for
            raise OSError(error.errno, error.strerror, str(self.metrics_file)) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; a last line that a crash cut short is left out."""
        if not self.metrics_file.is_file():
            return []
        metrics = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                metrics.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return metrics

    def forget_metrics_after(self, step: int) -> None:
        """Drops what an interrupted run has logged beyond the checkpoint that it resumes from."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_text(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))
