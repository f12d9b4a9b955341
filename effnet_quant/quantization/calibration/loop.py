"""Runs data through a model and gives every quantizer its range."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from effnet_quant.errors import UserError
from effnet_quant.quantization.batches import Data, Key, run_on
from effnet_quant.quantization.calibration.calibrator import Calibrator
from effnet_quant.quantization.calibration.histogram import SeenTensors
from effnet_quant.quantization.calibration.methods import DEFAULT_METHOD, Method, calibrator_factory
from effnet_quant.quantization.calibration.process_group import gathered, reduce_extremes, total_over_ranks
from effnet_quant.quantization.eager_evaluation import device_of, eager_pass
from effnet_quant.quantization.placement.insertion import output_quantizers, quantizers
from effnet_quant.quantization.quantized_layers import float_weight
from effnet_quant.quantization.quantizer import TensorQuantizer


def calibrate(
    model: nn.Module,
    batches: Data,
    method: Method = DEFAULT_METHOD,
    percentile: float | None = None,
    progress: Callable[[int], None] | None = None,
    *,
    key: Key = None,
) -> nn.Module:
    """Choose the range of every quantizer of ``model``, in place, in one pass over ``batches``.

    Activations get the range that ``method`` chooses from the float network's values; docs/quantization.md compares the
    methods. Weights of 8 bits or more get the range that holds all values. Narrower weights get the range with the smallest
    squared error. "mse" minimises the squared error of all weights; "lsq" gives symmetric weights LSQ's initial range.

    The model runs in eval mode and returns to its old mode. In a process group every process brings its share of the
    batches, and all get the ranges of the whole.

    Args:
        model: a model that ``quantize`` has been through.
        batches: a DataLoader or another iterable of batches, as ``argument_batches`` takes them; on any device. Images are
            float, (N, C, H, W), as the model takes them. A function is called with the model, which it runs on its own data.
        method: "max", "percentile", "entropy", "mse", "moving-average" or "lsq", or a callable that returns a Calibrator.
        percentile: 0 < percentile <= 100, for the method "percentile".
        progress: called with the number of examples after each batch.
        key: for batches that are dicts, the entries with the model's arguments. None: those named like the arguments.

    Returns:
        The same model, with its quantizers switched on.

    Raises:
        UserError: no quantizers, no images, a batch that the model can't run, an unknown method, or a quantizer that saw
            nothing, NaN or infinity.
    """
    make = calibrator_factory(method, percentile)
    set_ranges(model, collect(model, batches, make, progress, key=key), make)
    return model


def collect(
    model: nn.Module,
    batches: Data,
    method: Method = "mse",
    progress: Callable[[int], None] | None = None,
    *,
    key: Key = None,
) -> dict[str, Calibrator]:
    """The calibrators of the activation quantizers, by name, after one pass over ``batches`` with all quantizers off.

    Calibrators of "percentile", "entropy", "mse" and "lsq" have histograms. With those, ``set_ranges`` can use any of these
    methods, or "max". The arguments and errors are those of ``calibrate``.
    """
    make = calibrator_factory(method)
    if not isinstance(model, nn.Module):
        raise UserError(f"the model comes first, then the data; the first argument is a {type(model).__name__}.")
    places = dict(quantizers(model))
    if not places:
        raise UserError("the model has no quantizers to calibrate; call quantize(model) first.")
    weights = _weights(model)
    shared = SeenTensors()
    calibrators = {name: make() for name in places if name not in weights}
    for calibrator in calibrators.values():
        calibrator.share_histograms(shared)
    before = {name: (quantizer.enabled, quantizer.observer) for name, quantizer in places.items()}

    def after_batch(examples: int) -> None:
        shared.clear()
        if progress is not None:
            progress(examples)

    try:
        for name, quantizer in places.items():
            quantizer.enabled = False
            quantizer.observer = calibrators.get(name)
        track_outputs(model, batches, after_batch, key=key)
    finally:
        for name, quantizer in places.items():
            quantizer.enabled, quantizer.observer = before[name]
    return {name: _of_all_ranks(calibrator, make, device_of(model)) for name, calibrator in calibrators.items()}


def set_ranges(
    model: nn.Module,
    collected: Mapping[str, Calibrator],
    method: Method = DEFAULT_METHOD,
    percentile: float | None = None,
) -> None:
    """Give every quantizer of ``model`` the range that ``method`` chooses from the result of ``collect``.

    Raises:
        UserError: an unknown method, or a quantizer that saw nothing, NaN or infinity; no range is changed.
        ValueError: ``collected`` lacks what the method needs, e.g. histograms.
    """
    make = calibrator_factory(method, percentile)
    places, weights = dict(quantizers(model)), _weights(model)
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    for name, quantizer in places.items():
        calibrator = make()
        if name in weights:
            weight = weights[name].detach().float()
            if not bool(torch.isfinite(weight).all()):
                layer = name.removesuffix("._weight_quantizer")
                raise UserError(f"the weights of {layer} hold NaN or infinite values; check the weights file.")
            ranges[name] = calibrator.weight_range(weight, quantizer.spec)
        else:
            calibrator.adopt(collected[name])
            _check_seen(name, calibrator.seen)
            low, high = calibrator.range(quantizer.spec)
            ranges[name] = torch.tensor(low), torch.tensor(high)
    for name, (amin, amax) in ranges.items():
        places[name].set_range(amin, amax)


def track_outputs(
    model: nn.Module, batches: Data, progress: Callable[[int], None] | None = None, *, key: Key = None
) -> None:
    """Find the ranges of the output quantizers again in one pass over ``batches``; other ranges stay.

    ``calibrate`` does this too. Call it alone after training has changed the weights. The model runs in eval mode and
    returns to its old mode.

    Args:
        model, batches, progress, key: as ``calibrate`` takes them.

    Raises:
        UserError: there are no images, or a batch that the model can't run.
    """
    trackers = list(output_quantizers(model))
    device = device_of(model)
    try:
        for tracker in trackers:
            tracker.start_tracking()
        with eager_pass(model):
            total = run_on(model, batches, key=key, progress=progress)
    finally:
        for tracker in trackers:
            tracker.stop_tracking()
    if total_over_ranks(total, device) == 0:
        raise UserError(
            "there are no images to calibrate with: the data holds no batches, a generator was used up before, or the "
            "function never called the model."
        )
    for tracker in trackers:
        if reduce_extremes(tracker._low, tracker._high):
            tracker.stop_tracking()  # a process without images gets its range only now


def _of_all_ranks(own: Calibrator, make: Callable[[], Calibrator], device: torch.device) -> Calibrator:
    """A calibrator that joins those of all processes, in the order of the ranks; without a group, ``own``."""
    states = gathered(own.state(), device)
    if len(states) == 1:
        return own
    joined = make()
    for state in states:
        joined.merge(state)
    return joined


def _check_seen(name: str, seen: tuple[float, float]) -> None:
    """Raises UserError if no finite range holds the smallest and largest value that the quantizer ``name`` saw."""
    if seen == (math.inf, -math.inf):
        layer = name.rpartition(".")[0] or name
        raise UserError(
            f"{name} was never reached in calibration; give data for which the model runs this layer, or leave it in float "
            f"with the override '{layer}': 'float'."
        )
    if not all(map(math.isfinite, seen)):
        raise UserError(
            f"{name} saw NaN or infinite values in calibration; check the weights, and how the images are normalised."
        )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The float weights by the name of their quantizer."""
    return {
        f"{name}._weight_quantizer": float_weight(module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "_weight_quantizer", None), TensorQuantizer)
    }
