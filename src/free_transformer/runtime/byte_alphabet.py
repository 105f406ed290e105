"""UTF-8 bytes and the characters that byte-level tokenizers use for them."""

from free_transformer.errors import InputError


def byte_alphabet() -> list[str]:
    """Returns `ByteLevel`'s character for each byte: itself if printable in Latin-1, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def utf8(text: str) -> bytes:
    """Encodes text as UTF-8. Raises `ValueError` for lone surrogates, which Python uses for invalid bytes."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid UTF-8: character {error.start} is the lone surrogate {text[error.start]!r}; "
            "pass text that was decoded from valid UTF-8"
        ) from error
