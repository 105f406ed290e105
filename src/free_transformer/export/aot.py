"""Packages of machine code, compiled ahead of time by PyTorch (AOTInductor), that C++ programs run without Python."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.export.files import Difference, check_export, quiet, traceable, within, write_rest
from free_transformer.export.graphs import Graph, static_graphs, traced_sizes
from free_transformer.files import own_folder

SUFFIX = ".pt2"


@dataclass
class AotExport:
    """The folder, bytes of each package, and how far its outputs are from the model's."""

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
    `encode.pt2`, `prefill.pt2` and `decode.pt2` (see `graphs`) for a fixed number of texts and tokens, in float32, for
    this machine's processor. They need a C++ compiler, and a quarter of a minute each.

    Packages for any number were tried: the encoder's refuses texts of no more than `plan_span` tokens.

    Raises:
        ValueError, RuntimeError: as `onnx_export.export_onnx`, and without a compiler.
    """
    check_export(model, static)
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"packages are compiled by {compiler}, which is not here; CXX can name another")
    model = traceable(model)
    export = AotExport(Path(folder))
    with own_folder(export.folder, "export", overwrite) as temporary, torch.no_grad(), quiet():
        for graph in static_graphs(model, static[1]):
            if graph.name != "training":
                file = temporary / f"{graph.name}{SUFFIX}"
                export.differences += _write_package(graph, file, static)
                export.sizes[graph.name] = file.stat().st_size
        within(export.differences)
        write_rest(model, tokenizer, temporary)
    return export


def _write_package(graph: Graph, file: Path, static: tuple[int, int]) -> list[Difference]:
    sizes = traced_sizes(graph, graph.model.config.plan_span, static)
    inputs = [argument.example(sizes) for argument in graph.arguments]
    program = torch.export.export(graph, tuple(inputs))
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    run = torch._inductor.aoti_load_package(str(file))
    found = []
    for padded in (False, True):
        inputs = [_random(values, graph.model.config.vocab_size) for values in inputs]
        inputs[1] = torch.ones_like(inputs[1])
        inputs[1][:, : padded + (graph.name == "decode")] = 0  # what a full cache drops must be padding
        real = inputs[1][:, -inputs[0].shape[1] :].bool()
        if graph.name != "encode":
            inputs[2] = torch.tensor([inputs[0].shape[1] - 1])
            real = real[:, -1:]
        theirs, ours = run(*inputs), graph(*inputs)
        for name, one, other in zip(graph.outputs, _as_list(ours), _as_list(theirs), strict=True):
            where = real if name == "logits" else slice(None)
            found.append(Difference.of(graph.name, name, inputs[0], padded, one[where], other[where]))
    return found


def _random(values: Tensor, vocab_size: int) -> Tensor:
    if values.dtype == torch.int64:
        return torch.randint(vocab_size, values.shape)
    return torch.rand(values.shape) < 0.5 if values.dtype == torch.bool else torch.randn(values.shape)


def _as_list(outputs: Tensor | tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
