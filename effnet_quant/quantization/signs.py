"""Finds the quantizers that negative values never reach, from what stands before them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from effnet_quant.quantization.modules import QuantAdaptiveAvgPool2d, QuantAvgPool2d
from effnet_quant.quantization.output_quantizer import OutputQuantizer
from effnet_quant.quantization.quantizer import TensorQuantizer

# What has no negative results.
_NEVER_NEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax)
_NEVER_NEGATIVE = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", F.relu6}
_NEVER_NEGATIVE |= {torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_", F.hardsigmoid, torch.softmax, F.softmax, "softmax"}
# What only picks, moves, averages or rounds the values of its first argument.
_KEEPING_MODULES = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, QuantAvgPool2d, QuantAdaptiveAvgPool2d, nn.Identity, nn.Dropout,
    nn.Flatten, TensorQuantizer, OutputQuantizer,
)  # fmt: skip
_KEEPING = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, "mean", torch.flatten, "flatten", "view"}
_KEEPING |= {"reshape", "permute", "transpose", "contiguous", "chunk", torch.chunk, torch.transpose, torch.permute}
_KEEPING |= {operator.getitem, F.dropout}
# What joins several values, none of which may be negative.
_JOINING = {
    operator.add,
    operator.iadd,
    torch.add,
    "add",
    "add_",
    operator.mul,
    operator.imul,
    torch.mul,
    "mul",
    "mul_",
}
_JOINING |= {torch.cat, torch.concat}


def never_negative(model: nn.Module, graph: fx.Graph) -> set[TensorQuantizer]:
    """The quantizers of ``model``, which ``graph`` calls, whose input has no negative value whatever the image is.

    A quantizer that the graph does not show (inside of a module that could not be traced) is not among them.
    """
    positive: set[fx.Node] = set()
    found: dict[TensorQuantizer, bool] = {}
    for node in graph.nodes:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        from_positive = bool(node.args) and node.args[0] in positive
        if (
            isinstance(module, _NEVER_NEGATIVE_MODULES)
            or _calls(node, _NEVER_NEGATIVE)
            or (
                from_positive
                and (isinstance(module, _KEEPING_MODULES) or _calls(node, _KEEPING) or _pads_with_zeros(node))
            )
            or (_calls(node, _JOINING) and _joins(node, positive))
        ):
            positive.add(node)
        quantizer = module if isinstance(module, TensorQuantizer) else getattr(module, "_input_quantizer", None)
        if isinstance(quantizer, TensorQuantizer):  # which may be called several times
            found[quantizer] = found.get(quantizer, True) and from_positive
    return {quantizer for quantizer, always in found.items() if always}


def _calls(node: fx.Node, targets: set[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _pads_with_zeros(node: fx.Node) -> bool:
    zeros = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
    return bool(_calls(node, {F.pad}) and len(node.args) <= 2 and zeros)


def _joins(node: fx.Node, positive: set[fx.Node]) -> bool:
    numbers = [value for value in node.args if isinstance(value, (int, float))]
    return positive.issuperset(node.all_input_nodes) and not node.kwargs and all(number >= 0 for number in numbers)
