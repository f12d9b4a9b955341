"""Traces a model with torch.fx, to find the operations that have no module of their own."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_quant.quantization.quantized_layers import MadeHere, QuantAdaptiveAvgPool2d, QuantAvgPool2d, QuantGate

# Modules that stay one node: they carry quantizers, or compute differently in training and evaluation.
_CHECKS = (fx._symbolic_trace._assert_is_none, torch._assert)
_WHOLE = (nn.Conv2d, nn.Linear, QuantAdaptiveAvgPool2d, QuantAvgPool2d, QuantGate, _BatchNorm)


class _Tracer(fx.Tracer):
    """Traces into every module that has children, except ``_WHOLE`` and the opaque ones."""

    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self._opaque = opaque

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether the module stays one node of the graph."""
        if isinstance(module, _WHOLE) or qualified_name in self._opaque:
            return True
        return not any(True for _ in module.children()) or super().is_leaf_module(module, qualified_name)


def trace_operations(model: nn.Module) -> tuple[fx.Graph | None, list[str]]:
    """The graph of a model, and the names of its opaque modules: they can't be traced and are one node each.

    If an argument's default decides which operations run, as in ``if mask is not None``, the graph is that of the default. A
    call with another value then fails.

    Returns:
        The graph, None if the model itself can't be traced, and the names.
    """
    opaque: set[str] = set()
    while True:
        graph = _traced(model, opaque)
        if graph is not None:
            return graph, sorted(opaque)
        found = _untraceable(model, "", opaque)
        if not found - opaque:
            return None, sorted(opaque)
        opaque |= found


def _traced(model: nn.Module, opaque: set[str]) -> fx.Graph | None:
    """The graph of a model with all arguments open or, if that runs other operations, with the defaults' values."""
    plain = {name: value for name, value in _defaults(model).items() if isinstance(value, (type(None), bool, int, str))}
    free = _attempt(model, opaque, {})
    fixed = _attempt(model, opaque, plain) if plain else None
    if fixed is None or (free is not None and _operations(free) == _operations(fixed)):
        return free
    for node in fixed.nodes:  # torch.fx renames the arguments whose value it fixes
        name = str(node.target).rpartition("_")[0]
        if node.op == "placeholder" and node.target not in _parameters(model) and name in plain:
            node.target = name
    return fixed


def _attempt(model: nn.Module, opaque: set[str], values: dict[str, Any]) -> fx.Graph | None:
    try:
        return _Tracer(opaque).trace(model, values)
    except Exception:  # a model's own code may raise anything when it gets a proxy instead of a tensor
        return None


def _operations(graph: fx.Graph) -> list[tuple[str, Any]]:
    """What a graph calls, without the checks of arguments whose value is fixed."""
    checks = {node for node in graph.nodes if node.target in _CHECKS}
    calls = (node for node in graph.nodes if node.op.startswith("call") and node not in checks)
    return [(node.op, node.target) for node in calls if not (node.users and checks.issuperset(node.users))]


def _untraceable(module: nn.Module, prefix: str, opaque: set[str]) -> set[str]:
    """The smallest modules below ``module`` that can't be traced by themselves."""
    found: set[str] = set()
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path in opaque or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            if path not in opaque:
                found |= _untraceable(child, f"{path}.", opaque)
            continue
        inner = {name.removeprefix(f"{path}.") for name in opaque if name.startswith(f"{path}.")}
        try:
            _Tracer(inner).trace(child, _defaults(child))
        except Exception:  # see above
            found |= _untraceable(child, f"{path}.", opaque) or {path}
    return found


def _defaults(module: nn.Module) -> dict[str, Any]:
    """The defaults of its forward's arguments, with which models usually call it."""
    return {
        parameter.name: parameter.default
        for parameter in _parameters(module).values()
        if parameter.default is not parameter.empty
    }


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


def replace_forward(model: nn.Module, graph: fx.Graph) -> None:
    """Make ``graph`` the forward of ``model``, in place.

    The model becomes an instance of a subclass with that forward. It keeps its modules, their names and its other methods.
    """
    generated = fx.GraphModule(model, graph)
    forward: Callable[..., torch.Tensor] = type(generated).forward
    own = model.__class__
    body = {"forward": forward}
    model.__class__ = types.new_class(f"Quantized{own.__name__}", (MadeHere, own), {}, lambda space: space.update(body))


def called_module(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module of ``model`` that a node calls; None if it calls none."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def free_name(model: nn.Module, node: fx.Node, name: str) -> str:
    """A free path for a new module called ``name``, in the module whose forward has the node.

    For a node that calls a module, that module's name goes before ``name``. A number follows if the path is taken.
    """
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack]
    owner = paths[-1] if paths else ""
    if node.op == "call_module":
        owner = str(node.target).rpartition(".")[0]
        name = f"{str(node.target).rpartition('.')[2]}_{name}"
    parent = model.get_submodule(owner)
    unique, count = name, 1
    while hasattr(parent, unique):
        unique, count = f"{name}_{count}", count + 1
    return f"{owner}.{unique}" if owner else unique


def add_module(model: nn.Module, path: str, module: nn.Module) -> str:
    """Add ``module`` at a free ``path``, in its parent's mode and on the model's device. Returns the path."""
    owner, _, name = path.rpartition(".")
    parent = model.get_submodule(owner)
    parent.add_module(name, module.train(parent.training).to(next(model.parameters()).device))
    return path
