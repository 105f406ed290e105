"""Conversion of pretrained models, and export to ONNX, to 8-bit weights and to ahead-of-time compiled packages."""
