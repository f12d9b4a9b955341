"""LsqCalibrator: the initial range for training with learned ranges."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from effnet_quant.quantization.calibration.calibrator import HistogramCalibrator
from effnet_quant.quantization.calibration.mse import mse_range
from effnet_quant.quantization.calibration.weight_ranges import shared_dims
from effnet_quant.quantization.spec import TensorSpec


class LsqCalibrator(HistogramCalibrator):
    """LSQ's initial step, 2 <|x|> / sqrt(Qp) (Esser et al. 2020), as a range.

    Affine activations start at the range with the smallest squared error, as in LSQ+ (Bhalgat et al. 2020).
    """

    def range(self, spec: TensorSpec) -> tuple[float, float]:
        if not spec.symmetric:
            return mse_range(self.histogram, spec)
        counts = self.histogram.counts.cpu().numpy()
        mean = float((counts * np.abs(self.histogram.centres)).sum() / max(counts.sum(), 1))
        amax = 2 * mean * math.sqrt(spec.bounds[1])
        return -amax, amax

    def weight_range(self, weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """LSQ's initial range on symmetric grids; on affine grids the range of the other methods."""
        if not spec.symmetric:
            return super().weight_range(weight, spec)
        dims, keep = shared_dims(weight, spec)
        amax = 2 * weight.abs().mean(dim=dims, keepdim=keep) * math.sqrt(spec.bounds[1])
        return -amax, amax
