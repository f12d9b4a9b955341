"""What a traced value is in an integer network: 8-bit integers, 32-bit sums, or a function of 8-bit integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from effnet_quant.export.traced_graph import Grid, shape_of
from effnet_quant.integer.arithmetic import TABLE_LENGTH


@dataclass(frozen=True)
class Bytes:
    """uint8 integers on a grid: real number = (integer - zero_point) * scale.

    Attributes:
        name: of the value in the program.
        low, high: ends of the integers.
        shape: without the batch.
    """

    name: str
    scale: float
    zero_point: int
    low: int
    high: int
    shape: tuple[int, ...]

    @property
    def ends(self) -> tuple[float, float]:
        """The real numbers of the smallest and the largest integer."""
        return (self.low - self.zero_point) * self.scale, (self.high - self.zero_point) * self.scale

    def has_grid(self, grid: Grid) -> bool:
        """Whether scale and zero point are those of ``grid``."""
        return self.scale == float(grid.scale) and self.zero_point == grid.zero_point


@dataclass(frozen=True)
class Sums:
    """int32 sums: real number = integer * unit, clipped to low … high.

    Attributes:
        unit: float64; its shape broadcasts to ``shape``.
        low, high: real ends of an activation that clips; infinite without one.
        shape: without the batch.
        reach: real numbers that the sums lie between, as far as the operands' grids say; infinite if they don't.
    """

    name: str
    unit: NDArray[np.float64]
    shape: tuple[int, ...]
    low: float = -math.inf
    high: float = math.inf
    reach: tuple[float, float] = (-math.inf, math.inf)

    @property
    def ends(self) -> tuple[float, float]:
        """The real numbers that the clipped sums lie between."""
        return max(self.low, self.reach[0]), min(self.high, self.reach[1])


@dataclass(frozen=True)
class Pointwise:
    """A function of 8-bit integers, value by value; it becomes a table.

    Attributes:
        of: the integers.
        function: maps real numbers, float64 (256, C, 1, …), to real numbers of the same shape.
    """

    of: Bytes
    function: Callable[[Tensor], Tensor]

    def results(self) -> Tensor:
        """The function of all integers: float64 (256, C), or (256, 1) if all channels are alike."""
        channels, *inner = self.of.shape
        integers = torch.arange(TABLE_LENGTH, dtype=torch.float64)
        x = ((integers - self.of.zero_point) * self.of.scale).reshape(-1, 1, *(1 for _ in inner))
        x = x.expand(-1, channels, *(1 for _ in inner)).contiguous()
        y = self.function(x)
        if y.shape != x.shape:
            raise ValueError("depends on more than the channel")
        y = y.reshape(TABLE_LENGTH, channels)
        return y[:, :1] if bool((y == y[:, :1]).all()) else y

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest result."""
        results = self.results()
        return float(results.min()), float(results.max())


Value = Bytes | Sums | Pointwise


def on_grid(
    values: NDArray[np.float64] | float, scale: float, zero_point: int, low: int, high: int
) -> NDArray[np.int64]:
    """Real numbers on a grid, rounded to the nearest integer, halves up, and saturated."""
    return np.clip(np.floor(np.asarray(values) / scale + 0.5) + zero_point, low, high).astype(np.int64)


def inner_sizes(node: fx.Node) -> tuple[int, ...]:
    """The sizes of a traced value without the batch.

    Raises:
        ValueError: one of them is not fixed, or the batch is not the first.
    """
    sizes = shape_of(node)
    if isinstance(sizes[0], int) or not all(isinstance(size, int) for size in sizes[1:]):
        raise ValueError("has a shape whose batch is not the first size")
    return tuple(int(size) for size in sizes[1:])
