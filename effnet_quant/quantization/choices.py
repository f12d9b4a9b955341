"""The names that the flags of quantization choose among. This file imports no library, so that a parser starts at once."""

from __future__ import annotations

# name -> file and class in calibration/; a new calibrator is a file there and a row here
CALIBRATION_METHODS = {
    "max": "maximum.MaxCalibrator",
    "percentile": "percentile.PercentileCalibrator",
    "entropy": "entropy.EntropyCalibrator",
    "mse": "mse.MseCalibrator",
    "moving-average": "moving_average.MovingAverageCalibrator",
    "lsq": "lsq.LsqCalibrator",
}
# by the table in docs/quantization.md
DEFAULT_METHOD = "percentile"
DEFAULT_PERCENTILE = 99.99
