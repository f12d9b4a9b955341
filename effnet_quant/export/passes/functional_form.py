"""Replaces in-place operations by functional ones and removes identities."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effnet_quant.export.traced_graph import TracedGraph, kind_of
from effnet_quant.quantization.operation_kinds import Kind

aten = torch.ops.aten


def make_functional(traced: TracedGraph) -> None:
    """Replace ``relu_`` by ``relu`` and so on. Later users of the changed tensor take the result instead.

    Operations without effect in eval mode (Kind.IDENTITY) are removed.
    """
    place = {node: index for index, node in enumerate(traced.graph.nodes)}
    for node in traced.operations():
        if Kind.IDENTITY in kind_of(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            traced.graph.erase_node(node)
            continue
        twin = _functional(node)
        if twin is None:
            continue
        node.target = twin
        changed = node.args[0]
        assert isinstance(changed, fx.Node)
        for user in list(changed.users):
            if place[user] > place[node]:
                user.replace_input_with(changed, node)


def _functional(node: fx.Node) -> Any:
    """The functional overload of an in-place operation; None for other operations."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return None
    name, overload = node.target._schema.name.removeprefix("aten::"), node.target._overloadname
    if not name.endswith("_") or name.startswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    return None if packet is None else getattr(packet, overload, None)
