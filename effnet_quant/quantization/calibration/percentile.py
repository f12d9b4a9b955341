"""The range that covers a given share of the values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from effnet_quant.quantization.calibration.histogram import BINS, Histogram
from effnet_quant.quantization.calibration.magnitudes import largest_magnitude, magnitude_counts
from effnet_quant.quantization.spec import TensorSpec


def percentile_range(histogram: Histogram, spec: TensorSpec, percentile: float) -> tuple[float, float]:
    """Ends of the range that covers ``percentile`` percent of the values, rounded out to a bin's edge, within what was seen.

    On a symmetric grid it covers that share of the magnitudes. On an affine grid what is left out is split evenly: half of
    it may lie below, half above.
    """
    low, high = histogram.seen
    if spec.symmetric:
        counts = magnitude_counts(histogram, signed=spec.signed)
        edge = (_reached(counts, percentile / 100) + 1) * histogram.width
        amax = min(edge, largest_magnitude(histogram.seen, signed=spec.signed))
        return -amax, amax
    counts = histogram.counts.cpu().numpy().astype(np.float64)
    share = 1 - (1 - percentile / 100) / 2
    return max(-_upper_edge(counts[::-1], share) * histogram.width, low), min(
        _upper_edge(counts, share) * histogram.width, high
    )


def _reached(counts: NDArray[np.float64], share: float) -> int:
    """The first bin up to which ``share`` of the values lie."""
    cumulated = counts.cumsum()
    return min(int(np.searchsorted(cumulated, cumulated[-1] * share)), len(counts) - 1)


def _upper_edge(counts: NDArray[np.float64], share: float) -> int:
    """Upper edge, in bins, of the bin that is reached; bins left of zero end on the side of zero."""
    index = _reached(counts, share) - (BINS - 1)
    return index + 1 if index >= 0 else index
