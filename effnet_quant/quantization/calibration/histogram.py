"""Histogram: exact counts over a range that grows by doubling, in constant memory."""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effnet_quant.quantization.extremes import in_memory_order

BINS = 4096  # on either side of zero
SMALLEST_EXPONENT = -100  # of the outer edge; magnitudes far below 2**-100 share the bin of zero
# Values counted at a time. On a CPU they fit a core's cache; on a GPU they are enough to hide a kernel's launch.
_CPU_CHUNK, _GPU_CHUNK = 2**16, 2**22


class Histogram:
    """Counts of values in equal bins.

    The bins have the width 2**exponent / BINS and reach from -2**exponent to 2**exponent. Bin i holds the values with
    trunc(value / width) = i, so the bin of zero has two sides. When a value needs a larger range, bins merge in powers of
    two. This is exact: counts do not depend on the order of the values or their split into batches or processes. Counts are
    64-bit integers on the values' device.

    Args:
        exponent, seen, counts: those of an earlier histogram; empty by default.

    Attributes:
        exponent: the outer edge is 2**exponent.
        seen: smallest and largest value; (inf, -inf) before any. NaN and infinite values show here but are not counted.
    """

    def __init__(
        self,
        exponent: int = SMALLEST_EXPONENT,
        seen: tuple[float, float] = (math.inf, -math.inf),
        counts: Tensor | None = None,
    ) -> None:
        self.exponent = exponent
        self.seen = seen
        self._counts = counts

    @property
    def counts(self) -> Tensor:
        """Counts of the bins -(BINS - 1) … BINS - 1, int64."""
        return torch.zeros(2 * BINS - 1, dtype=torch.int64) if self._counts is None else self._counts

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent) / BINS

    @property
    def centres(self) -> NDArray[np.float64]:
        """The middle of every bin; 0 for the two-sided bin of zero."""
        index = np.arange(-(BINS - 1), BINS)
        return (index + 0.5 * np.sign(index)) * self.width

    def magnitude_counts(self, *, signed: bool) -> NDArray[np.float64]:
        """Counts of |x| in BINS bins from zero. If not ``signed``, negative values count as zeros."""
        counts = self.counts.cpu().numpy()
        folded = counts[BINS - 1 :].copy()
        if signed:
            folded[1:] += counts[: BINS - 1][::-1]
        else:
            folded[0] += counts[: BINS - 1].sum()
        return folded.astype(np.float64)

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor of any shape."""
        values = in_memory_order(x.detach())
        for chunk in values.split(_GPU_CHUNK if x.is_cuda else _CPU_CHUNK):
            low, high = torch.stack(torch.aminmax(chunk)).tolist()
            self._widen(low, high)
            largest = max(-low, high)
            if not math.isfinite(largest):  # also where both are NaN
                continue
            exponent = math.frexp(largest)[1] if largest > 0 else SMALLEST_EXPONENT  # largest < 2**exponent
            self._grow(exponent)
            index = (chunk.float() * (1 / self.width)).to(torch.int16).add_(BINS - 1)  # a power of two: exact
            counted = torch.bincount(index, minlength=2 * BINS - 1)
            self._counts = counted if self._counts is None else self._counts.add_(counted)

    def merge(self, other: Histogram) -> None:
        """Add the counts of ``other``."""
        self._widen(*other.seen)
        if other._counts is not None:
            self._grow(other.exponent)
            counts = _coarser(other._counts, self.exponent - other.exponent)
            self._counts = counts.clone() if self._counts is None else self._counts.add_(counts.to(self._counts.device))

    def _grow(self, exponent: int) -> None:
        """Widen the bins until they reach 2**exponent."""
        if exponent > self.exponent:
            if self._counts is not None:
                self._counts = _coarser(self._counts, exponent - self.exponent)
            self.exponent = exponent

    def _widen(self, low: float, high: float) -> None:
        own_low, own_high = self.seen
        if math.isnan(low) or math.isnan(own_low):
            self.seen = (math.nan, math.nan)
        else:
            self.seen = (min(own_low, low), max(own_high, high))


def largest_magnitude(seen: tuple[float, float], *, signed: bool) -> float:
    """The largest |x| between the smallest and largest value seen. If not ``signed``, negative values count as zeros."""
    low, high = seen
    return max(-low, high) if signed else max(high, 0.0)


def _coarser(counts: Tensor, doublings: int) -> Tensor:
    """The counts of bins 2**doublings times as wide."""
    if doublings == 0:
        return counts
    index = torch.arange(-(BINS - 1), BINS, device=counts.device)
    merged = torch.div(index, 2 ** min(doublings, 20), rounding_mode="trunc") + BINS - 1
    return torch.zeros_like(counts).index_add_(0, merged, counts)


class SeenTensors:
    """The histograms of one batch's tensors. A tensor that several quantizers see is counted once."""

    def __init__(self) -> None:
        self._histograms: dict[int, tuple[weakref.ref[Tensor], int, Histogram]] = {}

    def histogram(self, x: Tensor) -> Histogram:
        """The histogram of ``x``, counted at the first call."""
        known = self._histograms.get(id(x))
        if known is not None and known[0]() is x and known[1] == x._version:
            return known[2]
        counted = Histogram()
        counted.add(x)
        self._histograms[id(x)] = (weakref.ref(x), x._version, counted)
        return counted

    def clear(self) -> None:
        """Forget the batch."""
        self._histograms.clear()
