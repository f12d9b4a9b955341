"""Gathers the facts of the quantization report of a run, and writes its page."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from effnet_quant.api import build
from effnet_quant.card import ModelCard
from effnet_quant.data.transforms import normalize
from effnet_quant.errors import UserError
from effnet_quant.files import create_folder, replace_file
from effnet_quant.jobs.autoquant import Climb
from effnet_quant.jobs.engine_judge import EngineJudge, Verdict
from effnet_quant.jobs.run import Run, calibration_loader
from effnet_quant.models.weights import Weights
from effnet_quant.quantization.calibration import collect, report_ranges
from effnet_quant.quantization.calibration.calibrator import Calibrator
from effnet_quant.quantization.calibration.range_report import RangeReport
from effnet_quant.quantization.ptq.sensitivity import SensitivityTable, sensitivity
from effnet_quant.quantization.ptq.step import DEFAULT_CONTEXT, StepContext
from effnet_quant.quantization.quantized_layers import float_weight, layer_operation
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.spec import resolve_spec
from effnet_quant.quantization.targets import get_target
from effnet_quant.report.quantization_page import Layer, Page, Values, Variant, quantization_page
from effnet_quant.tasks import get_task

PAGE = "index.html"
BINS = 48
IMAGES = 128  # for sensitivity and histograms


def write_quantization_report(
    folder: Path,
    run: Run,
    model: nn.Module,
    card: ModelCard,
    float_model: nn.Module,
    *,
    climb: Climb | None = None,
    context: StepContext = DEFAULT_CONTEXT,
) -> Path:
    """Write the report of a quantized network to ``folder``/index.html. Returns the file.

    Args:
        folder: created if it is missing.
        run: the run; its validation images are judged, its calibration images give histograms and sensitivity.
        model: the quantized network.
        card: of the quantized network.
        float_model: the float network.
        climb: what autoquant tried, if it ran.
        context: memory, folder and progress.

    Raises:
        UserError: the folder can't be written, or the network can't be exported.
    """
    create_folder(folder, "--report")
    assert card.input is not None and card.target is not None
    model, float_model = (copy.deepcopy(network).cpu().eval() for network in (model, float_model))
    task = get_task(card.task)
    summary, judged_on = _judged(run, model, card, float_model)  # before histograms: collect finds outputs' ranges anew
    pairs = []
    for pixels, targets in calibration_loader(run, IMAGES).epoch():
        pairs.append((normalize(pixels.cpu(), card.input), targets))
    batches: list[Tensor] = [images for images, _ in pairs]
    try:
        found: SensitivityTable | str = sensitivity(model, batches, [targets for _, targets in pairs], task, context)
    except UserError as error:
        found = f"Not measured: {error}"
    calibrators = collect(model, batches, "mse")
    ranges = {report.name: report for report in report_ranges(model, calibrators)}
    page = Page(
        title=f"{card.arch}: quantization report",
        facts=[
            ("runtime", card.target),
            ("grids", _grids(card)),
            ("classes", str(card.num_classes)),
            ("images", f"{card.input.image_size} x {card.input.image_size}"),
        ],
        score=f"{task.score.title} {task.score.unit}",
        judged_on=judged_on,
        summary=summary,
        sensitivity=found,
        layers=list(_layers(model, ranges, calibrators)),
        in_float=list(_in_float(model, card)),
        tried=[] if climb is None else climb.cells(),
        ended="" if climb is None else f"Judged on {climb.judged_on}; {climb.ended}.",
    )
    path = folder / PAGE
    replace_file(path, quantization_page(page).encode())
    return path


def _grids(card: ModelCard) -> str:
    spec = resolve_spec(card.quant_spec or "w8a8")
    count = len(spec.overrides)
    more = f"; {count} override{'s' * (count != 1)}" if count else ""
    return f"weights {spec.weight}; activations {spec.activation}{more}"


def _judged(run: Run, model: nn.Module, card: ModelCard, float_model: nn.Module) -> tuple[list[Variant], str]:
    """The rows of the summary, and a sentence about them."""
    assert card.target is not None
    try:
        judge = EngineJudge(card, card.target, run.val, float_model)
        verdict = judge.judge(model, card, None, simulate=True)
    except UserError as error:
        return [], f"Not measured: {error}"
    rows = [_variant(f"float, {card.target}", judge.float)]
    rows.append(Variant("simulation", verdict.simulation, None, None, None))
    if judge.runs_engine:
        rows.append(_variant(f"engine, {card.target}", verdict))
        return rows, "On the validation images; ms for one image on this machine, median."
    return rows, f"On the validation images. {card.target} is not installed here, so no engine was run."


def _variant(name: str, verdict: Verdict) -> Variant:
    return Variant(name, verdict.score, verdict.agreement, verdict.latency_ms, verdict.size_bytes)


def _layers(
    model: nn.Module, ranges: Mapping[str, RangeReport], calibrators: Mapping[str, Calibrator]
) -> Iterator[Layer]:
    for name, module in model.named_modules():
        if not hasattr(module, "_weight_quantizer"):
            continue
        weights, values = f"{name}._weight_quantizer", f"{name}._input_quantizer"
        at_weights = at_values = None
        if weights in ranges:
            weight = float_weight(module).detach().float().flatten().numpy()
            at_weights = _values(ranges[weights], weight, None)
        if values in ranges and (counted := calibrators[values].histogram) is not None:
            counts = counted.counts.cpu().numpy()
            at_values = _values(ranges[values], counted.centres, counts)
        yield Layer(name, at_weights, at_values)


def _values(report: RangeReport, numbers: NDArray[Any], weights: NDArray[Any] | None) -> Values:
    low, high = report.seen
    if not low < high:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(np.clip(numbers, low, high), BINS, (low, high), weights=weights)
    sqnr = report.sqnr if report.sqnr is not None and math.isfinite(report.sqnr) else None
    return Values(report.grid, tuple(map(int, counts)), (low, high), report.chosen, report.clipped, sqnr)


def _in_float(model: nn.Module, card: ModelCard) -> Iterator[tuple[str, str]]:
    """The places that no integer reaches, and why."""
    rules = get_target(str(card.target)).leaving_in_float(card.float_operations)
    for name, module in model.named_modules():
        if hasattr(module, "_weight_quantizer"):
            floats = [
                words
                for words, place in (("weights", module._weight_quantizer), ("input", module._input_quantizer))
                if not isinstance(place, TensorQuantizer)
            ]
            if floats:
                yield f"{name} ({layer_operation(module)}): {' and '.join(floats)}", "the quantization spec says float"
        elif isinstance(module, TensorQuantizer) and module.role == "input" and not module.simulated:
            yield name, f"{rules.name} computes '{module.operation}' in float"


def float_network(run: Run) -> nn.Module:
    """The float network of a run that has just been opened, on the CPU."""
    tensors = {name: value.detach().cpu().clone() for name, value in run.model.state_dict().items()}
    card = replace(run.card, quant_spec=None)
    return build(card, Weights(tensors, run.card).without_ranges(), **run.options).eval()
