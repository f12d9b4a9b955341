"""Images from arrays: handwritten digits, CIFAR, noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from effnet_quant.errors import UserError
from effnet_quant.files import cache_folder

SYNTHETIC = "synthetic"
SYNTHETIC_IMAGES = 1_281_167  # as many as ImageNet's training set, so that epochs are as long
_DIGITS_SEED = 0
CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # name -> torchvision's folder


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
        pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # scikit-learn stores them as 0 … 16
        self._images = torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1)
        self.labels = torch.from_numpy(digits.target[chosen]).long()
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """The image as uint8 (3, 8, 8), white on black."""
        return self._images[index]

    def name(self, index: int) -> str:
        """The image's number in the split."""
        return f"digit {index}"


class CifarSource:
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009), read by torchvision from its author's files.

    Args:
        name: "cifar10" or "cifar100".
        split: "train" (50,000 images) or "val" (10,000).
        root: the folder with cifar-10-batches-py/ or cifar-100-python/. Missing files are downloaded into it. None for
            the user's cache.

    Raises:
        UserError: the files are missing or damaged and can't be downloaded.
    """

    in_memory = False  # enlarging takes so long that workers pay
    augmentable = True

    def __init__(self, name: str, split: str, root: Path | None = None) -> None:
        from torchvision.datasets import CIFAR10, CIFAR100

        folder = cache_folder() if root is None else root
        try:
            dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name](str(folder), split == "train", download=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise UserError(
                f"{name} is not in {folder} and can't be downloaded ({error}); put {CIFAR[name]}/ there."
            ) from error
        self._images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)
        self.labels = torch.tensor(dataset.targets)
        self.classes = list(dataset.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """The image as uint8 (3, 32, 32)."""
        return self._images[index]

    def name(self, index: int) -> str:
        """The image's number in the split."""
        return f"CIFAR image {index}"


class SyntheticSource:
    """Noise images of the final size, to measure everything but the data. ``SyntheticLoader`` reads them.

    Args:
        num_images: number of images in an epoch.
        num_classes: number of classes.
        image_size: height and width in pixels.
    """

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
        """The image as uint8 (3, image_size, image_size). There are 64 different ones."""
        return self._pool[index % len(self._pool)]

    def batch(self, size: int) -> Tensor:
        """The first ``size`` images as uint8 (size, 3, image_size, image_size), channels last in memory as from decoders."""
        images = self._pool[torch.arange(size) % len(self._pool)]
        return images.contiguous(memory_format=torch.channels_last)

    def name(self, index: int) -> str:
        """The image's number."""
        return f"synthetic image {index}"
