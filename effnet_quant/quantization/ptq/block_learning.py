"""Learns the weights of one block, so that the quantized block gives what the float network gives there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.quantization.ptq.activation_rounding import Drops, LearningActivation, in_place_of
from effnet_quant.quantization.ptq.activations import Cut, Values
from effnet_quant.quantization.ptq.block_walk import Stop
from effnet_quant.quantization.ptq.blocks import Block
from effnet_quant.quantization.ptq.soft_rounding import SoftRounding
from effnet_quant.quantization.quantizer import TensorQuantizer

_SMALLEST_ENERGY = 1e-12  # of outputs that are all zero
_BETA = (20.0, 2.0)  # start and end of AdaRound's exponent


@dataclass(frozen=True)
class Learning:
    """How a block learns.

    Attributes:
        iterations: steps of Adam.
        positions: how many positions of feature maps a step looks at. A block of large maps needs fewer examples for them.
        fewest, most: bounds of the examples of a step.
        rate: learning rate of the rounding.
        range_rate: learning rate of the logarithms of activation ranges; 0 leaves the ranges.
        bias_rate: learning rate of biases, in standard deviations of each bias; 0 leaves the biases.
        drop: share of activations that stay in float in each step (QDrop).
        pull: weight of the pull that decides each weight, in errors of the block at its start.
        warm_up: share of the first phase without that pull.
        settle: share of the steps that make the second phase. Its weights are decided; ranges and biases go on learning.
    """

    iterations: int
    positions: int = 2**13
    fewest: int = 8
    most: int = 32
    rate: float = 1e-2
    range_rate: float = 0.0
    bias_rate: float = 0.0
    drop: float = 0.0
    pull: float = 0.1
    warm_up: float = 0.2
    settle: float = 0.0


def learn_block(model: nn.Module, stop: Stop, learning: Learning, generator: torch.Generator) -> None:
    """Learn the rounding of a block's weights and, where ``learning`` says so, its biases and activation ranges.

    Args:
        model: the model of the block, in eval mode with ranges; it is changed in place.
        stop: the block, with what enters it.
        learning: how.
        generator: of everything random.
    """
    learner = _Learner(model, stop, learning, generator)
    if not learner.groups:
        return
    with learner.installed(), torch.enable_grad():
        learner.learn(stop.floats, stop.rounded, stop.wanted)


class _Learner:
    def __init__(self, model: nn.Module, stop: Stop, learning: Learning, generator: torch.Generator) -> None:
        block = stop.block
        self._model = model
        self._block = block
        self._learning = learning
        self._generator = generator
        self._device = next(block.module.parameters()).device
        self._quantizers = {
            name: quantizer
            for name in block.layers
            if isinstance(quantizer := model.get_submodule(name)._weight_quantizer, TensorQuantizer)
            and quantizer.rounds
        }
        self._soft = {
            name: SoftRounding(quantizer, _weight(model, name)) for name, quantizer in self._quantizers.items()
        }
        self._drops = Drops(learning.drop, generator)
        self._ranges: list[LearningActivation] = []  # the activations whose range the block decides
        for first, *others in stop.activations:
            self._ranges.append(LearningActivation(first, self._drops))
            logs = self._ranges[-1].logs
            self._ranges += [LearningActivation(other, self._drops, logs) for other in others]
        here = [quantizer for quantizer in block.quantizers("input", "output") if quantizer.rounds]
        learned = {each.quantizer: each for each in self._ranges}
        self._activations = [learned.get(quantizer) or LearningActivation(quantizer, self._drops) for quantizer in here]
        self._biases = list(_biases(block)) if learning.bias_rate else []
        self._decided = False
        self.groups: list[dict[str, Any]] = []
        self._add(learning.rate, [rounding.logits for rounding in self._soft.values()])
        if learning.range_rate:
            self._add(learning.range_rate, list(dict.fromkeys(each.logs for each in self._ranges)))
        for bias, unit in self._biases:
            self._add(learning.bias_rate * unit, [bias])

    def _add(self, rate: float, parameters: Sequence[nn.Parameter]) -> None:
        if parameters:
            self.groups.append({"params": list(parameters), "lr": rate, "start": rate})

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it the block rounds softly. Afterwards its weights are decided, unless an error ended it."""
        needed = {parameter: parameter.requires_grad for parameter in self._model.parameters()}
        try:
            self._model.requires_grad_(False)
            for bias, _ in self._biases:
                bias.requires_grad_(True)
            for name, rounding in self._soft.items():
                self._model.get_submodule(name)._weight_quantizer = rounding
            with in_place_of(self._activations):
                yield
        finally:
            for name, quantizer in self._quantizers.items():
                self._model.get_submodule(name)._weight_quantizer = quantizer
            for parameter, before in needed.items():
                parameter.requires_grad_(before)

    def learn(self, floats: Cut, rounded: Cut, wanted: Values) -> None:
        """Run both phases."""
        learning = self._learning
        optimizer = torch.optim.Adam(self.groups)
        energy = {name: max(value.float().square().mean().item(), _SMALLEST_ENERGY) for name, value in wanted.items()}
        first_phase = learning.iterations - round(learning.iterations * learning.settle)
        batch_size = self._batch_size(wanted)
        order, unit = torch.empty(0, dtype=torch.long), 0.0
        for step in range(learning.iterations):
            if step == first_phase:
                self._decide()
            if len(order) < min(batch_size, len(rounded)):
                order = torch.randperm(len(rounded), generator=self._generator)
            rows, order = order[:batch_size], order[batch_size:]
            error = self._error(floats, rounded, wanted, rows, energy)
            unit = unit or error.item()
            loss = error if self._decided else error + unit * self._undecided(step / first_phase)
            for group in optimizer.param_groups:  # a cosine down to a twentieth
                group["lr"] = group["start"] * (0.525 + 0.475 * math.cos(math.pi * step / learning.iterations))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not self._decided:
            self._decide()
        if learning.range_rate:
            for activation in self._ranges:
                activation.keep_range()

    def _batch_size(self, wanted: Values) -> int:
        positions = max(value[0, 0].numel() if value.dim() > 1 else 1 for value in wanted.values())
        return min(max(self._learning.positions // max(positions, 1), self._learning.fewest), self._learning.most)

    def _error(self, floats: Cut, rounded: Cut, wanted: Values, rows: Tensor, energy: dict[str, float]) -> Tensor:
        """Squared error of the block's outputs over their energy, for some examples."""
        inputs = rounded.pick(self._block, rows, self._device)
        if self._learning.drop and not self._decided:
            exact = floats.pick(self._block, rows, self._device)
            inputs = [self._drops.mixed(*pair) for pair in zip(inputs, exact, strict=True)]
        error = torch.zeros((), device=self._device)
        for name, value in zip(self._block.outputs, self._block.module(*inputs), strict=True):
            if value.is_floating_point():
                error = error + (value - wanted[name][rows].to(self._device)).square().mean() / energy[name]
        return error

    def _undecided(self, progress: float) -> Tensor | float:
        """The pull that decides weights, at a point of the first phase from 0 to 1."""
        warm_up = self._learning.warm_up
        if progress < warm_up:
            return 0.0
        start, end = _BETA
        beta = end + (start - end) * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up))) / 2
        return self._learning.pull * sum(rounding.undecided(beta) for rounding in self._soft.values())

    @torch.no_grad()
    def _decide(self) -> None:
        """End the first phase: weights go onto their grid, nothing is dropped any more, ranges learn."""
        self._decided = True
        for name, rounding in self._soft.items():
            _weight(self._model, name).copy_(rounding.decided())
            self._model.get_submodule(name)._weight_quantizer = self._quantizers[name]
        for activation in self._activations:
            activation.learns = self._learning.range_rate > 0


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _biases(block: Block) -> Iterator[tuple[nn.Parameter, float]]:
    """The biases of the block's layers and BatchNorms, and their typical size."""
    for module in block.module.modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            unit = bias.detach().square().mean().sqrt().item()
            yield bias, unit if math.isfinite(unit) and unit > 0 else 1.0
