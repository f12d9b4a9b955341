"""The calibration methods by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

from effnet_quant.errors import UserError
from effnet_quant.quantization.calibration.calibrator import Calibrator
from effnet_quant.quantization.calibration.percentile import PercentileCalibrator
from effnet_quant.quantization.choices import CALIBRATION_METHODS, DEFAULT_METHOD

__all__ = ["DEFAULT_METHOD", "METHODS", "Method", "calibrator_factory"]


def _class_of(place: str) -> type[Calibrator]:
    module, _, name = place.partition(".")
    kind: type[Calibrator] = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return kind


METHODS: dict[str, type[Calibrator]] = {name: _class_of(place) for name, place in CALIBRATION_METHODS.items()}
# a name, or a callable that returns a calibrator: a class, or functools.partial(PercentileCalibrator, 99.9)
Method = str | Callable[[], Calibrator]


def calibrator_factory(method: Method, percentile: float | None = None) -> Callable[[], Calibrator]:
    """A callable that returns a new calibrator of the method.

    Args:
        method: a name in ``METHODS``, or the callable itself.
        percentile: for the method "percentile"; None for its default. Other methods ignore it.

    Raises:
        UserError: there is no such method, or no such percentile.
    """
    of_percentile = PercentileCalibrator if percentile is None else partial(PercentileCalibrator, percentile)
    of_percentile()  # raises for an invalid percentile, whatever the method is
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise UserError(f"there is no calibration method '{method}'; choose one of: {', '.join(METHODS)}.")
    kind = METHODS[method]
    return of_percentile if kind is PercentileCalibrator else kind
