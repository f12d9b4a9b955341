"""The cost of a network: parameters and multiply-accumulates."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from effnet_quant.models.entry import ModelEntry


def measure_complexity(entry: ModelEntry) -> tuple[int, float | None]:
    """Number of parameters of a model, and of multiply-accumulates for one image of its default size.

    As usual, convolutions, linear layers and matrix products count; elementwise operations and pooling do not. The network
    runs on shapes alone. If its forward pass needs values, the multiply-accumulates are None.
    """
    model = entry.shapes().eval()
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    image = torch.zeros(1, 3, entry.input.image_size, entry.input.image_size, device=parameters[0].device)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image)
    except Exception:  # a network's own code may raise anything without values
        return count, None
    return count, counter.get_total_flops() / 2
