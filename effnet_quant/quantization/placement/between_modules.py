"""Places quantizers on a traced graph: for additions, products, concatenations and functional pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_quant.quantization.operation_kinds import Kind, kind_of, kind_of_base
from effnet_quant.quantization.placement.gates import place_gates
from effnet_quant.quantization.placement.symbolic_trace import add_module, called_module, free_name
from effnet_quant.quantization.quantized_layers import input_quantizer, output_quantizer
from effnet_quant.quantization.spec import SpecLookup


def place_between_modules(model: nn.Module, graph: fx.Graph, spec: SpecLookup) -> None:
    """Put quantizers on the edges of ``graph``, as modules of ``model``. The layers of ``model`` have theirs already.

    - Addition: the shortcut. The operand that comes from a convolution stays in float and fuses with it.
    - Product of two tensors (squeeze-and-excitation): both operands.
    - Concatenation: all inputs, with one range.
    - Functional average pooling and means: the input.
    - Output of a convolution: an output quantizer, unless the value goes straight to other quantizers. An SiLU or
      hard-swish after an output quantizer rounds its gate.
    """
    placement = _Placement(model, graph, spec)
    placement.split_activations()
    for node in list(graph.nodes):
        tensors = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
        varying = len(tensors) == 2 and not any(map(placement.is_constant, tensors))
        if _does(node, Kind.ADDS) and varying:
            shortcut = placement.shortcut(*tensors)
            placement.quantize_operand(node, shortcut, "residual_quantizer", "add")
        elif _does(node, Kind.MULTIPLIES) and varying:
            placement.quantize_operand(node, tensors[0], "mul_a_quantizer", "mul")
            placement.quantize_operand(node, tensors[1], "mul_b_quantizer", "mul")
        elif _does(node, Kind.CONCATENATES):
            placement.quantize_concatenation(node)
        elif _does(node, Kind.AVERAGES):
            placement.quantize_operand(node, node.args[0], "pooling_quantizer", "pool")
    for node in list(graph.nodes):
        if placement.is_convolution(node):
            placement.quantize_output(node)
    place_gates(model, graph, rewrite=True)
    graph.lint()


def _does(node: fx.Node, kind: Kind) -> bool:
    """Whether the node calls a function or method of that kind."""
    return node.op in ("call_function", "call_method") and bool(kind_of(node.target) & kind)


def is_size(node: fx.Node) -> bool:
    """Whether the node asks for a value's shape, type or device."""
    asked = node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
    return asked or (node.op == "call_method" and node.target in ("size", "dim", "numel"))


def _value_users(node: fx.Node) -> list[fx.Node]:
    """The nodes that use the node's values; others ask for its size alone."""
    return [user for user in node.users if not is_size(user)]


def _is_number(node: fx.Node) -> bool:
    """Whether the node is an argument of the model that takes a number, by its annotation or its default."""
    numbers = (int, float, bool)
    return node.op == "placeholder" and (node.type in numbers or isinstance(next(iter(node.args), None), numbers))


class _Placement:
    """Edits a graph and adds the modules that its new nodes call."""

    def __init__(self, model: nn.Module, graph: fx.Graph, spec: SpecLookup) -> None:
        self._model = model
        self._graph = graph
        self._spec = spec
        self._operands: set[fx.Node] = set()  # quantized, or left in float by the spec
        self._constants: set[fx.Node] = set()
        for node in graph.nodes:
            inputs = node.all_input_nodes
            if (
                node.op == "get_attr"
                or is_size(node)
                or _is_number(node)
                or (inputs and self._constants.issuperset(inputs))
            ):
                self._constants.add(node)

    def is_convolution(self, node: fx.Node) -> bool:
        module = called_module(self._model, node)
        return isinstance(module, nn.Conv2d) and hasattr(module, "_weight_quantizer")

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the value is no activation: a size, a number, or a learned scale. Products with a scale stay in float."""
        return node in self._constants

    def shortcut(self, first: fx.Node, second: fx.Node) -> fx.Node:
        """The operand of an addition that does not come straight from a convolution.

        If neither or both do, the first: it is the older value in models that write ``shortcut + x``.
        """
        return first if self._fuses(second) or not self._fuses(first) else second

    def _fuses(self, node: fx.Node) -> bool:
        """Whether the value comes from a convolution or its BatchNorm and has no other use."""
        while len(node.users) == 1:
            module = called_module(self._model, node)
            if self.is_convolution(node):
                return True
            passes = isinstance(module, (_BatchNorm, nn.Identity, nn.Dropout)) or (
                module is not None and type(module).__name__ == "DropPath"
            )
            if not passes or not isinstance(node.args[0], fx.Node):
                return False
            node = node.args[0]
        return False

    def quantize_operand(self, node: fx.Node, operand: Any, name: str, operation: str) -> None:
        if not isinstance(operand, fx.Node):
            return
        path = free_name(self._model, node, name)
        add_module(self._model, path, input_quantizer(self._spec, path, operation))
        with self._graph.inserting_before(node):
            quantized = self._graph.call_module(path, (operand,))
        self._operands.add(quantized)
        node.args = tuple(quantized if argument is operand else argument for argument in node.args)

    def quantize_concatenation(self, node: fx.Node) -> None:
        inputs = node.args[0]
        if not isinstance(inputs, (list, tuple)):
            return
        path = free_name(self._model, node, "concat_quantizer")
        add_module(self._model, path, input_quantizer(self._spec, path, "concat"))
        with self._graph.inserting_before(node):
            quantized = [self._graph.call_module(path, (value,)) for value in inputs]
        self._operands.update(quantized)
        node.args = (quantized, *node.args[1:])

    def split_activations(self) -> None:
        """Split timm's modules of BatchNorm and activation, so that a quantizer fits in between.

        The module becomes a plain BatchNorm, and the graph calls its children ``drop`` and ``act`` after it.
        """
        for node in list(self._graph.nodes):
            module = called_module(self._model, node)
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
        """Put an output quantizer after a convolution, its BatchNorm and any activation that only clips.

        None is put where the value goes only to other quantizers, or only to the model's output.
        """
        value = self._follow(node, lambda user: isinstance(called_module(self._model, user), nn.BatchNorm2d))
        value = self._follow(value, lambda user: self._commutes(user, Kind.CLIPS))
        end = self._follow(value, lambda user: self._commutes(user, Kind.CLIPS | Kind.MOVES))
        users = _value_users(end)
        if all(map(self._quantizes, users)) or all(user.op == "output" for user in users):
            return
        convolution = called_module(self._model, node)
        assert convolution is not None
        path = free_name(self._model, node, "output")
        quantizer = output_quantizer(self._spec, path, convolution)
        if isinstance(quantizer, nn.Identity):
            return
        add_module(self._model, path, quantizer)
        with self._graph.inserting_after(value):
            rounded = self._graph.call_module(path, (value,))
        value.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)

    def _follow(self, node: fx.Node, passes: Callable[[fx.Node], bool]) -> fx.Node:
        """The end of the chain from ``node`` through single users for which ``passes`` is true."""
        while len(users := _value_users(node)) == 1 and passes(users[0]):
            node = users[0]
        return node

    def _commutes(self, node: fx.Node, kind: Kind) -> bool:
        """Whether the node calls a function, method or module of that kind."""
        module = called_module(self._model, node)
        return _does(node, kind) if module is None else bool(kind_of_base(type(module)) & kind)

    def _quantizes(self, node: fx.Node) -> bool:
        return node in self._operands or hasattr(called_module(self._model, node), "_input_quantizer")
