"""Rounding moves in front of operations that commute with it, for runtimes that want integers right behind a convolution.

Relu and the like keep the order of values, and rounding does too: to round first and clip the integers gives the very same
integers, and the convolution writes them itself. Max pooling and changes of shape only move values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from effnet_quant.export.custom_ops import QUANTIZE
from effnet_quant.export.traced_graph import Grid, TracedGraph, argument, kind_of, module_path
from effnet_quant.quantization.operation_kinds import Kind

aten = torch.ops.aten
_BOUNDS: dict[Any, tuple[Any, Any]] = {
    aten.relu.default: (0.0, math.inf),
    aten.relu6.default: (0.0, 6.0),
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.clamp.default: ("min", "max"),
    aten.clamp_min.default: ("min", math.inf),
    aten.clamp_max.default: (-math.inf, "max"),
}


def round_before_activations(traced: TracedGraph, dtype: str) -> None:
    """Quantize in front of what clips (the grid then ends where it clips), and in front of what moves values, too.

    Behind an operation that moves values a quantize node stays: runtimes take integers only between two.
    """
    limits = torch.iinfo(getattr(torch, dtype))
    pending = [node for node in traced.operations() if traced.is_quantized(node)]
    while pending:
        node = pending.pop()
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if len(source.users) != 1:
            continue
        if Kind.CLIPS in kind_of(source):
            _clip_integers(traced, source, node)
            pending.append(node)
        elif Kind.RESHAPES in kind_of(source) or source.target is aten.max_pool2d.default:
            own = traced.grid(node)
            added = _quantize_input(traced, source, Grid(own.scale, own.zero_point, limits.min, limits.max))
            pending += [added] if added else []


def _clip_integers(traced: TracedGraph, clip: fx.Node, quantize: fx.Node) -> None:
    """Let the grid of ``quantize`` end where ``clip`` does, and remove ``clip``."""
    grid = traced.grid(quantize)
    low, high = (
        int(min(max(_integer(bound, grid), grid.low), grid.high)) for bound in (_bound(clip, 0), _bound(clip, 1))
    )
    quantize.args = (clip.args[0], *quantize.args[1:])
    traced.set_grid(quantize, Grid(grid.scale, grid.zero_point, low, high))
    traced.graph.erase_node(clip)


def _bound(clip: fx.Node, end: int) -> float:
    """Where ``clip`` ends: 0 for below, 1 for above; infinite if it does not."""
    bound = _BOUNDS[clip.target][end]
    value = argument(clip, bound) if isinstance(bound, str) else bound
    return (-math.inf, math.inf)[end] if value is None else float(value)


def _integer(bound: float, grid: Grid) -> float:
    """The integer that a number becomes, without saturation."""
    return bound if math.isinf(bound) else int(torch.round(torch.tensor(bound) / grid.scale)) + grid.zero_point


def _quantize_input(traced: TracedGraph, node: fx.Node, grid: Grid) -> fx.Node | None:
    """Quantize what ``node`` takes; returns the new node, None if there was one."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    for user in source.users:
        if user.target is QUANTIZE and traced.grid(user).same_as(grid):
            node.replace_input_with(source, user)
            return None
    quantized = traced.quantize(source, grid, f"{module_path(node)}.input")
    node.replace_input_with(source, quantized)
    return quantized
