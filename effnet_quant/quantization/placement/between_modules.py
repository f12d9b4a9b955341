"""Quantizers for the operations between modules: additions, products, concatenations, pooling, on a traced graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_quant.quantization.output_quantizer import OutputQuantizer
from effnet_quant.quantization.quantized_layers import layer_operation, quant_gate
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.spec import QuantSpec

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MUL = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_CAT = {torch.cat, torch.concat}
_POOL = {F.adaptive_avg_pool2d, F.avg_pool2d, torch.mean, "mean"}
# Activations that keep the order of values and clip only: rounding may come before or after them.
_CLIPPING = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", F.relu6, F.hardtanh, torch.clamp, "clamp"}
_CLIPPING_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
# What only picks or moves values.
_MOVING = {F.max_pool2d, torch.flatten, "flatten", "view", "reshape", "permute", "transpose", "contiguous", "chunk"}
_MOVING |= {torch.chunk, torch.transpose, torch.permute, operator.getitem}
_MOVING_MODULES = (nn.MaxPool2d, nn.Identity, nn.Dropout, nn.Flatten)


def place_between_modules(model: nn.Module, graph: fx.Graph, spec: QuantSpec) -> dict[OutputQuantizer, nn.Module]:
    """Put quantizers on the edges of ``graph``, as modules of ``model``.

    - Addition: the shortcut's operand; the one that comes from a convolution stays in float and fuses with it.
    - Product of two tensors (squeeze-and-excitation): both operands.
    - Concatenation: all inputs, with one range.
    - Functional average pooling and means: the input.
    - Output of a convolution: an OutputQuantizer, unless the next quantizer on its way rounds it anyway.

    Returns:
        The convolution of every OutputQuantizer.
    """
    placement = _Placement(model, graph, spec)
    placement.split_activations()
    for node in list(graph.nodes):
        tensors = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
        varying = len(tensors) == 2 and not any(map(placement.is_constant, tensors))
        if _is(node, _ADD) and varying:
            shortcut = placement.shortcut(*tensors)
            placement.quantize_operand(node, shortcut, "residual_quantizer", "add")
        elif _is(node, _MUL) and varying:
            placement.quantize_operand(node, tensors[0], "mul_a_quantizer", "mul")
            placement.quantize_operand(node, tensors[1], "mul_b_quantizer", "mul")
        elif _is(node, _CAT):
            placement.quantize_concatenation(node)
        elif _is(node, _POOL):
            placement.quantize_operand(node, node.args[0], "pooling_quantizer", "pool")
    for node in list(graph.nodes):
        if placement.is_convolution(node):
            placement.quantize_output(node)
    graph.lint()
    return placement.layers


def _is(node: fx.Node, targets: set[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _is_size(node: fx.Node) -> bool:
    asked = node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
    return asked or (node.op == "call_method" and node.target in ("size", "dim", "numel"))


class _Placement:
    """Edits a graph and adds the modules that its new nodes call."""

    def __init__(self, model: nn.Module, graph: fx.Graph, spec: QuantSpec) -> None:
        self._model = model
        self._graph = graph
        self._spec = spec
        self.layers: dict[OutputQuantizer, nn.Module] = {}
        self._constants: set[fx.Node] = set()
        for node in graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr" or _is_size(node) or (inputs and self._constants.issuperset(inputs)):
                self._constants.add(node)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self._model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def is_convolution(self, node: fx.Node) -> bool:
        module = self.module(node)
        return isinstance(module, nn.Conv2d) and hasattr(module, "_weight_quantizer")

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the value depends on no pixel: a learned scale, whose product is fused and stays in float, or a size."""
        return node in self._constants

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
            passes = isinstance(module, (_BatchNorm, nn.Identity, nn.Dropout, OutputQuantizer)) or (
                module is not None and type(module).__name__ == "DropPath"
            )
            if not passes or not isinstance(node.args[0], fx.Node):
                return False
            node = node.args[0]
        return False

    def quantize_operand(self, node: fx.Node, operand: Any, name: str, operation: str) -> None:
        if not isinstance(operand, fx.Node):
            return
        quantizer = self._add_module(node, name, lambda: TensorQuantizer(self._spec.activation, operation=operation))
        with self._graph.inserting_before(node):
            quantized = self._graph.call_module(quantizer, (operand,))
        node.args = tuple(quantized if argument is operand else argument for argument in node.args)

    def quantize_concatenation(self, node: fx.Node) -> None:
        inputs = node.args[0]
        if not isinstance(inputs, (list, tuple)):
            return
        shared = self._add_module(
            node, "concat_quantizer", lambda: TensorQuantizer(self._spec.activation, operation="concat")
        )
        with self._graph.inserting_before(node):
            quantized = [self._graph.call_module(shared, (value,)) for value in inputs]
        node.args = (quantized, *node.args[1:])

    def split_activations(self) -> None:
        """Take timm's BatchNorm-with-activation modules apart, so that a quantizer can sit in between: the BatchNorm
        becomes a plain one, and the graph calls its children ``drop`` and ``act`` after it."""
        for node in list(self._graph.nodes):
            module = self.module(node)
            if not isinstance(module, nn.BatchNorm2d) or not isinstance(getattr(module, "act", None), nn.Module):
                continue
            module.__class__ = nn.BatchNorm2d
            value = node
            for name in ("drop", "act"):
                if not isinstance(getattr(module, name, None), (nn.Identity, type(None))):
                    with self._graph.inserting_after(value):
                        following = self._graph.call_module(f"{node.target}.{name}", (value,))
                    value.replace_all_uses_with(following, delete_user_cb=lambda user, own=following: user is not own)
                    value = following

    def quantize_output(self, node: fx.Node) -> None:
        """An OutputQuantizer behind the convolution, its BatchNorm and an activation that only clips; none where all
        that follows is the quantizers of one value, or the model's output. An SiLU or hard-swish behind it follows its
        rounding."""
        value = self._follow(node, (nn.BatchNorm2d,), set())
        value = self._follow(value, _CLIPPING_MODULES, _CLIPPING)
        end = self._follow(value, _CLIPPING_MODULES + _MOVING_MODULES, _CLIPPING | _MOVING)
        if all(self._quantizes(user) for user in end.users) or all(user.op == "output" for user in end.users):
            return
        convolution = self.module(node)
        assert convolution is not None
        rounding = OutputQuantizer(layer_operation(convolution))
        self.layers[rounding] = convolution
        quantizer = self._add_module(node, "output", lambda: rounding)
        with self._graph.inserting_after(value):
            rounded = self._graph.call_module(quantizer, (value,))
        value.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)
        for user in list(rounded.users):
            twin = quant_gate(self.module(user), rounding)
            if twin is not None:
                self._model.set_submodule(str(user.target), twin)

    def _follow(self, node: fx.Node, modules: tuple[type[nn.Module], ...], functions: set[Any]) -> fx.Node:
        """The last value on the only way from ``node`` through such modules and functions."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            if not (isinstance(self.module(user), modules) or _is(user, functions)):
                break
            node = user
        return node

    def _quantizes(self, node: fx.Node) -> bool:
        module = self.module(node)
        return isinstance(module, TensorQuantizer) or hasattr(module, "_input_quantizer")

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
        parent.add_module(unique, build().train(parent.training).to(next(self._model.parameters()).device))
        return f"{owner}.{unique}" if owner else unique
