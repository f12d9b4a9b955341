"""Computes operations on constants once."""

from __future__ import annotations

from torch import fx

from effnet_quant.export.custom_ops import QUANTIZE
from effnet_quant.export.traced_graph import TracedGraph, is_layer


def fold_constants(traced: TracedGraph) -> None:
    """Compute every operation whose operands are all constants, and store its value in ``traced.constants``.

    Quantized weights of layers are left alone: files store them as integers.
    """
    for node in traced.operations():
        if node.target is QUANTIZE and all(is_layer(user) and user.args[1] is node for user in node.users):
            continue
        if all(value in traced.constants for value in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda value: traced.constants[value])
            traced.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
