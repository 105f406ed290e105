"""
The model as functions of tensors, as exporters need them: without random numbers, cache objects and branches on values.

    training   tokens, uniform noise       -> logits, plan logits, plan
    encode     tokens                      -> plan logits
    decode     tokens, plan, past          -> logits, present

Shapes: B texts of T tokens, P plans of H bits, S tokens in the past. Padding is on the left, or without a past on
either side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from free_transformer.model.configuration import FreeTransformerConfig
from free_transformer.model.layout import num_plans, plan_layout
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.outputs import LowerOutput

Shape = tuple[int | str, ...]  # variable dimensions have names


@dataclass
class Argument:
    """An input of a graph."""

    name: str
    shape: Shape
    dtype: torch.dtype

    def example(self, sizes: dict[str, int]) -> Tensor:
        """Returns values to trace with, given the `sizes` of the named dimensions."""
        shape = [sizes[size] if isinstance(size, str) else size for size in self.shape]
        if self.dtype == torch.int64:
            return torch.ones(shape, dtype=torch.int64)
        return torch.rand(shape) < 0.5 if self.dtype == torch.bool else torch.rand(shape)


class Graph(nn.Module):
    """
    A part of the model that is exported as one graph.

    Args:
        model: in eval mode, float32, with SDPA or eager attention.

    Attributes:
        arguments: arguments of `forward`, in order.
        outputs: names of the returned tensors.
    """

    name: str
    arguments: list[Argument]
    outputs: list[str]

    def __init__(self, model: FreeTransformer):
        super().__init__()
        self.model = model

    def lower_layers(self, input_ids: Tensor, attention_mask: Tensor, past: "_Past | None" = None) -> LowerOutput:
        """
        Runs the lower layers on (B, T) tokens with a (B, S + T) mask. The plan layout is only set without a past.

        With a sliding window the past may lack the oldest tokens, which no new one attends to. The mask has them all.
        """
        model, window = self.model, self.model.config.sliding_window
        tokens, total = input_ids.shape[1], attention_mask.shape[1]
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0).narrow(1, total - tokens, tokens)
        real = attention_mask.bool()
        if window is not None and past is not None:
            total = past.length + tokens
            last = torch.arange(total, device=input_ids.device) + (attention_mask.shape[1] - total)
            real = real.index_select(1, last)
        columns = torch.arange(total, device=input_ids.device)
        own = torch.arange(tokens, device=input_ids.device)[:, None] + (total - tokens)
        seen = columns <= own
        if window is not None:
            seen = seen & (own - columns < window)
        # padding attends to itself: softmax over a fully masked row gives NaN
        mask = (seen & real[:, None]) | (columns == own)
        embedded = model.model.embed_tokens(input_ids)
        layout, plans = None, 0
        if past is None:
            layout = plan_layout(model.config.plan_span, positions, real, packed=False)
            plans = layout.num_plans
        return model.model.run_lower(embedded, mask[:, None], positions, past, layout, plans)

    def upper_layers(self, lower: LowerOutput, plan: Tensor, columns: Tensor | int = 0) -> Tensor:
        """Returns the logits of all tokens, or of those in `columns`, under a plan of (B, P, H) bits."""
        of_token = lower.token_plan[:, :, None].expand(-1, -1, plan.shape[2])
        states = self.model.plan_table(plan.gather(1, of_token))
        return self.model.compute_logits(lower, states, columns)


def _tokens(masked: str = "tokens") -> list[Argument]:
    """Returns the arguments for tokens and for a mask with `masked` columns."""
    return [
        Argument("input_ids", ("batch", "tokens"), torch.int64),
        Argument("attention_mask", ("batch", masked), torch.int64),
    ]


class Training(Graph):
    """A forward pass of training with the noise as an input: `plan = noise < sigmoid(plan_logits)`."""

    name = "training"

    def __init__(self, model: FreeTransformer):
        super().__init__(model)
        config = model.config
        bits: Shape = ("batch", _plans(config.plan_span), config.latent_dim)
        self.arguments = [*_tokens(), Argument("noise", bits, torch.float32)]
        self.outputs = ["logits", "plan_logits", "plan"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lower = self.lower_layers(input_ids, attention_mask)
        plan_logits = self.model.encode(lower)
        plan = noise < plan_logits.sigmoid()
        return self.upper_layers(lower, plan), plan_logits, plan


class Encode(Graph):
    """Computes the logits of the posterior, like `FreeTransformer.infer_plan`."""

    name = "encode"

    def __init__(self, model: FreeTransformer):
        super().__init__(model)
        self.arguments = _tokens()
        self.outputs = ["plan_logits"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.encode(self.lower_layers(input_ids, attention_mask))


class Decode(Graph):
    """
    A step of generation: the logits of tokens that begin a text or continue a cache, under the text's plans.

    Args:
        past: number of tokens in the cache. `"past"` allows any number including 0; 0 means no cache. With another
            number the cache keeps that size: new tokens replace the oldest ones, which must be padding.
    """

    def __init__(self, model: FreeTransformer, past: int | str = "past", name: str = "decode"):
        super().__init__(model)
        config = model.config
        self.name, self.past = name, past
        kept: Shape = ("batch", config.num_key_value_heads, past, config.head_dim)
        plans = 1 if config.plan_span == "sequence" else "plans"
        self.arguments = [
            *_tokens("total"),
            Argument("columns", ("asked",), torch.int64),
            Argument("plan", ("batch", plans, config.latent_dim), torch.bool),
        ]
        if past != 0:
            self.arguments += [Argument(f"past.{name}", kept, torch.float32) for name in cache_names(config)]
        self.outputs = ["logits", *(f"present.{name}" for name in cache_names(config))]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, columns: Tensor, plan: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """
        Args:
            input_ids: (B, T), new tokens.
            attention_mask: (B, S + T), 0 for padding, including the past. With a sliding window also the tokens that
                the past no longer holds.
            columns: (K,), indices of the tokens whose logits are returned; `[T - 1]` to generate.
            plan: (B, P, H), from the first token of the text up to at least the last new one.
            past: keys and values of each layer in turn, (B, heads, S, head_dim).

        Returns:
            logits, (B, K, V), and the new keys and values in the order of `past`.
        """
        cache = _Past(past, fixed=isinstance(self.past, int) and self.past > 0)
        lower = self.lower_layers(input_ids, attention_mask, cache)
        return (self.upper_layers(lower, plan, columns), *cache.present)


class _Past:
    """A minimal cache for attention: it appends new keys and values to those of the past."""

    def __init__(self, past: tuple[Tensor, ...], fixed: bool):
        self.past, self.fixed = past, fixed
        self.present: list[Tensor] = []

    @property
    def length(self) -> int:
        return self.past[0].shape[2] if self.past else 0

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        new = key.shape[2]
        both = (key, value)
        if self.past:
            key, value = (torch.cat([old, each], 2) for old, each in zip(self.past[2 * layer :], both, strict=False))
        self.present += [key[:, :, new:], value[:, :, new:]] if self.fixed else [key, value]
        return key, value


def cache_names(config: FreeTransformerConfig) -> list[str]:
    """Names of all layers' keys and values, without the prefixes `past.` and `present.`."""
    return [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]


