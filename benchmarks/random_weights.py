"""Random weights that behave as trained ones do."""

from __future__ import annotations

import torch
from torch import nn


def wake(model: nn.Module) -> nn.Module:
    """Draw per-channel scales that are (nearly) 0 from 0.1 … 0.3, in place.

    Networks start the last scale of a residual branch at 0. Such a branch adds nothing, so errors in it stay hidden, and
    runtimes run other kernels.
    """
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 and not name.endswith("bias") and bool((parameter.detach().abs() < 1e-3).all()):
            parameter.data.uniform_(0.1, 0.3, generator=generator)
    return model


def with_statistics(model: nn.Module) -> nn.Module:
    """Draw mean, variance, factor and offset of every BatchNorm, in place.

    Factors at the end of residual branches are small, as in many initialisations.
    """
    generator = torch.Generator().manual_seed(2)
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            last = path.endswith("proj.bn")
            module.weight.data.uniform_(*((0.1, 0.3) if last else (0.5, 1.5)), generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            for offset in (module.bias.data, module.running_mean):
                offset.normal_(0, 0.1, generator=generator)
    return model
