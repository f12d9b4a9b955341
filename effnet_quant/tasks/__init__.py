"""Tasks: what a network is for. Each task has one file and one row in ``TASKS``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from effnet_quant.errors import UserError

if TYPE_CHECKING:
    from effnet_quant.tasks.task import Task

# name -> module and constant of the task. Loaded on first use, so that command lines know the names without torch.
TASKS = {
    "classification": "effnet_quant.tasks.classification.CLASSIFICATION",
}

__all__ = ["TASKS", "get_task"]


def get_task(name: str) -> Task:
    """The named task, with its default options.

    Raises:
        UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"there is no task '{name}'; choose one of: {', '.join(TASKS)}.")
    module, _, constant = TASKS[name].rpartition(".")
    return getattr(importlib.import_module(module), constant)
