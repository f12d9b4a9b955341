"""Quantizers of outputs: the file's grid is the simulation's, to the last bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from effnet_quant import calibrate, export_onnx, quantize
from effnet_quant.quantization.placement.insertion import output_quantizers
from effnet_quant.quantization.quantizer import AFFINE_UINT8, TensorQuantizer

LAYERS = 24


def grid(quantizer: TensorQuantizer) -> tuple[float, int]:
    return quantizer.scale.item(), int(quantizer.zero_point)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TensorQuantizer], Counter[tuple[float, int]]]:
    """Quantizers with random ranges, and the grids of a file of theirs."""
    layers = [layer for _ in range(LAYERS) for layer in (nn.Conv2d(3, 3, 1), nn.Sigmoid())]
    model = quantize(nn.Sequential(*layers, nn.Flatten()).eval())
    calibrate(model, [torch.randn(1, 3, 4, 4)])
    quantizers = list(output_quantizers(model))
    random = np.random.default_rng(0)
    for quantizer in quantizers:
        ends = torch.tensor(random.normal(size=2) * np.exp(random.uniform(-30, 30)), dtype=torch.float32).sort().values
        quantizer.set_range(*ends)
    path = Path(tmp_path_factory.mktemp("file"), "model.onnx")
    export_onnx(model, path, 4)
    graph = onnx.load(path).graph
    constants = {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}
    found = Counter(
        (float(constants[node.input[1]]), int(constants[node.input[2]]))
        for node in graph.node
        if node.op_type == "QuantizeLinear"
    )
    return quantizers, found


def test_the_file_has_the_simulations_scale_and_zero_point(
    pairs: tuple[list[TensorQuantizer], Counter[tuple[float, int]]],
) -> None:
    quantizers, found = pairs
    assert len(quantizers) >= LAYERS - 1
    assert Counter(map(grid, quantizers)) <= found


def test_onnx_rounds_on_this_grid_to_what_the_quantizer_gives(
    pairs: tuple[list[TensorQuantizer], Counter[tuple[float, int]]],
) -> None:
    for quantizer in pairs[0]:
        low, high = quantizer.range or (0, 0)
        scale, zero_point = grid(quantizer)
        assert scale == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=1e-6)
        x = torch.linspace(1.3 * min(low, -high), 1.3 * max(high, -low), 999)
        got = ReferenceEvaluator(quantize_dequantize(scale, zero_point)).run(None, {"x": x.numpy()})[0]
        np.testing.assert_array_equal(quantizer(x).numpy(), got)


def quantize_dequantize(scale: float, zero_point: int) -> onnx.ModelProto:
    helper, info = onnx.helper, onnx.helper.make_tensor_value_info
    constants = [np.array(scale, np.float32), np.array(zero_point, np.uint8)]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        "pair",
        [info("x", onnx.TensorProto.FLOAT, None)],
        [info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for value, name in zip(constants, ("scale", "zero"), strict=True)],
    )
    return helper.make_model(graph)


def test_state_dicts_have_a_range_once_there_is_one() -> None:
    quantizer = TensorQuantizer(AFFINE_UINT8, role="output").eval()
    assert not quantizer.state_dict()
    quantizer.load_state_dict({})
    quantizer.start_tracking()
    quantizer(torch.tensor([-3.0, 1.0]))
    assert not quantizer.state_dict()
    quantizer.stop_tracking()
    assert {name: value.item() for name, value in quantizer.state_dict().items()} == {"_low": -3.0, "_high": 1.0}
    twin = TensorQuantizer(AFFINE_UINT8, role="output").eval()
    assert twin.range is None
    twin.load_state_dict(quantizer.state_dict())
    assert twin.range == (-3.0, 1.0)
    assert torch.equal(twin(torch.tensor([0.1])), quantizer(torch.tensor([0.1])))
