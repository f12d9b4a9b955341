"""Writes hard sigmoids as saturating additions of integers, for runtimes without an integer hard sigmoid."""

from __future__ import annotations

import torch

from effnet_quant.export.custom_ops import QUANTIZED_HARD_SIGMOID
from effnet_quant.export.passes.gate_rounding import GATE
from effnet_quant.export.traced_graph import TracedGraph

aten = torch.ops.aten


def saturate_hard_sigmoids(traced: TracedGraph) -> None:
    """Join a hard sigmoid of a quantized value and the quantize node behind it into one QUANTIZED_HARD_SIGMOID node.

    The output grid must be 0 … 255 with zero point 0 and a scale of at most 1/255. x + 3 then saturates at 0 and at 6 just
    as the hard sigmoid does.
    """
    for node in traced.operations():
        source = node.args[0] if traced.is_quantized(node) else None
        if not isinstance(source, torch.fx.Node) or source.target is not aten.hardsigmoid.default:
            continue
        grid = traced.grid(node)
        fits = (grid.zero_point, grid.low, grid.high) == (0, 0, 255) and bool(grid.scale <= GATE.scale)
        if not fits or len(source.users) != 1 or not traced.is_quantized(source.args[0]):
            continue
        node.target, node.args = QUANTIZED_HARD_SIGMOID, (source.args[0], node.args[1])
        traced.graph.erase_node(source)
