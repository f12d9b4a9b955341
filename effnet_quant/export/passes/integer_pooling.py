"""Moves quantize nodes from behind max pooling to its input, for runtimes that pool integers."""

from __future__ import annotations

import torch
from torch import fx

from effnet_quant.export.traced_graph import TracedGraph, module_path

aten = torch.ops.aten


def pool_integers(traced: TracedGraph) -> None:
    """Quantize the input of max pooling instead of its output, if nothing else takes the output. Results stay the same.

    The convolution in front then writes integers. The pooled value keeps the quantizer's name (``meta["quantizer"]``), so
    that layer comparison finds it.
    """
    for node in traced.operations():
        pool = node.args[0] if traced.is_quantized(node) else None
        if not isinstance(pool, fx.Node) or pool.target is not aten.max_pool2d.default or len(pool.users) != 1:
            continue
        source = pool.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(pool)
        pool.meta["quantizer"] = module_path(node)
        node.replace_input_with(pool, source)
        node.meta = {"val": source.meta["val"], "path": f"{module_path(pool)}.rounded"}
        pool.prepend(node)
        pool.replace_input_with(source, node)
