"""Image sources: a folder, the embedded digits, synthetic images; one interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from effnet_quant.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
DIGITS = "digits"
_DIGITS_SEED = 0


class ImageSource(Protocol):
    """Labelled images, each readable by its index.

    Attributes:
        classes: class names; a label is an index into them.
        labels: one label an image, int64 of shape (N,).
        in_memory: whether reading costs so little that worker processes would only slow it down.
        augmentable: whether crops and flips keep an image's meaning.
    """

    classes: list[str]
    labels: Tensor
    in_memory: bool
    augmentable: bool

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """The image as uint8 (3, H, W)."""
        ...

    def name(self, index: int) -> str:
        """What the image is called in messages: its file, if it has one."""
        ...


class FolderSource:
    """Images in ``<root>/<class>/``, at any depth below the class, in sorted order.

    Args:
        root: the folder of one split.
        classes: the classes that labels refer to; the names of the folders themselves by default.

    Raises:
        UserError: the folder is missing or unreadable, holds no images, or has a class that ``classes`` lacks.
    """

    in_memory = False
    augmentable = True

    def __init__(self, root: Path, classes: list[str] | None = None) -> None:
        if not root.is_dir():
            raise UserError(f"there is no folder {root}; DATA must hold train/<class>/ and val/<class>/.")
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.classes = found if classes is None else classes
        unknown = [name for name in found if name not in self.classes]
        if unknown:
            raise UserError(
                f"{root} has classes that the training data lacks: {', '.join(unknown[:5])}; "
                "add them to train/ or remove them."
            )
        self._paths: list[str] = []
        labels: list[int] = []
        for name in found:
            paths = sorted(
                os.path.join(folder, file)
                for folder, _, files in os.walk(root / name)
                for file in files
                if os.path.splitext(file)[1].lower() in EXTENSIONS
            )
            self._paths += paths
            labels += [self.classes.index(name)] * len(paths)
        if not self._paths:
            raise UserError(f"there are no images in {root}; expected <class>/<image> with one of {_extensions()}.")
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Tensor:
        """The image as uint8 (3, H, W).

        Raises:
            UserError: the file is no image or damaged.
        """
        return read_image(self._paths[index])

    def name(self, index: int) -> str:
        """The image's file."""
        return self._paths[index]


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits (8x8 pixels), 80 % "train" and 20 % "val" by a fixed permutation."""

    in_memory = True
    augmentable = False

    def __init__(self, split: str) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError(
                "the digits come with scikit-learn, which is not installed; pip install scikit-learn."
            ) from error
        digits = load_digits()
        order = np.random.default_rng(_DIGITS_SEED).permutation(len(digits.target))
        first_val = len(order) * 4 // 5
        chosen = order[:first_val] if split == "train" else order[first_val:]
        pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # stored as 0 … 16
        self._images = torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1)
        self.labels = torch.from_numpy(digits.target[chosen]).long()
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """The image as uint8 (3, 8, 8), white on black."""
        return self._images[index]

    def name(self, index: int) -> str:
        """Its number in the split."""
        return f"digit {index}"


class SyntheticSource:
    """Noise images of the final size: for measuring everything but the data."""

    in_memory = True
    augmentable = False

    def __init__(self, num_images: int, num_classes: int, image_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.randint(0, 256, (64, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(0, num_classes, (num_images,), generator=generator)
        self.classes = [str(index) for index in range(num_classes)]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """The image as uint8 (3, image_size, image_size)."""
        return self._pool[index % len(self._pool)]

    def name(self, index: int) -> str:
        """Its number."""
        return f"synthetic image {index}"


def open_sources(data: str) -> tuple[ImageSource, ImageSource]:
    """The training and the validation images of ``data``: a folder with train/ and val/, or "digits".

    Raises:
        UserError: there is no such data, it holds no images, or val/ has a class that train/ lacks.
    """
    if data == DIGITS:
        return DigitsSource("train"), DigitsSource("val")
    root = Path(data)
    if not root.is_dir():
        raise UserError(f"there is no data at {data}; give a folder with train/ and val/, or '{DIGITS}'.")
    train = FolderSource(root / "train")
    return train, FolderSource(root / "val", train.classes)


def open_validation(data: str, classes: list[str] | None = None) -> ImageSource:
    """The validation images alone; labels refer to ``classes`` where given, else to train/'s or val/'s own folders.

    Raises:
        UserError: as ``open_sources``.
    """
    if data == DIGITS:
        return DigitsSource("val")
    root = Path(data)
    if not root.is_dir():
        raise UserError(f"there is no data at {data}; give a folder with val/, or '{DIGITS}'.")
    if classes is None and (root / "train").is_dir():
        classes = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
    return FolderSource(root / "val", classes)


def read_image(path: str | Path) -> Tensor:
    """Decode an image file to uint8 (3, H, W), turned upright by its EXIF orientation.

    Raises:
        UserError: the file is missing, no image, or damaged.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # conversion would clip at 255 instead of scaling
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return F.pil_to_tensor(upright.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; check the path.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not an image or is damaged ({error}); replace or remove it.") from error


def _extensions() -> str:
    return ", ".join(sorted(EXTENSIONS))
