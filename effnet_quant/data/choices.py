"""The names that flags about data choose among. This file imports no library, so that parsers start fast."""

from __future__ import annotations

from effnet_quant.card import INTERPOLATIONS

__all__ = ["AUGMENTATIONS", "BACKENDS", "INTERPOLATIONS"]

BACKENDS = ("pytorch", "synthetic", "dali-gpu", "dali-cpu")

# name -> class of torchvision.transforms.v2, with the settings of its paper:
# arXiv:1805.09501 (for ImageNet), arXiv:1909.13719, arXiv:2103.10158
AUGMENTATIONS = {
    "autoaugment": "AutoAugment",
    "randaugment": "RandAugment",
    "trivialaugment": "TrivialAugmentWide",
}
