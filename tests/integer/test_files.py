"""Files of export_integer: what they hold, that every executor computes the same bits, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from effnet_quant import (
    ModelCard,
    UserError,
    calibrate,
    create_model,
    export_integer,
    export_onnx,
    load_engine,
    quantize,
)
from effnet_quant.card import InputSpec
from effnet_quant.data.transforms import normalize
from effnet_quant.engines.onnx_file import load_onnx
from effnet_quant.integer import reference
from effnet_quant.integer.onnx_graph import float_tensors
from effnet_quant.integer.storage import PROGRAM_KEY, from_model
from effnet_quant.quantization.placement.insertion import simulate_target
from reference.fill import fill

SIZE = 12
SPEC = InputSpec(SIZE, SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 3, SIZE, SIZE), np.uint8)

STORED = Path(__file__).parents[1] / "reference" / "integer_network.onnx"  # export_integer(quantized(), …), once
GOLDEN = "04030468c5eb823ee1dbf0c9b79291fcda89aa7e9f78e424c87a54869faa3049"


class Network(nn.Module):
    """Every kind of operation with a rule: all activations, squeeze-and-excitation, concatenation, resizing, shuffling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Hardswish())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.down = nn.Sequential(nn.Conv2d(16, 8, 1), nn.GELU(), nn.MaxPool2d(3, 2, 1))
        self.up = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Tanh(), nn.PixelShuffle(2), nn.Conv2d(4, 8, 1), nn.ReLU6())
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(x)
        y = x + y * torch.sigmoid(self.squeeze(y))
        y = self.down(torch.cat([x, y], 1))
        y = self.up(y) + nn.functional.interpolate(y, scale_factor=2.0, mode="nearest")
        return self.head(nn.functional.avg_pool2d(y, 3, 3).mean((2, 3)))


def quantized() -> nn.Module:
    model = Network()
    model.load_state_dict(
        {key: torch.from_numpy(fill(key, tuple(value.shape))) for key, value in model.state_dict().items()}
    )
    images = normalize(torch.from_numpy(PIXELS), SPEC)
    return calibrate(quantize(model.eval(), target="integer"), images.split(8), method="max")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("integer") / "network.onnx"
    export_integer(quantized(), path, SIZE, card=ModelCard(input=SPEC))
    return path


@pytest.fixture(scope="module")
def logits(file: Path) -> np.ndarray:
    return reference.run(from_model(load_onnx(file), "the file"), PIXELS)


def test_the_file_has_integers_only(file: Path) -> None:
    model = load_onnx(file)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    assert float_tensors(model.graph) == float_tensors(inferred) == []
    assert {node.op_type for node in model.graph.node} <= {
        *("ConvInteger", "MatMulInteger", "Add", "Sub", "Mul", "Div", "Mod", "Clip", "Cast", "Gather", "MaxPool"),
        *("Concat", "Reshape", "Transpose", "Slice", "Pad", "ReduceSum", "Identity"),
    }
    (image,), (answer,) = model.graph.input, model.graph.output
    assert (image.name, image.type.tensor_type.elem_type) == ("input", onnx.TensorProto.UINT8)
    assert (answer.name, answer.type.tensor_type.elem_type) == ("logits", onnx.TensorProto.INT32)


