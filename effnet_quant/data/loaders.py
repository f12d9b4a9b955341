"""The PyTorch backend: batches of transformed images. Seed and epoch determine their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from effnet_quant.data.bad_images import BadImages
from effnet_quant.data.decoding import DecodeError, EncodedImage
from effnet_quant.data.order import Order
from effnet_quant.data.seeding import mix, seeded
from effnet_quant.data.sources import EncodedSource, ImageSource, unreadable
from effnet_quant.data.transforms import Transform
from effnet_quant.data.workers import Whereabouts, explained_deaths, in_workers
from effnet_quant.errors import UserError

_Key = tuple[int, NDArray[np.int64]]  # the epoch's seed, and a batch's indices
_Item = tuple[Tensor, Tensor, dict[int, str]]  # images, labels, sentences about unreadable images by index


class Loader:
    """Batches of one source: uint8 images (N, 3, H, W) and int64 labels (N,). Decoded images are channels last in memory.

    Seed, epoch and image index alone determine an epoch's order and each image's random transforms. The number of workers
    and the first batch make no difference. Workers start with the first epoch and stay.

    An image that can't be read is reported and left out. When shuffling, another image of the same batch takes its place;
    if none can be read, the next in the source does. Batches thus keep their size, and ranks their number of steps.

    Args:
        source: the images.
        transform: from uint8 (3, H, W) to uint8 of one size. ``TrainingTransform`` and ``EvaluationTransform`` also take
            an ``EncodedImage``, which they get from sources of image files.
        batch_size: images per batch; the last batch may be smaller.
        shuffle: permute the images each epoch, and drop the last incomplete batch unless it is the only one.
        seed: seed of the order and of the random transforms.
        workers: number of processes that read and transform; sources in memory use none.
        prefetch: batches that each worker prepares ahead.
        indices: the images to use, in this order; None for all.
        rank, ranks: this process's number, and the number of processes that share the epoch; see ``Order``.
        max_bad_images: how many unreadable images are accepted.

    Attributes:
        bad_images: the images that could not be read so far.

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
        max_bad_images: int = 0,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.bad_images = BadImages(max_bad_images)
        self._max_bad_images = max_bad_images
        self._transform = transform
        self._seed = seed
        self._workers = 0 if source.in_memory else workers
        self._prefetch = prefetch
        self._indices = torch.arange(len(source)) if indices is None else indices
        self._order = Order(self._indices, batch_size, shuffle=shuffle, seed=seed, rank=rank, ranks=ranks)
        self._keys = _Keys()
        self._batches: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._order)

    @property
    def num_images(self) -> int:
        """Images of all processes, including those that shuffling leaves out."""
        return len(self._indices)

    def names(self, epoch: int, batch: int) -> list[str]:
        """The names of the images in one batch of this process, for messages."""
        return [self.source.name(index) for index in next(self._order.batches(epoch, batch)).tolist()]

    def epoch(self, epoch: int = 0, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from ``first_batch`` on.

        Raises:
            UserError: too many images can't be read, or a worker died. The sentence names the file.
        """
        self._keys.start(self._order.batches(epoch, first_batch), mix(self._seed, epoch, -2))
        for images, labels, bad in self._results():
            for index, sentence in bad.items():
                self.bad_images.add(index, sentence)
            if len(images):
                yield own(images), labels
            elif self.shuffle:
                raise UserError(f"no image of a batch can be read; the last: {sentence}")

    def _results(self) -> Iterator[Any]:
        """Yield the workers' results for the current epoch. The first call starts the workers."""
        if self._batches is None:
            self._batches = in_workers(
                self._dataset(),
                self._workers,
                self._prefetch,
                sampler=self._sampler(),
                persistent_workers=self._workers > 0,
                pin_memory=torch.cuda.is_available(),
            )
        results = iter(self._batches)
        while True:
            with explained_deaths():
                result = next(results, None)
            if result is None:
                return
            yield result

    def _dataset(self) -> Dataset[Any]:
        """The dataset that the workers run."""
        return _Batches(
            self.source,
            self._transform,
            Whereabouts(self._workers, self.source.name),
            BatchMemory(self._prefetch),
            most_bad=self._max_bad_images if self.shuffle else None,
        )

    def _sampler(self) -> Sampler[Any] | None:
        """The sampler that tells the workers which batches to make."""
        return self._keys


class _Keys(Sampler[_Key]):
    """The keys of the next epoch's batches. Workers take them as they go."""

    def __init__(self) -> None:
        self._batches: Iterator[NDArray[np.int64]] = iter(())
        self._seed = 0

    def start(self, batches: Iterator[NDArray[np.int64]], seed: int) -> None:
        self._batches, self._seed = batches, seed

    def __iter__(self) -> Iterator[_Key]:
        seed = self._seed
        return ((seed, batch) for batch in self._batches)


class _Batches(Dataset[_Item]):
    """Makes transformed batches from keys.

    Args:
        source, transform: see ``Loader``.
        whereabouts: notes which image is being read.
        memory: where batches are assembled.
        most_bad: in training, how many unreadable images are accepted; None in evaluation.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        whereabouts: Whereabouts,
        memory: BatchMemory,
        *,
        most_bad: int | None,
    ) -> None:
        self._source = source
        self._transform = transform
        self._whereabouts = whereabouts
        self._memory = memory
        self._most_bad = most_bad

    def __getitem__(self, key: _Key) -> _Item:
        seed, indices = key
        images: list[Tensor] = []
        good: list[int] = []
        bad: dict[int, str] = {}
        for index in self._with_spares(indices.tolist(), good, bad):
            self._whereabouts.note(index)
            try:
                with seeded(mix(seed, index, 0)):
                    images.append(self._transformed(index))
                good.append(index)
            except UserError as error:  # raised here, it would reach the main process as another type
                bad[index] = str(error)
        if self._most_bad is not None and good:
            for position in range(len(indices) - len(good)):
                images.append(images[position % len(good)])
                good.append(good[position % len(good)])
        return self._memory.stack(images), self._source.labels[good], bad

    def _with_spares(self, indices: list[int], good: list[int], bad: dict[int, str]) -> Iterator[int]:
        """Yield the indices. In training, if none of them can be read, continue with those that follow in the source."""
        yield from indices
        if self._most_bad is not None:
            for step in range(1, len(self._source)):
                if good or len(bad) > self._most_bad:
                    return
                yield (indices[-1] + step) % len(self._source)

    def _transformed(self, index: int) -> Tensor:
        image = self._source.open(index) if isinstance(self._source, EncodedSource) else self._source.read(index)
        return transformed(self._transform, image, partial(self._source.name, index))


def transformed(transform: Transform, image: Tensor | EncodedImage, name: Callable[[], str]) -> Tensor:
    """Apply the transform to an image whose name in messages is ``name()``.

    Raises:
        UserError: the image is damaged, or there is not enough memory for it.
        RuntimeError: the transform failed; the text names the image.
    """
    try:
        return transform(image)
    except (DecodeError, MemoryError) as error:
        raise unreadable(name(), error) from error
    except Exception as error:
        raise RuntimeError(f"{name()} can't be transformed: {error!r}") from error


class BatchMemory:
    """Shared memory in which a worker assembles batches: ``prefetch + 1`` blocks, used in turns.

    Blocks are reused because the kernel maps new shared memory page by page, which takes several times as long as the
    copying. When a worker reuses a block, the main process has copied the block's last batch (see ``own``). In the main
    process itself, every batch gets new memory.

    Args:
        prefetch: batches that a worker prepares ahead.
    """

    def __init__(self, prefetch: int) -> None:
        self._blocks: deque[Tensor] = deque()
        self._count = prefetch + 1

    def stack(self, images: list[Tensor]) -> Tensor:
        """Copy images (3, H, W) into one tensor (N, 3, H, W) of the same memory layout."""
        if not images:
            return torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        size = len(images) * images[0].numel()
        block = torch.empty(size, dtype=torch.uint8) if get_worker_info() is None else self._next_block(size)
        channels, height, width = images[0].shape
        if images[0].is_contiguous():
            batch = block[:size].view(len(images), channels, height, width)
        else:  # decoders write (H, W, 3)
            batch = block[:size].view(len(images), height, width, channels).permute(0, 3, 1, 2)
        for place, image in zip(batch, images, strict=True):
            place.copy_(image)
        return batch

    def _next_block(self, size: int) -> Tensor:
        block = self._blocks.popleft() if len(self._blocks) == self._count else None
        if block is None or len(block) < size:
            block = torch.empty(size, dtype=torch.uint8).share_memory_()
        self._blocks.append(block)
        return block


def own(images: Tensor) -> Tensor:
    """A copy of a batch, unless it lies in memory that no worker will reuse."""
    return images.clone() if images.is_shared() else images  # pinned memory is a copy already
