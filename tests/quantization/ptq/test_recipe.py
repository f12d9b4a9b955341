"""ptq: recipes by name and as lists of steps; bad input."""

import pytest
import torch
from torch import nn

import effnet_quant
from effnet_quant import UserError, create_model, ptq
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.ptq.bias_correction import BiasCorrection
from effnet_quant.quantization.ptq.calibration_choice import Calibration
from effnet_quant.quantization.recipe import RECIPES
from quantization.ptq.networks import Residual, images, randomized


def resnet():
    torch.manual_seed(0)
    return randomized(create_model("cifar-resnet20"))


def noise(model, reference, x):
    with torch.no_grad():
        return float((model(x) - reference).square().sum() / reference.square().sum())


def test_standard_beats_minmax_and_its_weights_load():
    x, unseen = images(32, 16), images(32, 16, seed=9)
    with torch.no_grad():
        reference = resnet()(unseen)
    minmax = noise(ptq(resnet(), x.split(16), recipe="minmax"), reference, unseen)
    said = []
    model = ptq(resnet(), x.split(16), progress=lambda *part: said.append(part))
    assert noise(model, reference, unseen) < minmax
    titles = {title for title, _, _ in said}
    assert {"equalization", "calibration", "ranges", "bias correction"} <= titles
    assert all(0 <= done <= total for _, done, total in said)

    again = create_model("cifar-resnet20", quantized=True).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(unseen), model(unseen))


def test_the_same_seed_gives_the_same_bits_and_batches_of_one_will_do():
    x = images(16)
    models = [ptq(randomized(Residual(nn.ReLU6)), batches) for batches in ([x], [x], x.split(1))]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert all(quantizer.calibrated for _, quantizer in quantizers(models[2]))


def test_a_list_of_steps_runs_in_turn():
    x = images(16)
    model = ptq(randomized(Residual(nn.SiLU)), [x], recipe=[Calibration("mse"), BiasCorrection(examples=8)])
    assert all(quantizer.calibrated for _, quantizer in quantizers(model))
    assert effnet_quant.ptq is ptq and "standard" in RECIPES


@pytest.mark.parametrize(
    ("batches", "recipe", "message"),
    [
        ([images(4)], "standard", "at least 8 calibration images, not 4"),
        ([images(8).fill_(float("nan"))], "standard", "NaN"),
        ([images(8)[:, :1]], "minmax", "check their size and channels"),
        ([images(8, 8), images(8, 12)], "standard", "several shapes"),
        ([], "standard", "no images"),
        ([images(8)], "best", "no PTQ recipe 'best'"),
        ([images(8)], ["standard"], "Equalization"),
    ],
)
def test_bad_input_is_one_sentence(batches, recipe, message):
    with pytest.raises(UserError, match=message):
        ptq(randomized(Residual(nn.ReLU)), batches, recipe=recipe)
