"""Adjusts weight scales that float16 can't hold precisely."""

from __future__ import annotations

import torch

from effnet_quant.export.passes.bias_rounding import coarser
from effnet_quant.export.traced_graph import TracedGraph

# Below this number a float16 has fewer than 11 significant bits.
SMALLEST_NORMAL_HALF = 2.0**-14


def fit_scales_to_half(traced: TracedGraph) -> None:
    """Round weight scales below the smallest normal float16 up to a float16, so that no weight saturates."""
    for node in traced.operations():
        found = traced.quantized_weights(node)
        if found is None:
            continue
        weight, grid = found
        scale = grid.scale.flatten().expand(len(weight))
        steps = torch.clamp(torch.ceil(scale.double() * 2.0**24), min=1) * 2.0**-24
        wider = torch.where(scale < SMALLEST_NORMAL_HALF, steps, scale.double()).float()
        if bool((wider > scale).any()):
            traced.set_weights(node, *coarser(weight, grid, wider))
