"""Compensated rounding: OBQ's update in the order of the inputs' energy, for every kind of layer."""

import numpy as np
import pytest
import torch
from torch import nn

from effnet_quant import calibrate, export_onnx, load_engine, quantize
from effnet_quant.quantization.ptq.compensated_rounding import CompensatedRounding, _columns
from effnet_quant.quantization.quantized_layers import QuantConv2d
from quantization.ptq.networks import Residual, images, randomized


def greedy(row, moments, scale, low, high):
    """OBQ (Frantar and Alistarh 2022): round one weight, move the rest by the inverse of their own moments."""
    size = len(row)
    moments = moments + 0.01 * moments.diagonal().mean() * np.eye(size)
    row, left = row.copy(), list(np.argsort(-moments.diagonal(), kind="stable"))
    while left:
        inverse = np.linalg.inv(moments[np.ix_(left, left)])
        value = scale * np.clip(np.round(row[left[0]] / scale), low, high)
        row[left] -= (row[left[0]] - value) / inverse[0, 0] * inverse[:, 0]
        row[left[0]] = value
        left.pop(0)
    return row


@torch.no_grad()
def test_a_linear_layer_is_rounded_by_obqs_update():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 0.5
    model = nn.Sequential(nn.Linear(12, 7)).eval()
    weight = model[0].weight.clone()
    calibrate(quantize(model, "w4a8", target="openvino"), [x], "max")
    rounded = model[0]._input_quantizer(x).double()
    nearest = model(x)
    CompensatedRounding(earlier=0.0)(model, [x])
    scale = model[0]._weight_quantizer.scale.flatten()
    moments = (rounded.T @ rounded).numpy()
    expected = [
        greedy(w, moments, s, -8, 7) for w, s in zip(weight.double().numpy(), scale.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(model[0].weight.numpy(), np.stack(expected), atol=1e-6)
    assert torch.equal(model[0]._weight_quantizer(model[0].weight), model[0].weight)
    wanted = x @ weight.T + model[0].bias
    assert (model(x) - wanted).square().sum() < 0.7 * (nearest - wanted).square().sum()


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": (0, 2), "stride": (2, 1), "groups": 3},
        {"groups": 6, "padding": 1, "padding_mode": "reflect"},
    ],
)
@torch.no_grad()
def test_columns_times_weights_are_the_convolution(options):
    torch.manual_seed(0)
    layer = QuantConv2d(6, 12, 3, bias=False, **options)
    layer._input_quantizer = layer._weight_quantizer = nn.Identity()
    x = torch.randn(2, 6, 9, 8)
    columns = _columns(layer, x, 1e9)
    rows = layer.weight.reshape(layer.groups, -1, columns.shape[2])
    products = torch.einsum("pgk,gok->pgo", columns, rows).flatten(1)
    torch.testing.assert_close(products, layer(x).movedim(1, -1).flatten(0, -2))
    few = _columns(layer, x, 9.0)
    assert 0 < len(few) < len(columns)
    assert all((columns == row).flatten(1).all(1).any() for row in few)


@torch.no_grad()
def test_the_networks_outputs_come_nearer_and_the_file_holds_what_was_chosen(tmp_path):
    x = images(48)
    wanted = randomized(Residual(nn.ReLU))(x)

    def error(model):
        return float((model(x) - wanted).square().sum())

    model = calibrate(quantize(randomized(Residual(nn.ReLU)), "w4a8"), [x], "max")
    nearest = error(model)
    ranges = {name: value.clone() for name, value in model.state_dict().items() if "_amax" in name}
    CompensatedRounding()(model, x.split(16))
    assert error(model) < 0.5 * nearest
    assert all(torch.equal(model.state_dict()[name], value) for name, value in ranges.items())
    export_onnx(model, tmp_path / "w4.onnx", x.shape[-1])
    engine = load_engine(tmp_path / "w4.onnx")
    assert float((torch.from_numpy(engine(x.numpy())) - model(x)).norm()) < 0.02 * float(model(x).norm())


@torch.no_grad()
def test_a_layer_without_inputs_of_any_size_is_rounded_to_the_nearest():
    model = nn.Sequential(nn.ReLU(), nn.Linear(5, 3)).eval()
    x = -torch.ones(4, 5)
    calibrate(quantize(model, "w4a8", target="openvino"), [torch.ones(4, 5)], "max")
    expected = model[1]._weight_quantizer(model[1].weight)
    CompensatedRounding()(model, [x])
    assert torch.equal(model[1].weight, expected)
