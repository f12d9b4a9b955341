"""Rounds quantized weights to multiples of their scale, which a file stores as integers."""

from __future__ import annotations

import torch

from effnet_quant.export.traced_graph import TracedGraph


def round_weights(traced: TracedGraph) -> None:
    """Round the weights of every quantized layer."""
    for node in traced.operations():
        found = traced.quantized_weights(node)
        if found is None:
            continue
        weight, grid = found
        integers = torch.clamp(torch.round(weight / grid.scale), grid.low, grid.high)
        traced.set_weights(node, integers * grid.scale, grid)
