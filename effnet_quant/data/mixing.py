"""Mixup and CutMix on batches, on the batch's own device."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from effnet_quant.data.seeding import seeded


def mixup(images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image blended with its neighbour in the batch, and their targets alike (Zhang et al., arXiv:1710.09412).

    Args:
        images: floating point (N, 3, H, W), normalised or not: the blend is linear.
        targets: class indices in one-hot or smoothed form, floating point (N, classes).
        alpha: of the Beta distribution that the blend's share comes from, above 0.
        generator: a CPU generator; one number is drawn from it a call.

    Returns:
        Images and targets of the same shapes.
    """
    return _apply(v2.MixUp(alpha=alpha), images, targets, generator)


def cutmix(images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One box of each image replaced by its neighbour's, targets by area (Yun et al., arXiv:1905.04899).

    Arguments and results are those of ``mixup``.
    """
    return _apply(v2.CutMix(alpha=alpha), images, targets, generator)


def mixed(
    images: Tensor, targets: Tensor, mixup_alpha: float, cutmix_alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``mixup`` or ``cutmix``, whichever has an alpha above 0; a coin decides where both have."""
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
