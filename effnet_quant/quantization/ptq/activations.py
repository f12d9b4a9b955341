"""Holds what all calibration examples compute at a cut between blocks, in memory or in files."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from effnet_quant.errors import UserError
from effnet_quant.quantization.ptq.blocks import Block


class ActivationStore:
    """Gives memory for tensors: RAM up to a limit, then files that the system pages in and out.

    Args:
        limit: bytes in RAM.
        folder: where the files lie; None for the folder for temporary files. The files have no name there, so they vanish
            with the process, however it ends.
    """

    def __init__(self, limit: int, folder: Path | None) -> None:
        self._limit = limit
        self._folder = folder
        self._in_memory: dict[int, int] = {}  # bytes by the address of the tensor

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the CPU.

        Raises:
            UserError: the disk is full.
        """
        size = max(1, torch.Size(shape).numel()) * dtype.itemsize
        if sum(self._in_memory.values()) + size <= self._limit:
            tensor = torch.empty(shape, dtype=dtype)
            self._in_memory[tensor.data_ptr()] = size
            return tensor
        return torch.frombuffer(_mapped(size, self._folder), dtype=dtype).reshape(shape)

    def free(self, tensor: Tensor) -> None:
        """Note that a tensor is no longer used."""
        self._in_memory.pop(tensor.data_ptr(), None)


def _mapped(size: int, folder: Path | None) -> Any:
    """A writable memory map of ``size`` bytes in a file without a name."""
    import mmap

    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # now, because a full disk kills a process that writes to a map
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"the disk has no room for {size / 2**20:.0f} MiB of activations in {folder or tempfile.gettempdir()}; free "
            "some space, or calibrate with fewer images."
        ) from error


Values = dict[str, Tensor]  # by the name of the value, each of shape (N, …)


class Cut:
    """The values of all examples that cross a cut between two blocks."""

    def __init__(self, store: ActivationStore, batch_size: int, last_use: Mapping[str, int]) -> None:
        self.values: Values = {}
        self.store = store
        self._batch_size = batch_size
        self._last_use = last_use

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def enter(self, graph: fx.Graph, batches: Iterable[tuple[tuple[Any, ...], int]], total: int) -> None:
        """Take the model's arguments, those that its graph uses.

        Args:
            graph: of the model.
            batches: arguments and number of examples of each batch.
            total: examples of all batches.

        Raises:
            UserError: an argument is no tensor with one entry per example, or the disk is full.
        """
        places = [node for node in graph.nodes if node.op == "placeholder"]
        start = 0
        for arguments, examples in batches:
            for place, value in zip(places, arguments, strict=False):  # the others have their defaults
                if not place.users:
                    continue
                if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != examples:
                    raise UserError(
                        f"the model's argument '{place.target}' is no tensor with one entry per example, so the model can't "
                        "be run in blocks; use the recipe 'minmax', which needs no blocks."
                    )
                if place.name not in self.values:
                    self.values[place.name] = self.store.empty((total, *value.shape[1:]), value.dtype)
                self.values[place.name][start : start + examples] = value.cpu()
            start += examples

    def pick(self, block: Block, rows: Tensor | slice, device: torch.device) -> list[Tensor]:
        """Copies of the block's inputs for some of the examples. A block may change them in place."""
        return [self.copy(name, rows, device) for name in block.inputs]

    def copy(self, name: str, rows: Tensor | slice, device: torch.device) -> Tensor:
        """A copy of one value for some of the examples."""
        value = self.values[name]
        found = value[rows].to(device)
        return found.clone() if found.untyped_storage().data_ptr() == value.untyped_storage().data_ptr() else found

    @torch.no_grad()
    def run(self, block: Block, device: torch.device) -> Values:
        """The block's outputs for all examples."""
        found: Values = {}
        for start in range(0, len(self), self._batch_size):
            rows = slice(start, start + self._batch_size)
            for name, value in zip(block.outputs, block.module(*self.pick(block, rows, device)), strict=True):
                if name not in found:
                    found[name] = self.store.empty((len(self), *value.shape[1:]), value.dtype)
                found[name][rows] = value.cpu()
        return found

    def advance(self, number: int, outputs: Values) -> None:
        """Add the outputs of block ``number`` and forget what no later block uses."""
        self.values |= outputs
        for name in [name for name in self.values if self._last_use.get(name, number + 1) <= number]:
            self.store.free(self.values.pop(name))


def last_uses(blocks: Iterable[Block]) -> dict[str, int]:
    """The number of the last block that takes each value."""
    found: dict[str, int] = {}
    for number, block in enumerate(blocks):
        found |= dict.fromkeys(block.inputs, number)
    return found
