"""Writes ONNX nodes: names, constants, and the QuantizeLinear / DequantizeLinear pairs of a target."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from effnet_quant.quantization.targets import Target

# 2**30: an int32 bias beyond this could overflow the accumulator it is added to.
LARGEST_BIAS = float(2**30)


class GraphWriter:
    """An ONNX graph under construction for one target.

    Value names are module paths, so that a node of the engine can be found in the model.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, NDArray[Any]] = {}
        self._names: set[str] = set()
        self._pairs: dict[tuple[str, float, int], str] = {}

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add an initializer; the name is made unique."""
        name = self._unique(name)
        self.initializers[name] = np.array(value, order="C")
        return name

    def node(self, op_type: str, inputs: list[str], path: str, **attributes: Any) -> str:
        """Append a node with one output and return the output's name."""
        return self.node_with_outputs(op_type, inputs, path, 1, **attributes)[0]

    def node_with_outputs(
        self, op_type: str, inputs: list[str], path: str, outputs: int, **attributes: Any
    ) -> list[str]:
        """Append a node and return the names of its outputs."""
        name = self._unique(f"{path}/{op_type}" if path else op_type)
        names = [name, *(self._unique(f"{name}.{index}") for index in range(1, outputs))]
        self.nodes.append(helper.make_node(op_type, inputs, names, name=name, **attributes))
        return names

    def quantized_activation(self, x: str, scale: float, zero_point: int, path: str) -> str:
        """QuantizeLinear and DequantizeLinear behind ``x``; the same pair on the same value is written once."""
        key = (x, scale, zero_point)
        if key not in self._pairs:
            dtype = np.dtype(self.target.activation_dtype)
            parameters = [
                self.constant(f"{path}.scale", np.array(scale, np.float32)),
                self.constant(f"{path}.zero_point", np.array(zero_point, dtype)),
            ]
            integers = self.node("QuantizeLinear", [x, *parameters], path)
            self._pairs[key] = self.node("DequantizeLinear", [integers, *parameters], path)
        return self._pairs[key]

    def quantized_weight(self, integers: NDArray[np.int8], scale: NDArray[np.float32], path: str) -> str:
        """DequantizeLinear of int8 weights with a scale per output channel (dimension 0)."""
        inputs = [
            self.constant(f"{path}.weight", integers),
            self.constant(f"{path}.weight_scale", scale),
            self.constant(f"{path}.weight_zero_point", np.zeros(scale.shape, np.int8)),
        ]
        return self.node("DequantizeLinear", inputs, f"{path}.weight", axis=0)

    def transpose_weight(self, name: str) -> None:
        """Turn the matrix (out, in) that was written under this name to (in, out), as MatMul takes it: the numbers
        themselves, because a runtime that finds a Transpose behind DequantizeLinear computes in float."""
        while name not in self.initializers:
            producer = next(node for node in self.nodes if name in node.output)
            for attribute in producer.attribute:
                if attribute.name == "axis":
                    attribute.i = 1
            name = producer.input[0]
        self.initializers[name] = np.ascontiguousarray(self.initializers[name].T)

    def quantized_bias(self, bias: NDArray[np.float32], scale: NDArray[np.float32], path: str) -> str:
        """DequantizeLinear of int32 biases with the scale of the accumulator, input scale times weight scale."""
        inputs = [
            self.constant(f"{path}.bias", np.rint(bias.astype(np.float64) / scale).astype(np.int32)),
            self.constant(f"{path}.bias_scale", scale),
            self.constant(f"{path}.bias_zero_point", np.zeros(scale.shape, np.int32)),
        ]
        return self.node("DequantizeLinear", inputs, f"{path}.bias", axis=0)

    def model(self, input_name: str, image_shape: tuple[int, int, int], output: str, opset: int) -> onnx.ModelProto:
        """The finished model, "input" (batch, C, H, W) to "logits" (batch, classes), with a dynamic batch."""
        self._sort_nodes(output)
        for node in self.nodes:  # the graph's output takes its public name
            node.output[:] = ["logits" if name == output else name for name in node.output]
            node.input[:] = ["logits" if name == output else name for name in node.input]
        graph = helper.make_graph(
            self.nodes,
            "effnet_quant",
            [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, ["batch", *image_shape])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None])],
            [numpy_helper.from_array(value, name) for name, value in self.initializers.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)

    def _sort_nodes(self, output: str) -> None:
        """Put every node behind those it needs, and drop what the output does not need."""
        producers = {name: node for node in self.nodes for name in node.output}
        done: dict[str, onnx.NodeProto] = {}
        needed: set[str] = set()
        stack = [producers[output]] if output in producers else []
        while stack:
            node = stack[-1]
            waiting = [producers[name] for name in reversed(node.input) if name in producers]
            waiting = [producer for producer in waiting if producer.name not in done]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            done[node.name] = node
            needed.update(node.input)
        self.nodes = list(done.values())
        self.initializers = {name: value for name, value in self.initializers.items() if name in needed}

    def _unique(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self._names:
            candidate, count = f"{name}_{count}", count + 1
        self._names.add(candidate)
        return candidate
