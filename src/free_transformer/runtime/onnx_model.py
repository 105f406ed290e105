"""An exported model: plans and text by onnxruntime and NumPy alone."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from free_transformer.errors import InputError, MissingDependency, RunError
from free_transformer.files import first_line
from free_transformer.model.sampling import (
    PRIORS,
    PROMPT_PLANS,
    Sampling,
    check_choice,
    check_max_new_tokens,
    check_plan_count,
    check_seed,
    length_warning,
)
from free_transformer.runtime.arrays import (
    NO_TOKEN,
    as_plan,
    as_tokens,
    check_vocabulary,
    draw,
    padded_on_the_left,
    rows_to,
    sample_prior,
)
from free_transformer.runtime.byte_alphabet import utf8

EXPORT_FILE, PRIOR_FILE = "export.json", "plan_prior.npy"
DECODERS, STATIC_DECODERS = ("decode",), ("prefill", "decode")  # the graphs that generation cannot do without
ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
Provider = str | tuple[str, dict[str, Any]]


class OnnxFreeTransformer:
    """
    The graphs are read into memory when they are first needed: files that change later do not change the results.

    Args:
        folder: what `free-transformer export --to onnx` has written.
        providers: of onnxruntime, the first that can run an operation does, as in `["CUDAExecutionProvider",
            "CPUExecutionProvider"]`; one with options is a pair, name and dictionary. Default: the CPU.
        threads: that one operation may use, default all cores.

    Raises:
        ValueError: for a folder that is no export or lacks a file, or a provider that this onnxruntime does not have.
        ImportError: without onnxruntime.
    """

    def __init__(
        self,
        folder: str | Path,
        providers: Sequence[Provider] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ):
        self.folder = Path(folder)
        if not (self.folder / EXPORT_FILE).is_file():
            raise InputError(f"{folder}: no export (it has no {EXPORT_FILE}); free-transformer export writes one")
        self.export = self._read_json(EXPORT_FILE, "static")
        self.config = self._read_json("config.json", "latent_dim", "plan_span", "vocab_size", "max_position_embeddings")
        has_generation_config = (self.folder / "generation_config.json").is_file()
        self.generation_config = self._read_json("generation_config.json") if has_generation_config else {}
        self.latent_dim: int = self.config["latent_dim"]
        self.plan_span: int | str = self.config["plan_span"]
        self.static: tuple[int, int] | None = tuple(self.export["static"]) if self.export["static"] else None
        for graph in self._decoders:  # `encode` is only needed where plans are read
            self._check_file(graph)
        self._providers = _checked_providers(providers)
        self._threads = threads
        self._sessions: dict[str, Any] = {}

    def infer_plan(self, input_ids: Any, attention_mask: Any = None) -> np.ndarray:
        """The posterior's logits, (B, P, H), of the plans of texts of (B, T) tokens; `> 0` is the likeliest plan."""
        tokens, mask = as_tokens(input_ids, attention_mask, self.config["vocab_size"])
        batch, length = tokens.shape
        tokens, mask = self.fit(tokens, mask, length)
        logits = self.run("encode", {"input_ids": tokens, "attention_mask": mask})[0].numpy()
        return logits[:batch, : self.num_plans(length)]

    def sample_plan(
        self,
        batch_size: int,
        num_plans: int = 1,
        rng: np.random.Generator | None = None,
        prior: str = "uniform",
    ) -> np.ndarray:
        """Plans from the prior, (B, P, H) bool: `"uniform"`, or `"aggregate"`, the plans that training texts took."""
        shape = (batch_size, num_plans)
        return sample_prior(shape, self.latent_dim, self.prior(prior), rng or np.random.default_rng())

    def prior(self, name: str) -> np.ndarray | None:
        """What `sample_prior` takes for `"uniform"` or `"aggregate"`. `ValueError` where the model has none."""
        check_choice("prior", name, PRIORS)
        if name == "uniform":
            return None
        if self._log_aggregate is None:
            raise InputError("prior='aggregate': the exported model had gathered none")
        return self._log_aggregate

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> np.ndarray:
        """
        Prompts and what follows them, (B, T + N) tokens; a text that has ended is followed by padding.

        Args:
            input_ids: (B, T) tokens.
            attention_mask: (B, T), 0 on padding, which may be on either side.
            options: of `stream`.
        """
        tokens, mask = as_tokens(input_ids, attention_mask, self.config["vocab_size"])
        new = list(self.stream(tokens, mask, **options))
        return np.concatenate([tokens, np.stack(new, axis=1)], axis=1)

    def stream(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        plan: Any = None,
        prompt_plan: str = "posterior",
        prior: str = "uniform",
        max_new_tokens: int = 200,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | None = None,
    ) -> Iterator[np.ndarray]:
        """
        The same, token by token: each time (B,).

        Args:
            plan: (P, H) or (B, P, H) bits, or text such as `"0110"`, as `FreeTransformer.generate` takes them. Missing
                plans come from the prompt and, for new text, from the prior.
            prompt_plan: where plans of the prompt come from, `"posterior"` (the encoder) or `"prior"`.
            max_new_tokens: at least 1. A text longer than the model was built for causes a warning.
            do_sample: samples tokens; without it the most likely one is taken.
            temperature, top_k, top_p: see `sampling.Sampling`.
            eos_token_id: ends a text, default the model's; `()` for none.
            seed: of plans and tokens, an integer from -2**63 to 2**64 - 1.

        Raises:
            ValueError: for options or token ids out of range, and a text longer than a static export holds.
            RuntimeError: where the model's logits are NaN or infinite.
        """
        check_choice("prompt_plan", prompt_plan, PROMPT_PLANS)
        check_max_new_tokens(max_new_tokens)
        sampling = Sampling(temperature, top_k, top_p)
        tokens, mask = padded_on_the_left(*as_tokens(input_ids, attention_mask, self.config["vocab_size"]))
        rng = np.random.default_rng(None if seed is None else check_seed(seed))
        longest = tokens.shape[1] + max_new_tokens - 1  # the last token is never read
        bits = self._complete_plan(plan, tokens, mask, longest, prompt_plan, prior, rng)
        texts = _Texts(self, mask, bits, longest)
        trained = self.config["max_position_embeddings"]
        if self.static is None and tokens.shape[1] + max_new_tokens > trained:
            warnings.warn(length_warning(tokens.shape[1] + max_new_tokens, trained), stacklevel=2)
        end = self.ends(eos_token_id)
        ended = np.zeros(len(tokens), dtype=bool)
        settings = (sampling.temperature if do_sample else 0.0, sampling.top_k, sampling.top_p)
        temperatures, top_ks, top_ps = (np.full(len(tokens), each) for each in settings)
        for _ in range(max_new_tokens):
            logits = texts.read(tokens)
            chosen = draw(logits, temperatures, top_ks, top_ps, rng.random(len(logits)))
            if (chosen == NO_TOKEN).any():
                raise RunError(f"{self.folder}: the model's logits are NaN or infinite")
            if ended.any():
                chosen = np.where(ended, self._padding(end), chosen)
            yield chosen
            ended |= np.isin(chosen, end)
            if ended.all():
                return
            tokens = chosen[:, None]

    def write(self, prompt: str = "", num_samples: int = 1, **options: Any) -> list[str]:
        """Texts that begin with `prompt`; options of `stream`. Needs the package `tokenizers`."""
        ids = self._encode(prompt)
        written = self.generate(np.tile(ids, (num_samples, 1)), **options)
        return self.tokenizer.decode_batch(written.tolist(), skip_special_tokens=True)

    def plan_of_text(self, text: str) -> np.ndarray:
        """The likeliest plans of a text, (P, H) bool, read from as much of it as the model was built for."""
        length = self.config["max_position_embeddings"] if self.static is None else self.static[1]
        return self.infer_plan([self._encode(text)[:length]])[0] > 0

    @cached_property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` that was exported with the model."""
        from tokenizers import Tokenizer

        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{self.folder}: no tokenizer was exported; use generate with tokens")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # `tokenizers` raises plain exceptions
            raise InputError(f"{file}: cannot be read as a tokenizer ({first_line(error)})") from error
        check_vocabulary(tokenizer, self.config["vocab_size"], file)
        tokenizer.encode_special_tokens = True  # what looks like a special token is text like any other
        return tokenizer

    def run(self, graph: str, inputs: Mapping[str, np.ndarray], past: Sequence[Any] = ()) -> list[Any]:
        """
        One of the exported graphs.

        Args:
            inputs: by name, but for the cache.
            past: keys and values, as the graph has returned them after its first output.

        Returns:
            its outputs, each an `onnxruntime.OrtValue`; the cache stays on the provider's device.

        Raises:
            ValueError: where the graph cannot be loaded. RuntimeError: where it cannot be run.
        """
        session = self._session(graph)
        device = "cuda" if _name(self._providers[0]) in ON_CUDA else "cpu"
        binding = session.io_binding()
        for argument in session.get_inputs():
            if argument.name in inputs:
                binding.bind_cpu_input(argument.name, np.ascontiguousarray(inputs[argument.name]))
        for name, value in zip(_starting(session.get_inputs(), "past."), past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            binding.bind_output(output.name, device if output.name.startswith("present.") else "cpu")
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors have no common class
            raise RunError(f"{self.folder / graph}.onnx: onnxruntime failed ({first_line(error)})") from error
        return binding.get_outputs()

    def read_in_pieces(self, input_ids: np.ndarray, attention_mask: np.ndarray, plan: np.ndarray) -> np.ndarray:
        """Logits of the last three tokens, (B, 3, V): two were read one by one, the others before them at once."""
        longest = input_ids.shape[1]
        texts = _Texts(self, attention_mask[:, : longest - 2], plan, longest)
        pieces = [input_ids[:, : longest - 2], input_ids[:, -2:-1], input_ids[:, -1:]]
        return np.stack([texts.read(piece) for piece in pieces], axis=1)

    def no_past(self, batch: int) -> list[Any]:
        """Keys and values of no tokens."""
        names = _starting(self._session("decode").get_inputs(), "past.")
        shape = (batch, self.config["num_key_value_heads"], 0, self.config["head_dim"])
        return self.ort_values([np.zeros(shape, np.float32) for _ in names])

    def ort_values(self, arrays: Sequence[np.ndarray]) -> list[Any]:
        """What `run` takes for keys and values."""
        from onnxruntime import OrtValue

        return [OrtValue.ortvalue_from_numpy(np.ascontiguousarray(each)) for each in arrays]

    def load(self) -> None:
        """Loads all graphs that generation may need. `ValueError` where one cannot be loaded."""
        for graph in ("encode", *self._decoders):
            self._session(graph)

    @property
    def _decoders(self) -> tuple[str, ...]:
        return DECODERS if self.static is None else STATIC_DECODERS

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # fatal: errors are raised
            if self._threads is not None:
                options.intra_op_num_threads = self._threads
            file = self._check_file(graph)
            beside = file.with_name(f"{file.name}.data")
            try:
                if beside.is_file():  # weights beside their graph would be mapped, and change with the file
                    data = beside.read_bytes()
                    options.add_external_initializers_from_files_in_memory([beside.name], [data], [len(data)])
                model = file.read_bytes()
                self._sessions[graph] = onnxruntime.InferenceSession(model, options, providers=self._providers)
            except Exception as error:  # onnxruntime's errors have no common class
                raise InputError(f"{file}: cannot be loaded by onnxruntime ({first_line(error)})") from error
        return self._sessions[graph]

    def _read_json(self, name: str, *needed: str) -> dict[str, Any]:
        """A JSON file of the export, with the keys that it needs."""
        file = self.folder / name
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be read as JSON ({first_line(error)})") from error
        missing = [key for key in needed if not isinstance(values, dict) or key not in values]
        if missing:
            raise InputError(f"{file}: {', '.join(missing)} is missing; export the model again")
        return values

    def _check_file(self, graph: str) -> Path:
        file = self.folder / f"{graph}.onnx"
        if not file.is_file():
            raise InputError(f"{file}: missing; copy it too, or export the model again")
        return file

    def _complete_plan(
        self,
        plan: Any,
        tokens: np.ndarray,
        mask: np.ndarray,
        longest: int,
        prompt_plan: str,
        prior: str,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """The caller's plans and drawn ones for the rest of a text of `longest` tokens, (B, P, H) bool."""
        batch, wanted = len(tokens), self.num_plans(longest)
        given = np.zeros((batch, 0, self.latent_dim), dtype=bool)
        if plan is not None:
            given = as_plan(plan, batch, self.latent_dim)
            check_plan_count(given.shape[1], self.plan_span)
        if given.shape[1] >= wanted:
            return given[:, :wanted]
        drawn = self.sample_plan(batch, wanted, rng, prior)
        if prompt_plan == "posterior" and given.shape[1] < self.num_plans(tokens.shape[1]):
            logits = self.infer_plan(tokens, mask)
            read = rng.random(logits.shape) * (1 + np.exp(-logits.astype(np.float64))) < 1
            written = np.arange(logits.shape[1]) < np.reshape(self.num_plans(mask.sum(1)), (-1, 1))
            # a prompt of nothing but begin-of-text has no text to read a plan from
            written = written & ((tokens != self._special("bos_token_id")) & (mask == 1)).any(1, keepdims=True)
            drawn[:, : logits.shape[1]] = np.where(written[..., None], read, drawn[:, : logits.shape[1]])
        return np.concatenate([given, drawn[:, given.shape[1] :]], axis=1)

    def num_plans(self, num_tokens: Any) -> Any:
        """Plans of a text of so many tokens, or of texts, (B,)."""
        return 1 if self.plan_span == "sequence" else -(-num_tokens // int(self.plan_span))

    def fit(self, tokens: np.ndarray, mask: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask padded to what a static export takes, where this is one; `longest` is all that follows."""
        if self.static is None:
            return tokens, mask
        batch, length = self.static
        if len(tokens) > batch or longest > length:
            raise InputError(
                f"{len(tokens)} texts of {longest} tokens: this export was made for {batch} of {length} (--static)"
            )
        padding = ((0, 0), (length - tokens.shape[1], 0))
        return rows_to(np.pad(tokens, padding), batch), rows_to(np.pad(mask, padding), batch)

    @cached_property
    def _log_aggregate(self) -> np.ndarray | None:
        file = self.folder / PRIOR_FILE
        return np.load(file, allow_pickle=False) if file.is_file() else None

    def _encode(self, text: str) -> list[int]:
        """Tokens of a text from its beginning."""
        utf8(text)  # `tokenizers` raises a TypeError about its own types
        return [self.begin_token, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    @property
    def begin_token(self) -> int:
        """That a text begins with: as in training, where the model has none, the one that ends texts."""
        begin = self._special("bos_token_id")
        begin = [begin] if begin is not None else self.ends()[:1]
        if not begin:
            raise InputError(f"{self.folder}: the model has no token that begins a text; use generate with tokens")
        return begin[0]

    def ends(self, eos_token_id: int | Sequence[int] | None = None) -> list[int]:
        """The tokens that end a text: those given, default the model's."""
        ends = self._special("eos_token_id") if eos_token_id is None else eos_token_id
        if ends is None:
            return []
        return [ends] if isinstance(ends, int) else list(ends)

    def _padding(self, end: list[int]) -> int:
        padding = self._special("pad_token_id")
        return end[0] if padding is None else padding

    def _special(self, name: str) -> Any:
        return self.generation_config.get(name, self.config.get(name))


class _Texts:
    """Texts that are being written under their plans: the cache, and which of its columns are padding."""

    def __init__(self, model: OnnxFreeTransformer, mask: np.ndarray, plan: np.ndarray, longest: int):
        self.model, self.mask, self.plan, self.longest = model, mask, plan, longest
        self.batch = len(mask)
        self.past: list[Any] | None = None

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """(B, T) tokens that follow, the logits of the next one, (B, V)."""
        model, graph = self.model, "decode"
        if self.past is None:
            tokens, self.mask = model.fit(tokens, self.mask, self.longest)
            if model.static is None:
                self.past = model.no_past(len(tokens))
            else:
                self.past, graph = [], "prefill"
                missing = model.num_plans(model.static[1]) - self.plan.shape[1]
                self.plan = rows_to(np.pad(self.plan, ((0, 0), (0, missing), (0, 0))), len(tokens))
        else:
            tokens = rows_to(tokens, len(self.mask))
            self.mask = np.concatenate([self.mask, np.ones_like(tokens)], axis=1)
        columns = np.array([tokens.shape[1] - 1])
        inputs = {"input_ids": tokens, "attention_mask": self.mask, "columns": columns, "plan": self.plan}
        logits, *self.past = model.run(graph, inputs, self.past)
        if model.static is not None:  # the oldest column, which is padding, gives way
            self.mask = self.mask[:, -model.static[1] :]
        return logits.numpy()[: self.batch, -1]


def _checked_providers(providers: Sequence[Provider]) -> list[Provider]:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency("an exported model is run by onnxruntime: pip install onnxruntime") from error
    available = onnxruntime.get_available_providers()
    if not providers:
        raise InputError(f"providers=[]: name at least one provider of {', '.join(available)}")
    for provider in providers:
        if _name(provider) not in available:
            raise InputError(f"provider {_name(provider)!r}: this onnxruntime has {', '.join(available)}")
    return list(providers)


def _name(provider: Provider) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _starting(arguments: Sequence[Any], prefix: str) -> list[str]:
    return [argument.name for argument in arguments if argument.name.startswith(prefix)]
