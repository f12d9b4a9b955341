"""EntropyCalibrator: the range with the smallest loss of information, as in TensorRT."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from effnet_quant.quantization.calibration.calibrator import HistogramCalibrator
from effnet_quant.quantization.calibration.histogram import largest_magnitude
from effnet_quant.quantization.spec import TensorSpec


class EntropyCalibrator(HistogramCalibrator):
    """The range with the smallest Kullback-Leibler divergence between the values and the quantized values (Migacz, "8-bit
    inference with TensorRT", GTC 2017). It stays within the values seen.

    Candidates for the threshold of |x| are the upper edges of the bins; at least as many bins are kept as the grid has
    levels. An affine grid is cut at the same threshold on both sides; after a ReLU all its levels count. A grid finer than
    the histogram gets the whole range.
    """

    def range(self, spec: TensorSpec) -> tuple[float, float]:
        low, high = min(self.seen[0], 0.0), max(self.seen[1], 0.0)
        signed = spec.signed or not spec.symmetric
        one_sided = not signed or (not spec.symmetric and 0 in (low, high))
        levels = 2 ** (spec.bits if one_sided else spec.bits - 1)
        counts = self.histogram.magnitude_counts(signed=signed)
        threshold = min(
            best_threshold(counts, levels) * self.histogram.width, largest_magnitude(self.seen, signed=signed)
        )
        return (-threshold, threshold) if spec.symmetric else (max(low, -threshold), min(high, threshold))


def best_threshold(counts: NDArray[np.float64], levels: int) -> int:
    """The number of bins to keep: the i with the smallest KL(P_i || Q_i), from ``levels`` to the last bin in use.

    P_i is the first i bins; all counts beyond are added to its last bin. Q_i is the first i bins without that addition,
    merged into ``levels`` groups. Each group's counts are spread evenly over its bins that are not empty. As in NVIDIA's
    tools, the bin of zero gets its neighbour's count: zeros are exact in any range, and after a ReLU they would outweigh all
    other values.
    """
    used = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    if used <= levels:
        return used
    counts = counts[:used].copy()
    counts[0] = counts[1]
    total = counts.sum()
    if total == 0:
        return used
    sizes = np.arange(levels, used + 1)
    sums = np.concatenate(([0.0], counts.cumsum()))
    occupied = np.concatenate(([0.0], (counts > 0).cumsum()))
    information = np.concatenate(([0.0], _times_log(counts, counts).cumsum()))
    # bin j belongs to group floor(j * levels / i), so group k starts at ceil(k * i / levels)
    starts = -(-np.arange(levels + 1)[None, :] * sizes[:, None] // levels)
    mass = np.diff(sums[starts], axis=1)
    members = np.diff(occupied[starts], axis=1)
    inside, outliers = sums[sizes], total - sums[sizes]
    last = counts[sizes - 1]
    # sum of P log P: the last bin of P holds the outliers too
    entropy = information[sizes] - _times_log(last, last) + _times_log(last + outliers, last + outliers)
    mean = np.divide(mass, members, out=np.ones_like(mass), where=members > 0)
    reference = mass.copy()
    reference[:, -1] += outliers
    cross = _times_log(reference, mean).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = (entropy - cross) / total - np.log(total) + np.log(inside)
    divergence[(inside == 0) | ((last == 0) & (outliers > 0))] = np.inf  # somewhere Q is zero and P is not
    # the widest of equally good ranges
    return int(sizes[len(sizes) - 1 - np.argmin(divergence[::-1])])


def _times_log(factor: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """factor * log(x), 0 where the factor is 0."""
    return factor * np.log(np.where(factor > 0, x, 1.0))
