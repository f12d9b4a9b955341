"""Freezes parts of a network by the names of modules and parameters."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_quant.errors import UserError
from effnet_quant.quantization.spec import matches


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """Take the parameters that match one of the patterns out of training.

    Args:
        model: the network. Its parameters that match require no gradient afterwards.
        patterns: names of modules or parameters, with wildcards, as in ``QuantSpec.overrides``: "features.*". A pattern
            also matches everything inside a module.

    Returns:
        The BatchNorms that are frozen: they match, or all their parameters do. Training must leave them in eval mode, or
        their statistics would follow the data.

    Raises:
        UserError: a pattern matches nothing, or nothing is left to train.
    """
    if not patterns:
        return []
    parameters = dict(model.named_parameters())
    norms = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for pattern in patterns:
        if not any(matches(name, pattern) for name in (*parameters, *norms)):
            raise UserError(
                f"--freeze {pattern} matches no module and no parameter; {_near(pattern, model, list(parameters))}"
            )
    for name, parameter in parameters.items():
        if any(matches(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError("--freeze leaves nothing to train; choose patterns that leave some layers out.")
    return [
        module
        for name, module in norms.items()
        if any(matches(name, pattern) for pattern in patterns) or _all_frozen(module)
    ]


def _all_frozen(module: nn.Module) -> bool:
    own = list(module.parameters())
    return bool(own) and not any(parameter.requires_grad for parameter in own)


def _near(pattern: str, model: nn.Module, parameters: list[str]) -> str:
    """A hint: the names closest to a pattern, else the network's parts."""
    names = [name for name, _ in model.named_modules() if name] + parameters
    close = difflib.get_close_matches(pattern.strip("*.?"), names, n=3, cutoff=0.6)
    if close:
        return f"did you mean: {', '.join(close)}?"
    return f"the network's parts are: {', '.join(name for name, _ in model.named_children())}."
