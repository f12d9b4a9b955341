"""PercentileCalibrator: the range that covers a given share of the values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from effnet_quant.errors import UserError
from effnet_quant.quantization.calibration.calibrator import HistogramCalibrator
from effnet_quant.quantization.calibration.histogram import BINS, largest_magnitude
from effnet_quant.quantization.choices import DEFAULT_PERCENTILE
from effnet_quant.quantization.spec import TensorSpec


class PercentileCalibrator(HistogramCalibrator):
    """The range that covers ``percentile`` percent of the values, widened to bins' edges but within the values seen.

    On a symmetric grid it covers that share of the magnitudes. On an affine grid half of the remaining values may lie below
    the range, and half above.

    Args:
        percentile: above 0 and at most 100.

    Raises:
        UserError: another percentile.
    """

    def __init__(self, percentile: float = DEFAULT_PERCENTILE) -> None:
        super().__init__()
        if not 0 < percentile <= 100:
            raise UserError(f"the percentile must be above 0 and at most 100, not {percentile}.")
        self.percentile = percentile

    def range(self, spec: TensorSpec) -> tuple[float, float]:
        low, high = self.seen
        width = self.histogram.width
        if spec.symmetric:
            edge = (_reached(self.histogram.magnitude_counts(signed=spec.signed), self.percentile / 100) + 1) * width
            amax = min(edge, largest_magnitude(self.seen, signed=spec.signed))
            return -amax, amax
        counts = self.histogram.counts.cpu().numpy().astype(np.float64)
        share = 1 - (1 - self.percentile / 100) / 2
        return max(-_upper_edge(counts[::-1], share) * width, low), min(_upper_edge(counts, share) * width, high)


def _reached(counts: NDArray[np.float64], share: float) -> int:
    """Index of the first bin at which the cumulated counts reach ``share`` of all."""
    cumulated = counts.cumsum()
    return min(int(np.searchsorted(cumulated, cumulated[-1] * share)), len(counts) - 1)


def _upper_edge(counts: NDArray[np.float64], share: float) -> int:
    """Upper edge of the bin that ``_reached`` finds, in bins from zero."""
    index = _reached(counts, share) - (BINS - 1)
    return index + 1 if index >= 0 else index
