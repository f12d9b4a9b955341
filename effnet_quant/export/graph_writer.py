"""Writes ONNX nodes: names, constants, and the QuantizeLinear / DequantizeLinear pairs of a target."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from effnet_quant.errors import UserError
from effnet_quant.export.options import ExportOptions
from effnet_quant.quantization.targets import Target

_HALF_MAX = float(np.finfo(np.float16).max)


class GraphWriter:
    """An ONNX graph under construction for one target.

    Value names are module paths, so that a node of the engine can be found in the model.

    Args:
        target: the runtime's rules.
        opset: version of ONNX's operators.
        options: the form of the file.
    """

    def __init__(self, target: Target, opset: int, options: ExportOptions) -> None:
        self.target = target
        self.opset = opset
        self.half = options.fp16
        self.float_weights = options.float_weights
        # int32 biases have steps of s_input * s_weight, which float16 has not
        self.quantized_bias_wanted = target.quantized_bias and not options.fp16
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, NDArray[Any]] = {}
        self._names: set[str] = set()
        self._pairs: dict[tuple[str, float, int], str] = {}

    def constant(self, name: str, value: NDArray[Any], *, half: bool | None = None) -> str:
        """Add an initializer; the name is made unique. Float numbers become float16 if ``half`` (default: where the graph
        computes in float16).

        Raises:
            UserError: a number is too large for float16.
        """
        if value.dtype == np.float32 and (self.half if half is None else half):
            if bool((np.isfinite(value) & (np.abs(value) > _HALF_MAX)).any()):
                raise UserError(f"{name} holds {np.abs(value).max():.3g}, more than float16 can; export without fp16.")
            value = value.astype(np.float16)
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

    def reduce(self, op_type: str, x: str, axes: list[int], path: str, *, keepdims: bool) -> str:
        """Append ReduceMean or ReduceMax, whose axes are an attribute up to opset 17 and an input from 18 on."""
        if self.opset < 18:
            return self.node(op_type, [x], path, axes=axes, keepdims=int(keepdims))
        names = [x, self.constant(f"{path}.axes", np.array(axes, np.int64))]
        return self.node(op_type, names, path, keepdims=int(keepdims))

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

    def rounded_weight(self, weight: NDArray[np.float32], scale: NDArray[np.float32], path: str) -> str:
        """Float weights behind QuantizeLinear and DequantizeLinear with a scale per output channel (dimension 0)."""
        parameters = [
            self.constant(f"{path}.weight_scale", scale),
            self.constant(f"{path}.weight_zero_point", np.zeros(scale.shape, np.int8)),
        ]
        stored = self.constant(f"{path}.weight", weight)
        integers = self.node("QuantizeLinear", [stored, *parameters], f"{path}.weight", axis=0)
        return self.node("DequantizeLinear", [integers, *parameters], f"{path}.weight", axis=0)

    def quantized_bias(self, bias: NDArray[np.float32], scale: NDArray[np.float32], path: str) -> str:
        """DequantizeLinear of int32 biases with the scale of the accumulator, input scale times weight scale."""
        inputs = [
            self.constant(f"{path}.bias", np.rint(bias.astype(np.float64) / scale).astype(np.int32)),
            self.constant(f"{path}.bias_scale", scale),
            self.constant(f"{path}.bias_zero_point", np.zeros(scale.shape, np.int32)),
        ]
        return self.node("DequantizeLinear", inputs, f"{path}.bias", axis=0)

    def model(self, image: onnx.ValueInfoProto, output: str) -> onnx.ModelProto:
        """The finished model from the described input to "logits" (batch, classes)."""
        self._sort_nodes(output)
        for node in self.nodes:  # the graph's output takes its public name
            node.output[:] = ["logits" if name == output else name for name in node.output]
            node.input[:] = ["logits" if name == output else name for name in node.input]
        graph = helper.make_graph(
            self.nodes,
            "effnet_quant",
            [image],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None])],
            [numpy_helper.from_array(value, name) for name, value in self.initializers.items()],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))

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
