"""Finds the activations whose gate engines round: SiLU and hard-swish behind a rounded output."""

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
    """Put twins that round their gate in the place of SiLU and hard-swish behind output quantizers, as modules of ``model``.

    Args:
        model: quantized.
        graph: calls the modules of ``model``.
        rewrite: whether ``graph`` is what the model computes from now on. Then functions get a module, and modules that are
            called at several places one for each. Else the model keeps its own forward, which calls neither.
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
    """The module that a node calls, or one that computes its function."""
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return _FUNCTIONS[node.target](inplace=bool(node.kwargs.get("inplace", False)))
    return called_module(model, node)
