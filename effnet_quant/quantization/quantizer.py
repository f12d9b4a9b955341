"""TensorQuantizer: the one module that holds a range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from effnet_quant.quantization.extremes import extremes
from effnet_quant.quantization.fake_quant import fake_quantize
from effnet_quant.quantization.grid import scale_and_zero_point
from effnet_quant.quantization.spec import TensorSpec
from effnet_quant.quantization.targets import FollowsTarget, Target

Role = Literal["input", "weight", "output", "gate"]
AFFINE_UINT8 = TensorSpec(symmetric=False, signed=False)  # the grid of outputs and gates


class Observer(Protocol):
    """Sees the float tensors that pass a quantizer."""

    def observe(self, x: Tensor) -> None:
        """See one batch."""


class TensorQuantizer(FollowsTarget, nn.Module):
    """Fake quantization with one range. The role says which tensor it quantizes.

    - "input": an operand of an operation. The state-dict entry is ``_amax``, as in NVIDIA's pytorch-quantization.
      Affine grids have a second entry, ``_amin``, the lower end. A fixed range is a buffer, a learned one a parameter.
    - "weight": the weights of a layer, with the same entries.
    - "output": the output of a layer before the activation, which ONNX Runtime's integer layers write in 8 bits. The range
      that calibration sets holds all values it saw; later steps may narrow it. State dicts have the range as ``_low`` and
      ``_high`` once it is known, so a new network has NVIDIA's names only.
    - "gate": the factor that SiLU and hard-swish multiply their input by. The range is 0 to 1 and in no state dict.

    Outputs and gates are rounded in eval mode only, so they cost training nothing.

    A quantizer without a range passes its input through, so a network without ranges computes what the float network does.
    Calibrating it or loading a range switches it on. ``enabled`` and ``observer`` change between forward passes only, so
    they are constants for torch.compile.

    Args:
        spec: the grid.
        amax_shape: () for one range, or e.g. (C, 1, 1, 1) for one per output channel.
        operation: the operation that reads the quantized value or, for an output, writes it; one of the targets' OPERATIONS.
        role: see above.

    Attributes:
        spec: the grid in use: the given one, or an unsigned one over the same range (``follow``).
        simulated: whether the simulated engine rounds here; if not, values pass through.
        halves_up: whether it rounds halves up here; else to the even integer.
        never_negative: whether the network's structure keeps negative values away, as a ReLU does.
    """

    _amax: Tensor
    _amin: Tensor | None
    _low: Tensor
    _high: Tensor

    def __init__(
        self,
        spec: TensorSpec,
        amax_shape: tuple[int, ...] = (),
        operation: str = "conv",
        *,
        role: Role = "input",
    ) -> None:
        super().__init__()
        self.spec = self._given_spec = spec
        self.operation = operation
        self.role = role
        self.simulated = True
        self.halves_up = False
        self.never_negative = False
        self.enabled = role == "gate"
        self.observer: Observer | None = None
        self._only_in_eval = role in ("output", "gate")
        self._lower_name, self._upper_name = ("_low", "_high") if role == "output" else ("_amin", "_amax")
        lower, upper = {"output": (torch.inf, -torch.inf), "gate": (0.0, 1.0)}.get(role, (torch.nan, torch.nan))
        self._register(self._upper_name, torch.full(amax_shape, upper))
        if spec.symmetric:
            setattr(self, self._lower_name, None)
        else:
            self._register(self._lower_name, torch.full(amax_shape, lower))

    def _register(self, name: str, value: Tensor) -> None:
        if self.spec.learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value, persistent=self.role != "gate")

    @property
    def upper(self) -> Tensor:
        """The buffer or parameter that holds the upper end of the range."""
        return getattr(self, self._upper_name)

    @property
    def lower(self) -> Tensor | None:
        """The buffer or parameter that holds the lower end of an affine grid's range; None on a symmetric grid."""
        return getattr(self, self._lower_name)

    @property
    def amax(self) -> Tensor:
        """Upper end of the range, float32 in the shape ``amax_shape``. On a symmetric grid it is the largest magnitude.
        Before calibration it is not finite."""
        return self.upper.detach()

    @property
    def amin(self) -> Tensor | None:
        """Lower end of the range of an affine grid, in the shape of ``amax``; None on a symmetric grid."""
        return None if self.lower is None else self.lower.detach()

    @property
    def scale(self) -> Tensor:
        """The step of the grid, float32 in the shape of ``amax``."""
        return scale_and_zero_point(self.amax, self.spec, self.amin)[0]

    @property
    def zero_point(self) -> Tensor:
        """The integer that stands for 0.0, as float32 in the shape of ``amax``; 0 on a symmetric grid."""
        zero_point = scale_and_zero_point(self.amax, self.spec, self.amin)[1]
        return torch.zeros_like(self.amax) if zero_point is None else zero_point

    @property
    def calibrated(self) -> bool:
        """Whether the range is finite in every channel. Reading this waits for the GPU."""
        return all(
            not end.is_meta and bool(torch.isfinite(end).all()) for end in (self.amax, self.amin) if end is not None
        )

    @property
    def range(self) -> tuple[float, float] | None:
        """Both ends of a per-tensor range; on a symmetric grid -amax and amax. None before calibration."""
        if not self.calibrated:
            return None
        high = self.amax.item()
        return (-high if self.amin is None else self.amin.item()), high

    @property
    def rounds(self) -> bool:
        """Whether values that pass are rounded now."""
        return self.enabled and self.simulated and not (self._only_in_eval and self.training)

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
            self.upper.copy_(amax)
            if self.lower is not None:
                self.lower.copy_(amin)
        self.enabled = True

    def start_tracking(self) -> None:
        """Forget an output's range and collect the extremes of all values that pass from now on."""
        assert self.lower is not None
        self.lower.fill_(torch.inf)
        self.upper.fill_(-torch.inf)
        self.observer, self.enabled = _Tracker(self.lower, self.upper), False

    def stop_tracking(self) -> None:
        """End ``start_tracking`` and round to the range found, if any value passed."""
        self.observer, self.enabled = None, self.calibrated

    def follow(self, target: Target) -> None:
        """Round here if the engine of ``target`` does, on the grid that it uses.

        Engines round the inputs of their integer operations and, if ``target.quantized_outputs``, the outputs. Values that
        are never negative get the unsigned grid 0 … 2**bits - 1 if the engine takes it; its steps are half as wide.
        """
        self.simulated = self.operation in target.quantized and (self.role != "output" or target.quantized_outputs)
        self.halves_up = target.halves_up and self.role != "weight"
        given = self._given_spec
        unsigned = target.unsigned and self.never_negative and given.symmetric and given.bits <= 8
        self.spec = replace(given, signed=False, narrow=False) if unsigned else given

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):  # a number that the model takes as an argument stays as it is
            if self.observer is not None:
                self.observer.observe(torch.zeros(()))
            return x
        if self.observer is not None:
            self.observer.observe(x)
        if not self.rounds:
            return x
        return fake_quantize(
            x, self.upper, self.spec, self.lower, batched=self.role != "weight", halves_up=self.halves_up
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.role != "output" or self.enabled:  # not self.calibrated, which waits for the GPU
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.role == "output" and prefix + self._lower_name not in state_dict:
            return
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


@contextmanager
def in_float(module: nn.Module) -> Iterator[None]:
    """Within the block no quantizer of the module rounds."""
    found = [each for each in module.modules() if isinstance(each, TensorQuantizer)]
    before = [quantizer.enabled for quantizer in found]
    try:
        for quantizer in found:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in zip(found, before, strict=True):
            quantizer.enabled = enabled


class _Tracker:
    """Widens a range to all values that pass; a NaN stays in it."""

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        self._lower, self._upper = lower, upper

    def observe(self, x: Tensor) -> None:
        low, high = extremes(x)
        self._lower.copy_(torch.minimum(self._lower, low))
        self._upper.copy_(torch.maximum(self._upper, high))


def _extent(values: Tensor) -> str:
    if values.numel() == 1:
        return f"{values.item():.4g}"
    return f"{values.min().item():.4g}…{values.max().item():.4g}"
