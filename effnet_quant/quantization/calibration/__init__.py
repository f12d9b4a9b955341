"""Calibration: from the tensors a network sees to the ranges of its quantizers."""

from effnet_quant.quantization.calibration.loop import METHODS, calibrate

__all__ = ["METHODS", "calibrate"]
