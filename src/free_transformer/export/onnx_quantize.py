"""8-bit quantization of ONNX graphs with onnxruntime's tools."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

BLOCK = 64  # number of weights that share a scale


def quantize_graph(file: Path, scheme: str) -> None:
    """
    Replaces a graph by one with 8-bit matrices. Embeddings and the codebook keep their type.

    Args:
        file: the ONNX file.
        scheme: `"int8-weight"` multiplies in float32 with weights that are dequantized block by block.
            `"int8-dynamic"` multiplies in integers, with activations quantized at run time.
    """
    external = file.with_name(f"{file.name}.data").exists()
    with _root_logger_restored():
        if scheme == "int8-weight":
            _quantize_weights(file, external)
        else:
            _quantize_weights_and_activations(file, external)


def _quantize_weights(file: Path, external: bool) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=1, bits=8)
    quantizer = MatMulNBitsQuantizer(onnx.load(file), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(file), external)


def _quantize_weights_and_activations(file: Path, external: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        file,
        file,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,  # avoids overflow on processors without VNNI, which add pairs of products in 16 bits
        weight_type=QuantType.QInt8,
        use_external_data_format=external,
        extra_options={"MatMulConstBOnly": True},
    )


@contextlib.contextmanager
def _root_logger_restored() -> Iterator[None]:
    """Undoes what onnxruntime's quantizers do to the root logger, and hides their line per tensor."""
    root = logging.getLogger()
    handlers, level, silenced = root.handlers[:], root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(silenced)
        root.handlers[:] = handlers
        root.setLevel(level)
