"""LayerNorm, GroupNorm, RMSNorm, and BatchNorm that is not folded into a convolution."""

from __future__ import annotations

import numpy as np

from effnet_quant.export.operation import Operation, rank


def layer_norm(op: Operation) -> str:
    """LayerNorm over the last dimensions."""
    inputs = [op.x, op.tensor(op["weight"]) if op["weight"] is not None else op.tensor(1.0)]
    if op["bias"] is not None:
        inputs.append(op.tensor(op["bias"]))
    return op.emit("LayerNormalization", *inputs, axis=-len(op["normalized_shape"]), epsilon=op["eps"])


def group_norm(op: Operation) -> str:
    """GroupNorm as InstanceNormalization: each group becomes one channel. Weight and bias per channel follow."""
    groups, dims = op["num_groups"], rank(op.node.args[0])
    channels, *inner = op.sizes(op.node, *range(1, dims))
    ones = op.writer.constant(f"{op.path}.ones", np.ones(groups, np.float32))
    zeros = op.writer.constant(f"{op.path}.zeros", np.zeros(groups, np.float32))
    grouped = op.emit("Reshape", op.x, op.integers("groups", [0, groups, -1]))
    normalised = op.emit("InstanceNormalization", grouped, ones, zeros, epsilon=op["eps"])
    out = op.emit("Reshape", normalised, op.integers("shape", [-1, channels, *inner]))
    per_channel = op.integers("per_channel", [channels] + [1] * (dims - 2))
    for op_type, name in (("Mul", "weight"), ("Add", "bias")):
        if op[name] is not None:
            out = op.emit(op_type, out, op.emit("Reshape", op.tensor(op[name]), per_channel))
    return out


def batch_norm(op: Operation) -> str:
    """A BatchNorm in eval mode that is not folded into a convolution."""
    if op["training"]:
        raise op.refuse("in training mode can't be exported; call eval() on the model")
    inputs = [op.tensor(op[name]) for name in ("weight", "bias", "running_mean", "running_var")]
    return op.emit("BatchNormalization", op.x, *inputs, epsilon=op["eps"])


def rms_norm(op: Operation) -> str:
    """RMSNorm: x / sqrt(mean(x^2) + eps) over the last dimensions, times the weights."""
    axes = list(range(-len(op["normalized_shape"]), 0))
    squares = op.writer.reduce("ReduceMean", op.emit("Mul", op.x, op.x), axes, op.path, keepdims=True)
    eps = float(np.finfo(np.float32).eps) if op["eps"] is None else op["eps"]
    out = op.emit("Div", op.x, op.emit("Sqrt", op.emit("Add", squares, op.tensor(eps))))
    return out if op["weight"] is None else op.emit("Mul", out, op.tensor(op["weight"]))
