"""Folds BatchNorm into the convolution in front of it."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from effnet_quant.export.traced_graph import Grid, TracedGraph, argument, kind_of, module_path, set_argument
from effnet_quant.quantization.batch_norm import factor_and_offset
from effnet_quant.quantization.operation_kinds import Kind

aten = torch.ops.aten


def fold_batch_norm(traced: TracedGraph) -> None:
    """Fold each BatchNorm in eval mode into the convolution in front, if nothing else takes the convolution's result.

    Weights and scales are multiplied by the same factor, so the integers stay the same. A negative factor flips their sign;
    -128, which only saturation gives, then becomes 127.
    """
    for node in traced.operations():
        layer = _convolution(traced, node)
        if layer is None:
            continue
        gamma, beta, mean, variance = (traced.constants[entry] for entry in node.args[1:5])  # type: ignore[index]
        factor, offset = factor_and_offset(gamma, beta, mean, variance, float(argument(node, "eps")))
        _fold(traced, layer, factor, offset)
        node.replace_all_uses_with(layer)
        traced.graph.erase_node(node)


def _convolution(traced: TracedGraph, node: fx.Node) -> fx.Node | None:
    """The convolution into which ``node`` can be folded; None if there is none, or ``node`` is no BatchNorm in eval mode."""
    if node.target is not aten.batch_norm.default or node.args[5]:
        return None
    layer = node.args[0]
    if (
        isinstance(layer, fx.Node)
        and Kind.CONVOLVES in kind_of(layer)
        and len(layer.users) == 1
        and traced.weights(layer)
    ):
        return layer
    return None


def _fold(traced: TracedGraph, layer: fx.Node, factor: Tensor, offset: Tensor) -> None:
    weight, grid = traced.weights(layer)  # type: ignore[misc]
    factors = factor.reshape((-1,) + (1,) * (weight.ndim - 1))
    if grid is None:
        weight = (weight * factors).float()
    else:
        old = grid.scale.flatten().expand(len(weight)).reshape(factors.shape)
        scale = (old * factors.abs()).float()
        gone = scale == 0  # a channel of zeros; runtimes refuse a scale of 0
        steps = torch.clamp(weight / old, grid.low, grid.high)
        scale = torch.where(gone, old, scale)
        reach = max(-grid.low, grid.high)
        low, high = max(-reach, -128), min(reach, 127)
        weight = torch.where(gone, 0, torch.clamp(steps * factors.sign(), low, high)).float() * scale
        grid = Grid(scale, 0, low, high)
    traced.set_weights(layer, weight, grid)
    bias = layer.args[2] if len(layer.args) > 2 else None
    inner = traced.constants[bias].float() if isinstance(bias, fx.Node) else 0.0
    folded = (inner * factor + offset).float()
    set_argument(layer, "bias", traced.constant(f"{module_path(layer)}.bias", folded))