def _plans(plan_span: int | str) -> int | str:
    """Returns the number of plans of `tokens` tokens, or the name of the dimension."""
    if plan_span == "sequence":
        return 1
    return "tokens" if plan_span == 1 else "plans"


def dynamic_graphs(model: FreeTransformer) -> list[Graph]:
    """Returns the graphs for any number of texts and tokens."""
    return [Training(model), Encode(model), Decode(model)]


def static_graphs(model: FreeTransformer, length: int) -> list[Graph]:
    """
    Returns the graphs for fixed shapes.

    `prefill` takes a prompt padded on the left to `length` tokens, and `decode` continues it token by token.
    """
    return [Training(model), Encode(model), Decode(model, past=0, name="prefill"), Decode(model, past=length)]


def traced_sizes(graph: Graph, static: tuple[int, int] | None) -> dict[str, int]:
    """Returns the sizes of the named dimensions for tracing. `static`: fixed numbers of texts and of tokens, if any."""
    config = graph.model.config
    plan_span = config.plan_span
    if static is None:
        # the tracer treats sizes 0 and 1 as constants, also of plans
        tokens = 6 if plan_span == "sequence" else int(plan_span) + 5
        sizes = {"batch": 2, "tokens": tokens, "past": tokens + 1, "asked": 3}
        sizes["total"] = sizes["tokens"] + (sizes["past"] if graph.name == "decode" else 0)
        if graph.name == "decode" and config.sliding_window is not None:
            sizes["total"] += 2  # tokens that the past no longer holds
        sizes["plans"] = num_plans(plan_span, sizes["total"])
        return sizes
    batch, length = static
    total = length + 1 if graph.name == "decode" else length
    tokens = 1 if graph.name == "decode" else length
    return {"batch": batch, "tokens": tokens, "total": total, "asked": 1, "plans": num_plans(plan_span, length)}
