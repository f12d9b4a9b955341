"""Traces a model with torch.fx, to find the operations that have no module of their own."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_quant.quantization.quantized_layers import QuantAdaptiveAvgPool2d, QuantAvgPool2d, QuantGate

# Modules that stay one node: they carry quantizers, or compute differently in training and evaluation.
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

    Returns:
        The graph, None if the model itself can't be traced, and the names.
    """
    opaque: set[str] = set()
    while True:
        try:
            return _Tracer(opaque).trace(model), sorted(opaque)
        except Exception:  # a model's own code may raise anything when it gets a proxy instead of a tensor
            found = _untraceable(model, "", opaque)
            if not found - opaque:
                return None, sorted(opaque)
            opaque |= found


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
    parameters = inspect.signature(module.forward).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def replace_forward(model: nn.Module, graph: fx.Graph) -> None:
    """Make ``graph`` the forward of ``model``, in place.

    The model becomes an instance of a subclass with that forward. It keeps its modules, their names and its other methods.
    """
    generated = fx.GraphModule(model, graph)
    forward: Callable[..., torch.Tensor] = type(generated).forward
    own = model.__class__
    model.__class__ = types.new_class(f"Quantized{own.__name__}", (own,), {}, lambda body: body.update(forward=forward))


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
