"""The range that covers everything seen."""

from __future__ import annotations

import torch
from torch import Tensor


class MaxObserver:
    """Largest magnitude of all batches, kept on the tensor's device."""

    def __init__(self) -> None:
        self._max: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Take one batch of any shape into account."""
        largest = x.float().abs().amax()
        self._max = largest if self._max is None else torch.maximum(self._max, largest)

    def amax(self) -> Tensor:
        """The range, of shape (). NaN where nothing was observed or a NaN was seen."""
        return torch.tensor(torch.nan) if self._max is None else self._max
