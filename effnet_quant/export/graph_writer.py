"""GraphWriter: collects ONNX nodes and constants, and writes QuantizeLinear / DequantizeLinear pairs for a target."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from effnet_quant.errors import UserError
from effnet_quant.export.options import ExportOptions
from effnet_quant.quantization.targets import Target

_HALF_MAX = float(np.finfo(np.float16).max)


class TooLargeForHalf(UserError):
    """A constant is too large for float16."""


class GraphWriter:
    """An ONNX graph under construction for one target.

    Values are named after module paths, so that an engine's node can be found in the model.

    Args:
        target: the runtime's rules.
        opset: version of ONNX's operators.
        options: the form of the file.
    """

    def __init__(self, target: Target, opset: int, options: ExportOptions) -> None:
        self.target = target
        self.opset = opset
        self.half = bool(options.fp16)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._names: set[str] = set()

    def constant(self, name: str, value: NDArray[Any], *, half: bool | None = None) -> str:
        """Add an initializer and return its name, made unique.

        Float32 numbers become float16 if ``half`` is true. By default they do if the graph computes in float16.

        Raises:
            TooLargeForHalf: a number is too large for float16.
        """
        if value.dtype == np.float32 and (self.half if half is None else half):
            if bool((np.isfinite(value) & (np.abs(value) > _HALF_MAX)).any()):
                raise TooLargeForHalf(
                    f"{name} holds {np.abs(value).max():.3g}, more than float16 can; export in float32 (--fp32)."
                )
            value = value.astype(np.float16)
        name = self._unique(name)
        self.initializers[name] = numpy_helper.from_array(np.array(value, order="C"), name)
        return name

    def packed_constant(self, name: str, integers: NDArray[np.int8]) -> str:
        """Add an initializer of type INT4 and return its name, made unique. The integers are -8 … 7."""
        name = self._unique(name)
        nibbles = integers.astype(np.uint8).reshape(-1) & 15
        low, high = nibbles[::2], np.append(nibbles, np.uint8(0))[1::2]  # two in a byte, the first in its low half
        self.initializers[name] = onnx.TensorProto(
            name=name, data_type=TensorProto.INT4, dims=integers.shape, raw_data=(low | high << 4).tobytes()
        )
        return name

    def element_type(self, dtype: torch.dtype) -> int:
        """ONNX's number for ``dtype``. All floating-point types become the graph's own: float32 or float16.

        Raises:
            UserError: ONNX has no such type.
        """
        if dtype.is_floating_point:
            return TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
        name = str(dtype).removeprefix("torch.").upper()
        if name not in dict(TensorProto.DataType.items()):
            raise UserError(f"values of type {dtype} can't be exported; use another integer type.")
        return int(TensorProto.DataType.Value(name))

    def reserve(self, names: list[str]) -> None:
        """Reserve the names of the file's inputs and outputs."""
        self._names.update(names)

    def node(self, op_type: str, inputs: list[str], path: str, **attributes: Any) -> str:
        """Append a node with one output and return the output's name."""
        return self.node_with_outputs(op_type, inputs, path, 1, **attributes)[0]

    def rename(self, value: str, name: str) -> str:
        """Rename a value and return the new name, made unique."""
        name = self._unique(name)
        for node in self.nodes:
            node.output[:] = [name if output == value else output for output in node.output]
        return name

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

    def quantized(self, x: str, scale: float, zero_point: int, low: int, high: int, path: str) -> str:
        """Append QuantizeLinear and DequantizeLinear behind ``x`` and return the name of the result.

        If the grid ``low`` … ``high`` is smaller than the target's integer type, a Clip of integers stands between them.
        """
        wide = high - low > 255
        dtype = np.dtype(self.target.wide_activation_dtype if wide else self.target.activation_dtype)
        limits = np.iinfo(dtype)
        parameters = [
            self.constant(f"{path}.scale", np.array(scale, np.float32)),
            self.constant(f"{path}.zero_point", np.array(zero_point, dtype)),
        ]
        integers = self.node("QuantizeLinear", [x, *parameters], path)
        if (low, high) != (limits.min, limits.max):
            ends = (("low", low), ("high", high))
            bounds = [self.constant(f"{path}.{name}", np.array(end, dtype)) for name, end in ends]
            integers = self.node("Clip", [integers, *bounds], path)
        return self.node("DequantizeLinear", [integers, *parameters], path)

    def quantized_hard_sigmoid(self, x: str, scale: float, path: str) -> str:
        """Append a quantized hard sigmoid: x + 3 quantized to uint8 with 6 * ``scale``, dequantized with ``scale``."""
        three = self.dequantized(np.array(1, np.uint8), np.array(3, np.float32), 0, f"{path}.offset", 0)
        total = self.node("Add", [x, three], path)
        zero_point = self.constant(f"{path}.zero_point", np.array(0, np.uint8))
        wide = self.constant(f"{path}.sum_scale", np.array(6 * np.float32(scale), np.float32))
        integers = self.node("QuantizeLinear", [total, wide, zero_point], path)
        step = self.constant(f"{path}.scale", np.array(scale, np.float32))
        return self.node("DequantizeLinear", [integers, step, zero_point], path)

    def dequantized(
        self,
        integers: NDArray[Any],
        scale: NDArray[np.float32],
        zero_point: int,
        path: str,
        axis: int,
        *,
        packed: bool = False,
    ) -> str:
        """Append DequantizeLinear of stored integers. ``scale`` has one entry per index of ``axis``, or is one number.

        ``packed`` stores integers from -8 to 8 as INT4.
        """
        inputs = [
            self._unpacked(integers, path, axis) if packed else self.constant(path, integers),
            self.constant(f"{path}_scale", scale),
            self.constant(f"{path}_zero_point", np.full(scale.shape, zero_point, integers.dtype)),
        ]
        return self.node("DequantizeLinear", inputs, path, **({"axis": axis} if scale.ndim else {}))

    def scaled(
        self, integers: NDArray[np.int8], scale: NDArray[np.float32], path: str, axis: int, *, packed: bool
    ) -> str:
        """Append what ``dequantized`` computes as a Cast and a Mul, which runtimes compute once.

        It is for weights of a MatMul in float. From a DequantizeLinear ONNX Runtime makes a MatMulNBits, which rounds the
        other operand to 8 bits (session.qdq_matmulnbits_accuracy_level, 4 by default).
        """
        source = self._unpacked(integers, path, axis) if packed else self.constant(path, integers)
        shape = [-1 if dimension == axis else 1 for dimension in range(integers.ndim)]
        numbers = self.node("Cast", [source], path, to=self.element_type(torch.float32))
        return self.node("Mul", [numbers, self.constant(f"{path}_scale", scale.reshape(shape))], path)

    def _unpacked(self, integers: NDArray[np.int8], path: str, axis: int) -> str:
        """Store int8 integers from -8 to 8 as INT4 and append a Cast to int8; returns its output.

        An 8 comes from a -8 whose sign a negative factor of BatchNorm turned. The file holds the -8 and turns the sign.
        """
        others = tuple(other for other in range(integers.ndim) if other != axis)
        sign = np.where(integers.max(axis=others, keepdims=True) > 7, -1, 1).astype(np.int8)
        stored = self.packed_constant(path, integers * sign)
        if bool((sign > 0).all()):
            return self.node("Cast", [stored], path, to=TensorProto.INT8)
        wide = self.node("Cast", [stored], path, to=TensorProto.INT32)  # runtimes multiply int32, not int8
        turned = self.node("Mul", [wide, self.constant(f"{path}_sign", sign.astype(np.int32))], path)
        return self.node("Cast", [turned], path, to=TensorProto.INT8)

    def rounded(self, weight: NDArray[np.float32], scale: NDArray[np.float32], path: str, axis: int) -> str:
        """Append float weights with QuantizeLinear and DequantizeLinear; ``scale`` has one entry per index of ``axis``."""
        parameters = [
            self.constant(f"{path}_scale", scale),
            self.constant(f"{path}_zero_point", np.zeros(scale.shape, np.int8)),
        ]
        stored = self.constant(path, weight)
        integers = self.node("QuantizeLinear", [stored, *parameters], path, axis=axis)
        return self.node("DequantizeLinear", [integers, *parameters], path, axis=axis)

    def model(
        self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto], values: list[str]
    ) -> onnx.ModelProto:
        """Return the finished model. ``values`` are the current names of the outputs; they get the names of ``outputs``."""
        produced = {name for node in self.nodes for name in node.output}
        public: dict[str, str] = {}
        for value, output in zip(values, outputs, strict=True):
            shown = value
            if value in public or value not in produced:  # a value returned twice, an input or a constant
                shown = self.node("Identity", [value], "")
            public[shown] = output.name
        self._sort_nodes(list(public))
        for node in self.nodes:  # the graph's outputs take their public names
            node.output[:] = [public.get(name, name) for name in node.output]
            node.input[:] = [public.get(name, name) for name in node.input]
        graph = helper.make_graph(
            self.nodes,
            "effnet_quant",
            inputs,
            outputs,
            list(self.initializers.values()),
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))

    def _sort_nodes(self, values: list[str]) -> None:
        """Sort the nodes topologically; drop nodes and constants that ``values`` do not need."""
        producers = {name: node for node in self.nodes for name in node.output}
        done: dict[str, onnx.NodeProto] = {}
        needed: set[str] = set()
        stack = [producers[value] for value in reversed(values)]
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
