"""Engine.predict against the engine called with images that are prepared by hand."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_quant import InputSpec, ModelCard, UserError, calibrate, create_model, export_onnx, load_engine, quantize
from effnet_quant.engines.engine import Engine
from effnet_quant.export.options import ExportOptions

CLASSES = ("ant", "bee", "cat")
SPEC = InputSpec(32, 32, "bilinear", (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    return calibrate(quantize(create_model("cifar-resnet20", 3).eval()), [images], method="max").eval()


@pytest.fixture(scope="module")
def engine(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("engine") / "int8.onnx"
    export_onnx(model, path, 32, card=ModelCard("cifar-resnet20", num_classes=3, classes=CLASSES, input=SPEC))
    return load_engine(path)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Of the size that the engine takes, so that nothing is scaled."""
    return np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


def by_hand(engine: Engine, pictures: np.ndarray) -> list[dict[str, float]]:
    normalised = (pictures.astype(np.float64) / 255 - SPEC.mean) / SPEC.std
    logits = engine(normalised.astype(np.float32).transpose(0, 3, 1, 2).copy()).astype(np.float64)
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return [dict(zip(CLASSES, row, strict=True)) for row in exponentials / exponentials.sum(1, keepdims=True)]


def probabilities(answer: dict) -> dict[str, float]:  # type: ignore[type-arg]
    return {entry["class"]: entry["probability"] for entry in answer["top"]}


def test_every_form_of_an_image_gets_the_same_named_probabilities(
    engine: Engine, pictures: np.ndarray, tmp_path: Path
) -> None:
    expected = by_hand(engine, pictures[:1])[0]
    image = Image.fromarray(pictures[0])
    image.save(tmp_path / "picture.png")
    tensor = torch.from_numpy(pictures[0]).movedim(-1, 0)
    for form in (str(tmp_path / "picture.png"), tmp_path / "picture.png", image, pictures[0], tensor):
        assert probabilities(engine.predict(form)) == pytest.approx(expected, abs=1e-3)
    best = max(expected, key=expected.get)  # type: ignore[arg-type]
    (only,) = engine.predict(image, topk=1)["top"]
    assert (only["class"], only["index"]) == (best, CLASSES.index(best))


def test_a_list_and_an_array_of_images_get_a_list(engine: Engine, pictures: np.ndarray) -> None:
    expected = by_hand(engine, pictures)
    for several in (pictures, list(pictures), [Image.fromarray(picture) for picture in pictures]):
        answers = engine.predict(several)
        assert len(answers) == 40
        assert all(
            probabilities(answer) == pytest.approx(row, abs=1e-3) for answer, row in zip(answers, expected, strict=True)
        )
    assert engine.predict([]) == []


def test_images_are_scaled_and_turned_as_the_card_and_the_file_say(engine: Engine, pictures: np.ndarray) -> None:
    grey = Image.fromarray(pictures[0]).convert("L")
    assert engine.predict(grey) == engine.predict(np.asarray(grey)) == engine.predict(grey.convert("RGB"))
    large = Image.fromarray(pictures[0]).resize((96, 64), Image.Resampling.NEAREST)
    left = Image.fromarray(np.asarray(large)).transpose(Image.Transpose.ROTATE_90)
    turned = left.copy()
    turned.getexif()[0x0112] = 6  # "turn it a quarter to the right"
    assert engine.predict(turned) == engine.predict(large)
    assert engine.predict(left) != engine.predict(large)


def test_pixels_and_threads_give_the_same(
    model: torch.nn.Module, engine: Engine, pictures: np.ndarray, tmp_path: Path
) -> None:
    options = ExportOptions(normalisation=SPEC)
    card = ModelCard("cifar-resnet20", num_classes=3, classes=CLASSES, input=SPEC)
    export_onnx(model, tmp_path / "pixels.onnx", 32, card=card, options=options)
    pixels = load_engine(tmp_path / "pixels.onnx")
    alone = [engine.predict(picture) for picture in pictures[:12]]
    for answer, other in zip(alone, pixels.predict(pictures[:12]), strict=True):
        assert probabilities(other) == pytest.approx(probabilities(answer), abs=0.05)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(engine.predict, pictures[:12])) == alone


def test_an_engine_says_what_it_is(engine: Engine) -> None:
    assert repr(engine) == (
        f"Engine({str(engine.path)!r}: cifar-resnet20, onnxruntime, {engine.precision}, cpu; "
        "takes input float32 (N, 3, 32, 32), 3 classes)"
    )
    assert engine.classes == CLASSES


def test_an_export_without_a_card_has_what_create_model_knows(model: torch.nn.Module, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "int8.onnx", 24)
    loaded = load_engine(tmp_path / "int8.onnx")
    card = loaded.card
    assert (card.arch, card.num_classes, card.target) == ("cifar-resnet20", 3, "onnxruntime")
    assert card.input == InputSpec(24, 24)
    assert card.quant_spec is not None
    answer = loaded.predict(np.zeros((50, 40, 3), np.uint8))
    assert [entry["class"] for entry in answer["top"]] == [f"class {entry['index']}" for entry in answer["top"]]
    assert math.fsum(entry["probability"] for entry in answer["top"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((32, 32, 3), np.float32), r"an array of float32 \(32, 32, 3\) is no image"),
        (np.zeros((3, 32, 32), np.uint8), r"an array of uint8 \(3, 32, 32\) is no image"),
        (torch.zeros(3, 32, 32), r"a tensor of float32 \(3, 32, 32\) is no image"),
        (3, "a int is no image"),
        ("missing.jpg", "missing.jpg"),
    ],
)
def test_what_is_no_image_is_said(engine: Engine, image: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        engine.predict(image)


def test_an_engine_of_something_else_says_so(tmp_path: Path) -> None:
    tokens = torch.zeros(2, 6)
    export_onnx(torch.nn.Linear(6, 2).eval(), tmp_path / "linear.onnx", inputs=(tokens,))
    engine = load_engine(tmp_path / "linear.onnx")
    assert "takes input float32 (N, 6))" in repr(engine)
    with pytest.raises(UserError, match="predict is for engines that take one image"):
        engine.predict(np.zeros((32, 32, 3), np.uint8))
