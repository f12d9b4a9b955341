"""Quantized twins of convolution, linear and pooling layers and of activations with a gate.

Quantizers are children called ``_input_quantizer`` and ``_weight_quantizer``, as in NVIDIA's pytorch-quantization, so state
dicts are exchangeable. Elementwise operations have no twin. A QuantPoint marks their operands (``mul_a_quantizer``,
``mul_b_quantizer``, ``residual_quantizer``), and a TensorQuantizer replaces it.
"""

from __future__ import annotations

import copy
import types
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from effnet_quant.errors import UserError
from effnet_quant.quantization.biases import layer_bias
from effnet_quant.quantization.quantizer import AFFINE_UINT8, TensorQuantizer
from effnet_quant.quantization.spec import SpecLookup
from effnet_quant.quantization.targets import FollowsTarget, Target

IMAGE_CHANNELS = 4  # a convolution with at most this many input channels is the stem


class QuantConv2d(FollowsTarget, nn.Conv2d):
    """Conv2d with quantized input and weights; the output stays float.

    Attributes:
        bias_is_folded: whether engines fold the bias into that of the BatchNorm after it.
        rounds_bias: whether the simulated engine rounds biases to integers, in eval mode.
    """

    bias_is_folded = False
    rounds_bias = False
    _input_quantizer: nn.Module
    _weight_quantizer: nn.Module

    @staticmethod
    def from_float(conv: nn.Conv2d, spec: SpecLookup, name: str) -> QuantConv2d:
        """The twin of ``conv``, which shares its parameters. ``name`` is its name in the model."""
        twin = QuantConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        _adopt_weight(twin, conv, spec, name)
        return twin

    def follow(self, target: Target) -> None:
        """Round the bias if the engine of ``target`` does."""
        self.rounds_bias = target.quantized_bias

    def forward(self, input: Tensor) -> Tensor:
        input, weight = self._input_quantizer(input), self._weight_quantizer(self.weight)
        pointwise = self.kernel_size == (1, 1) and self.groups == 1 and not any(self.padding)
        if self.training and pointwise and input.shape[2:] == (1, 1):
            # Squeeze-and-excitation: linear takes half the time or less. Eval mode keeps the convolution's order of sums.
            return F.linear(input.flatten(1), weight.flatten(1), self.bias)[:, :, None, None]
        rounds = self.rounds_bias and not self.bias_is_folded and not self.training
        return self._conv_forward(input, weight, layer_bias(self) if rounds else self.bias)


class MadeHere:
    """Base class of classes that are made at run time. Python can copy their objects, but not pickle them."""

    def __copy__(self) -> Any:
        return self._blank(dict(self.__dict__))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = self._blank({})
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _blank(self, state: dict[str, Any]) -> Any:
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(state)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UserError(
            "a quantized model can't be pickled, because its forward was made by quantize; write it with "
            "effnet_quant.save(model, path), or write model.state_dict()."
        )


class QuantSubclass(MadeHere, nn.Module):
    """Base class put before a subclass of Conv2d or Linear that has its own forward, e.g. timm's standardised convolutions.

    It quantizes the input, and the weights that the forward passes to the convolution or linear function.
    """

    _input_quantizer: nn.Module
    _weight_quantizer: nn.Module

    @staticmethod
    def convert(layer: nn.Conv2d | nn.Linear, spec: SpecLookup, name: str) -> None:
        """Turn ``layer`` into its twin, in place. ``name`` is its name in the model."""
        own = layer.__class__
        layer.__class__ = types.new_class(f"Quant{own.__name__}", (QuantSubclass, own))
        _add_quantizers(layer, layer.weight, spec, name)

    def forward(self, input: Tensor) -> Tensor:
        with _WeightsThrough(self._weight_quantizer):
            return super().forward(self._input_quantizer(input))

    def weight_in_use(self) -> Tensor:
        """The weights passed to the convolution or linear function: the parameter, or e.g. standardised weights."""
        seen: list[Tensor] = []

        def note(used: Tensor) -> Tensor:
            seen.append(used)
            return used

        weight = self._parameters["weight"]
        assert weight is not None
        shape = (1, self.in_channels, *weight.shape[2:]) if isinstance(self, nn.Conv2d) else (1, weight.shape[1])
        with _WeightsThrough(note), torch.no_grad():
            super().forward(weight.new_zeros(shape))
        return seen[0]


