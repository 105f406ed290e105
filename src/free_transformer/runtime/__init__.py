"""Runs where torch is not installed: ONNX exports and their plans, with NumPy alone."""
