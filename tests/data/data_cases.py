"""Inputs and helpers shared by the tests of this folder."""

import bz2
import csv
import gzip
import io
import json
import lzma
from functools import cache

import numpy as np
import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from free_transformer.data import Rows, byte_tokenizer, train_tokenizer

TOKENIZER = byte_tokenizer()


BEGIN, END, PADDING = 256, 257, 258


STRANGE = ["", " a  b ", "\n\r\t", "é ü ß", "🙂🏽‍♀️ 日本語", "<|begin", "\x00\x7f", "don't  we'll", "a ,b . c"]


def pieces_of(rows: Rows) -> list[list[int]]:
    """Token lists of all pieces, in the order of the rows, checked to lie whole inside a row."""
    pieces: list[list[int]] = []
    for tokens, positions in zip(rows.tokens.tolist(), rows.positions.tolist(), strict=True):
        for index, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            if position == -1:
                assert positions[index:] == [-1] * (len(positions) - index)  # padding only at the end
                assert token == PADDING
            elif position == 0:
                assert token == BEGIN
                pieces.append([token])
            else:
                assert position == positions[index - 1] + 1
                pieces[-1].append(token)
    return pieces


def cut(documents: list[str], seq_len: int) -> list[list[int]]:
    """The pieces that documents should be cut into."""
    streams = [[*document.encode(), END] for document in documents]
    width = seq_len - 1
    return [[BEGIN, *stream[i : i + width]] for stream in streams for i in range(0, len(stream), width)]


def rows_of(batches) -> list[tuple]:
    """Rows of batches as plain values, for sets and counts."""
    return [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]


def numbered(count: int, length: int = 7) -> list[str]:
    """Documents that fill a row of `length + 2` tokens each."""
    return [f"{index:0{length}d}" for index in range(count)]


def write_table(path, columns: dict) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text(json_lines(rows))


def json_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv_text(rows: list[dict], delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def parquet_bytes(columns: dict) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


TEXTS = ["one é 🙂", 'two\nlines, and a "word"', "three"]


OBJECTS = [{"number": number, "text": text} for number, text in enumerate(TEXTS)]


FORMATS = {
    ".jsonl": json_lines(OBJECTS).encode(),
    ".JSONL": json_lines(OBJECTS).encode(),
    ".ndjson": json_lines(OBJECTS).replace("\n", "\r\n").encode(),
    ".json": json_lines(OBJECTS).encode(),
    ".JSON": json.dumps(OBJECTS).encode(),
    ".pretty.json": json.dumps(OBJECTS, indent=2).encode(),
    ".rows.json": b"[\n" + b",\n".join(json.dumps(each).encode() for each in OBJECTS) + b"]\n",
    ".csv": csv_text(OBJECTS).encode(),
    ".Tsv": csv_text(OBJECTS, "\t").encode(),
    ".parquet": parquet_bytes({"number": [1, 2, 3], "text": TEXTS}),
}


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".XZ": lzma.compress, ".zst": zstd}


class Hub:
    """Replaces `datasets.load_dataset`: data sets by name and configuration, then by split."""

    def __init__(self, **data_sets):
        self.data_sets, self.asked = data_sets, []

    def __call__(self, *names, split, streaming):
        assert streaming
        self.asked.append((names, split))
        splits = self.data_sets[names[0].split("/")[-1]]
        if split not in splits:
            raise ValueError(f"Bad split: {split}. Available splits: {list(splits)}")
        return splits[split]


def rows_from(*texts) -> list[dict]:
    return [{"text": text} for text in texts]


WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "naïve",
    "Ärger,",
    "don't",
    "x",
    "日本語。",
    "🙂",
    "3.14",
    "hello-world",
    "aaaaaaaa",
]


@cache
def prose(seed: int = 0, count: int = 1200) -> str:
    """Words between single and double spaces, line breaks and tabs."""
    rng = np.random.default_rng(seed)
    between = rng.choice([" ", "  ", "\n", "\n\n", "\t", " \n"], count, p=[0.7, 0.08, 0.1, 0.04, 0.04, 0.04])
    return "".join(word + space for word, space in zip(rng.choice(WORDS, count), between, strict=True))


@cache
def tokenizers_of_many_kinds() -> dict[str, PreTrainedTokenizerFast]:
    def trained(tokenizer: Tokenizer, trainer) -> PreTrainedTokenizerFast:
        tokenizer.train_from_iterator([prose(seed) for seed in range(3)], trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")

    special = {"special_tokens": ["<unk>", "<end>"], "show_progress": False}
    unigram = {"vocab_size": 120, "unk_token": "<unk>", **special}
    split, whole, prepending, across, stripping, word_piece = (
        *(Tokenizer(models.Unigram()) for _ in range(3)),
        *(Tokenizer(models.BPE(unk_token="<unk>")) for _ in range(2)),
        Tokenizer(models.WordPiece(unk_token="<unk>")),
    )
    split.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    prepending.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    across.normalizer = normalizers.Replace(" ", "▁")  # without a pre-tokenizer, tokens reach from word to word
    stripping.normalizer = normalizers.Strip()
    stripping.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    word_piece.normalizer = normalizers.BertNormalizer()
    word_piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return {
        "bytes": byte_tokenizer(),
        "BPE": train_tokenizer([prose(seed) for seed in range(3)], 340),
        "Unigram": trained(split, trainers.UnigramTrainer(**unigram)),
        "Unigram across words": trained(whole, trainers.UnigramTrainer(**unigram)),
        "Unigram with a mark before each text": trained(prepending, trainers.UnigramTrainer(**unigram)),
        "BPE across words": trained(across, trainers.BpeTrainer(vocab_size=300, **special)),
        "BPE that strips": trained(stripping, trainers.BpeTrainer(vocab_size=300, **special)),
        "WordPiece": trained(word_piece, trainers.WordPieceTrainer(vocab_size=150, **special)),
    }


class Counting:
    """A tokenizer that notes how many characters it is given at once."""

    def __init__(self, tokenizer):
        self.tokenizer, self.sizes = tokenizer, []

    def __call__(self, texts, **options):
        self.sizes.append(sum(map(len, texts)))
        return self.tokenizer(texts, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)
