"""Custom operations of a traced graph, for which ATen has none. Each is executable, so a traced graph can be run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effnet_quant.quantization.operation_kinds import Kind


@torch.library.custom_op("effnet_quant::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """Fake quantization: ``x`` rounded to the nearest multiple of ``scale`` and clamped to the grid.

    Args:
        x: any shape.
        scale: the distance of two grid points; its shape broadcasts to that of ``x``.
        zero_point: the integer that stands for 0.0.
        low: the smallest integer.
        high: the largest integer.
    """
    return (torch.clamp(torch.round(x / scale) + zero_point, low, high) - zero_point) * scale


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("effnet_quant::quantized_hard_sigmoid", mutates_args=())
def quantized_hard_sigmoid(x: Tensor, scale: Tensor) -> Tensor:
    """A quantized hard sigmoid: clamp((x + 3) / 6, 0, 1) rounded to ``scale`` times an integer from 0 to 255.

    The integers are those of x + 3 quantized with the scale 6 * ``scale``. ``scale`` must be at most 1/255, so that
    saturation replaces the clamp.
    """
    return torch.clamp(torch.round((x + 3) / (6 * scale)), 0, 255) * scale


@quantized_hard_sigmoid.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("effnet_quant::conv_same", mutates_args=())
def conv_same(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], groups: int) -> Tensor:
    """2-D convolution with TensorFlow's "SAME" padding, for images of any size.

    If the number of zeros is odd, the end gets one more than the begin.
    """
    pads: list[int] = []
    for size, length, step in zip(x.shape[-2:], weight.shape[-2:], stride, strict=True):
        missing = 0 if length == 1 else (size - 1) // step * step + length - size
        pads = [missing // 2, missing - missing // 2, *pads]  # PyTorch lists the last dimension first
    return F.conv2d(F.pad(x, pads), weight, bias, stride, groups=groups)


@conv_same.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], groups: int) -> Tensor:
    sizes: list[Any] = [(size - 1) // step + 1 for size, step in zip(x.shape[-2:], stride, strict=True)]
    return x.new_empty([x.shape[0], weight.shape[0], *sizes])


@torch.library.custom_op("effnet_quant::conv_padded", mutates_args=())
def conv_padded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """1-D or 2-D convolution with zeros at both ends of each dimension; ``padding`` lists all begins, then all ends."""
    dims = len(padding) // 2
    pads: list[int] = []
    for begin, end in zip(padding[:dims], padding[dims:], strict=True):
        pads = [begin, end, *pads]  # PyTorch lists the last dimension first
    convolve = F.conv2d if dims == 2 else F.conv1d
    return convolve(F.pad(x, pads), weight, bias, stride, 0, dilation, groups)


@conv_padded.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    dims = len(padding) // 2
    sizes: list[Any] = [
        (size + padding[axis] + padding[axis + dims] - dilation[axis] * (weight.shape[axis + 2] - 1) - 1)
        // stride[axis]
        + 1
        for axis, size in enumerate(x.shape[2:])
    ]
    return x.new_empty([x.shape[0], weight.shape[0], *sizes])


QUANTIZE = torch.ops.effnet_quant.quantize.default
CONV_SAME = torch.ops.effnet_quant.conv_same.default
CONV_PADDED = torch.ops.effnet_quant.conv_padded.default
QUANTIZED_HARD_SIGMOID = torch.ops.effnet_quant.quantized_hard_sigmoid.default
CUSTOM_KINDS: dict[Any, Kind] = {
    QUANTIZE: Kind.ROUNDS | Kind.MONOTONIC,
    QUANTIZED_HARD_SIGMOID: Kind.ROUNDS | Kind.MONOTONIC | Kind.NEVER_NEGATIVE,
    CONV_SAME: Kind.CONVOLVES,
    CONV_PADDED: Kind.CONVOLVES,
}
