"""Models of several inputs and outputs, of any shape and type, in real ONNX Runtime sessions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from effnet_quant import UserError, export_onnx, quantize
from effnet_quant.quantization.placement.insertion import output_quantizers, quantizers


class Fused(nn.Module):
    """An image and a vector to a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.vector = nn.Linear(5, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Tensor]:
        features = torch.relu(self.conv(image)).mean((2, 3)) + self.vector(vector)
        return {"scores": self.head(features), "features": features}


class Pyramid(nn.Module):
    """Two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = torch.relu(self.first(x))
        return fine, self.second(fine)


class Tokens(nn.Module):
    """Integers to scores."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1))


def examples(name: str, batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, 12, 20, generator=generator)  # not square
    if name == "fused":
        return images, torch.randn(batch, 5, generator=generator)
    return (torch.randint(0, 11, (batch, 7), generator=generator),) if name == "tokens" else (images,)


MODELS = {"fused": Fused, "pyramid": Pyramid, "tokens": Tokens}
INPUTS = {
    "fused": {"image": [None, 3, 12, 20], "vector": [None, 5]},
    "pyramid": {"x": [None, 3, 12, 20]},
    "tokens": {"tokens": [None, 7]},
}
OUTPUTS = {"fused": ["scores", "features"], "pyramid": ["output_0", "output_1"], "tokens": ["output_0"]}
STRUCTURES = {"fused": {"dict": {"scores": 0, "features": 1}}, "pyramid": {"tuple": [0, 1]}, "tokens": 0}


def calibrated(name: str) -> nn.Module:
    """The quantized model with the ranges of one batch, found by hand."""
    model = quantize(MODELS[name]().eval())
    seen: dict[Any, float] = {}
    hooks = [
        quantizer.register_forward_pre_hook(lambda own, args: seen.update({own: args[0].abs().max().item()}))
        for _, quantizer in quantizers(model)
    ]
    for place in output_quantizers(model):
        place.start_tracking()
    model(*examples(name, 8))
    for hook in hooks:
        hook.remove()
    for quantizer, amax in seen.items():
        quantizer.set_amax(torch.tensor(amax))
    for place in output_quantizers(model):
        place.stop_tracking()
    return model


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return list(result.values()) if isinstance(result, dict) else list(result)


def signature(path: Path) -> dict[str, Any]:
    entries = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return dict(json.loads(entries["effnet_quant.signature"]))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@torch.no_grad()
def test_the_file_computes_the_model_at_any_batch(name: str, quantized: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = calibrated(name) if quantized else MODELS[name]().eval()
    export_onnx(model, tmp_path / "model.onnx", inputs=examples(name, 1))
    engine = session(tmp_path / "model.onnx")
    for batch in (1, 3):
        given = examples(name, batch)
        feed = {value.name: one.numpy() for value, one in zip(engine.get_inputs(), given, strict=True)}
        for got, expected in zip(engine.run(None, feed), flat(model(*given)), strict=True):
            if quantized:  # a value that rounds the other way is one step off
                assert np.linalg.norm(got - expected.numpy()) < 1e-2 * np.linalg.norm(expected.numpy())
            else:
                np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_file_says_what_it_takes_and_returns(name: str, tmp_path: Path) -> None:
    export_onnx(MODELS[name]().eval(), tmp_path / "model.onnx", inputs=examples(name, 1))
    found = signature(tmp_path / "model.onnx")
    dtype = "int64" if name == "tokens" else "float32"
    inputs = [{"name": key, "dtype": dtype, "shape": shape} for key, shape in INPUTS[name].items()]
    outputs = [{"name": key, "dtype": "float32"} for key in OUTPUTS[name]]
    assert found == {"inputs": inputs, "outputs": outputs, "structure": STRUCTURES[name]}
    assert [value.name for value in onnx.load(tmp_path / "model.onnx").graph.output] == OUTPUTS[name]


def test_a_classifier_of_square_images_has_the_names_it_had(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    export_onnx(model, tmp_path / "model.onnx", 8)
    assert signature(tmp_path / "model.onnx") == {
        "inputs": [{"name": "input", "dtype": "float32", "shape": [None, 3, 8, 8]}],
        "outputs": [{"name": "logits", "dtype": "float32"}],
        "structure": 0,
    }


def test_a_batch_that_the_model_fixes_stays_fixed(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(3, 2, 4).sum(1)

    export_onnx(Fixed().eval(), tmp_path / "model.onnx", inputs=(torch.randn(3, 8),))
    assert signature(tmp_path / "model.onnx")["inputs"][0]["shape"] == [3, 8]


def test_the_same_tensor_may_be_returned_twice_and_an_input_too(tmp_path: Path) -> None:
    class Again(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            y = x * 2
            return [y, y, x]

    export_onnx(Again().eval(), tmp_path / "model.onnx", inputs=(torch.randn(2, 3),))
    x = np.ones((5, 3), np.float32)
    for got, factor in zip(session(tmp_path / "model.onnx").run(None, {"x": x}), (2, 2, 1), strict=True):
        np.testing.assert_array_equal(got, factor * x)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = self.Gate()

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x * 2)


def test_a_refusal_names_the_module_and_prints_no_graph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"can't be traced: gate: ") as raised:
        export_onnx(Branching().eval(), tmp_path / "model.onnx", inputs=(torch.randn(2, 3),))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"can't be traced at 8 px: gate: ") as raised:
        export_onnx(Branching().eval(), tmp_path / "model.onnx", 8)
    assert "large enough" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_an_image_that_is_too_small_is_said_to_be(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.MaxPool2d(8)).eval()
    with pytest.raises(UserError, match="large enough"):
        export_onnx(model, tmp_path / "model.onnx", 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either"),
        ({"image_size": 8, "inputs": (torch.zeros(1, 3),)}, "give either"),
        ({"inputs": (torch.zeros(1, 3), torch.zeros(1, 3))}, "takes 1 inputs, not 2"),
    ],
)
def test_wrong_inputs_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export_onnx(Branching().eval(), tmp_path / "model.onnx", **given)


class Deciding(nn.Module):
    """A module that decides by the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y if y.mean() > 0 else -y


def test_the_reason_of_a_refusal_is_the_reason_and_nothing_else_is_printed(tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Deciding())
    says = r"can't be traced at 8 px: 1: its Python code decides by the values of a tensor.*torch\.where"
    with pytest.raises(UserError, match=says):
        export_onnx(model, tmp_path / "model.onnx", 8)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.BatchNorm1d(3)], ids=str)
def test_a_model_that_takes_no_images_is_told_of_inputs(layer: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give examples of its arguments as inputs=") as raised:
        export_onnx(nn.Sequential(layer).eval(), tmp_path / "model.onnx", 8)
    assert "large enough" not in str(raised.value)
