"""Walks through a model block by block with the activations of the float and of the quantized network side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effnet_quant.quantization.biases import FoldedBatchNorm2d
from effnet_quant.quantization.eager_evaluation import Batch, device_of, eager_pass
from effnet_quant.quantization.ptq.activations import ActivationStore, Cut, Values, last_uses
from effnet_quant.quantization.ptq.blocks import Block, cut_blocks
from effnet_quant.quantization.ptq.step import StepContext, batches_on, checked_batches
from effnet_quant.quantization.quantizer import TensorQuantizer


@dataclass
class Stop:
    """A block on the way, with what enters it.

    Attributes:
        block: the block, usually of one layer.
        floats: the values of the float network before the block.
        rounded: those of the quantized network, whose earlier blocks the step has changed.
        wanted: what the float network computes in this block, before the step changes it.
        device: of the model.
    """

    block: Block
    floats: Cut
    rounded: Cut
    wanted: Values
    device: torch.device

    def given(self) -> Values:
        """What the quantized network computes in this block."""
        return self.rounded.run(self.block, self.device)


def walk_blocks(
    model: nn.Module, batches: Sequence[Batch], context: StepContext, title: str, most_examples: int
) -> Iterator[Stop]:
    """Stop at every block of a model, in order. Change the block's quantizers and biases before taking the next.

    Args:
        model: quantized and calibrated.
        batches: calibration examples.
        context: gets the progress.
        title: of the progress.
        most_examples: examples to use; the first ones.

    Raises:
        UserError: as ``checked_batches`` and ``cut_blocks`` raise it.
    """
    batches = checked_batches(model, batches)
    blocks = cut_blocks(model, batches[0], single_layers=True)
    arguments, total = [], 0
    for given, examples in batches_on(model, batches):
        if total >= most_examples:
            break
        arguments.append(given)
        total += examples
    store, uses = ActivationStore(context.memory, context.folder), last_uses(blocks)
    batch_size = max(1, min(64, total))
    floats, rounded = (Cut(store, batch_size, uses) for _ in range(2))
    floats.enter(_argument_names(blocks), arguments, total)
    rounded.values = dict(floats.values)
    device = device_of(model)
    with eager_pass(model):
        for number, block in enumerate(blocks):
            context.progress(title, number, len(blocks))
            with in_float(block):
                wanted = floats.run(block, device)
            stop = Stop(block, floats, rounded, wanted, device)
            yield stop
            floats.advance(number, wanted)
            if number + 1 < len(blocks):
                rounded.advance(number, stop.given())
    context.progress(title, len(blocks), len(blocks))


def quantizers_of(block: Block, *roles: str) -> list[TensorQuantizer]:
    """The quantizers of a block that round now and have one of these roles, in the order in which they run."""
    found: dict[TensorQuantizer, None] = {}
    for node in block.module.graph.nodes:
        if node.op == "call_module":
            called = block.module.get_submodule(str(node.target))
            found |= {module: None for module in called.modules() if isinstance(module, TensorQuantizer)}
    return [quantizer for quantizer in found if quantizer.rounds and quantizer.role in roles]


@contextmanager
def in_float(block: Block) -> Iterator[None]:
    """Within it the block computes in float."""
    found = [module for module in block.module.modules() if isinstance(module, TensorQuantizer) and module.enabled]
    try:
        for quantizer in found:
            quantizer.enabled = False
        yield
    finally:
        for quantizer in found:
            quantizer.enabled = True


def bias_owner(model: nn.Module, block: Block, layer: nn.Module) -> nn.Module:
    """The module whose bias is added to the layer's sums last: the BatchNorm that engines fold into it, or the layer."""
    for module in block.module.modules():
        if isinstance(module, FoldedBatchNorm2d) and module._layer[0] is layer:
            return module
    return layer


def _argument_names(blocks: Sequence[Block]) -> tuple[str, ...]:
    made: set[str] = set()
    needed: list[str] = []
    for block in blocks:
        needed += [name for name in block.inputs if name not in made and name not in needed]
        made.update(block.outputs)
    return tuple(needed)


def relative_error(given: Tensor, wanted: Tensor) -> float:
    """Mean over the examples of |given - wanted|^2 / (|given|^2 + |wanted|^2): 0 … 2.

    Every example counts the same. In some networks a few examples have values many times as large as the others; the plain
    sum of squares would be about these alone.

    Args:
        given, wanted: of shape (N, …).
    """
    given, wanted = given.flatten(1).float(), wanted.flatten(1).float()
    energy = given.square().sum(1) + wanted.square().sum(1)
    return float(((given - wanted).square().sum(1) / energy.clamp(min=1e-30)).mean())
