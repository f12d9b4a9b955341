"""Exported graphs: structure, encodings, and agreement with PyTorch in real ONNX Runtime and OpenVINO sessions."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from effnet_quant import UserError, calibrate, create_model, export_onnx, load_engine, quantize
from effnet_quant.export.options import ExportOptions
from effnet_quant.quantization.placement.insertion import simulate_target
from reference import fill_model, reference_images

CONVOLUTIONS = 81  # of efficientnet-b0 with squeeze-and-excitation as convolutions
SIZE = 64


@pytest.fixture(scope="module")
def float_model() -> nn.Module:
    return fill_model(create_model("efficientnet-b0")).eval()


@pytest.fixture(scope="module")
def quantized_model() -> nn.Module:
    model = fill_model(create_model("efficientnet-quant-b0")).eval()
    return calibrate(model, [reference_images(8)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, float_model: nn.Module, quantized_model: nn.Module) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(float_model, folder / "float.onnx", SIZE)
    for target in ("onnxruntime", "openvino", "tensorrt"):
        export_onnx(quantized_model, folder / f"{target}.onnx", SIZE, target=target, metadata={"classes": ["a", "b"]})
    return folder


def operations(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def run(path: Path, images: torch.Tensor, optimized: Path | None = None) -> torch.Tensor:
    """The logits of a plain session: as the graph says without ``optimized``, else as ONNX Runtime compiles it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized is None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("batch", [1, 2, 7])
@torch.no_grad()
def test_float_engine_computes_the_float_model_at_any_batch(folder: Path, float_model: nn.Module, batch: int) -> None:
    images = reference_images(batch)
    expected = float_model(images)
    for backend in ("onnxruntime", "openvino"):
        engine = load_engine(folder / "float.onnx", backend)
        assert relative_error(torch.from_numpy(engine(images.numpy())), expected) < 1e-5


def test_batch_norm_is_folded_and_the_graph_is_minimal(folder: Path) -> None:
    assert operations(folder / "float.onnx") == {
        "Conv": 49,
        "Gemm": 33,
        "Sigmoid": 65,
        "Mul": 65,
        "Add": 9,
        "GlobalAveragePool": 17,
        "Flatten": 17,
        "Unsqueeze": 32,
    }


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("batch", [1, 7])
@torch.no_grad()
def test_quantized_graph_computes_the_simulation(
    folder: Path, quantized_model: nn.Module, target: str, batch: int
) -> None:
    # A value that rounds the other way ends as about 1e-2 in these random-weight logits.
    images = reference_images(batch)
    simulated = simulate_target(quantized_model, target)(images)
    assert relative_error(run(folder / f"{target}.onnx", images), simulated) < 2e-2


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@torch.no_grad()
def test_the_compiled_engine_computes_the_simulation_at_any_batch(
    folder: Path, quantized_model: nn.Module, backend: str
) -> None:
    engine = load_engine(folder / f"{backend}.onnx", backend)
    simulation = simulate_target(quantized_model, backend)
    for batch in (1, 2, 7):
        images = reference_images(batch)
        assert relative_error(torch.from_numpy(engine(images.numpy())), simulation(images)) < 2e-2


@torch.no_grad()
def test_a_quantized_float16_file_runs_right_in_onnxruntime_too(quantized_model: nn.Module, tmp_path: Path) -> None:
    export_onnx(quantized_model, tmp_path / "half.onnx", SIZE, target="tensorrt", options=ExportOptions(fp16=True))
    images = reference_images()
    expected = simulate_target(quantized_model, "tensorrt")(images)
    engine = load_engine(tmp_path / "half.onnx")
    assert engine.precision == "int8 + fp16"
    assert relative_error(torch.from_numpy(engine(images.numpy())), expected) < 3e-2
    # what ONNX Runtime's optimizer makes of it, whence its absence; once this fails it may be let in again
    assert relative_error(run(tmp_path / "half.onnx", images, tmp_path / "optimized.onnx"), expected) > 0.5


def test_onnxruntime_runs_every_convolution_as_an_integer_kernel(folder: Path, tmp_path: Path) -> None:
    optimized = tmp_path / "optimized.onnx"
    run(folder / "onnxruntime.onnx", reference_images(), optimized)
    counts = operations(optimized)
    assert counts["QLinearConv"] == CONVOLUTIONS
    assert counts["Conv"] == counts["FusedConv"] == 0
    assert counts["QGemm"] == 1


def test_compiling_does_not_change_what_the_graph_says(folder: Path, tmp_path: Path) -> None:
    images = reference_images()
    as_written = run(folder / "onnxruntime.onnx", images)
    engine = load_engine(folder / "onnxruntime.onnx")
    assert relative_error(torch.from_numpy(engine(images.numpy())), as_written) < 1e-2


@pytest.mark.slow
@torch.no_grad()
def test_public_calls_make_integer_kernels_of_a_float_models_convolutions(tmp_path: Path) -> None:
    model = quantize(fill_model(create_model("efficientnet-b0")).eval())
    images = reference_images()
    calibrate(model, [images])
    export_onnx(model, tmp_path / "model.onnx", SIZE)
    optimized = tmp_path / "optimized.onnx"
    logits = run(tmp_path / "model.onnx", images, optimized)
    assert relative_error(logits, model(images)) < 2e-2
    assert operations(optimized)["QLinearConv"] == 49
    assert operations(optimized)["QGemm"] == 33


