"""From a range to an integer grid, and between float tensors and the grid; the arithmetic every engine must reproduce.

The rules are those of ONNX QuantizeLinear / DequantizeLinear: divide by the scale, round half to even, add the zero point,
saturate. All functions compute in float32 with plain elementwise operations, so that torch.compile fuses them into their
neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_quant.quantization.spec import TensorSpec

# A range of zero (an all-zero channel) or a denormal one would give a scale that divides to inf or NaN; ONNX asks for
# a positive scale. This floor keeps scale = amax / 32767 a normal float32, and any value that small rounds to itself or 0.
SMALLEST_AMAX = 2.0**-110


def scale_and_zero_point(amax: Tensor, spec: TensorSpec, amin: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Step of the grid that a range gives, and the integer that stands for 0.0.

    Simulation and exported files both take them from here, so that they agree to the last bit.

    Args:
        amax: upper end of the range; on a symmetric grid the largest magnitude.
        spec: the grid. A symmetric one maps ``amax`` to its largest integer. An affine one spreads [amin, amax], widened to
            hold zero, over all its integers.
        amin: lower end of the range, for affine grids.

    Returns:
        The scale, float32 in the shape of ``amax``, and the zero point in the same form; None (0) on a symmetric grid.
    """
    low, high = spec.bounds
    amax = amax.float()
    if spec.symmetric:
        # Fixed ranges are not negative. To those of ordinary size (from 2**-85 on) the floor adds nothing, and compiled
        # loops, which compute the scale anew for every few values, do without the branch of a clamp.
        floored = amax.clamp(min=SMALLEST_AMAX) if spec.learned else amax + SMALLEST_AMAX
        return floored / high, None
    assert amin is not None
    steps = high - low
    start, end = amin.float().clamp(max=0), amax.clamp(min=0)
    # divided before they are added: the width of the largest ranges is beyond float32
    scale = (end / steps - start / steps).clamp(min=SMALLEST_AMAX / steps)
    return scale, torch.clamp(low - torch.round(start / scale), low, high)


def quantize(x: Tensor, scale: Tensor, spec: TensorSpec, zero_point: Tensor | None = None) -> Tensor:
    """Integers of the grid nearest to x / scale + zero point, as float32; halves round to even, the rest saturates, NaN
    stays NaN."""
    low, high = spec.bounds
    integers = torch.round(x.float() / scale)
    return torch.clamp(integers if zero_point is None else integers + zero_point, low, high)


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """The real numbers that the integers stand for; float32."""
    integers = integers.float()
    return (integers if zero_point is None else integers - zero_point) * scale
