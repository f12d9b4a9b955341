"""The fast executor: the reference's numbers from PyTorch's vectorised kernels.

Sums of integers are computed in float32 or float64 only where that is exact. A float32 holds every integer up to 2**24, a
float64 every one up to 2**53. A layer's sums and all their parts stay below its bound, in whatever order they are added. So
float32 serves bounds below 2**24, and float64 all others, which are below 2**31.

Rescaling to 8 bits multiplies in float64. Let t = sum * multiplier / 2**shift, with shift <= EXACT_SHIFT = 43. Then t is a
multiple of 2**-43. What is computed is t + zero point + 1/2. Within 512 of 0 the error is less than 2**-43. Where the exact
number is an integer there is no error. So the computed number lies below an integer if and only if the exact one does, and
truncation gives the exact result. Larger magnitudes saturate. Other shifts, and results of 32 bits, use int64.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from effnet_quant.integer import reference
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
    inputs_of,
)

EXACT_SHIFT = 43
_EXACT_FLOAT32 = 2**24
# elsewhere PyTorch's oneDNN may use kernels that are not exact (Winograd's, or bfloat16)
_EXACT_ONEDNN = platform.machine().lower() in ("x86_64", "amd64")

Run = Callable[..., Tensor]


class FastProgram:
    """A program made ready to run. It may be called from several threads at a time.

    Args:
        program: checked.
    """

    def __init__(self, program: Program) -> None:
        bounds = program.check()
        steps = _with_tables(program)
        last = {name: index for index, step in enumerate(steps) for name in inputs_of(step)}
        self._steps: list[tuple[str, tuple[str, ...], Run, list[str]]] = []
        for index, step in enumerate(steps):
            names = inputs_of(step)
            done = [name for name in dict.fromkeys(names) if last[name] == index]
            self._steps.append((step.output, names, _prepared(step, bounds), done))

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.int32]:
        """The int32 results of uint8 images (N, C, H, W)."""
        exact = contextlib.nullcontext() if _EXACT_ONEDNN else torch.backends.mkldnn.flags(enabled=False)
        with torch.inference_mode(), exact:
            values = {IMAGE: torch.from_numpy(images)}
            for output, names, run, done in self._steps:
                values[output] = run(*(values[name] for name in names))
                for name in done:
                    del values[name]
            return values[LOGITS].to(torch.int32).numpy()


def _with_tables(program: Program) -> list[Step]:
    """The steps, with a table in the place of each alignment of a single operand to another grid."""
    steps = list(program.steps)
    users: dict[str, int] = {}
    for step in steps:
        for name in inputs_of(step):
            users[name] = users.get(name, 0) + 1
    for index, (first, second) in enumerate(zip(program.steps, program.steps[1:], strict=False)):
        single = isinstance(first, Sum) and len(first.inputs) == 1 and users.get(first.output) == 1
        if single and isinstance(second, Rescale) and second.input == first.output and second.to == "uint8":
            assert isinstance(first, Sum)
            values = {first.inputs[0]: np.arange(256, dtype=np.int64)}
            values[first.output] = reference.compute(first, values)
            table = reference.compute(second, values).astype(np.uint8).reshape(-1)
            steps[index] = steps[index + 1] = Table(first.inputs[0], second.output, table, 0)
    return list(dict.fromkeys(steps))


def _prepared(step: Step, bounds: dict[str, int | None]) -> Run:
    return _PREPARE[type(step)](step, bounds)


def _table(step: Table, bounds: dict[str, int | None]) -> Run:
    table = torch.from_numpy(step.table.copy())
    starts = (256 * torch.arange(step.channels, dtype=torch.int32)).reshape(-1, *(1,) * step.trailing)

    def run(x: Tensor) -> Tensor:
        index = x.int() if step.channels == 1 else x.int().add_(starts)
        return table.index_select(0, index.reshape(-1)).reshape(x.shape)

    return run


def _centred(x: Tensor, zero_point: int, dtype: torch.dtype) -> Tensor:
    wide = x.to(dtype)
    return wide.sub_(zero_point) if zero_point else wide


def _exact(bound: int | None) -> torch.dtype:
    return torch.float32 if bound is not None and bound < _EXACT_FLOAT32 else torch.float64


def _weights(step: Convolution | Linear, axis: int) -> tuple[Tensor, Tensor, torch.dtype]:
    """Weights and biases as floats, and the type in which the layer's sums are exact."""
    weight = step.weight.astype(np.int64) - WEIGHT_ZERO_POINT
    others = tuple(dimension for dimension in range(weight.ndim) if dimension != axis)
    # closer than the file's proof: the weights of one output at a time
    bound = int(np.abs(weight).sum(axis=others).max()) * step.proof["input"] + step.proof["bias"]
    dtype = _exact(bound)
    return torch.from_numpy(weight).to(dtype), torch.from_numpy(step.bias.copy()).to(dtype), dtype


