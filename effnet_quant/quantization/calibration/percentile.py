"""The range that covers a given share of the magnitudes seen, from a histogram of constant size."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 4096
SMALLEST_EXPONENT = -100  # of the upper edge; magnitudes far below 2**-100 share its first bin


class PercentileObserver:
    """A percentile of |x| over all batches.

    The histogram's upper edge is always a power of two: the smallest that has covered every batch. When a batch needs a
    larger one, neighbouring bins merge in powers of two, which is exact, so the result does not depend on how the images
    were split into batches. Counts are 64-bit integers; memory is BINS counts, whatever the number of batches.

    Args:
        percentile: share of the magnitudes that the range covers, in percent, 0 < percentile <= 100.
    """

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile
        self._counts: Tensor | None = None
        self._exponent: Tensor  # of the upper edge, int64
        self._max: Tensor

    def observe(self, x: Tensor) -> None:
        """Take one batch of any shape into account."""
        magnitudes = x.float().abs().flatten()
        largest = magnitudes.amax()
        if self._counts is None:
            self._counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
            self._exponent = torch.full((), SMALLEST_EXPONENT, dtype=torch.int64, device=x.device)
            self._max = torch.zeros((), device=x.device)
        self._max = torch.maximum(self._max, largest)
        # frexp: |x| < 2**exponent; a NaN or inf batch is left out of the histogram and told by _max
        countable = torch.isfinite(largest) & (largest > 0)
        exponent = torch.where(countable, torch.frexp(largest.nan_to_num(0, 0))[1], SMALLEST_EXPONENT)
        needed = torch.maximum(self._exponent, exponent.to(torch.int64))
        merged = torch.arange(BINS, device=x.device) >> (needed - self._exponent).clamp(max=62)
        self._counts = torch.zeros_like(self._counts).index_add_(0, merged, self._counts)
        self._exponent = needed
        scaled = torch.ldexp(magnitudes.nan_to_num(0, 0), BINS.bit_length() - 1 - needed)
        self._counts += torch.bincount(scaled.clamp_(max=BINS - 1).to(torch.int64), minlength=BINS)

    def amax(self) -> Tensor:
        """The range, of shape (): the upper edge of the bin that reaches the percentile, at most the largest value seen.
        NaN where nothing was observed or a NaN was seen, inf where an infinity was."""
        if self._counts is None:
            return torch.tensor(torch.nan)
        cumulated = self._counts.cumsum(0).double()
        reached = torch.searchsorted(cumulated, cumulated[-1] * (self.percentile / 100)).clamp(max=BINS - 1)
        edge = torch.ldexp((reached + 1).float() / BINS, self._exponent)
        return torch.where(torch.isfinite(self._max), torch.minimum(edge, self._max), self._max)
