"""Which loader ``--data-backend`` means."""

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
    """The loader of a backend; "pytorch" and DALI's two give the same batches in the same order.

    Args:
        backend: one of ``choices.BACKENDS``; where the source is shards or synthetic, what it says makes no difference.
        source, transform, batch_size: see ``Loader``; ``ShardLoader``, ``SyntheticLoader``.
        device: where the model is; with "dali-gpu" the batches are there too.
        options: the other arguments of ``Loader``.

    Raises:
        UserError: DALI, or the GPU that the backend asks for, is missing; or as the loader's.
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
