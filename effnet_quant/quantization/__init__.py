"""Quantization: integer grids, quantizers, their placement, calibration and quantization-aware training (QAT)."""
