"""The loop that runs data through a model and gives every quantizer its range."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from effnet_quant.errors import UserError
from effnet_quant.quantization.calibration.maximum import MaxObserver
from effnet_quant.quantization.calibration.percentile import PercentileObserver
from effnet_quant.quantization.insertion import quantizers
from effnet_quant.quantization.modules import float_weight
from effnet_quant.quantization.output_quantizer import OutputQuantizer
from effnet_quant.quantization.quantizer import TensorQuantizer

METHODS = ("max", "percentile")


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor],
    method: str = "percentile",
    percentile: float = 99.99,
    progress: Callable[[int], None] | None = None,
) -> nn.Module:
    """Choose the range of every quantizer of ``model``, in place, in one pass over ``batches``.

    Weights get the largest magnitude per output channel. Activations get the largest magnitude seen ("max") or the one
    below which ``percentile`` percent of the magnitudes lie ("percentile"), with all quantizers off: each sees its float
    input. The model runs in eval mode and is returned to the mode it was in.

    Args:
        model: a model that ``quantize`` has been through.
        batches: float images (N, C, H, W) as the model takes them, on any device.
        method: "max" or "percentile".
        percentile: 0 < percentile <= 100, for the method "percentile".
        progress: called with the number of images after each batch.

    Returns:
        The same model, its quantizers switched on.

    Raises:
        UserError: no quantizers, no images, an unknown method, or a quantizer that saw nothing, NaN or infinity.
    """
    if method not in METHODS:
        raise UserError(f"there is no calibration method '{method}'; choose one of: {', '.join(METHODS)}.")
    if not 0 < percentile <= 100:
        raise UserError(f"the percentile must be above 0 and at most 100, not {percentile}.")
    places = dict(quantizers(model))
    if not places:
        raise UserError("the model has no quantizers to calibrate; call quantize(model) first.")
    weights = _weights(model)
    observers = {
        name: MaxObserver() if method == "max" else PercentileObserver(percentile)
        for name in places
        if name not in weights
    }
    enabled = {name: quantizer.enabled for name, quantizer in places.items()}
    try:
        for name, quantizer in places.items():
            quantizer.enabled = False
            quantizer.observer = observers.get(name)
        track_outputs(model, batches, progress)
    finally:
        for name, quantizer in places.items():
            quantizer.enabled = enabled[name]
            quantizer.observer = None

    ranges = {name: observer.amax() for name, observer in observers.items()}
    for name, weight in weights.items():
        others = [dim for dim in range(weight.dim()) if dim != places[name].spec.axis]
        ranges[name] = weight.detach().float().abs().amax(dim=others, keepdim=True)
    for name, amax in ranges.items():
        if not torch.isfinite(amax).all():
            raise UserError(
                f"calibration found no finite range for {name}, which saw NaN, infinite values or nothing at all; "
                "check the weights and the calibration images."
            )
    for name, amax in ranges.items():
        places[name].set_amax(amax)
    return model


@torch.no_grad()
def track_outputs(model: nn.Module, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None) -> None:
    """Renew the ranges of convolution outputs (OutputQuantizer) in one pass over ``batches``; other ranges stay.

    ``calibrate`` does this too; after training has moved the weights, this alone brings these ranges up to date. The
    model runs in eval mode and is returned to the mode it was in.

    Raises:
        UserError: there are no images.
    """
    modes = {module: module.training for module in model.modules()}
    trackers = [module for module in model.modules() if isinstance(module, OutputQuantizer)]
    device = next(model.parameters()).device
    images = 0
    try:
        model.eval()
        for tracker in trackers:
            tracker.start_tracking()
        for batch in batches:
            model(batch.to(device))
            images += len(batch)
            if progress is not None:
                progress(len(batch))
    finally:
        for tracker in trackers:
            tracker.stop_tracking()
        for module, training in modes.items():
            module.training = training
    if images == 0:
        raise UserError("there are no images to calibrate with.")


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The float weights by the name of their quantizer."""
    return {
        f"{name}._weight_quantizer": float_weight(module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "_weight_quantizer", None), TensorQuantizer)
    }
