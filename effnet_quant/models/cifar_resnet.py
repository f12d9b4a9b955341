"""The ResNets for 32x32 images (He et al. 2015, arXiv:1512.03385, section 4.2): three stages, parameter-free shortcuts.

Parameter names are those of the published weights (github.com/akamaster/pytorch_resnet_cifar10).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from effnet_quant.models.layers import OutputPoint, QuantPoint

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    If the block halves the image and doubles the channels, the shortcut takes every second pixel. It pads the channels with
    zeros, half of them before and half after the old ones (option A of the paper). The shortcut passes
    ``residual_quantizer``. The other operand stays in float, so the convolution and the addition fuse.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, bn_momentum: float, bn_epsilon: float) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (channels - in_channels) // 2
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, eps=bn_epsilon, momentum=bn_momentum)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, eps=bn_epsilon, momentum=bn_momentum)
        self.output = OutputPoint("conv2")
        self.residual_quantizer = QuantPoint("add")

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.output(self.bn2(self.conv2(out)))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.padding:
            x = F.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(self.residual_quantizer(x) + out, inplace=True)


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers: (N, in_channels, H, W) float images to (N, num_classes) logits.

    Args:
        depth: number of layers, 20, 32, 44, 56 or 110 in the paper.
        num_classes: number of logits.
        in_channels: channels of the input.
        conv_init: "fan_in" or "fan_out", the mode of the Kaiming initialisation.
        bn_momentum, bn_epsilon: of every BatchNorm.
    """

    def __init__(
        self,
        *,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        conv_init: str = "fan_in",
        bn_momentum: float = 0.1,
        bn_epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0], eps=bn_epsilon, momentum=bn_momentum)
        channels = WIDTHS[0]
        for index, width in enumerate(WIDTHS):
            stage = nn.Sequential()
            for block in range((depth - 2) // 6):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(BasicBlock(channels, width, stride, bn_momentum=bn_momentum, bn_epsilon=bn_epsilon))
                channels = width
            self.add_module(f"layer{index + 1}", stage)
        self.pooling = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode=conv_init, nonlinearity="relu")  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for index in range(len(WIDTHS)):
            x = self.get_submodule(f"layer{index + 1}")(x)
        return self.linear(self.pooling(x).flatten(1))
