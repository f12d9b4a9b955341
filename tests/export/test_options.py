"""The forms of an ONNX file: each computes what the plain one does, in a real session."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional

from effnet_quant import UserError, calibrate, create_model, export_onnx, load_engine, quantize
from effnet_quant.card import InputSpec
from effnet_quant.checks.lint import lint_tensorrt
from effnet_quant.export.onnx import build_onnx
from effnet_quant.export.options import OPSETS, ExportOptions
from effnet_quant.quantization.placement.insertion import simulate_target

PIXELS = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = (PIXELS.double() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
IMAGES = IMAGES.float()
# random weights: one value that rounds the other way shows in the logits
FLIPS = 3e-2
TARGETS = ("onnxruntime", "openvino", "tensorrt")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return calibrate(quantize(create_model("cifar-resnet20").eval()), [IMAGES], method="max")


def run(proto: onnx.ModelProto, images: Tensor, *, optimize: bool = True) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"input": images.numpy()})[0])


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


class Operators(nn.Module):
    """What ONNX's versions write differently: means, maxima, padding, splitting, normalisation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.last = nn.LayerNorm(8)
        self.pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.relu(self.norm(self.conv(nn.functional.pad(x, (1, 0, 1, 0), "reflect")))).chunk(2, 1)
        x = self.pool(torch.cat([torch.nn.functional.gelu(first), second.sigmoid()], 1))
        return self.last(x.mean(2).amax(-1)) + x.sum((2, 3)).softmax(1)


@pytest.mark.parametrize("opset", OPSETS)
@torch.no_grad()
def test_every_opset_computes_the_same(opset: int) -> None:
    network = quantize(Operators().eval(), {"overrides": {"conv._input_quantizer": None}}, target="openvino")
    calibrate(network, [IMAGES], method="max")
    proto = build_onnx(network, 32, target="openvino", options=ExportOptions(opset=opset))
    assert [entry.version for entry in proto.opset_import] == [opset]
    torch.testing.assert_close(run(proto, IMAGES), network(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [OPSETS[0] - 1, OPSETS[-1] + 1])
def test_another_opset_is_refused(opset: int) -> None:
    with pytest.raises(UserError, match=f"opset {opset} can't be written; choose one from 17 to 21"):
        ExportOptions(opset=opset)


@torch.no_grad()
def test_one_file_takes_images_of_any_size(model: nn.Module, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "any.onnx", 32, options=ExportOptions(dynamic_size=True))
    simulation = simulate_target(model, "onnxruntime")
    for backend in ("onnxruntime", "openvino"):
        engine = load_engine(tmp_path / "any.onnx", backend)
        for batch, height, width in ((1, 32, 32), (2, 48, 40), (7, 32, 32)):
            images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
            assert relative_error(torch.from_numpy(engine(images.numpy())), simulation(images)) < FLIPS
        with pytest.raises(UserError, match=r"\(N, 3xanyxany\), not \(1, 1, 32, 32\)"):
            engine(np.zeros((1, 1, 32, 32), np.float32))


def test_a_network_for_one_size_is_refused_a_dynamic_one() -> None:
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)).eval()
    with pytest.raises(UserError, match="32 px only"):
        build_onnx(fixed, 32, options=ExportOptions(dynamic_size=True))


