"""A batch that runs on PyTorch, on a CPU or a GPU."""

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from free_transformer.data import begin_token
from free_transformer.errors import InputError
from free_transformer.model.cache import MIN_SPARE, PlanCache, PlanState
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.sampling import MIN_TEMPERATURE, Sampling, trained_length
from free_transformer.runtime.arrays import NO_TOKEN
from free_transformer.serving.batch import Batch, NewRow, TextRequest, checked_length
from free_transformer.serving.chat import ChatTemplate
from free_transformer.serving.scoring import PromptLogits, TokenScore, log_softmax, token_scores

# With fewer rows, CPU matrix libraries choose other algorithms, which round differently, so a text would depend on the
# number of other texts. From this many rows on, each row of a product was bit-for-bit the same.
MIN_ROWS = 16
COLUMN_MULTIPLE = 64  # the number of cache columns read is a multiple of this


class TorchBatch(Batch[Tensor]):
    """
    Args:
        model: model on the device to run on. It is set to eval mode and PyTorch's attention.
        tokenizer: fast tokenizer of `transformers`, based on `tokenizers.Tokenizer`.
        max_rows: maximum number of texts at a time.
        max_length: maximum number of tokens of a text that the model sees at a time. Default: the model's, at most
            2,048.

    Raises:
        ValueError: for a tokenizer without a `tokenizers.Tokenizer`, and a `max_length` above the model's.
    """

    def __init__(
        self,
        model: FreeTransformer,
        tokenizer: PreTrainedTokenizerBase,
        max_rows: int = 32,
        max_length: int | None = None,
    ):
        config = model.config
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise InputError(
                f"{type(tokenizer).__name__}: a server needs a fast tokenizer, based on the package tokenizers"
            )
        ends = model.generation_config.eos_token_id
        super().__init__(
            Tokenizer.from_str(backend.to_str()),
            begin_token(tokenizer),
            [] if ends is None else [ends] if isinstance(ends, int) else ends,
            config.vocab_size,
            config.latent_dim,
            config.plan_span,
            max_rows,
            checked_length(max_length, trained_length(vars(config))),
            ChatTemplate.of(tokenizer.chat_template, tokenizer.special_tokens_map),
            config.sliding_window,
            config.plan_names,
        )
        self.model = model.eval()
        if config._attn_implementation not in ("sdpa", "eager"):  # others do not accept four-dimensional masks
            model.set_attn_implementation("sdpa")
        self.reset()

    def reset(self) -> None:
        rows = max(self.max_rows, MIN_ROWS)
        self.contexts = []
        self.cache = RowCache(self.model, rows, self.max_length)
        self.lengths = torch.zeros(rows, dtype=torch.long)
        shape = (rows, self.num_plans(self.max_length), self.latent_dim)
        self.plan = torch.zeros(shape, dtype=torch.bool, device=self.model.device)

    def prior(self, name: str) -> np.ndarray | None:
        prior = self.model.plan_prior
        return prior.log_aggregate.cpu().float().numpy() if prior.checked(name) == "aggregate" else None

    def infer_plan(self, tokens: list[int]) -> np.ndarray:
        return self.model.infer_plan(self._on_device([tokens]))[0].float().cpu().numpy()

    @torch.inference_mode()
    def add(self, request: TextRequest) -> NewRow[Tensor]:
        model, row = self.model, self.rows
        cache = PlanCache(model.config)
        lower = model.lower_layers(self._on_device([request.tokens]), cache=cache)
        plan = self.complete_plan(request, lambda: model.encode(lower)[0].float().cpu().numpy())
        context = self.begin_context(request, plan)
        bits = self._on_device(context.plans(self.max_length))
        logits = model.upper_layers(lower, bits[None], logits_to_keep=1)[:, -1]
        self._store(row, cache, bits, len(request.tokens))
        self.contexts.append(context)
        return NewRow(plan, logits)

    @torch.inference_mode()
    def read_again(self, row: int) -> int:
        context, cache = self.contexts[row].read_again(), PlanCache(self.model.config)
        bits, count = self._on_device(context.plans(self.max_length)), len(context.tokens)
        if count:
            lower = self.model.lower_layers(self._on_device([context.tokens]), cache=cache)
            self.model.upper_layers(lower, bits[None], logits_to_keep=1)
        self._store(row, cache, bits, count)
        self.contexts[row] = context
        return count

    def _store(self, row: int, cache: PlanCache, plan: Tensor, length: int) -> None:
        if length:
            self.cache.store(row, cache)
        self.plan[row, : len(plan)] = plan
        self.lengths[row] = length

    @torch.inference_mode()
    def step(self, tokens: Sequence[int | None]) -> Tensor:
        rows = max(self.rows, MIN_ROWS)
        reads = torch.tensor([token is not None for token in tokens] + [False] * (rows - self.rows))
        read = self.lengths[:rows].where(reads, 0)
        lengths = self._on_device(read)
        mask = self.cache.begin_step(lengths, int(read.max()) + 1)
        given = [self.begin if token is None else token for token in tokens]
        ids = self._on_device(given + [self.begin] * (rows - self.rows))[:, None]
        logits = self.model(
            ids,
            attention_mask=mask,
            position_ids=lengths[:, None],
            cache=self.cache,
            plan=PlanState(plan=self.plan[:rows], columns=0),
            logits_to_keep=1,
        ).logits
        self.lengths[:rows] += reads  # last, so that a failed step can be repeated
        self.advance(tokens)
        return logits[: self.rows, -1]

    def sample(self, logits: Tensor, sampling: Sequence[Sampling], uniform: np.ndarray) -> list[int]:
        return sample_tokens(logits, sampling, uniform)

    def score_token(self, logits: Tensor, row: int, token: int, top: int) -> TokenScore:
        return token_scores(log_softmax(logits[row : row + 1].float().cpu().numpy()), [token], top)[0]

    @torch.inference_mode()
    def prompt_logits(self, tokens: list[int], plans: np.ndarray, columns: int) -> PromptLogits:
        model = self.model
        lower = model.lower_layers(self._on_device([tokens]))
        states: list[Tensor] = []
        for start in range(0, len(tokens), columns):
            for which, plan in enumerate(plans):
                if start == 0:
                    states.append(model.upper_states(lower, self._on_device(plan)[None])[0])
                logits = model.lm_head(states[which][start : start + columns])
                yield start, which, logits.float().cpu().numpy()

    @torch.inference_mode()
    def remove(self, row: int) -> None:
        last = self.rows - 1
        self.contexts[row] = self.contexts[last]
        self.contexts.pop()
        if row != last:
            self.cache.move(last, row, int(self.lengths[last]))
            self.plan[row] = self.plan[last]
            self.lengths[row] = self.lengths[last]
        self.lengths[last] = 0  # as for all unused rows

    def _on_device(self, values: Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(values).to(self.model.device)


class RowCache:
    """
    Keys and values of rows of different lengths, left-aligned: (rows, heads, columns, head_dim) per layer.

    It replaces a cache of `transformers` in a step that reads one token of each row. With a sliding window it has only
    as many columns as the window needs: each new token overwrites one that is no longer attended to.

    Attributes:
        is_compileable: read by the model; False, since the number of columns in use changes between steps.
    """

    is_compileable = False

    def __init__(self, model: FreeTransformer, rows: int, max_length: int):
        config = model.config
        self.window = max_length if config.sliding_window is None else min(config.sliding_window, max_length)
        self.max_columns = _rounded(self.window)
        shape = (rows, config.num_key_value_heads, min(MIN_SPARE, self.max_columns), config.head_dim)
        layers = range(config.num_hidden_layers)
        # zeros: masked values have weight 0, but 0 times NaN is NaN
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    def store(self, row: int, cache: PlanCache) -> None:
        """Copies the cache of a single text into a row."""
        length = int(cache.get_seq_length())
        self._reserve(length)
        for ours, theirs in zip([self.keys, self.values], ["keys", "values"], strict=True):
            for states, layer in zip(ours, cache.layers, strict=True):
                read = getattr(layer, theirs)[0]
                columns = torch.arange(length - read.shape[1], length, device=read.device) % self.max_columns
                states[row][:, columns] = read

    def move(self, row: int, to: int, length: int) -> None:
        for states in [*self.keys, *self.values]:
            states[to, :, :length] = states[row, :, :length]

    def begin_step(self, lengths: Tensor, longest: int) -> Tensor:
        """Returns the mask, (rows, 1, 1, columns) bool, for one new token per row. `longest`: maximum new length."""
        self._reserve(longest)
        self.columns = min(_rounded(longest), self.max_columns)
        self.places = lengths % self.columns
        self.rows = torch.arange(len(lengths), device=lengths.device)
        age = (lengths[:, None] - torch.arange(self.columns, device=lengths.device)) % self.columns
        return (age < (lengths[:, None] + 1).clamp(max=self.window))[:, None, None]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Stores states of new tokens, both (rows, heads, 1, head_dim). Returns the states of all columns in use."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self.rows, :, self.places] = key[:, :, 0]
        values[self.rows, :, self.places] = value[:, :, 0]
        rows = len(self.rows)
        return keys[:rows, :, : self.columns], values[:rows, :, : self.columns]

    def _reserve(self, columns: int) -> None:
        held, columns = self.keys[0].shape[2], min(columns, self.max_columns)
        if columns <= held:
            return
        capacity = min(max(2 * held, _rounded(columns)), self.max_columns)
        # allocate both before replacing either, so that the cache is unchanged if memory runs out
        keys, values = (
            [torch.nn.functional.pad(old, (0, 0, 0, capacity - held)) for old in states]
            for states in (self.keys, self.values)
        )
        self.keys, self.values = keys, values


def _rounded(columns: int) -> int:
    return -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def sample_tokens(logits: Tensor, sampling: Sequence[Sampling], uniform: np.ndarray) -> list[int]:
    """Same as `runtime.arrays.sample_tokens`, on the device of the logits, (B, V), with one `Sampling` per row."""
    finite = torch.isfinite(logits).all(-1)
    chosen = logits.argmax(-1)
    known = finite.tolist()
    sampled = [row for row, each in enumerate(sampling) if known[row] and each.temperature >= MIN_TEMPERATURE]
    truncated = [row for row in sampled if sampling[row].top_k or sampling[row].top_p < 1]
    for rows in ([row for row in sampled if row not in truncated], truncated):
        if not rows:
            continue
        differences = logits[rows].double()
        differences -= differences.amax(-1, keepdim=True)
        weights = (differences / _column([sampling[row].temperature for row in rows], logits)).exp()
        order = None
        if rows is truncated:
            weights, order = torch.sort(weights, dim=-1, descending=True, stable=True)
            weights = _truncate(weights, [sampling[row] for row in rows])
        cumulative = weights.cumsum(-1)
        numbers = torch.from_numpy(uniform[rows]).to(cumulative)[:, None]
        picked = (cumulative < numbers * cumulative[:, -1:]).sum(-1, keepdim=True)
        chosen[rows] = (picked if order is None else order.gather(1, picked))[:, 0]
    return chosen.masked_fill(~finite, NO_TOKEN).tolist()


def _truncate(weights: Tensor, sampling: Sequence[Sampling]) -> Tensor:
    """Sets weights outside `top_k` and `top_p` to 0. Weights are (B, V), the most likely token first."""
    rank = torch.arange(weights.shape[1], device=weights.device)
    top_k = _column([each.top_k for each in sampling], weights)
    before = weights.cumsum(-1) - weights
    inside = before < _column([each.top_p for each in sampling], weights) * weights.sum(-1, keepdim=True)
    inside[:, 0] = True  # the most likely token always stays
    return weights.where(inside & ((rank < top_k) | (top_k == 0)), 0)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Returns values as a (B, 1) float64 tensor on the device of `like`."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
