"""EfficientNet (Tan & Le 2019, arXiv:1905.11946): one definition for the float and the quantized networks.

Parameter names, shapes and logits are those of NVIDIA's EfficientNet for PyTorch (DeepLearningExamples).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from effnet_quant.errors import UserError
from effnet_quant.models.layers import ConvBNAct, QuantPoint, SqueezeExcitation


@dataclass(frozen=True)
class Stage:
    """One stage of the B0 network, before scaling (Table 1 of the paper)."""

    kernel_size: int
    stride: int
    expansion: int
    in_channels: int
    out_channels: int
    repeats: int


B0_STAGES = (
    Stage(3, 1, 1, 32, 16, 1),
    Stage(3, 2, 6, 16, 24, 2),
    Stage(5, 2, 6, 24, 40, 2),
    Stage(3, 2, 6, 40, 80, 3),
    Stage(5, 1, 6, 80, 112, 3),
    Stage(5, 2, 6, 112, 192, 4),
    Stage(3, 1, 6, 192, 320, 1),
)
STEM_CHANNELS = 32
FEATURE_CHANNELS = 1280
SQUEEZE_RATIO = 0.25


def round_channels(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, but never below 90 % of it (the paper's reference code)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class MBConv(nn.Module):
    """Inverted bottleneck: 1x1 expansion, depthwise convolution, squeeze-and-excitation, 1x1 projection, shortcut.

    The shortcut exists if input and output have the same shape. It passes ``residual_quantizer``. The other operand stays
    in float, so the projection and the addition fuse into one integer kernel.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        wide_se: bool,
        se_as_conv: bool,
        drop_probability: float,
        bn_momentum: float,
        bn_epsilon: float,
    ) -> None:
        super().__init__()
        hidden = stage.in_channels * stage.expansion
        bn: dict[str, Any] = {"bn_momentum": bn_momentum, "bn_epsilon": bn_epsilon}
        self.expand = ConvBNAct(stage.in_channels, hidden, 1, **bn) if stage.expansion != 1 else None
        self.depsep = ConvBNAct(hidden, hidden, stage.kernel_size, stride=stage.stride, groups=hidden, **bn)
        squeezed = max(1, int((hidden if wide_se else stage.in_channels) * SQUEEZE_RATIO))
        self.se = SqueezeExcitation(hidden, squeezed, as_conv=se_as_conv)
        self.has_shortcut = stage.stride == 1 and stage.in_channels == stage.out_channels
        self.proj = ConvBNAct(hidden, stage.out_channels, 1, activation=False, added=self.has_shortcut, **bn)
        if self.has_shortcut:
            self.residual_quantizer = QuantPoint("add")
            self.stochastic_depth = StochasticDepth(drop_probability, "row")

    def forward(self, x: Tensor) -> Tensor:
        out = self.expand(x) if self.expand is not None else x
        # One name for all activations frees each one as soon as the next exists. So memory stays in the CPU's caches.
        out = self.depsep(out)
        out = self.se(out)
        out = self.proj(out)
        if self.has_shortcut:
            out = self.residual_quantizer(x) + self.stochastic_depth(out)
        return out


class EfficientNet(nn.Module):
    """EfficientNet classifier: (N, in_channels, H, W) float images to (N, num_classes) logits.

    Args:
        width: channel multiplier of the compound scaling.
        depth: repeat multiplier of the compound scaling.
        dropout: dropout probability before the classifier.
        num_classes: number of logits.
        in_channels: channels of the input.
        wide_se: squeeze width proportional to the expanded channels (NVIDIA's WideSE) instead of the block's input.
        se_as_conv: squeeze-and-excitation as 1x1 convolutions (``--trt``) instead of linear layers, with the same results.
        survival_prob: survival probability after the last block (stochastic depth, Huang et al. 2016). That of the blocks
            falls linearly from 1 at the first one. Each image of a batch drops its own blocks.
        conv_init: "fan_in" or "fan_out", the mode of the Kaiming initialisation of the convolutions with BatchNorm.
        bn_momentum, bn_epsilon: of every BatchNorm.
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        depth: float = 1.0,
        dropout: float = 0.2,
        num_classes: int = 1000,
        in_channels: int = 3,
        wide_se: bool = False,
        se_as_conv: bool = False,
        survival_prob: float = 1.0,
        conv_init: str = "fan_in",
        bn_momentum: float = 0.01,
        bn_epsilon: float = 1e-3,
    ) -> None:
        super().__init__()
        stages = [_scale(stage, width, depth) for stage in B0_STAGES]
        bn: dict[str, Any] = {"bn_momentum": bn_momentum, "bn_epsilon": bn_epsilon}
        self.stem = ConvBNAct(in_channels, stages[0].in_channels, 3, stride=2, **bn)
        self.layers = nn.ModuleList()
        total, built = sum(stage.repeats for stage in stages), 0
        for stage in stages:
            layer = nn.Sequential()
            for index in range(stage.repeats):
                block = stage if index == 0 else _repeated(stage)
                drop = (1 - survival_prob) * built / total
                layer.add_module(
                    f"block{index}",
                    MBConv(block, wide_se=wide_se, se_as_conv=se_as_conv, drop_probability=drop, **bn),
                )
                built += 1
            self.layers.append(layer)
        feature_channels = round_channels(FEATURE_CHANNELS * width)
        self.features = ConvBNAct(stages[-1].out_channels, feature_channels, 1, **bn)
        self.classifier = nn.Sequential()
        self.classifier.add_module("pooling", nn.AdaptiveAvgPool2d(1))
        self.classifier.add_module("flatten", nn.Flatten(1))
        self.classifier.add_module("dropout", nn.Dropout(dropout))
        self.classifier.add_module("fc", nn.Linear(feature_channels, num_classes))
        # Squeeze-and-excitation and the classifier keep PyTorch's initialisation, as in NVIDIA's definition.
        for module in self.modules():
            if isinstance(module, ConvBNAct):
                nn.init.kaiming_normal_(module.conv.weight, mode=conv_init, nonlinearity="relu")  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.features(x))

    def extract_features(self, x: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """Outputs of the named stages, in the network's order. Stages after the last named one are not computed.

        Args:
            x: images (N, in_channels, H, W).
            layers: of "layer1" … "layer7", "features" (N, channels, h, w) and "classifier" (N, num_classes); None for all.

        Raises:
            UserError: there is no such stage.
        """
        known = (*(f"layer{i + 1}" for i in range(len(self.layers))), "features", "classifier")
        wanted = set(known if layers is None else layers)
        if unknown := wanted - set(known):
            raise UserError(f"there is no feature {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
        outputs: dict[str, Tensor] = {}
        x = self.stem(x)
        for name, module in zip(known, (*self.layers, self.features, self.classifier), strict=True):
            if len(outputs) == len(wanted):
                break
            x = module(x)
            if name in wanted:
                outputs[name] = x
        return outputs


def _scale(stage: Stage, width: float, depth: float) -> Stage:
    return Stage(
        stage.kernel_size,
        stage.stride,
        stage.expansion,
        round_channels(stage.in_channels * width),
        round_channels(stage.out_channels * width),
        math.ceil(stage.repeats * depth),
    )


def _repeated(stage: Stage) -> Stage:
    return Stage(stage.kernel_size, 1, stage.expansion, stage.out_channels, stage.out_channels, 1)
