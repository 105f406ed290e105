"""Tokenizers: bytes, which need no download, any `AutoTokenizer` by path, and a BPE trained on your own text."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from free_transformer.byte_alphabet import byte_alphabet

BEGIN, END, PADDING = "<|begin|>", "<|end|>", "<|padding|>"
SPECIAL_TOKENS = (BEGIN, END, PADDING)
BYTES = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, its id the byte's value, then begin (256), end (257) and padding (258)."""
    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return _finish(tokenizer)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE of `vocab_size` tokens, the three special ones and the 256 bytes among them.

    Raises:
        ValueError: where `vocab_size` leaves no room for the bytes and the special tokens.
    """
    least = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size}: at least {least}, for the bytes and the special tokens")
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
    Args:
        name: `"bytes"`, the folder of a tokenizer or a model, or a name on the hub.

    Raises:
        ValueError: where there is none, or where it has no token to begin a text with.
    """
    if name == "bytes":
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        what = "this folder has no tokenizer" if Path(name).is_dir() else "no such folder, nor such a name on the hub"
        raise ValueError(f"tokenizer {name!r}: {what}; 'bytes' needs no files") from error
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has neither a begin-of-text nor an end-of-text token: one is needed")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokens of each text alone: nothing added, and what looks like a special token is text like any other."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text begins with: begin-of-text, or where a tokenizer has none its end-of-text."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


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
