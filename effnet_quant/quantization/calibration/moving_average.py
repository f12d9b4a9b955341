"""MovingAverageCalibrator: an average of the images' extremes, in which later images weigh more."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_quant.quantization.calibration.calibrator import Calibrator, covering_range
from effnet_quant.quantization.extremes import extremes
from effnet_quant.quantization.spec import TensorSpec

DECAY = 0.99  # every later image multiplies an image's weight by this factor


class MovingAverageCalibrator(Calibrator):
    """Exponential moving average of each image's smallest and largest value (Jacob et al. 2018, by image).

    The result depends on the order of the images, and is the same for any batch size. It is the weighted sum divided by the
    sum of the weights. So the first images do not weigh too much, and two averages can be joined.
    """

    def __init__(self) -> None:
        self._sums = [0.0, 0.0]
        self._weight = 0.0
        self._images = 0

    def observe(self, x: Tensor) -> None:
        """Observe a batch of shape (N, …), image by image."""
        for low, high in torch.stack([torch.stack(extremes(image)) for image in x]).tolist():
            self._append([low, high], 1.0, 1)

    @property
    def seen(self) -> tuple[float, float]:
        """Averages of the smallest and of the largest value; (inf, -inf) before any image, NaN after a NaN."""
        if self._images == 0:
            return float("inf"), float("-inf")
        return self._sums[0] / self._weight, self._sums[1] / self._weight

    def state(self) -> Tensor:
        """Weighted sums of the extremes, the sum of the weights, the number of images."""
        return torch.tensor([*self._sums, self._weight, float(self._images)], dtype=torch.float64)

    def merge(self, state: Tensor) -> None:
        low, high, weight, images = state.tolist()
        self._append([low, high], weight, int(images))

    def range(self, spec: TensorSpec) -> tuple[float, float]:
        return covering_range(self.seen, spec)

    def _append(self, sums: list[float], weight: float, images: int) -> None:
        fading = DECAY**images
        self._sums = [own * fading + other for own, other in zip(self._sums, sums, strict=True)]
        self._weight = self._weight * fading + weight
        self._images += images
