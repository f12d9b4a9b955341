"""Random weights that behave as trained ones do."""

from __future__ import annotations

import torch
from torch import nn


def wake(model: nn.Module) -> nn.Module:
    """Draw per-channel scales that are (nearly) 0, as networks start the last one of a residual branch, from 0.1 … 0.3, in
    place: with them the branch adds nothing, so that nothing in it is tested, and runtimes run other kernels."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 and not name.endswith("bias") and bool((parameter.detach().abs() < 1e-3).all()):
            parameter.data.uniform_(0.1, 0.3, generator=generator)
    return model
