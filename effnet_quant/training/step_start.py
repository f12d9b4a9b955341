"""The start of an optimizer step, to which a training returns if a signal ends the step before its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class StepStart:
    """Keeps what batches change before their optimizer step: buffers, random states, and the sums of the losses.

    Args:
        models: the networks whose buffers batches, and callbacks at an epoch's end, change.
        device: the device whose random state the networks use.
    """

    def __init__(self, models: list[nn.Module], device: torch.device) -> None:
        self._device = device
        self._tensors = [buffer for model in models for buffer in model.buffers()]
        self._copies = [torch.empty_like(tensor) for tensor in self._tensors]
        self._random = self._random_states()
        self._sums: tuple[Tensor, Tensor] | None = None
        self._batch = 0

    @torch.no_grad()
    def note(self, batch: int, sums: Tensor) -> None:
        """Keep the state before batch number ``batch``. ``sums`` is the tensor that adds up the losses."""
        self._batch, self._sums = batch, (sums, sums.clone())
        self._random = self._random_states()
        if self._tensors:
            torch._foreach_copy_(self._copies, self._tensors)

    @torch.no_grad()
    def restore(self) -> int:
        """Bring the state back, and return the number of its batch."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._copies)
        if self._sums is not None:
            self._sums[0].copy_(self._sums[1])
        torch.set_rng_state(self._random[0])
        if self._random[1] is not None:
            torch.cuda.set_rng_state(self._random[1], self._device)
        return self._batch

    def _random_states(self) -> tuple[Tensor, Tensor | None]:
        on_gpu = self._device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if on_gpu else None


@contextmanager
def interruptible_backward(model: nn.Module) -> Iterator[None]:
    """Let signal handlers run within the backward passes of a block, between two layers.

    On a CPU a backward pass is one call of the main thread, up to a minute long. Python runs handlers only in Python code.
    """
    handles = [
        parameter.register_post_accumulate_grad_hook(_nothing)
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.dim() > 1
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nothing(parameter: Tensor) -> None:
    pass
