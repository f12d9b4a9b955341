"""TensorQuantizer: the one module that holds a range."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effnet_quant.quantization.fake_quant import affine_grid, fake_quantize, scale_from_amax
from effnet_quant.quantization.spec import TensorSpec


class Observer(Protocol):
    """What looks at the float tensors that pass a quantizer."""

    def observe(self, x: Tensor) -> None:
        """Take one batch into account."""


class TensorQuantizer(nn.Module):
    """Fake quantization over one range, the state-dict entry ``_amax`` of NVIDIA's pytorch-quantization.

    Affine grids have a second entry, ``_amin``, the lower end. A fixed range is a buffer, a learned one a parameter.

    A quantizer without a range (``_amax`` is NaN, as built) passes its input through, so a network that is not calibrated
    yet computes what the float network does. Calibrating it or loading a range switches it on. ``enabled`` and
    ``observer`` only change between forward passes, never inside one: torch.compile sees constants.

    Args:
        spec: the grid.
        amax_shape: () for one range, or e.g. (C, 1, 1, 1) for one per output channel.
        operation: what computes with the quantized value, one of the targets' OPERATIONS.
        weights: whether it quantizes weights, not activations.

    Attributes:
        spec: the grid in use: the given one, or its unsigned twin (``simulate``).
        simulated: whether the simulated engine computes this operation with integers; the value passes if not.
        never_negative: whether the network's structure keeps negative values away, as a ReLU does.
    """

    _amax: Tensor
    _amin: Tensor | None

    def __init__(
        self, spec: TensorSpec, amax_shape: tuple[int, ...] = (), operation: str = "conv", *, weights: bool = False
    ) -> None:
        super().__init__()
        self.spec = self._given_spec = spec
        self.operation = operation
        self.weights = weights
        self.simulated = True
        self.never_negative = False
        self.enabled = False
        self.observer: Observer | None = None
        self._register("_amax", torch.full(amax_shape, torch.nan))
        if spec.symmetric:
            self._amin = None
        else:
            self._register("_amin", torch.full(amax_shape, torch.nan))

    def _register(self, name: str, value: Tensor) -> None:
        if self.spec.learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def amax(self) -> Tensor:
        """Upper end of the range, on a symmetric grid the largest magnitude; float32, of shape () or one entry a channel.
        NaN before calibration."""
        return self._amax.detach()

    @property
    def amin(self) -> Tensor | None:
        """Lower end of the range of an affine grid, in the shape of ``amax``; None on a symmetric grid."""
        return None if self._amin is None else self._amin.detach()

    @property
    def scale(self) -> Tensor:
        """The step of the grid, in the shape of ``amax``."""
        if self.amin is None:
            return scale_from_amax(self.amax, self.spec)
        return affine_grid(self.amin, self.amax, self.spec)[0]

    @property
    def zero_point(self) -> Tensor:
        """The integer that stands for 0.0, as float32 in the shape of ``amax``; 0 on a symmetric grid."""
        if self.amin is None:
            return torch.zeros_like(self.amax)
        return affine_grid(self.amin, self.amax, self.spec)[1]

    @property
    def calibrated(self) -> bool:
        """Whether every range is a finite number."""
        return all(bool(torch.isfinite(end).all()) for end in (self.amax, self.amin) if end is not None)

    def set_amax(self, amax: Tensor) -> None:
        """Set the range of a symmetric grid (broadcast to the shape of ``amax``) and switch the quantizer on.

        Raises:
            ValueError: the range is negative, infinite or NaN, or the grid is affine.
        """
        if not bool((torch.isfinite(amax) & (amax >= 0)).all()):
            raise ValueError(f"a range must be finite and not negative, got {amax.flatten()[:4].tolist()}")
        if not self.spec.symmetric:
            raise ValueError("an affine grid has two ends; use set_range")
        self.set_range(-amax, amax)

    def set_range(self, amin: Tensor, amax: Tensor) -> None:
        """Set the range to [amin, amax] and switch the quantizer on. A symmetric grid takes ``amax`` alone.

        Raises:
            ValueError: the range is infinite, NaN or empty.
        """
        if not bool((torch.isfinite(amin) & torch.isfinite(amax) & (amin <= amax)).all()):
            raise ValueError(
                f"a range must be finite, its lower end first, got {amin.flatten()[:4].tolist()} … "
                f"{amax.flatten()[:4].tolist()}"
            )
        with torch.no_grad():
            self._amax.copy_(amax)
            if self._amin is not None:
                self._amin.copy_(amin)
        self.enabled = True

    def simulate(self, *, quantized: bool, unsigned: bool) -> None:
        """Do what one engine does: compute with integers (``quantized``) and, where no value is negative, with those of
        0 … 2**bits - 1 (``unsigned``), whose steps are half as wide over the same range."""
        given = self._given_spec
        self.simulated = quantized
        unsigned = unsigned and self.never_negative and given.symmetric and given.bits <= 8
        self.spec = replace(given, signed=False, narrow=False) if unsigned else given

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.observe(x)
        if not (self.enabled and self.simulated):
            return x
        return fake_quantize(x, self._amax, self.spec, self._amin, batched=not self.weights)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.enabled = self.calibrated

    def extra_repr(self) -> str:
        if not self.calibrated:
            ends = "no range yet"
        else:
            ends = f"amax={_extent(self.amax)}"
            if self.amin is not None:
                ends = f"amin={_extent(self.amin)}, {ends}"
        return f"{self.spec}, {ends}" + ("" if self.enabled and self.simulated else ", off")


def _extent(values: Tensor) -> str:
    if values.numel() == 1:
        return f"{values.item():.4g}"
    return f"{values.min().item():.4g}…{values.max().item():.4g}"
