"""The transforms of an image between its file and the network."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from effnet_quant.card import InputSpec
from effnet_quant.data.choices import AUGMENTATIONS
from effnet_quant.data.decoding import Box, EncodedImage
from effnet_quant.errors import UserError

SMALLEST_CROP = 0.08  # of the image's area, in a training crop
_ASPECT = (3 / 4, 4 / 3)  # of a training crop, width to height
_CROP_TRIES = 10
_LONGEST = 8  # ratio of the sides; images longer than that are cut before they are scaled

Transform = Callable[[Tensor | EncodedImage], Tensor]


@dataclass(frozen=True)
class EvaluationTransform:
    """Scales the shorter side to ``resize_size``, then crops the centre to ``image_size`` square."""

    preprocessing: InputSpec

    def __call__(self, image: Tensor | EncodedImage) -> Tensor:
        """From uint8 (3, H, W), or its file, to uint8 (3, image_size, image_size).

        Raises:
            DecodeError: the file is damaged.
        """
        pixels = image.decode() if isinstance(image, EncodedImage) else image
        if is_strip(*pixels.shape[-2:]):
            pixels = without_ends(pixels)
        box = self.scaled_box(*pixels.shape[-2:])
        mode = v2.InterpolationMode(self.preprocessing.interpolation)
        scaled = F.resize(pixels, [box.height, box.width], mode, antialias=True)
        return F.center_crop(scaled, [self.preprocessing.image_size])

    def scaled_box(self, height: int, width: int) -> Box:
        """The scaled size of an image of this size, and the crop's corner in it (negative if the crop is larger)."""
        size, shorter = self.preprocessing.image_size, self.preprocessing.resize_size
        if height <= width:
            height, width = shorter, shorter * width // height
        else:
            height, width = shorter * height // width, shorter
        return Box(round((height - size) / 2), round((width - size) / 2), height, width)


@dataclass(frozen=True)
class TrainingTransform:
    """Scales a random crop to ``image_size`` square, flips it with probability 1/2, then applies an augmentation policy.

    Random numbers come from torch's global generator. The same state gives the same image.

    Args:
        preprocessing: size and interpolation.
        augmentation: a name in ``AUGMENTATIONS``, or None.
        smallest_crop: share of the image's area that a crop has at least, above 0 and at most 1.
    """

    preprocessing: InputSpec
    augmentation: str | None = None
    smallest_crop: float = SMALLEST_CROP

    def __call__(self, image: Tensor | EncodedImage) -> Tensor:
        """From uint8 (3, H, W), or its file, to uint8 (3, image_size, image_size).

        Raises:
            DecodeError: the file is damaged.
        """
        size = self.preprocessing.image_size
        if isinstance(image, EncodedImage):
            box, flipped = self.draw(image.height, image.width)
            region = image.region(box, size)
        else:
            box, flipped = self.draw(*image.shape[-2:])
            region = F.crop(image, box.top, box.left, box.height, box.width)
        mode = v2.InterpolationMode(self.preprocessing.interpolation)
        scaled = F.resize(_packed(region), [size, size], mode, antialias=True)
        if flipped:
            scaled = F.horizontal_flip(scaled)
        if self.augmentation is None:
            return scaled
        # torchvision's operations take half the time on Pillow's images that they take on tensors
        return F.pil_to_tensor(self._policy(F.to_pil_image(scaled)))

    def draw(self, height: int, width: int) -> tuple[Box, bool]:
        """Draw a random crop of an image of this size, and whether to flip it.

        The crop has ``smallest_crop`` to all of the area and an aspect of 3/4 to 4/3, uniform in area and in log aspect
        (Szegedy et al., arXiv:1409.4842). If ten tries don't fit, it is the largest crop of an allowed aspect, at the
        centre.
        """
        # torch gives the seed only: Python's generator draws single numbers in a tenth of the time
        numbers = random.Random(int(torch.randint(2**62, ())))
        flipped = numbers.random() < 0.5
        for _ in range(_CROP_TRIES):
            area = height * width * numbers.uniform(self.smallest_crop, 1.0)
            aspect = math.exp(numbers.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return Box(numbers.randint(0, height - h), numbers.randint(0, width - w), h, w), flipped
        w = max(1, min(width, round(height * _ASPECT[1])))
        h = max(1, min(height, round(width / _ASPECT[0])))
        return Box((height - h) // 2, (width - w) // 2, h, w), flipped

    @cached_property
    def _policy(self) -> v2.Transform:
        assert self.augmentation is not None
        return getattr(v2, AUGMENTATIONS[self.augmentation])()


def evaluation_transform(preprocessing: InputSpec) -> EvaluationTransform:
    """From uint8 (3, H, W) to uint8 (3, image_size, image_size): scale the shorter side, crop the centre."""
    return EvaluationTransform(preprocessing)


def training_transform(
    preprocessing: InputSpec, augmentation: str | None = None, smallest_crop: float = SMALLEST_CROP
) -> TrainingTransform:
    """Random resized crop (``smallest_crop`` to all of the area, aspect 3/4 to 4/3), random flip, then the augmentation of
    that name."""
    return TrainingTransform(preprocessing, augmentation, smallest_crop)


def is_strip(height: int, width: int) -> bool:
    """Whether an image is so long that scaling its shorter side up would take gigabytes."""
    return max(height, width) > _LONGEST * min(height, width)


def without_ends(image: Tensor) -> Tensor:
    """Cut the ends off a strip (3, H, W). They lie outside the evaluation transform's crop."""
    height, width = image.shape[-2:]
    longest = _LONGEST * min(height, width)
    return F.center_crop(image, [min(height, longest), min(width, longest)])


def _packed(region: Tensor) -> Tensor:
    """Copy a crop (3, H, W) to contiguous memory. Resizing takes twice as long where there are gaps between rows."""
    return region.permute(1, 2, 0).contiguous().permute(2, 0, 1) if region.stride(0) == 1 else region


def normalize(images: Tensor, preprocessing: InputSpec) -> Tensor:
    """Normalise uint8 images (N, 3, H, W) to float32 by ``mean`` and ``std`` of ``preprocessing``, on their device.

    One pass over the pixels casts, scales and shifts. The result has the images' memory layout.

    Raises:
        UserError: the images have another number of channels.
    """
    if preprocessing.channels not in (1, images.shape[-3]):
        raise UserError(
            f"the model takes images of {preprocessing.channels} channels, and these have {images.shape[-3]}; its mean "
            "and std have one number per channel."
        )
    scale, shift = _scale_and_shift(preprocessing.mean, preprocessing.std, images.device)
    return torch.addcmul(shift, images, scale)


@lru_cache(maxsize=8)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(x / 255 - mean) / std as one factor and one offset per channel. Cached, so that they are copied to a device once."""
    deviation = 255 * torch.tensor(std, dtype=torch.float64)
    scale, shift = 1 / deviation, -255 * torch.tensor(mean, dtype=torch.float64) / deviation
    return scale.float().to(device)[:, None, None], shift.float().to(device)[:, None, None]
