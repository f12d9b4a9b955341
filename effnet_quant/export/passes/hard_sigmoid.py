"""Hard sigmoid as an addition of integers that saturates, for runtimes that have no hard sigmoid of integers."""

from __future__ import annotations

import torch

from effnet_quant.export.custom_ops import QUANTIZED_HARD_SIGMOID
from effnet_quant.export.passes.gate_rounding import GATE
from effnet_quant.export.traced_graph import TracedGraph

aten = torch.ops.aten


def saturate_hard_sigmoids(traced: TracedGraph) -> None:
    """Make one node of a hard sigmoid between quantized values and the rounding behind it, where the grid starts at zero and
    ends at one or before."""
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
