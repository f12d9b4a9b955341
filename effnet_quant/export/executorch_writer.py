"""ExecutorchWriter: writes a traced graph as PyTorch operations that XNNPACK's partitioner knows, after the passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  # defines torch.ops.quantized_decomposed

from effnet_quant.export.custom_ops import CONV_PADDED, CONV_SAME, QUANTIZE
from effnet_quant.export.traced_graph import Grid, TracedGraph, argument, is_layer, kind_of, shape_of
from effnet_quant.quantization.operation_kinds import Kind

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed
_SHIFT = 128  # from uint8 to int8
_LOW, _HIGH = -128, 127


class ExecutorchWriter:
    """Writes the operations of a graph as a module for torch.export.

    Args:
        traced: the graph, of one image input.
    """

    def __init__(self, traced: TracedGraph) -> None:
        self.traced = traced
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.values: dict[fx.Node, fx.Node] = {}
        self.integers: dict[fx.Node, fx.Node] = {}  # of quantized values

    def run(self) -> fx.GraphModule:
        """Write every node; returns a module that takes and returns what the graph does."""
        for number, node in enumerate(self.traced.inputs):
            self.values[node] = self.graph.placeholder(f"input_{number}")
        for node in self.traced.operations():
            if node.target is QUANTIZE:
                if node.args[0] not in self.traced.constants:
                    self._quantize(node)
            elif Kind.CONVOLVES in kind_of(node):
                self.values[node] = self._convolution(node)
            else:
                args: list[Any] = []
                if is_layer(node):
                    assert isinstance(node.args[0], fx.Node)
                    args = [self._value(node.args[0]), *self._parameters(node)]
                else:
                    args = list(fx.map_arg(tuple(node.args), self._value))
                kwargs = fx.map_arg(dict(node.kwargs), self._value)
                # quantized_decomposed keeps strides that the traced operations did not; a view needs others
                target = aten.reshape.default if node.target is aten.view.default else node.target
                self.values[node] = self.graph.call_function(target, tuple(args), kwargs)  # type: ignore[arg-type]
        self.graph.output(tuple(self._value(node) for node in self.traced.outputs))
        return fx.GraphModule(self.root, self.graph)

    def _quantize(self, node: fx.Node) -> None:
        """Round to int8. Narrower bounds are clipped in front, because XNNPACK's kernels saturate at those of int8 alone."""
        grid = self.traced.grid(node)
        assert isinstance(node.args[0], fx.Node)
        source = self._value(node.args[0])
        low, high = (bound - _shift(grid) for bound in (grid.low, grid.high))
        if (low, high) != (_LOW, _HIGH):
            ends = [float((bound - grid.zero_point) * grid.scale) for bound in (grid.low, grid.high)]
            source = self.graph.call_function(aten.hardtanh.default, (source, *ends))
        self.integers[node] = self._rounded(source, grid)

    def _rounded(self, source: fx.Node, grid: Grid) -> fx.Node:
        return self.graph.call_function(
            decomposed.quantize_per_tensor.default, (source, *_integers(grid), _LOW, _HIGH, torch.int8)
        )

    def _in_float(self, integers: fx.Node, grid: Grid) -> fx.Node:
        return self.graph.call_function(
            decomposed.dequantize_per_tensor.default, (integers, *_integers(grid), _LOW, _HIGH, torch.int8)
        )

    def _value(self, node: fx.Node) -> fx.Node:
        """A value as its users take it. Each user of integers has a dequantize node of its own, as partitions need it."""
        if node in self.integers:
            return self._in_float(self.integers[node], self.traced.grid(node))
        if node not in self.values:
            self.values[node] = self._constant(node.name, self._number(node))
        return self.values[node]

    def _number(self, node: fx.Node) -> Tensor:
        """The value of a constant, rounded if it is quantized."""
        if node.target is not QUANTIZE:
            return self.traced.constants[node]
        integers, steps, zero_point = self._stored(node)
        return ((integers.double() - zero_point) * steps).float()

    def _stored(self, node: fx.Node) -> tuple[Tensor, Tensor, int]:
        """The integers of a quantized constant, their scales in its shape, and the zero point."""
        grid, value = self.traced.grid(node), self.traced.constants[node.args[0]].double()  # type: ignore[index]
        scale = grid.scale.double()
        if value.ndim and scale.numel() > 1:
            scale = scale.reshape((-1,) + (1,) * (value.ndim - 1))
        integers = torch.clamp(torch.round(value / scale) + grid.zero_point, grid.low, grid.high)
        return integers, scale, grid.zero_point

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        taken = f"{name}_{len(list(self.root.buffers()))}".replace(".", "_")
        self.root.register_buffer(taken, value.contiguous())
        return self.graph.get_attr(taken)

    def _on_integers(self, layer: fx.Node) -> bool:
        """Whether XNNPACK takes a layer on integers: quantized input and weights, and a quantize node as its only user."""
        users = list(layer.users)
        return (
            self.traced.is_byte(layer.args[0])
            and self.traced.quantized_weights(layer) is not None
            and len(users) == 1
            and self.traced.is_byte(users[0])
        )

    def _parameters(self, layer: fx.Node) -> list[fx.Node | None]:
        """Weights and bias of a layer."""
        weight, bias = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
        assert isinstance(weight, fx.Node)
        if not self._on_integers(layer):
            written: fx.Node = self._value(weight)
        else:
            integers, scale, _ = self._stored(weight)  # a layer's weights have zero point 0
            scales = scale.flatten().float().expand(len(integers))
            name = weight.args[0].name if isinstance(weight.args[0], fx.Node) else "weight"
            tensors = (integers.to(torch.int8), scales, torch.zeros(len(integers), dtype=torch.int64))
            nodes = [self._constant(name, tensor) for tensor in tensors]
            written = self.graph.call_function(
                decomposed.dequantize_per_channel.default, (*nodes, 0, _LOW, _HIGH, torch.int8)
            )
        return [written, self._value(bias) if isinstance(bias, fx.Node) else None]

    def _convolution(self, node: fx.Node) -> fx.Node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        x, (weight, bias) = self._value(source), self._parameters(node)
        if node.target not in (CONV_SAME, CONV_PADDED):
            rest = list(node.args[3:])
            return self.graph.call_function(node.target, (x, weight, bias, *rest), node.kwargs)  # type: ignore[arg-type]
        sizes = [int(size) for size in shape_of(node.args[1])[2:]]
        dims = len(sizes)
        stride, groups = argument(node, "stride"), argument(node, "groups")
        if node.target is CONV_PADDED:
            padding, dilation = list(argument(node, "padding")), argument(node, "dilation")
            begins, ends = padding[:dims], padding[dims:]
        else:
            dilation = [1] * dims
            begins, ends = [], []
            for size, length, step in zip(shape_of(source)[2:], sizes, stride, strict=True):
                missing = 0 if length == 1 else (int(size) - 1) // step * step + length - int(size)
                begins.append(missing // 2)
                ends.append(missing - missing // 2)
        if begins != ends:
            x = self._padded(x, source, begins, ends)
            begins = [0] * dims
        target = aten.conv2d.default if dims == 2 else aten.conv1d.default
        return self.graph.call_function(target, (x, weight, bias, stride, begins, dilation, groups))

    def _padded(self, x: fx.Node, source: fx.Node, begins: list[int], ends: list[int]) -> fx.Node:
        """Zeros around a value, as integers where the value is."""
        pads: list[int] = []
        for begin, end in zip(begins, ends, strict=True):
            pads = [begin, end, *pads]  # PyTorch lists the last dimension first
        padded = self.graph.call_function(aten.constant_pad_nd.default, (x, pads, 0.0))
        if not self.traced.is_byte(source):
            return padded
        grid = self.traced.grid(source)
        return self._in_float(self._rounded(padded, grid), grid)


def _shift(grid: Grid) -> int:
    """From the grid's integers to int8."""
    return _SHIFT if grid.high > _HIGH else 0


def _integers(grid: Grid) -> tuple[Any, ...]:
    """Scale and zero point in int8."""
    return float(grid.scale), grid.zero_point - _shift(grid)
