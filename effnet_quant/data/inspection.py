"""Inspects a data set: counts, sizes, broken files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset

from effnet_quant.data.decoding import DecodeError
from effnet_quant.data.shards import ShardSource
from effnet_quant.data.sources import EncodedSource, ImageSource, unreadable
from effnet_quant.data.workers import Whereabouts, explained_deaths, in_workers
from effnet_quant.errors import UserError


@dataclass
class Findings:
    """The results of an inspection so far.

    Attributes:
        looked_at: number of inspected images.
        sizes: height and width of each readable image.
        broken: a sentence for each unreadable image.
        by_class: number of images by label; filled only for shards, whose labels come with the images.
    """

    looked_at: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    by_class: Counter[int] = field(default_factory=Counter)


def look(source: ImageSource, *, decode: bool, workers: int, limit: int | None = None) -> Iterator[Findings]:
    """Inspect the images of a source; yields the same growing ``Findings`` after each image.

    Args:
        source: the images.
        decode: decode every pixel; otherwise read only the header. Images in shards are always decoded.
        workers: number of worker processes.
        limit: inspect only so many images, spread evenly over the source; None for all. Shards are always inspected whole.
    """
    findings = Findings()
    count = len(source) if limit is None else min(limit, len(source))
    whereabouts = Whereabouts(workers, source.name)
    looked: Dataset[list[_Look]]
    if isinstance(source, ShardSource):
        looked = _LookedAtShards(source, whereabouts)
    else:
        looked = _LookedAtImages(source, decode, torch.arange(count) * len(source) // max(1, count), whereabouts)
    parts = iter(in_workers(looked, workers))
    while True:
        with explained_deaths():
            looks = next(parts, None)
        if looks is None:
            return
        for size, sentence, label in looks:
            findings.looked_at += 1
            if sentence is None:
                findings.sizes.append(size)
            else:
                findings.broken.append(sentence)
            if label is not None:
                findings.by_class[label] += 1
            yield findings


_Look = tuple[tuple[int, int], str | None, int | None]  # height and width, or what is wrong; the label in a shard


class _LookedAtImages(Dataset[list[_Look]]):
    """One image after another."""

    def __init__(self, source: ImageSource, decode: bool, indices: Tensor, whereabouts: Whereabouts) -> None:
        self._source = source
        self._decode = decode
        self._indices = indices
        self._whereabouts = whereabouts

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> list[_Look]:
        index = int(self._indices[place])
        self._whereabouts.note(index)
        try:
            if self._decode or not isinstance(self._source, EncodedSource):
                height, width = self._source.read(index).shape[-2:]
            else:
                image = self._source.open(index)
                height, width = image.height, image.width
        except UserError as error:
            return [((0, 0), str(error), None)]
        return [((height, width), None, None)]


class _LookedAtShards(Dataset[list[_Look]]):
    """One shard after another, every image decoded."""

    def __init__(self, source: ShardSource, whereabouts: Whereabouts) -> None:
        self._source = source
        self._whereabouts = whereabouts

    def __len__(self) -> int:
        return len(self._source.urls)

    def __getitem__(self, place: int) -> list[_Look]:
        looks: list[_Look] = []
        first = sum(self._source.counts[:place])
        try:
            for index, (name, image, label) in enumerate(self._source.samples(self._source.urls[place]), first):
                self._whereabouts.note(index)
                try:
                    if isinstance(image, DecodeError):
                        raise image
                    height, width = image.decode().shape[-2:]
                    looks.append(((height, width), None, label))
                except (DecodeError, MemoryError) as error:
                    looks.append(((0, 0), str(unreadable(name, error)), label))
        except UserError as error:  # the rest of the shard
            looks.append(((0, 0), str(error), None))
        if len(looks) < self._source.counts[place]:
            missing = self._source.counts[place] - len(looks)
            looks.append(((0, 0), f"{self._source.urls[place]} holds {missing} images less than its index says.", None))
        return looks


def counts(source: ImageSource) -> Tensor:
    """Images of each class, int64 of shape (classes,)."""
    return torch.bincount(source.labels, minlength=len(source.classes))


def is_random_access(source: ImageSource) -> bool:
    """Whether an image can be read without reading the images before it."""
    return not isinstance(source, ShardSource)
