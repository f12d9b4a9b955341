"""What the table says of an operation is what the operation does with numbers."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_quant.quantization.operation_kinds import Kind, kind_of, kind_of_base
from effnet_quant.quantization.quantizer import TensorQuantizer

aten = torch.ops.aten
# the arguments behind the first of what takes some
ARGUMENTS: dict[Any, tuple[Any, ...]] = {
    F.hardtanh: (-1.0, 0.5), torch.clamp: (-1.0, 0.5), "clamp": (-1.0, 0.5), nn.Hardtanh: (-1.0, 0.5),
    aten.clamp.default: (-1.0, 0.5), aten.clamp_min.default: (-0.5,), aten.clamp_max.default: (0.5,),
    torch.softmax: (1,), F.softmax: (1,), "softmax": (1,), nn.Softmax: (1,), aten.softmax.int: (1,),
    F.max_pool2d: (2,), nn.MaxPool2d: (2,), aten.max_pool2d.default: (2,), aten.adaptive_max_pool2d.default: ([2, 2],),
    "view": (-1,), "reshape": (-1,), torch.reshape: ((-1,),), aten.view.default: ([-1],), aten.reshape.default: ([-1],),
    torch.unsqueeze: (0,), "unsqueeze": (0,), aten.unsqueeze.default: (0,), aten.squeeze.dim: (0,),
    torch.transpose: (0, 1), "transpose": (0, 1), aten.transpose.int: (0, 1),
    torch.permute: ((1, 0, 2, 3),), "permute": (1, 0, 2, 3), aten.permute.default: ((1, 0, 2, 3),),
    torch.chunk: (2,), "chunk": (2,), aten.chunk.default: (2,), aten.split.Tensor: (1,), operator.getitem: (0,),
    aten.unflatten.int: (1, [2, 2]),
    aten.slice.Tensor: (0, 0, 1), aten.select.int: (0, 0), aten.dropout.default: (0.5, False),
    aten.feature_dropout.default: (0.5, False), F.dropout: (0.5, False),
    F.adaptive_avg_pool2d: (1,), F.avg_pool2d: (2,), nn.AdaptiveAvgPool2d: (1,), nn.AvgPool2d: (2,),
    aten.adaptive_avg_pool2d.default: ([1, 1],), aten.avg_pool2d.default: (2,), aten.mean.dim: ((2, 3),), "mean": ((2, 3),),
}  # fmt: skip
WITHOUT_ARGUMENTS = [
    F.relu, torch.relu, "relu", nn.ReLU, aten.relu.default, F.relu6, nn.ReLU6, aten.relu6.default, aten.hardtanh.default,
    torch.sigmoid, F.sigmoid, "sigmoid", nn.Sigmoid, aten.sigmoid.default, F.hardsigmoid, nn.Hardsigmoid,
    aten.hardsigmoid.default, torch.flatten, "flatten", nn.Flatten, aten.flatten.using_ints, torch.squeeze, "squeeze",
    aten.squeeze.default, "contiguous", nn.Identity, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.detach.default, torch.mean, aten.mean.default,
]  # fmt: skip


def name_of(operation: Any) -> str:
    """The same in every process, for the tests' names."""
    return str(operation) if isinstance(operation, (str, torch._ops.OpOverload)) else operation.__qualname__


def results(operation: Any, x: Tensor) -> list[Tensor]:
    arguments = ARGUMENTS.get(operation, ())
    if isinstance(operation, str):
        found = getattr(x, operation)(*arguments)
    elif isinstance(operation, type):
        found = operation(*arguments)(x)
    else:
        found = operation(x, *arguments)
    values = [found] if isinstance(found, Tensor) else found
    return [value for value in values if value.is_floating_point()]


@pytest.mark.parametrize("operation", [*ARGUMENTS, *WITHOUT_ARGUMENTS], ids=name_of)
def test_numbers_say_the_same(operation: Any) -> None:
    kind = kind_of(operation)
    assert kind
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    below_zero = torch.cat([value.flatten() for value in results(operation, x - 5)])
    assert bool(below_zero.min() >= 0) == bool(kind & Kind.NEVER_NEGATIVE)
    got = torch.cat([value.flatten() for value in results(operation, x.clone())])
    assert torch.isin(got, x).all() == bool(kind & Kind.MOVES)
    if kind & Kind.RESHAPES:
        torch.testing.assert_close(got.sort().values, x.flatten().sort().values, rtol=0, atol=0)
    if kind & Kind.IDENTITY:
        torch.testing.assert_close(got, x.flatten(), rtol=0, atol=0)
    if kind & Kind.CLIPS:
        torch.testing.assert_close(got, x.flatten().clamp(got.min(), got.max()))
    if kind & Kind.MONOTONIC:
        assert (got[x.flatten().argsort()].diff() >= 0).all()
    if kind & Kind.AVERAGES:
        torch.testing.assert_close(got.mean(), x.mean())
        assert len(got) < x.numel()


def test_subclasses_may_do_anything() -> None:
    class Shifted(nn.ReLU):
        pass

    assert kind_of(Shifted) == Kind(0)
    assert kind_of_base(Shifted) == kind_of(nn.ReLU)
    assert kind_of_base(nn.SiLU) == kind_of(F.silu) == Kind(0)
    assert kind_of(TensorQuantizer) & Kind.ROUNDS
