"""Chooses the bits of each layer of a run's network, with engines timed where the budget is one of latency."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from effnet_quant.api import build
from effnet_quant.checks.latency import median_seconds
from effnet_quant.data.transforms import normalize
from effnet_quant.engines.engine import load_engine
from effnet_quant.export.onnx import export_onnx
from effnet_quant.jobs.run import Run, calibration_loader
from effnet_quant.models.weights import Weights
from effnet_quant.quantization.calibration import calibrate
from effnet_quant.quantization.ptq.assignment_search import Budget
from effnet_quant.quantization.ptq.mixed_precision import MixedPrecision, mixed_precision
from effnet_quant.quantization.ptq.step import StepContext
from effnet_quant.quantization.qat import QatConfig
from effnet_quant.quantization.spec import QuantSpec
from effnet_quant.tasks import get_task


def choose_bits(
    run: Run,
    qat: QatConfig,
    *,
    target_drop: float | None = None,
    budget: Budget | None = None,
    progress: Callable[[str, int, int], None],
) -> MixedPrecision:
    """Choose the bits of each layer with the calibration images and their labels; see ``mixed_precision``.

    Args:
        run: an opened run whose model holds float weights. It is not changed.
        qat: the calibration's method and number of images.
        target_drop, budget: one of the two.
        progress: told a title and how many of all parts are done.

    Raises:
        UserError: as ``mixed_precision``; or the engines of a latency budget can't be run here.
    """
    card = run.card
    assert card.input is not None and card.target is not None
    target, size = card.target, card.input.image_size
    weights = Weights(dict(run.model.state_dict()), card).without_ranges()

    def built(spec: QuantSpec | None) -> nn.Module:
        own = replace(card, quant_spec=None if spec is None else spec.to_json())
        return build(own, weights, **run.options).eval()

    batches: list[Tensor] = []
    targets: list[Any] = []
    for pixels, answers in calibration_loader(run, qat.calibration_images).epoch():
        batches.append(normalize(pixels.cpu(), card.input))
        targets.append(answers)

    def latency(spec: QuantSpec) -> float:
        model = calibrate(built(spec), batches[:1], "max")  # any range takes the same time
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "timed.onnx")
            export_onnx(model, path, size, target=target)
            engine = load_engine(path, target)
            engine.warm_up()
            image = engine.example_inputs(1)
            return 1e3 * median_seconds([lambda: engine(*image)])[0]

    return mixed_precision(
        built(None).to(run.device),
        batches,
        targets,
        target_drop=target_drop,
        budget=budget,
        target=target,
        method=qat.calibration_method,
        latency=latency,
        task=get_task(card.task),
        context=StepContext(progress=progress),
    )
