"""Random erasing on batches, on the batch's own device."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

_AREA = (0.02, 1 / 3)  # of a box, as a share of the image's
_ASPECT = (0.3, 1 / 0.3)  # of a box, height to width


def erase(images: Tensor, probability: float, seed: int) -> Tensor:
    """Set a random box of each image to 0 with the given probability (Zhong et al., arXiv:1708.04896).

    The box has 2 to 33 % of the area and an aspect of 0.3 to 3.3, uniform in area and in log aspect. A box that is longer
    than the image ends at its border.

    Args:
        images: normalised images (N, C, H, W), which are changed. After ``normalize``, 0 is the mean colour.
        probability: 0 … 1.
        seed: decides which images and which boxes.

    Returns:
        The same tensor.
    """
    height, width = images.shape[-2:]
    numbers = random.Random(seed)
    boxes = [_box(numbers, height, width) if numbers.random() < probability else (0, 0, 0, 0) for _ in images]
    top, bottom, left, right = torch.tensor(boxes).to(images.device, non_blocking=True).T[:, :, None]
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    vertical, horizontal = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return images.masked_fill_((vertical[:, :, None] & horizontal[:, None, :])[:, None], 0)


def _box(numbers: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a box, the ends exclusive."""
    area = height * width * numbers.uniform(*_AREA)
    aspect = math.exp(numbers.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
    h = min(height, max(1, round(math.sqrt(area * aspect))))
    w = min(width, max(1, round(math.sqrt(area / aspect))))
    top, left = numbers.randint(0, height - h), numbers.randint(0, width - w)
    return top, top + h, left, left + w
