"""The choices of quantization's flags. This file imports no library, so that command lines start fast."""

from __future__ import annotations

# name -> file and class in calibration/. A new calibrator is a file there and a row here.
CALIBRATION_METHODS = {
    "max": "maximum.MaxCalibrator",
    "percentile": "percentile.PercentileCalibrator",
    "entropy": "entropy.EntropyCalibrator",
    "mse": "mse.MseCalibrator",
    "moving-average": "moving_average.MovingAverageCalibrator",
    "lsq": "lsq.LsqCalibrator",
}
# chosen by the table in docs/quantization.md
DEFAULT_METHOD = "percentile"
DEFAULT_PERCENTILE = 99.99
# names of the recipes in recipe.py
PTQ_RECIPES = ("minmax", "standard", "adaround", "reconstruct")
DEFAULT_RECIPE = "standard"
