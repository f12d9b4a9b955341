"""Removes operations that no output needs."""

from __future__ import annotations

from effnet_quant.export.traced_graph import TracedGraph


def remove_dead_code(traced: TracedGraph) -> None:
    """Remove operations and parameters without users. The size checks of torch.export go too."""
    for node in reversed(list(traced.graph.nodes)):
        if node.op != "output" and not node.users and node not in traced.inputs:
            traced.graph.erase_node(node)
            traced.constants.pop(node, None)
