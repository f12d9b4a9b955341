"""Pure functions between float tensors and the integer grid; the arithmetic every engine must reproduce.

The rules are those of ONNX QuantizeLinear / DequantizeLinear: divide by the scale, round half to even, saturate. All
functions compute in float32 with plain elementwise operations, so that torch.compile fuses them into their neighbours.
"""

from __future__ import annotations

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

    The gradient passes unchanged inside the range and is zero where ``x`` saturates. ``amax`` gets none. The result lies
    on the grid to the last bit: rounding is added in the integer domain, where the sum is exact.

    Args:
        x: any shape, any floating dtype; the arithmetic is float32.
        amax: a positive range that broadcasts to ``x``.
        spec: the grid.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    low, high = spec.bounds
    scale = scale_from_amax(amax.detach(), spec)
    ratio = torch.clamp(x.float() / scale, low, high)
    integers = ratio + (torch.round(ratio) - ratio).detach()
    return (integers * scale).to(x.dtype)
