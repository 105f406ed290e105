"""ONNX exports and their plans, with NumPy only. Runs without torch."""
