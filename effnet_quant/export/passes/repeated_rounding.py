"""Merges quantize nodes with the same input and the same grid."""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from effnet_quant.export.custom_ops import QUANTIZE
from effnet_quant.export.traced_graph import TracedGraph


def merge_equal_quantizers(traced: TracedGraph) -> None:
    """Keep only the first of several equal quantize nodes of one value."""
    kept: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in traced.operations():
        if node.target is not QUANTIZE or node.args[0] in traced.constants:
            continue
        earlier = kept[node.args[0]]  # type: ignore[index]
        twin = next((other for other in earlier if traced.grid(other).same_as(traced.grid(node))), None)
        if twin is None:
            earlier.append(node)
        else:
            node.replace_all_uses_with(twin)
            traced.graph.erase_node(node)
