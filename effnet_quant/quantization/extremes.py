"""The smallest and the largest value of a tensor, in one pass over its memory."""

from __future__ import annotations

import torch
from torch import Tensor


def in_memory_order(x: Tensor) -> Tensor:
    """All values in one dimension, without a copy where the memory has no gaps (NCHW and NHWC)."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(-1)


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, float32 of shape (). Both are NaN if any value is."""
    low, high = torch.aminmax(in_memory_order(x.detach()))  # aminmax would copy an NHWC tensor
    return low.float(), high.float()
