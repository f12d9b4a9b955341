"""Exchanging a network's activation for one that costs integer engines less."""

from __future__ import annotations

from torch import nn


def replace_silu(model: nn.Module) -> int:
    """Put hard-swish, x * clamp(x / 6 + 1 / 2, 0, 1) (Howard et al. 2019, arXiv:1905.02244), in the place of every SiLU
    module, in place; returns how many there were.

    The two differ by at most 0.14, at x = 3 and -3, so weights that were trained with one need some training with the other.
    """
    places = [name for name, module in model.named_modules() if isinstance(module, nn.SiLU)]
    for name in places:
        silu = model.get_submodule(name)
        hard_swish = nn.Hardswish(inplace=bool(silu.inplace)).train(silu.training)
        model.set_submodule(name, hard_swish)
    return len(places)
