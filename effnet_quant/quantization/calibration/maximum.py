"""The range that covers everything seen."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_quant.quantization.extremes import extremes


class MaxObserver:
    """Smallest and largest value of all batches, kept on the tensor's device."""

    def __init__(self) -> None:
        self._ends = torch.tensor([torch.inf, -torch.inf])

    def observe(self, x: Tensor) -> None:
        """Take one batch of any shape into account; NaN stays."""
        low, high = extremes(x)
        ends = self._ends.to(x.device)
        self._ends = torch.stack((torch.minimum(ends[0], low), torch.maximum(ends[1], high)))

    @property
    def seen(self) -> tuple[float, float]:
        """Smallest and largest value; (inf, -inf) where nothing was observed, NaN where one was."""
        low, high = self._ends.tolist()
        return low, high

    def merge_extremes(self, low: float, high: float) -> None:
        """Take the extremes of another part of the data into account."""
        own_low, own_high = self.seen
        self._ends = torch.tensor([min(own_low, low), max(own_high, high)])
