"""Calibration as a step: by one method, or by the method with the smallest error in the network's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from effnet_quant.quantization.calibration import calibrate, collect, set_ranges
from effnet_quant.quantization.eager_evaluation import Batch
from effnet_quant.quantization.ptq.judge import Judge
from effnet_quant.quantization.ptq.step import DEFAULT_CONTEXT, StepContext, checked_batches


@dataclass(frozen=True)
class Calibration:
    """Gives every quantizer its range by one method, as ``calibrate`` does.

    Attributes:
        method: a calibration method.
        percentile: for the method "percentile".
    """

    method: str = "max"
    percentile: float | None = None

    def __call__(self, model: nn.Module, batches: Sequence[Batch], context: StepContext = DEFAULT_CONTEXT) -> None:
        batches, done = checked_batches(model, batches), 0

        def after_batch(_: int) -> None:
            nonlocal done
            done += 1
            context.progress("calibration", done, len(batches))

        calibrate(model, batches, self.method, self.percentile, after_batch)


def calibrate_best(
    model: nn.Module,
    batches: Sequence[Batch],
    judge: Judge,
    methods: Sequence[tuple[str, float | None]],
    context: StepContext = DEFAULT_CONTEXT,
) -> float:
    """Calibrate by the method with which ``judge`` finds the smallest error. Returns the error.

    One pass counts the histograms of all methods.

    Args:
        model, batches, context: as a step takes them.
        judge: made before the model had ranges.
        methods: pairs of a method with histograms and a percentile.
    """
    done = 0

    def after_batch(_: int) -> None:
        nonlocal done
        done += 1
        context.progress("calibration", done, len(batches))

    seen = collect(model, batches, "mse", after_batch)
    errors = []
    for number, (method, percentile) in enumerate(methods):
        context.progress("calibration methods", number, len(methods))
        set_ranges(model, seen, method, percentile)
        errors.append((judge.error(), number))
    error, best = min(errors)
    set_ranges(model, seen, *methods[best])
    return error
