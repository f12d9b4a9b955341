"""Joins what the processes of a group have seen, so that all choose the ranges of all images."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.distributed import ReduceOp


def gathered(state: Tensor, device: torch.device) -> list[Tensor]:
    """The tensors that the processes hand in, of one shape and type, in the order of the ranks; without a group, ``state``.

    Args:
        state: of this process, on any device.
        device: one that the group's backend takes.
    """
    if not _in_group():
        return [state]
    states = [torch.empty_like(state, device=device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(states, state.to(device))
    return states


def reduce_extremes(low: Tensor, high: Tensor) -> bool:
    """Let both hold the smallest and the largest value over all processes, in place; False where there is no group."""
    if not _in_group():
        return False
    distributed.all_reduce(low, ReduceOp.MIN)
    distributed.all_reduce(high, ReduceOp.MAX)
    return True


def total_over_ranks(count: int, device: torch.device) -> int:
    """The sum of all processes' counts."""
    return sum(int(other) for other in gathered(torch.tensor(count), device))


def _in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
