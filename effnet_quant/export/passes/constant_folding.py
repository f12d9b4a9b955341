"""What depends on no input is computed once."""

from __future__ import annotations

from torch import fx

from effnet_quant.export.custom_ops import QUANTIZE
from effnet_quant.export.traced_graph import TracedGraph, is_layer


def fold_constants(traced: TracedGraph) -> None:
    """Note the value of every operation on constants alone, except the quantized weights of layers, which files store as
    integers."""
    for node in traced.operations():
        if node.target is QUANTIZE and all(is_layer(user) and user.args[1] is node for user in node.users):
            continue
        if all(value in traced.constants for value in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda value: traced.constants[value])
            traced.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
