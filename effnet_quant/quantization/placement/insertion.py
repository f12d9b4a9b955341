"""quantize: places quantizers in a model. simulate_target: chooses the engine that it simulates."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from effnet_quant.errors import UserError
from effnet_quant.models.layers import OutputPoint, QuantPoint
from effnet_quant.quantization.biases import note_batch_norms
from effnet_quant.quantization.eager_evaluation import eager_pass
from effnet_quant.quantization.placement.between_modules import place_between_modules
from effnet_quant.quantization.placement.gates import place_gates
from effnet_quant.quantization.placement.nonnegative import never_negative
from effnet_quant.quantization.placement.summary import refused_by_export
from effnet_quant.quantization.placement.symbolic_trace import replace_forward, trace_operations
from effnet_quant.quantization.quantized_layers import (
    QuantAdaptiveAvgPool2d,
    QuantAvgPool2d,
    QuantConv2d,
    QuantLinear,
    QuantSubclass,
    input_quantizer,
    output_quantizer,
)
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.spec import QuantSpec, SpecLookup, resolve_spec
from effnet_quant.quantization.targets import FollowsTarget, Target, get_target


@dataclass(frozen=True)
class Placed:
    """What ``quantize`` was asked for, and the runtime that the model simulates now."""

    spec: QuantSpec
    target: Target


def placement_of(model: nn.Module) -> Placed | None:
    """How ``quantize`` has quantized ``model``; None for a float model."""
    placed = getattr(model, "_quantization", None)
    return placed if isinstance(placed, Placed) else None


def quantize(
    model: nn.Module, spec: str | QuantSpec | Mapping[str, Any] = "w8a8", *, target: str = "onnxruntime"
) -> nn.Module:
    """Place quantizers in ``model``, in place.

    Quantizers go on inputs and weights of convolutions and linear layers, on inputs of average pooling, and on every
    QuantPoint and OutputPoint. The quantizers of all targets are placed, so the same weights serve every target. Only the
    quantizers that ``target`` needs will round (``simulate_target``).

    A model without QuantPoint or OutputPoint is traced with torch.fx. Then the shortcut of an addition, both operands of a
    product, all inputs of a concatenation (with one range) and the input of functional pooling get quantizers too. The
    traced graph becomes the model's forward, so Python branches on ``self.training`` outside of modules are fixed. A warning
    names the modules that can't be traced.

    The quantizers have no ranges yet, and the network computes what the float network does. ``calibrate`` or loaded weights
    give it ranges. Parameters are shared with the float model and keep their names. ``summarize`` says what stays in float.
    nn.MultiheadAttention does, inside and out. A warning names layers that ``export_onnx`` refuses.

    Args:
        model: any module with Conv2d, Linear or average pooling modules.
        spec: a preset's name, a QuantSpec, or a mapping as ``resolve_spec`` takes it.
        target: the runtime to simulate, "onnxruntime", "openvino", "executorch" or "tensorrt"; exports take the same name.

    Returns:
        The same model.

    Raises:
        UserError: unknown preset or target, a model that is quantized already or has nothing to quantize, or an override
            that matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"quantize takes a model, not a {type(model).__name__}; give an nn.Module.")
    lookup, rules = SpecLookup(resolve_spec(spec)), get_target(target)
    if any(True for _ in quantizers(model)):
        raise UserError("the model is quantized already; create a float model to quantize it another way.")
    marked = any(isinstance(module, (QuantPoint, OutputPoint)) for module in model.modules())
    _Placing(lookup, next((parameter.device for parameter in model.parameters()), torch.device("cpu"))).place(model)
    if not lookup.names:
        raise UserError("the model has no convolution, linear layer or pooling that could be quantized.")
    if not marked:
        _place_on_graph(model, lookup)
    lookup.check_overrides()
    if refused := refused_by_export(model):
        listed = ", ".join(f"{name} ({kind})" for name, kind in refused[:3])
        warnings.warn(
            f"export_onnx will refuse this model, because ONNX files can't hold {listed}; export the part without it.",
            stacklevel=2,
        )
    with eager_pass(model):  # as engines see it
        graph, opaque = trace_operations(model)
    if graph is not None:
        place_gates(model, graph, rewrite=False)
        for quantizer in never_negative(model, graph, opaque):
            quantizer.never_negative = True
        note_batch_norms(model, graph)
    model._quantization = Placed(resolve_spec(spec), rules)  # type: ignore[assignment]
    return simulate_target(model, rules)


