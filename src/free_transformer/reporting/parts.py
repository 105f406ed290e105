"""The parts of a page. The template has a branch for each `kind`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from free_transformer.reporting.table import Table


@dataclass(frozen=True)
class Heading:
    kind: ClassVar = "heading"
    text: str
    level: int


@dataclass(frozen=True)
class Paragraph:
    kind: ClassVar = "paragraph"
    text: str


@dataclass(frozen=True)
class Command:
    kind: ClassVar = "command"
    text: str
    command: str


@dataclass(frozen=True)
class Warning_:  # `Warning` is a built-in exception
    kind: ClassVar = "warning"
    text: str
    when: str
    over: bool


@dataclass(frozen=True)
class TablePart:
    kind: ClassVar = "table"
    table: Table


@dataclass(frozen=True)
class Samples:
    kind: ClassVar = "samples"
    titled: Sequence[tuple[str, str]]
    single_lines: bool


@dataclass(frozen=True)
class FigurePart:
    """`drawings` is SVG; `legend` has labels with the indices of their colors."""

    kind: ClassVar = "figure"
    drawings: Sequence[str]
    caption: str
    legend: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Folded:
    kind: ClassVar = "folded"
    summary: str
    parts: "Sequence[Part]"


@dataclass(frozen=True)
class VerdictPart:
    """`tone` is `good`, `open` or `problem`."""

    kind: ClassVar = "verdict"
    sentences: Sequence[str]
    next_step: str | None
    command: str | None
    tone: str


@dataclass(frozen=True)
class Tiles:
    """Key figures: values with their labels."""

    kind: ClassVar = "tiles"
    tiles: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class PlanCard:
    """A text under a plan, with a note about the plan."""

    plan: str
    note: str
    text: str


@dataclass(frozen=True)
class PlanCards:
    """Texts that begin with `prompt`, each under its plan. Bits that are not in `live` are faint."""

    kind: ClassVar = "plans"
    texts: Sequence[PlanCard]
    prompt: str
    live: Sequence[int]


@dataclass(frozen=True)
class Flip:
    """
    Attributes:
        plan: plan with the bit flipped.
        effect: description of the effect.
        share: effect as a share of the largest one, 0 to 1.
        same, changed: the text under this plan, up to and from the first word that differs.
    """

    plan: str
    bit: int
    effect: str
    share: float
    same: str
    changed: str


@dataclass(frozen=True)
class Flips:
    """A text under a plan, empty to leave it out, and under the plan with one bit flipped."""

    kind: ClassVar = "flips"
    live: Sequence[int]
    plan: str
    text: str
    flips: Sequence[Flip]


@dataclass(frozen=True)
class Heatmap:
    """Rows with a label and shares, 0 to 1, under columns that are plans."""

    kind: ClassVar = "heatmap"
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float]]]
    caption: str


Part: TypeAlias = (
    Heading
    | Paragraph
    | Command
    | Warning_
    | TablePart
    | Samples
    | FigurePart
    | Folded
    | VerdictPart
    | Tiles
    | PlanCards
    | Flips
    | Heatmap
)