class Sized(nn.Module):
    """``operation`` between a convolution and a classifier behind global pooling, so that any size would do for the rest."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.conv(x)).amax((2, 3))


KNOWN_SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "pooling to the traced size": lambda x: functional.adaptive_avg_pool2d(x, 32),
    "pooling with equal windows": lambda x: functional.adaptive_avg_pool2d(x, 8),
    "maxima of windows": lambda x: functional.adaptive_max_pool2d(x, (2, 4))[:, :4],
    "the count of a variance": lambda x: x + x.var((2, 3), keepdim=True),
    "roll": lambda x: torch.roll(x, 3, 2),
    "pixel unshuffle": lambda x: functional.pixel_unshuffle(x, 2)[:, :4],
    "halves of the height": lambda x: x.chunk(2, 2)[0],
    "a factor that is no integer": lambda x: functional.interpolate(x, scale_factor=1.5),
    "half of the height": lambda x: functional.interpolate(x, size=(x.shape[2] // 2, 5)),
    "a product with the height": lambda x: x * x.shape[2],
    "padding by the height": lambda x: functional.pad(x, (0, x.shape[2] // 4)),
}


@pytest.mark.parametrize("name", KNOWN_SIZES)
@torch.no_grad()
def test_what_needs_known_sizes_is_refused_a_dynamic_one(name: str) -> None:
    model = Sized(KNOWN_SIZES[name]).eval()
    with pytest.raises(UserError, match=r"dynamic size|images' size|computed size|data can't"):
        build_onnx(model, 32, options=ExportOptions(dynamic_size=True))
    torch.testing.assert_close(run(build_onnx(model, 32), IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def as_large_as(other: Tensor, x: Tensor) -> Tensor:
    """Of the other's size torch.export keeps no more than the formula by which it follows from the image's."""
    return functional.interpolate(x, size=other.shape[-2:]) * other


ANY_SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: functional.adaptive_avg_pool2d(x, 1) * x,
    "maximum": lambda x: functional.adaptive_max_pool2d(x, 1) * x,
    "twice as large": lambda x: functional.interpolate(x, scale_factor=2, mode="nearest"),
    "as large as another": lambda x: functional.interpolate(functional.max_pool2d(x, 3), size=x.shape[-2:]) * x,
    "as large as a smaller one": lambda x: as_large_as(functional.max_pool2d(x, 2), functional.max_pool2d(x, 5)),
    "to 7 by 5": lambda x: functional.interpolate(x, size=(7, 5), mode="bilinear"),
}


@pytest.mark.parametrize("name", ANY_SIZES)
@torch.no_grad()
def test_what_does_not_runs_at_every_size(name: str) -> None:
    model = Sized(ANY_SIZES[name]).eval()
    proto = build_onnx(model, 32, options=ExportOptions(dynamic_size=True))
    for height, width in ((32, 32), (53, 40)):
        images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(run(proto, images), model(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_by_the_size_of_the_image_is_the_convolutions(tmp_path: Path) -> None:
    """timm's Conv2dSame, as in its tf_* networks."""
    torch.manual_seed(0)
    wide = Conv2dSame(8, 8, 5, stride=2, groups=8)
    layers = [Conv2dSame(3, 8, 3, stride=2), nn.ReLU(), wide, nn.ReLU(), Conv2dSame(8, 6, 1, 2)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()
    quantized = calibrate(quantize(copy.deepcopy(network)), [IMAGES], method="max")
    for target in ("float", *TARGETS):
        model = network if target == "float" else simulate_target(quantized, target)
        rules = "onnxruntime" if target == "float" else target
        proto = build_onnx(model, 32, target=rules, options=ExportOptions(dynamic_size=True))
        assert "Pad" not in {node.op_type for node in proto.graph.node}
        for height, width in ((32, 32), (33, 47), (54, 40)):
            images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
            assert relative_error(run(proto, images, optimize=False), model(images)) < (
                1e-5 if target == "float" else 5e-3
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "refused"),
    [
        ("efficientnet-b0", 64, False),
        ("timm:mobilenetv3_large_100", 64, False),
        ("torchvision:alexnet", 224, True),
        ("torchvision:vgg16", 64, True),
        ("timm:ghostnetv2_100", 64, False),
        ("timm:tf_efficientnetv2_b0", 64, False),
    ],
)
@torch.no_grad()
def test_a_network_takes_any_size_or_says_that_it_does_not(name: str, size: int, refused: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, path = create_model(name, 10).eval(), tmp_path / "any.onnx"
    if refused:
        with pytest.raises(UserError, match=r"dynamic size|computed size"):
            export_onnx(network, path, size, options=ExportOptions(dynamic_size=True))
        return
    export_onnx(network, path, size, options=ExportOptions(dynamic_size=True))
    for height, width in ((size, size), (size + 32, size), (size + 17, size + 5)):
        images = torch.randn(2, 3, height, width)
        got = torch.from_numpy(load_engine(path)(images.numpy()))
        assert relative_error(got, network(images)) < 1e-5


@torch.no_grad()
def test_a_float16_graph_resizes() -> None:
    for operation in (lambda x: functional.interpolate(x, scale_factor=2), lambda x: functional.interpolate(x, 53)):
        model = Sized(operation).eval()
        proto = build_onnx(model, 32, options=ExportOptions(fp16=True))
        assert relative_error(run(proto, IMAGES), model(IMAGES)) < 5e-3


@torch.no_grad()
def test_float16_inside_float32_outside(model: nn.Module) -> None:
    network = create_model("cifar-resnet20").eval()
    proto = build_onnx(network, 32, options=ExportOptions(fp16=True))
    kinds = {entry.data_type for entry in proto.graph.initializer} - {onnx.TensorProto.INT64}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert {value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)} == {
        onnx.TensorProto.FLOAT
    }
    assert 0 < relative_error(run(proto, IMAGES), network(IMAGES)) < 5e-3
    for target in ("openvino", "tensorrt"):
        proto = build_onnx(model, 32, target=target, options=ExportOptions(fp16=True))
        kinds = {entry.data_type for entry in proto.graph.initializer if "zero_point" not in entry.name}
        assert kinds - {onnx.TensorProto.INT64} == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8}
        expected = simulate_target(model, target)(IMAGES)
        assert relative_error(run(proto, IMAGES, optimize=False), expected) < FLIPS
        assert target != "tensorrt" or lint_tensorrt(proto) == []


