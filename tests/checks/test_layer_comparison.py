"""The table that points at the first layer in which an engine departs from its simulation."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from effnet_quant import UserError, calibrate, create_model, export_onnx, load_engine, quantize
from effnet_quant.card import SIGNATURE_KEY
from effnet_quant.checks.layer_comparison import compare_layers, format_layers
from effnet_quant.quantization.placement.insertion import quantizers, simulate_target

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return calibrate(quantize(create_model("cifar-resnet20").eval()), [IMAGES], method="max")


@pytest.fixture
def path(model: torch.nn.Module, tmp_path: Path) -> Path:
    export_onnx(model, tmp_path / "model.onnx", 32)
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_faithful_engine_departs_nowhere(model: torch.nn.Module, target: str, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "model.onnx", 32, target=target)
    simulate_target(model, target)
    rows = compare_layers(load_engine(tmp_path / "model.onnx", target), model, IMAGES)
    simulate_target(model, "onnxruntime")
    activations = [name for name, _ in quantizers(model) if not name.endswith("_weight_quantizer")]
    assert {row.name for row in rows} <= {*activations, "logits"}
    assert len(rows) >= 21  # one a convolution and the classifier
    # a value that rounds the other way shows from there on; OpenVINO adds in another order
    assert min(row.engine_to_simulation for row in rows) > (35 if target == "onnxruntime" else 25)
    assert min(row.by_itself for row in rows) > (50 if target == "onnxruntime" else 35)
    assert all(5 < row.simulation_to_float < 60 for row in rows)
    assert format_layers(rows).splitlines()[-1].startswith("no layer departs")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_first_wrong_layer_is_named(model: torch.nn.Module, path: Path, backend: str) -> None:
    proto = onnx.load(path)
    entry = next(entry for entry in proto.graph.initializer if entry.name == "layer2.1.conv1.weight")
    entry.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(entry)[::-1]), entry.name))
    onnx.save(proto, path)
    rows = compare_layers(load_engine(path, backend), model, IMAGES)
    assert format_layers(rows).endswith("layer2.1.conv2._input_quantizer")


def test_another_models_file_is_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    export_onnx(create_model("cifar-resnet20").eval(), tmp_path / "float.onnx", 32)
    with pytest.raises(UserError, match="no quantized layers of this model"):
        compare_layers(load_engine(tmp_path / "float.onnx"), model, IMAGES)


class TwoInputs(torch.nn.Module):
    """Two inputs; a tuple comes out, the second layer's output first."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = torch.nn.Linear(4, 3), torch.nn.Linear(5, 2)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.right(second), self.left(first)


def write_two_inputs(model: TwoInputs, path: Path) -> None:
    """The quantized model as ONNX, which lists inputs and outputs in another order than the model."""
    constants, nodes = {"zero": np.zeros((), np.int8)}, []
    for name in ("left", "right"):
        layer = getattr(model, name)
        activation = layer._input_quantizer
        constants |= {
            f"{name}.scale": (activation.amax / 127).numpy(),
            f"{name}.weight": layer._weight_quantizer(layer.weight).detach().numpy(),
            f"{name}.bias": layer.bias.detach().numpy(),
        }
        grid, value = [f"{name}.scale", "zero"], f"{name}._input_quantizer/DequantizeLinear"
        nodes += [
            helper.make_node("QuantizeLinear", [f"to_{name}", *grid], [f"{name}.integers"]),
            helper.make_node("DequantizeLinear", [f"{name}.integers", *grid], [value]),
            helper.make_node("Gemm", [value, f"{name}.weight", f"{name}.bias"], [name], transB=1),
        ]
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "two inputs",
        [tensor("to_right", TensorProto.FLOAT, ["batch", 5]), tensor("to_left", TensorProto.FLOAT, ["batch", 4])],
        [tensor("left", TensorProto.FLOAT, ["batch", 3]), tensor("right", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    signature = {
        "inputs": [
            {"name": "to_left", "dtype": "float32", "shape": [None, 4]},
            {"name": "to_right", "dtype": "float32", "shape": [None, 5]},
        ],
        "outputs": [{"name": "right", "dtype": "float32"}, {"name": "left", "dtype": "float32"}],
        "structure": {"tuple": [0, 1]},
    }
    helper.set_model_props(proto, {SIGNATURE_KEY: json.dumps(signature)})
    onnx.save(proto, path)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@torch.no_grad()
def test_models_with_several_inputs_and_outputs_are_compared(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    torch.manual_seed(0)
    model = quantize(TwoInputs().eval(), target="tensorrt")
    for _, quantizer in quantizers(model):
        quantizer.set_amax(torch.full_like(quantizer.amax, 3.0))
    arguments = (torch.randn(6, 4), torch.randn(6, 5))
    write_two_inputs(model, tmp_path / "two.onnx")
    rows = compare_layers(load_engine(tmp_path / "two.onnx", backend), model, arguments)
    assert [row.name for row in rows] == ["left._input_quantizer", "right._input_quantizer", "right", "left"]
    assert min(row.engine_to_simulation for row in rows) > 100
    model.left.weight.add_(0.5)  # the file has the old ones
    rows = compare_layers(load_engine(tmp_path / "two.onnx", backend), model, arguments)
    assert format_layers(rows).endswith("departs from the simulation: left")
