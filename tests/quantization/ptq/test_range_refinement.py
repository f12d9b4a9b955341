"""Range refinement: less error in what the layer computes."""

import torch
from torch import nn

from effnet_quant import calibrate, quantize
from effnet_quant.quantization.ptq.range_refinement import RangeRefinement
from quantization.ptq.networks import images, randomized


def network():
    return randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))


@torch.no_grad()
def test_an_outlier_that_the_layer_ignores_is_clipped():
    x = images(32)
    x[0, 2, 0, 0] = 200.0
    model = network()
    model[0].weight[:, 2] = 0  # nothing depends on the third channel
    wanted = model(x)
    calibrate(quantize(model, target="openvino"), [x], "max")
    before = float((model(x) - wanted).square().mean())
    RangeRefinement()(model, [x])
    after = float((model(x) - wanted).square().mean())
    assert model[0]._input_quantizer.amax < 30
    assert after < before / 20


@torch.no_grad()
def test_narrow_weights_follow_the_output_and_wide_ones_stay():
    x = images(64)
    for spec, moves in (("w4a8", True), ("w8a8", False)):
        model = network()
        with torch.no_grad():
            model[0].weight[:, 2, 0, 0] = 3.0
            x[:, 2] *= 0.01  # the large weights hardly matter
        wanted = model(x[32:])
        calibrate(quantize(model, spec, target="openvino"), [x[:32]], "max")
        amax = model[0]._weight_quantizer.amax.clone()
        before = float((model(x[32:]) - wanted).square().mean())
        RangeRefinement()(model, [x[:32]])
        assert bool((model[0]._weight_quantizer.amax < amax).any()) == moves
        assert not moves or float((model(x[32:]) - wanted).square().mean()) < before / 2
