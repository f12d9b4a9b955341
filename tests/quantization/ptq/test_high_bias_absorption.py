"""High-bias absorption: the same network with smaller activations."""

import pytest
import torch
from torch import nn

from effnet_quant import quantize
from effnet_quant.quantization.ptq.blocks import traced_graph
from effnet_quant.quantization.ptq.high_bias_absorption import absorb_high_biases
from effnet_quant.quantization.ptq.streams import find_streams
from quantization.ptq.networks import images, randomized


@pytest.mark.parametrize(("padding", "changed"), [(0, 3), (1, 0)])
@torch.no_grad()
def test_a_channel_far_above_zero_moves_into_the_next_layer(padding, changed):
    model = randomized(
        nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=padding), nn.BatchNorm2d(4)
        )
    )
    x = images(16)
    model[1].bias[:3] = torch.tensor([20.0, 30.0, 40.0])
    model[1].bias[3:] = 0.0
    quantize(model)
    before, largest = model(x), float(model[2](model[1](model[0](x))).max())
    streams = find_streams(model, traced_graph(model), x)
    low = model[1](model[0](x)).amin((0, 2, 3))
    assert absorb_high_biases(model, streams, {streams.layers[0].result: low}) == changed
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    after = float(model[2](model[1](model[0](x))).max())
    assert after < largest / 2 if changed else after == largest