def test_what_float16_can_not_do_is_said(model: nn.Module) -> None:
    with pytest.raises(UserError, match="onnxruntime has no integer kernels between float16"):
        build_onnx(model, 32, options=ExportOptions(fp16=True))
    with pytest.raises(UserError, match="choose 19 or higher"):
        build_onnx(model, 32, target="tensorrt", options=ExportOptions(fp16=True, opset=17))
    large = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    nn.init.constant_(large[0].weight, 1e5)
    with pytest.raises(UserError, match=r"0\.weight holds 1e\+05, more than float16 can"):
        build_onnx(large, 32, options=ExportOptions(fp16=True))


@torch.no_grad()
def test_quantized_files_for_tensorrt_compute_in_float16_where_that_can_hold_them() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    half, single = (
        build_onnx(network, 32, target="tensorrt", options=ExportOptions(fp16=choice)) for choice in (None, False)
    )
    assert half == single  # a float network stays in float32
    calibrate(quantize(network, "w8a8", target="tensorrt"), [IMAGES], method="max")
    plain, half, single = (
        build_onnx(network, 32, target="tensorrt", options=ExportOptions(fp16=choice)) for choice in (None, True, False)
    )
    assert plain == half != single
    network[0].weight.mul_(1e9)
    network[0]._weight_quantizer.set_amax(1e9 * network[0]._weight_quantizer.amax)
    with pytest.warns(
        UserWarning, match=r"0\.weight_scale holds .*, more than float16 can; the file computes in float32\."
    ):
        proto = build_onnx(network, 32, target="tensorrt")
    assert relative_error(run(proto, IMAGES), network(IMAGES)) < FLIPS


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_normalisation_in_the_graph(model: nn.Module, target: str, tmp_path: Path) -> None:
    options = ExportOptions(normalisation=InputSpec(8, 8, mean=MEAN, std=STD))
    export_onnx(model, tmp_path / "pixels.onnx", 32, target=target, options=options)
    for backend in ("onnxruntime", "openvino"):
        engine = load_engine(tmp_path / "pixels.onnx", backend)
        assert engine.metadata["input"] == {"name": "input", "type": "uint8", "layout": "NCHW"}
        got = torch.from_numpy(engine(PIXELS.numpy()))
        assert relative_error(got, simulate_target(model, target)(IMAGES)) < FLIPS
        with pytest.raises(UserError, match="give it pixels"):
            engine(IMAGES.numpy())


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_float_weights_are_rounded_in_the_graph(model: nn.Module, target: str) -> None:
    proto = build_onnx(model, 32, target=target, options=ExportOptions(float_weights=True, fp16=False))
    weights = [entry for entry in proto.graph.initializer if entry.name.endswith(".weight")]
    assert len(weights) == 20
    assert {entry.data_type for entry in weights} == {onnx.TensorProto.FLOAT}
    conv = model.layer1[0].conv1
    bn = model.layer1[0].bn1
    folded = conv.weight * (bn.weight / (bn.running_var + bn.eps).sqrt())[:, None, None, None]
    stored = next(numpy_helper.to_array(entry) for entry in weights if entry.name == "layer1.0.conv1.weight")
    np.testing.assert_allclose(stored, folded.numpy(), rtol=1e-5, atol=1e-7)
    assert relative_error(run(proto, IMAGES), simulate_target(model, target)(IMAGES)) < FLIPS
    assert target != "tensorrt" or lint_tensorrt(proto) == []


@pytest.mark.parametrize("target", TARGETS)
def test_every_node_and_constant_is_needed(model: nn.Module, target: str) -> None:
    graph = build_onnx(model, 32, target=target).graph
    used = {name for node in graph.node for name in node.input} | {"logits"}
    assert {name for node in graph.node for name in node.output} <= used
    assert {entry.name for entry in graph.initializer} <= used
    assert "Identity" not in {node.op_type for node in graph.node}


EXPORT = """
import sys, torch
from effnet_quant import create_model, calibrate, export_onnx, quantize
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 3), torch.nn.Flatten())
model = calibrate(quantize(network.eval()), [torch.randn(2, 3, 8, 8)], method="max")
export_onnx(model, sys.argv[1], 8, metadata={"b": 1, "a": 2})
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # another than here
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", EXPORT, str(tmp_path / "there")], env=environment, check=True)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "here")])
    exec(EXPORT, {})
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
