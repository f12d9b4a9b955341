"""Ranges of weights, chosen from the weights alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from effnet_quant.quantization.fake_quant import fake_quantize
from effnet_quant.quantization.spec import TensorSpec

_CANDIDATES = 100


def default_weight_range(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """The range that holds all values on grids of 8 bits or more, and the one of the smallest squared error on others."""
    return covering_weight_range(weight, spec) if spec.bits >= 8 else mse_weight_range(weight, spec)


def covering_weight_range(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Both ends of the ranges that hold all values of a weight tensor, in the shape of its ``amax``."""
    dims, keep = shared_dims(weight, spec)
    values = weight.detach().float()
    if spec.symmetric:
        amax = (values.abs() if spec.signed else values.clamp(min=0)).amax(dim=dims, keepdim=keep)
        return -amax, amax
    return values.amin(dim=dims, keepdim=keep), values.amax(dim=dims, keepdim=keep)


def mse_weight_range(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Both ends of the ranges of a weight tensor, in the shape of its ``amax``.

    Each is the range with the smallest squared error among 100 shrunken copies of the range of its values.
    """
    amin, amax = covering_weight_range(weight, spec)
    best = [amin, amax]
    smallest = torch.full_like(amax, torch.inf)
    fixed = replace(spec, learned=False)
    for index in range(_CANDIDATES, 0, -1):
        candidate = [amin * (index / _CANDIDATES), amax * (index / _CANDIDATES)]
        error = (fake_quantize(weight, candidate[1], fixed, candidate[0]) - weight).square().sum_to_size(amax.shape)
        better = error < smallest
        smallest = torch.where(better, error, smallest)
        best = [torch.where(better, new, old) for new, old in zip(candidate, best, strict=True)]
    return best[0], best[1]


def shared_dims(weight: Tensor, spec: TensorSpec) -> tuple[list[int], bool]:
    """The dimensions whose values share a range, and the ``keepdim`` of a reduction over them."""
    return list(range(weight.dim()))[spec.per_channel :], spec.per_channel
