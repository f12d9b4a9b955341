"""Equalization: the float network stays, the rounded one comes nearer to it."""

import pytest
import torch
from torch import nn

from effnet_quant import UserError, calibrate, create_model, quantize
from effnet_quant.quantization.ptq.blocks import traced_graph
from effnet_quant.quantization.ptq.equalization import Equalization, apply_scales, equalize
from effnet_quant.quantization.ptq.step import StepContext
from effnet_quant.quantization.ptq.streams import find_streams
from quantization.ptq.networks import Residual, images, randomized


def streams_of(model, x):
    return find_streams(model, traced_graph(model), x)


def noise(model, reference, x):
    with torch.no_grad():
        return float((model(x) - reference).square().sum() / reference.square().sum())


def flattening():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1521, 4)
    )


@pytest.mark.parametrize("name", ["cifar-resnet20", "flattening", "torchvision:googlenet", "timm:tinynet_e"])
@torch.no_grad()
def test_any_scales_leave_the_float_network_as_it_is(name):
    torch.manual_seed(0)
    model = quantize(randomized(flattening() if name == "flattening" else create_model(name)))
    x = torch.randn(2, 3, *[64 if name.startswith("t") else 32] * 2)
    before, names = model(x), list(model.state_dict())
    streams = streams_of(model, x)
    scales = torch.empty(len(streams.fixed)).uniform_(0.5, 2)
    scales[torch.from_numpy(streams.fixed)] = 1
    scaled = sum(int((scales[torch.from_numpy(layer.writes)] != 1).sum()) for layer in streams.layers)
    apply_scales(streams, scales)
    assert scaled >= 8
    assert float((model(x) - before).norm() / before.norm()) < 1e-4
    assert list(model.state_dict()) == names


def test_a_residual_shortcut_shares_one_scale_and_relu6_and_silu_stop_scales():
    x = images()
    model = quantize(randomized(Residual(nn.ReLU)))
    by_name = {layer.name: layer for layer in streams_of(model, x).layers}
    assert (by_name["stem.0"].writes == by_name["project.0"].writes).all()
    assert (by_name["project.0"].writes == by_name["head.0"].reads).all()
    assert not set(by_name["depthwise.0"].reads) & set(by_name["depthwise.0"].writes)

    streams = streams_of(quantize(randomized(Residual(nn.SiLU))), x)
    free = {layer.name for layer in streams.layers if not streams.fixed[layer.writes].all()}
    assert free == set()  # the stem's SiLU fixes the shortcut, and with it what the projection adds

    model = quantize(randomized(Residual(nn.ReLU6)))
    with torch.no_grad():
        model.expand[1].bias[3] = 9.0  # this channel is cut off
        before = model(x)
        weight, bias = model.expand[1].weight.clone(), model.expand[1].bias.clone()
        equalize(model, [x])
        assert torch.equal(model.expand[1].weight, weight)
        assert equalize(model, [x], how=Equalization(headroom=1.25)) > 0
        assert model.expand[1].weight[3] == weight[3] and model.expand[1].bias[3] == bias[3]
        assert not torch.equal(model.expand[1].weight, weight)
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)


def test_badly_scaled_channels_lose_most_of_their_noise():
    x = images(64)
    model = randomized(Residual(nn.ReLU))
    with torch.no_grad():
        for norm, following in ((model.expand[1], model.depthwise[0]), (model.depthwise[1], model.project[0])):
            factor = torch.logspace(0, 2, 16)
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            columns = following.weight.shape[1] > 1
            following.weight.div_(factor.reshape(1, -1, 1, 1) if columns else factor.reshape(-1, 1, 1, 1))
        reference = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = calibrate(quantize(model), [x[:32]], "max")
    noise_before = noise(plain, reference[32:], x[32:])
    model = randomized(Residual(nn.ReLU))
    model.load_state_dict(state)
    quantize(model)
    Equalization()(model, [x[:32]])
    noise_after = noise(calibrate(model, [x[:32]], "max"), reference[32:], x[32:])
    assert noise_after < noise_before / 4


def test_calibrated_models_are_refused_and_nothing_to_scale_is_a_note():
    x = images()
    with pytest.raises(UserError, match="before the model is calibrated"):
        equalize(calibrate(quantize(randomized(Residual(nn.ReLU))), [x]), [x])
    said = []
    model = quantize(randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1))))
    before = model[0].weight.clone()
    assert equalize(model, [x], StepContext(progress=lambda title, done, total: said.append(title))) == 0
    assert torch.equal(model[0].weight, before) and said == ["equalization: nothing to scale"]
