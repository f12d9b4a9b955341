"""Tasks: what a network is for; one file and one row of ``TASKS`` each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from effnet_quant.errors import UserError

if TYPE_CHECKING:
    from effnet_quant.tasks.task import Task

# name -> where its task is; loaded on first use, so that a command line knows the names without torch
TASKS = {
    "classification": "effnet_quant.tasks.classification.CLASSIFICATION",
}

__all__ = ["TASKS", "get_task"]


def get_task(name: str) -> Task:
    """The named task, with its usual options.

    Raises:
        UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"there is no task '{name}'; choose one of: {', '.join(TASKS)}.")
    module, _, constant = TASKS[name].rpartition(".")
    return getattr(importlib.import_module(module), constant)
