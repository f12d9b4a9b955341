"""Quantizes the gates of SiLU and hard-swish, as QuantGate simulates them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effnet_quant.export.traced_graph import Grid, TracedGraph, module_path
from effnet_quant.quantization.quantizer import AFFINE_UINT8, TensorQuantizer

aten = torch.ops.aten
_simulated = TensorQuantizer(AFFINE_UINT8, role="gate")
GATE = Grid(_simulated.scale, int(_simulated.zero_point), *AFFINE_UINT8.bounds)
_GATES: dict[Any, Any] = {aten.silu.default: aten.sigmoid.default, aten.hardswish.default: aten.hardsigmoid.default}


def join_silu(traced: TracedGraph) -> None:
    """Replace x * sigmoid(x) by SiLU, if nothing else takes the sigmoid."""
    for node in traced.operations():
        if node.target is not aten.mul.Tensor:
            continue
        for x, gate in (node.args[:2], node.args[1::-1]):
            joined = isinstance(gate, fx.Node) and gate.target is aten.sigmoid.default and len(gate.users) == 1
            if joined and gate.args[0] is x:  # type: ignore[union-attr]
                node.target, node.args = aten.silu.default, (x,)
                traced.graph.erase_node(gate)  # type: ignore[arg-type]
                break


def round_gates(traced: TracedGraph) -> None:
    """Write each SiLU and hard-swish with an input of 8 bits as a product of the input and a quantized gate.

    The gate of SiLU is a sigmoid, in integers a table of 256 entries. The gate of hard-swish is a hard sigmoid.
    """
    for node in traced.operations():
        x = node.args[0] if node.target in _GATES else None
        if not traced.is_byte(x):
            continue
        assert isinstance(x, fx.Node)
        gate = traced.insert_after(x, _GATES[node.target], (x,), node, module_path(node))
        rounded = traced.quantize(gate, GATE, f"{module_path(node)}.gate")
        node.target, node.args = aten.mul.Tensor, (x, rounded)
