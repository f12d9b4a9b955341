"""What a network costs: parameters and multiply-accumulates."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from effnet_quant.models.entry import ModelEntry


def measure_complexity(entry: ModelEntry) -> tuple[int, float | None]:
    """Parameters of a model, and multiply-accumulates of one image at its default size.

    Convolutions, linear layers and matrix products count, elementwise operations and pooling do not, as is usual. The
    multiply-accumulates are None for a network whose forward pass needs values: it is run on shapes alone.
    """
    model = entry.shapes().eval()
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    image = torch.zeros(1, 3, entry.input.image_size, entry.input.image_size, device=parameters[0].device)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image)
    except Exception:  # any error that a network's own code raises without values
        return count, None
    return count, counter.get_total_flops() / 2
