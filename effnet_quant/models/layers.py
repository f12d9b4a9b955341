"""Building blocks: convolution unit, squeeze-and-excitation, and marks for quantizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class QuantPoint(nn.Identity):
    """Marks an operand that ``quantize`` puts a quantizer on; the identity until then.

    Convolutions and linear layers hold their quantizers themselves. Elementwise operations have no module, so a network's
    definition marks their operands. Float and quantized networks then share one definition.

    Args:
        operation: the operation that takes the operand, "add" or "mul". Targets choose by it.
    """

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.operation = operation


class OutputPoint(nn.Identity):
    """Marks the output of a layer (after its BatchNorm) that no other quantizer follows at once; the identity.

    NVIDIA's placement has no quantizer there. Some runtimes need one to run the convolution on integers.

    Args:
        layer: the name of the convolution or linear layer within the module that holds this mark.
    """

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer


class ConvBNAct(nn.Sequential):
    """Convolution without bias, BatchNorm and, unless ``activation`` is False, SiLU. Children: conv, bn, output, act.

    ``added`` marks the output, because it goes into an addition and no quantizer follows the convolution.

    Padding is ``(kernel_size - 1) // 2`` on every side, as in NVIDIA's definition. So an even input size n gives n / stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
        added: bool = False,
        bn_momentum: float = 0.01,
        bn_epsilon: float = 1e-3,
    ) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=bn_epsilon, momentum=bn_momentum)
        if activation or added:
            self.output = OutputPoint("conv")
        if activation:
            self.act = nn.SiLU(inplace=True)


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018): x * sigmoid(expand(SiLU(squeeze(mean(x))))).

    Args:
        channels: channels of the input, shape (N, channels, H, W).
        squeezed: width of the bottleneck.
        as_conv: hold the two layers as 1x1 convolutions, weights (out, in, 1, 1), instead of linear layers, weights
            (out, in). TensorRT fuses convolutions best, and the quantized networks have them.
    """

    def __init__(self, channels: int, squeezed: int, *, as_conv: bool) -> None:
        super().__init__()
        self.as_conv = as_conv
        self.pooling = nn.AdaptiveAvgPool2d(1)
        self.squeeze: nn.Module
        self.expand: nn.Module
        if as_conv:
            self.squeeze = nn.Conv2d(channels, squeezed, 1)
            self.expand = nn.Conv2d(squeezed, channels, 1)
        else:
            self.squeeze = nn.Linear(channels, squeezed)
            self.expand = nn.Linear(squeezed, channels)
        self.expand_output = OutputPoint("expand")
        self.squeeze_output = OutputPoint("squeeze")
        self.act = nn.SiLU(inplace=True)
        self.mul_a_quantizer = QuantPoint("mul")
        self.mul_b_quantizer = QuantPoint("mul")

    def forward(self, x: Tensor) -> Tensor:
        gate = self.pooling(x)
        if not self.as_conv:
            gate = gate.flatten(1)
        gate = self.act(self.squeeze_output(self.squeeze(gate)))
        gate = torch.sigmoid(self.expand_output(self.expand(gate)))
        if not self.as_conv:
            gate = gate.unsqueeze(2).unsqueeze(3)
        return self.mul_a_quantizer(gate) * self.mul_b_quantizer(x)
