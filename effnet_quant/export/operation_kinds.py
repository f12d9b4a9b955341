"""What each operation of a traced graph does to the values it gets: one table, read by every pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effnet_quant.export.custom_ops import CONV_PADDED, CONV_SAME, QUANTIZE, QUANTIZED_HARD_SIGMOID

aten = torch.ops.aten


@dataclass(frozen=True)
class OperationKind:
    """Properties of an operation in eval mode, as a function of its first argument.

    Attributes:
        identity: gives its input back.
        reshapes: every value of the input comes out once, in another shape or order.
        moves: what comes out are values of the input, some perhaps several times or not at all. Rounding with one grid
            for the whole tensor may come before or after.
        clips: values between two bounds pass, and the others become the nearer bound.
        monotonic: of each value by itself, and larger values give no smaller results.
        rounds: the result lies on a grid.
        convolves: a convolution.
    """

    identity: bool = False
    reshapes: bool = False
    moves: bool = False
    clips: bool = False
    monotonic: bool = False
    rounds: bool = False
    convolves: bool = False


_IDENTITY = OperationKind(identity=True, reshapes=True, moves=True, monotonic=True)
_RESHAPING = OperationKind(reshapes=True, moves=True)
_MOVING = OperationKind(moves=True)
_CLIPPING = OperationKind(clips=True, monotonic=True)
_MONOTONIC = OperationKind(monotonic=True)
_ROUNDING = OperationKind(rounds=True, monotonic=True)
_CONVOLUTION = OperationKind(convolves=True)
_OTHER = OperationKind()

OPERATION_KINDS: dict[Any, OperationKind] = {
    QUANTIZE: _ROUNDING,
    QUANTIZED_HARD_SIGMOID: _ROUNDING,
    **dict.fromkeys(
        (aten.conv2d.default, aten.conv2d.padding, aten.conv1d.default, aten.conv1d.padding, CONV_SAME, CONV_PADDED),
        _CONVOLUTION,
    ),
    **dict.fromkeys(
        (
            aten.dropout.default,
            aten.dropout_.default,
            aten.feature_dropout.default,
            aten.alias.default,
            aten.detach.default,
            aten.detach_.default,
            aten.contiguous.default,
            aten.clone.default,
        ),
        _IDENTITY,
    ),
    **dict.fromkeys(
        (
            aten.flatten.using_ints,
            aten.view.default,
            aten.reshape.default,
            aten.unflatten.int,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
            aten.reshape_as.default,
            aten.view_as.default,
            aten.permute.default,
            aten.transpose.int,
            aten.t.default,
        ),
        _RESHAPING,
    ),
    **dict.fromkeys(
        (
            aten.max_pool2d.default,
            aten.expand.default,
            aten.expand_as.default,
            aten.repeat.default,
            aten.roll.default,
            aten.pixel_shuffle.default,
            aten.pixel_unshuffle.default,
            aten.slice.Tensor,
            aten.select.int,
            aten.index.Tensor,
            aten.index_select.default,
            aten.upsample_nearest2d.vec,
            aten.amax.default,
        ),
        _MOVING,
    ),
    **dict.fromkeys(
        (
            aten.relu.default,
            aten.relu6.default,
            aten.hardtanh.default,
            aten.clamp.default,
            aten.clamp_min.default,
            aten.clamp_max.default,
        ),
        _CLIPPING,
    ),
    **dict.fromkeys(
        (
            aten.sigmoid.default,
            aten.hardsigmoid.default,
            aten.tanh.default,
            aten.leaky_relu.default,
            aten.elu.default,
            aten.selu.default,
            aten.softplus.default,
            aten.exp.default,
            aten.sqrt.default,
        ),
        _MONOTONIC,
    ),
}


def kind_of(node: fx.Node) -> OperationKind:
    """The properties of a node's operation; none where the table does not know it."""
    return OPERATION_KINDS.get(node.target, _OTHER)
