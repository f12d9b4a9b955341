"""Calibration: chooses the ranges of quantizers from the tensors that pass them."""

from effnet_quant.quantization.calibration.calibrator import Calibrator, HistogramCalibrator
from effnet_quant.quantization.calibration.loop import calibrate, collect, set_ranges, track_outputs
from effnet_quant.quantization.calibration.methods import DEFAULT_METHOD, METHODS
from effnet_quant.quantization.calibration.range_report import RangeReport, report_ranges

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "Calibrator",
    "HistogramCalibrator",
    "RangeReport",
    "calibrate",
    "collect",
    "report_ranges",
    "set_ranges",
    "track_outputs",
]
