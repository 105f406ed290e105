"""Reads documents, tokenizes them, and packs the tokens into rows for training."""

from free_transformer.data.documents import (
    Document,
    is_path_source,
    read_documents,
    read_documents_by_source,
    source_files,
)
from free_transformer.data.labels import read_labeled
from free_transformer.data.loader import prefetched
from free_transformer.data.packing import build_rows, streamed_batches
from free_transformer.data.rows import Rows
from free_transformer.data.tokenizer import (
    begin_token,
    byte_tokenizer,
    encode,
    fingerprint,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)

__all__ = [
    "Document",
    "Rows",
    "begin_token",
    "build_rows",
    "byte_tokenizer",
    "encode",
    "fingerprint",
    "is_path_source",
    "load_tokenizer",
    "prefetched",
    "read_documents",
    "read_documents_by_source",
    "read_labeled",
    "source_files",
    "streamed_batches",
    "train_tokenizer",
    "vocabulary_size",
]
