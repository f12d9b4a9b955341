"""Walks a model and places quantizers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from effnet_quant.errors import UserError
from effnet_quant.models.layers import OutputPoint, QuantPoint
from effnet_quant.quantization.modules import QuantAdaptiveAvgPool2d, QuantConv2d, QuantLinear
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.range_tracker import RangeTracker
from effnet_quant.quantization.spec import QuantSpec, resolve_spec


def quantize(model: nn.Module, spec: str | QuantSpec = "w8a8") -> nn.Module:
    """Place quantizers in ``model``, in place: on the inputs and weights of convolutions and linear layers, on the inputs
    of average pooling and on every QuantPoint. OutputPoints get range trackers, for the engines that need them.

    The quantizers start without ranges, and a network without ranges computes what the float network does; ``calibrate``
    or loaded weights give it ranges. Parameters are shared with the float model and keep their names.

    Args:
        model: any module made of Conv2d, Linear, AdaptiveAvgPool2d and QuantPoint modules; others stay in float.
        spec: a preset's name or a QuantSpec.

    Returns:
        The same model.

    Raises:
        UserError: unknown preset, a model that is quantized already, or one with nothing to quantize.
    """
    resolved = resolve_spec(spec)
    if any(True for _ in quantizers(model)):
        raise UserError("the model is quantized already; create a float model to quantize it another way.")
    _place(model, resolved)
    if not any(True for _ in quantizers(model)):
        raise UserError("the model has no convolution, linear layer or pooling that could be quantized.")
    return model


def quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Every quantizer of the model with its name, in the order of the definition."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            yield name, module


def _place(module: nn.Module, spec: QuantSpec) -> None:
    for name, child in module.named_children():
        if isinstance(child, QuantPoint):
            twin: nn.Module = TensorQuantizer(spec.activation)
        elif isinstance(child, OutputPoint):
            twin = RangeTracker()
        elif type(child) is nn.Conv2d:
            twin = QuantConv2d.from_float(child, spec)
        elif type(child) is nn.Linear:
            twin = QuantLinear.from_float(child, spec)
        elif type(child) is nn.AdaptiveAvgPool2d:
            twin = QuantAdaptiveAvgPool2d.from_float(child, spec)
        else:
            _place(child, spec)
            continue
        setattr(module, name, twin)
