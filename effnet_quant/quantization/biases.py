"""Simulates engines that store biases as int32, in steps of an integer layer's accumulator."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from effnet_quant.quantization.batch_norm import factor_and_offset
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.targets import FollowsTarget, Target


def accumulator_step(layer: nn.Module) -> Tensor | None:
    """Scale of a quantized layer's integer sums: input scale * weight scale, float64 of shape (C,) or (1,).

    None unless input and weights are both rounded to 8 bits or less.
    """
    step = torch.ones((), dtype=torch.float64)
    for operand in (layer._input_quantizer, layer._weight_quantizer):
        if not (
            isinstance(operand, TensorQuantizer) and operand.enabled and operand.simulated and operand.spec.bits <= 8
        ):
            return None
        step = operand.scale.double().flatten() * step
    return step


def _correction(values: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """The difference between ``values`` rounded to multiples of ``step`` (float64) and ``values``; 0 where the step is 0."""
    missing = torch.where(step > 0, torch.round(values / step) * step - values, 0)
    return missing.detach().to(dtype)


def layer_bias(layer: nn.Conv2d | nn.Linear) -> Tensor | None:
    """The layer's bias, rounded to the accumulator's step; the gradient is straight-through.

    The bias stays as it is where ``accumulator_step`` is None.
    """
    bias, step = layer.bias, accumulator_step(layer)
    if bias is None or step is None:
        return bias
    return bias + _correction(bias.double(), step, bias.dtype)


class FoldedBatchNorm2d(FollowsTarget, nn.BatchNorm2d):
    """BatchNorm2d that engines fold into the quantized convolution before it; the folded layer has one bias.

    Attributes:
        rounds_bias: whether the folded bias is rounded while BatchNorm and convolution are both in eval mode.
    """

    rounds_bias = False
    _layer: tuple[nn.Conv2d]  # in a tuple, so that it does not become a child

    def follow(self, target: Target) -> None:
        """Round the folded bias if the engine of ``target`` does."""
        self.rounds_bias = target.quantized_bias

    def forward(self, input: Tensor) -> Tensor:
        evaluates = not (self.training or self._layer[0].training)
        step = accumulator_step(self._layer[0]) if self.rounds_bias and evaluates else None
        if step is None:
            return super().forward(input)
        mean, variance = self.running_mean, self.running_var
        assert mean is not None and variance is not None
        factor, offset = factor_and_offset(self.weight, self.bias, mean, variance, self.eps)
        inner = self._layer[0].bias
        if inner is not None:
            offset = inner.double() * factor + offset
        bias = self.bias + _correction(offset, step * factor.abs(), self.bias.dtype)
        return F.batch_norm(input, mean, variance, self.weight, bias, eps=self.eps)


def note_batch_norms(model: nn.Module, graph: fx.Graph) -> None:
    """Turn each BatchNorm2d that engines fold into a ``FoldedBatchNorm2d``, which holds the convolution before it.

    Engines fold where ``graph`` calls both modules once and nothing else uses the convolution's output.
    """
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" else None
        if not (isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1):
            continue
        norm, layer = (model.get_submodule(str(place)) for place in (node.target, source.target))
        if (
            type(norm) is nn.BatchNorm2d
            and norm.affine
            and norm.track_running_stats
            and isinstance(layer, nn.Conv2d)
            and hasattr(layer, "_weight_quantizer")
            and calls[node.target] == calls[source.target] == 1
        ):
            norm.__class__ = FoldedBatchNorm2d
            norm._layer = (layer,)  # type: ignore[assignment]
            layer.bias_is_folded = True  # type: ignore[assignment]
