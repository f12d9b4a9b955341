"""What a BatchNorm in eval mode computes, as one factor and one offset per channel."""

from __future__ import annotations

import torch
from torch import Tensor


def factor_and_offset(
    weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """BatchNorm's y = factor * x + offset; both float64, of shape (C,), as the arguments are.

    A convolution takes a BatchNorm behind it into itself: factor * weights, and factor * its own bias + offset. Simulation
    and exported files both fold with these numbers.
    """
    factor = weight.double() / torch.sqrt(running_var.double() + eps)
    return factor, bias.double() - running_mean.double() * factor
