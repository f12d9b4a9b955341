"""Merges Pad operations and "same" padding into the convolution's own padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effnet_quant.export.custom_ops import CONV_PADDED
from effnet_quant.export.traced_graph import TracedGraph, argument, shape_of

aten = torch.ops.aten
_CONVOLUTIONS = tuple(
    overload for packet in (aten.conv1d, aten.conv2d, aten.conv3d) for overload in (packet.default, packet.padding)
)
_PADS = (aten.pad.default, aten.constant_pad_nd.default)


def merge_padding(traced: TracedGraph) -> None:
    """Replace a Pad of zeros in front of a convolution, and the padding "same", by explicit padding of the convolution."""
    for node in traced.operations():
        if node.target not in _CONVOLUTIONS:
            continue
        source, padding = node.args[0], argument(node, "padding")
        assert isinstance(source, fx.Node)
        dims = len(shape_of(node.args[1])) - 2
        dilation = per_dimension(argument(node, "dilation"), dims)
        begins, ends = _own_padding(node, padding, dilation)
        before = _zeros(source, dims)
        if before is None and not isinstance(padding, str):
            continue
        if before is not None:
            source = source.args[0]
            begins = [own + more for own, more in zip(begins, before[0], strict=True)]
            ends = [own + more for own, more in zip(ends, before[1], strict=True)]
        stride = per_dimension(argument(node, "stride"), dims)
        bias, groups = argument(node, "bias"), argument(node, "groups")
        node.args = (source, node.args[1], bias, stride, [*begins, *ends], dilation, groups)
        node.target, node.kwargs = CONV_PADDED, {}


def _own_padding(node: fx.Node, padding: Any, dilation: list[int]) -> tuple[list[int], list[int]]:
    """The convolution's own padding: zeros at the begin and at the end of each dimension."""
    dims = len(dilation)
    if padding not in ("same", "valid"):
        return per_dimension(padding, dims), per_dimension(padding, dims)
    kernel = [int(size) for size in shape_of(node.args[1])[2:]]
    totals = [(size - 1) * step * (padding == "same") for size, step in zip(kernel, dilation, strict=True)]
    begins = [total // 2 for total in totals]
    return begins, [total - begin for total, begin in zip(totals, begins, strict=True)]


def _zeros(source: fx.Node, dims: int) -> tuple[list[int], list[int]] | None:
    """The padding of ``source``: zeros at the begin and at the end of each dimension. None if it is no Pad of zeros."""
    if source.target not in _PADS:
        return None
    amounts = list(argument(source, "pad"))
    constant = source.target is aten.constant_pad_nd.default or argument(source, "mode") == "constant"
    numbers = all(isinstance(amount, int) for amount in amounts)
    if not (constant and not argument(source, "value") and len(amounts) == 2 * dims and numbers and min(amounts) >= 0):
        return None
    return amounts[-2::-2], amounts[::-2]  # PyTorch lists the last dimension first


def per_dimension(value: Any, dims: int) -> list[int]:
    """Expand one number, or a list, to one number for each of ``dims`` dimensions."""
    values = [value] if isinstance(value, int) else list(value)
    return (values * dims)[:dims]
