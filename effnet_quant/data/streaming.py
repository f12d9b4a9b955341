"""Batches from shards, which are read from front to back."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from effnet_quant.data.decoding import DecodeError
from effnet_quant.data.loaders import BatchMemory, Loader, in_workers, own
from effnet_quant.data.seeding import mix, seeded
from effnet_quant.data.shards import ShardSource
from effnet_quant.data.sources import unreadable
from effnet_quant.data.transforms import Transform
from effnet_quant.errors import UserError

_BUFFER = 1000  # images that each worker draws from at random

_Part = tuple[Tensor, Tensor, dict[str, str]]  # images, labels, sentences about unreadable images by name


class ShardLoader(Loader):
    """Batches of shards, as ``Loader`` gives them, with an order that depends on the number of workers and processes too.

    In a shuffled epoch the shards come in another order, are dealt out to processes and workers, and each worker draws from
    a buffer. To start within an epoch, the batches before are read and thrown away.

    Arguments are ``Loader``'s; of ``indices`` only the number counts: so many images from the front.

    Raises:
        UserError: there are fewer shards than processes.
    """

    def __init__(
        self,
        source: ShardSource,
        transform: Transform,
        batch_size: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        indices: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(source, transform, batch_size, indices=indices, **options)
        self._shards = source
        self._rank, self._ranks = rank, ranks
        if ranks > len(source.urls):
            raise UserError(f"{len(source.urls)} shards are too few for {ranks} processes; make more, or start fewer.")
        self._bad: dict[str, int] = {}

    def __len__(self) -> int:
        """Batches in an epoch of this process."""
        if self.shuffle:  # the same on every process, whichever shards it gets
            own = (
                self.num_images
                if self._ranks == 1
                else len(self._shards.urls) // self._ranks * min(self._shards.counts)
            )
            return max(1, own // self.batch_size)
        counts = self._shards.counts[self._rank :: self._ranks]
        return math.ceil(min(self.num_images, sum(counts)) / self.batch_size)

    def names(self, epoch: int, batch: int) -> list[str]:
        """What is known of where the images of a batch came from: shards keep no list."""
        return [f"batch {batch + 1} of epoch {epoch + 1} of the shards"]

    def epoch(self, epoch: int = 0, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from ``first_batch`` on.

        Raises:
            UserError: a shard can't be read, or more images than may be.
        """
        urls = list(self._shards.urls)
        if self.shuffle:
            random.Random(mix(self._seed, epoch, -1)).shuffle(urls)
        stream = _Stream(
            self._shards,
            urls[self._rank :: self._ranks],
            self._transform,
            self.batch_size,
            BatchMemory(self._prefetch),
            mix(self._seed, epoch, -2) if self.shuffle else None,
        )
        workers = min(self._workers, len(stream.urls)) if self.shuffle else min(self._workers, 1)
        parts = in_workers(stream, workers, self._prefetch, pin_memory=torch.cuda.is_available())
        yield from islice(self._whole(parts), first_batch, len(self))

    def _whole(self, parts: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches as they come, then what the workers had left over."""
        rest: list[tuple[Tensor, Tensor]] = []
        for part in parts:
            if isinstance(part, UserError):
                raise part
            images, labels, bad = part
            for name, sentence in bad.items():
                self.bad_images.add(self._bad.setdefault(name, len(self._bad)), sentence)
            if len(images) == self.batch_size:
                yield own(images), labels
            elif len(images):
                rest.append((own(images), labels))
        if rest:
            images, labels = (torch.cat(column) for column in zip(*rest, strict=True))
            for start in range(0, len(images), self.batch_size):
                yield images[start : start + self.batch_size], labels[start : start + self.batch_size]


class _Stream(IterableDataset[_Part | UserError]):
    """A worker's part of the shards, in batches."""

    def __init__(
        self,
        source: ShardSource,
        urls: list[str],
        transform: Transform,
        batch_size: int,
        memory: BatchMemory,
        seed: int | None,
    ) -> None:
        self._source = source
        self.urls = urls
        self._transform = transform
        self._batch_size = batch_size
        self._memory = memory
        self._seed = seed

    def __iter__(self) -> Iterator[_Part | UserError]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        samples = (sample for url in self.urls[number::workers] for sample in self._source.samples(url))
        if self._seed is not None:
            from webdataset import detshuffle

            samples = detshuffle(_BUFFER, _BUFFER, seed=mix(self._seed, number)).run(samples)
        try:
            for place in range(len(self._source)):
                if not (batch := list(islice(samples, self._batch_size))):
                    return
                with seeded(mix(self._seed or 0, number, place)):
                    yield self._transformed(batch)
        except UserError as error:  # which crosses process borders intact
            yield error

    def _transformed(self, batch: list[tuple[str, Any, int]]) -> _Part:
        images, labels, bad = [], [], {}
        for name, image, label in batch:
            try:
                if isinstance(image, DecodeError):
                    raise image
                images.append(self._transform(image))
                labels.append(label)
            except DecodeError as error:
                bad[name] = str(unreadable(name, error))
        if self._seed is not None and images:
            for place in range(len(bad)):  # as Loader does
                images.append(images[place])
                labels.append(labels[place])
        return self._memory.stack(images), torch.tensor(labels, dtype=torch.int64), bad
