"""Moves quantized values to the target's integer type."""

from __future__ import annotations

import torch

from effnet_quant.errors import UserError
from effnet_quant.export.custom_ops import QUANTIZE
from effnet_quant.export.traced_graph import Grid, TracedGraph, module_path


def encode_activations(traced: TracedGraph, dtype: str) -> None:
    """Shift the grid of every quantized activation into ``dtype``, "int8" or "uint8". The real numbers stay the same.

    Raises:
        UserError: a grid has more than 256 integers, needs a zero point that the target does not take, or weights do not
            fit int8.
    """
    for node in traced.operations():
        if node.target is not QUANTIZE:
            continue
        grid = traced.grid(node)
        if node.args[0] in traced.constants:
            if grid.low < -128 or grid.high > 127:
                path = module_path(next(iter(node.users)))
                raise UserError(f"{path}: weights on the grid {grid.low} … {grid.high} can't be exported; int8 can.")
            continue
        low, high = grid.low - grid.zero_point, grid.high - grid.zero_point
        zero_point = _zero_point(low, high, dtype, module_path(node))
        traced.set_grid(node, Grid(grid.scale, zero_point, low + zero_point, high + zero_point))


def _zero_point(low: int, high: int, dtype: str, path: str) -> int:
    """The zero point with which ``dtype`` stores the grid ``low`` … ``high``, whose zero point is 0."""
    smallest = torch.iinfo(getattr(torch, dtype)).min
    if high - low > 255:
        raise UserError(f"{path}: activations on the grid {low} … {high} can't be exported; 8 bits or fewer can.")
    narrow = low >= -128 and high <= 127 and (low < 0 or dtype == "int8")
    zero_point = smallest + 128 if narrow else smallest - low
    if dtype == "int8" and zero_point != 0:
        raise UserError(
            f"{path}: this target takes no zero point, which activations on the grid {low} … {high} need; quantize "
            "with a symmetric preset."
        )
    return zero_point
