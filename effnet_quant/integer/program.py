"""Program: an integer network as steps in order. Each step states its rule and checks its own numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet_quant.integer import arithmetic
from effnet_quant.integer.arithmetic import (
    LARGEST_MULTIPLIER,
    LARGEST_SHIFT,
    SMALLEST_MULTIPLIER,
    SUM_LIMIT,
    TABLE_LENGTH,
    reach,
)

WEIGHT_ZERO_POINT = 128  # weights are stored as uint8; the weight is the stored integer minus 128
IMAGE, LOGITS = "input", "logits"
PROOF = ("terms", "input", "weight", "bias", "bound")
Bounds = Mapping[str, int | None]  # of each value: None for uint8, else the largest magnitude of an int32


class RuleError(ValueError):
    """A step breaks a rule. The message completes a sentence after the step's name."""


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise RuleError(why)


def _is_byte(bounds: Bounds, name: str) -> None:
    _require(name in bounds, f"takes {name}, which no step before it gives")
    _require(bounds[name] is None, f"takes the sums {name} where 8-bit integers belong")


def _sum_bound(bounds: Bounds, name: str) -> int:
    _require(name in bounds, f"takes {name}, which no step before it gives")
    bound = bounds[name]
    if bound is None:
        raise RuleError(f"takes the 8-bit integers {name} where sums belong")
    return bound


def _check_multipliers(multipliers: NDArray[np.int64], shifts: NDArray[np.int64]) -> None:
    _require(multipliers.shape == shifts.shape, "has another number of shifts than multipliers")
    wrong = (multipliers < SMALLEST_MULTIPLIER) | (multipliers > LARGEST_MULTIPLIER)
    if wrong.any():
        raise RuleError(f"has the multiplier {multipliers[wrong].flat[0]}, which is not in 2**30 … 2**31 - 1")
    wrong = (shifts < 0) | (shifts > LARGEST_SHIFT)
    if wrong.any():
        raise RuleError(f"has the shift {shifts[wrong].flat[0]}, which is not in 0 … {LARGEST_SHIFT}")


def _check_zero_point(*zero_points: int) -> None:
    for zero_point in zero_points:
        _require(0 <= zero_point <= 255, f"has the zero point {zero_point}, which is no 8-bit integer")


def _below_limit(bound: int) -> int:
    _require(bound < SUM_LIMIT, f"has sums of up to {bound}, which do not fit 32 bits")
    return bound


@dataclass(frozen=True, eq=False)
class Table:
    """8-bit integers from a table: y = table[x], or table[256 * channel + x].

    Attributes:
        table: uint8 of shape (256,), or (256 * C,) for a table per channel.
        trailing: dimensions behind the channels.
    """

    input: str
    output: str
    table: NDArray[np.uint8]
    trailing: int

    @property
    def channels(self) -> int:
        """Number of tables."""
        return len(self.table) // TABLE_LENGTH

    def check(self, bounds: Bounds) -> int | None:
        """Raise RuleError if a rule is broken; else return the bound of the output."""
        _is_byte(bounds, self.input)
        fits = self.table.ndim == 1 and len(self.table) > 0 and len(self.table) % TABLE_LENGTH == 0
        _require(fits and self.table.dtype == np.uint8, f"has a table of {self.table.size} entries, not 256 a channel")
        return None


@dataclass(frozen=True, eq=False)
class Convolution:
    """int32 sums of (x - zero_point) * (w - 128), plus a bias. Padding is the zero point.

    Attributes:
        weight: uint8 (O, I / groups, kh, kw); WEIGHT_ZERO_POINT stands for 0.
        bias: int32 (O,).
        pads: rows above, columns at the left, rows below, columns at the right.
        proof: that the sums fit 32 bits; the entries of PROOF.
    """

    input: str
    output: str
    zero_point: int
    weight: NDArray[np.uint8]
    bias: NDArray[np.int32]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    groups: int
    proof: Mapping[str, int]

    def check(self, bounds: Bounds) -> int | None:
        """Raise RuleError if a rule is broken; else return the bound of the output."""
        _require(self.weight.ndim == 4, "has weights of another shape than (O, I, height, width)")
        _require(min((*self.strides, *self.dilations, self.groups)) >= 1 and min(self.pads) >= 0, "has no such window")
        _require(self.groups <= len(self.weight) and len(self.weight) % self.groups == 0, "has no such groups")
        return _check_layer(self, bounds)


@dataclass(frozen=True, eq=False)
class Linear:
    """int32 sums of (x - zero_point) * (w - 128) over the last dimension, plus a bias.

    Attributes:
        weight: uint8 (I, O); WEIGHT_ZERO_POINT stands for 0.
        bias: int32 (O,).
        proof: that the sums fit 32 bits; the entries of PROOF.
    """

    input: str
    output: str
    zero_point: int
    weight: NDArray[np.uint8]
    bias: NDArray[np.int32]
    proof: Mapping[str, int]

    def check(self, bounds: Bounds) -> int | None:
        """Raise RuleError if a rule is broken; else return the bound of the output."""
        _require(self.weight.ndim == 2, "has weights of another shape than (I, O)")
        return _check_layer(self, bounds)


