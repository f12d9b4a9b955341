"""The calibration methods by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from effnet_quant.errors import UserError
from effnet_quant.quantization.calibration.calibrator import Calibrator
from effnet_quant.quantization.calibration.entropy import EntropyCalibrator
from effnet_quant.quantization.calibration.lsq import LsqCalibrator
from effnet_quant.quantization.calibration.maximum import MaxCalibrator
from effnet_quant.quantization.calibration.moving_average import MovingAverageCalibrator
from effnet_quant.quantization.calibration.mse import MseCalibrator
from effnet_quant.quantization.calibration.percentile import PercentileCalibrator

METHODS: dict[str, type[Calibrator]] = {
    "max": MaxCalibrator,
    "percentile": PercentileCalibrator,
    "entropy": EntropyCalibrator,
    "mse": MseCalibrator,
    "moving-average": MovingAverageCalibrator,
    "lsq": LsqCalibrator,
}
DEFAULT_METHOD = "percentile"
# a name, or what makes a calibrator: a class, or functools.partial(PercentileCalibrator, 99.9)
Method = str | Callable[[], Calibrator]


def calibrator_factory(method: Method, percentile: float | None = None) -> Callable[[], Calibrator]:
    """What makes a calibrator of the method.

    Args:
        method: a name in ``METHODS``, or the factory itself.
        percentile: for the method "percentile"; None for its default. Other methods leave it alone.

    Raises:
        UserError: there is no such method, or no such percentile.
    """
    of_percentile = PercentileCalibrator if percentile is None else partial(PercentileCalibrator, percentile)
    of_percentile()  # a percentile that there is not is a mistake with every method
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise UserError(f"there is no calibration method '{method}'; choose one of: {', '.join(METHODS)}.")
    kind = METHODS[method]
    return of_percentile if kind is PercentileCalibrator else kind
