"""Targets: what each runtime wants of a quantized graph, as data. Each runtime has one file with its row and the reasons."""

from __future__ import annotations

import importlib
import pkgutil

from effnet_quant.errors import UserError
from effnet_quant.quantization.targets.rules import OPERATIONS, FollowsTarget, Target

# a runtime is a file in this folder with a constant TARGET
_ROWS = [name for _, name, _ in pkgutil.iter_modules(__path__) if name != "rules"]
TARGETS: dict[str, Target] = {
    target.name: target for target in (importlib.import_module(f"{__name__}.{name}").TARGET for name in _ROWS)
}

__all__ = ["OPERATIONS", "TARGETS", "FollowsTarget", "Target", "get_target"]


def get_target(name: str | Target) -> Target:
    """The Target of the named runtime. A Target is returned as it is.

    Raises:
        UserError: there is no such target.
    """
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise UserError(f"there is no target '{name}'; choose one of: {', '.join(TARGETS)}.")
    return TARGETS[name]
