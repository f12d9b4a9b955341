"""Quantizers for the operations between modules: additions, products, concatenations, pooling, on a traced graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.range_tracker import RangeTracker
from effnet_quant.quantization.spec import QuantSpec

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MUL = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_CAT = {torch.cat, torch.concat}
_POOL = {F.adaptive_avg_pool2d, F.avg_pool2d, torch.mean, "mean"}


def place_between_modules(model: nn.Module, graph: fx.Graph, spec: QuantSpec) -> None:
    """Put quantizers on the edges of ``graph``, and range trackers behind its convolutions, as modules of ``model``.

    - Addition: the shortcut's operand; the one that comes from a convolution stays in float and fuses with it.
    - Product of two tensors (squeeze-and-excitation): both operands.
    - Concatenation: all inputs, with one range.
    - Functional average pooling and means: the input.
    """
    placement = _Placement(model, graph, spec)
    for node in list(graph.nodes):
        tensors = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
        if _is(node, _ADD) and len(tensors) == 2:
            shortcut = placement.shortcut(*tensors)
            placement.quantize_operand(node, shortcut, "residual_quantizer")
        elif _is(node, _MUL) and len(tensors) == 2 and not any(map(placement.is_parameter, tensors)):
            placement.quantize_operand(node, tensors[0], "mul_a_quantizer")
            placement.quantize_operand(node, tensors[1], "mul_b_quantizer")
        elif _is(node, _CAT):
            placement.quantize_concatenation(node)
        elif _is(node, _POOL):
            placement.quantize_operand(node, node.args[0], "pooling_quantizer")
        elif placement.is_convolution(node):
            placement.track_output(node)
    graph.lint()


def _is(node: fx.Node, targets: set[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


class _Placement:
    """Edits a graph and adds the modules that its new nodes call."""

    def __init__(self, model: nn.Module, graph: fx.Graph, spec: QuantSpec) -> None:
        self._model = model
        self._graph = graph
        self._spec = spec

    def module(self, node: fx.Node) -> nn.Module | None:
        return self._model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def is_convolution(self, node: fx.Node) -> bool:
        return hasattr(self.module(node), "_weight_quantizer")

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether the value depends on no input: a product with a learned scale, say, is fused and stays in float."""
        inputs = node.all_input_nodes
        return node.op == "get_attr" or (bool(inputs) and all(self.is_parameter(value) for value in inputs))

    def shortcut(self, first: fx.Node, second: fx.Node) -> fx.Node:
        """The operand of an addition that does not come straight from a convolution (the first if neither or both do:
        it is the older value where models write ``x += shortcut`` the other way round)."""
        return first if self._fuses(second) or not self._fuses(first) else second

    def _fuses(self, node: fx.Node) -> bool:
        """Whether the value is a convolution's, or its BatchNorm's, and serves nothing else."""
        while len(node.users) == 1:
            module = self.module(node)
            if self.is_convolution(node):
                return True
            passes = isinstance(module, (_BatchNorm, nn.Identity, nn.Dropout, RangeTracker)) or (
                module is not None and type(module).__name__ == "DropPath"
            )
            if not passes or not isinstance(node.args[0], fx.Node):
                return False
            node = node.args[0]
        return False

    def quantize_operand(self, node: fx.Node, operand: Any, name: str) -> None:
        if not isinstance(operand, fx.Node):
            return
        quantizer = self._add_module(node, name, lambda: TensorQuantizer(self._spec.activation))
        with self._graph.inserting_before(node):
            quantized = self._graph.call_module(quantizer, (operand,))
        node.args = tuple(quantized if argument is operand else argument for argument in node.args)

    def quantize_concatenation(self, node: fx.Node) -> None:
        inputs = node.args[0]
        if not isinstance(inputs, (list, tuple)):
            return
        shared = self._add_module(node, "concat_quantizer", lambda: TensorQuantizer(self._spec.activation))
        with self._graph.inserting_before(node):
            quantized = [self._graph.call_module(shared, (value,)) for value in inputs]
        node.args = (quantized, *node.args[1:])

    def track_output(self, node: fx.Node) -> None:
        """A range tracker behind the convolution, or behind the plain BatchNorm that alone uses it."""
        user = next(iter(node.users), None)
        if len(node.users) == 1 and user is not None and isinstance(self.module(user), _BatchNorm):
            if type(self.module(user)) is not nn.BatchNorm2d:
                return  # the activation is inside; what follows bounds the range
            node = user
        tracker = self._add_module(node, "output", RangeTracker)
        with self._graph.inserting_after(node):
            tracked = self._graph.call_module(tracker, (node,))
        node.replace_all_uses_with(tracked, delete_user_cb=lambda other: other is not tracked)

    def _add_module(self, node: fx.Node, name: str, build: Callable[[], nn.Module]) -> str:
        """Add a module beside the node's own (in the module whose forward it belongs to); returns its path."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack]
        owner = paths[-1] if paths else ""
        if node.op == "call_module":
            owner = str(node.target).rpartition(".")[0]
            name = f"{str(node.target).rpartition('.')[2]}_{name}"
        parent = self._model.get_submodule(owner)
        unique, count = name, 1
        while hasattr(parent, unique):
            unique, count = f"{name}_{count}", count + 1
        parent.add_module(unique, build().to(next(self._model.parameters()).device))
        return f"{owner}.{unique}" if owner else unique
