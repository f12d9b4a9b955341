"""Replaces clipping of integers by clipping of floats, for integers that a runtime can't clip."""

from __future__ import annotations

import torch

from effnet_quant.export.custom_ops import QUANTIZE
from effnet_quant.export.traced_graph import Grid, TracedGraph, module_path

aten = torch.ops.aten


def clip_before_rounding(traced: TracedGraph, dtype: str, *, always: bool = False) -> None:
    """Where a grid has fewer integers than its type, clip the floats in front of the quantize node and widen the grid.

    Args:
        traced: the graph.
        dtype: the type of the grids to change. Other grids are left alone.
        always: clip in front of every grid of this type.
    """
    limits = torch.iinfo(getattr(torch, dtype))
    wide = limits.bits > 8
    for node in traced.operations():
        if node.target is not QUANTIZE or node.args[0] in traced.constants:
            continue
        grid = traced.grid(node)
        if grid.wide != wide or (grid.high - grid.low >= limits.max - limits.min and not always):
            continue
        scale = float(grid.scale)
        ends = [(end - grid.zero_point) * scale for end in (grid.low, grid.high)]
        source = node.args[0]
        clipped = traced.insert_after(source, aten.clamp.default, (source, *ends), node, module_path(node))  # type: ignore[arg-type]
        node.replace_input_with(source, clipped)  # type: ignore[arg-type]
        traced.set_grid(node, Grid(grid.scale, grid.zero_point, limits.min, limits.max))
