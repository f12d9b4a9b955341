"""The windows of pooling operations: which values each sums or compares, and what average pooling divides by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.nn import functional as F

from effnet_quant.export.traced_graph import argument, shape_of

aten = torch.ops.aten
Pair = tuple[int, int]
Pads = tuple[int, int, int, int]


@dataclass(frozen=True)
class Windows:
    """The windows of an average pooling.

    Attributes:
        kernel: height and width; (0, 0) for the whole image.
        strides: distance of two windows.
        pads: rows above, columns at the left, rows below, columns at the right.
        terms: values in a window.
        factor: what a window's sum is multiplied by, float64 of shape () or (1, height, width).
        size: height and width of the result.
        spread: pairs of an axis and positions to take along it first. The position behind the last stands for 0.
    """

    kernel: Pair
    strides: Pair
    pads: Pads
    terms: int
    factor: NDArray[np.float64]
    size: Pair
    spread: tuple[tuple[int, tuple[int, ...]], ...] = ()


def average_windows(node: fx.Node, shape: tuple[int, ...]) -> Windows:
    """The windows of an average pooling or a mean over height and width.

    Args:
        node: the operation.
        shape: (C, H, W), the sizes of its input.

    Raises:
        ValueError: it averages something else.
    """
    if len(shape) != 3:
        raise ValueError("averages something else than images")
    _, height, width = shape
    whole = Windows((0, 0), (1, 1), (0, 0, 0, 0), height * width, np.float64(1 / (height * width)).reshape(()), (1, 1))
    if node.target is aten.mean.dim:
        if sorted(axis % 4 for axis in argument(node, "dim")) != [2, 3]:
            raise ValueError("averages over other dimensions than height and width")
        return whole
    if node.target is aten.adaptive_avg_pool2d.default:
        sizes = [int(size) for size in shape_of(node)[2:]]
        if sizes == [1, 1]:
            return whole
        if height % sizes[0] or width % sizes[1]:
            return _unequal_windows((height, width), (sizes[0], sizes[1]))
        kernel = (height // sizes[0], width // sizes[1])
        factor = np.float64(1 / math.prod(kernel)).reshape(())
        return Windows(kernel, kernel, (0, 0, 0, 0), math.prod(kernel), factor, (sizes[0], sizes[1]))
    if node.target is not aten.avg_pool2d.default:
        raise ValueError("averages over other dimensions than height and width")
    kernel, strides, pads = _windows(node, (height, width))
    ones = torch.ones(1, 1, height, width, dtype=torch.float64)
    average = node.target(ones, *node.args[1:], **node.kwargs)
    padded = F.pad(ones, (pads[1], pads[3], pads[0], pads[2]))
    sums = F.avg_pool2d(padded, kernel, strides, divisor_override=1)
    factor = (average / sums)[0].numpy()
    if bool((factor == factor.flat[0]).all()):
        factor = np.asarray(factor.flat[0])
    return Windows(kernel, strides, pads, math.prod(kernel), factor, (sums.shape[2], sums.shape[3]))


def _unequal_windows(own: Pair, wanted: Pair) -> Windows:
    """Window i of n along an axis of length L holds floor(i * L / n) … ceil((i + 1) * L / n) - 1."""
    spread, counts, kernel = [], [], []
    for axis, (length, parts) in enumerate(zip(own, wanted, strict=True)):
        windows = [range(i * length // parts, -(-(i + 1) * length // parts)) for i in range(parts)]
        longest = max(map(len, windows))
        positions = [entry for window in windows for entry in (*window, *[length] * (longest - len(window)))]
        spread.append((axis + 2, tuple(positions)))
        counts.append(np.array([len(window) for window in windows], np.float64))
        kernel.append(longest)
    size = (kernel[0], kernel[1])
    factor = 1 / (counts[0][:, None] * counts[1][None, :])
    return Windows(size, size, (0, 0, 0, 0), math.prod(size), factor[None], wanted, tuple(spread))


def largest_windows(node: fx.Node, shape: tuple[int, ...]) -> tuple[Pair, Pair, Pads, Pair]:
    """Kernel, strides, padding and dilations of a max pooling of images of ``shape`` (C, H, W).

    Raises:
        ValueError: its windows have different sizes.
    """
    _, height, width = shape
    if node.target is aten.max_pool2d.default:
        return *_windows(node, (height, width)), _pair(argument(node, "dilation"))
    sizes = [int(size) for size in node.meta["val"][0].shape[2:]]
    if height % sizes[0] or width % sizes[1]:
        raise ValueError("has windows of unequal size")
    kernel = (height // sizes[0], width // sizes[1])
    return kernel, kernel, (0, 0, 0, 0), (1, 1)


def _windows(node: fx.Node, size: Pair) -> tuple[Pair, Pair, Pads]:
    """Kernel, strides and explicit padding. In ceil mode the padding at the ends grows, so that every window is whole."""
    kernel = _pair(argument(node, "kernel_size"))
    strides = _pair(argument(node, "stride") or kernel)
    padding = _pair(argument(node, "padding"))
    dilation = _pair(argument(node, "dilation")) if node.target is aten.max_pool2d.default else (1, 1)
    ends = []
    for axis, count in enumerate(int(entry) for entry in shape_of(node)[2:]):
        span = (kernel[axis] - 1) * dilation[axis] + 1
        ends.append(max(padding[axis], (count - 1) * strides[axis] + span - size[axis] - padding[axis]))
    return kernel, strides, (*padding, ends[0], ends[1])


def _pair(value: Any) -> Pair:
    values = [value] if isinstance(value, int) else list(value)
    first, second = (values * 2)[:2]
    return first, second
