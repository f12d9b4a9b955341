"""Folds BatchNorm into the weights of the convolution before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effnet_quant.quantization.batch_norm import factor_and_offset
from effnet_quant.quantization.biases import FoldedBatchNorm2d
from effnet_quant.quantization.calibration.weight_ranges import default_weight_range
from effnet_quant.quantization.eager_evaluation import Batch
from effnet_quant.quantization.ptq.step import DEFAULT_CONTEXT, StepContext
from effnet_quant.quantization.quantized_layers import QuantConv2d
from effnet_quant.quantization.quantizer import TensorQuantizer


@dataclass(frozen=True)
class BatchNormFolding:
    """Puts the factor of each BatchNorm into the weights of its convolution, and leaves the BatchNorm an addition.

    The network computes the same. Steps that choose ranges or round weights then see the weights that engines have: one
    range per tensor, or a grid with few levels, suits them better. Weights with ranges get new ones. Names and shapes in the
    state dict stay. Training with BatchNorm's batch statistics no longer works afterwards; freeze them.

    It needs no batches and no ranges.
    """

    def __call__(self, model: nn.Module, batches: Sequence[Batch], context: StepContext = DEFAULT_CONTEXT) -> None:
        fold_batch_norms(model)


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> list[str]:
    """Do what ``BatchNormFolding`` does. Returns the names of the BatchNorms that were folded."""
    names = []
    for name, norm, layer in foldable(model):
        factor, offset = factor_and_offset(*_parameters(norm), norm.eps)
        layer.weight.mul_(factor.reshape(-1, 1, 1, 1))
        if layer.bias is not None:
            layer.bias.mul_(factor)
        reset_batch_norm(norm, offset)
        quantizer = layer._weight_quantizer
        if isinstance(quantizer, TensorQuantizer) and quantizer.enabled:
            quantizer.set_range(*default_weight_range(layer.weight, quantizer.spec))
        names.append(name)
    return names


def foldable(model: nn.Module) -> Iterator[tuple[str, FoldedBatchNorm2d, QuantConv2d]]:
    """The BatchNorms that are not folded yet and that engines fold, with their names and their convolutions.

    A convolution that computes its weights, e.g. a standardised one, is left out.
    """
    for name, norm in model.named_modules():
        if isinstance(norm, FoldedBatchNorm2d) and type(norm._layer[0]) is QuantConv2d and not is_folded(norm):
            yield name, norm, norm._layer[0]


def is_folded(norm: nn.BatchNorm2d) -> bool:
    """Whether a BatchNorm in eval mode only adds its bias."""
    weight, _, mean, variance = _parameters(norm)
    return bool((weight == 1).all() and (mean == 0).all() and (variance == _one(variance, norm.eps)).all())


@torch.no_grad()
def reset_batch_norm(norm: nn.BatchNorm2d, bias: Tensor) -> None:
    """Make a BatchNorm in eval mode add ``bias`` (C,) and do nothing else."""
    weight, own_bias, mean, variance = _parameters(norm)
    weight.fill_(1)
    own_bias.copy_(bias)
    mean.zero_()
    variance.copy_(_one(variance, norm.eps))


def _one(variance: Tensor, eps: float) -> Tensor:
    """The variance with which the factor 1 / sqrt(variance + eps) is 1 to within float32's rounding."""
    return torch.full_like(variance, 1 - eps)


def _parameters(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    return norm.weight, norm.bias, mean, variance
