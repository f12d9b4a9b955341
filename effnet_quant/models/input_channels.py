"""How many channels the images of a network have."""

from __future__ import annotations

import copy

import torch
from torch import nn


@torch.no_grad()
def image_channels(model: nn.Module, image_size: int) -> int:
    """Channels of the images that a model takes: those of its first convolution.

    Some models transform their images first, by a cosine transform, say. If such a model fails with that number of channels
    and runs with 3, it is 3.
    """
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    if first == 3:
        return first
    probed = copy.deepcopy(model).cpu().float().eval()
    for channels in (first, 3):
        try:
            probed(torch.zeros(1, channels, image_size, image_size))
        except Exception:  # whatever a model's own code raises at images of another shape
            continue
        return channels
    return first
