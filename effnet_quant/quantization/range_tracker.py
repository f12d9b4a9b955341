"""RangeTracker: the extremes of a value that the simulation leaves in float but an engine may quantize."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.quantization.extremes import extremes


class RangeTracker(nn.Module):
    """Remembers the smallest and the largest value that passed while ``tracking``; never changes what passes.

    A tracker that has seen nothing leaves no trace in the state dict, so that a network as built has NVIDIA's names.
    """

    _low: Tensor
    _high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tracking = False
        self.register_buffer("_low", torch.tensor(torch.inf))
        self.register_buffer("_high", torch.tensor(-torch.inf))

    @property
    def range(self) -> tuple[float, float] | None:
        """Smallest and largest value, None if nothing has been tracked."""
        low, high = self._low.item(), self._high.item()
        return (low, high) if low <= high else None

    def start(self) -> None:
        """Forget the past and track from now on."""
        self._low.fill_(torch.inf)
        self._high.fill_(-torch.inf)
        self.tracking = True

    def forward(self, x: Tensor) -> Tensor:
        if self.tracking:
            low, high = extremes(x)
            self._low.copy_(torch.minimum(self._low, low))
            self._high.copy_(torch.maximum(self._high, high))
        return x

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.range is not None:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}_low" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return "nothing tracked" if self.range is None else "{:.4g} … {:.4g}".format(*self.range)
