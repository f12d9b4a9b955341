"""The ATen operations that the exporter knows, and the ONNX nodes that each becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from effnet_quant.deploy.graph import GraphWriter
from effnet_quant.errors import UserError

aten = torch.ops.aten

# What a quantizer's consumer counts as, for the targets' table of quantized inputs.
OPERATION_KINDS: dict[Any, str] = {
    aten.conv2d.default: "conv",
    aten.linear.default: "linear",
    aten.adaptive_avg_pool2d.default: "pool",
    aten.mul.Tensor: "mul",
    aten.add.Tensor: "add",
}

Emit = Callable[[GraphWriter, list[str], fx.Node, str], str]
"""Writes one operation: the writer, the names of its tensor inputs, the traced node, its module's path -> output name."""


def _unary(op_type: str) -> Emit:
    return lambda writer, inputs, node, path: writer.node(op_type, inputs[:1], path)


def _silu(writer: GraphWriter, inputs: list[str], node: fx.Node, path: str) -> str:
    return writer.node("Mul", [inputs[0], writer.node("Sigmoid", inputs[:1], path)], path)


def _binary(op_type: str) -> Emit:
    def emit(writer: GraphWriter, inputs: list[str], node: fx.Node, path: str) -> str:
        if node.kwargs.get("alpha", 1) != 1 or len(inputs) != 2:
            raise UserError(f"{path}: {op_type} with a scalar or a factor can't be exported; write it on two tensors.")
        return writer.node(op_type, inputs, path)

    return emit


def _average_pool(writer: GraphWriter, inputs: list[str], node: fx.Node, path: str) -> str:
    size = node.args[1]
    if size not in (1, [1], [1, 1]):
        raise UserError(f"{path}: adaptive average pooling to {size} can't be exported; only pooling to 1 can.")
    return writer.node("GlobalAveragePool", inputs[:1], path)


def _flatten(writer: GraphWriter, inputs: list[str], node: fx.Node, path: str) -> str:
    if node.args[1:] not in ((1,), (1, -1)):
        raise UserError(f"{path}: flatten{node.args[1:]} can't be exported; only flatten(1) can.")
    return writer.node("Flatten", inputs[:1], path, axis=1)


def _unsqueeze(writer: GraphWriter, inputs: list[str], node: fx.Node, path: str) -> str:
    axes = writer.constant(f"{path}.axes", np.array([node.args[1]], np.int64))
    return writer.node("Unsqueeze", [inputs[0], axes], path)


OPERATIONS: dict[Any, Emit] = {
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.relu.default: _unary("Relu"),
    aten.relu_.default: _unary("Relu"),
    aten.silu.default: _silu,
    aten.silu_.default: _silu,
    aten.add.Tensor: _binary("Add"),
    aten.mul.Tensor: _binary("Mul"),
    aten.adaptive_avg_pool2d.default: _average_pool,
    aten.flatten.using_ints: _flatten,
    aten.unsqueeze.default: _unsqueeze,
}

# Operations that do nothing in eval mode.
IDENTITIES = frozenset({aten.dropout.default, aten.dropout_.default, aten.alias.default, aten.detach.default})
