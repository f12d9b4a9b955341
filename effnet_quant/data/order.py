"""Which images make up which batch."""

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
    """The batches of an epoch, as a function of seed and epoch alone.

    Over all processes together, each image comes once in an epoch. A shuffled epoch's batches are cut from batches of
    ``ranks * batch_size`` images, so that together the processes see what one process with the larger batch sees; the
    images that don't fill such a batch are left out, unless there is no other. Without shuffling each process takes every
    ``ranks``-th image.

    Args:
        indices: the images.
        batch_size: images a batch, of each process.
        shuffle: a new permutation each epoch, and incomplete batches dropped.
        seed: of the permutations.
        rank, ranks: which process this is, of how many.

    Attributes:
        share: images a batch of this process; fewer than ``batch_size`` where there are not so many.

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
        """The indices of each batch of this process, from batch ``first`` on."""
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
