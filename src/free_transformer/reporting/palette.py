"""
The colors of pages and figures, in one place.

Figures are drawn in the colors for light pages. In a page, each color becomes a CSS variable, so that figures also
adapt to dark pages. The series are distinguishable with color blindness (after Okabe and Ito, with more contrast).
"""

PAGE = {  # by CSS variable: on light and on dark pages
    "page": ("#ffffff", "#14181d"),
    "card": ("#f5f7fa", "#1c2229"),
    "text": ("#1d2733", "#dde4ec"),
    "faint": ("#5a6878", "#9aa8b7"),
    "line": ("#d7dde5", "#35404c"),
    "good": ("#00785a", "#3fc79b"),
    "problem": ("#b35c00", "#f2a541"),
}
SERIES = (
    ("#0067a5", "#62b3f0"),  # blue
    ("#d3590b", "#ff9a5c"),  # vermilion
    ("#00826a", "#45cfa6"),  # green
    ("#a8508f", "#e39bcb"),  # purple
    ("#8a7000", "#e0c94a"),  # yellow
    ("#6b7683", "#aab4bf"),  # gray
)
TEXT, FAINT, LINE = (PAGE[name][0] for name in ("text", "faint", "line"))
LIGHT = tuple(light for light, _ in SERIES)


def variables(dark: bool) -> str:
    """Returns the declarations of the CSS variables, such as `--text: #1d2733;`."""
    colors = {**PAGE, **{f"series-{index}": pair for index, pair in enumerate(SERIES)}}
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in colors.items())


def with_variables(svg: str) -> str:
    """Replaces the palette's colors in the SVG of a figure by CSS variables."""
    names = {pair[0]: f"var(--{name})" for name, pair in PAGE.items()}
    names |= {pair[0]: f"var(--series-{index})" for index, pair in enumerate(SERIES)}
    names["#000000"] = "var(--text)"  # matplotlib's default color
    for color, name in names.items():
        svg = svg.replace(f": {color}", f": {name}")
    return svg
