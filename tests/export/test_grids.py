"""Grids other than the default's leave PyTorch as the integers they are."""

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from effnet_quant import UserError, calibrate, quantize
from effnet_quant.export.onnx import build_onnx
from effnet_quant.quantization.placement.insertion import quantizers, simulate_target
from effnet_quant.quantization.spec import QuantSpec, TensorSpec


def network(spec: str | QuantSpec) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    model[1].weight.data[::2] *= -1
    quantize(model, spec).eval()
    for _, quantizer in quantizers(model):
        if quantizer.spec.symmetric:
            quantizer.set_amax(torch.tensor(1.3))
        else:
            quantizer.set_range(torch.tensor(-0.4), torch.tensor(1.3))
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "spec",
    [
        "w8a8-affine",
        "w7a8",
        "w4a8",
        "w4a4",
        "w8a16",
        QuantSpec(activation=TensorSpec(bits=16, narrow=True)),
        QuantSpec(activation=TensorSpec(bits=16, symmetric=False, signed=False)),
        QuantSpec(weight=TensorSpec(), activation=TensorSpec(signed=False)),
        QuantSpec(weight=TensorSpec(narrow=True), activation=TensorSpec(narrow=True)),
        QuantSpec(weight=TensorSpec(bits=7, symmetric=False)),
        QuantSpec(weight=TensorSpec(bits=4, symmetric=False, signed=False)),
    ],
    ids=str,
)
def test_the_graph_computes_the_simulation(spec: str | QuantSpec) -> None:
    model, x = simulate_target(network(spec), "openvino"), torch.randn(4, 3, 9, 9)
    # the target that adds no quantizers of its own
    graph = build_onnx(model, 9, target="openvino")
    graph.opset_import[0].version = 21  # the reference starts at 19; these operators mean the same in both
    (got,) = ReferenceEvaluator(graph).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(got, model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_what_a_runtime_can_not_store_is_said() -> None:
    with pytest.raises(UserError, match="takes no zero point"):
        build_onnx(network("w8a8-affine"), 9, target="tensorrt")
    with pytest.raises(UserError, match="8 bits or fewer"):
        build_onnx(network("w8a16"), 9, target="tensorrt")
    with pytest.raises(UserError, match="a symmetric grid of 8 bits"):
        build_onnx(network(QuantSpec(weight=TensorSpec(bits=16))), 9)


@torch.no_grad()
@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_channels_that_batch_norm_switches_off_leave_no_step_of_zero(target: str) -> None:
    """timm's ResNets start with a BatchNorm of zeros at the end of every block."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten()).eval()
    model[1].weight.copy_(torch.tensor([0.0, 1.0, 0.0, 1e-45]))
    model[1].bias.copy_(torch.tensor([0.5, 0.1, 0.0, 0.3]))
    x = torch.rand(4, 3, 3, 3)
    calibrate(quantize(model, target=target), [x], method="max")
    with np.errstate(all="raise", under="ignore"):
        graph = build_onnx(model, 3, target=target)
    scales = {name for node in graph.graph.node if "Linear" in node.op_type for name in node.input[1:2]}
    assert all((numpy_helper.to_array(entry) > 0).all() for entry in graph.graph.initializer if entry.name in scales)
    graph.opset_import[0].version = 21
    (got,) = ReferenceEvaluator(graph).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(got, model(x).numpy(), rtol=1e-3, atol=1e-5)


def test_weights_that_int8_with_zero_point_0_does_not_hold_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^0: weights on the grid -60 … 195 can't be exported; give weights a symmetric"
    ):
        build_onnx(network(QuantSpec(weight=TensorSpec(symmetric=False))), 9)
