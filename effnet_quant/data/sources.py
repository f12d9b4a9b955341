"""The interface of a source of images, and reading of single image files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from effnet_quant.data.decoding import Bytes, DecodeError, EncodedImage, decode
from effnet_quant.errors import UserError
from effnet_quant.files import is_special, possible_path


class ImageSource(Protocol):
    """Labelled images, each readable by its index.

    Attributes:
        classes: names of the classes as in the data (folders, WordNet ids). A label is an index into this list.
        labels: one label per image, int64 of shape (N,).
        in_memory: whether reading an image is so cheap that worker processes would only slow it down.
        augmentable: whether an image keeps its class when it is cropped and flipped.
    """

    classes: list[str]
    in_memory: bool
    augmentable: bool

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """Read an image as uint8 (3, H, W).

        Raises:
            UserError: it can't be read. The sentence names it.
        """
        ...

    def name(self, index: int) -> str:
        """The image's name in messages: its file, if it has one."""
        ...


class EncodedSource(ABC):
    """An ``ImageSource`` whose images are encoded: files in an image format, or parts of files."""

    classes: list[str]
    labels: Tensor
    in_memory = False
    augmentable = True

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """The image's name in messages: its location."""

    @abstractmethod
    def load(self, index: int) -> Bytes:
        """Read the bytes of the image's file.

        Raises:
            OSError: they can't be read.
        """

    def open(self, index: int) -> EncodedImage:
        """Load an image and read its size, without decoding its pixels.

        Raises:
            UserError: it can't be read, or is no image. The sentence names it.
        """
        try:
            return EncodedImage(self.load(index))
        except (OSError, MemoryError, DecodeError) as error:
            raise unreadable(self.name(index), error) from error

    def read(self, index: int) -> Tensor:
        """Read an image as uint8 (3, H, W).

        Raises:
            UserError: it can't be read, or is damaged. The sentence names it.
        """
        try:
            return decode(self.load(index))
        except (OSError, MemoryError, DecodeError) as error:
            raise unreadable(self.name(index), error) from error


class NameTable:
    """A list of names in two arrays. Worker processes share an array's memory; they would copy a million Python strings."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


def read_image(path: str | Path) -> Tensor:
    """Decode an image file to uint8 (3, H, W), turned upright by its EXIF orientation.

    Raises:
        UserError: the file is missing, no regular file, no image, or damaged.
    """
    if is_special(path):
        raise UserError(
            f"{path} is a pipe or a device, which may never end; give a file, or - and the image by a pipe."
        )
    try:
        return decode(np.fromfile(possible_path(path), dtype=np.uint8))
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; check the path.") from error
    except (OSError, DecodeError) as error:
        raise unreadable(str(path), error) from error


def unreadable(name: str, error: Exception) -> UserError:
    """A UserError that says why an image can't be used."""
    if isinstance(error, DecodeError):
        return UserError(f"{name} is not an image or is damaged ({error}); replace or remove it.")
    reason: object = error.strerror if isinstance(error, OSError) and error.strerror else error
    if isinstance(error, MemoryError):
        reason = "there is not enough memory for it"
    return UserError(f"{name} can't be read ({reason}); replace or remove it.")
