"""Writes the biases behind quantized inputs as int32."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from effnet_quant.export.traced_graph import Grid, TracedGraph, is_layer, module_path, set_argument, shape_of

aten = torch.ops.aten
# 2**30: an int32 bias beyond this could overflow the accumulator it is added to.
LARGEST_BIAS = float(2**30)
_INT32 = torch.iinfo(torch.int32)


def quantize_biases(traced: TracedGraph) -> None:
    """Quantize the bias of each layer with quantized input and weights to int32. Its scale is input scale * weight scale.

    A linear layer over more than two dimensions keeps its float bias, because runtimes add it after the integer product.
    A layer that computes in float on a quantized input gets a bias that is exact, as ``_exact_grid`` says.
    """
    for node in traced.operations():
        if not is_layer(node) or not traced.is_quantized(node.args[0]):
            continue
        if node.target is aten.linear.default and len(shape_of(node)) > 2:
            continue
        bias = node.args[2] if len(node.args) > 2 else None
        found = traced.quantized_weights(node)
        if found is None or not traced.is_byte(node.args[0]):
            _keep_bias(traced, node, bias)
            continue
        if not isinstance(bias, fx.Node):
            continue
        values, input_scale = traced.constants[bias].float(), traced.grid(node.args[0]).scale  # type: ignore[arg-type]
        weight, grid = _widened(*found, values, input_scale)
        if grid is not found[1]:
            traced.set_weights(node, weight, grid)
        path = f"{module_path(node)}.bias"
        step = grid.scale.flatten().expand(len(weight)) * input_scale
        stored = traced.constant(path, values)
        set_argument(node, "bias", traced.quantize(stored, Grid(step, 0, _INT32.min, _INT32.max), path))


def _keep_bias(traced: TracedGraph, node: fx.Node, bias: object) -> None:
    """Write the float bias of a layer as int32 without rounding it; zeros if the layer has none.

    ONNX Runtime's optimizer (WeightBiasQuantization) takes a layer between DequantizeLinear and QuantizeLinear for an
    integer layer. It would round a float bias to multiples of input scale * weight scale, which overflow int32 where the
    input has 16 bits. It would round float weights too. It leaves alone a layer whose bias comes from a DequantizeLinear.
    """
    channels = int(shape_of(node.args[1])[0])
    if bias is None:
        values = torch.zeros(channels)
    elif isinstance(bias, fx.Node) and bias in traced.constants:
        values = traced.constants[bias].float()
    else:
        return
    path = f"{module_path(node)}.bias"
    set_argument(node, "bias", traced.quantize(traced.constant(path, values), _exact_grid(values), path))


def _exact_grid(values: Tensor) -> Grid:
    """The int32 grid that holds float32 ``values`` (out,) exactly: each has 24 significant bits times a power of two."""
    _, exponent = torch.frexp(values)
    # the scale must be a normal float32; smaller values than 2**-102 lose bits
    step = torch.ldexp(torch.ones_like(values), torch.clamp(exponent - 24, min=-126))
    return Grid(step, 0, _INT32.min, _INT32.max)


def _widened(weight: Tensor, grid: Grid, bias: Tensor, input_scale: Tensor) -> tuple[Tensor, Grid]:
    """Raise the weight scale of channels whose int32 bias would exceed LARGEST_BIAS.

    The weights of such a channel are tiny beside its bias. The coarser grid changes its output by less than one part in a
    million.
    """
    smallest = (bias.abs().double() / (LARGEST_BIAS * input_scale.double())).float()
    scale = grid.scale.flatten().expand(len(weight))
    if not bool((smallest > scale).any()):
        return weight, grid
    return coarser(weight, grid, torch.maximum(scale, smallest))


def coarser(weight: Tensor, grid: Grid, scale: Tensor) -> tuple[Tensor, Grid]:
    """Weights on the grid with ``scale`` (out,). Channels whose scale grows are rounded again."""
    shape = (-1,) + (1,) * (weight.ndim - 1)
    old, new = grid.scale.flatten().expand(len(weight)).reshape(shape), scale.reshape(shape)
    weight = torch.where(new > old, torch.round(weight / old * (old / new)) * new, weight)
    return weight, Grid(new, grid.zero_point, grid.low, grid.high)
