"""MseCalibrator: the range with the smallest mean squared error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from effnet_quant.quantization.calibration.calibrator import HistogramCalibrator, covering_range
from effnet_quant.quantization.calibration.histogram import BINS, Histogram, largest_magnitude
from effnet_quant.quantization.calibration.weight_ranges import mse_weight_range
from effnet_quant.quantization.spec import TensorSpec

_STRIDE = 16  # bins between the candidates of the coarse search


class MseCalibrator(HistogramCalibrator):
    """The range with the smallest mean squared error (``mse_range``), also for weights of any width."""

    def range(self, spec: TensorSpec) -> tuple[float, float]:
        return mse_range(self.histogram, spec)

    def weight_range(self, weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """The range with the smallest squared error among 100 shrunken copies of the whole range, per channel."""
        return mse_weight_range(weight, spec)


def mse_range(histogram: Histogram, spec: TensorSpec) -> tuple[float, float]:
    """Both ends of the range that quantizes the histogram's values with the smallest mean squared error.

    An end is a bin's edge, or the smallest or largest value seen. On an affine grid the search moves one end at a time, in
    turns, until neither moves or ten turns are over. A grid finer than the histogram gets the whole range.
    """
    low, high = histogram.seen
    largest = largest_magnitude(histogram.seen, signed=spec.signed)
    if 2**spec.bits >= BINS or max(-low, high) == 0 or (spec.symmetric and largest == 0):
        return covering_range(histogram.seen, spec)
    errors = _Errors(histogram, spec)
    if spec.symmetric:
        amax = _search(lambda ends: errors(-ends, ends), largest, histogram.width)
        return -amax, amax
    low, high = min(low, 0.0), max(high, 0.0)
    start, end = low, high
    for _ in range(10):
        before = (start, end)
        if high > 0:
            end = _search(lambda ends, start=start: errors(np.full_like(ends, start), ends), high, histogram.width)  # type: ignore[misc]
        if low < 0:
            start = -_search(lambda ends, end=end: errors(-ends, np.full_like(ends, end)), -low, histogram.width)  # type: ignore[misc]
        if (start, end) == before:
            break
    return start, end


def squared_errors(
    histogram: Histogram, spec: TensorSpec, amin: NDArray[np.float64], amax: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Sum of squared quantization errors of the values in ``histogram``, one for each range [amin, amax]."""
    return _Errors(histogram, spec)(amin, amax)


def _search(error: Callable[[NDArray[np.float64]], NDArray[np.float64]], largest: float, width: float) -> float:
    """The end with the smallest error. Candidates are ``largest`` and the bins' edges below it.

    The search tries every 16th edge, then all edges around the three best.
    """
    edges = np.append(np.arange(1, int(np.ceil(largest / width))) * width, largest)
    coarse = np.arange(len(edges) - 1, -1, -_STRIDE)
    best = coarse[np.argsort(error(edges[coarse]), kind="stable")[:3]]
    fine = np.unique((best[:, None] + np.arange(-_STRIDE + 1, _STRIDE)[None, :]).clip(0, len(edges) - 1))[::-1]
    return float(edges[fine[np.argmin(error(edges[fine]))]])


class _Errors:
    """Squared quantization errors of a histogram, from running sums of its counts and their first two moments.

    Each level of the grid takes the bins whose centres are nearest to it.
    """

    def __init__(self, histogram: Histogram, spec: TensorSpec) -> None:
        counts, centres = histogram.counts.cpu().numpy().astype(np.float64), histogram.centres
        moments = (counts, counts * centres, counts * centres**2)
        self._sums = [np.concatenate(([0.0], moment.cumsum())) for moment in moments]
        self._width = histogram.width
        self._spec = spec

    def __call__(self, amin: NDArray[np.float64], amax: NDArray[np.float64]) -> NDArray[np.float64]:
        low, high = self._spec.bounds
        if self._spec.symmetric:
            scale, zero_point = amax / high, np.zeros_like(amax)
        else:
            scale = (np.maximum(amax, 0) - np.minimum(amin, 0)) / (high - low)
            zero_point = np.clip(low - np.rint(np.minimum(amin, 0) / scale), low, high)
        levels = (np.arange(low, high + 1)[None, :] - zero_point[:, None]) * scale[:, None]
        between = self._bins_below((levels[:, :-1] + levels[:, 1:]) / 2)
        bounds = np.pad(between, ((0, 0), (1, 1)), constant_values=((0, 0), (0, 2 * BINS - 1)))
        zeroth, first, second = (np.diff(moment[bounds], axis=1) for moment in self._sums)
        return np.asarray((second - 2 * levels * first + levels**2 * zeroth).sum(axis=1))

    def _bins_below(self, value: NDArray[np.float64]) -> NDArray[np.int64]:
        """The number of bins with their centre below ``value``."""
        quotient = value / self._width
        right = BINS - 1 + np.maximum(1, np.ceil(quotient - 0.5))
        left = BINS - 1 - np.maximum(0, np.floor(-quotient - 0.5))
        return np.where(quotient > 0, right, left).clip(0, 2 * BINS - 1).astype(np.int64)