def _place_on_graph(model: nn.Module, spec: SpecLookup) -> None:
    graph, opaque = trace_operations(model)
    if graph is None:
        warnings.warn(
            f"{type(model).__name__} can't be traced: its convolutions, linear and pooling layers are quantized, the "
            "additions, products and concatenations between them stay in float. If its Python code decides by the values of "
            "a tensor, export_onnx will refuse it.",
            stacklevel=3,
        )
        return
    if opaque:
        warnings.warn(
            f"{', '.join(opaque)} can't be traced: the layers inside are quantized, the operations between them there "
            "stay in float.",
            stacklevel=3,
        )
    place_between_modules(model, graph, spec)
    replace_forward(model, graph)


def quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Every quantizer of an input or of weights (NVIDIA's placement) with its name, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.role in ("input", "weight"):
            yield name, module


def output_quantizers(model: nn.Module) -> Iterator[TensorQuantizer]:
    """Every output quantizer."""
    for module in model.modules():
        if isinstance(module, TensorQuantizer) and module.role == "output":
            yield module


class _Placing:
    """Replaces a model's layers by their quantized twins, and its marks by quantizers."""

    def __init__(self, spec: SpecLookup, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._twins: dict[nn.Module, nn.Module] = {}  # by layer, because several modules may share one

    def place(self, module: nn.Module, prefix: str = "") -> None:
        """Replace the descendants of ``module``. ``prefix`` starts their names."""
        for name, child in list(module._modules.items()):
            if child is None or hasattr(child, "_weight_quantizer") or isinstance(child, nn.MultiheadAttention):
                continue  # attention's forward reads the weights of its layers, and never calls these
            if isinstance(child, nn.TransformerEncoderLayer):
                child.activation_relu_or_gelu = 0  # else eval mode computes in one operation that calls no layer
            twin = self._twin(child, f"{prefix}{name}")
            if twin is not None:
                setattr(module, name, twin)
            elif isinstance(child, (nn.Conv2d, nn.Linear)):
                QuantSubclass.convert(child, self._spec, f"{prefix}{name}")
            else:
                self.place(child, f"{prefix}{name}.")
        for name, child in list(module._modules.items()):
            if isinstance(child, OutputPoint):
                quantizer = output_quantizer(self._spec, f"{prefix}{name}", module.get_submodule(child.layer))
                setattr(module, name, quantizer.train(child.training).to(self._device))

    def _twin(self, module: nn.Module, name: str) -> nn.Module | None:
        """The module that replaces ``module``; None if it stays."""
        if type(module) in (nn.Conv2d, nn.Linear):
            if module not in self._twins:
                kind = QuantConv2d if type(module) is nn.Conv2d else QuantLinear
                self._twins[module] = kind.from_float(module, self._spec, name)  # type: ignore[arg-type]
            return self._twins[module]
        twin: nn.Module | None = None
        if isinstance(module, QuantPoint):
            twin = input_quantizer(self._spec, name, module.operation)
        elif type(module) is nn.AdaptiveAvgPool2d:
            twin = QuantAdaptiveAvgPool2d.from_float(module, self._spec, name)
        elif type(module) is nn.AvgPool2d:
            twin = QuantAvgPool2d.from_float(module, self._spec, name)
        return None if twin is None else twin.to(self._device)


def simulate_target(model: nn.Module, target: str | Target) -> nn.Module:
    """Make a quantized model round where the engine of ``target`` does, in place. Returns the model.

    Raises:
        UserError: there is no such target.
    """
    rules = get_target(target)
    if (placed := placement_of(model)) is not None:
        model._quantization = replace(placed, target=rules)  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, FollowsTarget):
            module.follow(rules)
    return model
