"""Joins what the processes of a group have seen, so that all choose the ranges of all images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import distributed
from torch.distributed import ReduceOp

from effnet_quant.quantization.calibration.histogram import Histogram, HistogramObserver
from effnet_quant.quantization.calibration.maximum import MaxObserver
from effnet_quant.quantization.calibration.methods import CalibrationObserver
from effnet_quant.quantization.calibration.moving_average import MovingAverageObserver
from effnet_quant.quantization.quantizer import TensorQuantizer


def merge_ranks(observers: Sequence[CalibrationObserver], device: torch.device) -> None:
    """Let every process's observers know what the same observers of the other processes saw; without a group, nothing."""
    if not _in_group():
        return
    maxima = [observer for observer in observers if isinstance(observer, MaxObserver)]
    for observer, (low, high) in zip(maxima, _joined([observer.seen for observer in maxima], device), strict=True):
        observer.merge_extremes(low, high)
    _merge_histograms([item.histogram for item in observers if isinstance(item, HistogramObserver)], device)
    _merge_averages([item for item in observers if isinstance(item, MovingAverageObserver)], device)


def merge_tracked_ranges(trackers: Sequence[TensorQuantizer]) -> None:
    """Let every process's output quantizers hold the extremes that all of them saw."""
    if _in_group():
        for tracker in trackers:
            distributed.all_reduce(tracker._low, ReduceOp.MIN)
            distributed.all_reduce(tracker._high, ReduceOp.MAX)
            tracker.stop_tracking()  # a process without images has a range only now


def total_over_ranks(count: int, device: torch.device) -> int:
    """The sum of all processes' counts."""
    if not _in_group():
        return count
    total = torch.tensor(count, device=device)
    distributed.all_reduce(total)
    return int(total)


def _in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _joined(seen: list[tuple[float, float]], device: torch.device) -> list[tuple[float, float]]:
    """The extremes over all processes; NaN becomes infinity, which no backend's minimum overlooks."""
    if not seen:
        return []
    reach = [(math.inf, math.inf) if math.isnan(low) else (-low, high) for low, high in seen]
    ends = torch.tensor(reach, dtype=torch.float64, device=device)
    distributed.all_reduce(ends, ReduceOp.MAX)
    return [(-low, high) for low, high in ends.tolist()]


def _merge_histograms(histograms: list[Histogram], device: torch.device) -> None:
    if not histograms:
        return
    exponents = torch.tensor([histogram.exponent for histogram in histograms], device=device)
    distributed.all_reduce(exponents, ReduceOp.MAX)
    for histogram, exponent in zip(histograms, exponents.tolist(), strict=True):
        histogram.grow(exponent)
    counts = torch.stack([histogram.counts.to(device) for histogram in histograms])
    distributed.all_reduce(counts)
    seen = _joined([histogram.seen for histogram in histograms], device)
    for histogram, own, ends in zip(histograms, counts, seen, strict=True):
        histogram.replace(own, ends)


def _merge_averages(observers: list[MovingAverageObserver], device: torch.device) -> None:
    if not observers:
        return
    own = torch.tensor([observer.state() for observer in observers], dtype=torch.float64, device=device)
    states = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(states, own)
    for index, observer in enumerate(observers):
        observer.clear()
        for state in states:  # the images of rank 0 come first
            observer.append_state(state[index].tolist())