@torch.no_grad()
def test_any_number_of_input_channels(tmp_path: Path) -> None:
    model = create_model("cifar-resnet20", in_channels=1).eval()
    images = torch.randn(3, 1, 32, 32)
    export_onnx(model, tmp_path / "grey.onnx", 32)
    got = torch.from_numpy(load_engine(tmp_path / "grey.onnx")(images.numpy()))
    assert relative_error(got, model(images)) < 1e-5


def test_symmetric_ranges_are_encoded_as_the_target_wants_them(folder: Path) -> None:
    def activation_zero_points(target: str) -> set[tuple[str, int]]:
        model = onnx.load(folder / f"{target}.onnx")
        constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
        quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        found = [
            constants[node.input[2]] for node in quantizers if "output" not in node.name and "Sigmoid" not in node.name
        ]
        return {(str(zero_point.dtype), int(zero_point)) for zero_point in found}

    assert activation_zero_points("tensorrt") == {("int8", 0)}
    assert activation_zero_points("openvino") == {("uint8", 128)}
    assert activation_zero_points("onnxruntime") == {
        ("uint8", 128),
        ("uint8", 0),
    }  # 0: squeeze-and-excitation's sigmoid


def test_weights_are_stored_as_int8_per_channel(folder: Path) -> None:
    constants = {e.name: numpy_helper.to_array(e) for e in onnx.load(folder / "tensorrt.onnx").graph.initializer}
    weights = {name: value for name, value in constants.items() if name.endswith(".weight")}
    assert len(weights) == CONVOLUTIONS + 1
    for name, weight in weights.items():
        assert weight.dtype == np.int8
        assert constants[f"{name}_scale"].shape == (len(weight),)
        assert np.abs(weight.astype(int)).max(axis=tuple(range(1, weight.ndim))).min() == 127
    assert (folder / "tensorrt.onnx").stat().st_size < 0.3 * (folder / "float.onnx").stat().st_size


def test_only_onnxruntime_gets_integer_biases(folder: Path) -> None:
    for target, dtype in (("onnxruntime", np.int32), ("openvino", np.float32), ("tensorrt", np.float16)):
        constants = {e.name: numpy_helper.to_array(e) for e in onnx.load(folder / f"{target}.onnx").graph.initializer}
        assert {value.dtype for name, value in constants.items() if name.endswith(".bias")} == {np.dtype(dtype)}


def test_engine_returns_the_metadata_and_checks_its_input(folder: Path) -> None:
    engine = load_engine(folder / "tensorrt.onnx")
    assert engine.metadata == {
        "target": "tensorrt",
        "image_size": SIZE,
        "classes": ["a", "b"],
        "input": {"name": "input", "type": "float32", "layout": "NCHW"},
        "output": {"name": "logits", "type": "float32"},
    }
    with pytest.raises(UserError, match=r"\(N, 3x64x64\), not \(2, 3, 32, 32\)"):
        engine(np.zeros((2, 3, 32, 32), np.float32))
    with pytest.raises(UserError, match="not float64"):
        engine(np.zeros((2, 3, 64, 64)))
    with pytest.raises(UserError, match=r"\(0, 3, 64, 64\)"):
        engine(np.zeros((0, 3, 64, 64), np.float32))


def test_what_is_wrong_with_a_file_or_a_model_is_said(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes((folder / "float.onnx").read_bytes()[:100_000])
    with pytest.raises(UserError, match="damaged"):
        load_engine(damaged)
    damaged.write_bytes(b"this is no model")
    with pytest.raises(UserError, match="damaged"):
        load_engine(damaged)
    with pytest.raises(UserError, match="no file"):
        load_engine(tmp_path / "missing.onnx")
    with pytest.raises(UserError, match="no backend 'tpu'"):
        load_engine(folder / "float.onnx", "tpu")
    with pytest.raises(UserError, match="50 quantizers have no range"):
        export_onnx(quantize(create_model("cifar-resnet20")), tmp_path / "uncalibrated.onnx", 32)
    with pytest.raises(UserError, match="no target 'tpu'"):
        export_onnx(create_model("cifar-resnet20"), tmp_path / "model.onnx", 32, target="tpu")
    with pytest.raises(UserError, match="folder"):
        export_onnx(create_model("cifar-resnet20"), tmp_path / "missing" / "model.onnx", 32)
    assert list(tmp_path.iterdir()) == [damaged]


class Unit(nn.Module):
    """A convolution and a BatchNorm whose factor is negative for some channels and tiny for one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        with torch.no_grad():
            self.bn.weight.copy_(torch.tensor([1.0, -1.0, 0.5, -2.0, 1e-12, 0.0, 3.0, -0.1]))
            self.bn.bias.copy_(torch.linspace(-1, 1, 8))
            self.bn.running_mean.normal_()
            self.bn.running_var.uniform_(0.5, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.bn(self.conv(x))).flatten(1))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
@torch.no_grad()
def test_folding_is_exact_for_negative_zero_and_tiny_factors(target: str, tmp_path: Path) -> None:
    model = quantize(Unit().eval())
    images = torch.randn(16, 3, 12, 12)
    calibrate(model, [images], method="max")
    export_onnx(model, tmp_path / "unit.onnx", 12, target=target)
    got, expected = run(tmp_path / "unit.onnx", images), simulate_target(model, target)(images)
    step = max(float(model.pool._input_quantizer.scale), float(model.fc._input_quantizer.scale))
    # at most a few roundings of averaged values may fall the other way
    assert (got - expected).abs().max().item() < 2 * step
    assert relative_error(got, expected) < 5e-3
