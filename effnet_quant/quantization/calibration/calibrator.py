"""Calibrator: what every calibration method is, an object that observes one tensor and chooses its range."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from effnet_quant.quantization.calibration.histogram import Histogram, SeenTensors, largest_magnitude
from effnet_quant.quantization.calibration.weight_ranges import covering_weight_range, mse_weight_range
from effnet_quant.quantization.spec import TensorSpec


class Calibrator(ABC):
    """Observes the batches of one activation and chooses its range.

    A method is a subclass, in a file of its own and with a row in ``METHODS``. Its constructor takes the method's
    hyperparameters, all with a default.

    Attributes:
        histogram: the counts of what was observed; None where the method does not count.
    """

    histogram: Histogram | None = None

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take one batch into account, of shape (N, …)."""

    @property
    @abstractmethod
    def seen(self) -> tuple[float, float]:
        """Smallest and largest value; (inf, -inf) where nothing was observed, NaN or infinite where such a value was."""

    @abstractmethod
    def state(self) -> Tensor:
        """All that was observed, float64 of shape (K,). K is the same for all calibrators of a class."""

    @abstractmethod
    def merge(self, state: Tensor) -> None:
        """Take into account what another calibrator of the same class observed, as if after this one."""

    @abstractmethod
    def range(self, spec: TensorSpec) -> tuple[float, float]:
        """Ends of the range on the grid ``spec``; on a symmetric grid they differ in sign alone. What was observed must be
        finite."""

    def weight_range(self, weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """Ends of the ranges of a weight tensor, float32 in the shape of its ``amax``.

        Unless a method has its own: grids of 8 bits or more hold all values, narrower ones have the smallest squared error.
        """
        return covering_weight_range(weight, spec) if spec.bits >= 8 else mse_weight_range(weight, spec)

    def adopt(self, collected: Calibrator) -> None:
        """Choose from what another calibrator has observed; call it on a calibrator that has observed nothing.

        Raises:
            ValueError: ``collected`` has not observed what this method needs.
        """
        if not isinstance(collected, type(self)):
            raise _not_enough(self, collected)
        self.merge(collected.state())

    def share_histograms(self, seen: SeenTensors) -> None:  # noqa: B027 (most methods have no use for it)
        """Hear of the histograms that the calibrators of a model share. Methods that count take them from there."""


class HistogramCalibrator(Calibrator):
    """What the methods that choose from a histogram have in common. One histogram serves all of them (``adopt``)."""

    histogram: Histogram

    def __init__(self) -> None:
        self.histogram = Histogram()
        self._shared: SeenTensors | None = None

    def share_histograms(self, seen: SeenTensors) -> None:
        """Count a tensor that several calibrators observe once, in ``seen``; its owner clears it after every batch."""
        self._shared = seen

    def observe(self, x: Tensor) -> None:
        """Count one batch, of any shape."""
        if self._shared is None:
            self.histogram.add(x)
        else:
            self.histogram.merge(self._shared.histogram(x))

    @property
    def seen(self) -> tuple[float, float]:
        return self.histogram.seen

    def state(self) -> Tensor:
        """The exponent, the extremes and the counts, which are exact below 2**53."""
        head = torch.tensor([self.histogram.exponent, *self.histogram.seen], dtype=torch.float64)
        return torch.cat((head.to(self.histogram.counts.device), self.histogram.counts.double()))

    def merge(self, state: Tensor) -> None:
        exponent, low, high = state[:3].tolist()
        self.histogram.merge(Histogram(int(exponent), (low, high), state[3:].long()))

    def adopt(self, collected: Calibrator) -> None:
        if collected.histogram is None:
            raise _not_enough(self, collected)
        self.histogram = collected.histogram


def covering_range(seen: tuple[float, float], spec: TensorSpec) -> tuple[float, float]:
    """Ends of the range that holds all that was seen. A symmetric unsigned grid holds what is not negative."""
    if not spec.symmetric:
        return seen
    amax = largest_magnitude(seen, signed=spec.signed)
    return -amax, amax


def _not_enough(wanted: Calibrator, collected: Calibrator) -> ValueError:
    return ValueError(f"a {type(collected).__name__} has not collected what a {type(wanted).__name__} needs")
