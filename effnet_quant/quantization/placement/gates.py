"""Replaces SiLU and hard-swish after an output quantizer: engines round the gates of these activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import fx, nn
from torch.nn import functional as F

from effnet_quant.quantization.placement.symbolic_trace import add_module, called_module, free_name
from effnet_quant.quantization.quantized_layers import quant_gate
from effnet_quant.quantization.quantizer import TensorQuantizer

_FUNCTIONS: dict[Callable[..., object], Callable[..., nn.Module]] = {F.silu: nn.SiLU, F.hardswish: nn.Hardswish}


def place_gates(model: nn.Module, graph: fx.Graph, *, rewrite: bool) -> None:
    """Replace each SiLU and hard-swish after an output quantizer by its twin that rounds the gate (``QuantGate``).

    Args:
        model: quantized; it holds the twins.
        graph: calls the modules of ``model``.
        rewrite: whether ``graph`` becomes the model's forward. Then functions are replaced too, and each call of a shared
            module gets its own twin. Else both stay, because the model's own forward calls them.
    """
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        quantizer = called_module(model, node)
        if not (isinstance(quantizer, TensorQuantizer) and quantizer.role == "output"):
            continue
        for user in list(node.users):
            activation = _activation(model, user)
            twin = quant_gate(activation, quantizer)
            if twin is None:
                continue
            if user.op == "call_module" and calls[user.target] == 1:
                model.set_submodule(str(user.target), twin)
            elif rewrite:
                path = add_module(model, free_name(model, user, type(activation).__name__.lower()), twin)
                with graph.inserting_before(user):
                    gated = graph.call_module(path, (node,))
                user.replace_all_uses_with(gated)
                graph.erase_node(user)


def _activation(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or a new module that computes the node's function."""
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return _FUNCTIONS[node.target](inplace=bool(node.kwargs.get("inplace", False)))
    return called_module(model, node)
