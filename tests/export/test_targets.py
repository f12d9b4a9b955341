"""What the targets' tables say is what the runtimes make of the graphs, and what the simulation computes."""

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from effnet_quant import UserError, calibrate, create_model, export_onnx, load_engine, quantize
from effnet_quant.checks.layer_comparison import compare_layers
from effnet_quant.checks.tuning import operations_of
from effnet_quant.engines.openvino import shared_core
from effnet_quant.export.onnx import build_onnx
from effnet_quant.export.options import ExportOptions
from effnet_quant.models.activations import replace_silu
from effnet_quant.models.efficientnet import MBConv, Stage
from effnet_quant.models.layers import ConvBNAct
from effnet_quant.quantization.placement.insertion import output_quantizers, simulate_target
from effnet_quant.quantization.targets import TARGETS, Target, get_target

SIZE = 32
IMAGES = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """A stem, an MBConv block with a shortcut, a concatenation, and a classifier: every kind of operation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        bn = {"bn_momentum": 0.1, "bn_epsilon": 1e-3}
        self.stem = ConvBNAct(3, 8, 3, stride=2, **bn)
        self.block = MBConv(Stage(3, 1, 4, 8, 8, 1), wide_se=True, se_as_conv=True, drop_probability=0, **{**bn})
        self.features = ConvBNAct(8, 16, 1, **bn)
        self.pooling = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pooling(self.features(self.block(self.stem(x)))).flatten(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    # NVIDIA's placement, with ranges for every target's quantizers
    return calibrate(quantize(Network().eval(), target="tensorrt"), [IMAGES], method="max")


def with_hard_swish() -> nn.Module:
    network = Network().eval()
    assert replace_silu(network) == 5
    return network


@pytest.fixture(scope="module")
def hard_model() -> nn.Module:
    return calibrate(quantize(with_hard_swish(), target="tensorrt"), [IMAGES], method="max")


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def as_written(proto: onnx.ModelProto) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": IMAGES.numpy()})[0])


QDQ = [name for name, target in TARGETS.items() if target.suffix == ".onnx" and not target.halves_up]
PLACEMENTS = [(name, activation) for name in QDQ for activation in ("SiLU", "hard-swish")]


@pytest.mark.parametrize(
    ("name", "activation"),
    # where hard-swish is one float operation it is like any other; OpenVINO's row is a part of TensorRT's
    [
        pytest.param(
            *pair, marks=pytest.mark.slow if pair[0] == "openvino" or pair == ("tensorrt", "hard-swish") else ()
        )
        for pair in PLACEMENTS
    ],
)
@torch.no_grad()
def test_the_simulation_follows_every_placement(
    name: str, activation: str, model: nn.Module, hard_model: nn.Module
) -> None:
    rules, in_float = get_target(name), Network().eval()(IMAGES)
    if activation == "hard-swish":
        model, in_float = hard_model, with_hard_swish()(IMAGES)
    seen = []
    for left in ((), *((operation,) for operation in sorted(rules.quantized & operations_of(model)))):
        placement = rules.leaving_in_float(left)
        proto = build_onnx(model, SIZE, target=placement, options=ExportOptions(fp16=False))
        expected = simulate_target(model, placement)(IMAGES)
        # of the rounding alone: at most a few values go the other way
        assert relative_error(as_written(proto) - in_float, expected - in_float) < 0.1, left
        seen.append(expected - in_float)
    others = [relative_error(other, seen[0]) for other in seen[1:]]
    assert min(others) > 0.2, "every operation's rounding shows"


@torch.no_grad()
def test_all_in_float_is_the_float_network(model: nn.Module) -> None:
    everything = get_target("onnxruntime").leaving_in_float(get_target("onnxruntime").quantized)
    proto = build_onnx(model, SIZE, target=everything)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in proto.graph.node}
    assert relative_error(as_written(proto), Network().eval()(IMAGES)) < 1e-5
    assert relative_error(simulate_target(model, everything)(IMAGES), Network().eval()(IMAGES)) < 1e-6


def test_onnxruntime_computes_with_integers_alone(model: nn.Module, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "model.onnx", SIZE)
    assert kernels(tmp_path / "model.onnx") == {
        "QuantizeLinear": 1,  # the images
        "QLinearConv": 7,
        "QLinearSigmoid": 6,  # five SiLUs and a gate
        "QLinearMul": 6,
        "QLinearAdd": 1,
        "QLinearGlobalAveragePool": 2,
        "Flatten": 1,
        "QGemm": 1,
    }


def kernels(path: Path) -> Counter[str]:
    """The nodes that ONNX Runtime has left when it has optimized a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(path.with_suffix(".optimized.onnx")).graph.node)
    del counts["Transpose"]  # a change of layout
    return counts


@pytest.mark.parametrize("tracked", [True, False])
def test_hard_swish_is_an_addition_and_a_product_of_integers(tracked: bool, tmp_path: Path) -> None:
    model = calibrate(quantize(with_hard_swish(), target="tensorrt"), [IMAGES], method="max")
    if not tracked:  # as of weights that were calibrated elsewhere: ranges for outputs are found from what follows
        for place in output_quantizers(model):
            place.start_tracking()
            place.stop_tracking()
    export_onnx(model, tmp_path / "model.onnx", SIZE)
    expected = {"QuantizeLinear": 1, "QLinearConv": 7, "QLinearSigmoid": 1, "QLinearMul": 6, "QLinearAdd": 6}
    assert kernels(tmp_path / "model.onnx") == {**expected, "QLinearGlobalAveragePool": 2, "Flatten": 1, "QGemm": 1}


