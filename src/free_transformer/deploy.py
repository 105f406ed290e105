"""`OnnxFreeTransformer` runs an ONNX export without torch; the code is in `runtime/onnx_model.py`."""

from free_transformer.runtime.onnx_model import OnnxFreeTransformer

__all__ = ["OnnxFreeTransformer"]
