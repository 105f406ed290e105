"""Writes a model as ONNX graphs, and holds each of them against the model that it came from."""

from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer import __version__
from free_transformer.export.files import SCHEMES, Difference, check_export, quiet, traceable, within, write_rest
from free_transformer.export.graphs import Argument, Graph, dynamic_graphs, static_graphs, traced_sizes
from free_transformer.export.onnx_quantize import quantize_graph
from free_transformer.files import own_folder, write_json
from free_transformer.model.modeling import FreeTransformer
from free_transformer.runtime.onnx_model import EXPORT_FILE, OnnxFreeTransformer

OPSET = 23  # the newest that PyTorch writes: attention and RMS norm are one operation each
STATIC_OPSET = 18  # plain operations, which every TensorRT since 8.5 knows
MOST_IN_ONE_FILE = 2**31 - 2**26  # bytes; a protocol buffer holds 2 GiB, and the graph needs some

# Those of TensorRT's parser, release 8.5, that graphs of `STATIC_OPSET` are made of (onnx-tensorrt, docs/operators.md).
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
    Attributes:
        sizes: bytes of each graph, its weights included.
        tolerance: what differences were held against; None for quantized graphs, which do differ.
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
    most_in_one_file: int = MOST_IN_ONE_FILE,
    overwrite: bool = False,
) -> Export:
    """
    Three graphs, `training`, `encode` and `decode` (see `graphs`), for any number of texts and tokens, in float32.

    They are run at other shapes than they were traced with, padding included, and compared with the model; only then
    does the folder take its place.

    Args:
        tokenizer: written beside them, for `OnnxFreeTransformer.write`.
        static: number of texts and of tokens to be fixed, for TensorRT and others that want fixed shapes; with one
            graph more, `prefill`, which reads the prompt.
        quantize: `"int8-weight"` (weights alone) or `"int8-dynamic"` (activations too, while it runs).
        most_in_one_file: bytes of weights above which they are written beside their graph, as `NAME.onnx.data`.
        overwrite: replaces a folder whatever it holds; otherwise only a new or empty one, or an earlier export.

    Raises:
        ValueError: for a model without a plan or with 8-bit weights, static sizes that it was not built for, an unknown
            scheme, and a folder that holds other files.
        ImportError: without onnx, onnxscript or onnxruntime.
        RuntimeError: where a graph differs from the model by more than `TOLERANCE`.
    """
    _check_arguments(model, static, quantize)
    model = traceable(model)
    export = Export(Path(folder), OPSET if static is None else STATIC_OPSET, static, quantize)
    graphs = dynamic_graphs(model) if static is None else static_graphs(model, static[1])
    with own_folder(export.folder, "export", overwrite) as temporary, torch.no_grad():
        for graph in graphs:
            file = temporary / f"{graph.name}.onnx"
            _write_graph(graph, file, export, most_in_one_file)
            if static is not None:
                check_static(file)
            if quantize is not None:
                quantize_graph(file, quantize)
            export.sizes[graph.name] = sum(each.stat().st_size for each in temporary.glob(f"{graph.name}.onnx*"))
        write_rest(model, tokenizer, temporary)
        _write_summary(export, temporary)
        export.differences = compare(model, OnnxFreeTransformer(temporary))
        if quantize is None:
            export.tolerance = within(export.differences)
        _write_summary(export, temporary)
    return export


def compare(model: FreeTransformer, exported: OnnxFreeTransformer) -> list[Difference]:
    """Runs every graph on random texts, of shapes that it was not traced with, beside the model itself."""
    generator = torch.Generator().manual_seed(0)
    span = model.config.plan_span
    long = 11 if span == "sequence" else 2 * int(span) + 9
    shapes = [exported.static] if exported.static is not None else [(1, long), (3, 8), (2, 4)]
    differences = []
    for batch, tokens in shapes:
        for padded in (False, True):
            ids = torch.randint(model.config.vocab_size, (batch, tokens), generator=generator)
            mask = torch.ones_like(ids)
            if padded:  # on the left, by as many tokens as the text's number and one; three are left
                mask[torch.arange(tokens) <= torch.arange(batch)[:, None] % (tokens - 3)] = 0
            for graph, outputs in _both(model, exported, ids, mask, generator).items():
                for output, (ours, theirs) in outputs.items():
                    differences.append(Difference.of(graph, output, ids, padded, ours, theirs))
    return differences


