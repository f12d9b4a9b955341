"""What a backend is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet_quant.card import ModelCard

Runner = Callable[[NDArray[Any]], NDArray[np.float32]]


@dataclass(frozen=True)
class Settings:
    """How to compile: device and precision are among the backend's own; ``threads`` None leaves it to the runtime."""

    device: str
    precision: str
    threads: int | None = None


@dataclass(frozen=True)
class ImageInput:
    """What an engine takes.

    Attributes:
        name: of the input.
        dtype: "float32", "float16" or "uint8".
        shape: of one image, (C, H, W); None is a size that may vary.
        smallest_batch, largest_batch: images that one run can take; largest None is any number.
    """

    name: str
    dtype: str
    shape: tuple[int | None, int | None, int | None]
    smallest_batch: int = 1
    largest_batch: int | None = None


@dataclass(frozen=True)
class Compiled:
    """A file made ready to run.

    Attributes:
        run: maps images as ``input`` wants them, within its batches, to logits (N, classes).
        input: what it takes.
        precision: what it computes in: "fp32", "fp16" …, with "int8 + " in front where some of it is quantized.
        card: what the file says of its model.
        metadata: the same as plain values, and what else the file says.
        forget: lets go of what was compiled for the shapes of images that came so far; None if nothing is.
    """

    run: Runner
    input: ImageInput
    precision: str
    card: ModelCard = field(default_factory=ModelCard)
    metadata: dict[str, Any] = field(default_factory=dict)
    forget: Callable[[], None] | None = None


def run_in_batches(run: Runner, images: NDArray[Any], smallest: int, largest: int | None) -> NDArray[np.float32]:
    """Logits of any number of images from a runner that takes ``smallest`` to ``largest`` at a time.

    Larger batches are split; what is missing to the smallest is filled with copies of the last image, whose logits are
    dropped.
    """
    size = largest or len(images)
    parts = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        missing = max(smallest - len(part), 0)
        padded = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        parts.append(run(padded)[: len(part)])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
