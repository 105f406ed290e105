"""Loads the files of an ONNX export, checks them, and runs its graphs with onnxruntime."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import numpy as np

from free_transformer.errors import InputError, MissingDependency, RunError
from free_transformer.files import first_line

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, NodeArg, OrtValue

EXPORT_FILE, PRIOR_FILE = "export.json", "plan_prior.npy"
CUDA_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
NEEDED_SETTINGS = ("latent_dim", "plan_span", "vocab_size", "max_position_embeddings")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

Provider = str | tuple[str, dict[str, object]]
SpecialToken = int | list[int] | None


class OptionalSettings(TypedDict, total=False):
    """Optional settings in `config.json`."""

    sliding_window: int | None
    plan_names: dict[str, str] | None


class ModelSettings(OptionalSettings):
    """Settings in `config.json` that generation needs."""

    latent_dim: int
    plan_span: int | str
    vocab_size: int
    max_position_embeddings: int
    num_key_value_heads: int
    head_dim: int


class ExportSummary(TypedDict):
    """The value in `export.json` that generation needs: the fixed numbers of texts and tokens, or None."""

    static: tuple[int, int] | None


class ExportFolder:
    """
    Reads the settings in the folder of an export.

    Args:
        folder: folder created by `free-transformer export --to onnx`.

    Raises:
        ValueError: if the folder is not an export, or a file is missing or incomplete.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        if not (self.path / EXPORT_FILE).is_file():
            raise InputError(
                f"{folder}: not an export (it has no {EXPORT_FILE}); give a folder created by `free-transformer export`"
            )
        summary = self._read_json(EXPORT_FILE, "static")
        config = self._read_json("config.json", *NEEDED_SETTINGS)
        generation: dict[str, object] = {}
        if (self.path / "generation_config.json").is_file():
            generation = self._read_json("generation_config.json")
        sizes = cast("list[int] | None", summary["static"])
        self.summary: ExportSummary = {"static": (sizes[0], sizes[1]) if sizes else None}
        self.settings = cast(ModelSettings, config)
        self._special = {name: cast(SpecialToken, generation.get(name, config.get(name))) for name in SPECIAL_TOKENS}

    def special_tokens(self, name: str) -> list[int]:
        """Returns the token ids of `bos_token_id`, `eos_token_id` or `pad_token_id`, of which any number may be set."""
        return token_list(self._special[name])

    def load_prior(self) -> np.ndarray | None:
        """Returns the log-probabilities of the aggregate prior, None for a model without one."""
        file = self.path / PRIOR_FILE
        return np.load(file, allow_pickle=False) if file.is_file() else None

    def graph_file(self, graph: str) -> Path:
        """Returns the file of a graph. Raises `ValueError` if it is missing."""
        file = self.path / f"{graph}.onnx"
        if not file.is_file():
            raise InputError(f"{file}: file is missing; copy it too, or export the model again")
        return file

    def _read_json(self, name: str, *needed: str) -> dict[str, object]:
        """Reads a JSON object from a file of the export. Raises `ValueError` if it lacks one of the needed keys."""
        file = self.path / name
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be read as JSON ({first_line(error)})") from error
        missing = [key for key in needed if not isinstance(values, dict) or key not in values]
        if missing:
            raise InputError(f"{file}: {', '.join(missing)} is missing; export the model again")
        if not isinstance(values, dict):
            raise InputError(f"{file}: expected a JSON object; export the model again")
        return values


class GraphSessions:
    """
    onnxruntime sessions, one per graph.

    A graph is read into memory when it is first used. Later changes to its file have no effect.

    Args:
        providers: onnxruntime providers. The first one that supports an operation runs it.
        threads: number of threads per operation, default all cores.

    Raises:
        ValueError: for a provider that this onnxruntime does not have.
        ImportError: if onnxruntime is not installed.
    """

    def __init__(self, folder: ExportFolder, providers: Sequence[Provider], threads: int | None):
        self.folder, self.threads = folder, threads
        self.providers = _checked_providers(providers)
        self._sessions: dict[str, InferenceSession] = {}

    def run(self, graph: str, inputs: Mapping[str, np.ndarray], past: "Sequence[OrtValue]" = ()) -> "list[OrtValue]":
        """
        Runs a graph.

        Args:
            inputs: inputs by name, without the cache.
            past: keys and values, which the graph returns after its first output.

        Returns:
            the outputs. The cache stays on the provider's device.

        Raises:
            ValueError: if the graph cannot be loaded. RuntimeError: if it cannot be run.
        """
        session = self.session(graph)
        device = "cuda" if _provider_name(self.providers[0]) in CUDA_PROVIDERS else "cpu"
        binding = session.io_binding()
        for argument in session.get_inputs():
            if argument.name in inputs:
                binding.bind_cpu_input(argument.name, np.ascontiguousarray(inputs[argument.name]))
        for name, value in zip(_past_names(session.get_inputs()), past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            binding.bind_output(output.name, device if output.name.startswith("present.") else "cpu")
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors have no common class
            file = f"{self.folder.path / graph}.onnx"
            raise RunError(f"{file}: onnxruntime failed ({first_line(error)})") from error
        return binding.get_outputs()

    def empty_past(self, batch: int) -> "list[OrtValue]":
        """Returns an empty cache for `decode`."""
        names = _past_names(self.session("decode").get_inputs())
        settings = self.folder.settings
        shape = (batch, settings["num_key_value_heads"], 0, settings["head_dim"])
        return ort_values([np.zeros(shape, np.float32) for _ in names])

    def session(self, graph: str) -> "InferenceSession":
        """Returns the session of a graph, loaded on first use. Raises `ValueError` if it cannot be loaded."""
        if graph not in self._sessions:
            self._sessions[graph] = self._load(self.folder.graph_file(graph))
        return self._sessions[graph]

    def _load(self, file: Path) -> "InferenceSession":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # fatal only, since errors are raised
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        weights = file.with_name(f"{file.name}.data")
        try:
            if weights.is_file():  # otherwise onnxruntime maps this file, so later changes would have an effect
                data = weights.read_bytes()
                options.add_external_initializers_from_files_in_memory([weights.name], [data], [len(data)])
            return onnxruntime.InferenceSession(file.read_bytes(), options, providers=self.providers)
        except Exception as error:  # onnxruntime's errors have no common class
            raise InputError(f"{file}: cannot be loaded by onnxruntime ({first_line(error)})") from error


def ort_values(arrays: Sequence[np.ndarray]) -> "list[OrtValue]":
    """Converts keys and values for `GraphSessions.run`."""
    from onnxruntime import OrtValue

    return [OrtValue.ortvalue_from_numpy(np.ascontiguousarray(each)) for each in arrays]


def token_list(tokens: int | Sequence[int] | None) -> list[int]:
    """Returns one, several or no token ids as a list."""
    if tokens is None:
        return []
    return [tokens] if isinstance(tokens, int) else list(tokens)


def _checked_providers(providers: Sequence[Provider]) -> list[Provider]:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency("an exported model needs onnxruntime: pip install onnxruntime") from error
    available = onnxruntime.get_available_providers()
    if not providers:
        raise InputError(f"providers=[]: give at least one provider of {', '.join(available)}")
    for provider in providers:
        if _provider_name(provider) not in available:
            raise InputError(f"provider {_provider_name(provider)!r}: this onnxruntime has {', '.join(available)}")
    return list(providers)


def _provider_name(provider: Provider) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _past_names(arguments: "Sequence[NodeArg]") -> list[str]:
    return [argument.name for argument in arguments if argument.name.startswith("past.")]
