"""Bias correction: the mean of each output channel is the float network's."""

import torch
from torch import nn

from effnet_quant import calibrate, quantize
from effnet_quant.quantization.ptq.bias_correction import BiasCorrection
from quantization.ptq.networks import Residual, images, randomized

NORMED = ("stem.1", "expand.1", "depthwise.1", "project.1")
LAYERS = (*NORMED, "head.0", "classifier")


@torch.no_grad()
def means(model, x):
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, _, output, name=name: found.update(
                {name: output.double().transpose(0, 1).flatten(1).mean(1)}
            )
        )
        for name in LAYERS
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def test_means_become_those_of_the_float_network_and_only_biases_change():
    x = images(32)
    wanted = means(randomized(Residual(nn.ReLU)), x)
    model = calibrate(quantize(randomized(Residual(nn.ReLU)), "w4a4", target="openvino"), [x], "max")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = means(model, x)
    BiasCorrection()(model, x.split(16))
    after = means(model, x)
    for name in LAYERS:
        off = float((before[name] - wanted[name]).abs().max())
        assert off > 1e-3
        assert float((after[name] - wanted[name]).abs().max()) < max(1e-5, 1e-3 * off), name
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == {f"{name}.bias" for name in LAYERS}
