"""Prompts of the commands that generate text with PyTorch."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from free_transformer.data import begin_token, encode, read_documents


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Returns the tokens of a prompt after the begin-of-text token, (1, T)."""
    return torch.tensor([[begin_token(tokenizer), *encode(tokenizer, [prompt])[0]]])


def first_document(path: Path) -> str:
    """Returns the first document of a file or folder. Raises `DataError` if it contains no text."""
    return next(iter(read_documents([path])))
