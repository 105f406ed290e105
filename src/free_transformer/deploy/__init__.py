"""
A trained model outside PyTorch, and a smaller one inside.

Importing this package imports no torch: `OnnxFreeTransformer` needs onnxruntime and NumPy alone. What writes an export
is in `onnx_export`, what quantizes in `quantize`.
"""

from free_transformer.deploy.onnx_model import OnnxFreeTransformer

__all__ = ["OnnxFreeTransformer"]
