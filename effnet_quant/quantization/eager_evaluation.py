"""The state in which a model is looked at while images pass through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eager_pass(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients and uncompiled while the block lasts; then every module has the mode that it had.

    Observers come and go with a pass, and each change would compile a compiled model anew.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
