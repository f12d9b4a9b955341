"""The names that the flags of quantization choose among. This file imports no library, so that a parser starts at once."""

from __future__ import annotations

CALIBRATION_METHODS = ("max", "percentile", "entropy", "mse", "moving-average", "lsq")