@pytest.mark.slow
@torch.no_grad()
def test_a_gate_of_hard_sigmoid_is_computed_with_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = create_model("timm:mobilenetv3_small_050", 5).eval()
    model = calibrate(quantize(network), [IMAGES], method="max")
    export_onnx(model, tmp_path / "model.onnx", SIZE)
    found = kernels(tmp_path / "model.onnx")
    assert not {"HardSigmoid", "HardSwish", "Mul", "Sigmoid"} & found.keys()
    got = load_engine(tmp_path / "model.onnx")(IMAGES.numpy())
    assert relative_error(torch.from_numpy(got), model(IMAGES)) < 0.02


@torch.no_grad()
def test_a_gate_on_a_coarse_grid_stays_what_it_is(tmp_path: Path) -> None:
    """The integers of such a grid go beyond 1, where a sum of integers would not stop."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=True)
    model = nn.Sequential(conv, nn.Hardsigmoid(), nn.Conv2d(4, 5, 30), nn.Flatten()).eval()
    torch.nn.init.constant_(conv.bias, 4.0)  # beyond the end of the slope
    quantize(model)
    calibrate(model, [IMAGES], method="max")
    for amax in (1.0, 1.7):
        model[2]._input_quantizer.set_amax(torch.tensor(amax))
        proto = build_onnx(model, SIZE)
        kinds = {node.op_type for node in proto.graph.node}
        assert ("HardSigmoid" in kinds, "Add" in kinds) == ((False, True) if amax == 1 else (True, False))
        assert relative_error(as_written(proto), model(IMAGES)) < 0.01


@torch.no_grad()
def test_openvino_fuses_hard_swish_into_integer_convolutions(hard_model: nn.Module, tmp_path: Path) -> None:
    layers = openvino_layers(hard_model, tmp_path)
    assert layers["Convolution I8"] == 7
    assert layers["Convolution f32"] == layers["HSwish"] == layers["Convert"] == 0
    assert layers["Eltwise"] == 1
    engine = load_engine(tmp_path / "model.onnx", "openvino")
    expected = simulate_target(hard_model, "openvino")(IMAGES)
    assert relative_error(torch.from_numpy(engine(IMAGES.numpy())), expected) < 5e-3


def test_openvino_fuses_swish_into_integer_convolutions(model: nn.Module, tmp_path: Path) -> None:
    layers = openvino_layers(model, tmp_path)
    assert layers["Convolution I8"] == 7
    assert layers["Convolution f32"] == layers["Sigmoid"] == layers["Swish"] == layers["Convert"] == 0
    assert layers["Eltwise"] == 1  # squeeze-and-excitation's product; the addition is in the convolution
    assert layers["FakeQuantize"] <= 2  # images, classifier
    assert layers["Reorder"] <= 2  # layouts of images and logits


def openvino_layers(model: nn.Module, folder: Path) -> Counter[str]:
    """The layers of OpenVINO's execution graph, convolutions by the type that they compute in."""
    pytest.importorskip("openvino")
    export_onnx(model, folder / "model.onnx", SIZE, target="openvino")
    # its integer kernels, also on CPUs where load_engine avoids them because they saturate
    compiled = shared_core().compile_model(str(folder / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    layers: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, kernel = (str(info[key].astype(str)) for key in ("layerType", "primitiveType"))
        layers[kind] += kind != "Convolution"
        layers[f"Convolution {kernel.rpartition('_')[2]}"] += kind == "Convolution"
    return layers


@torch.no_grad()
def test_a_model_quantized_for_another_target_agrees_in_openvino(model: nn.Module, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "model.onnx", SIZE, target="openvino")
    got = torch.from_numpy(load_engine(tmp_path / "model.onnx", "openvino")(IMAGES.numpy()))
    assert relative_error(got, simulate_target(model, "openvino")(IMAGES)) < 5e-3


def test_the_file_says_what_was_left_in_float(model: nn.Module, tmp_path: Path) -> None:
    rules = get_target("onnxruntime").leaving_in_float(["mul", "silu"])
    export_onnx(model, tmp_path / "model.onnx", SIZE, target=rules)
    metadata = load_engine(tmp_path / "model.onnx").metadata
    assert (metadata["target"], metadata["float_operations"]) == ("onnxruntime", ["mul", "silu"])
    with pytest.raises(UserError, match="no operation swish"):
        Target.leaving_in_float(rules, ["swish"])


@torch.no_grad()
def test_openvino_pools_the_integers_that_the_convolution_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    model = calibrate(quantize(network, target="openvino"), [IMAGES], method="max")
    proto = build_onnx(model, SIZE, target="openvino")
    producers = {name: node for node in proto.graph.node for name in node.output}
    pool = next(node for node in proto.graph.node if node.op_type == "MaxPool")
    (taker,) = [node for node in proto.graph.node if pool.output[0] in node.input]
    assert (producers[pool.input[0]].op_type, taker.op_type) == ("DequantizeLinear", "Conv")
    assert relative_error(as_written(proto), model(IMAGES)) < 1e-5
    engine = load_engine(_written(proto, tmp_path), "openvino")
    table = compare_layers(engine, model, IMAGES)
    assert min(row.by_itself for row in table) > 60  # dB, of values of the same shape
    for operation in ("conv", "stem"):  # in float, in front of the pooling or behind it
        rules = get_target("openvino").leaving_in_float([operation])
        assert (
            relative_error(as_written(build_onnx(model, SIZE, target=rules)), simulate_target(model, rules)(IMAGES))
            < 1e-5
        )


def _written(proto: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(proto, folder / "written.onnx")
    return folder / "written.onnx"
