"""The images that a command line names: files, folders, "-" for standard input, URLs."""

from __future__ import annotations

import http.client
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from torch import Tensor

from effnet_quant.data.decoding import DecodeError, decode
from effnet_quant.data.folders import image_files
from effnet_quant.data.sources import read_image, unreadable
from effnet_quant.errors import UserError

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
        if not Path(name).is_dir():
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
