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

import numpy as np
import onnx

# SiLU and hard-swish fall from 0 to their minimum at this abscissa and rise from there on.
SILU_MINIMUM_AT = -1.2784645427610738
HARD_SWISH_MINIMUM_AT = -1.5


class Needed(NamedTuple):
    """What matters of a value: a closed interval, and the finest step that a quantizer behind it tells apart."""

    low: float
    high: float
    step: float


class NeededRanges:
    """Answers what matters of a value, for the nodes of one graph.

    Args:
        nodes: the graph, in any order.
        constants: scales and zero points by name.
    """

    def __init__(self, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> None:
        self._constants = constants
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        self._producers: dict[str, onnx.NodeProto] = {}
        for node in nodes:
            for name in node.output:
                self._producers[name] = node
            for name in dict.fromkeys(node.input):
                self._consumers.setdefault(name, []).append(node)

    def of(self, value: str) -> Needed | None:
        """What matters of ``value``; None if everything does, or nothing is known."""
        consumers = self._consumers.get(value, [])
        sigmoid, product = self._silu(value, consumers)
        found: Needed | None = None
        for node in consumers:
            if node is sigmoid:
                continue  # half of a SiLU; its product counts for both
            if node is product:
                needed = _through_swish(self.of(node.output[0]), _silu, SILU_MINIMUM_AT)
            else:
                needed = self._through(node, value)
            if needed is None:
                return None
            found = needed if found is None else _hull(found, needed)
        return found

    def _through(self, node: onnx.NodeProto, value: str) -> Needed | None:
        if node.op_type == "QuantizeLinear":
            return self._grid(node)
        if node.op_type == "Sigmoid":
            return _through_sigmoid(self.of(node.output[0]))
        if node.op_type == "HardSwish":
            return _through_swish(self.of(node.output[0]), _hard_swish, HARD_SWISH_MINIMUM_AT)
        if node.op_type == "HardSigmoid":
            return _through_hard_sigmoid(self.of(node.output[0]))
        if node.op_type in ("Flatten", "Unsqueeze"):
            return self.of(node.output[0])
        if node.op_type == "Add":
            total = self.of(node.output[0])
            other = self._producers.get(next((name for name in node.input if name != value), value))
            if total is None or other is None or other.op_type != "DequantizeLinear":
                return None
            grid = self._grid(other)
            return Needed(total.low - grid.high, total.high - grid.low, total.step)
        return None

    def _grid(self, node: onnx.NodeProto) -> Needed:
        """The grid of a Quantize- or DequantizeLinear, and half a step around it, from where rounding still reaches it."""
        step, zero_point = float(self._constants[node.input[1]]), int(self._constants[node.input[2]])
        bounds = np.iinfo(self._constants[node.input[2]].dtype)
        return Needed((bounds.min - zero_point - 0.5) * step, (bounds.max - zero_point + 0.5) * step, step)

    def _silu(
        self, value: str, consumers: list[onnx.NodeProto]
    ) -> tuple[onnx.NodeProto, onnx.NodeProto] | tuple[None, None]:
        """The Sigmoid and the Mul of value * sigmoid(value), where the sigmoid serves nothing else."""
        for sigmoid in (node for node in consumers if node.op_type == "Sigmoid"):
            gates = self._consumers.get(sigmoid.output[0], [])
            if len(gates) == 1 and gates[0].op_type == "Mul" and value in gates[0].input:
                return sigmoid, gates[0]
        return None, None


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
