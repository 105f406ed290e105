"""Text to documents, documents to tokens, tokens to rows that a model trains on."""

from free_transformer.data.documents import read_documents
from free_transformer.data.loading import prefetched
from free_transformer.data.rows import Rows, build_rows, streamed_batches
from free_transformer.data.tokenizer import begin_token, byte_tokenizer, encode, load_tokenizer, train_tokenizer

__all__ = [
    "Rows",
    "begin_token",
    "build_rows",
    "byte_tokenizer",
    "encode",
    "load_tokenizer",
    "prefetched",
    "read_documents",
    "streamed_batches",
    "train_tokenizer",
]
