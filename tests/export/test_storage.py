"""4-bit weights and 16-bit activations: what files hold, and that the runtimes compute the simulation from them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from effnet_quant import UserError, calibrate, export_onnx, load_engine, quantize
from effnet_quant.checks.layer_comparison import compare_layers
from effnet_quant.checks.lint import lint_tensorrt
from effnet_quant.engines.onnx_file import read_onnx
from effnet_quant.export.onnx import build_onnx
from effnet_quant.export.options import ExportOptions
from effnet_quant.quantization.placement.insertion import quantizers, simulate_target

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
RUNTIMES = ("onnxruntime", "openvino")


class Network(nn.Module):
    """A stem with BatchNorm of both signs, a residual block with a gate, a classifier over a sequence and one over means."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.expand, self.depthwise = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.gate, self.project = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 16, 1)
        self.mix, self.fc = nn.Linear(16, 16), nn.Linear(16, 5)
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(-1.5, 1.5, 16))
            self.norm.bias.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = nn.functional.silu(self.depthwise(nn.functional.relu6(self.expand(x))))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        x = self.project(y) + x
        x = torch.relu(self.mix(x.flatten(2).transpose(1, 2)))
        return self.fc(x.mean(1))


LAYERS = ("stem", "expand", "depthwise", "gate", "project", "mix", "fc")


