"""High-bias absorption (Nagel et al. 2019): what every value of a channel exceeds moves into the biases behind."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from effnet_quant.quantization.placement.symbolic_trace import called_module
from effnet_quant.quantization.ptq.batch_norm_folding import is_folded
from effnet_quant.quantization.ptq.streams import Layer, Streams
from effnet_quant.quantization.quantized_layers import QuantConv2d
from effnet_quant.quantization.quantizer import TensorQuantizer


@torch.no_grad()
def absorb_high_biases(model: nn.Module, streams: Streams, lows: Mapping[fx.Node, Tensor]) -> int:
    """Subtract from each channel before a ReLU its smallest value, where that is positive, and add it to what reads it.

    The range of the channel shrinks. The float network stays the same on the examples that showed the smallest values. Only
    channels that layers without padding read are changed: a padded zero would no longer mean what it did.

    Args:
        model: quantized, without ranges.
        streams: of the model.
        lows: the smallest value of each channel, (C,), of nodes before a ReLU.

    Returns:
        The number of channels changed.
    """
    changed = 0
    readers = {layer.source: [] for layer in streams.layers}  # type: dict[fx.Node, list[Layer]]
    for layer in streams.layers:
        readers[layer.source].append(layer)
    for layer in streams.layers:
        own = _bias(layer)
        if (
            layer.result not in streams.rectified
            or len(layer.result.users) != 1
            or own is None
            or layer.result not in lows
        ):
            continue
        behind = _readers_of(model, next(iter(layer.result.users)), readers)
        excess = lows[layer.result].clamp(min=0).to(own)
        if behind is None or not bool(excess.any()) or not all(_takes_shifts(reader) for reader in behind):
            continue
        own.sub_(excess)
        for reader in behind:
            _shift(reader, excess)
        changed += int((excess > 0).sum())
    return changed


def _readers_of(model: nn.Module, node: fx.Node, readers: Mapping[fx.Node, list[Layer]]) -> list[Layer] | None:
    """The layers that read a value, directly or behind quantizers; None if anything else does."""
    found = list(readers.get(node, ()))
    named = {layer.name for layer in found}
    for user in node.users:
        if user.op == "call_module" and str(user.target) in named:
            continue
        module = called_module(model, user)
        inner = _readers_of(model, user, readers) if isinstance(module, (TensorQuantizer, nn.Identity)) else None
        if inner is None:
            return None
        found += inner
    return found


def _bias(layer: Layer) -> Tensor | None:
    """What is added to each output channel last; None without a bias."""
    return layer.module.bias if layer.norm is None else layer.norm.bias


def _takes_shifts(layer: Layer) -> bool:
    padding = layer.module.padding if isinstance(layer.module, QuantConv2d) else (0,)
    return not (isinstance(padding, str) or any(padding)) and _bias(layer) is not None


def _shift(layer: Layer, excess: Tensor) -> None:
    """Make up for inputs from which ``excess`` (input channels,) was subtracted."""
    weight = layer.module.weight
    groups = layer.module.groups if isinstance(layer.module, QuantConv2d) else 1
    per_output = excess.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
    missing = (weight.reshape(*weight.shape[:2], -1).sum(2) * per_output).sum(1)
    if layer.norm is None or is_folded(layer.norm):
        bias = _bias(layer)
        assert bias is not None
        bias.add_(missing)
    else:
        assert layer.norm.running_mean is not None
        layer.norm.running_mean.sub_(missing)
