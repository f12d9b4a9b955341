"""Checks a QDQ graph against TensorRT's documented placement rules for explicit quantization, without TensorRT.

Source: TensorRT documentation, "Working with Quantized Types", explicit quantization. Values are symmetric int8 with zero
point 0; convolutions take neither INT4 weights nor 16-bit activations. Weights have a scale per output channel, activations
one per tensor. Inputs of quantizable layers have Q/DQ. Nothing stands between a convolution and the operations fused with
it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

_PACKED = (TensorProto.INT4, TensorProto.UINT4)
_UNPACKING = ("Cast", "Mul")  # between packed weights and their DequantizeLinear
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FUSED = ("Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Tanh")


def lint_tensorrt(model: onnx.ModelProto) -> list[str]:
    """One sentence for each thing that TensorRT would reject or not fuse; empty if the graph follows all rules."""
    return _Linter(model).findings()


class _Linter:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._nodes = model.graph.node
        self._constants: dict[str, NDArray[Any]] = {
            entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer
        }
        for node in self._nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self._producers = {name: node for node in self._nodes for name in node.output}
        self._packed = {entry.name for entry in model.graph.initializer if entry.data_type in _PACKED}
        for node in self._nodes:  # in the order in which they run
            if node.op_type in _UNPACKING and self._packed & set(node.input):
                self._packed.update(node.output)
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self._nodes:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)

    def findings(self) -> list[str]:
        found: list[str] = []
        for node in self._nodes:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                found += self._encoding(node)
            if node.op_type == "QuantizeLinear":
                found += self._pair(node)
                found += self._between_layer_and_activation(node)
            if node.op_type in _LAYERS:
                found += self._operands(node)
            if node.op_type == "Add":
                found += self._addition(node)
            if node.op_type == "Concat":
                found += self._concatenation(node)
        return found

    def _encoding(self, node: onnx.NodeProto) -> list[str]:
        found = []
        if node.input[0] in self._packed:
            return [f"{node.name}: weights of 4 bits, but only int8 is taken; export with --weights int8"]
        scale = self._constants.get(node.input[1])
        given = len(node.input) > 2 and node.input[2]
        zero_point = self._constants.get(node.input[2]) if given else None
        producer = self._producers.get(node.input[0])
        stored = {node.input[0], *(producer.input[:1] if producer and producer.op_type == "QuantizeLinear" else ())}
        weights = any(name in self._constants for name in stored)
        if scale is None:
            return [f"{node.name}: the scale is computed, but must be a constant"]
        if given and zero_point is None:
            return [f"{node.name}: the zero point is computed, but must be a constant"]
        if (
            not given
            and node.op_type == "QuantizeLinear"
            and self._attribute(node, "output_dtype", 0) != TensorProto.INT8
        ):
            found.append(f"{node.name}: without a zero point it gives uint8 values, but only int8 is taken")
        if not bool((scale > 0).all()):
            found.append(f"{node.name}: a scale is not positive")
        if zero_point is not None and zero_point.dtype != np.int8:
            found.append(f"{node.name}: {zero_point.dtype} values, but only int8 is taken")
        if zero_point is not None and np.any(zero_point):
            found.append(f"{node.name}: a zero point is not 0, so the grid is not symmetric")
        if not weights and scale.size != 1:
            found.append(f"{node.name}: activations have a scale per channel, but must have one per tensor")
        if weights and scale.size > 1:
            channels = self._output_axis(node)
            axis = self._attribute(node, "axis", 1)
            if axis < 0:
                axis += next(self._constants[name] for name in stored if name in self._constants).ndim
            if axis != channels:
                found.append(
                    f"{node.name}: weights have a scale per index of axis {axis}, not per output channel ({channels})"
                )
        return found

    def _output_axis(self, node: onnx.NodeProto) -> int:
        """The axis of output channels in a layer's weights.

        It is the second axis for MatMul and for transposed convolutions (with groups too), else the first.
        """
        users = self._consumers.get(node.output[0], [])
        while users and users[0].op_type == "DequantizeLinear":
            users = self._consumers.get(users[0].output[0], [])
        return 1 if users and users[0].op_type in ("MatMul", "ConvTranspose") else 0

    def _attribute(self, node: onnx.NodeProto, name: str, default: int) -> int:
        return next((attribute.i for attribute in node.attribute if attribute.name == name), default)

    def _pair(self, node: onnx.NodeProto) -> list[str]:
        consumers = self._consumers.get(node.output[0], [])
        if not consumers or any(consumer.op_type != "DequantizeLinear" for consumer in consumers):
            return [f"{node.name}: QuantizeLinear must go straight into DequantizeLinear"]
        if any(list(consumer.input[1:]) != list(node.input[1:]) for consumer in consumers):
            return [f"{node.name}: the DequantizeLinear behind it has another scale"]
        return []

    def _between_layer_and_activation(self, node: onnx.NodeProto) -> list[str]:
        """A convolution, or the addition behind it, fuses with the activation that follows."""
        producer = self._producers.get(node.input[0])
        if producer is None or not (producer.op_type in _LAYERS or self._fuses_with_a_layer(producer)):
            return []
        behind = [
            user
            for pair in self._consumers.get(node.output[0], [])
            for user in self._consumers.get(pair.output[0], [])
            if user.op_type in _FUSED
        ]
        return [f"{node.name}: sits between {producer.name} and {user.name}, which would fuse" for user in behind[:1]]

    def _operands(self, node: onnx.NodeProto) -> list[str]:
        if node.op_type == "MatMul" and node.input[0] in self._constants:
            return []  # pooling with unequal windows, written as a product with a matrix of averages
        quantized = [self._dequantized(name) for name in node.input[:2]]
        if quantized[0] != quantized[1]:
            role = ("input", "weights") if quantized[0] else ("weights", "input")
            return [f"{node.name}: its {role[0]} are quantized and its {role[1]} are not, so it runs in float"]
        return []

    def _addition(self, node: onnx.NodeProto) -> list[str]:
        """A residual addition fuses with the convolution that computes one operand.

        For that the other operand must be quantized, and the convolution's output must not be.
        """
        operands = [self._producers.get(name) for name in node.input[:2]]
        if any(operand is None for operand in operands):
            return []
        integer = [operand for operand in operands if operand is not None and self._is_integer_layer(operand)]
        quantized = [self._dequantized(name) for name in node.input[:2]]
        if integer and not any(quantized):
            return [f"{node.name}: the operand beside {integer[0].name} is not quantized, so they do not fuse"]
        if all(quantized):
            for operand in operands:
                pair = self._producers.get(operand.input[0])  # type: ignore[union-attr]
                layer = self._producers.get(pair.input[0]) if pair else None
                if pair and layer and self._is_integer_layer(layer) and len(self._consumers[layer.output[0]]) == 1:
                    return [f"{pair.name}: sits between {layer.name} and {node.name}, which would fuse"]
        return []

    def _concatenation(self, node: onnx.NodeProto) -> list[str]:
        """Integers are concatenated unchanged, so all inputs need the same scale."""
        pairs = [self._producers[name] for name in node.input if self._dequantized(name)]
        scales = [self._constants[pair.input[1]] for pair in pairs if pair.input[1] in self._constants]
        if any(not np.array_equal(scale, scales[0]) for scale in scales[1:]):
            return [f"{node.name}: its inputs are quantized with different scales, so it runs in float"]
        return []

    def _fuses_with_a_layer(self, node: onnx.NodeProto) -> bool:
        """Whether this is a residual addition that fuses with a convolution."""
        producers = [self._producers.get(name) for name in node.input]
        return node.op_type == "Add" and any(layer is not None and self._is_integer_layer(layer) for layer in producers)

    def _is_integer_layer(self, node: onnx.NodeProto) -> bool:
        return node.op_type in _LAYERS and all(self._dequantized(name) for name in node.input[:2])

    def _dequantized(self, name: str) -> bool:
        node = self._producers.get(name)
        return node is not None and node.op_type == "DequantizeLinear"
