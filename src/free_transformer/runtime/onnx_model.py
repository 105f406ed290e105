"""Generates text and reads plans with an ONNX export, without torch."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from free_transformer.errors import InputError, RunError
from free_transformer.files import first_line
from free_transformer.model.context import check_plan_changes, context_limit, example_windows
from free_transformer.model.sampling import (
    PLANS,
    PRIORS,
    PROMPT_PLANS,
    Sampling,
    check_choice,
    check_max_new_tokens,
    check_num_texts,
    check_seed,
    length_warning,
    trained_length,
)
from free_transformer.runtime.arrays import (
    NO_TOKEN,
    as_tokens,
    check_vocabulary,
    move_padding_left,
    repeat_last_row,
    sample_tokens,
)
from free_transformer.runtime.byte_alphabet import utf8
from free_transformer.runtime.onnx_decoder import OnnxDecoder, context_of_prompt, plans_of_ends
from free_transformer.runtime.plan_source import (
    PlanSource,
    average_posterior,
    given_plan,
    num_plans,
    num_plans_to_read,
    sample_posterior,
    sample_prior,
    sample_stratified_posterior,
    sample_stratified_prior,
)
from free_transformer.runtime.sessions import (
    ExportFolder,
    GraphSessions,
    Provider,
    ort_values,
    token_list,
)

if TYPE_CHECKING:
    from onnxruntime import OrtValue
    from tokenizers import Tokenizer
    from typing_extensions import Unpack

DECODERS, STATIC_DECODERS = ("decode",), ("prefill", "decode")  # graphs that generation always needs


class GenerationOptions(TypedDict, total=False):
    """The options of `OnnxFreeTransformer.stream`."""

    plan: ArrayLike | None
    plan_changes: Mapping[int, ArrayLike] | None
    prompt_plan: str
    prior: str
    plans: str
    num_return_sequences: int
    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    eos_token_id: int | Sequence[int] | None
    seed: int | None


class OnnxFreeTransformer:
    """
    A Free Transformer in an ONNX export.

    Graphs are read into memory when they are first needed. Later changes to the files have no effect.

    Args:
        folder: folder created by `free-transformer export --to onnx`.
        providers: onnxruntime providers, such as `["CUDAExecutionProvider", "CPUExecutionProvider"]`. The first one
            that supports an operation runs it. A provider with options is a pair of name and dictionary. Default: the
            CPU.
        threads: number of threads per operation, default all cores.

    Raises:
        ValueError: for a folder that is not an export or lacks a file, or a provider that this onnxruntime does not
            have.
        ImportError: if onnxruntime is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        providers: Sequence[Provider] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ):
        self._files = ExportFolder(folder)
        self.folder, self.config = self._files.path, self._files.settings
        self.latent_dim, self.plan_span = self.config["latent_dim"], self.config["plan_span"]
        self.static, self.window = self._files.summary["static"], self.config.get("sliding_window")
        for graph in self._decoders:  # `encode` is needed only to infer plans
            self._files.graph_file(graph)
        self._sessions = GraphSessions(self._files, providers, threads)

    def infer_plan(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None) -> np.ndarray:
        """Returns the posterior's logits, (B, P, H), for texts of (B, T) tokens; `> 0` is the most likely plan."""
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
        method: str = "independent",
    ) -> np.ndarray:
        """Samples plans, (B, P, H) bool, like `FreeTransformer.sample_plan`."""
        check_choice("method", method, PLANS)
        sample = sample_prior if method == "independent" else partial(sample_stratified_prior, num_samples=batch_size)
        return sample((batch_size, num_plans), self.latent_dim, self.prior(prior), rng or np.random.default_rng())

    def prior(self, name: str) -> np.ndarray | None:
        """Returns the log-probabilities of a prior for `plan_source.sample_prior`. Raises `ValueError` if missing."""
        check_choice("prior", name, PRIORS)
        if name == "uniform":
            return None
        if self._log_aggregate is None:
            raise InputError("prior='aggregate': the exported model has no aggregate prior; use 'uniform'")
        return self._log_aggregate

    def generate(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, **options: "Unpack[GenerationOptions]"
    ) -> np.ndarray:
        """
        Returns the prompts followed by the generated tokens, (B, T + N), with `num_return_sequences` rows per prompt.
        A text that has ended is followed by padding.

        Args:
            input_ids: (B, T) tokens.
            attention_mask: (B, T), 0 on padding, which may be on either side.
            options: options of `stream`.
        """
        tokens, mask = as_tokens(input_ids, attention_mask, self.config["vocab_size"])
        new = list(self.stream(tokens, mask, **options))
        tokens = tokens.repeat(len(new[0]) // len(tokens), axis=0)
        return np.concatenate([tokens, np.stack(new, axis=1)], axis=1)

    def stream(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        plan: ArrayLike | None = None,
        plan_changes: Mapping[int, ArrayLike] | None = None,
        prompt_plan: str = "posterior",
        prior: str = "uniform",
        plans: str = "independent",
        num_return_sequences: int = 1,
        max_new_tokens: int = 200,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | None = None,
    ) -> Iterator[np.ndarray]:
        """
        Generates like `generate`, and yields one new token of each text at a time, (B,).

        Args:
            plan: (P, H) or (B, P, H) bits, text such as `"0110"`, or a name, as in `FreeTransformer.generate`. Missing
                plans come from the prompt and, for new text, from the prior.
            plan_changes: later plans, keyed by the number of new tokens after which they apply: `{2000: "1001"}`.
            prompt_plan: source of the prompt's plans, `"posterior"` (the encoder) or `"prior"`.
            prior: `"uniform"` or `"aggregate"`.
            plans: `"independent"` or `"stratified"`, as in `FreeTransformer.generate`.
            num_return_sequences: number of texts per prompt, at least 1.
            max_new_tokens: maximum number of new tokens, at least 1. A text that exceeds the trained length is read
                again; see `model.context`.
            do_sample: sample tokens; otherwise choose the most likely token.
            temperature, top_k, top_p: see `sampling.Sampling`.
            eos_token_id: tokens that end a text, default the model's; `()` for none.
            seed: seed of plans and tokens, an integer from -2**63 to 2**64 - 1.

        Raises:
            ValueError: for options or token ids out of range, and more texts than a static export holds.
            RuntimeError: if the model's logits are NaN or infinite.
        """
        check_choice("prompt_plan", prompt_plan, PROMPT_PLANS)
        check_choice("plans", plans, PLANS)
        check_num_texts(num_return_sequences)
        check_max_new_tokens(max_new_tokens)
        sampling = Sampling(temperature, top_k, top_p)
        tokens, mask = move_padding_left(*as_tokens(input_ids, attention_mask, self.config["vocab_size"]))
        # Plans and tokens have separate random streams, so the start of a text does not depend on its length.
        seeds = np.random.SeedSequence(None if seed is None else check_seed(seed)).spawn(2)
        plan_rng, token_rng = (np.random.default_rng(each) for each in seeds)
        longest = tokens.shape[1] + max_new_tokens - 1  # the last token is never read
        if plan is not None:
            plan = self._given_plan(plan, len(tokens)).repeat(num_return_sequences, axis=0)
        tokens, mask = (each.repeat(num_return_sequences, axis=0) for each in (tokens, mask))
        texts = num_return_sequences if plans == "stratified" else 1
        bits = self._complete_plan(plan, tokens, mask, longest, prompt_plan, prior, plan_rng, texts)
        decoder = OnnxDecoder(self, mask, bits, longest, self.context_limit)
        for start, changed in check_plan_changes(plan_changes, self.plan_span).items():
            decoder.changes[start] = self._given_plan(changed, len(tokens))
        trained = trained_length(self.config)
        if self.context_limit is None and self.static is None and trained is not None and longest > trained:
            warnings.warn(length_warning(longest + 1, trained), stacklevel=2)
        if not do_sample:
            sampling = Sampling(0.0, top_k, top_p)
        yield from self._continue(decoder, tokens, sampling, max_new_tokens, self.ends(eos_token_id), token_rng)

    @property
    def context_limit(self) -> int | None:
        """Maximum number of tokens of a text that the model sees; None for no limit. See `model.context`."""
        trained = self.config["max_position_embeddings"]
        if self.static is not None:  # its cache has no sliding window
            return context_limit(min(trained, self.static[1]), self.plan_span)
        return context_limit(trained, self.plan_span, self.config.get("sliding_window"))

    def _continue(
        self,
        decoder: OnnxDecoder,
        tokens: np.ndarray,
        sampling: Sampling,
        max_new_tokens: int,
        ends: list[int],
        rng: np.random.Generator,
    ) -> Iterator[np.ndarray]:
        """Yields new tokens, (B,) each, until all texts have ended."""
        padding = [*self._files.special_tokens("pad_token_id"), *ends][:1]
        ended = np.zeros(len(tokens), dtype=bool)
        settings = (sampling.temperature, sampling.top_k, sampling.top_p)
        temperature, top_k, top_p = (np.full(len(tokens), each) for each in settings)
        for _ in range(max_new_tokens):
            logits = decoder.read(tokens)
            chosen = sample_tokens(logits, temperature, top_k, top_p, rng.random(len(logits)))
            if (chosen == NO_TOKEN).any():
                raise RunError(f"{self.folder}: the model's logits are NaN or infinite")
            if ended.any():
                chosen = np.where(ended, padding[0], chosen)
            yield chosen
            ended |= np.isin(chosen, ends)
            if ended.all():
                return
            tokens = chosen[:, None]

    def write(self, prompt: str = "", num_samples: int = 1, **options: "Unpack[GenerationOptions]") -> list[str]:
        """Generates texts that begin with `prompt`, with options of `stream`. Needs the package `tokenizers`."""
        options["num_return_sequences"] = num_samples
        sequences = self.generate([self._encode(prompt)], **options)
        return self.tokenizer.decode_batch(sequences.tolist(), skip_special_tokens=True)

    def plan_of_text(self, text: str) -> np.ndarray:
        """Returns the most likely plans of a text of any length, (P, H) bool (see `example_windows`)."""
        length = self.config["max_position_embeddings"] if self.static is None else self.static[1]
        windows = example_windows(self._encode(text), length, self.plan_span)
        return average_posterior([self.infer_plan([window])[0] for window in windows]) > 0.5

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer exported with the model. Raises `ValueError` if there is none."""
        from tokenizers import Tokenizer

        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{self.folder}: no tokenizer was exported; call generate with tokens")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # `tokenizers` raises plain exceptions
            raise InputError(f"{file}: cannot be read as a tokenizer ({first_line(error)})") from error
        check_vocabulary(tokenizer, self.config["vocab_size"], file)
        tokenizer.encode_special_tokens = True  # text that looks like a special token is encoded as plain text
        return tokenizer

    def run(self, graph: str, inputs: Mapping[str, np.ndarray], past: "Sequence[OrtValue]" = ()) -> "list[OrtValue]":
        """Runs one of the exported graphs; see `GraphSessions.run`."""
        return self._sessions.run(graph, inputs, past)

    def read_in_pieces(self, input_ids: np.ndarray, attention_mask: np.ndarray, plan: np.ndarray) -> np.ndarray:
        """Returns the logits of the last three tokens, (B, 3, V). Reads the last two one by one, the others at once."""
        longest = input_ids.shape[1]
        decoder = OnnxDecoder(self, attention_mask[:, : longest - 2], plan, longest)
        pieces = [input_ids[:, : longest - 2], input_ids[:, -2:-1], input_ids[:, -1:]]
        return np.stack([decoder.read(piece) for piece in pieces], axis=1)

    def no_past(self, batch: int) -> "list[OrtValue]":
        """Returns an empty cache."""
        return self._sessions.empty_past(batch)

    def ort_values(self, arrays: Sequence[np.ndarray]) -> "list[OrtValue]":
        """Converts keys and values for `run`."""
        return ort_values(arrays)

    def within_window(self, past: "list[OrtValue]") -> "list[OrtValue]":
        """
        Drops keys and values outside the model's sliding window, to which no further token attends.

        This copies the remaining ones, so it is done only once per window length.
        """
        if self.static is not None or self.window is None or past[0].shape()[2] < 2 * self.window:
            return past
        surplus = past[0].shape()[2] - (self.window - 1)
        return self.ort_values([each.numpy()[:, :, surplus:] for each in past])

    def load(self) -> None:
        """Loads all graphs that generation may need. Raises `ValueError` if one cannot be loaded."""
        for graph in ("encode", *self._decoders):
            self._sessions.session(graph)

    @property
    def _decoders(self) -> tuple[str, ...]:
        return DECODERS if self.static is None else STATIC_DECODERS

    def _complete_plan(
        self,
        plan: ArrayLike | None,
        tokens: np.ndarray,
        mask: np.ndarray,
        longest: int,
        prompt_plan: str,
        prior: str,
        rng: np.random.Generator,
        texts: int = 1,
    ) -> np.ndarray:
        """Completes plans, (B, P, H), for texts of `longest` tokens, stratified over each `texts` consecutive rows."""
        (batch, length), wanted = tokens.shape, self.num_plans(longest)
        given = self._given_plan(plan, batch)
        if given.shape[1] >= wanted:
            return given[:, :wanted]
        begin = next(iter(self._begin_tokens()), None)
        num_read = num_plans_to_read(tokens, mask, prompt_plan, self.plan_span, begin)
        read = np.zeros((batch, 0, self.latent_dim), dtype=bool)
        tokens, mask, dropped = context_of_prompt(tokens, mask, self.context_limit, self.plan_span)
        if prompt_plan == "posterior" and given.shape[1] < self.num_plans(length):
            # also generated for empty prompts, so that plans do not depend on which prompts are read
            uniform = rng.random((batch, self.num_plans(tokens.shape[1]), self.latent_dim))
            if num_read.any() and texts == 1:
                read = sample_posterior(self.infer_plan(tokens, mask), uniform)
            elif num_read.any():
                read = sample_stratified_posterior(self.infer_plan(tokens[::texts], mask[::texts]), texts, rng)
        sampled = sample_stratified_prior((batch, wanted), self.latent_dim, self.prior(prior), rng, texts)
        if self.plan_span != "sequence" and dropped.any():
            read = plans_of_ends(read, sampled[:, : self.num_plans(length)], dropped // int(self.plan_span))
        return PlanSource(given=given, read=read, num_read=num_read, sampled=sampled).complete(wanted)

    def _given_plan(self, plan: ArrayLike | None, batch: int) -> np.ndarray:
        return given_plan(plan, batch, self.latent_dim, self.plan_span, self.config.get("plan_names"))

    def num_plans(self, num_tokens: int) -> int:
        """Returns the number of plans of a text with `num_tokens` tokens."""
        return num_plans(self.plan_span, num_tokens)

    def fit(self, tokens: np.ndarray, mask: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Pads tokens and mask to the fixed sizes of a static export. Raises `ValueError` if texts of `longest` tokens do
        not fit.
        """
        if self.static is None:
            return tokens, mask
        batch, length = self.static
        if len(tokens) > batch or longest > length:
            raise InputError(
                f"{len(tokens)} texts of {longest} tokens: this export supports {batch} of {length} (--static)"
            )
        padding = ((0, 0), (length - tokens.shape[1], 0))
        return repeat_last_row(np.pad(tokens, padding), batch), repeat_last_row(np.pad(mask, padding), batch)

    @cached_property
    def _log_aggregate(self) -> np.ndarray | None:
        return self._files.load_prior()

    def _encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, beginning with the begin-of-text token."""
        utf8(text)  # otherwise `tokenizers` raises an unhelpful TypeError
        return [self.begin_token, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    @property
    def begin_token(self) -> int:
        """The begin-of-text token, or the end-of-text token if the model has none, as in training."""
        tokens = self._begin_tokens()
        if not tokens:
            raise InputError(f"{self.folder}: the model has no begin-of-text token; call generate with tokens")
        return tokens[0]

    def _begin_tokens(self) -> list[int]:
        return [*self._files.special_tokens("bos_token_id"), *self.ends()]

    def ends(self, eos_token_id: int | Sequence[int] | None = None) -> list[int]:
        """Returns the given tokens that end a text, or the model's by default."""
        return self._files.special_tokens("eos_token_id") if eos_token_id is None else token_list(eos_token_id)
