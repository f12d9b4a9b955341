"""Convolutions and linear layers as steps of an integer network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from effnet_quant.export.custom_ops import CONV_PADDED, QUANTIZE
from effnet_quant.export.integer_values import Bytes, Sums, inner_sizes
from effnet_quant.export.passes.convolution_padding import per_dimension
from effnet_quant.export.traced_graph import argument
from effnet_quant.integer.arithmetic import SUM_LIMIT
from effnet_quant.integer.program import WEIGHT_ZERO_POINT, Convolution, Linear, proof_of

if TYPE_CHECKING:
    from effnet_quant.export.integer_lowering import Lowering


def _parameters(lowering: Lowering, node: fx.Node) -> tuple[Bytes, np.ndarray, np.ndarray, np.ndarray]:
    """A layer's input, integer weights (int64), integer biases and the unit of its sums, (O,)."""
    value = lowering.value(node.args[0])
    if not isinstance(value, Bytes):
        raise ValueError("takes an input that is not quantized to 8 bits")
    found = lowering.traced.quantized_weights(node)
    if found is None:
        raise ValueError("has weights that are not quantized")
    weight, grid = found
    if grid.zero_point != 0:
        raise ValueError("has weights with a zero point")
    scales = grid.scale.double().flatten().expand(len(weight))
    steps = scales.reshape((-1,) + (1,) * (weight.ndim - 1))
    integers = torch.clamp(torch.round(weight.double() / steps), grid.low, grid.high).numpy().astype(np.int64)
    unit = scales.numpy() * value.scale
    bias = np.rint(_bias(lowering, node, len(weight)) / unit)
    if np.abs(bias).max(initial=0) >= SUM_LIMIT:
        raise ValueError("has a bias that does not fit 32 bits")
    return value, integers, bias.astype(np.int32), unit


def _bias(lowering: Lowering, node: fx.Node, channels: int) -> np.ndarray:
    bias = argument(node, "bias")
    if bias is None:
        return np.zeros(channels)
    if bias.target is QUANTIZE:
        bias = bias.args[0]
    if bias not in lowering.traced.constants:
        raise ValueError("has a bias that is computed from the image")
    return lowering.traced.constants[bias].double().numpy()


def convolution(lowering: Lowering, node: fx.Node) -> Sums:
    """The sums of a 2-D convolution."""
    x, weight, bias, unit = _parameters(lowering, node)
    padding = per_dimension(argument(node, "padding"), 2 if node.target is not CONV_PADDED else 4)
    stored = (weight + WEIGHT_ZERO_POINT).astype(np.uint8)
    name = lowering.name(node, ".sums")
    step = Convolution(
        x.name,
        name,
        x.zero_point,
        stored,
        bias,
        _pair(argument(node, "stride")),
        tuple(padding if len(padding) == 4 else padding * 2),  # type: ignore[arg-type]
        _pair(argument(node, "dilation")),
        int(argument(node, "groups")),
        proof_of(stored, bias, x.zero_point, 0),
    )
    lowering.add(step)
    return Sums(name, unit.reshape(-1, 1, 1), inner_sizes(node))


def linear(lowering: Lowering, node: fx.Node) -> Sums:
    """The sums of a linear layer."""
    x, weight, bias, unit = _parameters(lowering, node)
    stored = np.ascontiguousarray((weight.T + WEIGHT_ZERO_POINT).astype(np.uint8))
    name = lowering.name(node, ".sums")
    lowering.add(Linear(x.name, name, x.zero_point, stored, bias, proof_of(stored, bias, x.zero_point, 1)))
    return Sums(name, unit, inner_sizes(node))


def _pair(value: Any) -> tuple[int, int]:
    first, second = per_dimension(value, 2)
    return first, second
