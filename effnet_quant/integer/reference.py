"""The plain executor: every step in a few lines of NumPy on int64 arrays. It is the definition that others are tested by.

Read it beside docs/integer.md. ``>>`` of NumPy's signed integers is arithmetic, as Python's is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet_quant.integer.program import (
    IMAGE,
    LOGITS,
    WEIGHT_ZERO_POINT,
    Concat,
    Convolution,
    Linear,
    Maximum,
    Move,
    Product,
    Program,
    Rescale,
    Step,
    Sum,
    Table,
    WindowSum,
)

Ints = NDArray[np.int64]


def run(program: Program, images: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The int32 results of uint8 images (N, C, H, W)."""
    return run_all(program, images)[LOGITS].astype(np.int32)


def run_all(program: Program, images: NDArray[np.uint8]) -> dict[str, Ints]:
    """Every value of the network by its name, as int64."""
    values: dict[str, Ints] = {IMAGE: images.astype(np.int64)}
    for step in program.steps:
        values[step.output] = compute(step, values)
    return values


def compute(step: Step, values: dict[str, Ints]) -> Ints:
    """The output of one step."""
    if isinstance(step, (Product, Sum, Concat)):
        return _join(step, [values[name] for name in step.inputs])
    x = values[step.input]
    if isinstance(step, Table):
        channel = np.arange(step.channels).reshape(-1, *(1,) * step.trailing)
        return step.table.astype(np.int64)[256 * channel + x]
    if isinstance(step, Convolution):
        weight = step.weight.astype(np.int64) - WEIGHT_ZERO_POINT
        sums = _convolve(_pad(x - step.zero_point, step.pads), weight, step.strides, step.dilations, step.groups)
        return sums + step.bias.reshape(-1, 1, 1)
    if isinstance(step, Linear):
        return (x - step.zero_point) @ (step.weight.astype(np.int64) - WEIGHT_ZERO_POINT) + step.bias
    if isinstance(step, WindowSum):
        kernel = step.kernel if any(step.kernel) else x.shape[2:]
        windows = _windows(_pad(x - step.zero_point, step.pads), kernel, step.strides, (1, 1))
        return sum(window for _, _, window in windows)
    if isinstance(step, Maximum):
        windows = _windows(_pad(x, step.pads, -1), step.kernel, step.strides, step.dilations)
        return np.max([window for _, _, window in windows], axis=0)
    if isinstance(step, Rescale):
        scaled = rescale(x, step.multipliers, step.shifts)
        return np.clip(scaled + step.zero_point, step.low, step.high)
    return _move(step, x)


def rescale(x: Ints, multipliers: Ints, shifts: Ints) -> Ints:
    """x * multiplier / 2**shift, rounded to the nearest integer, halves up."""
    half = (np.int64(1) << shifts) >> 1
    return (x * multipliers + half) >> shifts


def _join(step: Product | Sum | Concat, operands: list[Ints]) -> Ints:
    if isinstance(step, Concat):
        return np.concatenate(operands, axis=step.axis)
    centred = [x - zero for x, zero in zip(operands, getattr(step, "zero_points"), strict=True)]  # noqa: B009
    if isinstance(step, Product):
        return centred[0] * centred[1]
    numbers = zip(centred, step.left_shifts, step.multipliers, step.shifts, strict=True)
    return sum(rescale(x << left, np.int64(m), np.int64(s)) for x, left, m, s in numbers)  # type: ignore[return-value]


def _pad(x: Ints, pads: tuple[int, int, int, int], value: int = 0) -> Ints:
    top, left, bottom, right = pads
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=value)


def _windows(x: Ints, kernel: Any, strides: tuple[int, int], dilations: tuple[int, int]) -> Any:
    """For each place (i, j) in the window: i, j and the values that lie there, one for each window."""
    spans = [(size - 1) * step for size, step in zip(kernel, dilations, strict=True)]
    height, width = ((x.shape[2 + axis] - spans[axis] - 1) // strides[axis] + 1 for axis in (0, 1))
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows = slice(i * dilations[0], i * dilations[0] + (height - 1) * strides[0] + 1, strides[0])
            columns = slice(j * dilations[1], j * dilations[1] + (width - 1) * strides[1] + 1, strides[1])
            yield i, j, x[:, :, rows, columns]


def _convolve(x: Ints, weight: Ints, strides: tuple[int, int], dilations: tuple[int, int], groups: int) -> Ints:
    """Sums over the input channels of the group and the window. ``x`` is padded."""
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    total: Any = 0
    for i, j, values in _windows(x, weight.shape[2:], strides, dilations):
        count, _, height, width = values.shape
        grouped = values.reshape(count, groups, inputs, height * width)
        matrix = weight[:, :, i, j].reshape(groups, outputs, inputs)
        total = total + (matrix @ grouped).reshape(count, groups * outputs, height, width)
    return total


def _move(step: Move, x: Ints) -> Ints:
    numbers = step.numbers
    if step.kind == "reshape":
        return x.reshape(numbers)
    if step.kind == "transpose":
        return x.transpose(numbers)
    if step.kind == "slice":
        axis, start, stop, stride = numbers
        return x[(slice(None),) * axis + (slice(start, stop, stride),)]
    if step.kind == "gather":
        return np.take(x, numbers[1:], axis=numbers[0])
    value, *amounts = numbers
    return np.pad(x, list(zip(amounts[::2], amounts[1::2], strict=True)), constant_values=value)


def answer(logits: NDArray[np.int32]) -> NDArray[np.int64]:
    """The class of each image: the largest logit; among equal ones the lowest index."""
    return logits.argmax(axis=1)
