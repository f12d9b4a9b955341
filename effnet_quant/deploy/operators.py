"""The ATen operations that the exporter knows, and the ONNX nodes that each becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    aten.avg_pool2d.default: "pool",
    aten.mean.dim: "pool",
    aten.mul.Tensor: "mul",
    aten.mul_.Tensor: "mul",
    aten.add.Tensor: "add",
    aten.add_.Tensor: "add",
    aten.cat.default: "concat",
}


@dataclass
class Operation:
    """One traced operation on its way to ONNX.

    Attributes:
        writer: the graph under construction.
        node: the traced node.
        tensor: the ONNX name of a traced value; a Python number becomes a constant.
        path: dotted name of the module it belongs to.
    """

    writer: GraphWriter
    node: fx.Node
    tensor: Callable[[Any], str]
    path: str

    def __getitem__(self, name: str) -> Any:
        """The argument of that name in the operation's schema, or its default."""
        for position, argument in enumerate(self.node.target._schema.arguments):  # type: ignore[union-attr]
            if argument.name == name:
                if position < len(self.node.args):
                    return self.node.args[position]
                return self.node.kwargs.get(name, argument.default_value)
        raise KeyError(name)

    @property
    def x(self) -> str:
        """The ONNX name of the first argument."""
        return self.tensor(self.node.args[0])

    def integers(self, name: str, values: list[int]) -> str:
        """A constant of int64 numbers (axes, sizes)."""
        return self.writer.constant(f"{self.path}.{name}", np.array(values, np.int64))

    def emit(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Write a node and return its output's name."""
        return self.writer.node(op_type, list(inputs), self.path, **attributes)

    def refuse(self, why: str) -> UserError:
        """The error for an operation in a form that ONNX has no words for."""
        return UserError(f"{self.path or 'the model'}: {self.node.target} {why}.")


Emit = Callable[[Operation], "str | list[str]"]


def shape_of(value: Any) -> list[int | torch.SymInt]:
    """Sizes of a traced value; the batch is symbolic."""
    return list(value.meta["val"].shape)


def pair(value: Any) -> list[int]:
    """Height and width, from one number or two."""
    values = [value] if isinstance(value, int) else list(value)
    return (values * 2)[:2]


def _rank(value: Any) -> int:
    return len(shape_of(value))


def _unary(op_type: str, **attributes: Any) -> Emit:
    return lambda op: op.emit(op_type, op.x, **attributes)


def _binary(op_type: str) -> Emit:
    def emit(op: Operation) -> str:
        alpha = op.node.kwargs.get("alpha", 1)
        if alpha != 1:
            raise op.refuse(f"with alpha={alpha} can't be exported; multiply before adding")
        return op.emit(op_type, op.tensor(op.node.args[0]), op.tensor(op.node.args[1]))

    return emit


def _silu(op: Operation) -> str:
    return op.emit("Mul", op.x, op.emit("Sigmoid", op.x))


def _gelu(op: Operation) -> str:
    """x * (1 + erf(x / sqrt 2)) / 2, in the order in which runtimes recognise it; tanh where the model asks for it."""

    def number(value: float) -> str:
        return op.tensor(value)

    if op["approximate"] == "tanh":
        cube = op.emit("Mul", op.emit("Mul", op.x, op.x), op.x)
        inner = op.emit("Add", op.x, op.emit("Mul", cube, number(0.044715)))
        gate = op.emit("Tanh", op.emit("Mul", inner, number((2 / np.pi) ** 0.5)))
    else:
        gate = op.emit("Erf", op.emit("Div", op.x, number(2**0.5)))
    return op.emit("Mul", op.emit("Mul", op.x, op.emit("Add", gate, number(1.0))), number(0.5))


def _clip(low: str, high: str) -> Emit:
    def emit(op: Operation) -> str:
        bounds = [op[low], op[high]]
        names = ["" if bound is None else op.tensor(float(bound)) for bound in bounds]
        return op.emit("Clip", op.x, *names)

    return emit


def _relu6(op: Operation) -> str:
    return op.emit("Clip", op.x, op.tensor(0.0), op.tensor(6.0))


def _pads(op: Operation) -> list[int]:
    return pair(op["padding"]) * 2


def _pool(op_type: str) -> Emit:
    def emit(op: Operation) -> str:
        kernel = pair(op["kernel_size"])
        attributes: dict[str, Any] = {
            "kernel_shape": kernel,
            "strides": pair(op["stride"] or kernel),
            "pads": _pads(op),
            "ceil_mode": int(op["ceil_mode"]),
        }
        if op_type == "MaxPool":
            attributes["dilations"] = pair(op["dilation"])
        else:
            if op["divisor_override"] is not None:
                raise op.refuse("with divisor_override can't be exported")
            attributes["count_include_pad"] = int(op["count_include_pad"])
        return op.emit(op_type, op.x, **attributes)

    return emit


def _adaptive_average_pool(op: Operation) -> str:
    """Equal windows are an AveragePool; unequal ones are a product with a constant matrix for each dimension."""
    x = op.x
    size = [int(length) for length in shape_of(op.node.args[0])[-2:]]
    wanted = [length if wish is None else wish for wish, length in zip(pair(op["output_size"]), size, strict=True)]
    if wanted == size:
        return x
    if wanted == [1, 1]:
        return op.emit("GlobalAveragePool", x)
    if not any(length % wish for length, wish in zip(size, wanted, strict=True)):
        kernel = [length // wish for length, wish in zip(size, wanted, strict=True)]
        return op.emit("AveragePool", x, kernel_shape=kernel, strides=kernel)
    height, width = (_averages(length, wish) for length, wish in zip(size, wanted, strict=True))
    rows = op.writer.constant(f"{op.path}.rows", height)
    columns = op.writer.constant(f"{op.path}.columns", np.ascontiguousarray(width.T))
    return op.emit("MatMul", op.emit("MatMul", rows, x), columns)


def _averages(length: int, wanted: int) -> np.ndarray:
    """The matrix (wanted, length) that averages windows from floor(i * length / wanted) to ceil((i + 1) * ...)."""
    matrix = np.zeros((wanted, length), np.float32)
    for index in range(wanted):
        start, stop = index * length // wanted, -(-(index + 1) * length // wanted)
        matrix[index, start:stop] = 1 / (stop - start)
    return matrix


def _mean(op: Operation) -> str:
    rank = _rank(op.node.args[0])
    axes = sorted(axis % rank for axis in op["dim"])
    if rank == 4 and axes == [2, 3] and op["keepdim"]:
        return op.emit("GlobalAveragePool", op.x)
    return op.writer.reduce("ReduceMean", op.x, axes, op.path, keepdims=op["keepdim"])


def _sum(op: Operation) -> str:
    return op.emit("ReduceSum", op.x, op.integers("axes", list(op["dim"])), keepdims=int(op["keepdim"]))


def _amax(op: Operation) -> str:
    return op.writer.reduce("ReduceMax", op.x, list(op["dim"]), op.path, keepdims=op["keepdim"])


def _pad(op: Operation) -> str:
    amounts = list(op["pad"])
    mode = op["mode"] if op.node.target is aten.pad.default else "constant"
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in modes:
        raise op.refuse(f"with mode {mode} can't be exported")
    rank = _rank(op.node.args[0])
    begins, ends = [0] * rank, [0] * rank
    for index in range(len(amounts) // 2):  # PyTorch lists the last dimension first
        begins[rank - 1 - index], ends[rank - 1 - index] = amounts[2 * index], amounts[2 * index + 1]
    inputs = [op.x, op.integers("pads", begins + ends)]
    if mode == "constant":
        inputs.append(op.tensor(float(op["value"] or 0.0)))
    return op.emit("Pad", *inputs, mode=modes[mode])


def _reshape(op: Operation) -> str:
    """Only the dimension with the batch is symbolic, so the traced result says every other size."""
    sizes = [size if isinstance(size, int) else -1 for size in shape_of(op.node)]
    if sizes.count(-1) > 1:
        raise op.refuse("to a shape with two unknown sizes can't be exported")
    return op.emit("Reshape", op.x, op.integers("shape", sizes))


def _flatten(op: Operation) -> str:
    if op.node.args[1:] in ((1,), (1, -1)):
        return op.emit("Flatten", op.x, axis=1)
    return _reshape(op)


def _unsqueeze(op: Operation) -> str:
    return op.emit("Unsqueeze", op.x, op.integers("axes", [op["dim"]]))


def _permute(op: Operation) -> str:
    rank = _rank(op.node.args[0])
    return op.emit("Transpose", op.x, perm=[dim % rank for dim in op["dims"]])


def _transpose(op: Operation) -> str:
    rank = _rank(op.node.args[0])
    order = list(range(rank))
    first, second = op["dim0"] % rank, op["dim1"] % rank
    order[first], order[second] = second, first
    return op.emit("Transpose", op.x, perm=order)


def _concat(op: Operation) -> str:
    names = [op.tensor(value) for value in op["tensors"]]
    return names[0] if len(names) == 1 else op.emit("Concat", *names, axis=op["dim"])


def _slice(op: Operation) -> str:
    axis, length = op["dim"], shape_of(op.node.args[0])[op["dim"]]
    start, stop, step = op["start"] or 0, op["end"], op["step"]
    if start == 0 and step == 1 and (stop is None or (not isinstance(stop, fx.Node) and _covers(stop, length))):
        return op.x
    if isinstance(start, fx.Node) or isinstance(stop, fx.Node):
        raise op.refuse("at positions that depend on the data can't be exported")
    stop = np.iinfo(np.int64).max if stop is None else stop
    bounds = [op.integers(name, [value]) for name, value in (("starts", start), ("ends", stop), ("axes", axis))]
    return op.emit("Slice", op.x, *bounds, op.integers("steps", [step]))


def _covers(stop: int, length: int | torch.SymInt) -> bool:
    return stop == np.iinfo(np.int64).max or (isinstance(length, int) and stop >= length)


def _split(op: Operation) -> list[str]:
    """chunk, split and unbind by sizes: one Split node; the parts are taken by ``getitem``."""
    parts = [value.shape for value in op.node.meta["val"]]
    axis = op["dim"] % _rank(op.node.args[0])
    sizes = op.integers("split", [int(shape[axis]) for shape in parts])
    return op.writer.node_with_outputs("Split", [op.x, sizes], op.path, len(parts), axis=axis)


def _select(op: Operation) -> str:
    index = op.writer.constant(f"{op.path}.index", np.array(op["index"], np.int64))
    return op.emit("Gather", op.x, index, axis=op["dim"])


def _layer_norm(op: Operation) -> str:
    inputs = [op.x, op.tensor(op["weight"]) if op["weight"] is not None else op.tensor(1.0)]
    if op["bias"] is not None:
        inputs.append(op.tensor(op["bias"]))
    return op.emit("LayerNormalization", *inputs, axis=-len(op["normalized_shape"]), epsilon=op["eps"])


def _group_norm(op: Operation) -> str:
    """Each group becomes one channel of an InstanceNormalization; weight and bias are per channel and come after it."""
    groups, rank = op["num_groups"], _rank(op.node.args[0])
    channels = int(shape_of(op.node)[1])
    ones = op.writer.constant(f"{op.path}.ones", np.ones(groups, np.float32))
    zeros = op.writer.constant(f"{op.path}.zeros", np.zeros(groups, np.float32))
    grouped = op.emit("Reshape", op.x, op.integers("groups", [0, groups, -1]))
    normalised = op.emit("InstanceNormalization", grouped, ones, zeros, epsilon=op["eps"])
    out = op.emit("Reshape", normalised, op.integers("shape", [-1, *[int(size) for size in shape_of(op.node)[1:]]]))
    per_channel = op.integers("per_channel", [channels] + [1] * (rank - 2))
    for op_type, name in (("Mul", "weight"), ("Add", "bias")):
        if op[name] is not None:
            out = op.emit(op_type, out, op.emit("Reshape", op.tensor(op[name]), per_channel))
    return out


def _batch_norm(op: Operation) -> str:
    """A BatchNorm in eval mode that no convolution could take in."""
    if op["training"]:
        raise op.refuse("in training mode can't be exported; call eval() on the model")
    inputs = [op.tensor(op[name]) for name in ("weight", "bias", "running_mean", "running_var")]
    return op.emit("BatchNormalization", op.x, *inputs, epsilon=op["eps"])


def _softmax(op: Operation) -> str:
    return op.emit("Softmax", op.x, axis=op["dim"])


_ELEMENTWISE: dict[str, Emit] = {
    "sigmoid": _unary("Sigmoid"),
    "relu": _unary("Relu"),
    "tanh": _unary("Tanh"),
    "silu": _silu,
    "gelu": _gelu,
    "hardswish": _unary("HardSwish"),
    "hardsigmoid": _unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    "hardtanh": _clip("min_val", "max_val"),
    "clamp": _clip("min", "max"),
    "relu6": _relu6,
    "leaky_relu": lambda op: op.emit("LeakyRelu", op.x, alpha=op["negative_slope"]),
    "elu": lambda op: op.emit("Elu", op.x, alpha=op["alpha"]),
    "mish": lambda op: op.emit("Mul", op.x, op.emit("Tanh", op.emit("Softplus", op.x))),
    "sqrt": _unary("Sqrt"),
    "exp": _unary("Exp"),
    "neg": _unary("Neg"),
    "abs": _unary("Abs"),
}

OPERATIONS: dict[Any, Emit] = {
    **{
        getattr(aten, name + suffix).default: emit
        for name, emit in _ELEMENTWISE.items()
        for suffix in ("", "_")
        if hasattr(aten, name + suffix)
    },
    aten.add.Tensor: _binary("Add"),
    aten.add_.Tensor: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.mul_.Tensor: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.div_.Tensor: _binary("Div"),
    aten.pow.Tensor_Scalar: _binary("Pow"),
    aten.matmul.default: _binary("MatMul"),
    aten.adaptive_avg_pool2d.default: _adaptive_average_pool,
    aten.avg_pool2d.default: _pool("AveragePool"),
    aten.max_pool2d.default: _pool("MaxPool"),
    aten.mean.dim: _mean,
    aten.sum.dim_IntList: _sum,
    aten.amax.default: _amax,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.flatten.using_ints: _flatten,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.unflatten.int: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.unsqueeze.default: _unsqueeze,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.cat.default: _concat,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.chunk.default: _split,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.layer_norm.default: _layer_norm,
    aten.group_norm.default: _group_norm,
    aten.batch_norm.default: _batch_norm,
    aten.softmax.int: _softmax,
}

# Operations that do nothing in eval mode, or nothing that ONNX could tell.
IDENTITIES = frozenset(
    {
        aten.dropout.default,
        aten.dropout_.default,
        aten.feature_dropout.default,
        aten.alias.default,
        aten.detach.default,
        aten.detach_.default,
        aten.contiguous.default,
        aten.clone.default,
    }
)
