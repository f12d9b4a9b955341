"""Cuts a quantized model's graph into blocks, which run one after the other.

A block is what BRECQ (Li et al. 2021) reconstructs: a residual block, or a layer outside of them. Blocks follow one
another: each takes values that earlier blocks computed, and gives values that later ones take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, fx, nn

from effnet_quant.errors import UserError
from effnet_quant.quantization.eager_evaluation import Batch, device_of, eager_pass, model_arguments
from effnet_quant.quantization.operation_kinds import Kind, kind_of, kind_of_base
from effnet_quant.quantization.placement.symbolic_trace import called_module, trace_operations
from effnet_quant.quantization.quantizer import Role, TensorQuantizer

LARGEST = 8  # layers; a longer stretch is cut between its layers


@dataclass(frozen=True)
class Block:
    """A stretch of a model's graph as a module.

    Attributes:
        name: the module of the model that holds the block's layers, e.g. "blocks.2.0" or "conv_stem".
        layers: names of its convolutions and linear layers, in order.
        inputs: names of the values that it takes; those of the model are its arguments.
        outputs: names of the values that later blocks take; for the last block, the model's results.
        module: takes the inputs and returns a tuple of the outputs. It shares its modules with the model.
    """

    name: str
    layers: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: fx.GraphModule

    def quantizers(self, *roles: Role) -> list[TensorQuantizer]:
        """The block's quantizers of these roles, in the order in which they run."""
        found: dict[TensorQuantizer, None] = {}
        for node in self.module.graph.nodes:
            if node.op == "call_module":
                called = self.module.get_submodule(str(node.target))
                found |= {module: None for module in called.modules() if isinstance(module, TensorQuantizer)}
        return [quantizer for quantizer in found if quantizer.role in roles]


def traced_graph(model: nn.Module) -> fx.Graph:
    """The graph of a quantized model in eval mode.

    Raises:
        UserError: the model can't be traced.
    """
    with eager_pass(model):
        graph, _ = trace_operations(model)
    if graph is None:
        raise UserError(
            f"{type(model).__name__} can't be traced, so it can't be cut into blocks; use the recipe 'minmax', which "
            "needs no blocks."
        )
    return graph


def layers_of(model: nn.Module, node: fx.Node) -> list[str]:
    """Names of the convolutions and linear layers with quantizers in the module that a node calls."""
    module = called_module(model, node)
    if module is None:
        return []
    return [
        f"{node.target}.{name}" if name else str(node.target)
        for name, layer in module.named_modules()
        if hasattr(layer, "_weight_quantizer")
    ]


def cut_blocks(model: nn.Module, batch: Batch, *, single_layers: bool = False) -> list[Block]:
    """Cut a quantized model into blocks.

    Args:
        model: a model that ``quantize`` has been through.
        batch: one batch of at least two examples, which shows where the values of each example can be told apart.
        single_layers: give every layer a block of its own, where the graph can be cut there.

    Raises:
        UserError: the model can't be traced, or has no layers with quantizers.
    """
    graph = traced_graph(model)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    constants = _constants(graph)
    nodes = [node for node in nodes if node not in constants]
    cuttable = _cuttable(model, graph, batch)
    starts = _starts(model, nodes, constants, cuttable, single_layers)
    stretches = [nodes[start:end] for start, end in pairwise([*starts, len(nodes)])]
    if not single_layers:
        stretches = _joined_by_owner(model, stretches)
    blocks = [_block(model, stretch, constants) for stretch in stretches]
    if not any(block.layers for block in blocks):
        raise UserError("the model has no convolution or linear layer with quantizers.")
    return blocks


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Parameters, and what is computed from them alone. Every block that needs them computes them again."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op.startswith("call") and found.issuperset(inputs)):
            found.add(node)
    return found


class _Watcher(fx.Interpreter):
    """Notes which values are float tensors with one entry per example."""

    def __init__(self, model: nn.Module, graph: fx.Graph, examples: int) -> None:
        super().__init__(fx.GraphModule(model, graph))
        self._examples = examples
        self.batched: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dim() and len(value) == self._examples:
            self.batched.add(n.name)
        return value


def _cuttable(model: nn.Module, graph: fx.Graph, batch: Batch) -> set[str]:
    """Names of the values that have one entry per example."""
    arguments, examples = model_arguments(batch, device_of(model))
    watcher = _Watcher(model, graph, examples)
    with eager_pass(model):
        watcher.run(*arguments)
    return watcher.batched


