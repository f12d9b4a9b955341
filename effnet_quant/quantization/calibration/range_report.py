"""Figures of every quantizer's calibration: range seen, range chosen, share clipped, SQNR."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effnet_quant.quantization.calibration.calibrator import Calibrator
from effnet_quant.quantization.calibration.histogram import Histogram
from effnet_quant.quantization.calibration.mse import squared_errors
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.quantized_layers import float_weight
from effnet_quant.quantization.quantizer import TensorQuantizer


@dataclass(frozen=True)
class RangeReport:
    """Figures of one quantizer's calibration.

    Attributes:
        name: of the quantizer.
        grid: in words, e.g. "int8, per tensor".
        seen: smallest and largest value; with the method "moving-average" their averages.
        chosen: both ends of the range; the outermost ones of a range per channel.
        clipped: share of the values that saturate, 0 … 1; None without a histogram.
        sqnr: signal to quantization noise ratio in dB; None without a histogram, infinite without any noise.
    """

    name: str
    grid: str
    seen: tuple[float, float]
    chosen: tuple[float, float]
    clipped: float | None
    sqnr: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite ``sqnr`` becomes None."""
        return asdict(self) | {"sqnr": None if self.sqnr is None or math.isinf(self.sqnr) else self.sqnr}


@torch.no_grad()
def report_ranges(model: nn.Module, calibrators: Mapping[str, Calibrator]) -> list[RangeReport]:
    """A RangeReport of every quantizer of a calibrated model, in their order. ``calibrators`` come from ``collect``."""
    reports = []
    for name, quantizer in quantizers(model):
        amax = quantizer.amax
        amin = (-amax if quantizer.spec.signed else 0 * amax) if quantizer.amin is None else quantizer.amin
        if name in calibrators:
            calibrator = calibrators[name]
            seen = calibrator.seen
            clipped, sqnr = None, None
            if calibrator.histogram is not None:
                clipped, sqnr = _of_histogram(calibrator.histogram, quantizer, amin.item(), amax.item())
        else:
            weight = float_weight(model.get_submodule(name.rpartition(".")[0])).float()
            seen = (weight.min().item(), weight.max().item())
            clipped, sqnr = _of_weight(weight, quantizer)
        chosen = (amin.min().item(), amax.max().item())
        reports.append(RangeReport(name, str(quantizer.spec), seen, chosen, clipped, sqnr))
    return reports


def _of_histogram(histogram: Histogram, quantizer: TensorQuantizer, amin: float, amax: float) -> tuple[float, float]:
    counts, centres = histogram.counts.cpu().numpy().astype(np.float64), histogram.centres
    low, high = _limits(quantizer)
    clipped = counts[(centres < low.item()) | (centres > high.item())].sum()
    signal = noise = float((counts * centres**2).sum())
    if amax > amin:  # else all values are rounded to zero
        noise = squared_errors(histogram, quantizer.spec, np.array([amin]), np.array([amax])).item()
    return float(clipped / counts.sum()), _decibels(signal, noise)


def _of_weight(weight: Tensor, quantizer: TensorQuantizer) -> tuple[float, float]:
    low, high = _limits(quantizer)
    clipped = ((weight < low) | (weight > high)).double().mean().item()
    noise = (weight.double() - quantizer(weight).double()).square().sum().item()
    return clipped, _decibels(weight.double().square().sum().item(), noise)


def _limits(quantizer: TensorQuantizer) -> tuple[Tensor, Tensor]:
    """The limits beyond which values saturate: half a step outside the grid."""
    low, high = quantizer.spec.bounds
    return (
        (low - 0.5 - quantizer.zero_point) * quantizer.scale,
        (high + 0.5 - quantizer.zero_point) * quantizer.scale,
    )


def _decibels(signal: float, noise: float) -> float:
    return math.inf if noise <= 0 else 10 * math.log10(max(signal, 1e-300) / noise)
