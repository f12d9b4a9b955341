"""TracedGraph: the operations of a model as a flat graph, which passes change and writers write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from effnet_quant.export.custom_ops import CUSTOM_KINDS, QUANTIZE
from effnet_quant.quantization import operation_kinds
from effnet_quant.quantization.operation_kinds import Kind

aten = torch.ops.aten
LAYERS = (aten.linear.default,)  # with convolutions, the operations that have weights


@dataclass(frozen=True)
class Grid:
    """The grid of a quantized value: real number = (integer - zero_point) * scale, with low <= integer <= high.

    Attributes:
        scale: of shape (), or for weights one entry per output channel.
        zero_point: the integer that stands for 0.0.
        low: the smallest integer.
        high: the largest integer.
    """

    scale: Tensor
    zero_point: int
    low: int
    high: int

    @property
    def wide(self) -> bool:
        """Whether it has more integers than 8 bits hold."""
        return self.high - self.low > 255

    @property
    def narrow(self) -> bool:
        """Whether it has at most 4 bits and zero point 0. One with turned signs, up to 8, is narrow too."""
        return self.zero_point == 0 and self.low >= -8 and self.high <= 8

    def same_as(self, other: Grid) -> bool:
        """Whether scale, zero point and bounds are equal."""
        integers = (self.zero_point, self.low, self.high) == (other.zero_point, other.low, other.high)
        return integers and torch.equal(self.scale, other.scale)


class TracedGraph:
    """The operations of a model in eval mode, in order, and its parameters as constants.

    Args:
        graph: placeholders are the model's inputs, parameters and buffers. The target of each ``call_function`` node is an
            ATen overload, an operation of custom_ops.py or ``operator.getitem``. The output node lists tensors.
        inputs: the placeholders of the model's inputs, in order.
        constants: values of nodes that depend on no input.
        structure: the model's return value, with each tensor replaced by its position in ``outputs``.
    """

    def __init__(
        self, graph: fx.Graph, inputs: list[fx.Node], constants: dict[fx.Node, Tensor], structure: Any = 0
    ) -> None:
        self.graph = graph
        self.inputs = inputs
        self.constants = constants
        self.structure = structure

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes that compute the model's results, in order."""
        return list(self.graph.output_node().args[0])  # type: ignore[arg-type]

    def operations(self) -> Iterator[fx.Node]:
        """The operations that depend on the inputs, in order. The graph may be changed during the iteration."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node not in self.constants:
                yield node

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """Add a constant as a placeholder; returns its node."""
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder("p_" + name.replace(".", "_"))
        node.meta["val"] = value
        self.constants[node] = value
        return node

    def insert_after(self, place: fx.Node, target: Any, args: tuple[Any, ...], like: fx.Node, path: str) -> fx.Node:
        """Add an operation behind ``place``.

        Args:
            place: the node in front of it.
            target: the operation.
            args: its arguments.
            like: a node whose result has the same shape and dtype.
            path: names the node in the file.
        """
        with self.graph.inserting_after(place):
            node = self.graph.call_function(target, args)
        node.meta = {"val": like.meta["val"], "path": path}
        return node

    def quantize(self, x: fx.Node, grid: Grid, path: str) -> fx.Node:
        """Add a quantize node behind ``x``; behind all placeholders if ``x`` is one of them."""
        scale = self.constant(f"{path}.scale", grid.scale)
        place = x if x.op != "placeholder" else [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        return self.insert_after(place, QUANTIZE, (x, scale, grid.zero_point, grid.low, grid.high), x, path)

    def is_quantized(self, value: Any) -> bool:
        """Whether ``value`` is a quantize node of a value that depends on the inputs. Numbers and None are not."""
        return isinstance(value, fx.Node) and value.target is QUANTIZE and value.args[0] not in self.constants

    def is_byte(self, value: Any) -> bool:
        """Whether ``value`` is quantized to 8 bits or fewer, as integer kernels need it."""
        return self.is_quantized(value) and not self.grid(value).wide

    def grid(self, node: fx.Node) -> Grid:
        """The grid of a quantize node."""
        _, scale, zero_point, low, high = node.args
        return Grid(self.constants[scale], zero_point, low, high)  # type: ignore[index,arg-type]

    def set_grid(self, node: fx.Node, grid: Grid) -> None:
        """Give a quantize node another grid."""
        scale = node.args[1]
        if grid.scale is not self.constants[scale]:  # type: ignore[index]
            scale = self.constant(f"{module_path(node)}.scale", grid.scale)
        node.args = (node.args[0], scale, grid.zero_point, grid.low, grid.high)

    def quantized_weights(self, layer: fx.Node) -> tuple[Tensor, Grid] | None:
        """The weights of a quantized layer, and their grid; None for other operations."""
        weight, grid = (self.weights(layer) if is_layer(layer) else None) or (None, None)
        return None if weight is None or grid is None else (weight, grid)

    @property
    def has_wide_activations(self) -> bool:
        """Whether a value is quantized to more than 8 bits."""
        return any(self.is_quantized(node) and not self.is_byte(node) for node in self.operations())

    @property
    def has_narrow_weights(self) -> bool:
        """Whether a layer has weights of 4 bits or fewer."""
        found = [self.quantized_weights(node) for node in self.operations()]
        return any(weights is not None and weights[1].narrow for weights in found)

    def weights(self, layer: fx.Node) -> tuple[Tensor, Grid | None] | None:
        """The weights of a layer, and their grid or None. None if the weights are computed from the inputs."""
        weight = layer.args[1]
        assert isinstance(weight, fx.Node)
        grid = None
        if weight.target is QUANTIZE:
            grid = self.grid(weight)
            weight = _node(weight.args[0])
        return None if weight not in self.constants else (self.constants[weight].float(), grid)

    def set_weights(self, layer: fx.Node, weight: Tensor, grid: Grid | None) -> None:
        """Replace the weights of one layer. Layers that shared the old weights keep them."""
        path = f"{module_path(layer)}.weight"
        node = self.constant(path, weight)
        set_argument(layer, "weight", node if grid is None else self.quantize(node, grid, path))

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """Run the graph in its present state; returns the values of ``outputs``."""
        values = dict(zip(self.inputs, inputs, strict=True))
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        given = [values[node] if node in values else self.constants[node] for node in placeholders]
        with torch.no_grad():
            return list(fx.Interpreter(fx.GraphModule(nn.Module(), self.graph)).run(*given))


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def kind_of(node: fx.Node) -> Kind:
    """The kind of a node's operation; ``Kind(0)`` if no table lists it."""
    return CUSTOM_KINDS.get(node.target) or operation_kinds.kind_of(node.target)


def is_layer(node: fx.Node) -> bool:
    """Whether the node is a convolution or a linear layer."""
    return Kind.CONVOLVES in kind_of(node) or node.target in LAYERS


def module_path(node: fx.Node) -> str:
    """Dotted name of the module that a node comes from, e.g. "stem.conv". Nodes added by passes have names of their own."""
    if "path" in node.meta:
        return str(node.meta["path"])
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths else ""


def argument(node: fx.Node, name: str) -> Any:
    """The argument of that name in the schema of the node's operation, or its default.

    Raises:
        KeyError: it has none.
    """
    for position, entry in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if entry.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, entry.default_value)
    raise KeyError(name)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Change one argument of a node, by its name in the schema of the node's operation."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    position = next(index for index, entry in enumerate(schema) if entry.name == name)
    args = [argument(node, entry.name) for entry in schema[: max(position + 1, len(node.args))]]
    args[position] = value
    names = {entry.name for entry in schema[: len(args)]}
    node.args, node.kwargs = tuple(args), {key: kept for key, kept in node.kwargs.items() if key not in names}


def shape_of(value: Any) -> list[int | torch.SymInt]:
    """Sizes of a traced value; the batch is symbolic."""
    return list(value.meta["val"].shape)
