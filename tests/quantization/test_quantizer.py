"""TensorQuantizer and the placement of quantizers in a model."""

import copy

import pytest
import torch
from torch import nn

from effnet_quant import UserError, calibrate, quantize
from effnet_quant.models.efficientnet import B0_STAGES, EfficientNet, MBConv, _repeated
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.quantized_layers import QuantConv2d
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.spec import QuantSpec, SpecLookup, TensorSpec


def block() -> nn.Module:
    """An MBConv with a shortcut: every kind of place a quantizer may have."""
    torch.manual_seed(0)
    return MBConv(
        _repeated(B0_STAGES[0]), wide_se=False, se_as_conv=True, drop_probability=0.0, bn_momentum=0.1, bn_epsilon=1e-3
    )


def calibrated_block() -> nn.Module:
    return calibrate(quantize(block()), [torch.randn(4, 16, 8, 8)])


def test_without_a_range_the_input_passes() -> None:
    quantizer = TensorQuantizer(TensorSpec())
    x = torch.randn(5)
    assert quantizer(x) is x
    assert not quantizer.calibrated


def test_set_amax_switches_on_and_refuses_nonsense() -> None:
    quantizer = TensorQuantizer(TensorSpec())
    for bad in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="finite"):
            quantizer.set_amax(torch.tensor(bad))
    assert not quantizer.enabled
    quantizer.set_amax(torch.tensor(127.0))
    assert quantizer(torch.tensor([1.4, 200.0])).tolist() == [1.0, 127.0]
    assert "amax=127" in repr(quantizer)


def test_a_loaded_range_switches_on_and_an_unset_one_does_not() -> None:
    source, twin = calibrated_block(), quantize(block())
    twin.load_state_dict(source.state_dict())
    assert all(quantizer.enabled for _, quantizer in quantizers(twin))
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(twin.eval()(x), source.eval()(x))
    twin.load_state_dict(quantize(block()).state_dict())
    assert not any(quantizer.enabled for _, quantizer in quantizers(twin))


def test_deepcopy_is_independent() -> None:
    model = calibrated_block()
    duplicate = copy.deepcopy(model)
    first = dict(quantizers(duplicate))["residual_quantizer"]
    first.set_amax(torch.tensor(99.0))
    assert dict(quantizers(model))["residual_quantizer"].amax != 99.0


def test_quantizing_keeps_parameters_and_results_until_calibration() -> None:
    model = block().eval()
    x = torch.randn(2, 16, 8, 8)
    before, parameters = model(x), dict(model.named_parameters())
    assert quantize(model) is model
    assert {name: id(value) for name, value in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert torch.equal(model(x), before)


def test_every_kind_of_place_gets_a_quantizer() -> None:
    names = [name for name, _ in quantizers(quantize(block()))]
    assert names == [
        "depsep.conv._input_quantizer",
        "depsep.conv._weight_quantizer",
        "se.pooling._input_quantizer",
        "se.squeeze._input_quantizer",
        "se.squeeze._weight_quantizer",
        "se.expand._input_quantizer",
        "se.expand._weight_quantizer",
        "se.mul_a_quantizer",
        "se.mul_b_quantizer",
        "proj.conv._input_quantizer",
        "proj.conv._weight_quantizer",
        "residual_quantizer",
    ]


def test_the_twin_of_a_convolution_computes_on_quantized_input_and_weights() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect")
    twin = QuantConv2d.from_float(conv, SpecLookup(QuantSpec()), "conv")
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(twin(x), conv(x))
    twin._input_quantizer.set_amax(x.abs().max())
    twin._weight_quantizer.set_amax(conv.weight.detach().abs().amax((1, 2, 3), keepdim=True))
    grid_x = (x * 127 / x.abs().max()).round() * x.abs().max() / 127
    step = conv.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
    grid_w = (conv.weight / step).round() * step
    with torch.no_grad():
        expected = nn.functional.conv2d(
            nn.functional.pad(grid_x, (1, 1, 1, 1), mode="reflect"), grid_w, conv.bias, 2, 0, 2, 2
        )
        torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5)


def test_quantizing_twice_or_nothing_or_with_an_unknown_preset_is_an_error() -> None:
    with pytest.raises(UserError, match="quantized already"):
        quantize(quantize(block()))
    with pytest.raises(UserError, match="no convolution"):
        quantize(nn.Sequential(nn.ReLU()))
    with pytest.raises(UserError, match=r"no quantization preset 'w1a1'.*w8a8"):
        quantize(block(), "w1a1")


def test_training_moves_weights_but_not_ranges() -> None:
    model = calibrated_block().train()
    ranges = {name: quantizer.amax.clone() for name, quantizer in quantizers(model)}
    weight = model.proj.conv.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 16, 8, 8)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    assert not torch.equal(weight, model.proj.conv.weight)
    assert all(torch.equal(ranges[name], quantizer.amax) for name, quantizer in quantizers(model))


@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
def test_compiles_without_graph_breaks_and_computes_the_same(training: bool) -> None:
    model = calibrated_block().train(training)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    x = torch.randn(4, 16, 8, 8)
    got, expected = compiled(x), model(x)
    # another order of the same float operations may move a value by one step of a grid
    assert ((got - expected).norm() / expected.norm()).item() < 1e-2
    if training:
        got.square().mean().backward()
        expected.square().mean().backward()
        for parameter, twin in zip(model.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, twin.grad, rtol=0.1, atol=1e-2)


@pytest.mark.slow  # a block of it, compiled, is above
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", [0.1, 1.0], ids=["a block a stage", "b0"])
def test_the_whole_network_is_one_graph(training: bool, depth: float) -> None:
    model = quantize(EfficientNet(depth=depth, num_classes=10, se_as_conv=True))
    for _, quantizer in quantizers(model):
        quantizer.set_amax(torch.tensor(3.0))
    model.train(training)
    explained = torch._dynamo.explain(model)(torch.zeros(2, 3, 32, 32))
    assert explained.graph_break_count == 0


def test_quantizers_work_under_autocast() -> None:
    model = calibrated_block().eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x)
    with torch.no_grad():
        full = model(x)
    assert mixed.dtype in (torch.bfloat16, torch.float32)
    assert ((mixed.float() - full).norm() / full.norm()).item() < 0.1
