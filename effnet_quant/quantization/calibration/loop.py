"""The loop that runs data through a model and gives every quantizer its range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from effnet_quant.errors import UserError
from effnet_quant.quantization.calibration.histogram import SeenTensors
from effnet_quant.quantization.calibration.methods import (
    CalibrationObserver,
    check_method,
    choose_range,
    observer_for,
)
from effnet_quant.quantization.calibration.mse import extremes, mse_weight_ranges
from effnet_quant.quantization.calibration.process_group import merge_ranks, merge_tracked_ranges, total_over_ranks
from effnet_quant.quantization.eager_evaluation import eager_pass
from effnet_quant.quantization.placement.insertion import output_quantizers, quantizers
from effnet_quant.quantization.quantized_layers import float_weight
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.spec import TensorSpec


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor],
    method: str = "percentile",
    percentile: float = 99.99,
    progress: Callable[[int], None] | None = None,
) -> nn.Module:
    """Choose the range of every quantizer of ``model``, in place, in one pass over ``batches``.

    Activations get their range by ``method`` from what the float network puts in them; docs/quantization.md says which
    suits what. Weights of 8 bits or more get the range that holds all values (per output channel), narrower ones the one
    with the smallest squared error; "lsq" gives symmetric weights LSQ's. The model runs in eval mode and is returned to
    the mode it was in.

    In a process group every process brings its share of the images, and all get the ranges of the whole.

    Args:
        model: a model that ``quantize`` has been through.
        batches: float images (N, C, H, W) as the model takes them, on any device.
        method: "max", "percentile", "entropy", "mse", "moving-average" or "lsq".
        percentile: 0 < percentile <= 100, for the method "percentile".
        progress: called with the number of images after each batch.

    Returns:
        The same model, its quantizers switched on.

    Raises:
        UserError: no quantizers, no images, an unknown method, or a quantizer that saw nothing, NaN or infinity.
    """
    check_method(method, percentile)
    set_ranges(model, collect(model, batches, method, progress), method, percentile)
    return model


def collect(
    model: nn.Module,
    batches: Iterable[Tensor],
    method: str = "mse",
    progress: Callable[[int], None] | None = None,
) -> dict[str, CalibrationObserver]:
    """What the activation quantizers of ``model`` see in one pass over ``batches``, by name, with all of them off.

    What is collected for a method that needs histograms ("percentile", "entropy", "mse", "lsq") serves ``set_ranges`` for
    all of these and for "max". The arguments and errors are those of ``calibrate``.
    """
    places = dict(quantizers(model))
    if not places:
        raise UserError("the model has no quantizers to calibrate; call quantize(model) first.")
    weights = _weights(model)
    shared = SeenTensors()
    observers = {name: observer_for(method, shared) for name in places if name not in weights}
    before = {name: (quantizer.enabled, quantizer.observer) for name, quantizer in places.items()}

    def after_batch(images: int) -> None:
        shared.clear()
        if progress is not None:
            progress(images)

    try:
        for name, quantizer in places.items():
            quantizer.enabled = False
            quantizer.observer = observers.get(name)
        track_outputs(model, batches, after_batch)
    finally:
        for name, quantizer in places.items():
            quantizer.enabled, quantizer.observer = before[name]
    merge_ranks(list(observers.values()), next(model.parameters()).device)
    return observers


def set_ranges(
    model: nn.Module,
    observers: Mapping[str, CalibrationObserver],
    method: str = "percentile",
    percentile: float = 99.99,
) -> None:
    """Give every quantizer of ``model`` the range that ``method`` chooses from what ``collect`` found.

    Raises:
        UserError: an unknown method, or a quantizer that saw nothing, NaN or infinity; no range is changed.
    """
    check_method(method, percentile)
    places, weights = dict(quantizers(model)), _weights(model)
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    for name, quantizer in places.items():
        if name in weights:
            weight = weights[name].detach().float()
            finite = bool(torch.isfinite(weight).all())
        else:
            finite = all(map(math.isfinite, observers[name].seen))
        if not finite:
            raise UserError(
                f"calibration found no finite range for {name}, which saw NaN, infinite values or nothing at all; "
                "check the weights and the calibration images."
            )
        if name in weights:
            ranges[name] = _weight_range(weight, quantizer.spec, method)
        else:
            low, high = choose_range(observers[name], quantizer.spec, method, percentile)
            ranges[name] = torch.tensor(low), torch.tensor(high)
    for name, (amin, amax) in ranges.items():
        places[name].set_range(amin, amax)


def track_outputs(model: nn.Module, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None) -> None:
    """Renew the ranges of convolution outputs in one pass over ``batches``; other ranges stay.

    ``calibrate`` does this too; after training has moved the weights, this alone brings these ranges up to date. The
    model runs in eval mode and is returned to the mode it was in.

    Raises:
        UserError: there are no images.
    """
    trackers = list(output_quantizers(model))
    device = next(model.parameters()).device
    images = 0
    try:
        for tracker in trackers:
            tracker.start_tracking()
        with eager_pass(model):
            for batch in batches:
                model(batch.to(device))
                images += len(batch)
                if progress is not None:
                    progress(len(batch))
    finally:
        for tracker in trackers:
            tracker.stop_tracking()
    if total_over_ranks(images, device) == 0:
        raise UserError("there are no images to calibrate with.")
    merge_tracked_ranges(trackers)


def _weight_range(weight: Tensor, spec: TensorSpec, method: str) -> tuple[Tensor, Tensor]:
    if method == "lsq" and spec.symmetric:
        others = list(range(weight.dim()))[spec.per_channel :]
        mean = weight.abs().mean(dim=others, keepdim=spec.per_channel)
        amax = 2 * mean * math.sqrt(spec.bounds[1])
        return -amax, amax
    return extremes(weight, spec) if spec.bits >= 8 and method != "mse" else mse_weight_ranges(weight, spec)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The float weights by the name of their quantizer."""
    return {
        f"{name}._weight_quantizer": float_weight(module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "_weight_quantizer", None), TensorQuantizer)
    }
