"""Pure functions between float tensors and the integer grid; the arithmetic every engine must reproduce.

The rules are those of ONNX QuantizeLinear / DequantizeLinear: divide by the scale, round half to even, saturate. All
functions compute in float32 with plain elementwise operations, so that torch.compile fuses them into their neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_quant.quantization.spec import TensorSpec

# A range of zero (an all-zero channel) or a denormal one would give a scale that divides to inf or NaN; ONNX asks for
# a positive scale. This floor keeps scale = amax / 127 a normal float32, and any value that small rounds to itself or 0.
SMALLEST_AMAX = 2.0**-110


def scale_from_amax(amax: Tensor, spec: TensorSpec) -> Tensor:
    """Step of the grid that maps ``amax`` to its largest integer; float32, the shape of ``amax``."""
    return amax.float().clamp(min=SMALLEST_AMAX) / spec.bounds[1]


def quantize(x: Tensor, scale: Tensor, spec: TensorSpec) -> Tensor:
    """Integers of the grid nearest to x / scale, as float32; halves round to even, the rest saturates, NaN stays NaN."""
    low, high = spec.bounds
    return torch.clamp(torch.round(x.float() / scale), low, high)


def dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """The real numbers that the integers stand for; float32."""
    return integers.float() * scale


def fake_quantize(x: Tensor, amax: Tensor, spec: TensorSpec) -> Tensor:
    """Quantize and dequantize ``x``, with a straight-through gradient (Bengio et al. 2013).

    The gradient passes unchanged where rounding alone decides, and is zero where ``x`` saturates (more than half a step
    beyond the grid). ``amax`` gets none. The result lies on the grid to the last bit.

    Args:
        x: any shape, any floating dtype; the arithmetic is float32.
        amax: a positive range that broadcasts to ``x``.
        spec: the grid.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    low, high = spec.bounds
    result: Tensor = _StraightThrough.apply(x.float(), scale_from_amax(amax.detach(), spec), low, high)
    return result.to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """One tensor saved, four passes forward and one backward: eager QAT lives on memory bandwidth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        ratio = x / scale
        ctx.save_for_backward(ratio)
        ctx.bounds = (low, high)
        return torch.round(ratio).clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (ratio,) = ctx.saved_tensors
        low, high = ctx.bounds
        return torch.ops.aten.hardtanh_backward(gradient, ratio, low - 0.5, high + 0.5), None, None, None
