"""Leaving PyTorch: ONNX export, engines, their verification and their latency."""
