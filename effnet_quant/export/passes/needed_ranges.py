"""Computes ranges for the outputs of integer convolutions from the quantizers that follow.

ONNX Runtime's integer convolution writes 8-bit integers, so its output needs a range. NVIDIA's placement has none
there: the quantizer comes after the activation. Weights that were calibrated elsewhere therefore lack this range.
Weights calibrated here have it (see TensorQuantizer). A convolution that a 16-bit quantizer follows stays in float.

The next quantizer saturates at both ends of its range. A sigmoid, SiLU, hard-swish or addition between can be inverted.
This gives an interval for the convolution's output. Each value outside leads to the same integer as the nearer end of
the interval. So clipping to the interval loses nothing, for any weights and any data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx

from effnet_quant.export.custom_ops import QUANTIZE
from effnet_quant.export.traced_graph import Grid, TracedGraph, kind_of, module_path
from effnet_quant.quantization.grid import scale_and_zero_point
from effnet_quant.quantization.operation_kinds import Kind
from effnet_quant.quantization.quantizer import AFFINE_UINT8

aten = torch.ops.aten
# SiLU and hard-swish fall from 0 to their minimum at this abscissa and rise from there on.
SILU_MINIMUM_AT = -1.2784645427610738
HARD_SWISH_MINIMUM_AT = -1.5


class Needed(NamedTuple):
    """The range of a value that later quantizers need: a closed interval, and the smallest scale of these quantizers."""

    low: float
    high: float
    step: float


def quantize_layer_outputs(traced: TracedGraph) -> None:
    """Quantize the output of each integer convolution over the needed range, unless a quantize node is its only user.

    Without a needed range (all values matter) the convolution stays in float.
    """
    for node in traced.operations():
        if Kind.CONVOLVES not in kind_of(node) or not traced.is_byte(node.args[0]):
            continue
        if traced.quantized_weights(node) is None or [user.target for user in node.users] == [QUANTIZE]:
            continue
        needed = needed_of(traced, node)
        if needed is None:
            continue
        low, high = torch.tensor(needed.low), torch.tensor(needed.high)
        scale, zero_point = scale_and_zero_point(high, AFFINE_UINT8, low)
        assert zero_point is not None
        grid = Grid(scale, int(zero_point), *AFFINE_UINT8.bounds)
        rounded = traced.quantize(node, grid, f"{module_path(node)}.output")
        for user in list(node.users):
            if user is not rounded:
                user.replace_input_with(node, rounded)


def needed_of(traced: TracedGraph, value: fx.Node) -> Needed | None:
    """The range of ``value`` that its users need; None if they need all values, or it is unknown."""
    found: Needed | None = None
    for node in value.users:
        needed = _through(traced, node, value)
        if needed is None:
            return None
        found = needed if found is None else _hull(found, needed)
    return found


def _through(traced: TracedGraph, node: fx.Node, value: fx.Node) -> Needed | None:
    if node.target is QUANTIZE:
        grid = traced.grid(node)
        return None if grid.wide else _reach(grid)  # 8 bits in front of 16 would cost the other 8
    if node.target is aten.silu.default:
        return _through_swish(needed_of(traced, node), _silu, SILU_MINIMUM_AT)
    if node.target is aten.sigmoid.default:
        return _through_sigmoid(needed_of(traced, node))
    if node.target is aten.hardswish.default:
        return _through_swish(needed_of(traced, node), _hard_swish, HARD_SWISH_MINIMUM_AT)
    if node.target is aten.hardsigmoid.default:
        return _through_hard_sigmoid(needed_of(traced, node))
    if Kind.RESHAPES in kind_of(node):
        return needed_of(traced, node)
    if node.target is aten.add.Tensor and not node.kwargs:
        total = needed_of(traced, node)
        other = node.args[1] if node.args[0] is value else node.args[0]
        if total is None or not traced.is_quantized(other):
            return None
        reach = _reach(traced.grid(other))  # type: ignore[arg-type]
        return Needed(total.low - reach.high, total.high - reach.low, total.step)
    return None


def _reach(grid: Grid) -> Needed:
    """The range of a grid, with half a step at both ends: rounding maps values there onto the grid."""
    step = float(grid.scale)
    return Needed((grid.low - grid.zero_point - 0.5) * step, (grid.high - grid.zero_point + 0.5) * step, step)


def _hull(a: Needed, b: Needed) -> Needed:
    return Needed(min(a.low, b.low), max(a.high, b.high), min(a.step, b.step))


def _through_sigmoid(needed: Needed | None) -> Needed | None:
    """The needed range of x if ``needed`` is that of sigmoid(x).

    A sigmoid never reaches 0 and 1. Where the grid reaches them, half a step from the limit is near enough.
    """
    if needed is None:
        return None
    half_step = min(_almost_half(needed.step), 0.25)

    def logit(y: float) -> float:
        y = min(max(y, half_step), 1 - half_step)
        return math.log(y / (1 - y))

    return Needed(logit(needed.low), logit(needed.high), needed.step)


def _through_hard_sigmoid(needed: Needed | None) -> Needed | None:
    """The needed range of x if ``needed`` is that of clamp(x / 6 + 1 / 2, 0, 1)."""
    if needed is None:
        return None
    low, high = (6 * min(max(end, 0.0), 1.0) - 3 for end in (needed.low, needed.high))
    return Needed(low, high, needed.step)


def _through_swish(needed: Needed | None, swish: Callable[[float], float], minimum_at: float) -> Needed | None:
    """The needed range of x if ``needed`` is that of swish(x), where ``minimum_at`` is the x of its minimum.

    To the left of its minimum swish rises back to zero. Values there with swish(x) above minus half a step round to zero.
    """
    if needed is None:
        return None
    high = _bisect(swish, needed.high, 0.0, max(needed.high, 0.0) + 3.0)
    half_step = _almost_half(needed.step)
    if swish(minimum_at) >= -half_step:
        return Needed(0.0, high, needed.step)
    return Needed(_bisect(lambda x: -swish(x), half_step, -100.0, minimum_at), high, needed.step)


def _almost_half(step: float) -> float:
    """Slightly less than half a step, to stay clear of the tie."""
    return step / 2 * (1 - 1e-6)


def _silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def _hard_swish(x: float) -> float:
    return x * min(max(x / 6 + 0.5, 0.0), 1.0)


def _bisect(function: Callable[[float], float], level: float, low: float, high: float) -> float:
    """The x between ``low`` and ``high`` at which a rising function reaches ``level``."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < level else (low, middle)
    return high
