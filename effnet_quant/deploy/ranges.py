"""Which values of a tensor matter to what follows it: ranges for the outputs of integer convolutions without data.

ONNX Runtime's integer convolution writes 8-bit integers, so it needs a range for its output, where NVIDIA's placement
has none: there the activation comes first, then the quantizer. What follows tells the range all the same. A quantizer
saturates, and a sigmoid, SiLU or addition in between can be inverted: outside of the interval found here, every value
leads to the same integer at the next quantizer as the interval's nearer end. Quantizing over that interval clips nothing
that could be told apart, for any weights and any data.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import onnx

# SiLU falls from 0 to its minimum at this abscissa and rises from there on.
SILU_MINIMUM_AT = -1.2784645427610738


class Interval(NamedTuple):
    """A closed interval of real numbers."""

    low: float
    high: float


def affine_uint8(interval: Interval) -> tuple[float, int]:
    """Scale and zero point of the uint8 grid that covers the interval and zero."""
    low, high = min(interval.low, 0.0), max(interval.high, 0.0)
    scale = float(np.float32((high - low) / 255))
    return scale, min(255, max(0, round(-low / scale)))


class NeededRanges:
    """Answers which interval of a value matters, for the nodes of one graph.

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

    def of(self, value: str) -> Interval | None:
        """The interval of ``value`` outside of which nothing changes; None if all values matter."""
        consumers = self._consumers.get(value, [])
        if not consumers:
            return None
        found: Interval | None = None
        silu = self._silu_product(value, consumers)
        for node in consumers:
            if silu is not None and node.op_type in ("Sigmoid", "Mul"):
                needed = _through_silu(self.of(silu))
            else:
                needed = self._through(node, value)
            if needed is None:
                return None
            found = needed if found is None else Interval(min(found.low, needed.low), max(found.high, needed.high))
        return found

    def _through(self, node: onnx.NodeProto, value: str) -> Interval | None:
        if node.op_type == "QuantizeLinear":
            return self._grid(node)
        if node.op_type == "Sigmoid":
            return _through_sigmoid(self.of(node.output[0]))
        if node.op_type in ("Flatten", "Unsqueeze"):
            return self.of(node.output[0])
        if node.op_type == "Add":
            total = self.of(node.output[0])
            other = self._producers.get(next((name for name in node.input if name != value), value))
            if total is None or other is None or other.op_type != "DequantizeLinear":
                return None
            grid = self._grid(other)
            return Interval(total.low - grid.high, total.high - grid.low)
        return None

    def _grid(self, node: onnx.NodeProto) -> Interval:
        """Ends of the grid of a Quantize- or DequantizeLinear, half a step further out, where rounding still reaches."""
        scale, zero_point = float(self._constants[node.input[1]]), int(self._constants[node.input[2]])
        bounds = np.iinfo(self._constants[node.input[2]].dtype)
        return Interval((bounds.min - zero_point - 0.5) * scale, (bounds.max - zero_point + 0.5) * scale)

    @staticmethod
    def _silu_product(value: str, consumers: list[onnx.NodeProto]) -> str | None:
        """The output of value * sigmoid(value), if that is what these consumers compute."""
        sigmoids = {node.output[0] for node in consumers if node.op_type == "Sigmoid"}
        for node in consumers:
            if node.op_type == "Mul" and value in node.input and sigmoids & set(node.input):
                return node.output[0]
        return None


def _through_sigmoid(needed: Interval | None) -> Interval | None:
    """Interval of x that matters when ``needed`` of sigmoid(x) does; sigmoid is within half a uint8 step of its limits
    from +-6.25 on, which bounds it where the quantizer behind it does not."""
    if needed is None:
        return None
    low = -math.inf if needed.low <= 0 else math.log(needed.low / (1 - needed.low))
    high = math.inf if needed.high >= 1 else math.log(needed.high / (1 - needed.high))
    return Interval(max(low, -8.0), min(high, 8.0))


def _through_silu(needed: Interval | None) -> Interval | None:
    """Interval of x that matters when ``needed`` of SiLU(x) does.

    To the left of its minimum SiLU climbs back to zero: values whose SiLU is above minus half a step round to the same
    integer, zero.
    """
    if needed is None:
        return None
    high = _bisect(_silu, needed.high, 0.0, max(needed.high, 0.0) + 1.0)
    half_step = (needed.high - needed.low) / 512
    if _silu(SILU_MINIMUM_AT) >= -half_step:
        return Interval(0.0, high)
    return Interval(_bisect(lambda x: -_silu(x), half_step, -100.0, SILU_MINIMUM_AT), high)


def _silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def _bisect(function, level: float, low: float, high: float) -> float:  # type: ignore[no-untyped-def]
    """Where a function that rises from ``low`` to ``high`` reaches ``level``."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < level else (low, middle)
    return high
