"""Mixup and CutMix on batches, on the batch's own device."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from effnet_quant.data.seeding import seeded


def mixup(images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blend each image with its neighbour in the batch, and their targets likewise (Zhang et al., arXiv:1710.09412).

    Args:
        images: floating point (N, 3, H, W), normalised or not, because the blend is linear.
        targets: one-hot or smoothed labels, floating point (N, classes).
        alpha: parameter of the Beta distribution of the blend's share, above 0.
        generator: a CPU generator. Each call draws one number from it.

    Returns:
        Images and targets of the same shapes.
    """
    return _apply(v2.MixUp(alpha=alpha), images, targets, generator)


def cutmix(images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replace a box of each image by its neighbour's, and mix targets by area (Yun et al., arXiv:1905.04899).

    Arguments and results are those of ``mixup``.
    """
    return _apply(v2.CutMix(alpha=alpha), images, targets, generator)


def mixed(
    images: Tensor, targets: Tensor, mixup_alpha: float, cutmix_alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Apply ``mixup`` or ``cutmix``, whichever has an alpha above 0. If both have, choose one with probability 1/2."""
    if mixup_alpha and cutmix_alpha:
        chosen = mixup if torch.rand((), generator=generator) < 0.5 else cutmix
    else:
        chosen = mixup if mixup_alpha else cutmix
    return chosen(images, targets, mixup_alpha if chosen is mixup else cutmix_alpha, generator)


def _apply(
    transform: v2.Transform, images: Tensor, targets: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    with seeded(int(torch.randint(2**62, (), generator=generator))):
        mixed, mixed_targets = transform(images, targets)
    return mixed, mixed_targets