class _WeightsThrough(TorchFunctionMode):
    """Applies ``function`` to the weights in every call of F.conv2d and F.linear."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, F.linear):
            args = (args[0], self._function(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


class QuantLinear(FollowsTarget, nn.Linear):
    """Linear with quantized input and weights; the output stays float.

    Attributes:
        rounds_bias: whether the simulated engine rounds biases to integers, in eval mode.
    """

    rounds_bias = False
    _input_quantizer: nn.Module
    _weight_quantizer: nn.Module

    @staticmethod
    def from_float(linear: nn.Linear, spec: SpecLookup, name: str) -> QuantLinear:
        """The twin of ``linear``, which shares its parameters. ``name`` is its name in the model."""
        twin = QuantLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        _adopt_weight(twin, linear, spec, name)
        return twin

    def follow(self, target: Target) -> None:
        """Round the bias if the engine of ``target`` does."""
        self.rounds_bias = target.quantized_bias

    def forward(self, input: Tensor) -> Tensor:
        rounds = self.rounds_bias and not self.training and input.dim() == 2  # engines add a sequence's bias in float
        bias = layer_bias(self) if rounds else self.bias
        return F.linear(self._input_quantizer(input), self._weight_quantizer(self.weight), bias)


class QuantGate(nn.Module):
    """x * gate(x), with a gate between 0 and 1. Where x is rounded, the gate is rounded to multiples of 1/255.

    Engines then compute the gate from integers: SiLU's in a table of 256 entries, hard-swish's by a saturating sum.

    Args:
        input: the quantizer of x; it stays at its place in the model.
        inplace: overwrite the input where the gate is not rounded.

    Attributes:
        activation: the class of the float activation.
        gate_quantizer: rounds the gate.
    """

    activation: ClassVar[type[nn.Module]]

    def __init__(self, input: TensorQuantizer, inplace: bool = False) -> None:
        super().__init__(inplace)  # the activation's
        self._input = (input,)  # in a tuple, so that it does not become a child
        self.gate_quantizer = TensorQuantizer(AFFINE_UINT8, operation="silu", role="gate")

    @property
    def rounds(self) -> bool:
        """Whether the gate is rounded now."""
        return self._input[0].rounds and self.gate_quantizer.rounds

    @abstractmethod
    def gate(self, x: Tensor) -> Tensor:
        """The gate of x, in 0 … 1 and in the shape of x."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate_quantizer(self.gate(x)) if self.rounds else super().forward(x)


class QuantSiLU(QuantGate, nn.SiLU):
    """SiLU, x * sigmoid(x)."""

    activation = nn.SiLU

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.compiler.is_compiling() and not self.rounds:
            # The next quantizer needs the result again in the backward pass. In this form result and gradient share one
            # sigmoid there; F.silu would cost a second exponential.
            return x * torch.sigmoid(x)
        return super().forward(x)


