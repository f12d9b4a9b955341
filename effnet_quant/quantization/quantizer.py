"""TensorQuantizer: the one module that holds a range."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effnet_quant.quantization.fake_quant import fake_quantize, scale_from_amax
from effnet_quant.quantization.spec import TensorSpec


class Observer(Protocol):
    """What looks at the float tensors that pass a quantizer during calibration."""

    def observe(self, x: Tensor) -> None:
        """Take one batch into account."""


class TensorQuantizer(nn.Module):
    """Fake quantization with a fixed range, the state-dict entry ``_amax`` of NVIDIA's pytorch-quantization.

    A quantizer without a range (``_amax`` is NaN, as built) passes its input through, so a network that is not calibrated
    yet computes what the float network does. Calibrating it or loading a range switches it on. ``enabled`` and
    ``observer`` only change between forward passes, never inside one: torch.compile sees constants.

    Args:
        spec: the grid.
        amax_shape: () for one range, or e.g. (C, 1, 1, 1) for one per output channel.
    """

    _amax: Tensor

    def __init__(self, spec: TensorSpec, amax_shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = False
        self.observer: Observer | None = None
        self.register_buffer("_amax", torch.full(amax_shape, torch.nan))

    @property
    def amax(self) -> Tensor:
        """The largest magnitude represented; float32, of shape () or one entry a channel. NaN before calibration."""
        return self._amax

    @property
    def scale(self) -> Tensor:
        """The step of the grid, in the shape of ``amax``."""
        return scale_from_amax(self._amax, self.spec)

    @property
    def calibrated(self) -> bool:
        """Whether every range is a finite number."""
        return bool(torch.isfinite(self._amax).all())

    def set_amax(self, amax: Tensor) -> None:
        """Set the range (broadcast to the shape of ``amax``) and switch the quantizer on.

        Raises:
            ValueError: the range is negative, infinite or NaN.
        """
        if not bool((torch.isfinite(amax) & (amax >= 0)).all()):
            raise ValueError(f"a range must be finite and not negative, got {amax.flatten()[:4].tolist()}")
        self._amax.copy_(amax)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.observe(x.detach())
        if not self.enabled:
            return x
        return fake_quantize(x, self._amax, self.spec)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.enabled = self.calibrated

    def extra_repr(self) -> str:
        axis = "per tensor" if self.spec.axis is None else f"per index of dim {self.spec.axis}"
        if not self.calibrated:
            amax = "no range yet"
        elif self._amax.numel() == 1:
            amax = f"amax={self._amax.item():.4g}"
        else:
            amax = f"amax={self._amax.min().item():.4g}…{self._amax.max().item():.4g}"
        return f"int{self.spec.bits}, {axis}, {amax}" + ("" if self.enabled else ", off")
