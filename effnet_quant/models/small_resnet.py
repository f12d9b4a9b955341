"""SmallResNet: a wide and short ResNet for small images, which a CPU trains in minutes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from effnet_quant.models.cifar_resnet import BasicBlock


class _ConvUnit(nn.Module):
    """A 3x3 convolution, BatchNorm and ReLU."""

    def __init__(self, in_channels: int, channels: int, *, bn_momentum: float, bn_epsilon: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=bn_epsilon, momentum=bn_momentum)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class SmallResNet(nn.Module):
    """Nine layers: (N, in_channels, H, W) float images to (N, num_classes) logits. H and W are at least 8.

    The stem keeps every pixel. Three max poolings halve the image, where ImageNet's networks have halved it five times. The
    plan is that of David Page's ResNet-9 (DAWNBench, 2018); the blocks are those of ``CifarResNet``, so that additions fuse.

    Args:
        num_classes: number of logits.
        width: channels of the first layer; the others have 2, 4 and 8 times as many.
        in_channels: channels of the input.
        dropout: before the classifier.
        conv_init: "fan_in" or "fan_out", the mode of the Kaiming initialisation.
        bn_momentum, bn_epsilon: of every BatchNorm.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        width: int = 32,
        in_channels: int = 3,
        dropout: float = 0.0,
        conv_init: str = "fan_in",
        bn_momentum: float = 0.1,
        bn_epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        norm = {"bn_momentum": bn_momentum, "bn_epsilon": bn_epsilon}
        self.stem = _ConvUnit(in_channels, width, **norm)
        self.conv1 = _ConvUnit(width, 2 * width, **norm)
        self.block1 = BasicBlock(2 * width, 2 * width, 1, **norm)
        self.conv2 = _ConvUnit(2 * width, 4 * width, **norm)
        self.conv3 = _ConvUnit(4 * width, 8 * width, **norm)
        self.block3 = BasicBlock(8 * width, 8 * width, 1, **norm)
        self.max_pooling = nn.MaxPool2d(2)
        self.pooling = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode=conv_init, nonlinearity="relu")  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.max_pooling(self.conv1(self.stem(x))))
        x = self.max_pooling(self.conv3(self.max_pooling(self.conv2(x))))
        return self.linear(self.dropout(self.pooling(self.block3(x)).flatten(1)))
