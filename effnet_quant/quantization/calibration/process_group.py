"""Joins the observations of a process group, so that all processes choose the same ranges."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.distributed import ReduceOp


def gathered(state: Tensor, device: torch.device) -> list[Tensor]:
    """The ``state`` of every process, in the order of the ranks; without a group, only the own one.

    Args:
        state: of this process, on any device; of one shape and dtype in all processes.
        device: one that the group's backend takes.
    """
    if not _in_group():
        return [state]
    states = [torch.empty_like(state, device=device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(states, state.to(device))
    return states


def reduce_extremes(low: Tensor, high: Tensor) -> bool:
    """Replace ``low`` by the smallest and ``high`` by the largest value over all processes, in place.

    Returns False without a group.
    """
    if not _in_group():
        return False
    distributed.all_reduce(low, ReduceOp.MIN)
    distributed.all_reduce(high, ReduceOp.MAX)
    return True


def total_over_ranks(count: int, device: torch.device) -> int:
    """The sum of ``count`` over all processes."""
    return sum(int(other) for other in gathered(torch.tensor(count), device))


def _in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
