"""OutputQuantizer: the rounding of a convolution's output that some engines need and NVIDIA's placement does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.quantization.extremes import extremes

# A value that is always zero still needs a scale that is a normal float32.
SMALLEST_SCALE = 2.0**-110


def affine_uint8(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of the uint8 grid that covers [low, high] and zero; the scale is a float32 number."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(torch.tensor((high - low) / 255, dtype=torch.float32).item(), SMALLEST_SCALE)
    return scale, min(255, max(0, round(-low / scale)))


class OutputQuantizer(nn.Module):
    """Knows the extremes of a value, and where ``simulated`` rounds it to 256 steps between them, in eval mode.

    ONNX Runtime's integer convolution writes 8-bit integers, so what leaves it is rounded before the activation. The
    simulation of such an engine has to round there too; training does not pay for it, and simulations of other engines
    let the value pass. The grid is affine and spans all that calibration saw, and zero. Without a range the value passes,
    and nothing is in the state dict, so that a network as built has NVIDIA's names.

    Args:
        operation: what the value comes from, one of the targets' OPERATIONS.

    Attributes:
        simulated: whether the simulated engine rounds here.
    """

    _low: Tensor
    _high: Tensor

    def __init__(self, operation: str = "conv") -> None:
        super().__init__()
        self.operation = operation
        self.simulated = True
        self.tracking = False
        self.enabled = False
        self.register_buffer("_low", torch.tensor(torch.inf))
        self.register_buffer("_high", torch.tensor(-torch.inf))

    @property
    def range(self) -> tuple[float, float] | None:
        """Smallest and largest value seen, None if nothing has been."""
        if self._low.is_meta:
            return None
        low, high = self._low.item(), self._high.item()
        return (low, high) if low <= high else None

    @property
    def grid(self) -> tuple[float, int] | None:
        """Scale and zero point of the uint8 grid, None if nothing has been seen."""
        return None if self.range is None else affine_uint8(*self.range)

    @property
    def rounds(self) -> bool:
        """Whether values that pass are rounded now."""
        return self.simulated and self.enabled and not self.training

    def start_tracking(self) -> None:
        """Forget the range and find it anew in what passes from now on."""
        self._low.fill_(torch.inf)
        self._high.fill_(-torch.inf)
        self.tracking, self.enabled = True, False

    def stop_tracking(self) -> None:
        """Round to the range found from now on, if anything passed."""
        self.tracking, self.enabled = False, self.range is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.tracking:
            low, high = extremes(x)
            self._low.copy_(torch.minimum(self._low, low))
            self._high.copy_(torch.maximum(self._high, high))
        if not self.rounds:
            return x
        low, high = self._low.clamp(max=0), self._high.clamp(min=0)
        scale = ((high - low) / 255).clamp(min=SMALLEST_SCALE)
        zero_point = torch.round(-low / scale)
        integers = torch.clamp(torch.round(x.float() / scale) + zero_point, 0, 255)
        return ((integers - zero_point) * scale).to(x.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.enabled:  # not the range itself: to look at it waits for the GPU
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}_low" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.enabled = self.range is not None

    def extra_repr(self) -> str:
        ends = "no range yet" if self.range is None else "uint8, {:.4g} … {:.4g}".format(*self.range)
        return ends if self.simulated else f"{ends}, off"
