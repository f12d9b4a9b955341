"""Calibrator, the base class of every calibration method. It observes one activation and chooses its range."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from effnet_quant.quantization.calibration.histogram import Histogram, SeenTensors, largest_magnitude
from effnet_quant.quantization.calibration.weight_ranges import default_weight_range
from effnet_quant.quantization.spec import TensorSpec


class Calibrator(ABC):
    """Observes the batches of one activation and chooses its range.

    Each method is a subclass, in a file of its own and with a row in quantization/choices.py. Its constructor takes the
    method's hyperparameters, all with a default.

    Attributes:
        histogram: of the observed values; None for a method without a histogram.
    """

    histogram: Histogram | None = None

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Observe one batch of shape (N, …)."""

    @property
    @abstractmethod
    def seen(self) -> tuple[float, float]:
        """Smallest and largest value observed; (inf, -inf) before any. NaN and infinite values show here."""

    @abstractmethod
    def state(self) -> Tensor:
        """All that was observed, as float64 of shape (K,). K is the same for all calibrators of a class."""

    @abstractmethod
    def merge(self, state: Tensor) -> None:
        """Add the ``state`` of another calibrator of the same class, as if its batches had come after the own ones."""

    @abstractmethod
    def range(self, spec: TensorSpec) -> tuple[float, float]:
        """Both ends of the range for the grid ``spec``; (-amax, amax) on a symmetric grid. Needs finite observations."""

    def weight_range(self, weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """Both ends of the ranges of a weight tensor, float32 in the shape of its ``amax``.

        By default, grids of 8 bits or more hold all values; narrower grids minimise the squared error.
        """
        return default_weight_range(weight, spec)

    def adopt(self, collected: Calibrator) -> None:
        """Take over what another calibrator has observed. Call it on a new calibrator.

        Raises:
            ValueError: ``collected`` lacks what this method needs, e.g. a histogram.
        """
        if not isinstance(collected, type(self)):
            raise _not_enough(self, collected)
        self.merge(collected.state())

    def share_histograms(self, seen: SeenTensors) -> None:  # noqa: B027 (most methods have no use for it)
        """Take histograms from ``seen``, which all calibrators of a model share. Methods without a histogram ignore it."""


class HistogramCalibrator(Calibrator):
    """Base class of the methods that choose from a histogram. One histogram serves all of them (``adopt``)."""

    histogram: Histogram

    def __init__(self) -> None:
        self.histogram = Histogram()
        self._shared: SeenTensors | None = None

    def share_histograms(self, seen: SeenTensors) -> None:
        """Count in ``seen``, which counts a tensor once for all calibrators. Its owner clears it after every batch."""
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
        """The exponent, the extremes and the counts. Counts are exact below 2**53."""
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
    """Both ends of the range that holds all values seen. On a symmetric unsigned grid negative values do not count."""
    if not spec.symmetric:
        return seen
    amax = largest_magnitude(seen, signed=spec.signed)
    return -amax, amax


def _not_enough(wanted: Calibrator, collected: Calibrator) -> ValueError:
    return ValueError(f"a {type(collected).__name__} has not collected what a {type(wanted).__name__} needs")
