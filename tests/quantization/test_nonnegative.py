"""Quantizers that negative values never reach, and the grids that targets have for them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effnet_quant import calibrate, create_model, quantize, simulate_target
from effnet_quant.quantization.placement.insertion import quantizers

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class LessThanReLU(nn.ReLU):
    """Negative after all."""

    def forward(self, x):
        return super().forward(x) - 0.5


def subtract_in_place(x):
    y = F.relu(x)
    y.sub_(1)
    return y


class Network(nn.Module):
    """One convolution, ``between``, and a second one."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize(
    "between",
    [
        nn.ReLU(), nn.ReLU6(), nn.Sigmoid(), nn.Hardsigmoid(), nn.Softmax(1), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Identity(), nn.Dropout(0.1)),
        nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        lambda x: torch.cat([F.relu(x), x.sigmoid()], dim=-1), lambda x: F.relu(x).squeeze(0).unsqueeze(0),
        F.relu, F.relu6, torch.sigmoid, F.hardsigmoid, lambda x: F.relu(x, inplace=True), lambda x: x.relu_(),
        lambda x: F.max_pool2d(F.relu(x), 2), lambda x: F.pad(F.relu(x), (1, 1)), lambda x: F.relu(x)[:, :, ::2],
        lambda x: F.relu(x) + F.relu6(x), lambda x: 2 * F.relu(x), lambda x: F.relu(x) + 1,
        lambda x: torch.cat([F.relu(x), x.sigmoid()], 2), lambda x: F.relu(x) * torch.sigmoid(x),
        lambda x: F.dropout(F.relu(x), 0.0), lambda x: F.relu(x).mean((2, 3), keepdim=True),
    ],
)  # fmt: skip
def test_what_keeps_negative_values_away(between):
    model = quantize(Network(between))
    assert model.second._input_quantizer.never_negative
    assert not model.first._input_quantizer.never_negative
    assert not any(quantizer.never_negative for _, quantizer in quantizers(model) if quantizer.role == "weight")


@pytest.mark.parametrize(
    "between",
    [
        LessThanReLU(), subtract_in_place,
        F.silu, F.hardswish, F.gelu, F.leaky_relu, lambda x: x, lambda x: F.relu(x) - 1, lambda x: F.relu(x) + -1,
        lambda x: -F.relu(x), lambda x: F.relu(x) + x, lambda x: -1 * F.relu(x),
        lambda x: F.pad(F.relu(x), (1, 1), value=-1.0),
        lambda x: torch.cat([F.relu(x), x], 2), lambda x: torch.add(F.relu(x), F.relu(x), alpha=-1),
    ],
)  # fmt: skip
def test_what_lets_them_pass(between):
    assert not quantize(Network(between)).second._input_quantizer.never_negative


def test_a_quantizer_that_is_called_twice_takes_both_inputs_into_account():
    class Shared(Network):
        def forward(self, x):
            x = self.first(x)
            return self.second(F.relu(x)) + self.second(x)

    assert not quantize(Shared(None)).second._input_quantizer.never_negative


def test_a_layer_that_an_opaque_module_calls_too_is_left_alone():
    class Opaque(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else self.layer(-x)

    class Shared(Network):
        def __init__(self):
            super().__init__(None)
            self.opaque = Opaque(self.second)

        def forward(self, x):
            x = self.first(x)
            return self.second(F.relu(x)) + self.opaque(x)

    with pytest.warns(UserWarning, match="opaque.*can't be traced"):
        model = quantize(Shared())
    assert not model.second._input_quantizer.never_negative


def test_targets_with_unsigned_integers_halve_the_step_behind_a_relu():
    model = calibrate(quantize(create_model("cifar-resnet20"), target="tensorrt"), [IMAGES], method="max")
    before = copy.deepcopy(model.state_dict())
    behind_relu, image = model.layer1[0].conv1._input_quantizer, model.conv1._input_quantizer
    x = torch.linspace(0, 1, 1001) * behind_relu.amax * 1.1
    signed = behind_relu(x)
    for target in ("onnxruntime", "openvino"):
        simulate_target(model, target)
        unsigned = behind_relu(x)
        assert (signed.unique().numel(), unsigned.unique().numel()) == (128, 256)
        assert unsigned.max() == pytest.approx(signed.max())
        assert (unsigned - x)[x < behind_relu.amax].abs().max() <= behind_relu.amax / 255 / 2 * 1.0001
        assert image.spec.bounds == (-128, 127)
        assert "uint8" in repr(behind_relu)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(simulate_target(model, "tensorrt").layer1[0].conv1._input_quantizer(x), signed)


@pytest.mark.parametrize("spec", ["w8a8-affine", "w8a16", "w4a4"])
def test_other_grids_stay_as_they_are_given(spec):
    model = quantize(create_model("cifar-resnet20"), spec, target="onnxruntime")
    bounds = {quantizer.spec.bounds for name, quantizer in quantizers(model) if quantizer.role == "input"}
    assert bounds == {"w8a8-affine": {(0, 255)}, "w8a16": {(-32768, 32767)}, "w4a4": {(0, 15)}}[spec]


def test_learned_ranges_train_on_the_unsigned_grid():
    model = calibrate(quantize(create_model("cifar-resnet20"), "w8a8-lsq"), [IMAGES], method="max").train()
    model(IMAGES).square().sum().backward()
    learned = model.layer2[0].conv2._input_quantizer
    assert learned.spec.bounds == (0, 255)
    assert learned._amax.grad.abs() > 0
