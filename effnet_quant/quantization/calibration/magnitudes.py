"""Views of a histogram that the ways of choosing a range share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from effnet_quant.quantization.calibration.histogram import BINS, Histogram


def magnitude_counts(histogram: Histogram, *, signed: bool) -> NDArray[np.float64]:
    """Counts of |x| in BINS bins from zero. On an unsigned grid negative values are zeros."""
    counts = histogram.counts.cpu().numpy()
    folded = counts[BINS - 1 :].copy()
    if signed:
        folded[1:] += counts[: BINS - 1][::-1]
    else:
        folded[0] += counts[: BINS - 1].sum()
    return folded.astype(np.float64)


def largest_magnitude(seen: tuple[float, float], *, signed: bool) -> float:
    """What the range must reach to hold everything."""
    low, high = seen
    return max(-low, high) if signed else max(high, 0.0)


def bin_centres(histogram: Histogram) -> NDArray[np.float64]:
    """The middle of every bin; 0 for the two-sided bin of zero."""
    index = np.arange(-(BINS - 1), BINS)
    return (index + 0.5 * np.sign(index)) * histogram.width
