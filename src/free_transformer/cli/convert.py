"""`free-transformer convert`."""

from pathlib import Path
from typing import Annotated

import typer

from free_transformer.cli import output
from free_transformer.cli.options import OverwriteOption
from free_transformer.reporting.table import Table


def convert(
    pretrained: Annotated[
        str,
        typer.Argument(help="Folder or Hub name of a Llama, Mistral, Qwen 2 or Qwen 3.", metavar="LLAMA"),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to create.", metavar="OUT")],
    latent_dim: Annotated[int, typer.Option(min=1, help="Number of bits per plan, at least 1.")] = 8,
    plan_span: Annotated[
        str, typer.Option(help="Number of tokens that share a plan, or `sequence` for one plan per text.")
    ] = "sequence",
    code_bits: Annotated[
        int,
        typer.Option(min=1, help="Number of bits that share a codebook, at least 1. Training is fastest with 1."),
    ] = 1,
    check: Annotated[bool, typer.Option(help="Compare the logits with those of LLAMA.")] = True,
    overwrite: OverwriteOption = False,
) -> None:
    """
    Convert a pretrained Llama into a Free Transformer that has the same logits until its plan is trained.

    Examples:

    - `free-transformer convert meta-llama/Llama-3.2-1B llama-free --latent-dim 8`
    """
    from free_transformer.export import convert as conversion

    span = int(plan_span) if plan_span.isdigit() else plan_span
    with output.status(f"reading {pretrained}"):
        done = conversion.convert(
            pretrained, out, check, overwrite, latent_dim=latent_dim, plan_span=span, code_bits=code_bits
        )
    rows = [[part.name, f"{part.parameters:,}", part.start] for part in done.parts]
    output.print_table(Table(["new", "parameters", "initialization"], rows))
    if done.difference is not None:
        output.print_line(f"largest difference from the logits of {pretrained}: {done.difference:.2g}")
    output.print_line(f"saved to {out}; train it with model.pretrained={out}")
