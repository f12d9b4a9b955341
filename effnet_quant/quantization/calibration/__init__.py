"""Calibration: from the tensors a network sees to the ranges of its quantizers."""

from effnet_quant.quantization.calibration.loop import calibrate, collect, set_ranges, track_outputs
from effnet_quant.quantization.calibration.methods import METHODS
from effnet_quant.quantization.calibration.range_report import RangeReport, report_ranges

__all__ = ["METHODS", "RangeReport", "calibrate", "collect", "report_ranges", "set_ranges", "track_outputs"]
