"""From a decoded image to the network's input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as pil_transforms

from effnet_quant.card import InputSpec
from effnet_quant.data.choices import AUGMENTATIONS
from effnet_quant.data.transforms import (
    evaluation_transform,
    normalize,
    training_transform,
)


def smooth_image(height, width):
    """Slow waves of another frequency in each channel, uint8 (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127.5 + 120 * np.sin(x / (9 + 4 * c) + c) * np.cos(y / (11 + 3 * c)) for c in range(3)]
    return np.rint(np.stack(waves, axis=2)).astype(np.uint8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(90, 140), (140, 90), (40, 47)])
def test_evaluation_agrees_with_torchvision_on_pil_images(interpolation, height, width):
    pixels = smooth_image(height, width)
    mode = pil_transforms.InterpolationMode(interpolation)
    reference = pil_transforms.Compose([pil_transforms.Resize(64, mode), pil_transforms.CenterCrop(48)])
    expected = np.asarray(reference(Image.fromarray(pixels))).transpose(2, 0, 1).astype(int)
    ours = evaluation_transform(InputSpec(48, 64, interpolation))(torch.from_numpy(pixels).permute(2, 0, 1))
    assert (ours.shape, ours.dtype) == ((3, 48, 48), torch.uint8)
    assert np.abs(ours.numpy() - expected).max() <= 1  # rounding to uint8 between the two passes


def test_evaluation_scales_the_shorter_side_and_crops_the_centre():
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, :, 10:30] = 200  # the middle half: what a square crop of the whole height sees
    assert torch.equal(evaluation_transform(InputSpec(20, 20))(image), torch.full((3, 20, 20), 200).to(torch.uint8))


def test_image_of_the_final_size_stays_as_it_is():
    image = torch.from_numpy(smooth_image(32, 32)).permute(2, 0, 1)
    assert torch.equal(evaluation_transform(InputSpec(32, 32))(image), image)


@pytest.mark.parametrize("augmentation", [None, *AUGMENTATIONS])
def test_training_gives_uint8_of_the_image_size(augmentation):
    transform = training_transform(InputSpec(24, 56), augmentation)
    for height, width in ((30, 90), (20, 20), (8, 8)):
        image = transform(torch.from_numpy(smooth_image(height, width)).permute(2, 0, 1))
        assert (image.shape, image.dtype) == ((3, 24, 24), torch.uint8)


def test_training_flips_about_half_of_the_images():
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(3, 64, 64)
    transform = training_transform(InputSpec(16, 16))
    torch.manual_seed(0)
    flipped = sum(bool((image := transform(ramp))[0, 0, 0] > image[0, 0, -1]) for _ in range(200))
    assert 70 < flipped < 130  # 200 fair coins: 100 with a standard deviation of 7


def test_normalize_is_the_formula():
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (images.numpy().astype(np.float64) / 255 - mean[:, None, None]) / std[:, None, None]
    ours = normalize(images, InputSpec(4, 4))
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_normalize_takes_mean_and_std_of_the_preprocessing():
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    ours = normalize(images, InputSpec(2, 2, mean=(0.5, 0.0, 1.0), std=(0.5, 0.25, 2.0)))
    assert ours[0, :, 0, 0].tolist() == pytest.approx([1.0, 4.0, 0.0], abs=1e-6)


def test_preprocessing_survives_json():
    preprocessing = InputSpec(240, 272, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert InputSpec.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing


def test_crops_are_distributed_as_torchvisions():
    transform = training_transform(InputSpec(16, 16))
    reference = pil_transforms.RandomResizedCrop(16, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))
    for height, width in ((300, 400), (375, 500), (100, 400)):
        image = torch.empty(3, height, width)
        torch.manual_seed(0)
        ours, theirs = np.empty((2000, 4)), np.empty((2000, 4))
        for row in range(2000):
            box, _ = transform.draw(height, width)
            ours[row] = box.top, box.left, box.height, box.width
            theirs[row] = reference.get_params(image, reference.scale, reference.ratio)
        for one, other in zip(measures(ours, height, width), measures(theirs, height, width), strict=True):
            # Kolmogorov-Smirnov; above 1.95 sqrt(2 / 2000) = 0.062 one time in a thousand if they are the same
            assert np.abs(shares_below(one, other) - shares_below(other, other)).max() < 0.062
            assert np.abs(shares_below(one, one) - shares_below(other, one)).max() < 0.062
        areas, aspects, *_ = measures(ours, height, width)
        assert 0.07 < areas.min() < areas.max() <= 1
        assert 0.73 < aspects.min() < aspects.max() < 1.37


def measures(boxes, height, width):
    """Share of the area, aspect, and the two coordinates of the centre."""
    top, left, h, w = boxes.T
    return h * w / (height * width), w / h, top + h / 2, left + w / 2


def shares_below(values, limits):
    return np.searchsorted(np.sort(values), limits, side="right") / len(values)
