"""Scale and zero point of a range; quantize and dequantize. Every engine must reproduce this arithmetic.

The rules are those of ONNX QuantizeLinear and DequantizeLinear: divide by the scale, round half to even, add the zero
point, saturate. All functions compute in float32 with plain elementwise operations, which torch.compile can fuse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_quant.quantization.spec import TensorSpec

# ONNX asks for a positive scale. A zero range (an all-zero channel) or a denormal one would make the division inf or NaN.
# With this floor, scale = amax / 32767 is a normal float32, and any value that small rounds to itself or 0.
SMALLEST_AMAX = 2.0**-110


def scale_and_zero_point(amax: Tensor, spec: TensorSpec, amin: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scale (the step of the grid) and zero point (the integer of 0.0) of a range.

    Simulation and export both call this function, so they agree to the last bit.

    Args:
        amax: upper end of the range; on a symmetric grid the largest magnitude.
        spec: the grid. A symmetric grid maps ``amax`` to its largest integer. An affine grid widens [amin, amax] to hold
            zero and spreads the range over all its integers.
        amin: lower end of the range, for affine grids.

    Returns:
        The scale and the zero point, both float32 in the shape of ``amax``. The zero point of a symmetric grid is None.
    """
    low, high = spec.bounds
    amax = amax.float()
    if spec.symmetric:
        # Fixed ranges are never negative, so adding the floor is enough. From 2**-85 on the sum equals amax. Compiled loops
        # compute the scale again for every few values; an addition spares them the branch of a clamp.
        floored = amax.clamp(min=SMALLEST_AMAX) if spec.learned else amax + SMALLEST_AMAX
        return floored / high, None
    assert amin is not None
    steps = high - low
    start, end = amin.float().clamp(max=0), amax.clamp(min=0)
    # Dividing first avoids overflow: the width of the largest ranges does not fit float32.
    scale = (end / steps - start / steps).clamp(min=SMALLEST_AMAX / steps)
    return scale, torch.clamp(low - torch.round(start / scale), low, high)


def quantize(x: Tensor, scale: Tensor, spec: TensorSpec, zero_point: Tensor | None = None) -> Tensor:
    """round(x / scale) + zero point, clamped to the grid: integers as float32. Halves round to even; NaN stays NaN."""
    low, high = spec.bounds
    integers = torch.round(x.float() / scale)
    return torch.clamp(integers if zero_point is None else integers + zero_point, low, high)


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """(integers - zero point) * scale, float32."""
    integers = integers.float()
    return (integers if zero_point is None else integers - zero_point) * scale
