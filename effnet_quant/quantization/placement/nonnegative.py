"""Finds the quantizers that negative values never reach, from the operations before them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx, nn
from torch.nn import functional as F

from effnet_quant.quantization.operation_kinds import Kind, kind_of
from effnet_quant.quantization.placement.symbolic_trace import called_module
from effnet_quant.quantization.quantizer import TensorQuantizer

# If the first operand is never negative, the result of these kinds is never negative.
_KEEPING = Kind.MOVES | Kind.AVERAGES | Kind.ROUNDS
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.ipow}


def never_negative(model: nn.Module, graph: fx.Graph, opaque: Sequence[str]) -> set[TensorQuantizer]:
    """The quantizers of ``model`` whose input is never negative, for any image.

    Args:
        model: quantized.
        graph: calls the modules of ``model``.
        opaque: names of the modules that could not be traced. Their quantizers are left out.
    """
    positive: set[fx.Node] = set()
    found: dict[TensorQuantizer, bool] = {}
    for node in graph.nodes:
        module = called_module(model, node)
        from_positive = bool(node.args) and node.args[0] in positive
        kind = _kind(node, module)
        if (
            kind & Kind.NEVER_NEGATIVE
            or (from_positive and (kind & _KEEPING or _pads_with_zeros(node)))
            or (kind & (Kind.ADDS | Kind.MULTIPLIES) and _joins(node, positive))
            or (kind & Kind.CONCATENATES and positive.issuperset(node.all_input_nodes))
        ):
            positive.add(node)
        elif _writes_in_place(node, module):
            # It may write negative values into its input and into all that shares memory with that.
            return set()
        quantizer = module if isinstance(module, TensorQuantizer) else getattr(module, "_input_quantizer", None)
        if isinstance(quantizer, TensorQuantizer):  # it may be called several times
            found[quantizer] = found.get(quantizer, True) and from_positive
    hidden = {module for name in opaque for module in model.get_submodule(name).modules()}
    return {quantizer for quantizer, always in found.items() if always and quantizer not in hidden}


def _kind(node: fx.Node, module: nn.Module | None) -> Kind:
    """The kind of the operation that the node calls; ``Kind(0)`` for a module with hooks, which may change its output."""
    if module is not None:
        hooked = module._forward_hooks or module._forward_pre_hooks
        return Kind(0) if hooked else kind_of(type(module))
    return kind_of(node.target) if node.op in ("call_function", "call_method") else Kind(0)


def _writes_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the node may write into a value that other nodes use and that was found never negative."""
    if node.op == "call_method" and str(node.target).endswith("_"):
        return True
    within = getattr(module, "inplace", False) or node.kwargs.get("inplace") or node.target in _IN_PLACE
    return bool(within) and len(node.all_input_nodes[0].users) > 1


def _pads_with_zeros(node: fx.Node) -> bool:
    zeros = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
    return bool(node.target is F.pad and len(node.args) <= 2 and zeros)


def _joins(node: fx.Node, positive: set[fx.Node]) -> bool:
    numbers = [value for value in node.args if isinstance(value, (int, float))]
    return positive.issuperset(node.all_input_nodes) and not node.kwargs and all(number >= 0 for number in numbers)
