"""Lowers a traced graph, after its passes, to a program of integer steps."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from effnet_quant.card import InputSpec
from effnet_quant.errors import UserError
from effnet_quant.export.custom_ops import CONV_PADDED, QUANTIZE
from effnet_quant.export.integer_layers import convolution, linear
from effnet_quant.export.integer_moves import MOVES
from effnet_quant.export.integer_pools import average_windows, largest_windows
from effnet_quant.export.integer_values import Bytes, Pointwise, Sums, Value, inner_sizes, on_grid
from effnet_quant.export.passes.needed_ranges import needed_of
from effnet_quant.export.traced_graph import Grid, TracedGraph, argument, kind_of, module_path, shape_of
from effnet_quant.integer.arithmetic import LEFT_SHIFT, SUM_LIMIT, multiplier_and_shift
from effnet_quant.integer.program import (
    IMAGE,
    LOGITS,
    Concat,
    Maximum,
    Move,
    Product,
    Program,
    Rescale,
    Step,
    Sum,
    Table,
    WindowSum,
)
from effnet_quant.quantization.grid import scale_and_zero_point
from effnet_quant.quantization.operation_kinds import Kind
from effnet_quant.quantization.quantizer import AFFINE_UINT8

aten = torch.ops.aten
_ELEMENTWISE = frozenset(
    getattr(aten, name).default
    for name in (
        *(
            "relu",
            "relu6",
            "hardtanh",
            "clamp",
            "clamp_min",
            "clamp_max",
            "leaky_relu",
            "elu",
            "selu",
            "softplus",
            "mish",
        ),
        *("sigmoid", "hardsigmoid", "silu", "hardswish", "tanh", "gelu", "exp", "neg", "abs", "square"),
    )
) | {aten.batch_norm.default}
_ARITHMETIC = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})
_CONVOLUTIONS = frozenset({aten.conv2d.default, CONV_PADDED})
_CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten.type_as.default})
_REPEATS = frozenset({aten.expand.default, aten.expand_as.default})  # products and sums repeat sizes of 1 themselves


def lower(traced: TracedGraph, images: InputSpec) -> Program:
    """The integer program of a traced graph of images.

    Args:
        traced: after the passes for the target "integer".
        images: how the model's images are normalised; the program takes pixels.

    Raises:
        UserError: an operation has no integer rule.
    """
    return Lowering(traced, images).program()


class Lowering:
    """Walks the graph once. What a node computes becomes a Value, and steps where integers arise."""

    def __init__(self, traced: TracedGraph, images: InputSpec) -> None:
        self.traced = traced
        self.steps: list[Step] = []
        self.bounds: dict[str, int | None] = {IMAGE: None}
        self.values: dict[fx.Node, Value | list[Value]] = {}
        self._names = {IMAGE, LOGITS}
        (image,) = traced.inputs
        height, width = (int(size) for size in shape_of(image)[2:])
        self.image = (images.channels, height, width)
        pixels = Bytes(IMAGE, 1.0, 0, 0, 255, self.image)
        mean, std = (torch.tensor(entry, dtype=torch.float64).reshape(-1, 1, 1) for entry in (images.mean, images.std))
        self.values[image] = Pointwise(pixels, lambda x: (x / 255 - mean) / std)

    def program(self) -> Program:
        for node in self.traced.operations():
            value = node.meta.get("val")
            if isinstance(value, (Tensor, list, tuple)) and not self._is_weight(node):
                try:
                    self.values[node] = self._lower(node)
                except ValueError as error:
                    raise self._refusal(node, str(error)) from error
        if self.traced.structure != 0 or len(self.traced.outputs) != 1:
            raise UserError("integer export is for networks that return one tensor.")
        output = self.traced.outputs[0]
        scale = self._write_logits(output)
        return Program(self.image, tuple(self.steps), scale, len(shape_of(output)))

    def add(self, step: Step) -> None:
        try:
            self.bounds[step.output] = step.check(self.bounds)
        except ValueError as error:
            raise UserError(f"the network can't be computed with integers alone: {step.output} {error}.") from error
        self.steps.append(step)

    def _is_weight(self, node: fx.Node) -> bool:
        """Whether the node quantizes a layer's weights or bias."""
        return node.target is QUANTIZE and node.args[0] in self.traced.constants

    def _refusal(self, node: fx.Node, why: str = "has no integer rule") -> UserError:
        return UserError(
            f"{module_path(node) or 'the model'}: {node.target} {why}; docs/integer.md lists the operations of integer "
            "networks."
        )

    def name(self, node: fx.Node, suffix: str = "") -> str:
        base = (module_path(node) or node.name) + suffix
        name, count = base, 1
        while name in self._names:
            name, count = f"{base}_{count}", count + 1
        self._names.add(name)
        return name

    def _lower(self, node: fx.Node) -> Value | list[Value]:
        target = node.target
        if target is QUANTIZE:
            return self._quantize(node, self.value(node.args[0]), self.traced.grid(node))
        if target in _CONVOLUTIONS:
            return convolution(self, node)
        if target is aten.linear.default:
            return linear(self, node)
        if target is operator.getitem:
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        if target in _CASTS or target in _REPEATS:
            return self.value(node.args[0])
        if target in _ARITHMETIC:
            return self._arithmetic(node)
        if target in _ELEMENTWISE:
            return self._elementwise(node)
        if Kind.AVERAGES in kind_of(node):
            return self._average(node)
        if target in (aten.max_pool2d.default, aten.adaptive_max_pool2d.default):
            return self._maximum(node)
        if target is aten.cat.default:
            return self._concat(node)
        move = MOVES.get(target)
        if move is None:
            raise self._refusal(node)
        return move(self, node)

    def value(self, node: Any) -> Value:
        if not isinstance(node, fx.Node) or node not in self.values:
            raise ValueError("has an operand without integers")
        value = self.values[node]
        assert not isinstance(value, list)
        return value

    def _bytes(self, node: Any) -> Bytes:
        """The value of ``node`` as 8-bit integers. If no quantizer rounds it here, a grid is chosen for it."""
        value = self.value(node)
        if isinstance(value, Bytes):
            return value
        grid = self._neighbours_grid(node)
        if grid is None:
            low, high = self._range(node, value)
            scale, zero_point = scale_and_zero_point(torch.tensor(high), AFFINE_UINT8, torch.tensor(low))
            assert zero_point is not None
            grid = Grid(scale, int(zero_point), *AFFINE_UINT8.bounds)
        rounded = self.values[node] = self._quantize(node, value, grid)  # for all who come after
        return rounded

    def _neighbours_grid(self, node: fx.Node) -> Grid | None:
        """The widest grid of the other users of a value, if one of them rounds it; they may move or clip it first."""
        found: list[Grid] = []
        pending = [node]
        while pending:
            for user in pending.pop().users:
                if user.target is QUANTIZE:
                    found.append(self.traced.grid(user))
                elif Kind.MOVES in kind_of(user) or Kind.CLIPS in kind_of(user):
                    pending.append(user)
        return max(found, key=lambda grid: float(grid.scale) * (grid.high - grid.low), default=None)

    def _range(self, node: fx.Node, value: Pointwise | Sums) -> tuple[float, float]:
        """The range of a value that no quantizer rounds: what it can be, and what later quantizers need of that."""
        low, high = value.ends
        needed = needed_of(self.traced, node)
        if needed is not None and isinstance(value, Sums):
            low, high = max(low, needed.low), min(high, needed.high)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("takes a value that no quantizer rounds to 8 bits")
        return low, max(low, high)

    def _quantize(self, node: fx.Node, value: Value, grid: Grid) -> Bytes:
        scale, zero_point = float(grid.scale), grid.zero_point
        if isinstance(value, Pointwise):
            results = value.results()
            if not bool(torch.isfinite(results).all()):
                raise ValueError("gives no finite number for some integers")
            integers = on_grid(results.numpy(), scale, zero_point, grid.low, grid.high)
            table = np.ascontiguousarray(integers.T.astype(np.uint8)).reshape(-1)
            name = self.name(node)
            self.add(Table(value.of.name, name, table, len(value.of.shape) - 1))
            return Bytes(name, scale, zero_point, grid.low, grid.high, value.of.shape)
        if isinstance(value, Bytes):
            if value.has_grid(grid) and grid.low <= value.low and value.high <= grid.high:
                return value
            value = self._sum(node, [value], ".aligned")
        low, high = (
            int(on_grid(end, scale, zero_point, grid.low, grid.high)) if math.isfinite(end) else own
            for end, own in ((value.low, grid.low), (value.high, grid.high))
        )
        name = self.name(node)
        self.add(Rescale(value.name, name, *_multipliers(value.unit / scale), zero_point, low, high, "uint8"))
        return Bytes(name, scale, zero_point, low, high, value.shape)

    def _arithmetic(self, node: fx.Node) -> Value:
        varying = [
            value for value in node.args[:2] if isinstance(value, fx.Node) and value not in self.traced.constants
        ]
        if len(varying) < 2:
            return self._elementwise(node)
        values = [self.value(value) for value in varying]
        sources = [value.of if isinstance(value, Pointwise) else value for value in values]
        if varying[0] is varying[1] or (sources[0] is sources[1] and isinstance(sources[0], Bytes)):
            return self._elementwise(node)
        if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
            operands = [self._operand(at) for at in varying]
            return self._sum(node, operands, ".sum")
        if node.target is aten.mul.Tensor:
            a, b = (self._bytes(value) for value in varying)
            name = self.name(node, ".product")
            self.add(Product((a.name, b.name), name, (a.zero_point, b.zero_point)))
            corners = [one * other for one in a.ends for other in b.ends]
            unit = np.float64(a.scale * b.scale).reshape(())
            return Sums(name, unit, inner_sizes(node), reach=(min(corners), max(corners)))
        raise self._refusal(node)

    def _operand(self, node: fx.Node) -> Bytes | Sums:
        """An operand of an addition: sums as they are, unless an activation clips them."""
        value = self.value(node)
        whole = isinstance(value, Sums) and math.isinf(value.low) and math.isinf(value.high)
        return value if whole else self._bytes(node)  # type: ignore[return-value]

    def _sum(self, node: fx.Node, operands: list[Bytes | Sums], suffix: str) -> Sums:
        """Operands in a common unit: the scale of the largest operand as 8-bit integers, divided by 2**LEFT_SHIFT."""
        operands = [self._uniform(node, value) if isinstance(value, Sums) else value for value in operands]
        scales = [value.scale if isinstance(value, Bytes) else float(value.unit) for value in operands]
        bytes_of = [isinstance(value, Bytes) for value in operands]
        largest = [
            255 if is_bytes else self.bounds[value.name] or 1
            for value, is_bytes in zip(operands, bytes_of, strict=True)
        ]
        reference = max(scale * magnitude / 255 for scale, magnitude in zip(scales, largest, strict=True))
        unit = reference / 2**LEFT_SHIFT
        ratios = [
            multiplier_and_shift(scale / (reference if is_bytes else unit))
            for scale, is_bytes in zip(scales, bytes_of, strict=True)
        ]
        name = self.name(node, suffix)
        self.add(
            Sum(
                tuple(value.name for value in operands),
                name,
                tuple(value.zero_point if isinstance(value, Bytes) else 0 for value in operands),
                tuple(LEFT_SHIFT if is_bytes else 0 for is_bytes in bytes_of),
                tuple(multiplier for multiplier, _ in ratios),
                tuple(shift for _, shift in ratios),
            )
        )
        lows, highs = zip(*(value.ends for value in operands), strict=True)
        return Sums(name, np.float64(unit).reshape(()), inner_sizes(node), reach=(sum(lows), sum(highs)))

    def _uniform(self, node: fx.Node, value: Sums, name: str | None = None) -> Sums:
        """Sums with one unit for all channels: the largest."""
        if math.isfinite(value.low) or math.isfinite(value.high):
            raise ValueError("takes clipped sums that no quantizer has rounded")
        if value.unit.ndim == 0 and name is None:
            return value
        unit = value.unit.max()
        name = name or self.name(node, ".uniform")
        numbers = _multipliers(value.unit / unit)
        self.add(Rescale(value.name, name, *numbers, 0, -SUM_LIMIT, SUM_LIMIT - 1, "int32"))
        return Sums(name, np.float64(unit).reshape(()), value.shape, reach=value.reach)

    def _elementwise(self, node: fx.Node) -> Value:
        """A function of one value, as a table; an activation that clips sums changes the ends of the next rounding."""
        varying = {value for value in node.all_input_nodes if value not in self.traced.constants}
        values = {source: self.value(source) for source in varying}
        if Kind.CLIPS not in kind_of(node):
            values = {at: self._bytes(at) if isinstance(value, Sums) else value for at, value in values.items()}
        if node.target is aten.batch_norm.default and argument(node, "training"):
            raise ValueError("is in training mode")
        first = next(iter(values.values()))
        if isinstance(first, Sums):
            low, high = (
                float(node.target(torch.tensor(end, dtype=torch.float64), *node.args[1:], **node.kwargs))  # type: ignore[operator]
                for end in (max(first.low, -1e300), min(first.high, 1e300))
            )
            return Sums(
                first.name,
                first.unit,
                first.shape,
                low if low > -1e300 else -math.inf,
                high if high < 1e300 else math.inf,
                first.reach,
            )
        source = first.of if isinstance(first, Pointwise) else first
        functions = {
            at: (value.function if isinstance(value, Pointwise) else lambda x: x) for at, value in values.items()
        }

        def compute(x: Tensor) -> Tensor:
            def operand(value: fx.Node) -> Tensor:
                return functions[value](x) if value in functions else self.traced.constants[value].double()

            args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
            result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
            return result

        return Pointwise(source, compute)

    def _average(self, node: fx.Node) -> Sums:
        x: Any = self._bytes(node.args[0])
        windows = average_windows(node, x.shape)
        for axis, positions in windows.spread:  # windows of unequal size: a copy of each one's values, and zeros
            c, *size = x.shape
            amounts = [0, 0, 0, 0, 0, 0, 0, 0]
            amounts[2 * axis + 1] = 1
            size[axis - 2] += 1
            x = self.moved(node, x, "pad", (x.zero_point, *amounts), (c, *size))
            size[axis - 2] = len(positions)
            x = self.moved(node, x, "gather", (axis, *positions), (c, *size))
        name = self.name(node, ".sums")
        self.add(WindowSum(x.name, name, x.zero_point, windows.kernel, windows.strides, windows.pads, windows.terms))
        result = Sums(name, np.asarray(windows.factor * x.scale), (x.shape[0], *windows.size), reach=x.ends)
        return result if result.shape == inner_sizes(node) else self.reshaped(node, result)

    def _maximum(self, node: fx.Node) -> Value | list[Value]:
        x = self._bytes(node.args[0])
        name = self.name(node)
        self.add(Maximum(x.name, name, *largest_windows(node, x.shape)))
        several = not isinstance(node.meta["val"], Tensor)
        inner = tuple(int(size) for size in (node.meta["val"][0] if several else node.meta["val"]).shape[1:])
        result = Bytes(name, x.scale, x.zero_point, x.low, x.high, inner)
        return [result] if several else result

    def _concat(self, node: fx.Node) -> Bytes:
        parts = [self._bytes(value) for value in argument(node, "tensors")]
        widest = max(parts, key=lambda part: part.scale)
        grid = Grid(torch.tensor(widest.scale, dtype=torch.float64), widest.zero_point, 0, 255)
        parts = [self._quantize(node, part, grid) for part in parts]
        axis = int(argument(node, "dim")) % len(shape_of(node))
        if axis == 0:
            raise ValueError("joins along the batch")
        name = self.name(node)
        self.add(Concat(tuple(part.name for part in parts), name, axis))
        low, high = min(part.low for part in parts), max(part.high for part in parts)
        return Bytes(name, widest.scale, widest.zero_point, low, high, inner_sizes(node))

    def moved(self, node: fx.Node, value: Value, kind: str, numbers: tuple[int, ...], shape: tuple[int, ...]) -> Value:
        if isinstance(value, Sums) and value.unit.ndim:
            value = self._uniform(node, value)
        assert isinstance(value, (Bytes, Sums))
        name = self.name(node)
        self.add(Move(value.name, name, kind, numbers))
        if isinstance(value, Bytes):
            return Bytes(name, value.scale, value.zero_point, value.low, value.high, shape)
        return Sums(name, value.unit, shape, value.low, value.high, value.reach)

    def movable(self, node: fx.Node) -> Bytes | Sums:
        value = self.value(node.args[0])
        return value if isinstance(value, Sums) else self._bytes(node.args[0])

    def reshaped(self, node: fx.Node, value: Value) -> Any:
        inner = inner_sizes(node)
        return self.moved(node, value, "reshape", (-1, *inner), inner)

    def _write_logits(self, output: fx.Node) -> float:
        """Steps that give the result as int32 in one unit; returns the unit."""
        try:
            value: Any = self.value(output)
            if isinstance(value, Pointwise):
                raise ValueError("is computed at the end, where no quantizer follows")
            if isinstance(value, Bytes):
                value = self._sum(output, [value], ".aligned")
            return float(self._uniform(output, value, LOGITS).unit)
        except ValueError as error:
            raise self._refusal(output, str(error)) from error


def _multipliers(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers and shifts of ratios, int64 in their shape."""
    pairs = [multiplier_and_shift(float(ratio)) for ratio in np.asarray(ratios).flat]
    multipliers, shifts = (
        np.array(numbers, np.int64).reshape(np.shape(ratios)) for numbers in zip(*pairs, strict=True)
    )
    return multipliers, shifts