def _starts(
    model: nn.Module, nodes: list[fx.Node], constants: set[fx.Node], cuttable: set[str], single_layers: bool
) -> list[int]:
    """Where blocks start, as positions in ``nodes``."""
    position = {node: index for index, node in enumerate(nodes)}
    last_use = {
        node: max((position.get(user, len(nodes)) for user in node.users), default=-1)
        for node in (*nodes, *(node for node in _sources(nodes) if node not in constants))
    }
    live: list[list[fx.Node]] = []  # the values that cross the cut before each node
    for index in range(len(nodes)):
        live.append([node for node, last in last_use.items() if position.get(node, -1) < index <= last])
    layers = [len(layers_of(model, node)) for node in nodes]
    layered = [index for index, count in enumerate(layers) if count]

    def cuts(start: int, end: int, most_values: int) -> list[int]:
        """Starts of stretches of nodes[start:end] with at least one layer each."""
        found = [start]
        inside = [index for index in layered if start <= index < end]
        for before, layer in pairwise(inside):
            allowed = [
                index
                for index in range(before + 1, layer + 1)
                if len(live[index]) <= most_values and all(node.name in cuttable for node in live[index])
            ]
            # What has no layer stays with the layer before it. An average does not: before it every position of the map
            # counts.
            average = next((index for index in range(before + 1, layer) if _averages(model, nodes[index])), layer)
            if allowed:
                found.append(max((index for index in allowed if index <= average), default=allowed[0]))
        return found

    if single_layers:
        return cuts(0, len(nodes), len(nodes))
    starts = cuts(0, len(nodes), 1)
    finer: list[int] = []
    for start, end in pairwise([*starts, len(nodes)]):
        finer += cuts(start, end, len(nodes)) if sum(layers[start:end]) > LARGEST else [start]
    return finer


def _sources(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes outside of ``nodes`` whose values they take: the model's arguments."""
    inside = set(nodes)
    return {source for node in nodes for source in node.all_input_nodes if source not in inside}


def _averages(model: nn.Module, node: fx.Node) -> bool:
    module = called_module(model, node)
    kind = kind_of(node.target) if module is None else kind_of_base(type(module))
    return Kind.AVERAGES in kind


def _owner(model: nn.Module, layer: str) -> str:
    """The outermost module of its own kind that holds a layer, e.g. a residual block; else the layer itself."""
    parts = layer.split(".")
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        if type(model.get_submodule(path)) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            return path
    return layer


def _joined_by_owner(model: nn.Module, stretches: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Join neighbours whose layers all belong to one module, e.g. to a block without a shortcut."""
    owners = [{_owner(model, layer) for node in stretch for layer in layers_of(model, node)} for stretch in stretches]
    counts = [sum(len(layers_of(model, node)) for node in stretch) for stretch in stretches]
    per_owner = Counter[str]()
    for owner, count in zip(owners, counts, strict=True):
        for name in owner:
            per_owner[name] += count
    joined: list[list[fx.Node]] = []
    before: set[str] = set()
    for stretch, owner in zip(stretches, owners, strict=True):
        if joined and owner == before and len(owner) == 1 and per_owner[next(iter(owner))] <= LARGEST:
            joined[-1] = joined[-1] + stretch
        else:
            joined.append(stretch)
        before = owner
    return joined


def _block(model: nn.Module, stretch: Sequence[fx.Node], constants: set[fx.Node]) -> Block:
    inside = set(stretch)
    inputs: list[fx.Node] = []
    for node in stretch:
        inputs += [
            source
            for source in node.all_input_nodes
            if source not in inside and source not in constants and source not in inputs
        ]
    copied = fx.Graph()
    copies = {node: copied.placeholder(node.name) for node in inputs}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = copied.node_copy(node, copy_of)
        return copies[node]

    for node in stretch:
        copy_of(node)
    ends = [node for node in stretch if any(user not in inside for user in node.users)]
    copied.output(tuple(copies[node] for node in ends))
    layers = tuple(dict.fromkeys(layer for node in stretch for layer in layers_of(model, node)))
    owners = {_owner(model, layer) for layer in layers}
    name = owners.pop() if len(owners) == 1 and len(layers) > 1 else (layers[0] if layers else str(stretch[0].name))
    return Block(
        name,
        layers,
        tuple(node.name for node in inputs),
        tuple(node.name for node in ends),
        fx.GraphModule(model, copied),
    )