def check_static(file: Path) -> None:
    """
    What a compiler of fixed shapes needs: a valid graph, every shape known, operators that TensorRT's parser has.

    Raises:
        RuntimeError: where something is missing.
    """
    import onnx

    onnx.checker.check_model(file, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(file), strict_mode=True, data_prop=True)
    values = [*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info]
    unknown = [
        value.name for value in values if any(not dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    ]
    if unknown:
        raise RuntimeError(f"{file.name}: the shapes of {', '.join(unknown[:5])} are not fixed")
    if foreign := {node.op_type for node in inferred.graph.node} - TENSORRT_OPERATORS:
        raise RuntimeError(f"{file.name}: operators that TensorRT may not have: {', '.join(sorted(foreign))}")


def _check_arguments(model: PreTrainedModel, static: tuple[int, int] | None, quantize: str | None) -> None:
    check_export(model, static)
    if quantize is not None and static is not None:
        raise ValueError("static graphs are for compilers that quantize by themselves: leave quantize out")
    if quantize is not None and quantize not in SCHEMES:
        raise ValueError(f"quantize={quantize!r}: one of {SCHEMES}")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise ImportError(f"export needs {package}: pip install 'free-transformer-lm[export]'")


def _write_graph(graph: Graph, file: Path, export: Export, most_in_one_file: int) -> None:
    sizes = traced_sizes(graph, graph.model.config.plan_span, export.static)
    examples = tuple(argument.example(sizes) for argument in graph.arguments)
    with quiet():
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


def _dynamic_shapes(graph: Graph) -> tuple[Any, ...]:
    """Each argument's variable dimensions; those that others determine are left to the tracer."""
    free = {name: torch.export.Dim(name) for name in ("batch", "tokens", "past", "asked")}
    span = graph.model.config.plan_span
    if graph.name != "decode" and span != "sequence":  # the tracer counts plans, and takes 1 for a case of its own
        free["tokens"] = torch.export.Dim("tokens", min=int(span) + 1)

    def of(argument: Argument) -> dict[int, Any]:
        named = enumerate(argument.shape)
        return {place: free.get(size, torch.export.Dim.AUTO) for place, size in named if isinstance(size, str)}

    shapes = [of(argument) for argument in graph.arguments if not argument.name.startswith("past.")]
    past = [of(argument) for argument in graph.arguments if argument.name.startswith("past.")]
    return (*shapes, tuple(past)) if past else tuple(shapes)


def _name_dimensions(graph: Any, arguments: list[Argument]) -> None:
    """Gives the dimensions that the tracer has numbered the names of our arguments, wherever they occur."""
    import onnx_ir

    names: dict[str, str] = {}
    for value, argument in zip(graph.inputs, arguments, strict=True):
        for traced, ours in zip(value.shape, argument.shape, strict=True):
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


def _both(
    model: FreeTransformer, exported: OnnxFreeTransformer, ids: Tensor, mask: Tensor, generator: torch.Generator
) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Outputs of the model and of each graph, where tokens are no padding and plans cover some."""
    real = mask.bool()
    out = model(ids, attention_mask=mask, labels=ids, mode="training")
    plan_logits, used = out.plan_logits, out.plan_mask
    noise = torch.rand(plan_logits.shape, generator=generator)
    near = (noise - plan_logits.sigmoid()).abs() < 1e-3  # where rounding could turn a bit over
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


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(value.numpy())
