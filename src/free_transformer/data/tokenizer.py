"""Tokenizers: bytes (no download), any `AutoTokenizer`, and BPE tokenizers trained on your own text."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from free_transformer.errors import InputError
from free_transformer.runtime.byte_alphabet import byte_alphabet, utf8

BEGIN, END, PADDING = "<|begin|>", "<|end|>", "<|padding|>"
SPECIAL_TOKENS = (BEGIN, END, PADDING)
BYTES = 256

CHUNK = 2**16  # characters of a long text per tokenizer call
CONTEXT = 256  # characters on either side of a cut that are tokenized to check it
CUTS_TRIED = 4  # per pattern, before a chunk grows
BEFORE_SPACE = re.compile(r"(?<=\S)(?= \S)")
AFTER_NEWLINE = re.compile(r"(?<=\S)\n+(?=\S)")
ANYWHERE = re.compile(r"(?<=.)(?=.)", re.DOTALL)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per UTF-8 byte (its value is the id), plus begin, end and padding (256-258)."""
    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return _finish(tokenizer)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer with `vocab_size` tokens, including 3 special tokens and the 256 bytes.

    Raises:
        InputError: if `vocab_size` is less than 259.
    """
    minimum = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < minimum:
        raise InputError(f"vocab_size={vocab_size}: must be at least {minimum}, for the bytes and the special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish(tokenizer)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """
    Loads a tokenizer.

    Args:
        name: `"bytes"`, the folder of a tokenizer or a model, or a name on the hub.

    Raises:
        InputError: if there is no such tokenizer, or it has neither a begin-of-text nor an end-of-text token.
    """
    if name == "bytes":
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        what = "this folder has no tokenizer" if Path(name).is_dir() else "no such folder or name on the hub"
        raise InputError(
            f"tokenizer {name!r}: {what}; use 'bytes', which needs no files, or another tokenizer"
        ) from error
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {name!r} has neither a begin-of-text nor an end-of-text token; choose one that has"
        )
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """
    Tokenizes texts without adding tokens. Text that looks like a special token is encoded as ordinary text.

    Raises:
        InputError: if a text is not valid Unicode.
    """
    for text in texts:
        utf8(text)  # tokenizers raise a TypeError about their own types
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def encode_in_chunks(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[list[int]]:
    """
    Yields the tokens of `encode` chunk by chunk, so that memory does not grow with the text.

    Tokenizing takes some 200 bytes of memory per byte of text. The text is cut about every `CHUNK` characters, before a
    space or after a newline, where the cut does not change the tokens around it. Without such a place the text stays
    whole, for example if the normalizer prepends a character to each text.
    """
    utf8(text)  # here, so that the message gives the position in the whole text
    start = 0
    anywhere = len(text) > CHUNK and _has_single_characters_only(tokenizer)
    while start < len(text):
        end = _safe_cut(tokenizer, text, start + CHUNK, anywhere)
        yield encode(tokenizer, [text[start:end]])[0]
        start = end


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the number of embedding rows for all token ids, which exceeds the number of tokens if ids have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Returns a hash, 32 hexadecimal digits, of everything that determines the tokens of `encode`: the vocabulary with its
    ids, the special tokens and, for fast tokenizers, the normalizer, the pre-tokenizer and the model with its merges.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {"class": type(tokenizer).__name__}
    for ignored in ("truncation", "padding", "post_processor", "decoder"):  # the first two change with use
        parts.pop(ignored, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    described = json.dumps([parts, tokenizer.get_vocab(), special], sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of the token that starts a text: begin-of-text, or end-of-text if there is no begin-of-text."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _safe_cut(tokenizer: PreTrainedTokenizerBase, text: str, place: int, anywhere: bool) -> int:
    """Returns the first tried position from `place` on where a cut changes no token, or the end of the text."""
    patterns = (ANYWHERE,) if anywhere else (BEFORE_SPACE, AFTER_NEWLINE)
    for begin in range(place, len(text), CHUNK):
        for pattern in patterns:
            found = pattern.finditer(text, begin, min(begin + CHUNK, len(text)))
            for cut in (match.end() for match in islice(found, CUTS_TRIED)):
                if _changes_no_token(tokenizer, text, cut):
                    return cut
    return len(text)


def _changes_no_token(tokenizer: PreTrainedTokenizerBase, text: str, cut: int) -> bool:
    left, right = text[max(0, cut - CONTEXT) : cut], text[cut : cut + CONTEXT]
    whole, before, after = encode(tokenizer, [left + right, left, right])
    return whole == before + after


def _has_single_characters_only(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every token is a single character or byte, so that the text can be cut inside words."""
    special = set(tokenizer.all_special_tokens)
    return all(len(token) == 1 for token in tokenizer.get_vocab() if token not in special)


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.ByteLevel()
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
