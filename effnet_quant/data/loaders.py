"""The PyTorch backend: batches of transformed images in an order that seed and epoch determine."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from effnet_quant.data.bad_images import BadImages
from effnet_quant.data.decoding import DecodeError, quiet_libjpeg
from effnet_quant.data.order import Order
from effnet_quant.data.seeding import mix, seeded
from effnet_quant.data.sources import EncodedSource, ImageSource, unreadable
from effnet_quant.data.transforms import Transform
from effnet_quant.errors import UserError

_Key = tuple[int, NDArray[np.int64]]  # the epoch's seed, and a batch's indices
_Item = tuple[Tensor, Tensor, dict[int, str]]  # images, labels, sentences about unreadable images by index


class Loader:
    """Batches of one source: uint8 images (N, 3, H, W), channels last in memory if they are decoded, and int64 labels (N,).

    An epoch's order, and what the random transforms do to each image, depend on the seed, the epoch and the image's index
    alone: not on the number of workers, nor on where in the epoch one starts. Workers start with the first epoch and stay.

    An image that can't be read is reported and left out. Where the loader shuffles, another one of the same batch takes its
    place, so that batches keep their size and ranks their number of steps.

    Args:
        source: the images.
        transform: uint8 (3, H, W) to uint8 of one size for all; ``TrainingTransform`` and ``EvaluationTransform`` take an
            ``EncodedImage`` too, and get one where the source has image files.
        batch_size: images a batch; the last batch may be smaller.
        shuffle: a new permutation each epoch, and the last incomplete batch dropped (unless it is the only one).
        seed: of the order and of the random transforms.
        workers: processes that read and transform; none for sources in memory.
        prefetch: batches that each worker prepares ahead.
        indices: the images to use, in this order; all by default.
        rank, ranks: which of the processes that share the epoch this one is, and how many there are; see ``Order``.
        max_bad_images: how many images may be unreadable before the loader gives up.

    Attributes:
        bad_images: what could not be read so far.

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
        self._transform = transform
        self._seed = seed
        self._workers = 0 if source.in_memory else workers
        self._prefetch = prefetch
        self._indices = torch.arange(len(source)) if indices is None else indices
        self._order = Order(self._indices, batch_size, shuffle=shuffle, seed=seed, rank=rank, ranks=ranks)
        self._keys = _Keys()
        self._at = torch.empty(0, 2, dtype=torch.int64)
        self._batches: DataLoader[_Item] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._order)

    @property
    def num_images(self) -> int:
        """Images of all processes, the ones that shuffling leaves out included."""
        return len(self._indices)

    def names(self, epoch: int, batch: int) -> list[str]:
        """What the images of one batch of this process are called, for messages."""
        return [self.source.name(index) for index in next(self._order.batches(epoch, batch)).tolist()]

    def epoch(self, epoch: int = 0, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from ``first_batch`` on.

        Raises:
            UserError: more images can't be read than may be, or a worker died; the sentence names the file.
        """
        if self._batches is None:
            self._batches = self._start()
        self._keys.start(self._order.batches(epoch, first_batch), mix(self._seed, epoch, -2))
        batches = iter(self._batches)
        while True:
            try:
                images, labels, bad = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._explained(error) from error
            for index, sentence in bad.items():
                self.bad_images.add(index, sentence)
            if len(images):
                yield own(images), labels
            elif self.shuffle:
                raise UserError(f"no image of a batch can be read; the last: {sentence}")

    def _start(self) -> DataLoader[_Item]:
        # by worker: its process id and the index of the image that it is at
        self._at = torch.full((self._workers, 2), -1, dtype=torch.int64).share_memory_()
        return in_workers(
            _Batches(self.source, self._transform, self._at, BatchMemory(self._prefetch), refill=self.shuffle),
            self._workers,
            self._prefetch,
            sampler=self._keys,
            persistent_workers=self._workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _explained(self, error: RuntimeError) -> Exception:
        """A sentence about the worker that died, if that is what happened."""
        alive = {process.pid for process in multiprocessing.active_children()}
        for process, index in self._at.tolist():
            if process >= 0 and process not in alive:
                return UserError(
                    f"a data worker died while it was reading {self.source.name(index)}; look at that file, and at the "
                    "memory that is left (fewer --workers need less)."
                )
        return error


class _Keys(Sampler[_Key]):
    """The batches that the next iteration is about; workers get them as they ask for more."""

    def __init__(self) -> None:
        self._batches: Iterator[NDArray[np.int64]] = iter(())
        self._seed = 0

    def start(self, batches: Iterator[NDArray[np.int64]], seed: int) -> None:
        self._batches, self._seed = batches, seed

    def __iter__(self) -> Iterator[_Key]:
        seed = self._seed
        return ((seed, batch) for batch in self._batches)


class _Batches(Dataset[_Item]):
    """Transformed batches by their keys."""

    def __init__(
        self, source: ImageSource, transform: Transform, at: Tensor, memory: BatchMemory, *, refill: bool
    ) -> None:
        self._source = source
        self._transform = transform
        self._at = at
        self._memory = memory
        self._refill = refill

    def __getitem__(self, key: _Key) -> _Item:
        seed, indices = key
        worker = get_worker_info()
        at = None if worker is None else self._at[worker.id].numpy()
        images: list[Tensor] = []
        good: list[int] = []
        bad: dict[int, str] = {}
        for index in indices.tolist():
            if at is not None:
                at[:] = os.getpid(), index
            with seeded(mix(seed, index, 0)):
                try:
                    images.append(self._transformed(index))
                    good.append(index)
                except UserError as error:  # as its sentence it crosses process borders intact
                    bad[index] = str(error)
        if self._refill and good:
            for position in range(len(bad)):
                images.append(images[position % len(good)])
                good.append(good[position % len(good)])
        return self._memory.stack(images), self._source.labels[good], bad

    def _transformed(self, index: int) -> Tensor:
        if not isinstance(self._source, EncodedSource):
            return self._transform(self._source.read(index))
        image = self._source.open(index)
        try:
            return self._transform(image)
        except DecodeError as error:
            raise unreadable(self._source.name(index), error) from error


class BatchMemory:
    """Where a worker puts its batches for the main process: the same few blocks of shared memory in turns.

    New shared memory comes page by page as it is written to, which takes several times as long as the copying itself. A
    block is written anew when the worker's batch after the next ``prefetch`` ones is due. The main process has then taken
    the block's batch and copied it: see ``own``. In the main process itself every batch gets memory of its own.

    Args:
        prefetch: batches that a worker prepares ahead.
    """

    def __init__(self, prefetch: int) -> None:
        self._blocks: deque[Tensor] = deque()
        self._count = prefetch + 1

    def stack(self, images: list[Tensor]) -> Tensor:
        """Images (3, H, W) as one tensor (N, 3, H, W) in the memory layout that they have."""
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
    """A batch that the worker which made it will not write over."""
    return images.clone() if images.is_shared() else images  # in pinned memory it is a copy already


def in_workers(dataset: Dataset[Any], workers: int, prefetch: int = 2, **options: Any) -> DataLoader[Any]:
    """The items of a dataset as they are, made in worker processes that end when the main process says so."""
    # a worker that inherits a dead DALI pipeline, and is the first to collect it, waits for threads it does not have
    gc.collect()
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_unchanged,
        worker_init_fn=_prepare_worker,
        # its workers' base seed; drawn from the global generator, it would shift the dropout of a resumed epoch
        generator=torch.Generator(),
        **options,
    )


def _unchanged(item: Any) -> Any:
    return item


def _prepare_worker(worker: int) -> None:
    # Ctrl-C and SIGTERM reach the whole process group; the main process decides when its workers end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()
    quiet_libjpeg()


def _end_when_told(parent: int) -> None:
    """Heed SIGTERM from the main process alone, which sends it when it ends, and then waits."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