def _convolution(step: Convolution, bounds: dict[str, int | None]) -> Run:
    weight, bias, dtype = _weights(step, 0)
    top, left, bottom, right = step.pads
    even = (top, left) == (bottom, right)

    def run(x: Tensor) -> Tensor:
        x = _centred(x, step.zero_point, dtype)
        if not even:
            x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, weight, bias, step.strides, (top, left) if even else 0, step.dilations, step.groups)

    return run


def _linear(step: Linear, bounds: dict[str, int | None]) -> Run:
    weight, bias, dtype = _weights(step, 1)
    weight = weight.T.contiguous()
    return lambda x: F.linear(_centred(x, step.zero_point, dtype), weight, bias)


def _product(step: Product, bounds: dict[str, int | None]) -> Run:
    first, second = step.zero_points
    return lambda a, b: _centred(a, first, torch.float32) * _centred(b, second, torch.float32)


def _sum(step: Sum, bounds: dict[str, int | None]) -> Run:
    numbers = list(zip(step.inputs, step.zero_points, step.left_shifts, step.multipliers, step.shifts, strict=True))
    integers = np.arange(256, dtype=np.int64)
    tables = [
        torch.from_numpy(reference.rescale(integers - zero << left, np.int64(m), np.int64(s))).to(torch.int32)
        if bounds[name] is None
        else None
        for name, zero, left, m, s in numbers
    ]

    def run(*operands: Tensor) -> Tensor:
        total: Any = 0
        for x, table, (_, _, _, multiplier, shift) in zip(operands, tables, numbers, strict=True):
            if table is None:
                total = total + _shifted(x.to(torch.int64), multiplier, shift).to(torch.int32)
            else:
                total = total + table.index_select(0, x.int().reshape(-1)).reshape(x.shape)
        return total

    return run


def _shifted(x: Tensor, multiplier: Any, shift: Any) -> Tensor:
    """reference.rescale in int64."""
    half = (1 << shift) >> 1
    return ((x * multiplier) + half) >> shift


def _window_sum(step: WindowSum, bounds: dict[str, int | None]) -> Run:
    top, left, bottom, right = step.pads

    def run(x: Tensor) -> Tensor:
        if not any(step.kernel):
            total = x.sum((2, 3), keepdim=True, dtype=torch.int32)
            return total - step.zero_point * x.shape[2] * x.shape[3]
        x = F.pad(_centred(x, step.zero_point, torch.float64), (left, right, top, bottom))
        return F.avg_pool2d(x, step.kernel, step.strides, divisor_override=1)

    return run


def _rescale(step: Rescale, bounds: dict[str, int | None]) -> Run:
    multipliers, shifts = torch.from_numpy(step.multipliers.copy()), torch.from_numpy(step.shifts.copy())
    if step.to == "int32" or int(step.shifts.max()) > EXACT_SHIFT:

        def run_in_integers(x: Tensor) -> Tensor:
            shifted = _shifted(x.to(torch.int64), multipliers, shifts).add_(step.zero_point)
            return shifted.clamp_(step.low, step.high).to(getattr(torch, step.to))

        return run_in_integers
    ratio = torch.ldexp(multipliers.double(), -shifts)
    if ratio.ndim == 0:
        ratio = ratio.reshape(1)  # or the product would keep float32

    def run(x: Tensor) -> Tensor:
        result = torch.empty(x.shape, dtype=torch.uint8)
        for own, sums in zip(result, x, strict=True):  # an image at a time stays in the cache
            scaled = (sums * ratio).add_(step.zero_point + 0.5)
            own.copy_(scaled.clamp_(step.low, step.high + 0.5))  # positive, so the copy rounds down
        return result

    return run


def _maximum(step: Maximum, bounds: dict[str, int | None]) -> Run:
    top, left, bottom, right = step.pads

    def run(x: Tensor) -> Tensor:
        padded = F.pad(x.float(), (left, right, top, bottom), value=-1.0)
        return F.max_pool2d(padded, step.kernel, step.strides, 0, step.dilations).to(torch.uint8)

    return run


def _concat(step: Concat, bounds: dict[str, int | None]) -> Run:
    return lambda *parts: torch.cat(parts, step.axis)


def _move(step: Move, bounds: dict[str, int | None]) -> Run:
    numbers = step.numbers
    if step.kind == "reshape":
        return lambda x: x.reshape(numbers)
    if step.kind == "transpose":
        return lambda x: x.permute(numbers).contiguous()
    if step.kind == "slice":
        axis, start, stop, stride = numbers
        return lambda x: x[(slice(None),) * axis + (slice(start, stop, stride),)].contiguous()
    if step.kind == "gather":
        positions = torch.tensor(numbers[1:])
        return lambda x: x.index_select(numbers[0], positions)
    value, *amounts = numbers
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    return lambda x: F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=value)


_PREPARE: dict[type, Callable[..., Run]] = {
    Table: _table,
    Convolution: _convolution,
    Linear: _linear,
    Product: _product,
    Sum: _sum,
    WindowSum: _window_sum,
    Rescale: _rescale,
    Maximum: _maximum,
    Concat: _concat,
    Move: _move,
}
