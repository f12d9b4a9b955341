"""The PyTorch backend: batches of transformed images in an order that seed and epoch determine."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from effnet_quant.data.seeding import mix, seeded
from effnet_quant.data.sources import ImageSource
from effnet_quant.data.transforms import Transform
from effnet_quant.errors import UserError


class Loader:
    """Batches of one source: uint8 images (N, 3, H, W) and int64 labels (N,).

    An epoch's order, and what the random transforms do to each image, depend on the seed, the epoch and the image's index
    alone: not on the number of workers, nor on where in the epoch one starts.

    Args:
        source: the images.
        transform: uint8 (3, H, W) to uint8 of one size for all.
        batch_size: images a batch; the last batch may be smaller.
        shuffle: a new permutation each epoch, and the last incomplete batch dropped (unless it is the only one).
        seed: of the order and of the random transforms.
        workers: processes that read and transform; none for sources in memory.
        prefetch: batches that each worker prepares ahead.
        indices: the images to use, in this order; all by default.
        rank: which of the processes that share the work this one is.
        ranks: how many there are. A shuffled epoch's batches are cut from batches of ``ranks * batch_size`` images, so
            that together the processes see what one process with the larger batch sees; without shuffling each takes
            every ``ranks``-th image, so that each image is seen once.

    Raises:
        UserError: there are fewer images to shuffle than processes.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 0,
        prefetch: int = 2,
        indices: Tensor | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.shuffle = shuffle
        self._seed = seed
        self._workers = 0 if source.in_memory else workers
        self._prefetch = prefetch
        self._transform = transform
        self._indices = torch.arange(len(source)) if indices is None else indices
        self._rank = rank
        self._ranks = ranks
        if shuffle and len(self._indices) < ranks:
            raise UserError(f"{len(self._indices)} training images are too few for {ranks} processes; start fewer.")

    def __len__(self) -> int:
        """Batches in an epoch of this process."""
        images = self.num_images
        if self.shuffle:
            return max(1, images // (self.batch_size * self._ranks))
        return math.ceil(len(range(self._rank, images, self._ranks)) / self.batch_size)

    @property
    def num_images(self) -> int:
        """Images of all processes, the ones that shuffling leaves out included."""
        return len(self._indices)

    def epoch(self, epoch: int = 0, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from ``first_batch`` on.

        Raises:
            UserError: an image can't be read; the sentence names the file.
        """
        batches = self._batches(epoch)
        loader = DataLoader(
            _TransformedImages(self.source, self._transform, mix(self._seed, epoch, -2)),
            batch_sampler=batches[first_batch:],
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            collate_fn=_collate,
            worker_init_fn=_ignore_signals,
            # its workers' base seed; drawn from the global generator, it would shift the dropout of a resumed epoch
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def names(self, epoch: int, batch: int) -> list[str]:
        """What the images of one batch of this process are called, for messages."""
        return [self.source.name(index) for index in self._batches(epoch)[batch]]

    def _batches(self, epoch: int) -> list[list[int]]:
        order = self._indices
        if not self.shuffle:
            return _split(order[self._rank :: self._ranks], self.batch_size)
        generator = torch.Generator().manual_seed(mix(self._seed, epoch, -1))
        order = order[torch.randperm(len(order), generator=generator)]
        together = min(self.batch_size * self._ranks, len(order) // self._ranks * self._ranks)
        share = together // self._ranks
        first = self._rank * share
        return [
            order[start + first : start + first + share].tolist() for start in range(0, len(self) * together, together)
        ]


def _split(order: Tensor, size: int) -> list[list[int]]:
    return [part.tolist() for part in order.split(size)] if len(order) else []


class _TransformedImages(Dataset[tuple[Tensor, Tensor] | UserError]):
    """Images by index; an unreadable one is returned as its error, which crosses process borders intact."""

    def __init__(self, source: ImageSource, transform: Transform, seed: int) -> None:
        self._source = source
        self._transform = transform
        self._seed = seed

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | UserError:
        try:
            image = self._source.read(index)
        except UserError as error:
            return error
        with seeded(mix(self._seed, index, 0)):
            return self._transform(image), self._source.labels[index]


def _collate(items: list[tuple[Tensor, Tensor] | UserError]) -> tuple[Tensor, Tensor] | UserError:
    images, labels = [], []
    for item in items:
        if isinstance(item, UserError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.stack(labels)


def _ignore_signals(worker: int) -> None:
    """What asks a run to stop reaches the whole process group; the main process decides when its workers end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
