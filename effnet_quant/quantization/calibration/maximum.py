"""MaxCalibrator: the range that covers all values observed."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_quant.quantization.calibration.calibrator import Calibrator, covering_range
from effnet_quant.quantization.extremes import extremes
from effnet_quant.quantization.spec import TensorSpec


class MaxCalibrator(Calibrator):
    """Smallest and largest value of all batches, kept on the tensor's device."""

    def __init__(self) -> None:
        self._ends = torch.tensor([torch.inf, -torch.inf])

    def observe(self, x: Tensor) -> None:
        """Observe one batch of any shape. A NaN stays."""
        self._widen(*extremes(x))

    @property
    def seen(self) -> tuple[float, float]:
        low, high = self._ends.tolist()
        return low, high

    def state(self) -> Tensor:
        """The two extremes."""
        return self._ends.double()

    def merge(self, state: Tensor) -> None:
        self._widen(*state.float())

    def range(self, spec: TensorSpec) -> tuple[float, float]:
        return covering_range(self.seen, spec)

    def adopt(self, collected: Calibrator) -> None:
        if collected.histogram is None:
            super().adopt(collected)
        else:
            self._ends = torch.tensor(collected.histogram.seen)

    def _widen(self, low: Tensor, high: Tensor) -> None:
        ends = self._ends.to(low.device)
        self._ends = torch.stack((torch.minimum(ends[0], low), torch.maximum(ends[1], high)))
