"""Integers in the place of a graph's matrices, by the tools of onnxruntime."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

BLOCK = 64  # weights that share a scale


def quantize_graph(file: Path, scheme: str) -> None:
    """
    Replaces the graph by one whose matrices are held in 8 bits; embeddings and the table of plans stay as they are.

    Args:
        scheme: `"int8-weight"`, products in float32 with weights that are unpacked block by block, or
            `"int8-dynamic"`, products of integers, the scale of the activations being found while it runs.
    """
    external = file.with_name(f"{file.name}.data").exists()
    with _root_logger_kept():
        if scheme == "int8-weight":
            _weights_alone(file, external)
        else:
            _with_activations(file, external)


def _weights_alone(file: Path, external: bool) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=1, bits=8)
    quantizer = MatMulNBitsQuantizer(onnx.load(file), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(file), external)


def _with_activations(file: Path, external: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        file,
        file,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,  # processors without VNNI add pairs of products in 16 bits
        weight_type=QuantType.QInt8,
        use_external_data_format=external,
        extra_options={"MatMulConstBOnly": True},
    )


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """onnxruntime's quantizers set the root logger up for themselves, and tell it of every tensor."""
    root = logging.getLogger()
    handlers, level, silenced = root.handlers[:], root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(silenced)
        root.handlers[:] = handlers
        root.setLevel(level)