def quantized(spec: object, *, method: str = "max", network: nn.Module | None = None) -> nn.Module:
    model = quantize((network or Network()).eval(), spec)  # type: ignore[arg-type]
    return calibrate(model, [IMAGES], method=method)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def constants(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {entry.name: entry for entry in proto.graph.initializer}


def nibbles(entry: onnx.TensorProto) -> NDArray[np.int64]:
    """The integers of an INT4 constant by the rule of onnx.proto: the first in the low half of a byte, two's complement."""
    both = np.frombuffer(entry.raw_data, np.uint8)
    unsigned = np.stack([both & 15, both >> 4], 1).reshape(-1)[: int(np.prod(entry.dims))].astype(np.int64)
    return np.where(unsigned > 7, unsigned - 16, unsigned).reshape(entry.dims)


@pytest.mark.parametrize("target", RUNTIMES)
@pytest.mark.parametrize("preset", ["w4a8", "w4a8-lsq"])
@torch.no_grad()
def test_the_file_holds_the_integers_of_the_simulation(target: str, preset: str) -> None:
    model = quantized(preset, method="mse")
    for name in LAYERS:  # weights anywhere between the integers, as after training
        model.get_submodule(name).weight.add_(0.05 * torch.randn(model.get_submodule(name).weight.shape))
    proto = build_onnx(model, 16, target=target)
    stored = constants(proto)
    turned = {}
    for name in LAYERS:
        layer = model.get_submodule(name)
        quantizer = layer._weight_quantizer
        integers = (quantizer(layer.weight).double() / quantizer.scale.double()).round().numpy().astype(np.int64)
        assert integers.min() == -8 or name == "gate"  # some saturate
        entry = stored[f"{name}.weight"]
        assert entry.data_type == TensorProto.INT4
        sign = numpy_helper.to_array(stored[f"{name}.weight_sign"]) if f"{name}.weight_sign" in stored else np.array(1)
        held = nibbles(entry) * sign
        if name == "stem":  # with BatchNorm's sign
            integers *= np.sign(model.norm.weight.numpy()).astype(np.int64)[:, None, None, None]
            turned[name] = (sign < 0).sum()
        np.testing.assert_array_equal(held.T if name == "mix" else held, integers)
    assert turned["stem"] > 0
    assert [entry.version for entry in proto.opset_import] == [21]


@pytest.mark.parametrize("target", RUNTIMES)
@torch.no_grad()
def test_4_bit_weights_run_as_integers(target: str, tmp_path: Path) -> None:
    model = simulate_target(quantized("w4a8"), target)
    packed, as_bytes = tmp_path / "int4.onnx", tmp_path / "int8.onnx"
    export_onnx(model, packed, 16, target=target)
    export_onnx(model, as_bytes, 16, target=target, options=ExportOptions(int4_weights=False))
    got = torch.from_numpy(load_engine(packed, target)(IMAGES.numpy()))
    assert relative_error(got, model(IMAGES)) < 5e-3
    if target == "onnxruntime":
        assert kernels(packed) == kernels(as_bytes)
        assert kernels(packed)["QLinearConv"] == 5
    assert read_onnx(packed).fits_16_bits
    assert read_onnx(packed).packed
    assert not read_onnx(as_bytes).packed


def kernels(path: Path) -> Counter[str]:
    """The nodes that ONNX Runtime has left when it has optimized a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path.with_suffix(".optimized")).graph.node)


def test_a_network_in_4_bits_takes_half_the_bytes() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 128, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = quantized("w4a8", network=network)
    packed, as_bytes = (build_onnx(model, 16, options=ExportOptions(int4_weights=choice)) for choice in (True, False))
    assert abs(as_bytes.ByteSize() - packed.ByteSize() - (27 * 64 + 9 * 64 * 128) / 2) < 500


@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_bits_are_stored_in_4_too(bits: int) -> None:
    model = quantized({"weight": {"bits": bits}})
    stored = constants(build_onnx(model, 16))
    integers = nibbles(stored["expand.weight"])
    assert (integers.min(), integers.max()) >= (-(2 ** (bits - 1)), 1)
    assert integers.max() == 2 ** (bits - 1) - 1


def test_int8_is_kept_where_int4_is_not_taken_or_not_wanted() -> None:
    model = quantized("w4a8")
    for target, options in (
        ("tensorrt", ExportOptions(fp16=False)),
        ("onnxruntime", ExportOptions(opset=17)),
        ("onnxruntime", ExportOptions(int4_weights=False)),
    ):
        proto = build_onnx(model, 16, target=target, options=options)
        assert constants(proto)["expand.weight"].data_type == TensorProto.INT8
        assert [entry.version for entry in proto.opset_import] == [17]
        assert target != "tensorrt" or lint_tensorrt(proto) == []
    packed = build_onnx(model, 16, options=ExportOptions(opset=21))
    findings = lint_tensorrt(packed)
    assert sum("weights of 4 bits, but only int8" in finding for finding in findings) == len(LAYERS)


@torch.no_grad()
def test_float_storage_saturates_at_the_ends_of_the_grid() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    calibrate(quantize(model, "w4a8", target="openvino"), [IMAGES], method="max")
    model[0]._weight_quantizer.set_amax(model[0]._weight_quantizer.amax / 3)  # a third of the weights lies beyond
    proto = build_onnx(model, 16, target="openvino", options=ExportOptions(float_weights=True))
    assert relative_error(as_written(proto), model(IMAGES)) < 1e-5


def as_written(proto: onnx.ModelProto) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": IMAGES.numpy()})[0])


@pytest.mark.parametrize("target", RUNTIMES)
@torch.no_grad()
def test_16_bit_activations_run_as_the_simulation(target: str, tmp_path: Path) -> None:
    model = simulate_target(quantized("w8a16"), target)
    for _, quantizer in quantizers(model):  # saturation must show
        if quantizer.role == "input":
            quantizer.set_amax(0.6 * quantizer.amax)
    export_onnx(model, tmp_path / "model.onnx", 16, target=target)
    proto = onnx.load(tmp_path / "model.onnx")
    assert [entry.version for entry in proto.opset_import] == [21]
    zero_points = {node.input[2] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    assert {numpy_helper.to_array(constants(proto)[name]).item() for name in zero_points} == {32768}
    assert {constants(proto)[name].data_type for name in zero_points} == {TensorProto.UINT16}
    engine = load_engine(tmp_path / "model.onnx", target)
    # rounding to 8 bits anywhere, as runtimes do unasked, costs 5e-3
    assert relative_error(torch.from_numpy(engine(IMAGES.numpy())), model(IMAGES)) < 2e-4
    rows = compare_layers(engine, model, IMAGES)
    assert len(rows) >= 8
    assert min(row.by_itself for row in rows) > 60
    assert any("uint16 values, but only int8" in finding for finding in lint_tensorrt(proto))


MIXED = {
    "8 to 16": {"overrides": {"expand": "w8a16"}},
    "16 to 8": {"preset": "w8a16", "overrides": {"expand": "w8a8", "project": "w4a8", "residual_quantizer": "w8a8"}},
    "all four": {
        "overrides": {"stem": "w4a8", "expand": "w8a16", "depthwise": None, "mix": "w8a16", "project": "w4a8"}
    },
    "4 bits behind 16": {"overrides": {"depthwise": {"weight": {"bits": 4}, "activation": {"bits": 16}}, "fc": None}},
    "float weights": {"overrides": {"expand._weight_quantizer": None, "fc._weight_quantizer": None}},
    "sequence in 16": {"overrides": {"mix": "w8a16", "fc": "w8a16"}},
    "sequence in float": {"overrides": {"mix._input_quantizer": None}},
    "shortcut in 16": {"overrides": {"residual_quantizer*": "w8a16", "pooling_quantizer*": "w8a16"}},
}


@pytest.mark.parametrize("target", RUNTIMES)
@pytest.mark.parametrize("spec", MIXED.values(), ids=MIXED)
@torch.no_grad()
def test_mixed_networks_run_as_the_simulation(target: str, spec: dict[str, object], tmp_path: Path) -> None:
    network = Network()
    network.expand.weight.mul_(
        torch.logspace(-3, 0, 32)[:, None, None, None]
    )  # one scale would not do for all channels
    in_float = Network()
    in_float.load_state_dict(network.state_dict())
    model = simulate_target(quantized(spec, network=network), target)
    export_onnx(model, tmp_path / "model.onnx", 16, target=target)
    got = torch.from_numpy(load_engine(tmp_path / "model.onnx", target)(IMAGES.numpy()))
    rounding = model(IMAGES) - in_float.eval()(IMAGES)
    assert relative_error(got - model(IMAGES) + rounding, rounding) < 0.15  # a few values round the other way


@torch.no_grad()
def test_a_value_that_goes_to_8_and_16_bits_is_rounded_for_each(tmp_path: Path) -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fine, self.coarse = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return torch.cat([self.fine(x), self.coarse(x)], 1).mean((2, 3))

    torch.manual_seed(0)
    model = quantize(Forked().eval(), {"overrides": {"fine": "w8a16", "concat*": None, "pooling*": None}})
    calibrate(model, [IMAGES], method="max")
    export_onnx(model, tmp_path / "model.onnx", 16)
    engine = load_engine(tmp_path / "model.onnx")
    assert relative_error(torch.from_numpy(engine(IMAGES.numpy())), model(IMAGES)) < 1e-5


@torch.no_grad()
def test_large_biases_behind_16_bits_do_not_overflow(tmp_path: Path) -> None:
    """ONNX Runtime would write them as int32 multiples of input scale * weight scale."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    model[2].weight.mul_(1e-4)
    model[2].bias.copy_(torch.tensor([300.0, -0.001, 1e-30, 0.0]))
    model = quantized("w8a16", network=model)
    export_onnx(model, tmp_path / "model.onnx", 16)
    got = torch.from_numpy(load_engine(tmp_path / "model.onnx")(IMAGES.numpy()))
    torch.testing.assert_close(got, model(IMAGES), rtol=1e-6, atol=300 / 32767)
    held = constants(onnx.load(tmp_path / "model.onnx"))
    integers, scale = (numpy_helper.to_array(held[f"2.bias{suffix}"]) for suffix in ("", "_scale"))
    assert np.array_equal(integers * scale, model[2].bias.numpy())


def test_what_can_not_be_stored_is_said() -> None:
    model = quantized("w8a16")
    with pytest.raises(UserError, match="tensorrt takes no activations on the grid -32768 … 32767"):
        build_onnx(model, 16, target="tensorrt")
    with pytest.raises(UserError, match="opset 20 has no 16-bit activations; choose 21"):
        build_onnx(model, 16, options=ExportOptions(opset=20))
    with pytest.raises(UserError, match="fewer digits than 16-bit activations"):
        build_onnx(model, 16, target="openvino", options=ExportOptions(fp16=True))


def test_an_old_runtime_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_onnx(quantized("w4a8"), tmp_path / "model.onnx", 16)
    monkeypatch.setattr(onnxruntime, "__version__", "1.22.1")
    with pytest.raises(UserError, match=r"1\.22\.1 can't read the 4-bit weights of .*; install 1\.23 or later"):
        load_engine(tmp_path / "model.onnx")
