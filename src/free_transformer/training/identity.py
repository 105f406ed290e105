"""Identity of a run: the model, tokenizer, text and settings of a checkpoint, compared when the run resumes."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.data import Rows, fingerprint, is_path_source, source_files
from free_transformer.distributed.processes import Processes
from free_transformer.model.configuration import FreeTransformerConfig
from free_transformer.runs.lines import JsonObject
from free_transformer.settings import Settings, SettingsError, parse_settings
from free_transformer.settings.curriculum import Stage, stages_of
from free_transformer.training.batches import Documents, Stream, TrainingData, rows_of

# Names in the model's configuration that may change, since the weights have the same meaning with other values, ...
MODEL_MAY_CHANGE = {
    *("max_position_embeddings", "attention_dropout", "dropout", "free_bits", "min_bits", "aggregate_weight"),
}
# ... and names that do not describe the network, or are compared as training settings.
MODEL_IGNORED = {
    *("transformers_version", "dtype", "torch_dtype", "_name_or_path", "auto_map", "architectures"),
    *("kl_weight", "plan_gradient", "plan_names", "plan_strength"),
}
# Settings that cannot change when a run resumes,
FIXED = ("model.kind", "optimizer.name", "training.lora_rank", "training.freeze_first_half")
# settings that determine which rows come next, which can change if allowed,
ROWS = ("training.seed", "training.seq_len", "data.streaming")
ROWS_OF_STREAMS = ("data.shuffle_buffer", "data.workers", "training.batch_size")
# and settings that do not affect the results.
SILENT = ("logging.", "run_dir", "training.resume")
HEAD = 4096  # bytes of a streamed file that enter its hash


@dataclass(frozen=True)
class Change:
    """
    A setting whose value differs from the checkpoint's.

    Attributes:
        name: `section.name`.
        fixed: whether the run cannot resume with this change.
        needs_permission: whether it changes which text the run reads.
    """

    name: str
    old: object
    new: object
    fixed: bool = False
    needs_permission: bool = False

    def __str__(self) -> str:
        return f"{self.name} from {_shown(self.old)} to {_shown(self.new)}"


@dataclass(frozen=True)
class Identity:
    """
    Attributes:
        settings: all settings as used, by section.
        model: the model's configuration.
        tokenizer: fingerprint of the tokenizer.
        text: hashes of the training text, per stage and source.
        validation: hash of the held-out text, None if there is none.
        processes: number of processes that share each batch.
    """

    settings: dict[str, JsonObject]
    model: dict[str, object]
    tokenizer: str
    text: list[list[str]]
    validation: str | None
    processes: int

    @classmethod
    def of(
        cls,
        settings: Settings,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: Sequence[TrainingData],
        validation: Rows | None,
        processes: Processes,
    ) -> "Identity":
        values = settings.with_absolute_paths().model_dump(mode="json")
        config = json.loads(json.dumps(model.config.to_dict(), default=str))
        return cls(
            values,
            flat({name: value for name, value in config.items() if name not in MODEL_IGNORED}),
            fingerprint(tokenizer),
            [_hashes(each) for each in data],
            validation.digest if validation is not None else None,
            processes.data_size,
        )

    @classmethod
    def from_json(cls, values: JsonObject) -> "Identity":
        return cls(**values)

    def to_json(self) -> JsonObject:
        return asdict(self)

    def changes(self, older: "Identity", step: int) -> list[Change]:
        """
        Returns the differences from the identity of a checkpoint at `step`.

        Fixed ones come first, then those that need permission. Among these, settings come before values that may
        follow from them.
        """
        found = [*self._model_changes(older), *self._text_changes(older, step), *self._setting_changes(older)]
        names = flat(self.settings).keys() | flat(older.settings).keys()
        return sorted(found, key=lambda each: (not each.fixed, not each.needs_permission, each.name not in names))

    def _model_changes(self, older: "Identity") -> Iterable[Change]:
        if self.tokenizer != older.tokenizer:
            old, new = (f"{each.settings['data']['tokenizer']} ({each.tokenizer[:8]})" for each in (older, self))
            yield Change("data.tokenizer", old, new, fixed=True)
        if self.settings["model"]["kind"] != older.settings["model"]["kind"]:
            return  # reported separately; the configurations have few names in common
        ours = {theirs: name for name, theirs in FreeTransformerConfig.attribute_map.items()}
        for name in sorted(self.model.keys() & older.model.keys()):
            if self.model[name] != older.model[name]:
                shown = f"model.{ours.get(name, name)}"
                yield Change(shown, older.model[name], self.model[name], fixed=name not in MODEL_MAY_CHANGE)

    def _text_changes(self, older: "Identity", step: int) -> Iterable[Change]:
        yield from self._training_text_changes(older, step)
        if self.validation != older.validation:
            old, new = (each.settings["data"]["validation"] for each in (older, self))
            if old == new:
                old, new = (f"{_shown(old)} ({str(each.validation)[:8]})" for each in (older, self))
            keeps_best = self.settings["evaluation"]["early_stopping"] or self.settings["checkpoint"]["keep_best"]
            yield Change("data.validation", old, new, needs_permission=bool(keeps_best and older.validation))
        if self.processes != older.processes and self.settings["data"]["streaming"]:
            yield Change("processes", older.processes, self.processes, needs_permission=True)

    def _training_text_changes(self, older: "Identity", step: int) -> Iterable[Change]:
        begun_before, begun = _stages_begun(older, step), _stages_begun(self, step)
        old, new = (each.settings["curriculum"]["stages"] for each in (older, self))
        if (old or new) and [stage[:2] for stage in begun_before] != [stage[:2] for stage in begun]:
            old, new = (
                ", ".join(f"{length} tokens from step {start}" for start, length, _ in each)
                for each in (begun_before, begun)
            )
            yield Change("curriculum.stages", old, new, needs_permission=True)
        elif old != new:
            yield Change("curriculum.stages", old, new)
        texts_before, texts = ([text for *_, text in each] for each in (begun_before, begun))
        if self.settings["data"]["streaming"] != older.settings["data"]["streaming"] or texts_before == texts:
            return  # hashes of streamed text are not comparable
        old, new = _sources(older.settings), _sources(self.settings)
        if old == new:
            old, new = (f"{_shown(old)} ({_short(each)})" for each in (texts_before, texts))
        yield Change("data.train", old, new, needs_permission=True)

    def _setting_changes(self, older: "Identity") -> Iterable[Change]:
        old, new = flat(older.settings), flat(self.settings)
        readers = max(max(1, each.settings["data"]["workers"]) * each.processes for each in (older, self))
        streaming = self.settings["data"]["streaming"]
        handled = ("model.", "data.train", "data.validation", "data.tokenizer", "curriculum.stages")
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) == new.get(name) or name.startswith(SILENT):
                continue
            if name.startswith(handled) and name not in ("model.kind", "model.pretrained"):
                continue
            rows = ROWS + (ROWS_OF_STREAMS if streaming and (readers > 1 or name == "data.shuffle_buffer") else ())
            yield Change(name, old.get(name), new.get(name), fixed=name in FIXED, needs_permission=name in rows)


def check_changes(where: Path, changes: Iterable[Change], allowed: Sequence[str]) -> None:
    """
    Checks whether a run may resume with these changes.

    Args:
        allowed: names of settings that may change; `all` allows every change that can be allowed.

    Raises:
        SettingsError: for the first change that is fixed, or not allowed.
    """
    for change in changes:
        found = f"{change.name}={_shown(change.new)}: {where} was trained with {_shown(change.old)}"
        if change.fixed:
            raise SettingsError(f"{found} and cannot resume with another value; restore it, or choose another run_dir")
        if change.needs_permission and not {change.name, "all"} & set(allowed):
            raise SettingsError(
                f"{found} and would continue with other rows; restore it, choose another run_dir, or allow the change "
                f"with --allow-change {change.name}"
            )


def flat(settings: Mapping[str, object]) -> dict[str, object]:
    """Flattens nested settings to `section.name` and value."""
    values = {}
    for section, content in settings.items():
        if isinstance(content, dict):
            values.update({f"{section}.{name}": value for name, value in content.items()})
        else:
            values[section] = content
    return values


def source_hash(sources: Sequence[str], column: str) -> str:
    """Hashes streamed text: names, sizes and first bytes of files, and names of data sets."""
    digest = hashlib.blake2b(column.encode(), digest_size=16)
    for source in sources:
        if not is_path_source(source):
            digest.update(source.encode() + b"\0")
            continue
        root = Path(source)
        for file in source_files([source]):
            with file.open("rb") as opened:
                head = opened.read(HEAD)
            name = file.relative_to(root) if root.is_dir() else file.name
            digest.update(f"{name}\0{file.stat().st_size}\0".encode(errors="surrogateescape") + head)
    return digest.hexdigest()


def _hashes(data: TrainingData) -> list[str]:
    if isinstance(data, Stream):
        return [_stream_hash(each) for each in data.documents]
    return [part.digest for part in rows_of(data)]


def _stream_hash(documents: Documents) -> str:
    return source_hash(documents.sources, documents.column)


def _stages_begun(identity: Identity, step: int) -> list[tuple[int, int, object]]:
    """Returns start, row length and text (hashes with shares) of the stages that have begun by a step."""
    settings = parse_settings(identity.settings, to_train=False)
    begun = [
        (stage, text)
        for stage, text in zip(stages_of(settings), identity.text, strict=True)
        if stage.start < step or stage.start == 0
    ]
    return [(stage.start, stage.seq_len, _shares(stage, text)) for stage, text in begun]


def _shares(stage: Stage, text: list[str]) -> list[tuple[str, float]]:
    if isinstance(stage.sources, list):
        return [(hash_, 1.0) for hash_ in text]
    total = sum(stage.sources.values())
    return [(hash_, share / total) for hash_, share in zip(text, stage.sources.values(), strict=True)]


def _sources(settings: dict[str, JsonObject]) -> object:
    stages = [stage["data"] for stage in settings["curriculum"]["stages"] if stage["data"] is not None]
    return settings["data"]["train"] if not stages else [settings["data"]["train"], *stages]


def _short(text: object) -> str:
    return hashlib.blake2b(repr(text).encode(), digest_size=4).hexdigest()


def _shown(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