def proof_of(weight: NDArray[np.uint8], bias: NDArray[np.int32], zero_point: int, axis: int) -> dict[str, int]:
    """The proof that a layer's sums fit 32 bits, if "bound" is below 2**31. ``axis``: the output channels of the weights."""
    terms = int(np.prod([size for dimension, size in enumerate(weight.shape) if dimension != axis]))
    largest = [
        reach(zero_point),
        int(np.abs(weight.astype(np.int64) - WEIGHT_ZERO_POINT).max(initial=0)),
        int(np.abs(bias.astype(np.int64)).max(initial=0)),
    ]
    return dict(zip(PROOF, (terms, *largest, arithmetic.sum_bound(terms, *largest)), strict=True))


def _check_layer(layer: Convolution | Linear, bounds: Bounds) -> int:
    _is_byte(bounds, layer.input)
    _check_zero_point(layer.zero_point)
    axis = 0 if isinstance(layer, Convolution) else 1
    _require(layer.weight.dtype == np.uint8 and layer.bias.dtype == np.int32, "has weights or biases of another type")
    _require(layer.bias.shape == (layer.weight.shape[axis],), "has another number of biases than output channels")
    missing = [name for name in PROOF if name not in layer.proof]
    _require(not missing, f"has no proof that its sums fit 32 bits ({', '.join(missing)} missing)")
    proof = proof_of(layer.weight, layer.bias, layer.zero_point, axis)
    _require(dict(layer.proof) == proof, "has a proof for other weights or biases than its own")
    return _below_limit(proof["bound"])


@dataclass(frozen=True, eq=False)
class Product:
    """int32 products (a - zero point of a) * (b - zero point of b); sizes of 1 are repeated."""

    inputs: tuple[str, str]
    output: str
    zero_points: tuple[int, int]

    def check(self, bounds: Bounds) -> int | None:
        """Raise RuleError if a rule is broken; else return the bound of the output."""
        _require(len(self.inputs) == len(self.zero_points) == 2, "is no product of two")
        _check_zero_point(*self.zero_points)
        for name in self.inputs:
            _is_byte(bounds, name)
        return math.prod(map(reach, self.zero_points))


@dataclass(frozen=True, eq=False)
class Sum:
    """int32 sums of operands in a common unit. Each operand is shifted left, multiplied and shifted right.

    8-bit operands lose their zero point first and are shifted left by LEFT_SHIFT. Sums as operands are not shifted left;
    their zero point is 0.
    """

    inputs: tuple[str, ...]
    output: str
    zero_points: tuple[int, ...]
    left_shifts: tuple[int, ...]
    multipliers: tuple[int, ...]
    shifts: tuple[int, ...]

    def check(self, bounds: Bounds) -> int | None:
        """Raise RuleError if a rule is broken; else return the bound of the output."""
        entries = (self.zero_points, self.left_shifts, self.multipliers, self.shifts)
        _require(len(self.inputs) > 0 and all(len(entry) == len(self.inputs) for entry in entries), "lacks an operand")
        _check_zero_point(*self.zero_points)
        _check_multipliers(np.array(self.multipliers, np.int64), np.array(self.shifts, np.int64))
        total = 0
        for name, zero_point, left, multiplier, shift in zip(self.inputs, *entries, strict=True):
            bound = bounds.get(name)
            if name in bounds and bound is None:
                _require(left == arithmetic.LEFT_SHIFT, f"shifts an 8-bit operand left by {left}")
                total += arithmetic.align(reach(zero_point), 0, left, multiplier, shift)
            else:
                _require(left == 0 and zero_point == 0, "shifts sums left")
                total += arithmetic.rescale(_sum_bound(bounds, name), multiplier, shift)
        return _below_limit(total)


@dataclass(frozen=True, eq=False)
class WindowSum:
    """int32 sums of x - zero_point over windows; what average pooling divides later. Padding adds 0.

    Attributes:
        kernel: height and width of the window; (0, 0) for the whole image.
    """

    input: str
    output: str
    zero_point: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    terms: int

    def check(self, bounds: Bounds) -> int | None:
        """Raise RuleError if a rule is broken; else return the bound of the output."""
        _is_byte(bounds, self.input)
        _check_zero_point(self.zero_point)
        window = math.prod(self.kernel)
        _require(min((*self.kernel, *self.pads)) >= 0 and min(self.strides) >= 1, "has no such window")
        _require(self.terms >= 1 and window in (0, self.terms), "counts other terms than its window has")
        return _below_limit(self.terms * reach(self.zero_point))


