"""From the bytes of an image file to uint8 pixels."""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

try:
    import simplejpeg  # its libjpeg-turbo is a seventh faster than torchvision's
except ImportError:
    simplejpeg = None

MAX_PIXELS = 178_956_970  # where Pillow refuses an image as a decompression bomb
_ORIENTATION = 0x0112  # EXIF tag
_XMP = b"http://ns.adobe.com/xap/1.0/"  # the start of a JPEG segment with Adobe's metadata
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")
_SHRINKS = (8, 4, 2)  # the scales that libjpeg's inverse DCT computes fast

# libjpeg's warning about coded pixels beyond the last row, and the marker after them: a table, a restart, the end or a scan
_LEFT_OVER = re.compile(r"(\d+) extraneous bytes before marker 0x(c4|d[0-79a])")
_DAMAGED = re.compile("Corrupt JPEG data|Inconsistent progression")  # libjpeg's other warnings of damage

# Pillow warns of large images, for which MAX_PIXELS is the limit here, and of odd metadata.
# The filter stays, because filters are global: restoring it would affect other threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

Bytes = NDArray[np.uint8]


class DecodeError(ValueError):
    """The bytes are no image, or a damaged one. The text gives the reason."""


@dataclass(frozen=True)
class Box:
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class EncodedImage:
    """An image file in memory. Its size is known; its pixels are not decoded yet.

    Attributes:
        data: the file's bytes.
        height, width: size of the upright image, in pixels.
        is_plain_jpeg: whether it is an 8-bit grey or colour JPEG that is stored upright.

    Raises:
        DecodeError: it is empty, no image, or has too many pixels.
    """

    def __init__(self, data: Bytes) -> None:
        self.data = data
        self._frame = _find_frame(data)
        self.is_plain_jpeg = self._frame is not None
        if self._frame is not None:
            self.height, self.width = self._frame.height, self._frame.width
        else:
            with _open(data) as image:
                self.height, self.width = image.height, image.width
                if _orientation(image) >= 5:  # orientations 5 to 8 swap rows and columns
                    self.height, self.width = self.width, self.height
        if self.height * self.width > MAX_PIXELS:
            raise DecodeError(f"{self.width} x {self.height} pixels are more than the {MAX_PIXELS} that are allowed")

    def decode(self) -> Tensor:
        """Decode the whole image, upright, to uint8 (3, height, width).

        Raises:
            DecodeError: it is damaged, or its pixels have no known range.
        """
        return self._top(self.height)

    def region(self, box: Box, size: int) -> Tensor:
        """Decode ``box`` to uint8 (3, h, w), for scaling to ``size`` pixels.

        (h, w) is usually the box's size. JPEGs are decoded at 1/2, 1/4 or 1/8 of it (to within one pixel) if h and w stay
        at least ``size``. Rows below the box are not decoded if the decoder can stop early.

        Raises:
            DecodeError: it is damaged, or its pixels have no known range.
        """
        shrink = next((s for s in _SHRINKS if min(box.height, box.width) >= s * size), 1)
        if self._frame is not None and shrink > 1:
            return self._shrunk_region(self._frame, box, shrink)
        image = self._top(box.top + box.height)
        return image[:, box.top : box.top + box.height, box.left : box.left + box.width]

    def _top(self, rows: int) -> Tensor:
        """At least the upper ``rows`` of the image."""
        if self._frame is None:
            return _decode_with_pillow(self.data)
        if simplejpeg is None and not _libjpeg_is_quiet:
            rows = self.height
        try:
            with _Shortened(self.data, self._frame, rows) as kept:
                return _decode_jpeg(self.data, kept, self.width, is_whole=kept == self.height)
        except (RuntimeError, ValueError) as error:
            if _DAMAGED.search(str(error)):  # Pillow would accept the damage and return a partial image
                raise DecodeError(str(error)) from error
        pixels = _decode_with_pillow(self.data)  # Pillow knows more kinds of JPEG, and gives better reasons
        if pixels.shape[-2:] != (self.height, self.width):
            raise DecodeError(f"its headers disagree on whether it is {self.width} x {self.height} pixels")
        return pixels

    def _shrunk_region(self, frame: _Frame, box: Box, shrink: int) -> Tensor:
        with _Shortened(self.data, frame, box.top + box.height), _open(self.data) as image:
            image.draft("RGB", (max(1, image.width // shrink), max(1, image.height // shrink)))
            top, left = box.top // shrink, box.left // shrink
            bottom, right = -(-(box.top + box.height) // shrink), -(-(box.left + box.width) // shrink)
            try:
                return F.pil_to_tensor(image.crop((left, top, right, bottom)).convert("RGB"))
            except (OSError, SyntaxError, ValueError) as error:
                raise DecodeError(str(error)) from error


def decode(data: Bytes) -> Tensor:
    """Decode the bytes of an image file, upright, to uint8 (3, H, W).

    Raises:
        DecodeError: it is no image, damaged or too large, or its pixels have no known range.
    """
    return EncodedImage(data).decode()


def quiet_libjpeg() -> None:
    """Keep libjpeg's messages from the terminal, so that torchvision's decoder may stop early.

    libjpeg prints a message to standard error for every file that it does not read to the end. Python's own messages
    are still shown.
    """
    global _libjpeg_is_quiet  # noqa: PLW0603  the redirection applies to the whole process
    if _libjpeg_is_quiet:
        return
    try:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
    except OSError:
        return  # no standard error, or no /dev/null
    _libjpeg_is_quiet = True


_libjpeg_is_quiet = False


@dataclass(frozen=True)
class _Frame:
    """The fields of a JPEG's frame header (ITU-T T.81, B.2.2)."""

    offset: int  # of the two bytes that hold the height
    height: int
    width: int
    mcu_height: int


class _Shortened:
    """Context in which a JPEG's header promises only the needed rows, so that decoders stop after them.

    Rows are coded from top to bottom. One more row of blocks is kept, because the interpolation of the colours uses it.
    The decoded rows are thus exactly those of the whole image.
    """

    def __init__(self, data: Bytes, frame: _Frame, rows: int) -> None:
        self._field = data[frame.offset : frame.offset + 2]
        kept = (-(-rows // frame.mcu_height) + 1) * frame.mcu_height
        self._original = frame.height
        self._rows = min(kept, frame.height)

    def __enter__(self) -> int:
        """Returns how many rows the header promises now."""
        self._field[:] = self._rows >> 8, self._rows & 255
        return self._rows

    def __exit__(self, *exception: object) -> None:
        self._field[:] = self._original >> 8, self._original & 255


def _decode_jpeg(data: Bytes, height: int, width: int, *, is_whole: bool) -> Tensor:
    """Decode an 8-bit JPEG to uint8 (3, height, width). simplejpeg and torchvision give the same pixels.

    Args:
        data: the file.
        height, width: the size in its header, in pixels.
        is_whole: whether the header promises all rows of the file. Leftover coded pixels then mean damage, which
            simplejpeg reports and torchvision does not.

    Raises:
        RuntimeError, ValueError: the file is damaged.
    """
    if simplejpeg is None:
        return decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    try:
        simplejpeg.decode_jpeg(data, "RGB", buffer=pixels)
    except ValueError as error:
        left_over = _LEFT_OVER.search(str(error))
        if left_over is None or (is_whole and not _ends_in_padding(data, int(left_over[1]))):
            raise
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _ends_in_padding(data: Bytes, count: int) -> bool:
    """Whether the last ``count`` bytes before the end marker have one value: the padding of some cameras."""
    end = data.tobytes().rfind(b"\xff\xd9")
    return count <= end and len(np.unique(data[end - count : end])) == 1


def _find_frame(data: Bytes) -> _Frame | None:
    """The frame header of an 8-bit grey or colour JPEG that is stored upright; None for every other file."""
    if not len(data):
        raise DecodeError("the file is empty")
    view = data.data
    if bytes(view[:3]) != b"\xff\xd8\xff":
        return None
    position, has_orientation = 2, False
    while position + 4 <= len(view) and view[position] == 0xFF:
        marker = view[position + 1]
        length = view[position + 2] << 8 | view[position + 3]
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended sequential, progressive
            return _parse_frame(view[position : position + 2 + length], position, has_orientation, data)
        if marker == 0xDA or (0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xCC)):  # a scan, or a rare coding
            return None
        if marker == 0xE1:
            metadata = bytes(view[position + 4 : position + 2 + length])
            has_orientation |= metadata.startswith(b"Exif") or (
                metadata.startswith(_XMP) and b"Orientation" in metadata
            )
        position += 2 + length
    return None


def _parse_frame(segment: memoryview, position: int, has_orientation: bool, data: Bytes) -> _Frame | None:
    if len(segment) < 10:
        return None
    precision, height, width, components = struct.unpack_from(">BHHB", segment, 4)
    if precision != 8 or components not in (1, 3) or not height or not width or len(segment) < 10 + 3 * components:
        return None
    if has_orientation:
        with _open(data) as image:
            if _orientation(image) != 1:
                return None
    # a single component is not interleaved: its sampling factors say nothing
    sampling = 1 if components == 1 else max(segment[11 + 3 * index] & 15 for index in range(components))
    return _Frame(position + 5, height, width, 8 * sampling)


def _open(data: Bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data.data), formats=_formats())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it is in no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DecodeError(reason) from error


@lru_cache
def _formats() -> list[str]:
    """The formats that Pillow decodes itself. For others, such as EPS, it would start another program."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):  # only the metadata is damaged
        return 1


def _decode_with_pillow(data: Bytes) -> Tensor:
    with _open(data) as image:
        try:
            image.load()
            return F.pil_to_tensor(_to_8_bits(ImageOps.exif_transpose(image)).convert("RGB"))
        except (OSError, SyntaxError, ValueError, struct.error) as error:
            raise DecodeError(str(error)) from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey images to 8 bits. Pillow's conversion would clip them at 255."""
    if image.mode == "F":
        raise ValueError("its floating-point pixels have no known range")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError("its 32-bit pixels have no known range")
    return Image.fromarray((pixels >> 8).astype(np.uint8))
