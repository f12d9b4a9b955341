"""One table that says of each operation whether it moves, clips, averages … its values.

Placement looks up what torch.fx records: functions, names of methods, classes of modules. Export looks up what torch.export
records: ATen overloads.
"""

from __future__ import annotations

import enum
import operator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from effnet_quant.quantization.quantized_layers import QuantAdaptiveAvgPool2d, QuantAvgPool2d
from effnet_quant.quantization.quantizer import TensorQuantizer

aten = torch.ops.aten


class Kind(enum.Flag):
    """What an operation does in eval mode with the values of its first operand."""

    IDENTITY = enum.auto()
    """It returns the values unchanged."""
    RESHAPES = enum.auto()
    """It returns every value once, in another shape or order."""
    MOVES = enum.auto()
    """Every result is one of the values. Rounding before or after gives the same."""
    CLIPS = enum.auto()
    """It clamps the values between two fixed ends. Rounding before or after gives the same."""
    MONOTONIC = enum.auto()
    """It is elementwise, and a larger value never gives a smaller result."""
    ROUNDS = enum.auto()
    """It rounds the values to a grid that holds zero."""
    AVERAGES = enum.auto()
    """Every result is a mean of values."""
    NEVER_NEGATIVE = enum.auto()
    """No result is below zero, for any values."""
    ADDS = enum.auto()
    """It adds two operands."""
    MULTIPLIES = enum.auto()
    """It multiplies two operands."""
    CONCATENATES = enum.auto()
    """It concatenates its operands."""
    CONVOLVES = enum.auto()
    """It is a convolution; the weights are the second operand."""


class _Row(NamedTuple):
    kind: Kind
    functions: tuple[Any, ...] = ()
    methods: tuple[str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    overloads: tuple[Any, ...] = ()


_RELU = Kind.CLIPS | Kind.MONOTONIC | Kind.NEVER_NEGATIVE
_SQUASHING = Kind.MONOTONIC | Kind.NEVER_NEGATIVE

_TABLE = (
    _Row(
        _RELU,
        (F.relu, F.relu_, torch.relu, torch.relu_),
        ("relu", "relu_"),
        (nn.ReLU,),
        (aten.relu.default, aten.relu_.default),
    ),
    _Row(_RELU, (F.relu6,), (), (nn.ReLU6,), (aten.relu6.default, aten.relu6_.default)),
    _Row(
        Kind.CLIPS | Kind.MONOTONIC,
        (F.hardtanh, torch.clamp),
        ("clamp",),
        (nn.Hardtanh,),
        (
            aten.hardtanh.default,
            aten.hardtanh_.default,
            aten.clamp.default,
            aten.clamp_.default,
            aten.clamp_min.default,
            aten.clamp_max.default,
        ),
    ),
    _Row(
        _SQUASHING,
        (torch.sigmoid, F.sigmoid),
        ("sigmoid", "sigmoid_"),
        (nn.Sigmoid,),
        (aten.sigmoid.default, aten.sigmoid_.default),
    ),
    _Row(_SQUASHING, (F.hardsigmoid,), (), (nn.Hardsigmoid,), (aten.hardsigmoid.default, aten.hardsigmoid_.default)),
    _Row(Kind.NEVER_NEGATIVE, (torch.softmax, F.softmax), ("softmax",), (nn.Softmax,), (aten.softmax.int,)),
    # a maximum is one of the values
    _Row(Kind.MOVES, (F.max_pool2d,), (), (nn.MaxPool2d,), (aten.max_pool2d.default, aten.adaptive_max_pool2d.default)),
    _Row(
        Kind.MOVES | Kind.RESHAPES,
        (torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze),
        ("flatten", "view", "reshape", "squeeze", "unsqueeze"),
        (nn.Flatten,),
        (
            aten.flatten.using_ints,
            aten.view.default,
            aten._unsafe_view.default,
            aten.reshape.default,
            aten.unflatten.int,
            aten.reshape_as.default,
            aten.view_as.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
        ),
    ),
    _Row(
        Kind.MOVES | Kind.RESHAPES,
        (torch.transpose, torch.permute),
        ("transpose", "permute"),
        (),
        (aten.transpose.int, aten.t.default, aten.permute.default),
    ),
    _Row(
        Kind.MOVES,
        (torch.chunk, operator.getitem),
        ("chunk",),
        (),
        (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor, aten.select.int),
    ),
    _Row(
        Kind.IDENTITY | Kind.RESHAPES | Kind.MOVES | Kind.MONOTONIC,
        (F.dropout,),
        ("contiguous",),
        (nn.Identity, nn.Dropout),
        (
            aten.dropout.default,
            aten.dropout_.default,
            aten.feature_dropout.default,
            aten.contiguous.default,
            aten.clone.default,
            aten.alias.default,
            aten.detach.default,
            aten.detach_.default,
        ),
    ),
    _Row(
        Kind.AVERAGES,
        (F.adaptive_avg_pool2d, F.avg_pool2d, torch.mean),
        ("mean",),
        (nn.AdaptiveAvgPool2d, nn.AvgPool2d, QuantAdaptiveAvgPool2d, QuantAvgPool2d),
        (aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.mean.dim, aten.mean.default),
    ),
    _Row(Kind.ROUNDS | Kind.MONOTONIC, modules=(TensorQuantizer,)),
    _Row(
        Kind.ADDS,
        (operator.add, operator.iadd, torch.add),
        ("add", "add_"),
        (),
        (aten.add.Tensor, aten.add_.Tensor),
    ),
    _Row(
        Kind.MULTIPLIES,
        (operator.mul, operator.imul, torch.mul),
        ("mul", "mul_"),
        (),
        (aten.mul.Tensor, aten.mul_.Tensor),
    ),
    _Row(Kind.CONCATENATES, (torch.cat, torch.concat), (), (), (aten.cat.default,)),
    _Row(
        Kind.CONVOLVES,
        overloads=(
            aten.conv2d.default,
            aten.conv2d.padding,
            aten.conv1d.default,
            aten.conv1d.padding,
            aten.conv3d.default,
            aten.conv3d.padding,
        ),
    ),
)
NOTHING = Kind(0)
_KINDS: dict[Any, Kind] = {operation: row.kind for row in _TABLE for operations in row[1:] for operation in operations}


def kind_of(operation: Any) -> Kind:
    """The kind of an operation; ``Kind(0)`` if the table does not have it.

    Args:
        operation: a function, a tensor method's name, an ATen overload, or a module's class. Subclasses are not found,
            because they may compute anything.
    """
    return _KINDS.get(operation, NOTHING)


def kind_of_base(module: type[nn.Module]) -> Kind:
    """The kind of a module's class or, if the table does not have it, of its nearest base class."""
    return next((_KINDS[base] for base in module.__mro__ if base in _KINDS), NOTHING)
