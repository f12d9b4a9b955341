"""Divides the images of an epoch into batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effnet_quant.data.seeding import mix
from effnet_quant.errors import UserError


class Order:
    """The batches of an epoch. Seed and epoch alone determine them.

    Each image comes once in an epoch, over all processes. Shuffled batches are cut from batches of ``ranks * batch_size``
    images. The processes together thus see the same images as one process with the larger batch. The last incomplete
    batch is left out, unless it is the only one. Without shuffling, each process takes every ``ranks``-th image.

    Args:
        indices: the images.
        batch_size: images per batch of one process.
        shuffle: permute the images each epoch, and drop incomplete batches.
        seed: seed of the permutations.
        rank, ranks: this process's number, and the number of processes.

    Attributes:
        share: images per batch of this process; fewer than ``batch_size`` if there are not enough images.

    Raises:
        UserError: there are fewer images to shuffle than processes.
    """

    def __init__(
        self, indices: Tensor, batch_size: int, *, shuffle: bool, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self._indices = indices
        self._shuffle = shuffle
        self._seed = seed
        self._rank, self._ranks = rank, ranks
        if shuffle and len(indices) < ranks:
            raise UserError(f"{len(indices)} training images are too few for {ranks} processes; start fewer.")
        self.share = min(batch_size, len(indices) // ranks) if shuffle else batch_size

    def __len__(self) -> int:
        """Batches in an epoch of this process."""
        if self._shuffle:
            return len(self._indices) // (self.share * self._ranks)
        return math.ceil(len(range(self._rank, len(self._indices), self._ranks)) / self.share)

    def batches(self, epoch: int, first: int = 0) -> Iterator[NDArray[np.int64]]:
        """Yield the indices of each batch of this process, from batch ``first`` on."""
        order, share = self._indices, self.share
        if not self._shuffle:
            own = order[self._rank :: self._ranks]
            for batch in range(first, len(self)):
                yield own[batch * share : (batch + 1) * share].numpy()
            return
        generator = torch.Generator().manual_seed(mix(self._seed, epoch, -1))
        order = order[torch.randperm(len(order), generator=generator)]
        for batch in range(first, len(self)):
            start = (batch * self._ranks + self._rank) * share
            yield order[start : start + share].numpy()