class QuantHardswish(QuantGate, nn.Hardswish):
    """Hard-swish, x * clamp(x / 6 + 1 / 2, 0, 1)."""

    activation = nn.Hardswish

    def gate(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(x)


_GATES: dict[type, type[QuantGate]] = {twin.activation: twin for twin in (QuantSiLU, QuantHardswish)}


def quant_gate(activation: nn.Module | None, input: TensorQuantizer) -> QuantGate | None:
    """The twin of an activation that follows the quantizer ``input``; None for other modules."""
    twin = _GATES.get(type(activation))
    if twin is None:
        return None
    gate = twin(input, bool(activation.inplace))  # type: ignore[union-attr]
    return gate.train(input.training).to(input.amax.device)


def layer_operation(layer: nn.Module) -> str:
    """The name in the targets' OPERATIONS of a convolution or linear layer."""
    if not isinstance(layer, nn.Conv2d):
        return "linear"
    if layer.in_channels <= IMAGE_CHANNELS:
        return "stem"
    return "depthwise" if layer.groups == layer.in_channels else "conv"


class QuantAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """AdaptiveAvgPool2d with quantized input."""

    _input_quantizer: nn.Module

    @staticmethod
    def from_float(pooling: nn.AdaptiveAvgPool2d, spec: SpecLookup, name: str) -> QuantAdaptiveAvgPool2d:
        """The twin of ``pooling``. ``name`` is its name in the model."""
        twin = QuantAdaptiveAvgPool2d(pooling.output_size)
        twin._input_quantizer = input_quantizer(spec, f"{name}._input_quantizer", "pool")
        return twin

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self._input_quantizer(input))


class QuantAvgPool2d(nn.AvgPool2d):
    """AvgPool2d with quantized input."""

    _input_quantizer: nn.Module

    @staticmethod
    def from_float(pooling: nn.AvgPool2d, spec: SpecLookup, name: str) -> QuantAvgPool2d:
        """The twin of ``pooling``. ``name`` is its name in the model."""
        twin = QuantAvgPool2d(
            pooling.kernel_size,
            pooling.stride,
            pooling.padding,
            pooling.ceil_mode,
            pooling.count_include_pad,
            pooling.divisor_override,
        )
        twin._input_quantizer = input_quantizer(spec, f"{name}._input_quantizer", "pool")
        return twin

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self._input_quantizer(input))


def float_weight(layer: nn.Module) -> Tensor:
    """The float weights that go into the layer's weight quantizer."""
    if isinstance(layer, QuantSubclass):
        return layer.weight_in_use()
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def input_quantizer(spec: SpecLookup, name: str, operation: str) -> nn.Module:
    """The module for the place ``name``, before ``operation``: a quantizer, or the identity where ``spec`` says float."""
    own = spec.at(name)
    return nn.Identity() if own is None else TensorQuantizer(own.activation, operation=operation)


def output_quantizer(spec: SpecLookup, name: str, layer: nn.Module) -> nn.Module:
    """The module for the place ``name``, after ``layer``: an output quantizer or the identity.

    The identity where ``spec`` says float, or where input or weights of the layer are not quantized to 8 bits or less.
    No engine writes 8-bit integers there.
    """
    operands = [getattr(layer, f"_{operand}_quantizer", None) for operand in ("input", "weight")]
    integer = all(isinstance(operand, TensorQuantizer) and operand.spec.bits <= 8 for operand in operands)
    if spec.at(name) is None or not integer:
        return nn.Identity()
    return TensorQuantizer(AFFINE_UINT8, operation=layer_operation(layer), role="output")


def _adopt_weight(twin: QuantConv2d | QuantLinear, layer: nn.Conv2d | nn.Linear, spec: SpecLookup, name: str) -> None:
    twin.weight, twin.bias = layer.weight, layer.bias
    twin.training = layer.training
    _add_quantizers(twin, layer.weight, spec, name)


def _add_quantizers(layer: nn.Module, weight: Tensor, spec: SpecLookup, name: str) -> None:
    operation, at_weight = layer_operation(layer), spec.at(f"{name}._weight_quantizer")
    layer._input_quantizer = input_quantizer(spec, f"{name}._input_quantizer", operation).to(weight.device)
    if at_weight is None:
        layer._weight_quantizer = nn.Identity()
        return
    shape = at_weight.weight.amax_shape(tuple(weight.shape))
    layer._weight_quantizer = TensorQuantizer(at_weight.weight, shape, operation, role="weight").to(weight.device)
