"""Calibration: from the tensors a network sees to the ranges of its quantizers."""

from effnet_quant.quantization.calibration.loop import METHODS, calibrate, track_outputs

__all__ = ["METHODS", "calibrate", "track_outputs"]
