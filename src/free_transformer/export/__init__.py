"""Models in other formats: from a pretrained Llama, to ONNX, to 8-bit weights and to compiled packages."""
