"""Bias correction (Nagel et al. 2019), empirical and one layer after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.quantization.eager_evaluation import Batch
from effnet_quant.quantization.ptq.block_walk import Stop, bias_owner, walk_blocks
from effnet_quant.quantization.ptq.step import DEFAULT_CONTEXT, StepContext, checked_batches
from effnet_quant.quantization.quantizer import in_float


@dataclass(frozen=True)
class BiasCorrection:
    """Puts the mean error of each output channel of each layer into the layer's bias.

    Rounding moves the mean of a layer's outputs. Each layer is corrected with the inputs that the corrected layers before it
    give it, so it makes up for their errors too. Only biases change, or those of the BatchNorms that engines fold.

    The model needs ranges, and keeps them.

    Attributes:
        examples: calibration examples to use.
    """

    examples: int = 256

    @torch.no_grad()
    def __call__(self, model: nn.Module, batches: Sequence[Batch], context: StepContext = DEFAULT_CONTEXT) -> None:
        batches = checked_batches(model, batches)
        with closing(walk_blocks(model, batches, context, "bias correction", most_examples=self.examples)) as stops:
            for stop in stops:
                _correct(model, stop)


def _correct(model: nn.Module, stop: Stop) -> None:
    owners = [bias_owner(stop.block, model.get_submodule(name)) for name in stop.block.layers]
    owners = [owner for owner in owners if isinstance(getattr(owner, "bias", None), Tensor)]
    if not owners:
        return
    with _means(owners) as wanted, in_float(stop.block.module):
        stop.floats.run(stop.block, stop.device)
    for owner in owners:
        with _means([owner]) as given:
            stop.given()
        bias = owner.bias
        assert isinstance(bias, Tensor)
        bias.add_((wanted[owner].mean - given[owner].mean).to(bias.dtype))


@dataclass
class _Sum:
    """Sum over all positions of each channel, and their number."""

    total: Tensor | float = 0.0
    count: int = 0

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / self.count


@contextmanager
def _means(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, _Sum]]:
    """Collects the mean of each output channel of some modules."""
    sums = {module: _Sum() for module in modules}

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        # channels are dimension 1 of a convolution's output and the last one of a linear layer's
        channel = -1 if isinstance(module, nn.Linear) else 1
        flat = output.double().movedim(channel, -1).flatten(0, -2)
        sums[module].total += flat.sum(0)
        sums[module].count += len(flat)

    handles = [module.register_forward_hook(note) for module in sums]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
