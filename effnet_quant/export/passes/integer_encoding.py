"""Moves quantized values to the target's integer types."""

from __future__ import annotations

import torch

from effnet_quant.errors import UserError
from effnet_quant.export.custom_ops import QUANTIZE
from effnet_quant.export.traced_graph import Grid, TracedGraph, module_path
from effnet_quant.quantization.targets import Target


def encode_activations(traced: TracedGraph, target: Target) -> None:
    """Shift the grid of every quantized activation into the target's type for it. The real numbers stay the same.

    Raises:
        UserError: a grid is wider than the target's types, needs a zero point that the target does not take, or weights do
            not fit int8.
    """
    for node in traced.operations():
        if node.target is not QUANTIZE:
            continue
        grid = traced.grid(node)
        low, high = grid.low - grid.zero_point, grid.high - grid.zero_point
        if node.args[0] in traced.constants:  # files have weights with zero point 0, which all runtimes take
            if low < -128 or high > 127:
                path = module_path(next(iter(node.users)))
                raise UserError(
                    f"{path}: weights on the grid {low} … {high} can't be exported; give weights a symmetric grid of "
                    "8 bits or fewer."
                )
            traced.set_grid(node, Grid(grid.scale, 0, low, high))
            continue
        zero_point = _zero_point(low, high, target, module_path(node))
        traced.set_grid(node, Grid(grid.scale, zero_point, low + zero_point, high + zero_point))


def _zero_point(low: int, high: int, target: Target, path: str) -> int:
    """The zero point with which the target stores the grid ``low`` … ``high``, whose zero point is 0."""
    dtype = target.wide_activation_dtype if high - low > 255 else target.activation_dtype
    if dtype is None:
        raise UserError(
            f"{path}: {target.name} takes no activations on the grid {low} … {high}; quantize them with 8 bits or fewer, or "
            "leave them in float."
        )
    limits = torch.iinfo(getattr(torch, dtype))
    half, signed = (limits.max - limits.min + 1) // 2, limits.min < 0
    narrow = low >= -half and high < half and (low < 0 or signed)
    zero_point = limits.min + half if narrow else limits.min - low
    if signed and zero_point != 0:
        raise UserError(
            f"{path}: this target takes no zero point, which activations on the grid {low} … {high} need; quantize "
            "with a symmetric preset."
        )
    return zero_point
