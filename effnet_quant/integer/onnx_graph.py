"""Writes a program as an ONNX graph of integer operators, for any conforming runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from effnet_quant.integer.arithmetic import LARGEST_MULTIPLIER
from effnet_quant.integer.program import (
    IMAGE,
    LOGITS,
    WEIGHT_ZERO_POINT,
    Concat,
    Convolution,
    Linear,
    Maximum,
    Move,
    Product,
    Program,
    Rescale,
    Sum,
    Table,
    WindowSum,
)

OPSET = 17
FLOATS = frozenset(
    getattr(TensorProto, name)
    for name in dir(TensorProto)
    if name.startswith(("FLOAT", "DOUBLE", "BFLOAT", "COMPLEX")) and isinstance(getattr(TensorProto, name), int)
)
# added to a product before it is divided, so that no dividend is negative and truncation rounds down; 2**62 is a multiple of
# every divisor
_OFFSET_BITS = 62


def write_graph(program: Program) -> onnx.GraphProto:
    """The graph of a program that ``Program.check`` has accepted. Its batch is open."""
    writer = _Writer(program.check())
    for step in program.steps:
        getattr(writer, f"_{type(step).__name__.lower()}")(step)
    channels, height, width = program.image
    image = helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, ["batch", channels, height, width])
    logits = helper.make_tensor_value_info(LOGITS, TensorProto.INT32, ["batch", *[None] * (program.dimensions - 1)])
    return helper.make_graph(writer.nodes, "effnet_quant_integer", [image], [logits], writer.constants)


def float_tensors(graph: onnx.GraphProto) -> list[str]:
    """The names of all tensors of a floating-point type in a graph: constants, inputs, outputs, values that are cast."""
    found = [entry.name for entry in graph.initializer if entry.data_type in FLOATS]
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in FLOATS:
            found.append(value.name)
    for node in graph.node:
        for attribute in node.attribute:
            is_cast = node.op_type == "Cast" and attribute.i in FLOATS
            if is_cast or attribute.t.data_type in FLOATS or attribute.HasField("f") or attribute.floats:
                found += list(node.output)
    return found


class _Writer:
    """Appends the nodes of each kind of step. Values keep their names; values in between get a suffix."""

    def __init__(self, bounds: dict[str, int | None]) -> None:
        self.bounds = bounds
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Any, dtype: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.array(value, dtype, order="C"), name))
        return name

    def node(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=f"{output}/{op_type}", **attributes))
        return output

    def cast(self, name: str, output: str, dtype: int) -> str:
        return self.node("Cast", [name], output, to=dtype)

    def centred(self, name: str, zero_point: int, output: str, dtype: int = TensorProto.INT32) -> str:
        """x - zero_point, in a wider type."""
        wide = self.cast(name, f"{output}.wide", dtype)
        numpy_type = np.int32 if dtype == TensorProto.INT32 else np.int64
        return self.node("Sub", [wide, self.constant(f"{output}.zero_point", zero_point, numpy_type)], output)

    def shifted(
        self,
        name: str,
        output: str,
        multipliers: NDArray[np.int64],
        shifts: NDArray[np.int64],
        bound: int,
        zero_point: int,
    ) -> str:
        """round(x * multiplier / 2**shift) + zero_point of int64 values up to ``bound``, as int64."""
        product = self.node(
            "Mul", [name, self.constant(f"{output}.multiplier", multipliers, np.int64)], f"{output}.product"
        )
        half, divisor = (np.int64(1) << shifts) >> 1, np.int64(1) << shifts
        divisors = self.constant(f"{output}.divisor", divisor, np.int64)
        largest = bound * LARGEST_MULTIPLIER + int(half.max())
        if largest + 2**_OFFSET_BITS >= 2**63 or largest > 2**_OFFSET_BITS:
            # no room for the offset: take off the remainder, which Mod gives the divisor's sign
            added = self.node("Add", [product, self.constant(f"{output}.half", half, np.int64)], f"{output}.rounded")
            rest = self.node("Mod", [added, divisors], f"{output}.rest")
            dividend, after = self.node("Sub", [added, rest], f"{output}.dividend"), np.full(shifts.shape, zero_point)
        else:
            offset = self.constant(f"{output}.offset", half + np.int64(2**_OFFSET_BITS), np.int64)
            dividend = self.node("Add", [product, offset], f"{output}.dividend")
            after = zero_point - (np.int64(1) << (_OFFSET_BITS - shifts))
        quotient = self.node("Div", [dividend, divisors], f"{output}.quotient")
        return self.node("Add", [quotient, self.constant(f"{output}.after", after, np.int64)], f"{output}.shifted")

    def clipped(self, name: str, output: str, low: int, high: int, dtype: int) -> str:
        ends = [self.constant(f"{output}.{end}", value, np.int64) for end, value in (("low", low), ("high", high))]
        return self.cast(self.node("Clip", [name, *ends], f"{output}.saturated"), output, dtype)

    def _table(self, step: Table) -> None:
        index = self.cast(step.input, f"{step.output}.index", TensorProto.INT32)
        if step.channels > 1:
            starts = (256 * np.arange(step.channels)).reshape(-1, *(1,) * step.trailing)
            index = self.node(
                "Add", [index, self.constant(f"{step.output}.start", starts, np.int32)], f"{step.output}.place"
            )
        self.node("Gather", [self.constant(f"{step.output}.table", step.table, np.uint8), index], step.output, axis=0)

    def _layer_inputs(self, step: Convolution | Linear) -> list[str]:
        return [
            step.input,
            self.constant(f"{step.output}.weight", step.weight, np.uint8),
            self.constant(f"{step.output}.zero_point", step.zero_point, np.uint8),
            self.constant(f"{step.output}.weight_zero_point", WEIGHT_ZERO_POINT, np.uint8),
        ]

    def _convolution(self, step: Convolution) -> None:
        sums = self.node(
            "ConvInteger",
            self._layer_inputs(step),
            f"{step.output}.sums",
            kernel_shape=list(step.weight.shape[2:]),
            strides=list(step.strides),
            pads=list(step.pads),
            dilations=list(step.dilations),
            group=step.groups,
        )
        bias = self.constant(f"{step.output}.bias", step.bias.reshape(-1, 1, 1), np.int32)
        self.node("Add", [sums, bias], step.output)

    def _linear(self, step: Linear) -> None:
        sums = self.node("MatMulInteger", self._layer_inputs(step), f"{step.output}.sums")
        self.node("Add", [sums, self.constant(f"{step.output}.bias", step.bias, np.int32)], step.output)

    def _product(self, step: Product) -> None:
        factors = [
            self.centred(name, zero_point, f"{step.output}.{side}")
            for name, zero_point, side in zip(step.inputs, step.zero_points, "ab", strict=True)
        ]
        self.node("Mul", factors, step.output)

    def _sum(self, step: Sum) -> None:
        aligned = []
        operands = zip(step.inputs, step.zero_points, step.left_shifts, step.multipliers, step.shifts, strict=True)
        for index, (name, zero_point, left, multiplier, shift) in enumerate(operands):
            place = f"{step.output}.{index}"
            bound = self.bounds[name]
            if bound is None:
                centred = self.centred(name, zero_point, f"{place}.centred", TensorProto.INT64)
                factor = self.constant(f"{place}.left", 1 << left, np.int64)
                wide, bound = self.node("Mul", [centred, factor], f"{place}.left_shifted"), 255 << left
            else:
                wide = self.cast(name, f"{place}.wide", TensorProto.INT64)
            numbers = (np.array(multiplier, np.int64), np.array(shift, np.int64))
            aligned.append(self.shifted(wide, place, *numbers, bound, 0))
        total = aligned[0]
        for index, other in enumerate(aligned[1:]):
            total = self.node("Add", [total, other], f"{step.output}.total{index}")
        self.cast(total, step.output, TensorProto.INT32)

    def _windowsum(self, step: WindowSum) -> None:
        centred = self.centred(step.input, step.zero_point, f"{step.output}.centred")
        if not any(step.kernel):
            axes = self.constant(f"{step.output}.axes", [2, 3], np.int64)
            opset_13_sum = [centred, axes]
            self.node("ReduceSum", opset_13_sum, step.output, keepdims=1)
            return
        name = self._padded(centred, f"{step.output}.padded", step.pads)
        for axis, (length, stride) in enumerate(zip(step.kernel, step.strides, strict=True)):
            name = self._sliding_sum(name, f"{step.output}.axis{axis}", axis + 2, length, stride)
        self.node("Identity", [name], step.output)

    def _padded(self, name: str, output: str, pads: tuple[int, int, int, int]) -> str:
        if not any(pads):
            return name
        amounts = self.constant(f"{output}.amounts", [0, 0, pads[0], pads[1], 0, 0, pads[2], pads[3]], np.int64)
        return self.node("Pad", [name, amounts, self.constant(f"{output}.value", 0, np.int32)], output)

    def _sliding_sum(self, name: str, output: str, axis: int, length: int, stride: int) -> str:
        """Sums of ``length`` neighbours along an axis: slices of every ``stride``-th value, added."""
        total = ""
        for start in range(length):
            # the last window starts length - 1 before the end
            stop = start - length + 1 or np.iinfo(np.int64).max
            place = f"{output}.{start}"
            bounds = [
                self.constant(f"{place}.{word}", [value], np.int64)
                for word, value in (("start", start), ("stop", stop), ("axis", axis), ("step", stride))
            ]
            part = self.node("Slice", [name, *bounds], place)
            total = self.node("Add", [total, part], f"{place}.total") if total else part
        return total

    def _rescale(self, step: Rescale) -> None:
        bound = self.bounds[step.input]
        assert bound is not None
        wide = self.cast(step.input, f"{step.output}.wide", TensorProto.INT64)
        shifted = self.shifted(wide, step.output, step.multipliers, step.shifts, bound, step.zero_point)
        dtype = TensorProto.UINT8 if step.to == "uint8" else TensorProto.INT32
        self.clipped(shifted, step.output, step.low, step.high, dtype)

    def _maximum(self, step: Maximum) -> None:
        self.node(
            "MaxPool",
            [step.input],
            step.output,
            kernel_shape=list(step.kernel),
            strides=list(step.strides),
            pads=list(step.pads),
            dilations=list(step.dilations),
        )

    def _concat(self, step: Concat) -> None:
        self.node("Concat", list(step.inputs), step.output, axis=step.axis)

    def _move(self, step: Move) -> None:
        numbers = step.numbers

        def constant(name: str, values: Any) -> str:
            return self.constant(f"{step.output}.{name}", values, np.int64)

        if step.kind == "reshape":
            self.node("Reshape", [step.input, constant("shape", numbers)], step.output)
        elif step.kind == "transpose":
            self.node("Transpose", [step.input], step.output, perm=list(numbers))
        elif step.kind == "slice":
            axis, start, stop, stride = numbers
            words = (("start", start), ("stop", stop), ("axis", axis), ("step", stride))
            self.node("Slice", [step.input, *(constant(word, [value]) for word, value in words)], step.output)
        elif step.kind == "gather":
            self.node("Gather", [step.input, constant("positions", numbers[1:])], step.output, axis=numbers[0])
        else:
            value, *amounts = numbers
            dtype = np.uint8 if self.bounds[step.input] is None else np.int32
            pads = constant("amounts", [*amounts[::2], *amounts[1::2]])
            self.node("Pad", [step.input, pads, self.constant(f"{step.output}.value", value, dtype)], step.output)
