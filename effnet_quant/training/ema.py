"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """A second model whose weights are a moving average of the first model's.

    After optimizer step n (counted from 0), every floating-point entry of the state dict moves towards the model's by the
    share 1 - min(decay, (1 + n) / (10 + n)), as in NVIDIA's scripts. Other entries are copied. Entries that never change,
    such as calibrated ranges, stay bit-identical. Entries that only one of the two models has, such as a range measured
    later, are left alone.

    Args:
        model: the model to average.
        decay: decay of the average, 0 … 1.

    Attributes:
        model: the averaged model, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average after optimizer step number ``step``."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        known = self.model.state_dict()
        for name, tensor in model.state_dict().items():
            average = known.get(name)
            if average is None:
                continue
            if tensor.is_floating_point():
                ours.append(average)
                theirs.append(tensor)
            else:
                average.copy_(tensor)
        torch._foreach_lerp_(ours, theirs, share)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights under the model's names."""
        return self.model.state_dict()
