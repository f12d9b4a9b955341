"""Loads batches from shards, which are read from front to back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, islice, repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from effnet_quant.data.decoding import DecodeError, EncodedImage
from effnet_quant.data.loaders import BatchMemory, Loader, own, transformed
from effnet_quant.data.seeding import mix, seeded
from effnet_quant.data.shards import ShardSource
from effnet_quant.data.sources import unreadable
from effnet_quant.data.transforms import Transform
from effnet_quant.data.workers import Whereabouts
from effnet_quant.errors import UserError

_BUFFER, _FIRST = 1000, 100  # images in a worker's shuffle buffer, and how many it holds before the first draw

_Part = tuple[Tensor, Tensor, dict[int, str]]  # images, labels, sentences about unreadable images by index
_Sample = tuple[int, str, EncodedImage | DecodeError, int]  # index, name, image, label


class ShardLoader(Loader):
    """Batches from shards, like ``Loader``'s. The order also depends on the numbers of workers and processes.

    The shards form one row of images. Shuffled epochs reorder the shards each time. Each process reads an equal part of
    the row, and each of its workers an equal part of that. When shuffling, a worker draws from a buffer. A shard in which
    two parts meet is read by both. To start within an epoch, the earlier batches are read and dropped.

    Arguments are ``Loader``'s. ``indices`` must be consecutive: a worker uses the first of its part, and their number.

    Raises:
        UserError: there are fewer images to shuffle than processes.
    """

    def __init__(
        self,
        source: ShardSource,
        transform: Transform,
        batch_size: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(source, transform, batch_size, rank=rank, ranks=ranks, **options)
        self._shards = source
        self._own = self._indices.tensor_split(ranks)[rank]
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # shared, so that workers see the current one

    def names(self, epoch: int, batch: int) -> list[str]:
        """The batch's number, for messages. Which images it holds is not known."""
        return [f"batch {batch + 1} of epoch {epoch + 1} of the shards"]

    def epoch(self, epoch: int = 0, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from ``first_batch`` on.

        Raises:
            UserError: a shard can't be read, too many images can't be read, or a worker died.
        """
        self._epoch.fill_(epoch)
        count = 0
        for batch in islice(self._whole(), len(self)):
            count += 1
            if count > first_batch:
                yield batch
        if self.shuffle and count < len(self):
            raise UserError("a part of the shards has no image that can be read; check DATA with --check.")

    def _whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield full batches as they come, then batches of the workers' remaining images."""
        size = self._order.share
        rest: list[tuple[Tensor, Tensor]] = []
        for part in self._results():
            if isinstance(part, UserError):
                raise part
            images, labels, bad = part
            for index, sentence in bad.items():
                self.bad_images.add(index, sentence)
            if len(images) == size:
                yield own(images), labels
            elif len(images):
                rest.append((own(images), labels))
        if rest:
            images, labels = (torch.cat(column) for column in zip(*rest, strict=True))
            for start in range(0, len(images), size):
                yield images[start : start + size], labels[start : start + size]

    def _dataset(self) -> Dataset[Any]:
        return _Stream(
            self._shards,
            self._own,
            self._transform,
            self._order.share,
            Whereabouts(self._workers, self._shards.name),
            BatchMemory(self._prefetch),
            self._seed,
            self._epoch,
            shuffle=self.shuffle,
        )

    def _sampler(self) -> Sampler[Any] | None:
        return None


class _Stream(IterableDataset[_Part | UserError]):
    """Yields a worker's part of the shards in batches.

    Args:
        source, transform, batch_size, seed, shuffle: see ``Loader``.
        indices: the process's part.
        whereabouts: notes which image is being read.
        memory: where batches are assembled.
        epoch: the epoch's number, of shape (1,), in shared memory.
    """

    def __init__(
        self,
        source: ShardSource,
        indices: Tensor,
        transform: Transform,
        batch_size: int,
        whereabouts: Whereabouts,
        memory: BatchMemory,
        seed: int,
        epoch: Tensor,
        *,
        shuffle: bool,
    ) -> None:
        self._source = source
        self._indices = indices
        self._transform = transform
        self._batch_size = batch_size
        self._whereabouts = whereabouts
        self._memory = memory
        self._seed = seed
        self._epoch = epoch
        self._shuffle = shuffle

    def __iter__(self) -> Iterator[_Part | UserError]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        part = self._indices.tensor_split(workers)[number]
        bad: dict[int, str] = {}
        try:
            images = self._readable(self._samples(part, int(self._epoch)), mix(self._seed, int(self._epoch), -2), bad)
            while (batch := list(islice(images, self._batch_size))) or bad:
                labels = torch.tensor([label for _, label in batch], dtype=torch.int64)
                yield self._memory.stack([image for image, _ in batch]), labels, dict(bad)
                bad.clear()
        except UserError as error:  # raised here, it would reach the main process as another type
            yield error

    def _samples(self, part: Tensor, epoch: int) -> Iterator[_Sample]:
        """Yield ``len(part)`` images of the row from ``part[0]`` on. Training reorders the row's shards each epoch."""
        shards = list(range(len(self._source.urls)))
        if not self._shuffle:
            yield from self._row(shards, part)
            return
        from webdataset import detshuffle

        random.Random(mix(self._seed, epoch, -1)).shuffle(shards)
        buffer = detshuffle(_BUFFER, _FIRST, seed=mix(self._seed, epoch, int(part[0]) if len(part) else 0))
        yield from buffer.run(self._row(shards, part))

    def _row(self, shards: list[int], part: Tensor) -> Iterator[_Sample]:
        counts = self._source.counts
        starts = [0, *accumulate(counts)]
        left = len(part)
        first = int(part[0]) if left else 0
        for shard in shards:
            if left == 0:
                return
            wanted = min(left, counts[shard] - first)
            if wanted <= 0:
                first -= counts[shard]
                continue
            samples = islice(self._source.samples(self._source.urls[shard], first), wanted)
            for index, sample in enumerate(samples, starts[shard] + first):
                self._whereabouts.note(index)
                left -= 1
                wanted -= 1
                yield (index, *sample)
            if wanted:
                raise UserError(
                    f"{self._source.urls[shard]} holds {wanted} images less than its index says; make the index again."
                )
            first = 0

    def _readable(self, samples: Iterator[_Sample], seed: int, bad: dict[int, str]) -> Iterator[tuple[Tensor, int]]:
        """Yield transformed images and labels. In training, the next image replaces one that can't be read."""
        missing = 0
        last = None
        for index, name, image, label in samples:
            self._whereabouts.note(index)
            try:
                if isinstance(image, DecodeError):
                    raise unreadable(name, image)
                with seeded(mix(seed, index, 0)):
                    last = transformed(self._transform, image, partial(str, name)), label
            except UserError as error:
                bad[index] = str(error)
                missing += self._shuffle
                continue
            yield from repeat(last, 1 + missing)
            missing = 0
        if last is not None:
            yield from repeat(last, missing)
