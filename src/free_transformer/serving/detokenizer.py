"""Decodes tokens incrementally, up to a stop string."""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from typing import TypedDict, cast

from tokenizers import Tokenizer

from free_transformer.runtime.byte_alphabet import byte_alphabet

BYTES = {character: byte for byte, character in enumerate(byte_alphabet())}
CONTEXT = 8  # tokens that determine how the next one is decoded, such as whether its leading space is kept
UNFINISHED = "\ufffd"  # decoded from an incomplete character
MAX_UNFINISHED = 8  # maximum number of tokens held back until a character is complete


class _Decoder(TypedDict, total=False):
    """The description of a decoder in `tokenizer.json`."""

    type: str
    decoders: "list[_Decoder]"


class TokenTexts:
    """
    Looks up the bytes or text of single tokens.

    `tokenizers.DecodeStream` is not used: it raises for bytes that are not UTF-8 (with byte fallback), and it ignores
    the prompt before the text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        described = json.loads(tokenizer.to_str())
        decoders = list(_flattened(cast(_Decoder, described.get("decoder") or {})))
        self.byte_level = decoders == ["ByteLevel"]
        self.byte_fallback = "ByteFallback" in decoders
        self.special = {token["id"] for token in described.get("added_tokens", ()) if token["special"]}
        self._bytes: dict[int, bytes | None] = {}

    def bytes_of(self, token: int) -> bytes | None:
        """Returns the bytes of a token, or None for a token that is decoded as text."""
        if token not in self._bytes:
            self._bytes[token] = self._find_bytes(token)
        return self._bytes[token]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def shown(self, token: int) -> str:
        r"""Formats a single token for `logprobs`. Bytes that are not UTF-8 are shown as in `bytes:\xe2\x82`."""
        raw = self.bytes_of(token)
        if token in self.special or raw is None:
            name = self.tokenizer.id_to_token(token) or ""
            if token in self.special:
                return name
            alone = self.decode([token])
            return self.decode([token, token])[len(alone) :] or name  # its text when it follows another token
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _find_bytes(self, token: int) -> bytes | None:
        name = self.tokenizer.id_to_token(token)
        if token in self.special or name is None:
            return b""
        if self.byte_level:
            if all(character in BYTES for character in name):
                return bytes(BYTES[character] for character in name)
            return name.encode()
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name) if self.byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else None


class Detokenizer:
    """
    Decodes the tokens of a text one by one. The prompt's text followed by all returned pieces equals the decoding of
    all tokens at once. Bytes that are not UTF-8 become U+FFFD.

    An incomplete character, and a possible beginning of a stop string, are held back until they are complete.

    Args:
        stop: strings that end the text. The first one that appears ends it and is not part of it.

    Attributes:
        prompt: text of the prompt.
        stopped: whether a stop string has ended the text.
    """

    def __init__(self, texts: TokenTexts, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        self.texts, self.stop = texts, stop
        self.stopped = False
        self.count = 0  # tokens after the prompt
        self._held = ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []  # the last tokens that were decoded as text
        self._unfinished = 0  # tokens at the end of the window that have not been returned
        self._shown = 0  # characters of the window's text that have been returned
        self._only_bytes = False  # whether all tokens with text so far are bytes
        self.prompt = self._read_prompt(prompt)

    def add(self, token: int) -> str:
        """Appends a token. Returns the text that no longer needs to be held back."""
        self.count += 1
        return self._show(self._decode(token))

    def end(self) -> str:
        """Returns the text that was held back, unless a stop string has ended the text."""
        if self.stopped:
            return ""
        shown = self._show(self._utf8.decode(b"", final=True) + self._rest_of_window())
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _read_prompt(self, tokens: Sequence[int]) -> str:
        """Returns the prompt's text, without an incomplete character at its end."""
        start = len(tokens)
        while start and self.texts.bytes_of(tokens[start - 1]) is not None:
            start -= 1
        text = self.texts.decode(tokens[:start]) if start else ""
        size = CONTEXT
        self._window = list(tokens[max(0, start - size) : start])
        while not self.texts.decode(self._window) and size < start:  # special tokens, which have no text
            size *= 2
            self._window = list(tokens[max(0, start - size) : start])
        self._shown = len(self.texts.decode(self._window)) if self._window else 0
        of_bytes = b"".join(self.texts.bytes_of(token) or b"" for token in tokens[start:])
        self._only_bytes = bool(of_bytes) and not self._window
        return text + self._utf8.decode(of_bytes)

    def _decode(self, token: int) -> str:
        raw = self.texts.bytes_of(token)
        if raw is not None:
            self._only_bytes = self._only_bytes or (bool(raw) and not self._window)
            return self._rest_of_window() + self._utf8.decode(raw)
        before = self._utf8.decode(b"", final=True)
        if self._only_bytes:  # not the first token of the text, whose leading space a decoder may drop
            self._window, self._only_bytes = [token], False
            self._shown = len(self.texts.decode(self._window))
        self._window.append(token)
        text = self.texts.decode(self._window)
        self._unfinished += 1
        if text.endswith(UNFINISHED) and self._unfinished < MAX_UNFINISHED:
            return before
        piece, self._shown, self._unfinished = text[self._shown :], len(text), 0
        if len(self._window) > 2 * CONTEXT:
            self._window = self._window[-CONTEXT:]
            self._shown = len(self.texts.decode(self._window))
        return before + piece

    def _rest_of_window(self) -> str:
        if not self._unfinished:
            return ""
        text = self.texts.decode(self._window)
        piece, self._shown, self._unfinished = text[self._shown :], len(text), 0
        return piece

    def _show(self, piece: str) -> str:
        text = self._held + piece
        if not self.stop:
            return text
        found = [index for index in map(text.find, self.stop) if index >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_beginning_at_end(text, stop) for stop in self.stop), default=0)
        shown, self._held = text[: len(text) - kept], text[len(text) - kept :]
        return shown


def _beginning_at_end(text: str, stop: str) -> int:
    """Returns the length of the longest beginning of `stop` that `text` ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def _flattened(decoder: "_Decoder") -> Iterator[str]:
    """Yields the types of the decoders in a nested sequence."""
    if decoder.get("type") == "Sequence":
        for each in decoder["decoders"]:
            yield from _flattened(each)
    elif decoder:
        yield decoder["type"]
