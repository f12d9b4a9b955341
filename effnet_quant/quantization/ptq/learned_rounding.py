"""Learns the rounding of weights block by block, so that each block gives what the float network gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.quantization.eager_evaluation import Batch, device_of, eager_pass
from effnet_quant.quantization.fake_quant import fake_quantize
from effnet_quant.quantization.ptq.activations import ActivationStore, Cut, Values, last_uses
from effnet_quant.quantization.ptq.blocks import Block, cut_blocks
from effnet_quant.quantization.ptq.soft_rounding import SoftRounding
from effnet_quant.quantization.ptq.step import StepContext, batches_on, checked_batches
from effnet_quant.quantization.quantizer import TensorQuantizer


@dataclass(frozen=True)
class Learning:
    """How the rounding of a block is learned.

    Attributes:
        iterations: steps of Adam for each block.
        batch_size: examples of a step.
        rate: learning rate of the rounding.
        range_rate: learning rate of the logarithms of activation ranges; 0 leaves them.
        bias_rate: learning rate of biases, in standard deviations of the layer's output; 0 leaves them.
        drop: share of activations that stay in float in each step (QDrop, Wei et al. 2022).
        decisiveness: weight of the pull towards 0 and 1.
        warm_up: share of the steps without that pull.
        settle: share of the steps at the end with decided weights, for ranges and biases.
    """

    iterations: int
    batch_size: int = 32
    rate: float = 1e-2
    range_rate: float = 0.0
    bias_rate: float = 0.0
    drop: float = 0.0
    decisiveness: float = 0.1
    warm_up: float = 0.2
    settle: float = 0.0


def learn_rounding(
    model: nn.Module, batches: Sequence[Batch], context: StepContext, learning: Learning, *, single_layers: bool
) -> None:
    batches = checked_batches(model, batches)
    blocks = cut_blocks(model, batches[0], single_layers=single_layers)
    device = device_of(model)
    total = sum(examples for _, examples in batches_on(model, batches))
    store = ActivationStore(context.memory, context.folder)
    uses = last_uses(blocks)
    floats, rounded = (Cut(store, learning.batch_size, uses) for _ in range(2))
    arguments = [arguments for arguments, _ in batches_on(model, batches)]
    names = _argument_names(blocks)
    floats.enter(names, arguments, total)
    rounded.values = dict(floats.values)
    with eager_pass(model):
        for number, block in enumerate(blocks):
            context.progress(block.name, number, len(blocks))
            with _float(block):
                wanted = floats.run(block, device)
            if block.layers:
                generator = torch.Generator().manual_seed(hash((context.seed, number)) % 2**63)
                _learn_block(model, block, floats, rounded, wanted, learning, generator, device)
            floats.advance(number, wanted)
            rounded.advance(number, _tracked(block, rounded, device))
        context.progress(blocks[-1].name, len(blocks), len(blocks))


def _argument_names(blocks: Sequence[Block]) -> tuple[str, ...]:
    made: set[str] = set()
    needed: list[str] = []
    for block in blocks:
        needed += [name for name in block.inputs if name not in made and name not in needed]
        made.update(block.outputs)
    return tuple(needed)


def _quantizers(block: Block, *roles: str) -> list[TensorQuantizer]:
    return [module for module in block.module.modules() if isinstance(module, TensorQuantizer) and module.role in roles]


@contextmanager
def _float(block: Block) -> Iterator[None]:
    """Within it the block computes in float."""
    found = _quantizers(block, "input", "weight", "output", "gate")
    before = [quantizer.enabled for quantizer in found]
    try:
        for quantizer in found:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in zip(found, before, strict=True):
            quantizer.enabled = enabled


def _tracked(block: Block, rounded: Cut, device: torch.device) -> Values:
    """The outputs of the quantized block, after its output quantizers got the range that they need now."""
    outputs = [quantizer for quantizer in _quantizers(block, "output") if quantizer.enabled]
    if outputs:
        for quantizer in outputs:
            quantizer.start_tracking()
        rounded.run(block, device)
        for quantizer in outputs:
            quantizer.stop_tracking()
    return rounded.run(block, device)


class _Drops:
    """Random masks for QDrop, cut from one pool: new random numbers for every activation would take longer than the block."""

    def __init__(self, share: float, generator: torch.Generator) -> None:
        self._share = share
        self._generator = generator
        self._pool = torch.empty(0)

    def mask(self, x: Tensor) -> Tensor | None:
        """1 where ``x`` is rounded and 0 where it stays in float, as float32; None if all is rounded."""
        if not self._share:
            return None
        if len(self._pool) < x.numel() + _OFFSETS:
            self._pool = torch.rand(x.numel() + _OFFSETS, generator=self._generator).ge_(self._share)
        offset = int(torch.randint(_OFFSETS, (), generator=self._generator))
        return self._pool[offset : offset + x.numel()].view(x.shape).to(x.device)


_OFFSETS = 2**16


class _Rounded(torch.autograd.Function):
    """Fake quantization where ``mask`` is 1; the gradient passes unchanged. Costs no memory for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: TensorQuantizer, mask: Tensor | None) -> Tensor:
        scale, zero_point = quantizer.scale, quantizer.zero_point
        low, high = quantizer.spec.bounds
        y = x.div(scale).round_().clamp_(low - zero_point, high - zero_point).mul_(scale)
        return y if mask is None else torch.addcmul(x, y.sub_(x), mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _Activation:
    """Replaces the forward of an activation quantizer while a block learns."""

    def __init__(self, quantizer: TensorQuantizer, drops: _Drops) -> None:
        self.quantizer = quantizer
        self.drops: _Drops | None = drops
        self.learns = False
        self.start = quantizer.amax.clone(), None if quantizer.amin is None else quantizer.amin.clone()
        self.logs = nn.Parameter(torch.zeros(2, device=quantizer.amax.device))

    def range(self) -> tuple[Tensor, Tensor | None]:
        amax, amin = self.start
        factors = self.logs.exp()
        return amax * factors[0], None if amin is None else amin * factors[1]

    def __call__(self, x: Tensor) -> Tensor:
        quantizer = self.quantizer
        if not quantizer.rounds:
            return x
        if self.learns:
            amax, amin = self.range()
            return fake_quantize(x, amax, replace(quantizer.spec, learned=True), amin)
        return _Rounded.apply(x, quantizer, None if self.drops is None else self.drops.mask(x))

    @torch.no_grad()
    def settle(self) -> None:
        if self.learns:
            amax, amin = self.range()
            self.quantizer.set_range(-amax if amin is None else amin, amax)


def _learn_block(
    model: nn.Module,
    block: Block,
    floats: Cut,
    rounded: Cut,
    wanted: Values,
    learning: Learning,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    layers = {
        name: layer
        for name in block.layers
        if isinstance((layer := model.get_submodule(name))._weight_quantizer, TensorQuantizer)
        and layer._weight_quantizer.rounds
    }
    soft: dict[str, SoftRounding] = {}
    hard: dict[str, TensorQuantizer] = {}
    for name, layer in layers.items():
        hard[name] = layer._weight_quantizer
        soft[name] = SoftRounding(hard[name], layer.weight)
    drops = _Drops(learning.drop, generator)
    activations = [
        _Activation(quantizer, drops) for quantizer in _quantizers(block, "input", "output") if quantizer.rounds
    ]
    movable = [a for a in activations if a.quantizer.role == "input"] if learning.range_rate else []
    biases = _biases(block) if learning.bias_rate else []
    groups: list[dict[str, Any]] = []
    if soft:
        groups.append({"params": [rounding.logits for rounding in soft.values()], "lr": learning.rate})
    if movable:
        groups.append({"params": [a.logs for a in movable], "lr": learning.range_rate})
    for bias, unit in biases:
        groups.append({"params": [bias], "lr": learning.bias_rate * unit})
    if not groups:
        return
    frozen = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    for bias, _ in biases:
        bias.requires_grad_(True)
    energy = {name: value.float().square().mean().clamp(min=1e-12) for name, value in wanted.items()}
    start_error: float | None = None
    decided = False
    try:
        for name, layer in layers.items():
            layer._weight_quantizer = soft[name]
        for activation in activations:
            activation.quantizer.forward = activation  # type: ignore[method-assign]
        optimizer = torch.optim.Adam(groups)
        base = [group["lr"] for group in groups]
        settle_from = int(learning.iterations * (1 - learning.settle))
        order = torch.empty(0, dtype=torch.long)
        with torch.enable_grad():
            for step in range(learning.iterations):
                if step == settle_from and learning.settle:
                    decided = True
                    _decide(layers, soft, hard)
                    for activation in activations:
                        activation.drops = None
                    for activation in movable:
                        activation.learns = True
                if len(order) < min(learning.batch_size, len(rounded)):
                    order = torch.randperm(len(rounded), generator=generator)
                rows, order = order[: learning.batch_size], order[learning.batch_size :]
                inputs = rounded.pick(block, rows, device)
                if learning.drop and not decided:
                    true = floats.pick(block, rows, device)
                    inputs = [
                        torch.addcmul(f, x - f, drops.mask(x)) if x.is_floating_point() else x
                        for x, f in zip(inputs, true, strict=True)
                    ]
                error = torch.zeros((), device=device)
                for name, value in zip(block.outputs, block.module(*inputs), strict=True):
                    error = error + (value - wanted[name][rows].to(device)).square().mean() / energy[name]
                if start_error is None:
                    start_error = max(error.item(), 1e-8)
                loss = error
                past = step / settle_from
                if soft and not decided and past >= learning.warm_up:
                    beta = 2 + 18 * (1 + math.cos(math.pi * (past - learning.warm_up) / (1 - learning.warm_up))) / 2
                    loss = loss + learning.decisiveness * start_error * sum(r.undecided(beta) for r in soft.values())
                for group, lr in zip(groups, base, strict=True):
                    group["lr"] = lr * (0.05 + 0.95 * (1 + math.cos(math.pi * step / learning.iterations)) / 2)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        if not decided:
            _decide(layers, soft, hard)
        for activation in movable:
            activation.settle()
    finally:
        for activation in activations:
            del activation.quantizer.forward
        for name, layer in layers.items():
            layer._weight_quantizer = hard[name]
        for p, needed in frozen.items():
            p.requires_grad_(needed)


@torch.no_grad()
def _decide(layers: dict[str, Any], soft: dict[str, SoftRounding], hard: dict[str, TensorQuantizer]) -> None:
    for name, layer in layers.items():
        layer.weight.copy_(soft[name].decided())
        layer._weight_quantizer = hard[name]


def _biases(block: Block) -> list[tuple[nn.Parameter, float]]:
    """The biases of the block's layers and BatchNorms, and a typical size of each."""
    found = []
    for module in block.module.modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            unit = bias.detach().std().item() if bias.numel() > 1 else bias.detach().abs().mean().item()
            found.append((bias, unit if math.isfinite(unit) and unit > 0 else 1.0))
    return found
