"""`free-transformer tokenizer`."""

from pathlib import Path
from typing import Annotated

import typer

from free_transformer.cli.options import OverwriteOption
from free_transformer.cli.output import print_line
from free_transformer.errors import InputError
from free_transformer.files import check_replaceable, own_folder


def tokenizer(
    arguments: Annotated[
        list[str],
        typer.Argument(help="Files, folders or data sets of text, then the folder to create.", metavar="FILES... OUT"),
    ],
    vocab_size: Annotated[int, typer.Option(help="Number of tokens, at least 259.")] = 4096,
    column: Annotated[
        str, typer.Option(help="Column that contains the text in tables (such as .jsonl files) and data sets.")
    ] = "text",
    overwrite: OverwriteOption = False,
) -> None:
    """
    Train a byte-level BPE tokenizer, to be used with `data.tokenizer=OUT`.

    Examples:

    - `free-transformer tokenizer corpus.txt my-tokenizer --vocab-size 8192`
    """
    from free_transformer.data import read_documents, train_tokenizer

    *files, out = arguments
    if not files:
        raise InputError("give the text to train on, then the folder to create: tokenizer FILES... OUT")
    check_replaceable(Path(out), "tokenizer", overwrite, map(Path, files))
    trained = train_tokenizer(read_documents(files, column), vocab_size)
    with own_folder(Path(out), "tokenizer", overwrite, map(Path, files)) as folder:
        trained.save_pretrained(folder)
    print_line(f"{len(trained)} tokens, saved to {out}; use data.tokenizer={out}")
