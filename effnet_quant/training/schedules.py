"""Learning rates by epoch, as in NVIDIA's recipes: linear warm-up, then step, linear or cosine decay."""

from __future__ import annotations

import math

STEP_MILESTONES = (30, 60, 80)
STEP_FACTOR = 0.1


def learning_rate(
    schedule: str, epoch: int, *, base_lr: float, epochs: int, warmup: int = 0, end_lr: float = 0.0
) -> float:
    """The learning rate of an epoch (counted from 0).

    During warm-up it is base_lr * (epoch + 1) / warmup. "step" then multiplies by 0.1 from epochs 30, 60 and 80 on.
    "linear" and "cosine" fall from base_lr at the end of the warm-up to end_lr at ``epochs``.
    """
    if epoch < warmup:
        return base_lr * (epoch + 1) / warmup
    if schedule == "step":
        return base_lr * STEP_FACTOR ** sum(epoch >= milestone for milestone in STEP_MILESTONES)
    progress = (epoch - warmup) / max(1, epochs - warmup)
    share = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return end_lr + share * (base_lr - end_lr)
