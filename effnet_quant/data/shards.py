"""WebDataset shards: tar files of images and labels, read from front to back, local or remote."""

from __future__ import annotations

import contextlib
import math
import os
import posixpath
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effnet_quant.data.decoding import DecodeError, EncodedImage
from effnet_quant.data.folders import EXTENSIONS
from effnet_quant.data.shard_index import INDEX, ShardIndex, find_index, join, read_index, write_index_file
from effnet_quant.data.sources import EncodedSource, unreadable
from effnet_quant.errors import UserError
from effnet_quant.files import cant_write, check_writable, create_folder, possible_path

_BETWEEN = ".tar::"  # separates training and validation shards; "::" alone also occurs in fsspec's chained URLs
_MOST_SHARDS, _LONGEST_LABEL = 10**6, 12  # shards of a pattern, digits of a label
_LABEL = "cls"  # WebDataset's extension of a file with a class number in decimal digits


class ShardSource:
    """One split in WebDataset shards. ``ShardLoader`` reads it in order, because shards have no random access.

    Args:
        location: a folder or any URL that fsspec opens, with an ``index.json``; or some of its shards, as
            ``<location>/{000000..000146}.tar``.
        classes: the classes that labels refer to; by default those of the index.

    Attributes:
        urls: the shards.
        counts: number of images in each shard.
        remap: from a label in the shards to a label in ``classes``.

    Raises:
        UserError: fsspec, webdataset or the index is missing, the index lacks a shard, or ``classes`` lacks a class.
    """

    in_memory = False
    augmentable = True

    def __init__(self, location: str, classes: list[str] | None = None) -> None:
        root, wanted = _expand(location)
        _webdataset()
        index = read_index(root)
        listed = index.images
        names = list(listed) if wanted is None else wanted
        if missing := [name for name in names if name not in listed]:
            raise UserError(f"{missing[0]} is not in {join(root, INDEX)}; correct the numbers in {location}.")
        own = index.classes
        self.classes = own if classes is None else classes
        if unknown := sorted(set(own) - set(self.classes)):
            raise UserError(f"{location} has classes that the training data lacks: {', '.join(unknown[:5])}.")
        self.remap = torch.tensor([self.classes.index(name) for name in own])
        self.urls = [join(root, name) for name in names]
        self.counts = [listed[name] for name in names]

    def __len__(self) -> int:
        return sum(self.counts)

    @cached_property
    def labels(self) -> Tensor:
        """The labels. The first access reads all shards."""
        return torch.tensor([label for url in self.urls for _, _, label in self.samples(url)])

    def read(self, index: int) -> Tensor:
        """Read the image at a place in the order of the shards, as uint8 (3, H, W). Reads its shard up to that place."""
        for url, count in zip(self.urls, self.counts, strict=True):
            if index < count:
                name, image, _ = next(self.samples(url, index))
                try:
                    if isinstance(image, DecodeError):
                        raise image
                    return image.decode()
                except DecodeError as error:
                    raise unreadable(name, error) from error
            index -= count
        raise IndexError(index)

    def name(self, index: int) -> str:
        """The image's name in messages: its number and its shard."""
        for url, count in zip(self.urls, self.counts, strict=True):
            if index < count:
                return f"image {index} of {url}"
            index -= count
        raise IndexError(index)

    def samples(self, url: str, first: int = 0) -> Iterator[tuple[str, EncodedImage | DecodeError, int]]:
        """Yield name, image (or what is wrong with it) and label of each image in a shard, in order, from ``first`` on.

        Raises:
            UserError: the shard can't be read, or one of its images has no label.
        """
        import fsspec
        from webdataset import tariterators

        try:
            with fsspec.open(url, "rb") as stream:
                members = tariterators.tar_file_expander([{"url": url, "stream": stream}])
                for sample in tariterators.group_by_keys(members):
                    extension = next((key for key in sample if f".{key.rpartition('.')[2]}" in EXTENSIONS), None)
                    if extension is None:
                        continue
                    if first > 0:
                        first -= 1
                        continue
                    name = f"{url}:{sample['__key__']}.{extension}"
                    if _LABEL not in sample:
                        raise UserError(f"{name} has no label beside it; each image needs a .{_LABEL} file.")
                    yield name, _encoded(sample[extension]), self._label(sample[_LABEL], name)
        except (OSError, ValueError, EOFError, ImportError, tarfile.TarError) as error:
            # webdataset joins the reader's words and the stream, which prints as an address
            reason = error.args[0] if error.args and not isinstance(error, OSError) else error
            raise UserError(f"{url} can't be read ({reason}); check the URL, or make the shard again.") from error

    def _label(self, text: bytes, name: str) -> int:
        """The label in ``classes`` for the text of a label's file."""
        if not text.isdigit() or len(text) > _LONGEST_LABEL or int(text) >= len(self.remap):
            raise UserError(
                f"{name} has the label {text!r:.40}, which is none of its {len(self.remap)} classes; make the shard again."
            )
        return int(self.remap[int(text)])


def _encoded(data: bytes) -> EncodedImage | DecodeError:
    try:
        return EncodedImage(np.frombuffer(bytearray(data), dtype=np.uint8))
    except DecodeError as error:
        return error


