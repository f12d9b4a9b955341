"""The images that a user gives: files, folders, "-" for standard input, URLs; in Python also PIL images and arrays."""

from __future__ import annotations

import http.client
import os
import sys
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effnet_quant.data.decoding import DecodeError, decode
from effnet_quant.data.folders import image_files
from effnet_quant.data.sources import read_image, unreadable
from effnet_quant.errors import UserError
from effnet_quant.files import possible_path

STDIN = "-"
_SCHEMES = ("http://", "https://")
_TIMEOUT_SECONDS = 30
_LARGEST = 256 * 2**20  # bytes of a download or of standard input


def expand(names: list[str]) -> list[str]:
    """Replace every folder among the names by the images below it, sorted.

    Raises:
        UserError: a folder holds no images.
    """
    expanded: list[str] = []
    for name in names:
        if name.startswith(_SCHEMES) or not possible_path(name).is_dir():
            expanded.append(name)
            continue
        found = sorted(image_files(name))
        if not found:
            raise UserError(f"there are no images in {name}; give a folder with image files.")
        expanded += found
    return expanded


def read_named(name: str) -> Tensor:
    """Read the image that ``name`` stands for, upright, as uint8 (3, H, W).

    Raises:
        UserError: it does not exist, can't be fetched, or is damaged.
    """
    if name == STDIN:
        data = sys.stdin.buffer.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise UserError(
                f"standard input is larger than {_LARGEST >> 20} MiB, so it is no image; check the command."
            )
        return _decoded(data, "standard input")
    if name.startswith(_SCHEMES):
        return _decoded(_download(name), name)
    return read_image(name)


def as_pixels(image: Any) -> Tensor:
    """An image of any form as uint8 (3, H, W).

    Args:
        image: a file's name or a URL, a PIL image, an array of uint8 (H, W, 3) or (H, W), or a tensor of uint8 (3, H, W).

    Raises:
        UserError: it can't be read, or has another form.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_named(os.fspath(image))
    if isinstance(image, Tensor):
        if image.dtype is torch.uint8 and image.ndim == 3 and len(image) in (1, 3):
            return image.cpu().expand(3, -1, -1)
        raise _no_image(f"a tensor of {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}")
    if hasattr(image, "getexif") and hasattr(image, "convert"):  # a PIL image
        from PIL import ImageOps

        image = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise _no_image(f"a {type(image).__name__}")
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))):
        raise _no_image(f"an array of {image.dtype} {image.shape}")
    pixels = torch.from_numpy(np.array(image))  # a copy, because the arrays of PIL are read-only
    return (pixels[..., None] if pixels.ndim == 2 else pixels).movedim(-1, 0).expand(3, -1, -1)


def _no_image(what: str) -> UserError:
    return UserError(
        f"{what} is no image; give a file's name, a PIL image, an array of uint8 (H, W, 3) or a tensor of uint8 (3, H, W)."
    )


def _decoded(data: bytes, name: str) -> Tensor:
    try:
        return decode(np.frombuffer(bytearray(data), dtype=np.uint8))
    except DecodeError as error:
        raise unreadable(name, error) from error


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            promised = response.length
            data: bytes = response.read(_LARGEST + 1)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: the server answers {error.code} {error.reason}; check the address.") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(f"{url} can't be fetched ({reason}); check the address and the network.") from error
    if len(data) > _LARGEST:
        raise UserError(f"{url} is larger than {_LARGEST >> 20} MiB; download it and give the file.")
    if promised is not None and len(data) < promised:
        raise UserError(f"{url} ended after {len(data):,} of {promised:,} bytes; try again.")
    return data
