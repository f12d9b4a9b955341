"""OPERATIONS: the ATen operations that the exporter supports, and the ONNX nodes of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from effnet_quant.export import normalisations, shapes
from effnet_quant.export.operation import Emit, Operation, pair, rank

aten = torch.ops.aten


def _unary(op_type: str, **attributes: Any) -> Emit:
    return lambda op: op.emit(op_type, op.x, **attributes)


def _binary(op_type: str) -> Emit:
    def emit(op: Operation) -> str:
        alpha = op.node.kwargs.get("alpha", 1)
        if alpha != 1:
            raise op.refuse(f"with alpha={alpha} can't be exported; multiply before adding")
        return op.emit(op_type, op.tensor(op.node.args[0]), op.tensor(op.node.args[1], like=op.node))

    return emit


def _silu(op: Operation) -> str:
    return op.emit("Mul", op.x, op.emit("Sigmoid", op.x))


def _gelu(op: Operation) -> str:
    """GELU: x * (1 + erf(x / sqrt 2)) / 2, in the order of nodes that runtimes fuse; with tanh if the model asks for it."""

    def number(value: float) -> str:
        return op.tensor(value)

    if op["approximate"] == "tanh":
        cube = op.emit("Mul", op.emit("Mul", op.x, op.x), op.x)
        inner = op.emit("Add", op.x, op.emit("Mul", cube, number(0.044715)))
        gate = op.emit("Tanh", op.emit("Mul", inner, number((2 / np.pi) ** 0.5)))
    else:
        gate = op.emit("Erf", op.emit("Div", op.x, number(2**0.5)))
    return op.emit("Mul", op.emit("Mul", op.x, op.emit("Add", gate, number(1.0))), number(0.5))


def _add_product(op: Operation) -> str:
    """addcmul: x + value * a * b."""
    product = op.emit("Mul", op.tensor(op["tensor1"]), op.tensor(op["tensor2"]))
    return op.emit("Add", op.x, product if op["value"] == 1 else op.emit("Mul", product, op.tensor(op["value"])))


def _clip(low: str | None, high: str | None) -> Emit:
    def emit(op: Operation) -> str:
        bounds = [None if bound is None else op[bound] for bound in (low, high)]
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
    """Adaptive pooling. Equal windows are an AveragePool, unequal ones a product with a constant matrix per dimension."""
    x = op.x
    if pair(op["output_size"]) == [1, 1]:
        return op.emit("GlobalAveragePool", x)
    size = op.sizes(op.node.args[0], -2, -1)
    wanted = [length if wish is None else wish for wish, length in zip(pair(op["output_size"]), size, strict=True)]
    if wanted == size:
        return x
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


def _adaptive_max_pool(op: Operation) -> list[str]:
    wanted = pair(op["output_size"])
    if wanted == [1, 1]:
        return [op.emit("GlobalMaxPool", op.x)]
    size = op.sizes(op.node.args[0], -2, -1)
    if any(length % wish for length, wish in zip(size, wanted, strict=True)):
        raise op.refuse(
            f"from {size} to {wanted} has windows of unequal size and can't be exported; change the image size"
        )
    kernel = [length // wish for length, wish in zip(size, wanted, strict=True)]
    return [op.emit("MaxPool", op.x, kernel_shape=kernel, strides=kernel)]


def _axes(op: Operation) -> list[int]:
    dims = rank(op.node.args[0])
    return sorted(axis % dims for axis in (op["dim"] or range(dims)))


def _mean(op: Operation) -> str:
    axes = _axes(op)
    if rank(op.node.args[0]) == 4 and axes == [2, 3] and op["keepdim"]:
        return op.emit("GlobalAveragePool", op.x)
    return op.writer.reduce("ReduceMean", op.x, axes, op.path, keepdims=op["keepdim"])


def _sum(op: Operation) -> str:
    return op.emit("ReduceSum", op.x, op.integers("axes", _axes(op)), keepdims=int(op["keepdim"]))


def _amax(op: Operation) -> str:
    return op.writer.reduce("ReduceMax", op.x, _axes(op), op.path, keepdims=op["keepdim"])


def _euclidean_norm(op: Operation) -> str:
    if (op["ord"] if op.node.target is aten.linalg_vector_norm.default else op["p"]) != 2:
        raise op.refuse("of another order than 2 can't be exported")
    squares = op.emit("Mul", op.x, op.x)
    total = op.emit("ReduceSum", squares, op.integers("axes", _axes(op)), keepdims=int(op["keepdim"]))
    return op.emit("Sqrt", total)


def _variance(op: Operation) -> str:
    axes = _axes(op)
    correction = op["correction"] if op.node.target is aten.var.correction else int(op["unbiased"])
    correction = 1 if correction is None else correction
    centred = op.emit("Sub", op.x, op.writer.reduce("ReduceMean", op.x, axes, op.path, keepdims=True))
    squares = op.emit("Mul", centred, centred)
    variance = op.writer.reduce("ReduceMean", squares, axes, op.path, keepdims=op["keepdim"])
    if not correction:
        return variance
    count = int(np.prod(op.sizes(op.node.args[0], *axes)))
    return op.emit("Mul", variance, op.tensor(count / (count - correction)))


def _attention(op: Operation) -> str:
    """softmax(q k^T * scale + mask) v."""
    if op["is_causal"] or op["enable_gqa"]:
        raise op.refuse("with a causal mask or grouped queries can't be exported")
    query, key, value = (op.tensor(op[name]) for name in ("query", "key", "value"))
    dims = rank(op["query"])
    (length,) = op.sizes(op["query"], -1)
    scale = length**-0.5 if op["scale"] is None else op["scale"]
    order = [*range(dims - 2), dims - 1, dims - 2]
    scores = op.emit("MatMul", op.emit("Mul", query, op.tensor(scale)), op.emit("Transpose", key, perm=order))
    if op["attn_mask"] is not None:
        scores = op.emit("Add", scores, op.tensor(op["attn_mask"]))
    return op.emit("MatMul", op.emit("Softmax", scores, axis=-1), value)


def _cast(op: Operation) -> str:
    """A Cast, left out between floating-point types: a file has only one of these."""
    own, wanted = op.node.args[0].meta["val"].dtype, op.node.meta["val"].dtype  # type: ignore[union-attr]
    if own == wanted or (own.is_floating_point and wanted.is_floating_point):
        return op.x
    return op.emit("Cast", op.x, to=op.writer.element_type(wanted))


def _embedding(op: Operation) -> str:
    return op.emit("Gather", op.tensor(op["weight"]), op.tensor(op["indices"]), axis=0)


def _compare(op_type: str) -> Emit:
    def emit(op: Operation) -> str:
        x, other = op.node.args[:2]
        answer = op.emit(op_type.removeprefix("Not"), op.tensor(x), op.tensor(other, like=x))
        return op.emit("Not", answer) if op_type.startswith("Not") else answer

    return emit


def _einsum(op: Operation) -> str:
    return op.emit("Einsum", *(op.tensor(value) for value in op["tensors"]), equation=op["equation"])


def _transposed_convolution(op: Operation) -> str:
    dims = rank(op["weight"]) - 2

    def each(name: str) -> list[int]:
        given = list(op[name])
        return given * dims if len(given) == 1 else given

    inputs = [op.x, op.tensor(op["weight"])]
    if op["bias"] is not None:
        inputs.append(op.tensor(op["bias"]))
    return op.emit(
        "ConvTranspose",
        *inputs,
        kernel_shape=op.sizes(op["weight"])[2:],
        strides=each("stride"),
        pads=each("padding") * 2,
        output_padding=each("output_padding"),
        dilations=each("dilation"),
        group=op["groups"],
    )


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
    "softplus": _unary("Softplus"),
    "selu": _unary("Selu"),
    "reciprocal": _unary("Reciprocal"),
    "rsqrt": lambda op: op.emit("Reciprocal", op.emit("Sqrt", op.x)),
    "square": lambda op: op.emit("Mul", op.x, op.x),
    "clamp_min": _clip("min", None),
    "clamp_max": _clip(None, "max"),
}

OPERATIONS: dict[Any, Emit] = {
    **{getattr(aten, name).default: emit for name, emit in _ELEMENTWISE.items()},
    aten.add.Tensor: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.addcmul.default: _add_product,
    aten.pow.Tensor_Scalar: _binary("Pow"),
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.matmul.default: _binary("MatMul"),
    aten.bmm.default: _binary("MatMul"),
    aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
    aten.adaptive_avg_pool2d.default: _adaptive_average_pool,
    aten.avg_pool2d.default: _pool("AveragePool"),
    aten.max_pool2d.default: _pool("MaxPool"),
    aten.adaptive_max_pool2d.default: _adaptive_max_pool,
    aten.upsample_nearest2d.vec: shapes.resize("nearest"),
    aten.upsample_bilinear2d.vec: shapes.resize("linear"),
    aten.conv_transpose1d.default: _transposed_convolution,
    aten.conv_transpose2d.input: _transposed_convolution,
    aten.conv_transpose3d.input: _transposed_convolution,
    aten.mean.dim: _mean,
    aten.var.correction: _variance,
    aten.var.dim: _variance,
    aten.linalg_vector_norm.default: _euclidean_norm,
    aten.norm.ScalarOpt_dim: _euclidean_norm,
    aten.sum.dim_IntList: _sum,
    aten.amax.default: _amax,
    aten.pad.default: shapes.pad,
    aten.constant_pad_nd.default: shapes.pad,
    aten.flatten.using_ints: shapes.flatten,
    aten.view.default: shapes.reshape,
    aten.reshape.default: shapes.reshape,
    aten.unflatten.int: shapes.reshape,
    aten.squeeze.default: shapes.reshape,
    aten.squeeze.dim: shapes.reshape,
    aten.squeeze.dims: shapes.reshape,
    aten.unsqueeze.default: shapes.unsqueeze,
    aten.reshape_as.default: shapes.reshape,
    aten.view_as.default: shapes.reshape,
    aten.expand.default: shapes.expand,
    aten.expand_as.default: shapes.expand,
    aten.repeat.default: shapes.repeat,
    aten.permute.default: shapes.permute,
    aten.transpose.int: shapes.transpose,
    aten.t.default: shapes.transpose_matrix,
    aten.roll.default: shapes.roll,
    aten.pixel_shuffle.default: shapes.pixel_shuffle,
    aten.pixel_unshuffle.default: shapes.pixel_unshuffle,
    aten.stack.default: shapes.stack,
    aten.unbind.int: shapes.unbind,
    aten.cat.default: shapes.concat,
    aten.slice.Tensor: shapes.slice_,
    aten.select.int: shapes.select,
    aten.index.Tensor: shapes.index,
    aten.index_select.default: lambda op: op.emit("Gather", op.x, op.tensor(op["index"]), axis=op["dim"]),
    aten.chunk.default: shapes.split,
    aten.split.Tensor: shapes.split,
    aten.split_with_sizes.default: shapes.split,
    aten.embedding.default: _embedding,
    aten.eq.Scalar: _compare("Equal"),
    aten.ne.Scalar: _compare("NotEqual"),
    aten.gt.Scalar: _compare("Greater"),
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.type_as.default: _cast,
    aten.layer_norm.default: normalisations.layer_norm,
    aten.rms_norm.default: normalisations.rms_norm,
    aten.group_norm.default: normalisations.group_norm,
    aten.batch_norm.default: normalisations.batch_norm,
    aten.softmax.int: _softmax,
}
