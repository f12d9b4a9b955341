"""The DALI backends: ``Loader``'s batches, decoded and transformed by NVIDIA DALI on CPU or GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effnet_quant.data.decoding import Box, Bytes, DecodeError, EncodedImage
from effnet_quant.data.loaders import Loader
from effnet_quant.data.seeding import mix, seeded
from effnet_quant.data.sources import EncodedSource, ImageSource, unreadable
from effnet_quant.data.transforms import EvaluationTransform, TrainingTransform, is_strip, without_ends
from effnet_quant.errors import UserError

_QUEUE = 2  # batches that DALI works on ahead


class DaliLoader(Loader):
    """``Loader``'s batches, with the same order, crops and flips, from a DALI pipeline.

    DALI decodes plain JPEGs. Every other image is decoded by ``EncodedImage`` and passed to DALI as pixels, so that all
    backends see the same picture. The augmentation policies are DALI's own, with their own random numbers. A resumed run
    therefore augments differently from a run that was never stopped.

    Args:
        source: the images.
        transform: the transform that DALI carries out.
        batch_size: images per batch; the last batch may be smaller.
        device: "cpu", or "cuda" with an index: where the batches are.
        options: as ``Loader``'s. ``workers`` is the number of reading threads, and of decoding threads. ``prefetch`` has no
            effect, because DALI has its own queue.

    Raises:
        UserError: DALI is not installed, or there are fewer images to shuffle than processes.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: EvaluationTransform | TrainingTransform,
        batch_size: int,
        device: torch.device,
        **options: Any,
    ) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise UserError(
                "the DALI backends need NVIDIA DALI; pip install 'effnet-quant[dali]', or use --data-backend pytorch."
            ) from error
        super().__init__(source, transform, batch_size, **options)
        self._steps = transform
        self._device = device
        self._pipeline: Any = None
        self._prepared: Iterator[list[_Sample]] = iter(())
        self._in_flight: deque[list[_Sample]] = deque()
        self._spare: list[_Sample] = []

    def epoch(self, epoch: int = 0, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from ``first_batch`` on. Images are on the loader's device, labels on the CPU.

        Raises:
            UserError: too many images can't be read. The sentence names the file.
        """
        if self._in_flight:  # an epoch that was left early
            self._pipeline = None
        elif self._pipeline is not None:  # callers that count batches stop before DALI's StopIteration
            self._pipeline.reset()
        self._in_flight.clear()
        with ThreadPoolExecutor(max(1, self._workers)) as readers:
            indices = self._order.batches(epoch, first_batch)
            self._prepared = self._prepare(indices, mix(self._seed, epoch, -2), readers)
            while True:
                if self._pipeline is None:
                    self._pipeline = self._build(mix(self._seed, epoch, -3))
                try:
                    (images,) = self._pipeline.run()
                except StopIteration:
                    return
                except RuntimeError as error:
                    self._recover(error)
                    continue
                batch = self._in_flight.popleft()
                yield self._to_torch(images), self.source.labels[[sample.index for sample in batch]]

    def _prepare(
        self, batches: Iterator[NDArray[np.int64]], seed: int, readers: ThreadPoolExecutor
    ) -> Iterator[list[_Sample]]:
        """Yield batches for DALI. The files of the next batch are read while DALI works on this one."""
        reading: deque[list[tuple[int, Future[EncodedImage]]]] = deque()
        for indices in batches:
            reading.append([(index, readers.submit(self._open, index)) for index in indices.tolist()])
            if len(reading) > 1 and (batch := self._collected(reading.popleft(), seed)):
                yield batch
        if reading and (batch := self._collected(reading.popleft(), seed)):
            yield batch

    def _open(self, index: int) -> EncodedImage:
        """An image in a form that DALI can decode: plain JPEGs as they are, all others as uncompressed pixels."""
        if not isinstance(self.source, EncodedSource):
            return EncodedImage(_as_ppm(self.source.read(index)))
        image = self.source.open(index)
        whole = isinstance(self._steps, TrainingTransform) or not is_strip(image.height, image.width)
        if image.is_plain_jpeg and whole:
            return image
        try:
            pixels = image.decode()
            return EncodedImage(_as_ppm(pixels if whole else without_ends(pixels)))
        except DecodeError as error:
            raise unreadable(self.source.name(index), error) from error

    def _collected(self, reading: list[tuple[int, Future[EncodedImage]]], seed: int) -> list[_Sample]:
        batch: list[_Sample] = []
        for index, future in reading:
            try:
                image = future.result()
            except UserError as error:
                self.bad_images.add(index, str(error))
                continue
            if isinstance(self._steps, TrainingTransform):
                with seeded(mix(seed, index, 0)):
                    box, flipped = self._steps.draw(image.height, image.width)
            else:
                box, flipped = self._steps.scaled_box(image.height, image.width), False
            batch.append(_Sample(index, image, box, flipped))
        return self._filled(batch)

    def _filled(self, batch: list[_Sample]) -> list[_Sample]:
        """Fill a training batch to its size by repeating its own images, or the last batch's if it has none."""
        if not self.shuffle:
            return batch
        self._spare = batch = batch or self._spare
        if not batch:
            raise UserError("no image of a batch can be read; check DATA with effnet-quant data DATA --check.")
        return [batch[position % len(batch)] for position in range(self._order.share)]

    def _feed(self) -> tuple[list[Any], ...]:
        """The next batch for DALI's external source: the columns of ``_Sample``, without flips in evaluation."""
        batch = next(self._prepared, None)
        if batch is None:
            raise StopIteration
        self._in_flight.append(batch)
        columns: tuple[list[Any], ...] = (
            [sample.image.data for sample in batch],
            [np.array([sample.box.top, sample.box.left], dtype=np.int32) for sample in batch],
            [np.array([sample.box.height, sample.box.width], dtype=np.int32) for sample in batch],
            [np.int32(sample.flipped) for sample in batch],
        )
        return columns if isinstance(self._steps, TrainingTransform) else columns[:3]

    def _recover(self, error: RuntimeError) -> None:
        """Find the images that made DALI fail, and continue without them in a new pipeline.

        If ``EncodedImage`` can decode all of them, DALI gets them again as pixels.

        Raises:
            UserError: too many images can't be read.
            RuntimeError: DALI failed for another reason.
        """
        bad: set[int] = set()
        for sample in chain.from_iterable(self._in_flight):
            if sample.index in bad:
                continue
            try:
                sample.image.decode()
            except DecodeError as reason:
                bad.add(sample.index)
                self.bad_images.add(sample.index, str(unreadable(self.source.name(sample.index), reason)))
        batches = [[sample for sample in batch if sample.index not in bad] for batch in self._in_flight]
        if not bad:
            if not any(sample.image.is_plain_jpeg for batch in batches for sample in batch):
                raise error
            batches = [[_in_pixels(sample) for sample in batch] for batch in batches]
        self._in_flight.clear()
        self._prepared = chain((good for batch in batches if (good := self._filled(batch))), self._prepared)
        self._pipeline = None

    def _build(self, seed: int) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self._device.type == "cuda"
        preprocessing = self._steps.preprocessing
        size = preprocessing.image_size
        interpolation = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[preprocessing.interpolation]
        resize = {"interp_type": interpolation, "antialias": True}
        decode = {"device": "mixed" if on_gpu else "cpu", "output_type": types.RGB}

        policy = self._policy()

        def training() -> Any:
            encoded, corner, extent, flipped = fn.external_source(source=self._feed, num_outputs=4, batch=True)
            images = fn.decoders.image_slice(
                encoded, corner, extent, axis_names="HW", normalized_anchor=False, normalized_shape=False, **decode
            )
            images = fn.resize(images, size=[size, size], **resize)
            return policy(fn.flip(images, horizontal=flipped))

        def evaluation() -> Any:
            encoded, corner, extent = fn.external_source(source=self._feed, num_outputs=3, batch=True)
            images = fn.resize(fn.decoders.image(encoded, **decode), size=fn.cast(extent, dtype=types.FLOAT), **resize)
            return fn.slice(images, corner, [size, size], axis_names="HW", out_of_bounds_policy="pad")

        define = pipeline_def(enable_conditionals=True)(
            training if isinstance(self._steps, TrainingTransform) else evaluation
        )
        pipeline = define(
            batch_size=self.batch_size,
            num_threads=max(1, self._workers),
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=_QUEUE,
            seed=seed % 2**31,
        )
        pipeline.build()
        return pipeline

    def _policy(self) -> Any:
        """DALI's policy for the transform's augmentation."""
        from nvidia.dali.auto_aug import auto_augment, rand_augment, trivial_augment

        if not isinstance(self._steps, TrainingTransform) or self._steps.augmentation is None:
            return _unchanged
        size = self._steps.preprocessing.image_size
        policies = {
            "autoaugment": auto_augment.auto_augment_image_net,
            "randaugment": partial(rand_augment.rand_augment, n=2, m=9),
            "trivialaugment": trivial_augment.trivial_augment_wide,
        }
        # black, as torchvision fills the areas that a geometric operation uncovers
        return partial(policies[self._steps.augmentation], shape=[size, size], fill_value=0)

    def _to_torch(self, images: Any) -> Tensor:
        """A copy of DALI's batch as uint8 (N, 3, H, W)."""
        if self._device.type == "cpu":
            return torch.from_numpy(images.as_array()).permute(0, 3, 1, 2)
        from nvidia.dali.plugin.pytorch import feed_ndarray

        dense = images.as_tensor()
        batch = torch.empty(dense.shape(), dtype=torch.uint8, device=self._device)
        feed_ndarray(dense, batch, cuda_stream=torch.cuda.current_stream(self._device))
        return batch.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Sample:
    """An image that is passed to DALI.

    Attributes:
        index: its index in the source.
        image: its file.
        box: in training the crop; in evaluation the scaled size, and the crop's corner in it.
        flipped: whether to flip it.
    """

    index: int
    image: EncodedImage
    box: Box
    flipped: bool


def _in_pixels(sample: _Sample) -> _Sample:
    return replace(sample, image=EncodedImage(_as_ppm(sample.image.decode())))


def _unchanged(images: Any) -> Any:
    return images


def _as_ppm(image: Tensor) -> Bytes:
    """uint8 (3, H, W) as a portable pixmap file."""
    _, height, width = image.shape
    header = np.frombuffer(f"P6 {width} {height} 255\n".encode(), dtype=np.uint8)
    return np.concatenate([header, image.permute(1, 2, 0).reshape(-1).numpy()])
