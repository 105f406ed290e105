"""Exports a model as ONNX graphs, and compares each graph with the model."""

from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer import __version__
from free_transformer.errors import InputError, MissingDependency, RunError
from free_transformer.export.files import (
    SCHEMES,
    Difference,
    check_export,
    check_tolerance,
    save_metadata,
    silence_exporters,
    traceable_copy,
)
from free_transformer.export.graphs import Argument, Graph, dynamic_graphs, static_graphs, traced_sizes
from free_transformer.export.onnx_quantize import quantize_graph
from free_transformer.files import own_folder, write_json
from free_transformer.model.modeling import FreeTransformer
from free_transformer.runtime.onnx_model import OnnxFreeTransformer
from free_transformer.runtime.sessions import EXPORT_FILE

if TYPE_CHECKING:
    import onnx_ir
    from onnxruntime import OrtValue
    from torch.export.dynamic_shapes import _DimHint

DynamicShape = dict[int, "torch.export.Dim | _DimHint"]
OPSET = 23  # the newest that PyTorch exports; attention and RMS norm are single operators
STATIC_OPSET = 18  # plain operators, supported by TensorRT since 8.5
MAX_IN_ONE_FILE = 2**31 - 2**26  # bytes; a protocol buffer holds at most 2 GiB, including the graph

