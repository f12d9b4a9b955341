"""Finds which layers write and which read each channel of a model's values, and what may scale a channel in between.

A stream is a set of channels that must share one scale: those of one value before and after a ReLU, or of all values that a
residual shortcut joins. Where the layers that write a stream multiply it by 1 / s and those that read it by s, the network
computes the same. A stream is fixed where it meets an operation for which that isn't true, such as SiLU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional as F

from effnet_quant.quantization.biases import FoldedBatchNorm2d
from effnet_quant.quantization.eager_evaluation import Batch, device_of, eager_pass, model_arguments
from effnet_quant.quantization.operation_kinds import Kind, kind_of, kind_of_base
from effnet_quant.quantization.placement.between_modules import is_size
from effnet_quant.quantization.placement.symbolic_trace import called_module
from effnet_quant.quantization.ptq.batch_norm_folding import is_folded
from effnet_quant.quantization.quantized_layers import QuantConv2d, QuantLinear
from effnet_quant.quantization.quantizer import TensorQuantizer

Channels = NDArray[np.int64]  # (C,): the number of each channel's stream

CEILING = 6.0  # of ReLU6
_RELUS = (nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_RELU6S = (nn.ReLU6, F.relu6)


@dataclass(eq=False)
class Layer:
    """A convolution or linear layer, with the BatchNorm that engines fold into it.

    Attributes:
        name: of the layer.
        module: the layer.
        norm: the BatchNorm; None without.
        reads: streams of the input channels.
        writes: streams of the output channels.
        source: the node that computes the input.
        result: the node that computes the output, after the BatchNorm.
    """

    name: str
    module: QuantConv2d | QuantLinear
    norm: FoldedBatchNorm2d | None
    reads: Channels
    writes: Channels
    source: fx.Node
    result: fx.Node

    def input_streams(self) -> Channels:
        """The stream that each weight is multiplied with, of shape (output channels, input channels of a group)."""
        groups = self.module.groups if isinstance(self.module, QuantConv2d) else 1
        per_group = self.reads.reshape(groups, -1)
        return per_group.repeat(len(self.writes) // groups, axis=0)

    @torch.no_grad()
    def scale_output(self, factor: Tensor) -> None:
        """Multiply the output channels by ``factor`` (C,)."""
        if self.norm is not None and not is_folded(self.norm):
            self.norm.weight.mul_(factor)
            self.norm.bias.mul_(factor)
            return
        self.module.weight.mul_(factor.reshape(-1, *(1 for _ in self.module.weight.shape[1:])))
        for owner in (self.module, self.norm):
            if owner is not None and owner.bias is not None:
                owner.bias.mul_(factor)

    @torch.no_grad()
    def scale_input(self, factor: Tensor) -> None:
        """Multiply the weights by ``factor`` (output channels, input channels of a group)."""
        self.module.weight.mul_(factor.reshape(*factor.shape, *(1 for _ in self.module.weight.shape[2:])))


@dataclass
class Streams:
    """The result of ``find_streams``.

    Attributes:
        graph: of the model.
        layers: in the order in which they run.
        channels: of each node whose value has them in dimension 1.
        fixed: for each stream whether its scale must stay 1, of shape (number of streams,).
        rounded: the quantizers of activations, each with the nodes that compute their inputs.
        rectified: the nodes that compute the input of a ReLU.
        clipped: the nodes that compute the input of a ReLU6.
    """

    graph: fx.Graph
    layers: list[Layer] = field(default_factory=list)
    channels: dict[fx.Node, Channels] = field(default_factory=dict)
    fixed: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    rounded: dict[TensorQuantizer, list[fx.Node]] = field(default_factory=dict)
    rectified: list[fx.Node] = field(default_factory=list)
    clipped: list[fx.Node] = field(default_factory=list)


def find_streams(model: nn.Module, graph: fx.Graph, batch: Batch) -> Streams:
    """Follow the channels of every value through a quantized model.

    Args:
        model: a model that ``quantize`` has been through.
        graph: of the model in eval mode.
        batch: one batch, which shows the values' shapes.
    """
    arguments, _ = model_arguments(batch, device_of(model))
    finder = _Finder(model, graph)
    with eager_pass(model):
        finder.run(*arguments)
    return finder.result()


class _Finder(fx.Interpreter):
    """Runs the graph once and joins the channels that must share a scale."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(fx.GraphModule(model, graph))
        self._model = model
        self._calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self._parents: list[int] = []
        self._fixed: set[int] = set()
        self._shapes: dict[fx.Node, torch.Size] = {}
        self._streams = Streams(graph)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._shapes[n] = value.shape
        channels = None
        if n.op in ("call_module", "call_function", "call_method"):
            channels = self._after(n, called_module(self._model, n))
        if channels is None or n not in self._shapes or self._width(n) != len(channels):
            for source in () if is_size(n) else n.all_input_nodes:
                self._fix(source)
            channels = self._new(self._width(n))
            self._fixed.update(channels.tolist())
        self._streams.channels[n] = channels
        return value

    def result(self) -> Streams:
        found = self._streams
        numbers: dict[int, int] = {}
        for stream in range(len(self._parents)):
            numbers.setdefault(self._root(stream), len(numbers))
        final = np.array([numbers[self._root(stream)] for stream in range(len(self._parents))], dtype=np.int64)
        found.channels = {node: final[channels] for node, channels in found.channels.items()}
        found.fixed = np.zeros(len(numbers), bool)
        found.fixed[final[list(self._fixed)]] = True
        for layer in found.layers:
            layer.reads, layer.writes = found.channels[layer.source], found.channels[layer.result]
        return found

    def _after(self, node: fx.Node, module: nn.Module | None) -> Channels | None:
        """The channels of the node's result; None if the operation does not let scales pass."""
        source = node.args[0] if node.args else None
        if isinstance(module, (QuantConv2d, QuantLinear)):
            return self._after_layer(node, module)
        if isinstance(source, (list, tuple)):
            return self._after_concatenation(node, source)
        if not isinstance(source, fx.Node) or source not in self._shapes:
            return None
        if isinstance(module, FoldedBatchNorm2d):
            return self._after_batch_norm(node, source, module)
        if isinstance(module, TensorQuantizer):
            self._note(module, source)
            return self._streams.channels[source]
        return self._after_operation(node, source, module)

    def _after_operation(self, node: fx.Node, source: fx.Node, module: nn.Module | None) -> Channels | None:
        operation = node.target if module is None else type(module)
        kind = kind_of(operation) if module is None else kind_of_base(type(module))
        channels = self._streams.channels[source]
        if operation is F.pad:
            return self._after_padding(node, channels)
        if Kind.ADDS in kind or Kind.MULTIPLIES in kind:
            return self._after_sum_or_product(node, kind)
        if len(node.all_input_nodes) != 1:
            return None
        if operation in _RELUS:
            self._streams.rectified.append(source)
            return channels
        if type(module).__name__ == "DropPath":
            return channels
        if operation in _RELU6S:
            self._streams.clipped.append(source)
            return channels
        before, after = self._shapes[source], self._shapes.get(node, torch.Size())
        if Kind.AVERAGES in kind or Kind.IDENTITY in kind or (Kind.MOVES in kind and Kind.RESHAPES not in kind):
            quantizer = getattr(module, "_input_quantizer", None)
            if isinstance(quantizer, TensorQuantizer):
                self._note(quantizer, source)
            return channels if after[:2] == before[:2] else None
        flattens = Kind.RESHAPES in kind and len(after) == 2 and after[0] == before[0] and len(channels)
        return channels.repeat(after[1] // len(channels)) if flattens else None

    def _after_layer(self, node: fx.Node, module: QuantConv2d | QuantLinear) -> Channels | None:
        source = node.args[0]
        if (
            not isinstance(source, fx.Node)
            or type(module) not in (QuantConv2d, QuantLinear)
            or self._calls[node.target] > 1
            or (isinstance(module, QuantLinear) and len(self._shapes[source]) != 2)
        ):
            return None
        if isinstance(module._input_quantizer, TensorQuantizer):
            self._note(module._input_quantizer, source)
        writes = self._new(self._width(node))
        reads = self._streams.channels[source]
        self._streams.layers.append(Layer(str(node.target), module, None, reads, writes, source, node))
        return writes

    def _after_batch_norm(self, node: fx.Node, source: fx.Node, module: FoldedBatchNorm2d) -> Channels | None:
        layer = self._streams.layers[-1] if self._streams.layers else None
        if layer is None or layer.result is not source or layer.module is not module._layer[0]:
            return None
        layer.norm, layer.result = module, node
        return layer.writes

    def _after_sum_or_product(self, node: fx.Node, kind: Kind) -> Channels | None:
        first, second = (*node.args, None)[:2]
        if node.kwargs or not isinstance(first, fx.Node):
            return None
        if isinstance(second, (int, float)):
            return self._streams.channels[first] if Kind.MULTIPLIES in kind else None
        if not isinstance(second, fx.Node) or second not in self._shapes:
            return None
        if Kind.MULTIPLIES in kind:  # a gate of each channel: the product is scaled as the value is
            value, gate = (
                (first, second) if self._shapes[first].numel() > self._shapes[second].numel() else (second, first)
            )
            if self._shapes[value] == self._shapes[gate]:
                return None
            self._fix(gate)
            return self._streams.channels[value]
        if self._shapes[first] != self._shapes[second]:
            return None
        self._join(self._streams.channels[first], self._streams.channels[second])
        return self._streams.channels[first]

    def _after_concatenation(self, node: fx.Node, sources: Iterable[Any]) -> Channels | None:
        module_kind = kind_of(node.target)
        along = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if Kind.CONCATENATES not in module_kind or along != 1:
            return None
        return np.concatenate([self._streams.channels[source] for source in sources])

    def _after_padding(self, node: fx.Node, channels: Channels) -> Channels | None:
        """Zeros are the same at any scale; those that are added as channels get streams of their own."""
        ends = node.args[1] if len(node.args) == 2 else None
        zeros = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
        if not zeros or not isinstance(ends, (tuple, list)) or not all(isinstance(end, int) for end in ends):
            return None
        before, after = (*ends, 0, 0, 0, 0, 0, 0)[4:6]
        if len(ends) > 6 or min(before, after) < 0 or node not in self._shapes or len(self._shapes[node]) != 4:
            return None
        return np.concatenate([self._new(before), channels, self._new(after)])

    def _note(self, quantizer: TensorQuantizer, source: fx.Node) -> None:
        self._streams.rounded.setdefault(quantizer, []).append(source)

    def _width(self, node: fx.Node) -> int:
        shape = self._shapes.get(node)
        return shape[1] if shape is not None and len(shape) > 1 else 0

    def _new(self, count: int) -> Channels:
        start = len(self._parents)
        self._parents += range(start, start + count)
        return np.arange(start, start + count)

    def _fix(self, node: fx.Node) -> None:
        self._fixed.update(self._streams.channels[node].tolist())

    def _join(self, one: Channels, other: Channels) -> None:
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            self._parents[self._root(a)] = self._root(b)

    def _root(self, stream: int) -> int:
        while self._parents[stream] != stream:
            self._parents[stream] = self._parents[self._parents[stream]]
            stream = self._parents[stream]
        return stream
