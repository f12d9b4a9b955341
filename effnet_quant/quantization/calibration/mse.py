"""The range with the smallest mean squared error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from effnet_quant.quantization.calibration.calibrator import HistogramCalibrator, covering_range
from effnet_quant.quantization.calibration.histogram import BINS, Histogram, largest_magnitude
from effnet_quant.quantization.calibration.weight_ranges import mse_weight_range
from effnet_quant.quantization.spec import TensorSpec

_STRIDE = 16  # bins between the candidates of the first look


class MseCalibrator(HistogramCalibrator):
    """The range with the smallest mean squared error (``mse_range``), for weights of any width too."""

    def range(self, spec: TensorSpec) -> tuple[float, float]:
        return mse_range(self.histogram, spec)

    def weight_range(self, weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """Of 100 shrunken copies of the whole range the one with the smallest squared error, by channel."""
        return mse_weight_range(weight, spec)


def mse_range(histogram: Histogram, spec: TensorSpec) -> tuple[float, float]:
    """Ends of the range that quantizes the histogram with the smallest mean squared error, a bin's edge or what was seen.

    On an affine grid the ends move in turns until neither moves. A grid that is finer than the histogram gets the whole
    range.
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
    """Sum of squared quantization errors of the values in ``histogram``, for each range [amin, amax]."""
    return _Errors(histogram, spec)(amin, amax)


def _search(error: Callable[[NDArray[np.float64]], NDArray[np.float64]], largest: float, width: float) -> float:
    """The end with the smallest error among the bins' edges up to ``largest``, and ``largest``: a look at every 16th
    edge, then at all around the three best."""
    edges = np.append(np.arange(1, int(np.ceil(largest / width))) * width, largest)
    coarse = np.arange(len(edges) - 1, -1, -_STRIDE)
    best = coarse[np.argsort(error(edges[coarse]), kind="stable")[:3]]
    fine = np.unique((best[:, None] + np.arange(-_STRIDE + 1, _STRIDE)[None, :]).clip(0, len(edges) - 1))[::-1]
    return float(edges[fine[np.argmin(error(edges[fine]))]])


class _Errors:
    """Squared errors over a histogram, from sums of its counts and their first two moments: a level of the grid takes the
    bins whose centres are nearest to it."""

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
        """How many bins have their centre below ``value``."""
        quotient = value / self._width
        right = BINS - 1 + np.maximum(1, np.ceil(quotient - 0.5))
        left = BINS - 1 - np.maximum(0, np.floor(-quotient - 0.5))
        return np.where(quotient > 0, right, left).clip(0, 2 * BINS - 1).astype(np.int64)
