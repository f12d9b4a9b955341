"""From ``--data-backend`` to a loader."""

from __future__ import annotations

from typing import Any

import torch

from effnet_quant.data.arrays import SyntheticSource
from effnet_quant.data.dali import DaliLoader
from effnet_quant.data.loaders import Loader
from effnet_quant.data.shards import ShardSource
from effnet_quant.data.sources import ImageSource
from effnet_quant.data.streaming import ShardLoader
from effnet_quant.data.synthetic import SyntheticLoader
from effnet_quant.data.transforms import EvaluationTransform, TrainingTransform
from effnet_quant.errors import UserError


def open_loader(
    backend: str,
    source: ImageSource,
    transform: EvaluationTransform | TrainingTransform,
    batch_size: int,
    device: torch.device,
    **options: Any,
) -> Loader:
    """Make the loader of a backend. "pytorch", "dali-cpu" and "dali-gpu" give the same batches in the same order.

    Args:
        backend: one of ``choices.BACKENDS``. Shards and synthetic images have a loader of their own.
        source, transform, batch_size: see ``Loader``.
        device: the model's device. "dali-gpu" and synthetic batches are there too.
        options: the other arguments of ``Loader``.

    Raises:
        UserError: DALI or the GPU is missing, a DALI backend is asked to read shards, or the loader raises it.
    """
    if backend == "dali-gpu" and device.type != "cuda":
        raise UserError("--data-backend dali-gpu needs an NVIDIA GPU, and there is none; use dali-cpu or pytorch.")
    if isinstance(source, SyntheticSource):
        return SyntheticLoader(source, transform, batch_size, device, **options)
    if isinstance(source, ShardSource):
        if backend.startswith("dali"):
            raise UserError(f"--data-backend {backend} reads no shards; use --data-backend pytorch.")
        return ShardLoader(source, transform, batch_size, **options)
    if backend.startswith("dali"):
        return DaliLoader(
            source, transform, batch_size, device if backend == "dali-gpu" else torch.device("cpu"), **options
        )
    return Loader(source, transform, batch_size, **options)
