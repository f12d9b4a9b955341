"""BatchNorm in eval mode as one factor and one offset per channel."""

from __future__ import annotations

import torch
from torch import Tensor


def factor_and_offset(
    weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Factor and offset of BatchNorm's y = factor * x + offset. Arguments have shape (C,); results are float64 (C,).

    Folding BatchNorm into the convolution before it gives the weights factor * weight and the bias factor * bias + offset.
    Simulation and export both fold with these numbers.
    """
    factor = weight.double() / torch.sqrt(running_var.double() + eps)
    return factor, bias.double() - running_mean.double() * factor
