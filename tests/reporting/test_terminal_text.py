"""Generated text on a terminal: control characters are escaped, and samples of a run take one line."""

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from free_transformer.reporting.console import printable
from free_transformer.runs.console import ConsoleProgress


@given(st.text())
def test_nothing_but_control_characters_is_changed(text):
    kept = [character for character in text if unicodedata.category(character) not in ("Cc", "Zl", "Zp")]
    shown = printable(text, keep="")
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Zl", "Zp"}
    if len(kept) == len(text):
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a\nb\tc"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\r\x07\x9b\u2028", r"\r\x07\x9b\u2028"),
        ("naïve 🙂 한 [v2] 'quoted'", "naïve 🙂 한 [v2] 'quoted'"),
    ],
)
def test_escapes_keep_line_breaks_and_other_scripts(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_sample_of_a_run_is_one_line_cut_to_the_terminal(is_terminal):
    screen = io.StringIO()
    progress = ConsoleProgress()
    progress.console = Console(file=screen, width=40, force_terminal=is_terminal, color_system=None, markup=False)
    progress.sample(250, "To be,\nor \x1b[31mnot 'to' be: that is the question")
    whole = r"step 250 generates: To be,\nor \x1b[31mnot 'to' be: that is the question"
    assert screen.getvalue() == (whole[:39] + "…\n" if is_terminal else whole + "\n")
