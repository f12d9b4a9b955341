"""Moves quantize nodes in front of operations that commute with rounding, so that convolutions write integers.

Clipping (ReLU, ReLU6, clamp) and rounding are monotonic. Rounding first and clipping the integers gives the same
integers. Max pooling and reshaping only move values.
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
    """Move quantize nodes in front of operations that clip, and add one in front of operations that move values.

    An operation that clips disappears: the grid gets its bounds. Behind an operation that moves values the quantize node
    stays, because runtimes compute on integers only between two quantize nodes. Quantize nodes of more than 8 bits stay
    where they are: such operations have integer kernels for 8 bits only.
    """
    limits = torch.iinfo(getattr(torch, dtype))
    pending = [node for node in traced.operations() if traced.is_byte(node)]
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
    """Give the grid of ``quantize`` the bounds of ``clip``, and remove ``clip``."""
    grid = traced.grid(quantize)
    low, high = (
        int(min(max(_integer(bound, grid), grid.low), grid.high)) for bound in (_bound(clip, 0), _bound(clip, 1))
    )
    quantize.args = (clip.args[0], *quantize.args[1:])
    traced.set_grid(quantize, Grid(grid.scale, grid.zero_point, low, high))
    traced.graph.erase_node(clip)


def _bound(clip: fx.Node, end: int) -> float:
    """The lower (``end`` 0) or upper (``end`` 1) bound of ``clip``; infinite if it has none."""
    bound = _BOUNDS[clip.target][end]
    value = argument(clip, bound) if isinstance(bound, str) else bound
    return (-math.inf, math.inf)[end] if value is None else float(value)


def _integer(bound: float, grid: Grid) -> float:
    """The integer to which ``bound`` is quantized, without saturation; infinite bounds stay infinite."""
    return bound if math.isinf(bound) else int(torch.round(torch.tensor(bound) / grid.scale)) + grid.zero_point


def _quantize_input(traced: TracedGraph, node: fx.Node, grid: Grid) -> fx.Node | None:
    """Quantize the input of ``node``. Returns the new quantize node, or None if an equal one could be used."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    for user in source.users:
        if user.target is QUANTIZE and traced.grid(user).same_as(grid):
            node.replace_input_with(source, user)
            return None
    quantized = traced.quantize(source, grid, f"{module_path(node)}.input")
    node.replace_input_with(source, quantized)
    return quantized
