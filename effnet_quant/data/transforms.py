"""What happens to an image between the file and the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_MARGIN = 32  # NVIDIA's evaluation transform scales to the target size + 32 before the crop

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input at evaluation; travels with the weights.

    Attributes:
        image_size: height and width of the input, in pixels.
        resize_size: length that the image's shorter side is scaled to before the centre crop.
        interpolation: "bilinear" or "bicubic".
        mean, std: per channel, of values in 0 … 1.
    """

    image_size: int
    resize_size: int
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def resized(self, image_size: int) -> Preprocessing:
        """The same for another image size, with the same margin around the crop."""
        return replace(self, image_size=image_size, resize_size=image_size + self.resize_size - self.image_size)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file's metadata."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Preprocessing:
        """The inverse of ``to_json``."""
        return Preprocessing(
            int(values["image_size"]),
            int(values["resize_size"]),
            str(values["interpolation"]),
            tuple(values["mean"]),
            tuple(values["std"]),
        )


def evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """uint8 (3, H, W) of any size to uint8 (3, image_size, image_size): scale the shorter side, crop the centre."""
    return v2.Compose(
        [
            v2.Resize(preprocessing.resize_size, _interpolation(preprocessing), antialias=True),
            v2.CenterCrop(preprocessing.image_size),
        ]
    )


def training_transform(preprocessing: Preprocessing, *, autoaugment: bool = False) -> Transform:
    """Random resized crop (8-100 % of the area, aspect 3/4 to 4/3), random flip, and AutoAugment if asked for."""
    interpolation = _interpolation(preprocessing)
    steps: list[Any] = [
        v2.RandomResizedCrop(preprocessing.image_size, (0.08, 1.0), (3 / 4, 4 / 3), interpolation, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if autoaugment:
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET))
    return v2.Compose(steps)


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (N, 3, H, W) to float32 with ``mean`` and ``std`` of the preprocessing, on the images' device."""
    mean = torch.tensor(preprocessing.mean, device=images.device).mul_(255)[:, None, None]
    std = torch.tensor(preprocessing.std, device=images.device).mul_(255)[:, None, None]
    return (images.float() - mean) / std


def _interpolation(preprocessing: Preprocessing) -> v2.InterpolationMode:
    return v2.InterpolationMode(preprocessing.interpolation)
