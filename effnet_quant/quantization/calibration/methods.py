"""The ways of choosing a range, by name."""

from __future__ import annotations

import math

import numpy as np

from effnet_quant.errors import UserError
from effnet_quant.quantization.calibration.entropy import entropy_range
from effnet_quant.quantization.calibration.histogram import Histogram, HistogramObserver, SeenTensors
from effnet_quant.quantization.calibration.magnitudes import bin_centres
from effnet_quant.quantization.calibration.maximum import MaxObserver
from effnet_quant.quantization.calibration.moving_average import MovingAverageObserver
from effnet_quant.quantization.calibration.mse import mse_range
from effnet_quant.quantization.calibration.percentile import percentile_range
from effnet_quant.quantization.spec import TensorSpec

METHODS = ("max", "percentile", "entropy", "mse", "moving-average", "lsq")
CalibrationObserver = MaxObserver | MovingAverageObserver | HistogramObserver
_WITHOUT_HISTOGRAM: dict[str, type[MaxObserver] | type[MovingAverageObserver]] = {
    "max": MaxObserver,
    "moving-average": MovingAverageObserver,
}


def check_method(method: str, percentile: float) -> None:
    """Raises UserError where there is no such method, or no such percentile."""
    if method not in METHODS:
        raise UserError(f"there is no calibration method '{method}'; choose one of: {', '.join(METHODS)}.")
    if not 0 < percentile <= 100:
        raise UserError(f"the percentile must be above 0 and at most 100, not {percentile}.")


def observer_for(method: str, shared: SeenTensors) -> CalibrationObserver:
    """What must look at the data for ``method``."""
    kind = _WITHOUT_HISTOGRAM.get(method)
    return HistogramObserver(shared) if kind is None else kind()


def choose_range(
    observer: CalibrationObserver, spec: TensorSpec, method: str, percentile: float
) -> tuple[float, float]:
    """Ends of the range; on a symmetric grid they differ in sign alone. What was seen must be finite.

    Raises:
        ValueError: the observer has not collected what the method needs. A histogram serves all but the moving average.
    """
    needed = _WITHOUT_HISTOGRAM.get(method, HistogramObserver)
    if not isinstance(observer, needed) and not (method == "max" and isinstance(observer, HistogramObserver)):
        raise ValueError(f"a {type(observer).__name__} has not collected what the method '{method}' needs")
    low, high = observer.seen
    if isinstance(observer, HistogramObserver) and method != "max":
        histogram = observer.histogram
        if method == "percentile":
            return percentile_range(histogram, spec, percentile)
        if method == "entropy":
            return entropy_range(histogram, spec)
        # LSQ+ starts affine ranges where the squared error is smallest
        return _lsq_range(histogram, spec) if method == "lsq" and spec.symmetric else mse_range(histogram, spec)
    if not spec.symmetric:
        return low, high
    amax = max(-low, high) if spec.signed else max(high, 0.0)
    return -amax, amax


def _lsq_range(histogram: Histogram, spec: TensorSpec) -> tuple[float, float]:
    """LSQ's initial step, 2 <|x|> / sqrt(Qp) (Esser et al. 2020), as a range."""
    counts = histogram.counts.cpu().numpy()
    mean = float((counts * np.abs(bin_centres(histogram))).sum() / max(counts.sum(), 1))
    amax = 2 * mean * math.sqrt(spec.bounds[1])
    return -amax, amax
