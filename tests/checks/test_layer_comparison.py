"""The table that points at the first layer in which an engine departs from its simulation."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from effnet_quant import UserError, calibrate, create_model, export_onnx, load_engine, quantize
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
