"""Text as its tokens come: pieces that can be shown at once, up to what stops it."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Pieces:
    """
    Holds back what may yet change: the first bytes of a character, and what may become a stop string.

    Args:
        stop: strings of which the first to appear ends the text, and is no part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.stream = DecodeStream(skip_special_tokens=True)
        self.tokens: list[int] = []
        self.decoded = 0  # characters that the stream has given
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be shown now."""
        self.tokens.append(token)
        piece = self.stream.step(self.tokenizer, token)
        self.decoded += len(piece or "")
        return self._show(piece or "")

    def end(self) -> str:
        """The rest, where no stop string has ended the text."""
        if self.stopped:
            return ""
        rest = self.tokenizer.decode(self.tokens, skip_special_tokens=True)[self.decoded :]
        shown = self._show(rest)
        if not self.stopped:
            shown, self.held = shown + self.held, ""
        return shown

    def _show(self, piece: str) -> str:
        text = self.held + piece
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        kept = max((_beginning_at_end(text, stop) for stop in self.stop), default=0)
        shown, self.held = text[: len(text) - kept], text[len(text) - kept :]
        return shown


def _beginning_at_end(text: str, stop: str) -> int:
    """The length of the longest beginning of `stop` that `text` ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