@pytest.mark.parametrize("backend", ["integer", "onnxruntime"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_are_the_same_everywhere(backend: str, threads: int, file: Path, logits: np.ndarray) -> None:
    engine = load_engine(file, backend, threads=threads)
    for batch in (1, 7, 32):
        answers = engine(PIXELS[:batch])
        assert answers.dtype == np.int32
        np.testing.assert_array_equal(answers, logits[:batch])


@pytest.mark.parametrize("backend", ["reference", "integer", "onnxruntime"])
def test_the_logits_of_a_stored_file_are_known(backend: str) -> None:
    """Their sha256, with every version of NumPy, PyTorch and ONNX Runtime. No float leads to them."""
    if backend == "reference":
        logits = reference.run(from_model(load_onnx(STORED), "the file"), PIXELS)
    else:
        logits = load_engine(STORED, backend)(PIXELS)
    assert hashlib.sha256(np.ascontiguousarray(logits, "<i4").tobytes()).hexdigest() == GOLDEN


def test_the_simulation_rounds_as_the_engine_does(file: Path, logits: np.ndarray) -> None:
    model, engine = quantized(), load_engine(file, "integer")
    images = normalize(torch.from_numpy(PIXELS), SPEC)
    with torch.no_grad():
        integer, qdq = simulate_target(model, "integer")(images), simulate_target(model, "onnxruntime")(images)
    assert engine.card.output_scale is not None
    real = torch.from_numpy(engine.real(logits))
    own, other = (float((real - simulated).norm() / simulated.norm()) for simulated in (integer, qdq))
    assert own < 1e-2
    assert own < 2 * other


def test_training_simulates_with_gradients() -> None:
    model = simulate_target(quantized(), "integer").train()
    model(normalize(torch.from_numpy(PIXELS[:4]), SPEC)).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_predict_answers_with_probabilities(file: Path) -> None:
    image = np.ascontiguousarray(PIXELS[0].transpose(1, 2, 0))
    top = load_engine(file, "integer").predict(image, topk=10)["top"]
    assert sum(entry["probability"] for entry in top) == pytest.approx(1)
    assert top[0]["probability"] < 1


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (PIXELS.astype(np.float32), "takes uint8 images, not float32"),
        (PIXELS[:, :, 1:], "takes images of shape \\(N, 3x12x12\\), not \\(32, 3, 11, 12\\)"),
        (PIXELS[:, :1], "takes images of shape"),
    ],
)
def test_other_images_are_refused(images: np.ndarray, said: str, file: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_engine(file, "integer")(images)


def _constant(model: onnx.ModelProto, ending: str) -> onnx.TensorProto:
    return next(entry for entry in model.graph.initializer if entry.name.endswith(ending))


def _replace(entry: onnx.TensorProto, array: np.ndarray) -> None:
    entry.CopyFrom(numpy_helper.from_array(array, entry.name))


def _multiplier(model: onnx.ModelProto) -> None:
    entry = _constant(model, ".multiplier")
    array = numpy_helper.to_array(entry).copy()
    array.flat[0] = 2**30 - 1
    _replace(entry, array)


def _table(model: onnx.ModelProto) -> None:
    entry = _constant(model, ".table")
    _replace(entry, numpy_helper.to_array(entry)[:-1])


def _weight(model: onnx.ModelProto) -> None:
    entry = _constant(model, ".weight")
    _replace(entry, numpy_helper.to_array(entry) // 2)


def _divisor(model: onnx.ModelProto) -> None:
    entry = _constant(model, ".divisor")
    _replace(entry, numpy_helper.to_array(entry) * 2)


def _edited(change: Callable[[dict], object]) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        (entry,) = (entry for entry in model.metadata_props if entry.key == PROGRAM_KEY)
        values = json.loads(entry.value)
        change(values)
        entry.value = json.dumps(values)

    return edit


def _layer(values: dict) -> dict:
    return next(step for step in values["steps"] if step["step"] == "Convolution")


def _rescale(values: dict) -> dict:
    return next(step for step in values["steps"] if step["step"] == "Rescale")


TAMPERED = {
    "a multiplier": (_multiplier, "stem.0.*has the multiplier 1073741823, which is not in 2\\*\\*30"),
    "a table": (_table, "has a table of 767 entries, not 256 a channel"),
    "weights": (_weight, "has a proof for other weights or biases than its own"),
    "a divisor": (_divisor, "contradicts itself: its graph has another initializer .*divisor"),
    "no proof": (_edited(lambda v: _layer(v).pop("proof")), "has no proof that its sums fit 32 bits"),
    "half a proof": (_edited(lambda v: _layer(v)["proof"].pop("bound")), "no proof .*bound missing"),
    "a false proof": (_edited(lambda v: _layer(v)["proof"].update(bound=7)), "has a proof for other weights"),
    "a shift": (_edited(lambda v: _rescale(v).update(shifts=[[[63]]] * 8)), "has the shift 63, which is not in 0 … 62"),
    "a float": (_edited(lambda v: _rescale(v).update(zero_point=1.5)), "1.5 stands where an integer belongs"),
    "another order": (_edited(lambda v: v["steps"].reverse()), "which no step before it gives"),
    "no steps": (_edited(lambda v: v.pop("steps")), "holds no complete integer program"),
    "a version": (_edited(lambda v: v.update(version=2)), "its version is 2"),
    "no program": (lambda model: model.metadata_props.clear(), "holds no integer program with its proofs"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_file_that_was_tampered_with_is_refused(what: str, file: Path, tmp_path: Path) -> None:
    change, said = TAMPERED[what]
    model = load_onnx(file)
    change(model)
    path = tmp_path / "tampered.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=said):
        load_engine(path, "integer")


def test_openvino_is_refused(file: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(UserError, match="needs 64-bit integers, which OpenVINO computes in 32 bits"):
        load_engine(file, "openvino")


def test_a_file_of_another_target_is_refused(tmp_path: Path) -> None:
    export_onnx(quantized(), tmp_path / "qdq.onnx", SIZE)
    with pytest.raises(UserError, match="holds no integer program"):
        load_engine(tmp_path / "qdq.onnx", "integer")


def small(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *layers).eval()
    return calibrate(quantize(model, target="integer"), [torch.randn(2, 3, 8, 8)])


def large_sums() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 212 * 212, 2)).eval()
    return calibrate(quantize(model, target="integer"), [torch.randn(2, 3, 212, 212)])


REFUSED = {
    "softmax": (lambda: small(nn.Softmax(1), nn.Conv2d(4, 4, 1)), "1: aten.softmax.int has no integer rule"),
    "normalisation": (
        lambda: small(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)),
        "1: aten.group_norm.default has no integer",
    ),
    "float": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), "the model is in float"),
    "no range": (lambda: quantize(nn.Sequential(nn.Conv2d(3, 4, 3))).eval(), "have no range yet"),
    "a sigmoid at the end": (lambda: small(nn.Sigmoid()), "1: aten.sigmoid.default .*no quantizer"),
    "large sums": (large_sums, "has sums of up to .*, which do not fit 32 bits"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_rule_is_refused(what: str, tmp_path: Path) -> None:
    build, said = REFUSED[what]
    path = tmp_path / "refused.onnx"
    with pytest.raises(UserError, match=said):
        export_integer(build(), path, 212 if what == "large sums" else 8)
    assert not path.exists()


def test_a_qdq_export_for_the_integer_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="write it with export_integer"):
        export_onnx(quantized(), tmp_path / "model.onnx", SIZE, target="integer")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(
            (name, 32)
            for name in ("cifar-resnet20", "cifar-resnet110", "efficientnet-b0", "efficientnet-quant-widese-b0")
        ),
        *((name, 64) for name in ("efficientnet-b7", "timm:tf_efficientnet_lite0", "timm:mobilenetv3_large_100")),
        *((name, 64) for name in ("timm:mobilenetv2_100", "timm:regnety_008", "torchvision:squeezenet1_1")),
    ],
)
def test_every_kind_of_network(name: str, size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(name).eval()
    model = model if "-quant-" in name else quantize(model, target="integer")
    calibrate(model, [torch.randn(2, 3, size, size)])
    path, images = tmp_path / "model.onnx", np.random.default_rng(1).integers(0, 256, (2, 3, size, size), np.uint8)
    export_integer(model, path, size)
    expected = reference.run(from_model(load_onnx(path), "the file"), images)
    for backend in ("integer", "onnxruntime"):
        np.testing.assert_array_equal(load_engine(path, backend)(images), expected)
