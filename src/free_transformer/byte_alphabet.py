"""The characters that byte-level tokenizers write for bytes."""


def byte_alphabet() -> list[str]:
    """The character that `ByteLevel` writes for each byte: itself if printable in Latin-1, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
