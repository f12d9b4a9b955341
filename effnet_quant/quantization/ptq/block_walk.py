"""Walks through a model block by block with the activations of the float and of the quantized network side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, fx, nn

from effnet_quant.quantization.biases import FoldedBatchNorm2d
from effnet_quant.quantization.eager_evaluation import Batch, device_of, eager_pass
from effnet_quant.quantization.placement.symbolic_trace import called_module
from effnet_quant.quantization.ptq.activations import ActivationStore, Cut, Values, last_uses
from effnet_quant.quantization.ptq.blocks import Block, cut_blocks, traced_graph
from effnet_quant.quantization.ptq.step import StepContext, batches_on
from effnet_quant.quantization.quantizer import TensorQuantizer, in_float


@dataclass
class Stop:
    """A block on the way, with what enters it.

    Attributes:
        number: of the block, from 0.
        block: the block, usually of one layer.
        floats: the values of the float network before the block.
        rounded: those of the quantized network, whose earlier blocks the step has changed.
        wanted: what the float network computes in this block, before the step changes it.
        device: of the model.
        activations: the activation quantizers whose ranges this block decides, in the order in which they run. Each stands
            with those that round the same value on the same grid, itself first. Engines round such a value once, so a step
            gives all of a group the same range. An earlier block may have decided a quantizer's range; it is not here then.
    """

    number: int
    block: Block
    floats: Cut
    rounded: Cut
    wanted: Values
    device: torch.device
    activations: list[tuple[TensorQuantizer, ...]]

    def given(self) -> Values:
        """What the quantized network computes in this block."""
        return self.rounded.run(self.block, self.device)


def walk_blocks(
    model: nn.Module,
    batches: Sequence[Batch],
    context: StepContext,
    title: str,
    *,
    single_layers: bool = True,
    most_examples: int | None = None,
    run_size: int = 64,
) -> Generator[Stop]:
    """Stop at every block of a model, in order. Change the block's quantizers, weights and biases before the next stop.

    The model is in eval mode until the walk ends; close the iterator if an error ends it.

    Args:
        model: quantized and calibrated.
        batches: calibration examples, as ``checked_batches`` gives them.
        context: gets the progress.
        title: of the progress.
        single_layers: stop at every layer.
        most_examples: examples to use, the first ones; None for all.
        run_size: examples that run through a block at a time.

    Raises:
        UserError: the model can't be cut, an argument has no examples, or the disk is full.
    """
    blocks = cut_blocks(model, batches[0], single_layers=single_layers)
    lengths = [examples for _, examples in batches_on(model, batches)]
    used = [0, *accumulate(lengths)]
    taken = sum(most_examples is None or start < most_examples for start in used[:-1])
    store, uses = ActivationStore(context.memory, context.folder), last_uses(blocks)
    size = max(1, min(run_size, used[taken]))
    floats, rounded = (Cut(store, size, uses) for _ in range(2))
    graph = traced_graph(model)
    floats.enter(graph, batches_on(model, batches[:taken]), used[taken])
    rounded.values = dict(floats.values)
    device = device_of(model)
    alike, decided = _alike(model, graph), set[TensorQuantizer]()
    with eager_pass(model):
        for number, block in enumerate(blocks):
            context.progress(title, number, len(blocks))
            with in_float(block.module):
                wanted = floats.run(block, device)
            activations = []
            for quantizer in block.quantizers("input", "output"):
                if quantizer.rounds and quantizer not in decided:
                    activations.append((quantizer, *(other for other in alike(quantizer) if other not in decided)))
                    decided.update(activations[-1])
            stop = Stop(number, block, floats, rounded, wanted, device, activations)
            yield stop
            floats.advance(number, wanted)
            if number + 1 < len(blocks):
                rounded.advance(number, stop.given())
    context.progress(title, len(blocks), len(blocks))


def _alike(model: nn.Module, graph: fx.Graph) -> Callable[[TensorQuantizer], list[TensorQuantizer]]:
    """Finds the other quantizers that round the same value on the same grid over the same range."""
    readers: dict[fx.Node, list[TensorQuantizer]] = defaultdict(list)
    value: dict[TensorQuantizer, fx.Node] = {}
    for node in graph.nodes:
        module = called_module(model, node)
        quantizer = getattr(module, "_input_quantizer", module)
        if isinstance(quantizer, TensorQuantizer) and quantizer.role == "input" and node.all_input_nodes:
            readers[node.all_input_nodes[0]].append(quantizer)
            value[quantizer] = node.all_input_nodes[0]

    def others(quantizer: TensorQuantizer) -> list[TensorQuantizer]:
        found = readers[value[quantizer]] if quantizer in value else []
        return [
            other
            for other in dict.fromkeys(found)
            if other is not quantizer
            and other.rounds
            and other.spec == quantizer.spec
            and other.range == quantizer.range
        ]

    return others


def bias_owner(block: Block, layer: nn.Module) -> nn.Module:
    """The module whose bias is added to the layer's sums last: the BatchNorm that engines fold into it, or the layer."""
    for module in block.module.modules():
        if isinstance(module, FoldedBatchNorm2d) and module._layer[0] is layer:
            return module
    return layer


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
