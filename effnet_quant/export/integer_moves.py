"""The operations that move values, as steps of an integer network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from effnet_quant.export.integer_values import Bytes, Value, inner_sizes
from effnet_quant.export.traced_graph import argument, shape_of

if TYPE_CHECKING:
    from effnet_quant.export.integer_lowering import Lowering

aten = torch.ops.aten


def reshape(lowering: Lowering, node: fx.Node) -> Value:
    """Another shape, the batch first."""
    value = lowering.movable(node)
    if value.shape == inner_sizes(node):
        return value
    return lowering.reshaped(node, value)


def permute(lowering: Lowering, node: fx.Node) -> Value:
    """Another order of dimensions, the batch first."""
    dims = len(shape_of(node))
    if node.target is aten.permute.default:
        order = [dim % dims for dim in argument(node, "dims")]
    else:
        order = list(range(dims))
        first, second = argument(node, "dim0") % dims, argument(node, "dim1") % dims
        order[first], order[second] = second, first
    if order[0] != 0:
        raise ValueError("moves the batch")
    return lowering.moved(node, lowering.movable(node), "transpose", tuple(order), inner_sizes(node))


def cut(lowering: Lowering, node: fx.Node) -> Value:
    """A slice of one dimension between fixed positions."""
    value, axis = lowering.movable(node), int(argument(node, "dim")) % len(shape_of(node))
    start, stop, step = argument(node, "start") or 0, argument(node, "end"), argument(node, "step")
    size = (0, *value.shape)[axis]
    whole = stop is None or (isinstance(stop, int) and stop >= (size or np.iinfo(np.int64).max))
    if start == 0 and step == 1 and whole:
        return value
    if axis == 0 or not isinstance(start, int) or not isinstance(stop, (int, type(None))):
        raise ValueError("cuts at positions that depend on the images")
    start, stop, step = slice(start, stop, step).indices(size)
    return lowering.moved(node, value, "slice", (axis, start, stop, step), inner_sizes(node))


def split(lowering: Lowering, node: fx.Node) -> list[Value]:
    """Parts of one dimension."""
    value, axis = lowering.movable(node), int(argument(node, "dim")) % (len(shape_of(node.args[0])))
    if axis == 0:
        raise ValueError("cuts the batch")
    parts: list[Value] = []
    start = 0
    for part in node.meta["val"]:
        inner = tuple(int(size) for size in part.shape[1:])
        numbers = (axis, start, start + inner[axis - 1], 1)
        parts.append(lowering.moved(node, value, "slice", numbers, inner))
        start += inner[axis - 1]
    return parts


def pad(lowering: Lowering, node: fx.Node) -> Value:
    """Zeros around the values: the zero point."""
    value, amounts = lowering.movable(node), list(argument(node, "pad"))
    constant = node.target is aten.constant_pad_nd.default or argument(node, "mode") == "constant"
    if not constant or argument(node, "value") or not all(isinstance(a, int) and a >= 0 for a in amounts):
        raise ValueError("pads with other numbers than zeros")
    dims = len(shape_of(node))
    pairs = [(0, 0)] * (dims - len(amounts) // 2) + list(zip(amounts[-2::-2], amounts[::-2], strict=True))
    filling = value.zero_point if isinstance(value, Bytes) else 0
    return lowering.moved(node, value, "pad", (filling, *(n for pair in pairs for n in pair)), inner_sizes(node))


def pixel_shuffle(lowering: Lowering, node: fx.Node) -> Value:
    """Channels to pixels: (C * r * r, H, W) -> (C, H * r, W * r)."""
    r, (channels, height, width) = int(argument(node, "upscale_factor")), inner_sizes(node)
    low, wide = height // r, width // r
    value = lowering.moved(
        node, lowering.movable(node), "reshape", (-1, channels, r, r, low, wide), (channels, r, r, low, wide)
    )
    value = lowering.moved(node, value, "transpose", (0, 1, 4, 2, 5, 3), (channels, low, r, wide, r))
    return lowering.reshaped(node, value)


def resize(lowering: Lowering, node: fx.Node) -> Value:
    """Nearest neighbours: pixel i of n takes pixel floor(i * size / n)."""
    value, wanted = lowering.movable(node), inner_sizes(node)
    for axis in (2, 3):
        own, new = value.shape[axis - 1], wanted[axis - 1]
        positions = tuple(index * own // new for index in range(new))
        shape = (*value.shape[: axis - 1], new, *value.shape[axis:])
        value = lowering.moved(node, value, "gather", (axis, *positions), shape)  # type: ignore[assignment]
    return value


def take(lowering: Lowering, node: fx.Node) -> Value:
    """Fixed positions of one dimension."""
    axis, positions = int(argument(node, "dim")) % len(shape_of(node)), argument(node, "index")
    if axis == 0 or positions not in lowering.traced.constants:
        raise ValueError("takes positions that depend on the images")
    chosen = tuple(int(position) for position in lowering.traced.constants[positions])
    return lowering.moved(node, lowering.movable(node), "gather", (axis, *chosen), inner_sizes(node))


MOVES: dict[Any, Callable[[Lowering, fx.Node], Any]] = {
    **dict.fromkeys(
        (
            aten.flatten.using_ints,
            aten.view.default,
            aten._unsafe_view.default,
            aten.reshape.default,
            aten.unflatten.int,
            aten.reshape_as.default,
            aten.view_as.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
        ),
        reshape,
    ),
    aten.permute.default: permute,
    aten.transpose.int: permute,
    aten.slice.Tensor: cut,
    aten.chunk.default: split,
    aten.split.Tensor: split,
    aten.split_with_sizes.default: split,
    aten.pad.default: pad,
    aten.constant_pad_nd.default: pad,
    aten.pixel_shuffle.default: pixel_shuffle,
    aten.upsample_nearest2d.vec: resize,
    aten.index_select.default: take,
}
