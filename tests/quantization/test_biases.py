"""Biases as int32: what ONNX Runtime's integer layers add, in the simulation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from effnet_quant import calibrate, create_model, export_onnx, load_engine, quantize, simulate_target
from effnet_quant.quantization.batch_norm import factor_and_offset
from effnet_quant.quantization.biases import FoldedBatchNorm2d, accumulator_step

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network(*, conv_bias):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=conv_bias), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    norm = model[1]  # one negative factor, one of zero
    norm.weight.data = torch.tensor([1.0, -0.5, 0.0, 2.0, 1.5, 0.7, 0.9, 1.1])
    norm.bias.data.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return calibrate(quantize(model.eval()), [IMAGES], method="max")


def folded(model):
    """The bias that conv and BatchNorm have together, and the step of its integers."""
    conv, norm = model[0], model[1]
    factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).double()
    inner = 0 if conv.bias is None else conv.bias.double()
    return norm.bias.double() + factor * (inner - norm.running_mean.double()), factor, accumulator_step(conv)


@torch.no_grad()
def test_a_batch_norm_is_a_factor_and_an_offset():
    norm = network(conv_bias=False)[1]
    x = torch.randn(5, 8, dtype=torch.float64)
    factor, offset = factor_and_offset(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    assert factor.dtype == offset.dtype == torch.float64
    own = [value.double() for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    torch.testing.assert_close(factor * x + offset, nn.functional.batch_norm(x, *own, eps=norm.eps), rtol=0, atol=1e-13)


@pytest.mark.parametrize("conv_bias", [False, True])
@torch.no_grad()
def test_batch_norm_and_convolution_have_one_rounded_bias(conv_bias):
    model = network(conv_bias=conv_bias)
    conv, norm = model[0], model[1]
    assert isinstance(norm, FoldedBatchNorm2d)
    bias, factor, step = folded(model)
    step = step * factor.abs()
    rounded = torch.where(step > 0, torch.round(bias / step) * step, bias)
    assert (rounded != bias).sum() == 7
    sums = nn.functional.conv2d(conv._input_quantizer(IMAGES).double(), conv._weight_quantizer(conv.weight).double())
    expected = sums * factor[:, None, None] + rounded[:, None, None]
    torch.testing.assert_close(norm(conv(IMAGES)).double(), expected, rtol=0, atol=2e-6)
    unrounded = simulate_target(copy.deepcopy(model), "openvino")
    assert (unrounded[1](unrounded[0](IMAGES)) - expected).abs().max() > 1e-5


@torch.no_grad()
def test_layers_without_batch_norm_round_their_own():
    model = network(conv_bias=False)
    for layer, x in ((model[3], torch.rand(2, 8, 4, 4)), (model[7], torch.rand(2, 8))):
        step = accumulator_step(layer)
        rounded = (torch.round(layer.bias.double() / step) * step).float()
        assert not torch.equal(rounded, layer.bias)
        silent = torch.zeros_like(x)
        assert torch.equal(layer(silent).flatten(1)[0].reshape(len(rounded), -1)[:, 0], rounded)
        assert torch.equal(layer.train()(silent).flatten(1)[0].reshape(len(rounded), -1)[:, 0], layer.bias)
        layer.eval()


@torch.no_grad()
def test_the_engine_computes_what_the_simulation_does(tmp_path):
    model = network(conv_bias=True)
    export_onnx(model, tmp_path / "model.onnx", 16)
    logits = torch.from_numpy(load_engine(tmp_path / "model.onnx")(IMAGES.numpy()))
    torch.testing.assert_close(logits, model(IMAGES), rtol=0, atol=1e-6)


def test_a_batch_norm_that_is_frozen_in_training_learns_its_bias():
    model = network(conv_bias=False).train()
    model[1].eval()
    values = model[0](IMAGES)
    reference = nn.functional.batch_norm(
        values, model[1].running_mean, model[1].running_var, model[1].weight, model[1].bias, eps=model[1].eps
    )
    assert torch.equal(model[1](values), reference)
    model.eval()
    model[1](values).sum().backward()
    assert model[1].bias.grad.abs().min() > 0  # straight through in eval mode too


def test_training_other_targets_and_wider_grids_are_left_alone():
    model = network(conv_bias=False)
    reference = copy.deepcopy(model)
    reference[1].__class__ = nn.BatchNorm2d
    values = IMAGES.repeat(1, 3, 1, 1)[:, :8]
    assert torch.equal(model.train()[1](values), reference.train()[1](values))
    wide = calibrate(quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "w8a16"), [IMAGES])
    assert accumulator_step(wide[0]) is None
    uncalibrated = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    assert accumulator_step(uncalibrated[0]) is None


def test_state_dicts_and_names_stay():
    names = set(create_model("cifar-resnet20").state_dict())
    model = quantize(create_model("cifar-resnet20"))
    assert names <= set(model.state_dict())
    assert {name for name in model.state_dict() if "quantizer" not in name} == names
    assert sum(isinstance(module, FoldedBatchNorm2d) for module in model.modules()) == 19
    twin = copy.deepcopy(model)
    assert twin.bn1._layer[0] is twin.conv1
