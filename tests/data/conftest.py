"""Folders of images that look like photos, and of images in unusual forms."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

UPRIGHT, UPSIDE_DOWN, ON_ITS_SIDE = 1, 3, 6  # EXIF orientations


def _photo(generator, height, width):
    """Smooth colours with some edges and a little noise, uint8 (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        120 + 90 * np.sin(x / generator.uniform(15, 60) + c) * np.cos(y / generator.uniform(15, 60)) for c in range(3)
    ]
    image = np.stack(waves, axis=2)
    top, left = generator.integers(0, height // 2), generator.integers(0, width // 2)
    image[top : top + height // 3, left : left + width // 3] += generator.uniform(-80, 80, 3)
    return np.clip(image + generator.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """Two classes of eight JPEGs each, 150 to 420 pixels a side; not to be changed."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in ("left", "right"):
        (root / name).mkdir()
        for number in range(8):
            height, width = generator.integers(150, 420, 2)
            image = Image.fromarray(_photo(generator, height, width))
            image.save(root / name / f"{number}.jpg", quality=88, progressive=number == 3, subsampling=number % 3)
    return root


@pytest.fixture(scope="session")
def odd_images(tmp_path_factory):
    """One class of images in forms that decoders get wrong; not to be changed."""
    root = tmp_path_factory.mktemp("odd")
    folder = root / "c"
    folder.mkdir()
    generator = np.random.default_rng(1)
    image = Image.fromarray(_photo(generator, 60, 80))
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("L").save(folder / "grey.jpg")
    image.convert("P").save(folder / "palette.png")
    image.convert("P").save(folder / "palette.gif")
    image.save(folder / "lossless.webp", lossless=True)
    image.save(folder / "bitmap.bmp")
    image.convert("RGBA").save(folder / "alpha.png")
    for orientation in (UPRIGHT, UPSIDE_DOWN, ON_ITS_SIDE):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(folder / f"turned{orientation}.jpg", exif=exif)
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    return root