@dataclass(frozen=True, eq=False)
class Rescale:
    """Sums times multiplier / 2**shift, rounded, plus the zero point, saturated: 8-bit integers, or int32 in a new unit.

    Attributes:
        multipliers, shifts: int64; their shape broadcasts to the values'.
        low, high: ends of the result.
        to: "uint8" or "int32".
    """

    input: str
    output: str
    multipliers: NDArray[np.int64]
    shifts: NDArray[np.int64]
    zero_point: int
    low: int
    high: int
    to: str

    def check(self, bounds: Bounds) -> int | None:
        """Raise RuleError if a rule is broken; else return the bound of the output."""
        bound = _sum_bound(bounds, self.input)
        _check_multipliers(self.multipliers, self.shifts)
        _require(self.to in ("uint8", "int32"), f"gives {self.to}")
        if self.to == "uint8":
            _check_zero_point(self.zero_point, self.low, self.high)
            _require(self.low <= self.high, "saturates nothing")
            return None
        _require((self.zero_point, self.low, self.high) == (0, -SUM_LIMIT, SUM_LIMIT - 1), "gives sums with an offset")
        pairs = zip(self.multipliers.flat, self.shifts.flat, strict=True)
        return _below_limit(max(arithmetic.rescale(bound, int(m), int(s)) for m, s in pairs))


@dataclass(frozen=True, eq=False)
class Maximum:
    """The largest of the 8-bit integers in each window. Padding is never the largest."""

    input: str
    output: str
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]

    def check(self, bounds: Bounds) -> int | None:
        """Raise RuleError if a rule is broken; else return the bound of the output."""
        _is_byte(bounds, self.input)
        _require(min((*self.kernel, *self.strides, *self.dilations)) >= 1 and min(self.pads) >= 0, "has no such window")
        return None


@dataclass(frozen=True, eq=False)
class Concat:
    """Values of one grid, one after the other along an axis."""

    inputs: tuple[str, ...]
    output: str
    axis: int

    def check(self, bounds: Bounds) -> int | None:
        """Raise RuleError if a rule is broken; else return the bound of the output."""
        for name in self.inputs:
            _is_byte(bounds, name)
        return None


@dataclass(frozen=True, eq=False)
class Move:
    """Values in another shape or order; none is changed.

    Attributes:
        kind: "reshape" to ``numbers`` (the first is -1, the batch), "transpose" with the order ``numbers``, "slice" with
            ``numbers`` = axis, start, stop, step, "gather" with an axis and the positions to take, or "pad" with the value
            to pad with, then the amounts before and after each dimension.
    """

    input: str
    output: str
    kind: str
    numbers: tuple[int, ...]

    def check(self, bounds: Bounds) -> int | None:
        """Raise RuleError if a rule is broken; else return the bound of the output."""
        _require(self.input in bounds, f"takes {self.input}, which no step before it gives")
        _require(self.kind in ("reshape", "transpose", "slice", "gather", "pad"), f"moves values by {self.kind}")
        least = {"reshape": 1, "transpose": 1, "slice": 4, "gather": 2, "pad": 3}[self.kind]
        _require(len(self.numbers) >= least, "lacks a number")
        bound = bounds[self.input]
        if self.kind == "pad":
            _require(self.numbers[0] == 0 or (bound is None and 0 <= self.numbers[0] <= 255), "pads with another type")
            _require(len(self.numbers) % 2 == 1 and min(self.numbers[1:]) >= 0, "pads by negative amounts")
        return bound


Step = Table | Convolution | Linear | Product | Sum | WindowSum | Rescale | Maximum | Concat | Move
STEPS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (Table, Convolution, Linear, Product, Sum, WindowSum, Rescale, Maximum, Concat, Move)
}


def inputs_of(step: Step) -> tuple[str, ...]:
    """The names of the values that a step takes."""
    return (step.input,) if hasattr(step, "input") else tuple(step.inputs)


@dataclass(frozen=True, eq=False)
class Program:
    """An integer network: from uint8 images (N, C, H, W), named IMAGE, to int32, named LOGITS.

    Attributes:
        image: channels, height and width.
        steps: in the order in which they run.
        scale: the real number that one unit of the result stands for.
        dimensions: of the result, the batch included.
    """

    image: tuple[int, int, int]
    steps: tuple[Step, ...]
    scale: float
    dimensions: int = 2

    def check(self) -> dict[str, int | None]:
        """The bound of each value, after a check of every rule.

        Raises:
            ValueError: a step breaks a rule; the message names it.
        """
        bounds: dict[str, int | None] = {IMAGE: None}
        for step in self.steps:
            try:
                _require(step.output not in bounds, "gives a value that another step gives")
                bounds[step.output] = step.check(bounds)
            except RuleError as error:
                raise ValueError(f"{step.output} {error}") from error
        if bounds.get(LOGITS) is None:
            raise ValueError("no step gives the logits as int32")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"the scale of the logits is {self.scale}")
        return bounds
