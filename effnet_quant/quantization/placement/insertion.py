"""Walks a model and places quantizers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from effnet_quant.errors import UserError
from effnet_quant.models.layers import OutputPoint, QuantPoint
from effnet_quant.quantization.biases import FoldedBatchNorm2d, note_batch_norms
from effnet_quant.quantization.eager_evaluation import eager_pass
from effnet_quant.quantization.output_quantizer import OutputQuantizer
from effnet_quant.quantization.placement.between_modules import place_between_modules
from effnet_quant.quantization.placement.nonnegative import never_negative
from effnet_quant.quantization.placement.symbolic_trace import replace_forward, trace_operations
from effnet_quant.quantization.quantized_layers import (
    QuantAdaptiveAvgPool2d,
    QuantAvgPool2d,
    QuantConv2d,
    QuantGate,
    QuantLinear,
    QuantSubclass,
    float_weight,
    quant_gate,
)
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.spec import QuantSpec, resolve_spec
from effnet_quant.quantization.targets import Target, get_target


def quantize(
    model: nn.Module, spec: str | QuantSpec | Mapping[str, Any] = "w8a8", *, target: str = "onnxruntime"
) -> nn.Module:
    """Place quantizers in ``model``, in place: on the inputs and weights of convolutions and linear layers, on the inputs
    of average pooling and on every QuantPoint. Every OutputPoint gets an OutputQuantizer. All targets' quantizers are
    placed, so that the same weights serve every target; those round that ``target`` wants (``simulate_target``).

    A model without such marks is traced (torch.fx), and the same places are found in its graph: the shortcut of an
    addition, both operands of a product, the inputs of a concatenation (with one range) and of functional pooling. It
    then computes the traced graph, so Python branches on ``self.training`` outside of modules are fixed. A warning names
    what could not be traced.

    The quantizers start without ranges, and a network without ranges computes what the float network does; ``calibrate``
    or loaded weights give it ranges. Parameters are shared with the float model and keep their names.

    Args:
        model: any module with Conv2d, Linear or average pooling modules.
        spec: a preset's name, a QuantSpec, or a mapping as ``resolve_spec`` takes it.
        target: the runtime to simulate, "onnxruntime", "openvino" or "tensorrt"; ``export_onnx`` takes the same name.

    Returns:
        The same model.

    Raises:
        UserError: unknown preset or target, a model that is quantized already, one with nothing to quantize, or an
            override that matches nothing.
    """
    resolved, rules = resolve_spec(spec), get_target(target)
    if any(True for _ in quantizers(model)):
        raise UserError("the model is quantized already; create a float model to quantize it another way.")
    marked = any(isinstance(module, (QuantPoint, OutputPoint)) for module in model.modules())
    placing = _Placing(resolved, next((parameter.device for parameter in model.parameters()), torch.device("cpu")))
    placing.place(model)
    if not any(True for _ in quantizers(model)):
        raise UserError("the model has no convolution, linear layer or pooling that could be quantized.")
    if not marked:
        placing.layers |= _place_on_graph(model, resolved)
    _apply_overrides(model, resolved, placing.layers)
    with eager_pass(model):  # as engines see it
        graph, opaque = trace_operations(model)
    if graph is not None:
        for quantizer in never_negative(model, graph, opaque):
            quantizer.never_negative = True
        note_batch_norms(model, graph)
    return simulate_target(model, rules)


def _place_on_graph(model: nn.Module, spec: QuantSpec) -> dict[OutputQuantizer, nn.Module]:
    graph, opaque = trace_operations(model)
    if graph is None:
        warnings.warn(
            f"{type(model).__name__} can't be traced: its convolutions, linear and pooling layers are quantized, the "
            "additions, products and concatenations between them stay in float.",
            stacklevel=3,
        )
        return {}
    if opaque:
        warnings.warn(
            f"{', '.join(opaque)} can't be traced: the layers inside are quantized, the operations between them there "
            "stay in float.",
            stacklevel=3,
        )
    layers = place_between_modules(model, graph, spec)
    replace_forward(model, graph)
    return layers


def quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Every quantizer of the model with its name, in the order of the definition."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            yield name, module


def output_quantizers(model: nn.Module) -> Iterator[OutputQuantizer]:
    """Every OutputQuantizer of the model."""
    return (module for module in model.modules() if isinstance(module, OutputQuantizer))


def _apply_overrides(model: nn.Module, spec: QuantSpec, layers: Mapping[OutputQuantizer, nn.Module]) -> None:
    """Exchange the quantizers that ``spec.overrides`` speaks of, for others or for nothing. Where input or weights are wider
    than 8 bits there is no integer convolution, so no rounding of its output either."""
    places = dict(quantizers(model))
    unmatched = spec.unmatched(list(places))
    if unmatched:
        raise UserError(f"the override '{unmatched[0]}' matches no quantizer of the model; check the name.")
    for name, quantizer in places.items():
        override = spec.override(name)
        if override == "base":
            continue
        if override is None:
            model.set_submodule(name, nn.Identity())
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if quantizer.weights:
            weight = float_weight(owner)
            amax_shape = override.weight.amax_shape(tuple(weight.shape))
            twin = TensorQuantizer(override.weight, amax_shape, quantizer.operation, weights=True).to(weight.device)
        else:
            twin = TensorQuantizer(override.activation, operation=quantizer.operation).to(quantizer.amax.device)
        model.set_submodule(name, twin)
    for name, module in list(model.named_modules()):
        if isinstance(module, OutputQuantizer) and (spec.override(name) is None or not _is_integer(layers[module])):
            model.set_submodule(name, nn.Identity())


def _is_integer(layer: nn.Module) -> bool:
    """Whether both operands of a quantized layer have 8 bits or less."""
    operands = (layer._input_quantizer, layer._weight_quantizer)
    return all(isinstance(operand, TensorQuantizer) and operand.spec.bits <= 8 for operand in operands)


class _Placing:
    """Exchanges the modules of a model for their quantized twins.

    Attributes:
        layers: the layer whose output an OutputQuantizer rounds: the one before it in the order of the definition.
    """

    def __init__(self, spec: QuantSpec, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._twins: dict[nn.Module, nn.Module] = {}  # exchanged already, for layers that several modules share
        self._layer: nn.Module | None = None
        self.layers: dict[OutputQuantizer, nn.Module] = {}

    def place(self, module: nn.Module) -> None:
        """Exchange the children of ``module``, and theirs."""
        spec = self._spec
        before: nn.Module | None = None
        for name, child in list(module._modules.items()):
            if child is None or hasattr(child, "_weight_quantizer"):
                continue
            if child in self._twins:
                before = self._twins[child]
                setattr(module, name, before)
                continue
            if isinstance(child, QuantPoint):
                setattr(module, name, TensorQuantizer(spec.activation, operation=child.operation).to(self._device))
            elif isinstance(child, OutputPoint):
                rounding = OutputQuantizer(child.operation).train(child.training).to(self._device)
                assert self._layer is not None
                self.layers[rounding] = self._layer
                setattr(module, name, rounding)
            elif isinstance(before, OutputQuantizer) and (twin := quant_gate(child, before)) is not None:
                setattr(module, name, twin)
            elif type(child) is nn.Conv2d:
                self._twins[child] = self._layer = QuantConv2d.from_float(child, spec)
                setattr(module, name, self._layer)
            elif type(child) is nn.Linear:
                self._twins[child] = self._layer = QuantLinear.from_float(child, spec)
                setattr(module, name, self._layer)
            elif type(child) is nn.AdaptiveAvgPool2d:
                setattr(module, name, QuantAdaptiveAvgPool2d.from_float(child, spec).to(self._device))
            elif type(child) is nn.AvgPool2d:
                setattr(module, name, QuantAvgPool2d.from_float(child, spec).to(self._device))
            elif isinstance(child, (nn.Conv2d, nn.Linear)):
                QuantSubclass.convert(child, spec)
                self._layer = child
            else:
                self.place(child)
            before = getattr(module, name)


def simulate_target(model: nn.Module, target: str | Target) -> nn.Module:
    """Let a quantized model round where the engine of ``target`` (a name, or rules) does; in place, returns the model.

    Raises:
        UserError: there is no such target.
    """
    rules = get_target(target)
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module.simulate(quantized=module.operation in rules.quantized, unsigned=rules.unsigned)
        elif isinstance(module, OutputQuantizer):
            module.simulated = rules.quantized_outputs and module.operation in rules.quantized
        elif isinstance(module, QuantGate):
            module.simulated = "silu" in rules.quantized
        elif isinstance(module, (QuantConv2d, QuantLinear, FoldedBatchNorm2d)):
            module.rounds_bias = rules.quantized_bias
    return model
