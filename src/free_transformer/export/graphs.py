"""
The model as three functions of tensors alone, which is what an exporter takes: no configuration, no random numbers, no
cache object, no question about a tensor's values.

    training   tokens, uniform noise       -> logits, plan logits, plan
    encode     tokens                      -> plan logits
    decode     tokens, plan, past          -> logits, present

B texts of T tokens, P plans of H bits; the past holds S tokens. Padding on the left or, where there is no past, on the
right.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from free_transformer.model.configuration import FreeTransformerConfig
from free_transformer.model.layout import num_plans, plan_layout
from free_transformer.model.modeling import FreeTransformer, LowerOutput

Shape = tuple[int | str, ...]  # a name for what may vary


@dataclass
class Argument:
    """An input of a graph: its name, its shape and its type."""

    name: str
    shape: Shape
    dtype: torch.dtype

    def example(self, sizes: dict[str, int]) -> Tensor:
        """Values to trace with, `sizes` of the named dimensions."""
        shape = [sizes[size] if isinstance(size, str) else size for size in self.shape]
        if self.dtype == torch.int64:
            return torch.ones(shape, dtype=torch.int64)
        return torch.rand(shape) < 0.5 if self.dtype == torch.bool else torch.rand(shape)


class Graph(nn.Module):
    """
    Args:
        model: in eval mode, float32, with SDPA or eager attention.

    Attributes:
        arguments: of `forward`, in order.
        outputs: names of what it returns.
    """

    name: str
    arguments: list[Argument]
    outputs: list[str]

    def __init__(self, model: FreeTransformer):
        super().__init__()
        self.model = model

    def lower_layers(self, input_ids: Tensor, attention_mask: Tensor, past: "_Past | None" = None) -> LowerOutput:
        """(B, T) tokens and (B, S + T) their mask; a layout where there is no past."""
        model = self.model
        tokens, total = input_ids.shape[1], attention_mask.shape[1]
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0).narrow(1, total - tokens, tokens)
        columns = torch.arange(total, device=input_ids.device)
        own = torch.arange(tokens, device=input_ids.device)[:, None] + (total - tokens)
        real = attention_mask.bool()
        # padding reads itself: a row of attention that may read nothing would not be a number
        mask = ((columns <= own) & real[:, None]) | (columns == own)
        embedded = model.model.embed_tokens(input_ids)
        layout, plans = None, 0
        if past is None:
            layout = plan_layout(model.config.plan_span, positions, real, packed=False)
            plans = layout.num_plans
        return model.run_lower_layers(embedded, mask[:, None], positions, past, layout, plans)  # type: ignore[arg-type]

    def upper_layers(self, lower: LowerOutput, plan: Tensor, columns: Tensor | int = 0) -> Tensor:
        """Logits of all tokens, or of those in `columns`, under a plan of (B, P, H) bits."""
        of_token = lower.token_plan[:, :, None].expand(-1, -1, plan.shape[2])
        states = self.model.plan_table(plan.gather(1, of_token))
        return self.model.run_upper_layers(lower, states, columns)


def _tokens(masked: str = "tokens") -> list[Argument]:
    """Tokens, and the mask of these or of `masked` ones."""
    return [
        Argument("input_ids", ("batch", "tokens"), torch.int64),
        Argument("attention_mask", ("batch", masked), torch.int64),
    ]


class Training(Graph):
    """A forward pass of training, but for its random numbers: `plan = noise < sigmoid(plan_logits)`."""

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
    """The posterior's logits, `FreeTransformer.infer_plan`."""

    name = "encode"

    def __init__(self, model: FreeTransformer):
        super().__init__(model)
        self.arguments = _tokens()
        self.outputs = ["plan_logits"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.encode(self.lower_layers(input_ids, attention_mask))


class Decode(Graph):
    """
    Tokens that follow those of a cache, or begin a text, under the text's plans.

    Args:
        past: tokens of the cache: `"past"`, any number, none too; 0, none at all; or a number, which the cache then
            keeps: its oldest tokens, which must be padding, give way to new ones.
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
            input_ids: (B, T), tokens to read.
            attention_mask: (B, S + T), 0 on padding, of the past too.
            columns: those of the T tokens whose logits are asked for; `[T - 1]` to write on.
            plan: (B, P, H), of the whole text from its first token, at least as far as it has come.
            past: keys and values of each layer in turn, (B, heads, S, head_dim).
        """
        cache = _Past(past, fixed=isinstance(self.past, int) and self.past > 0)
        lower = self.lower_layers(input_ids, attention_mask, cache)
        return (self.upper_layers(lower, plan, columns), *cache.present)


class _Past:
    """What attention takes for a cache: it puts keys and values behind those of the past."""

    def __init__(self, past: tuple[Tensor, ...], fixed: bool):
        self.past, self.fixed = past, fixed
        self.present: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        new = key.shape[2]
        both = (key, value)
        if self.past:
            key, value = (torch.cat([old, each], 2) for old, each in zip(self.past[2 * layer :], both, strict=False))
        self.present += [key[:, :, new:], value[:, :, new:]] if self.fixed else [key, value]
        return key, value


def cache_names(config: FreeTransformerConfig) -> list[str]:
    """Of keys and values of all layers, as the inputs `past.…` and the outputs `present.…` are named."""
    return [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]


def _plans(plan_span: int | str) -> int | str:
    """The number of plans of `tokens` tokens."""
    if plan_span == "sequence":
        return 1
    return "tokens" if plan_span == 1 else "plans"


def dynamic_graphs(model: FreeTransformer) -> list[Graph]:
    """For any number of texts and tokens."""
    return [Training(model), Encode(model), Decode(model)]


def static_graphs(model: FreeTransformer, length: int) -> list[Graph]:
    """For a fixed number: `prefill` reads a prompt padded on the left to `length`, `decode` goes on token by token."""
    return [Training(model), Encode(model), Decode(model, past=0, name="prefill"), Decode(model, past=length)]


def traced_sizes(graph: Graph, plan_span: int | str, static: tuple[int, int] | None) -> dict[str, int]:
    """Sizes of the named dimensions to trace a graph with; `static` is the number of texts, and of tokens."""
    if static is None:
        # What a tracer takes for variables: neither 0 nor 1, plans included.
        tokens = 6 if plan_span == "sequence" else int(plan_span) + 5
        sizes = {"batch": 2, "tokens": tokens, "past": tokens + 1, "asked": 3}
        sizes["total"] = sizes["tokens"] + (sizes["past"] if graph.name == "decode" else 0)
        sizes["plans"] = num_plans(plan_span, sizes["total"])
        return sizes
    batch, length = static
    total = length + 1 if graph.name == "decode" else length
    tokens = 1 if graph.name == "decode" else length
    return {"batch": batch, "tokens": tokens, "total": total, "asked": 1, "plans": num_plans(plan_span, length)}