# operators in graphs of `STATIC_OPSET`, all supported by TensorRT's parser since 8.5 (onnx-tensorrt, docs/operators.md)
TENSORRT_OPERATORS = {
    *("Add", "And", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "Cos", "CumSum", "Div", "Equal"),
    *("Expand", "Gather", "GatherElements", "GatherND", "IsNaN", "Less", "LessOrEqual", "MatMul", "Max", "Min"),
    *("Mod", "Mul", "Neg", "Not", "Or", "Pow", "Range", "Reciprocal", "ReduceMean", "ReduceSum", "Reshape"),
    *("ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt"),
    *("Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
}


@dataclass
class Export:
    """
    An exported folder.

    Attributes:
        static: fixed numbers of texts and of tokens, if any.
        quantize: the quantization scheme, if any.
        sizes: bytes of each graph, including its weights.
        differences: differences of the graphs' outputs from the model's.
        tolerance: largest allowed difference; None for quantized graphs, which are not checked against it.
    """

    folder: Path
    opset: int
    static: tuple[int, int] | None
    quantize: str | None
    sizes: dict[str, int] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    tolerance: float | None = None


def export_onnx(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    static: tuple[int, int] | None = None,
    quantize: str | None = None,
    most_in_one_file: int = MAX_IN_ONE_FILE,
    overwrite: bool = False,
) -> Export:
    """
    Exports the graphs `training`, `encode` and `decode` (see `graphs`) for any number of texts and tokens, in float32.

    The graphs are compared with the model at other shapes than the traced ones, with and without padding, before the
    folder appears.

    Args:
        model: a Free Transformer.
        folder: the new folder.
        tokenizer: saved in the folder, for `OnnxFreeTransformer.write`.
        static: numbers of texts and of tokens to fix, for TensorRT and other compilers of fixed shapes. This adds the
            graph `prefill` for the prompt.
        quantize: `"int8-weight"` (weights only) or `"int8-dynamic"` (also activations, at run time).
        most_in_one_file: bytes of weights above which they are stored in a file beside the graph, `NAME.onnx.data`.
        overwrite: replace the folder whatever it contains. Otherwise it must be new, empty or an earlier export.

    Raises:
        ValueError: for a model without a plan or with 8-bit weights, unsupported static sizes, an unknown scheme, and a
            folder that contains other files.
        ImportError: without onnx, onnxscript or onnxruntime.
        RuntimeError: if a graph differs from the model by more than `TOLERANCE`.
    """
    traced = traceable_copy(_check_arguments(model, static, quantize))
    export = Export(Path(folder), OPSET if static is None else STATIC_OPSET, static, quantize)
    graphs = dynamic_graphs(traced) if static is None else static_graphs(traced, static[1])
    with own_folder(export.folder, "export", overwrite) as temporary, torch.no_grad():
        for graph in graphs:
            file = temporary / f"{graph.name}.onnx"
            _write_graph(graph, file, export, most_in_one_file)
            if static is not None:
                check_static(file)
            if quantize is not None:
                quantize_graph(file, quantize)
            export.sizes[graph.name] = sum(each.stat().st_size for each in temporary.glob(f"{graph.name}.onnx*"))
        save_metadata(traced, tokenizer, temporary)
        _write_summary(export, temporary)
        export.differences = compare(traced, OnnxFreeTransformer(temporary))
        if quantize is None:
            export.tolerance = check_tolerance(export.differences)
        _write_summary(export, temporary)
    return export


def compare(model: FreeTransformer, exported: OnnxFreeTransformer) -> list[Difference]:
    """Compares every graph with the model on random texts of shapes that it was not traced with."""
    generator = torch.Generator().manual_seed(0)
    span = model.config.plan_span
    long = 11 if span == "sequence" else 2 * int(span) + 9
    shapes = [exported.static] if exported.static is not None else [(1, long), (3, 8), (2, 4)]
    differences = []
    for batch, tokens in shapes:
        for padded in (False, True):
            ids = torch.randint(model.config.vocab_size, (batch, tokens), generator=generator)
            mask = torch.ones_like(ids)
            if padded:  # row i has i + 1 columns of padding on the left; at least three tokens remain
                mask[torch.arange(tokens) <= torch.arange(batch)[:, None] % (tokens - 3)] = 0
            for graph, outputs in _compute_outputs(model, exported, ids, mask, generator).items():
                for output, (ours, theirs) in outputs.items():
                    differences.append(Difference.of(graph, output, ids, padded, ours, theirs))
    return differences


def check_static(file: Path) -> None:
    """
    Checks that a graph is valid, that every shape is fixed, and that TensorRT's parser supports every operator.

    Raises:
        RuntimeError: if a shape is not fixed or an operator is not supported.
    """
    import onnx

    onnx.checker.check_model(file, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(file), strict_mode=True, data_prop=True)
    values = [*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info]
    unknown = [
        value.name for value in values if any(not dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    ]
    if unknown:
        raise RunError(f"{file.name}: the shapes of {', '.join(unknown[:5])} are not fixed")
    if foreign := {node.op_type for node in inferred.graph.node} - TENSORRT_OPERATORS:
        raise RunError(f"{file.name}: operators that TensorRT may not have: {', '.join(sorted(foreign))}")


def _check_arguments(model: PreTrainedModel, static: tuple[int, int] | None, quantize: str | None) -> FreeTransformer:
    checked = check_export(model, static)
    if quantize is not None and static is not None:
        raise InputError("static graphs are for compilers that quantize by themselves: leave quantize out")
    if quantize is not None and quantize not in SCHEMES:
        raise InputError(f"quantize={quantize!r}: one of {SCHEMES}")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingDependency(f"export needs {package}: pip install 'free-transformer-lm[export]'")
    return checked


def _write_graph(graph: Graph, file: Path, export: Export, most_in_one_file: int) -> None:
    sizes = traced_sizes(graph, export.static)
    examples = tuple(argument.example(sizes) for argument in graph.arguments)
    with silence_exporters():
        program = torch.onnx.export(
            graph,
            examples,
            input_names=[argument.name for argument in graph.arguments],
            output_names=graph.outputs,
            dynamic_shapes=None if export.static else _dynamic_shapes(graph),
            opset_version=export.opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    if export.static is None:
        _name_dimensions(program.model.graph, graph.arguments)
    held = [value.const_value for value in program.model.graph.initializers.values()]
    weights = sum(tensor.nbytes for tensor in held if tensor is not None)
    program.save(file, external_data=weights > most_in_one_file)


def _dynamic_shapes(graph: Graph) -> tuple[DynamicShape | tuple[DynamicShape, ...], ...]:
    """Returns the variable dimensions of each argument. The tracer infers those that depend on others."""
    free = {name: torch.export.Dim(name) for name in ("batch", "tokens", "past", "asked")}
    span = graph.model.config.plan_span
    if graph.name != "decode" and span != "sequence":  # the tracer treats a single plan as a constant
        free["tokens"] = torch.export.Dim("tokens", min=int(span) + 1)

    def of(argument: Argument) -> DynamicShape:
        named = enumerate(argument.shape)
        return {place: free.get(size, torch.export.Dim.AUTO) for place, size in named if isinstance(size, str)}

    shapes = [of(argument) for argument in graph.arguments if not argument.name.startswith("past.")]
    past = [of(argument) for argument in graph.arguments if argument.name.startswith("past.")]
    return (*shapes, tuple(past)) if past else tuple(shapes)


def _name_dimensions(graph: "onnx_ir.Graph", arguments: list[Argument]) -> None:
    """Replaces the tracer's numbered dimension names with those of the arguments, in all values of the graph."""
    import onnx_ir

    names: dict[str, str] = {}
    for value, argument in zip(graph.inputs, arguments, strict=True):
        for traced, ours in zip(value.shape or (), argument.shape, strict=True):
            if isinstance(traced, onnx_ir.SymbolicDim) and isinstance(ours, str):
                names[str(traced.value)] = ours
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                names.get(str(dim.value), dim.value) if isinstance(dim, onnx_ir.SymbolicDim) else dim
                for dim in value.shape
            )


def _write_summary(export: Export, folder: Path) -> None:
    values = {name: value for name, value in asdict(export).items() if name != "folder"}
    write_json(folder / EXPORT_FILE, {"free_transformer": __version__, **values})


def _compute_outputs(
    model: FreeTransformer, exported: OnnxFreeTransformer, ids: Tensor, mask: Tensor, generator: torch.Generator
) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Returns the outputs of the model and of each graph, without padding and without plans that cover only padding."""
    real = mask.bool()
    out = model(ids, attention_mask=mask, labels=ids, mode="training")
    plan_logits, used = out.plan_logits, out.plan_mask
    noise = torch.rand(plan_logits.shape, generator=generator)
    near = (noise - plan_logits.sigmoid()).abs() < 1e-3  # where rounding could flip a bit
    noise = torch.where(near, 1 - plan_logits.sigmoid().round(), noise)
    plan = noise < plan_logits.sigmoid()
    logits = model(ids, attention_mask=mask, plan=plan).logits
    inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    trained = [_tensor(value) for value in exported.run("training", {**inputs, "noise": noise.numpy()})]
    encoded = _tensor(exported.run("encode", inputs)[0])
    decoded = torch.from_numpy(exported.read_in_pieces(**inputs, plan=plan.numpy()))
    asked = slice(-decoded.shape[1], None)
    return {
        "training": {
            "logits": (logits[real], trained[0][real]),
            "plan_logits": (plan_logits[used], trained[1][used]),
            "plan": (plan[used], trained[2][used]),
        },
        "encode": {"plan_logits": (plan_logits[used], encoded[used])},
        "decode": {"logits": (logits[:, asked][real[:, asked]], decoded[real[:, asked]])},
    }


def _tensor(value: "OrtValue") -> Tensor:
    return torch.from_numpy(value.numpy())
