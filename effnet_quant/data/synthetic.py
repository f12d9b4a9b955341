"""Batches of noise at no cost, to measure everything but the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effnet_quant.data.arrays import SyntheticSource
from effnet_quant.data.loaders import Loader
from effnet_quant.data.transforms import EvaluationTransform, TrainingTransform


class SyntheticLoader(Loader):
    """Gives the same noise as every batch, on the model's device, with the labels that ``Loader`` would give.

    Arguments are ``Loader``'s and the device.
    """

    def __init__(
        self,
        source: SyntheticSource,
        transform: EvaluationTransform | TrainingTransform,
        batch_size: int,
        device: torch.device,
        **options: Any,
    ) -> None:
        super().__init__(source, transform, batch_size, **options)
        self._images = source.batch(self._order.share).to(device)

    def epoch(self, epoch: int = 0, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from ``first_batch`` on. Do not change them in place."""
        for indices in self._order.batches(epoch, first_batch):
            yield self._images[: len(indices)], self.source.labels[indices]
