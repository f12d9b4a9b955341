"""Refines ranges by the squared error of what the layer computes from the rounded tensor, not of the tensor itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.quantization.calibration.weight_ranges import covering_weight_range
from effnet_quant.quantization.eager_evaluation import Batch
from effnet_quant.quantization.ptq.block_walk import Stop, relative_error, walk_blocks
from effnet_quant.quantization.ptq.step import DEFAULT_CONTEXT, StepContext, checked_batches
from effnet_quant.quantization.quantized_layers import float_weight
from effnet_quant.quantization.quantizer import TensorQuantizer

# Candidates as parts of the range that holds all values.
_ACTIVATION_PARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.28, 0.22, 0.17, 0.13, 0.1)
# Around the best of them. Images are on a grid of 256 values; steps of 1/128 find it where the range is that grid's.
_FINE_PARTS = (126 / 128, 127 / 128, 129 / 128, 130 / 128)
# Weight of the own error of a tensor that a later block reads too. That block's output is not known yet. On the calibration
# images of ResNet-20, 0.3 gave 30.4 dB; 1 and 3 gave 30.2.
_ELSEWHERE = 0.3
_PATIENCE = 4  # candidates without a smaller error before the search ends
_WEIGHT_PARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
# Clipping weights of 8 bits lowers the error of the layer and raises that of the network: ResNet-20 lost 0.9 dB.
_WIDE_WEIGHTS = 8  # bits


@dataclass(frozen=True)
class RangeRefinement:
    """Chooses each range again, among parts of the range that holds all values.

    An activation gets the part with the smallest error in the outputs of its block: a layer with the operations around it.
    Weights of less than 8 bits get, in each output channel, the part with the smallest error in that channel; those of 8
    bits keep their range. The range at hand is kept if none is better. Blocks are refined in order, each with the inputs
    that the refined blocks before it give.

    The model needs ranges.

    Attributes:
        examples: calibration examples to use.
    """

    examples: int = 64

    @torch.no_grad()
    def __call__(self, model: nn.Module, batches: Sequence[Batch], context: StepContext = DEFAULT_CONTEXT) -> None:
        batches = checked_batches(model, batches)
        with closing(walk_blocks(model, batches, context, "ranges", most_examples=self.examples)) as stops:
            for stop in stops:
                for name in stop.block.layers:
                    _refine_weights(stop, model.get_submodule(name))
                for quantizers in stop.activations:
                    _refine_activation(stop, quantizers)


def _refine_activation(stop: Stop, quantizers: Sequence[TensorQuantizer]) -> None:
    """Give all of ``quantizers``, which round the same value, the range with the smallest error in the block."""
    quantizer = quantizers[0]

    seen = _Seen()
    quantizer.observer = seen
    stop.given()
    quantizer.observer = None
    here = stop.block.quantizers("input", "output")
    elsewhere = [other for other in quantizers if other not in here]

    def error() -> float:
        given = stop.given()
        found = [relative_error(given[name], value) for name, value in stop.wanted.items() if value.is_floating_point()]
        found += [_ELSEWHERE * relative_error(other(x), x) for other in elsewhere for x in seen.values]
        return sum(found)

    best, least = quantizer.range, error()
    assert best is not None

    def set_ranges(low: float, high: float) -> None:
        for each in quantizers:
            each.set_range(torch.tensor(low), torch.tensor(high))

    def attempt(low: float, high: float) -> bool:
        nonlocal best, least
        if quantizer.spec.symmetric:
            high = max(-low, high) if quantizer.spec.signed else max(high, 0.0)
            low = -high
        set_ranges(low, high)
        found = error()
        if found < least:
            best, least = (low, high), found
            return True
        return False

    misses = 0
    for part in _ACTIVATION_PARTS:
        misses = 0 if attempt(seen.low * part, seen.high * part) else misses + 1
        if misses == _PATIENCE:
            break
    coarse = best
    for part in _FINE_PARTS:
        attempt(coarse[0] * part, coarse[1] * part)
    set_ranges(*best)


class _Seen:
    """The values that pass a quantizer, the smallest and the largest of them."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.values: list[Tensor] = []

    def observe(self, x: Tensor) -> None:
        self.low, self.high = min(self.low, x.min().item()), max(self.high, x.max().item())
        self.values.append(x)


def _refine_weights(stop: Stop, layer: nn.Module) -> None:
    quantizer = layer._weight_quantizer
    if not isinstance(quantizer, TensorQuantizer) or not quantizer.rounds or quantizer.spec.bits >= _WIDE_WEIGHTS:
        return
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    stop.given()
    handle.remove()
    quantizer.enabled = False
    wanted = [layer(x) for x in inputs]
    quantizer.enabled = True

    def error() -> Tensor:
        total: Any = 0.0
        for x, y in zip(inputs, wanted, strict=True):
            difference = (layer(x) - y).square()
            difference = difference if isinstance(layer, nn.Linear) else difference.movedim(1, -1)
            per_channel = difference.flatten(0, -2).sum(0).double()
            total = total + (per_channel.reshape(quantizer.amax.shape) if quantizer.amax.dim() else per_channel.sum())
        return total

    low, high = covering_weight_range(float_weight(layer), quantizer.spec)
    best = (-quantizer.amax if quantizer.amin is None else quantizer.amin).clone(), quantizer.amax.clone()
    smallest = error()
    for part in _WEIGHT_PARTS:
        candidate = low * part, high * part
        quantizer.set_range(*candidate)
        found = error()
        better = found < smallest
        smallest = torch.where(better, found, smallest)
        best = torch.where(better, candidate[0], best[0]), torch.where(better, candidate[1], best[1])
    quantizer.set_range(*best)
