"""Which values of a tensor matter to what follows it: ranges for the outputs of integer convolutions.

ONNX Runtime's integer convolution writes 8-bit integers, so it needs a range for its output, where NVIDIA's placement has
none: there the activation comes first, then the quantizer. What follows tells a range. A quantizer saturates, and a
sigmoid, SiLU, hard-swish or addition in between can be inverted: outside of the interval found here, every value leads to
the same integer at the next quantizer as the interval's nearer end. Quantizing over that interval clips nothing that could
be told apart, for any weights and any data. It is what serves weights that were calibrated elsewhere, without ranges for
these outputs; ours bring them (see TensorQuantizer).
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
    """What matters of a value: a closed interval, and the finest step that a quantizer behind it tells apart."""

    low: float
    high: float
    step: float


def quantize_layer_outputs(traced: TracedGraph) -> None:
    """Quantize the result of each integer convolution that something else than one quantize node takes, over the range that
    matters; it stays a float convolution where everything does."""
    for node in traced.operations():
        if Kind.CONVOLVES not in kind_of(node) or not traced.is_quantized(node.args[0]):
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
    """What matters of ``value``; None if everything does, or nothing is known."""
    found: Needed | None = None
    for node in value.users:
        needed = _through(traced, node, value)
        if needed is None:
            return None
        found = needed if found is None else _hull(found, needed)
    return found


def _through(traced: TracedGraph, node: fx.Node, value: fx.Node) -> Needed | None:
    if node.target is QUANTIZE:
        return _reach(traced.grid(node))
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
    """The grid, and half a step around it, from where rounding still reaches it."""
    step = float(grid.scale)
    return Needed((grid.low - grid.zero_point - 0.5) * step, (grid.high - grid.zero_point + 0.5) * step, step)


def _hull(a: Needed, b: Needed) -> Needed:
    return Needed(min(a.low, b.low), max(a.high, b.high), min(a.step, b.step))


def _through_sigmoid(needed: Needed | None) -> Needed | None:
    """What matters of x when ``needed`` of sigmoid(x) does.

    Where the grid goes beyond 0 and 1, the sigmoid itself bounds x: within half a step of its limits it is as good as
    there.
    """
    if needed is None:
        return None
    half_step = min(_almost_half(needed.step), 0.25)

    def logit(y: float) -> float:
        y = min(max(y, half_step), 1 - half_step)
        return math.log(y / (1 - y))

    return Needed(logit(needed.low), logit(needed.high), needed.step)


def _through_hard_sigmoid(needed: Needed | None) -> Needed | None:
    """What matters of x when ``needed`` of clamp(x / 6 + 1 / 2, 0, 1) does."""
    if needed is None:
        return None
    low, high = (6 * min(max(end, 0.0), 1.0) - 3 for end in (needed.low, needed.high))
    return Needed(low, high, needed.step)


def _through_swish(needed: Needed | None, swish: Callable[[float], float], minimum_at: float) -> Needed | None:
    """What matters of x when ``needed`` of swish(x) does.

    To the left of its minimum it climbs back to zero: there all values whose swish is above minus half a step round to the
    same integer, zero.
    """
    if needed is None:
        return None
    high = _bisect(swish, needed.high, 0.0, max(needed.high, 0.0) + 3.0)
    half_step = _almost_half(needed.step)
    if swish(minimum_at) >= -half_step:
        return Needed(0.0, high, needed.step)
    return Needed(_bisect(lambda x: -swish(x), half_step, -100.0, minimum_at), high, needed.step)


def _almost_half(step: float) -> float:
    """Half a step, to the near side of the tie."""
    return step / 2 * (1 - 1e-6)


def _silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def _hard_swish(x: float) -> float:
    return x * min(max(x / 6 + 0.5, 0.0), 1.0)


def _bisect(function: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Where a function that rises from ``low`` to ``high`` reaches ``level``."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < level else (low, middle)
    return high
