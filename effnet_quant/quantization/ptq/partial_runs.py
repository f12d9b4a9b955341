"""Runs a quantized network from the block of a layer on, where all that comes before stays in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from effnet_quant.quantization.eager_evaluation import Batch, device_of, eager_pass
from effnet_quant.quantization.placement.symbolic_trace import called_module
from effnet_quant.quantization.ptq.activations import ActivationStore, Cut, last_uses
from effnet_quant.quantization.ptq.blocks import cut_blocks, layers_of, traced_graph
from effnet_quant.quantization.ptq.step import StepContext, batches_on
from effnet_quant.quantization.quantizer import TensorQuantizer, in_float

ROWS = 32  # examples of a partial run


class PartialRuns:
    """The layers of a network in their order, each with the float values at the start of its block.

    Memory holds the float values of all examples at one cut between blocks, within the context's limit, and beside them
    those of ``ROWS`` examples.

    Args:
        model: a model that ``quantize`` has been through.
        batches: its examples.
        context: memory and folder.

    Attributes:
        block_runs: how many blocks have run so far, each on all examples.
        blocks: number of blocks.

    Raises:
        UserError: the model can't be traced, has no layers with quantizers, or the disk is full.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], context: StepContext) -> None:
        self._model = model
        self._device = device_of(model)
        graph = traced_graph(model)
        (self._results,) = next(node.args for node in graph.nodes if node.op == "output")
        needed: list[str] = []
        fx.node.map_arg(self._results, lambda node: needed.append(node.name))
        self._blocks = cut_blocks(model, batches[0], single_layers=True)
        self.blocks = len(self._blocks)
        self.block_runs = 0
        self._number = 0
        self._last_use = last_uses(self._blocks) | dict.fromkeys(needed, self.blocks)
        self._cut = Cut(ActivationStore(context.memory, context.folder), ROWS, self._last_use)
        total = sum(examples for _, examples in batches_on(model, batches))
        self._cut.enter(graph, batches_on(model, batches), total)

    def __len__(self) -> int:
        return len(self._cut)

    def layers(self) -> Iterator[str]:
        """Yield the name of each layer in turn. ``outputs`` then starts at its block."""
        done: set[str] = set()
        for number, block in enumerate(self._blocks):
            self._number = number
            for layer in block.layers:
                if layer not in done:  # a layer that is called twice counts at its first call
                    done.add(layer)
                    yield layer
            if number == self.blocks - 1:
                return
            with eager_pass(self._model), in_float(self._model):
                self._cut.advance(number, self._cut.run(block, self._device))
            self.block_runs += 1

    def outputs(self) -> Iterator[tuple[slice, Any]]:
        """Yield the network's outputs for ``ROWS`` examples at a time, with their positions.

        Every quantizer works as it is set now. Blocks before the current one are those of the float network.
        """
        with eager_pass(self._model):
            for start in range(0, len(self), ROWS):
                rows = slice(start, min(start + ROWS, len(self)))
                values = {name: self._cut.copy(name, rows, self._device) for name in self._cut.values}
                for number in range(self._number, self.blocks):
                    block = self._blocks[number]
                    found = block.module(*(values[name] for name in block.inputs))
                    values |= zip(block.outputs, found, strict=True)
                    values = {name: value for name, value in values.items() if self._last_use.get(name, -1) > number}
                yield rows, fx.node.map_arg(self._results, _lookup(values))
        self.block_runs += self.blocks - self._number


def _lookup(values: dict[str, Tensor]) -> Callable[[fx.Node], Any]:
    return lambda node: values[node.name]


def output_quantizers_of_layers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """The output quantizer of each layer that has one, by the layer's name."""
    found: dict[str, TensorQuantizer] = {}
    for node in traced_graph(model).nodes:
        layers = layers_of(model, node)
        value = node
        while len(layers) == 1 and len(value.users) == 1:
            value = next(iter(value.users))
            module = called_module(model, value)
            if isinstance(module, TensorQuantizer) and module.role == "output":
                found.setdefault(layers[0], module)
            if isinstance(module, TensorQuantizer) or layers_of(model, value) or len(value.all_input_nodes) > 1:
                break
    return found


def quantizers_of_layer(model: nn.Module, layer: str, outputs: dict[str, TensorQuantizer]) -> list[TensorQuantizer]:
    """The quantizers of a layer's input, weights and output, those that it has. ``outputs`` are all output quantizers."""
    module = model.get_submodule(layer)
    places = [module._input_quantizer, module._weight_quantizer, outputs.get(layer)]
    return [place for place in places if isinstance(place, TensorQuantizer)]


@contextmanager
def rounding(quantizers: Sequence[TensorQuantizer]) -> Iterator[None]:
    """Within the block these quantizers are on."""
    for quantizer in quantizers:
        quantizer.enabled = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enabled = False