def pack(source: EncodedSource, folder: Path, images_per_shard: int = 1000, seed: int = 0) -> Iterator[int]:
    """Write a source's encoded images, in random order, into shards of almost equal size; then write the index.

    Shards take their names when all are written. Until then earlier shards and their index stay as they were, and an error
    leaves nothing behind. An image that can't be read is reported on standard error and left out.

    Yields:
        After each image, the number of images written so far.

    Raises:
        UserError: webdataset is missing, the folder can't be written to, or the disk is full.
    """
    wds = _webdataset()
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    create_folder(folder, "--pack")
    check_writable(folder / INDEX)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    shards: dict[str, int] = {}
    written = 0
    try:
        with tempfile.TemporaryDirectory(prefix=".packing-", dir=folder) as unfinished:
            for number, part in enumerate(order.tensor_split(-(-len(order) // images_per_shard))):
                name = f"{number:06d}.tar"
                images = 0
                with wds.TarWriter(os.path.join(unfinished, name)) as tar:
                    for index in part.tolist():
                        extension = os.path.splitext(source.name(index))[1].lower().lstrip(".")
                        try:
                            data = source.load(index).tobytes()
                        except OSError as error:
                            print(f"warning: {unreadable(source.name(index), error)} It is left out.", file=sys.stderr)
                            continue
                        label = str(int(source.labels[index])).encode()
                        tar.write({"__key__": f"{index:08d}", extension: data, _LABEL: label})
                        written += 1
                        images += 1
                        yield written
                shards[name] = images
            (folder / INDEX).unlink(missing_ok=True)
            for shard in shards:
                os.replace(os.path.join(unfinished, shard), folder / shard)
        write_index_file(str(folder), ShardIndex(list(source.classes), shards))
    except BaseException as error:
        for path in created:  # unless there is something in it
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            raise cant_write(folder, error) from error
        raise


def write_index(location: str) -> ShardIndex:
    """Count the images and classes of existing shards, and write an index in their folder.

    Entries of an earlier index for other shards are kept. If the folder can't be written to, as over HTTP, the index is
    kept in ``cache_folder()``.

    Returns:
        The index of these shards.

    Raises:
        UserError: the shards can't be read, or the index can't be written.
    """
    root, names = _expand(location)
    if names is None:
        raise UserError(f"an index is made of shards named one by one, as in shards/{{000..146}}.tar; not {location}.")
    shards: dict[str, int] = {}
    largest = 0
    for name in names:
        source = ShardSource.__new__(ShardSource)
        source.remap = torch.arange(1 << 20)  # labels stay as they are
        labels = [label for _, _, label in source.samples(join(root, name))]
        largest = max([largest, *labels])
        shards[name] = len(labels)
    known = find_index(root) or ShardIndex([], {})
    others = {file: count for file, count in known.images.items() if file not in shards}
    classes = known.classes + [str(label) for label in range(len(known.classes), largest + 1)]
    try:
        write_index_file(root, ShardIndex(classes, others | shards))
    except ValueError as error:
        raise UserError(f"{location} can't have an index: {error}; remove {join(root, INDEX)} first.") from error
    return ShardIndex(classes, shards)


def is_shards(data: str) -> bool:
    """Whether a DATA argument names shards: a URL, a name that ends in ``.tar``, or a folder with an index for a split."""
    return (
        "://" in data
        or data.endswith(".tar")
        or any((possible_path(data) / split / INDEX).exists() for split in ("train", "val"))
    )


def open_shards(data: str, split: str, classes: list[str] | None) -> ShardSource:
    """Open a split's shards: ``<data>/<split>``, or one side of ``<training shards>::<validation shards>``.

    Raises:
        UserError: as ``ShardSource``.
    """
    if not data.endswith(".tar"):
        return ShardSource(join(data, split), classes)
    train, separator, val = data.partition(_BETWEEN)
    if not separator and split == "train":
        raise UserError(f"{data} is one set of shards; give training and validation as {data}::<validation shards>.")
    return ShardSource(train + ".tar" if split == "train" else val or data, classes)


def is_one_set(data: str) -> bool:
    """Whether a DATA argument names one set of shards without training and validation."""
    return data.endswith(".tar") and _BETWEEN not in data


def _expand(location: str) -> tuple[str, list[str] | None]:
    """From a location to the folder of the shards and the names that its braces stand for; None for all."""
    if not location.endswith(".tar"):
        return location, None
    braces = _webdataset().shardlists.braceexpand
    try:
        # counted first, because expanding fills the memory
        few = math.prod(map(_alternatives, re.findall(r"\{([^{}]*)\}", location))) <= _MOST_SHARDS
        # not expand_urls, which splits chained URLs
        urls = list(braces.braceexpand(location)) if few else []
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} is no pattern of shards; write {{first..last}} or {{one,other}}.") from error
    if not urls:
        raise UserError(f"{location} stands for more than {_MOST_SHARDS:,} shards; give fewer, or larger ones.")
    return posixpath.dirname(urls[0]) or ".", [posixpath.basename(url) for url in urls]


def _alternatives(braces: str) -> int:
    """How many names a pair of braces without inner ones stands for, e.g. "0..9" or "a,b"."""
    numbers = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\..*)?", braces)
    return braces.count(",") + 1 if numbers is None else abs(int(numbers[2]) - int(numbers[1])) + 1


def _webdataset() -> Any:
    try:
        import fsspec  # noqa: F401
        import webdataset
    except ImportError as error:
        raise UserError("shards need webdataset and fsspec; pip install 'effnet-quant[webdataset]'.") from error
    return webdataset
