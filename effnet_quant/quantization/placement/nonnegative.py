"""Finds the quantizers that negative values never reach, from what stands before them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from effnet_quant.quantization.output_quantizer import OutputQuantizer
from effnet_quant.quantization.quantized_layers import QuantAdaptiveAvgPool2d, QuantAvgPool2d
from effnet_quant.quantization.quantizer import TensorQuantizer

# What has no negative results; these very classes, because one that is derived from them may do anything.
_NEVER_NEGATIVE_MODULES = {nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax}
_NEVER_NEGATIVE = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", F.relu6}
_NEVER_NEGATIVE |= {torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_", F.hardsigmoid, torch.softmax, F.softmax, "softmax"}
# What only picks, moves, averages or rounds the values of its first argument.
_KEEPING_MODULES = {
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, QuantAvgPool2d, QuantAdaptiveAvgPool2d, nn.Identity, nn.Dropout,
    nn.Flatten, TensorQuantizer, OutputQuantizer,
}  # fmt: skip
_KEEPING = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, "mean", torch.flatten, "flatten", "view"}
_KEEPING |= {"reshape", "permute", "transpose", "contiguous", "chunk", torch.chunk, torch.transpose, torch.permute}
_KEEPING |= {operator.getitem, F.dropout, torch.unsqueeze, "unsqueeze", torch.squeeze, "squeeze"}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.ipow}
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
_CONCATENATIONS = {torch.cat, torch.concat}


def never_negative(model: nn.Module, graph: fx.Graph, opaque: Sequence[str]) -> set[TensorQuantizer]:
    """The quantizers of ``model``, which ``graph`` calls, whose input has no negative value whatever the image is.

    Those inside of the ``opaque`` modules, which could not be traced, are not among them.
    """
    positive: set[fx.Node] = set()
    found: dict[TensorQuantizer, bool] = {}
    for node in graph.nodes:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        from_positive = bool(node.args) and node.args[0] in positive
        kind = None if module is None or _has_hooks(module) else type(module)
        if (
            kind in _NEVER_NEGATIVE_MODULES
            or _calls(node, _NEVER_NEGATIVE)
            or (from_positive and (kind in _KEEPING_MODULES or _calls(node, _KEEPING) or _pads_with_zeros(node)))
            or (_calls(node, _JOINING) and _joins(node, positive))
            or (_calls(node, _CONCATENATIONS) and positive.issuperset(node.all_input_nodes))
        ):
            positive.add(node)
        elif _writes_in_place(node, module):
            # perhaps negative values, into its input and whatever shares memory with it
            return set()
        quantizer = module if isinstance(module, TensorQuantizer) else getattr(module, "_input_quantizer", None)
        if isinstance(quantizer, TensorQuantizer):  # which may be called several times
            found[quantizer] = found.get(quantizer, True) and from_positive
    hidden = {module for name in opaque for module in model.get_submodule(name).modules()}
    return {quantizer for quantizer, always in found.items() if always and quantizer not in hidden}


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _writes_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the node may write into a value that something else has found free of negative ones."""
    if node.op == "call_method" and str(node.target).endswith("_"):
        return True
    within = getattr(module, "inplace", False) or node.kwargs.get("inplace") or _calls(node, _IN_PLACE)
    return bool(within) and len(node.all_input_nodes[0].users) > 1


def _calls(node: fx.Node, targets: set[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _pads_with_zeros(node: fx.Node) -> bool:
    zeros = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
    return bool(_calls(node, {F.pad}) and len(node.args) <= 2 and zeros)


def _joins(node: fx.Node, positive: set[fx.Node]) -> bool:
    numbers = [value for value in node.args if isinstance(value, (int, float))]
    return positive.issuperset(node.all_input_nodes) and not node.kwargs and all(number >= 0 for number in numbers)
