"""Rounding of weights that gradient descent can learn (AdaRound, Nagel et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effnet_quant.quantization.grid import quantize
from effnet_quant.quantization.quantizer import TensorQuantizer

# the stretched sigmoid of Louizos et al. 2018, with AdaRound's constants
_LOW, _HIGH = -0.1, 1.1


class SoftRounding(nn.Module):
    """Stands in for a layer's weight quantizer while the rounding of its weights is learned.

    Each weight lies between the two nearest values of its grid; a learned share says where.

    Args:
        quantizer: the layer's weight quantizer, with ranges.
        weight: the float weights.

    Attributes:
        logits: of the shares, in the shape of the weights. They start where the weights themselves are.
    """

    def __init__(self, quantizer: TensorQuantizer, weight: Tensor) -> None:
        super().__init__()
        self.spec = quantizer.spec
        self.low, self.high = self.spec.bounds
        self.scale = quantizer.scale
        self.zero_point = quantizer.zero_point
        ratio = weight.detach().float() / self.scale
        self.floor = torch.floor(ratio)
        share = ((ratio - self.floor) - _LOW) / (_HIGH - _LOW)
        self.logits = nn.Parameter(torch.logit(share))

    def shares(self) -> Tensor:
        """How far each weight is from the lower to the upper value: 0 … 1."""
        return (torch.sigmoid(self.logits) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        integers = (self.floor + self.shares() + self.zero_point).clamp(self.low, self.high)
        return (integers - self.zero_point) * self.scale

    def undecided(self, beta: float) -> Tensor:
        """Mean of 1 - |2 share - 1|^beta: 0 if every share is 0 or 1. A smaller beta pulls harder at the ends."""
        return (1 - (2 * self.shares() - 1).abs().pow(beta)).mean()

    @torch.no_grad()
    def decided(self) -> Tensor:
        """The weights on their grid, each rounded to the nearer end. Rounding them again changes nothing."""
        integers = (self.floor + (self.shares() >= 0.5) + self.zero_point).clamp(self.low, self.high)
        values = (integers - self.zero_point) * self.scale
        again = quantize(values, self.scale, self.spec, self.zero_point)
        assert torch.equal(again, integers)
        return values
