"""A third executor, written from docs/integer.md alone: loops over Python's unbounded integers, nothing vectorised."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

Index = tuple[int, ...]


class Integers:
    """Integers by their index, and the sizes of the dimensions."""

    def __init__(self, sizes: Sequence[int], at: Callable[[Index], int]) -> None:
        self.sizes = tuple(sizes)
        self.numbers = {index: at(index) for index in itertools.product(*map(range, self.sizes))}

    @staticmethod
    def of(array: Any) -> Integers:
        """The integers of a NumPy array."""
        return Integers(array.shape, lambda index: int(array[index]))

    def __getitem__(self, index: Index) -> int:
        return self.numbers[index]

    def listed(self) -> list[int]:
        """All integers, the last index first."""
        return list(self.numbers.values())


def rounded_shift(number: int, shift: int) -> int:
    """number / 2**shift to the nearest integer, halves up."""
    return (2 * number + 2**shift) // (2 * 2**shift)  # Python's // rounds down


def rescaled(number: int, multiplier: int, shift: int) -> int:
    return rounded_shift(number * multiplier, shift)


def broadcast(array: Any, index: Index) -> int:
    """The entry of a smaller array that belongs to an index."""
    own = index[len(index) - array.ndim :]
    return int(array[tuple(0 if size == 1 else i for i, size in zip(own, array.shape, strict=True))])


def table(x: Integers, step: Any) -> Integers:
    many = len(step.table) > 256
    channel_axis = len(x.sizes) - 1 - step.trailing if many else 0
    return Integers(x.sizes, lambda i: int(step.table[(256 * i[channel_axis] if many else 0) + x[i]]))


def windows(x: Integers, kernel: Any, strides: Any, pads: Any, dilations: Any) -> tuple[int, int]:
    """Height and width of what windows give."""
    return tuple(  # type: ignore[return-value]
        (x.sizes[2 + a] + pads[a] + pads[2 + a] - dilations[a] * (kernel[a] - 1) - 1) // strides[a] + 1 for a in (0, 1)
    )


def inside(x: Integers, index: Index, place: Index, strides: Any, pads: Any, dilations: Any) -> Index | None:
    """Row and column that a place of a window lies on; None for padding."""
    found = tuple(index[2 + a] * strides[a] + place[a] * dilations[a] - pads[a] for a in (0, 1))
    return found if all(0 <= f < size for f, size in zip(found, x.sizes[2:], strict=True)) else None


def convolution(x: Integers, step: Any) -> Integers:
    outputs, inputs, *kernel = step.weight.shape
    size = windows(x, kernel, step.strides, step.pads, step.dilations)

    def at(index: Index) -> int:
        group = index[1] // (outputs // step.groups)
        total = int(step.bias[index[1]])
        for c, i, j in itertools.product(range(inputs), *map(range, kernel)):
            place = inside(x, index, (i, j), step.strides, step.pads, step.dilations)
            if place is not None:  # the padding is the zero point, and adds nothing
                weight = int(step.weight[index[1], c, i, j]) - 128
                total += (x[(index[0], group * inputs + c, *place)] - step.zero_point) * weight
        return total

    return Integers((x.sizes[0], outputs, *size), at)


def linear(x: Integers, step: Any) -> Integers:
    inputs, outputs = step.weight.shape

    def at(index: Index) -> int:
        products = (
            (x[(*index[:-1], k)] - step.zero_point) * (int(step.weight[k, index[-1]]) - 128) for k in range(inputs)
        )
        return sum(products, int(step.bias[index[-1]]))

    return Integers((*x.sizes[:-1], outputs), at)


def window_sum(x: Integers, step: Any) -> Integers:
    kernel = step.kernel if any(step.kernel) else x.sizes[2:]

    def at(index: Index) -> int:
        places = (
            inside(x, index, place, step.strides, step.pads, (1, 1)) for place in itertools.product(*map(range, kernel))
        )
        return sum(x[(*index[:2], *place)] - step.zero_point for place in places if place is not None)

    return Integers((*x.sizes[:2], *windows(x, kernel, step.strides, step.pads, (1, 1))), at)


def maximum(x: Integers, step: Any) -> Integers:
    def at(index: Index) -> int:
        places = (
            inside(x, index, place, step.strides, step.pads, step.dilations)
            for place in itertools.product(*map(range, step.kernel))
        )
        return max(x[(*index[:2], *place)] for place in places if place is not None)

    return Integers((*x.sizes[:2], *windows(x, step.kernel, step.strides, step.pads, step.dilations)), at)


def product(a: Integers, b: Integers, step: Any) -> Integers:
    def small(value: Integers, index: Index) -> int:
        return value[tuple(0 if size == 1 else i for i, size in zip(index, value.sizes, strict=True))]

    sizes = [max(pair) for pair in zip(a.sizes, b.sizes, strict=True)]
    first, second = step.zero_points
    return Integers(sizes, lambda i: (small(a, i) - first) * (small(b, i) - second))


def total(operands: list[Integers], step: Any) -> Integers:
    numbers = list(zip(step.zero_points, step.left_shifts, step.multipliers, step.shifts, strict=True))

    def at(index: Index) -> int:
        return sum(
            rescaled((x[index] - zero_point) * 2**left, multiplier, shift)
            for x, (zero_point, left, multiplier, shift) in zip(operands, numbers, strict=True)
        )

    return Integers(operands[0].sizes, at)


def rescale(x: Integers, step: Any) -> Integers:
    def at(index: Index) -> int:
        number = rescaled(x[index], broadcast(step.multipliers, index), broadcast(step.shifts, index)) + step.zero_point
        return step.low if number < step.low else step.high if number > step.high else number

    return Integers(x.sizes, at)


def concatenated(parts: list[Integers], step: Any) -> Integers:
    sizes = list(parts[0].sizes)
    sizes[step.axis] = sum(part.sizes[step.axis] for part in parts)

    def at(index: Index) -> int:
        place = list(index)
        for part in parts:
            if place[step.axis] < part.sizes[step.axis]:
                return part[tuple(place)]
            place[step.axis] -= part.sizes[step.axis]
        raise AssertionError

    return Integers(sizes, at)
