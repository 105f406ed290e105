"""Ahead-of-time compiled packages (AOTInductor), which C++ programs run without Python."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.errors import RunError
from free_transformer.export.files import (
    Difference,
    check_export,
    check_tolerance,
    save_metadata,
    silence_exporters,
    traceable_copy,
)
from free_transformer.export.graphs import Graph, static_graphs, traced_sizes
from free_transformer.files import own_folder

SUFFIX = ".pt2"


@dataclass
class AotExport:
    """
    An exported folder.

    Attributes:
        sizes: bytes of each package.
        differences: differences of the packages' outputs from the model's.
    """

    folder: Path
    sizes: dict[str, int] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)


def export_aot(
    model: PreTrainedModel,
    folder: str | Path,
    static: tuple[int, int],
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> AotExport:
    """
    Compiles `encode.pt2`, `prefill.pt2` and `decode.pt2` (see `graphs`) in float32 for the processor of this machine.

    Shapes are fixed: with variable shapes the encoder's package rejects texts of at most `plan_span` tokens.

    Args:
        model: a Free Transformer.
        folder: the new folder.
        static: numbers of texts and of tokens.
        tokenizer: saved in the folder.
        overwrite: replace the folder whatever it contains. Otherwise it must be new, empty or an earlier export.

    Raises:
        ValueError: for a model that cannot be exported, and a folder that contains other files.
        RuntimeError: without a C++ compiler, and if a package differs from the model by more than `TOLERANCE`.
    """
    free_transformer = check_export(model, static)
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RunError(f"packages are compiled by {compiler}, which is not installed; set CXX to another compiler")
    traced = traceable_copy(free_transformer)
    export = AotExport(Path(folder))
    with own_folder(export.folder, "export", overwrite) as temporary, torch.no_grad(), silence_exporters():
        for graph in static_graphs(traced, static[1]):
            if graph.name != "training":
                file = temporary / f"{graph.name}{SUFFIX}"
                export.differences += _compile_package(graph, file, static)
                export.sizes[graph.name] = file.stat().st_size
        check_tolerance(export.differences)
        save_metadata(traced, tokenizer, temporary)
    return export


def _compile_package(graph: Graph, file: Path, static: tuple[int, int]) -> list[Difference]:
    sizes = traced_sizes(graph, static)
    inputs = [argument.example(sizes) for argument in graph.arguments]
    program = torch.export.export(graph, tuple(inputs))
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    run = torch._inductor.aoti_load_package(str(file))
    found = []
    for padded in (False, True):
        inputs = [_random_like(values, graph.model.config.vocab_size) for values in inputs]
        inputs[1] = torch.ones_like(inputs[1])
        inputs[1][:, : padded + (graph.name == "decode")] = 0  # the column that a full cache drops must be padding
        real = inputs[1][:, -inputs[0].shape[1] :].bool()
        if graph.name != "encode":
            inputs[2] = torch.tensor([inputs[0].shape[1] - 1])
            real = real[:, -1:]
        theirs, ours = run(*inputs), graph(*inputs)
        for name, one, other in zip(graph.outputs, _as_list(ours), _as_list(theirs), strict=True):
            where = real if name == "logits" else slice(None)
            found.append(Difference.of(graph.name, name, inputs[0], padded, one[where], other[where]))
    return found


def _random_like(values: Tensor, vocab_size: int) -> Tensor:
    if values.dtype == torch.int64:
        return torch.randint(vocab_size, values.shape)
    return torch.rand(values.shape) < 0.5 if values.dtype == torch.bool else torch.randn(values.shape)


def _as_list(outputs: Tensor | tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
