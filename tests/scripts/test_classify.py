"""Where classify.py's images come from, and which flags go with which file; what it answers is in test_scripts.py."""

import http.server
import json
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_quant import UserError, create_model, export_onnx
from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.cli import classify
from effnet_quant.export.options import ExportOptions
from effnet_quant.models.weights import write_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, an engine for 32 px, one for any size, and an image in three formats."""
    folder = tmp_path_factory.mktemp("classify")
    torch.manual_seed(0)
    model = create_model("cifar-resnet20").eval()
    card = ModelCard(arch="cifar-resnet20", num_classes=10, input=InputSpec(32, 36))
    write_weights(folder / "model.safetensors", model.state_dict(), card)
    export_onnx(model, folder / "model.onnx", 32, card=card)
    export_onnx(model, folder / "open.onnx", 32, card=card, options=ExportOptions(dynamic_size=True))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 44, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    Image.fromarray(pixels).save(folder / "photo.webp", lossless=True)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path):
    """Serves the folder; /short.png is a picture of which the second half does not come."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/short.png":
                return super().do_GET()
            content = (folder / "photo.png").read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def top(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_an_image_is_the_same_from_a_file_and_a_server_in_png_and_webp(folder: Path, server: str, capsys) -> None:
    images = [str(folder / "photo.png"), str(folder / "photo.webp"), f"{server}/photo.png", f"{server}/photo.jpg"]
    weights = ["--pretrained-from-file", str(folder / "model.onnx"), "--json", "--topk", "10"]
    assert classify.job([*weights, "--image", *images]) == 0
    rows = top(capsys)
    assert [row["image"] for row in rows] == images
    assert rows[0]["top"] == rows[1]["top"] == rows[2]["top"]
    assert rows[3]["top"][0]["probability"] == pytest.approx(rows[0]["top"][0]["probability"], abs=0.2)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ("/gone.png", "the server answers 404 File not found; check the address"),
        ("/my photo.png", "can't be fetched (URL can't contain control characters"),
        ("/short.png", "ended after"),
        ("/model.safetensors", "is not an image or is damaged"),
    ],
)
def test_what_a_server_does_not_give_is_one_sentence(
    folder: Path, server: str, capsys: pytest.CaptureFixture[str], image: str, sentence: str
) -> None:
    model = ["--pretrained-from-file", str(folder / "model.onnx"), "--json"]
    with pytest.raises(UserError) as caught:  # the only image
        classify.job([*model, "--image", server + image])
    assert sentence in str(caught.value)
    assert server + image in str(caught.value)
    assert classify.job([*model, "--image", server + image, str(folder / "photo.png")]) == 2  # one of several
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert json.loads(printed.out)["image"] == str(folder / "photo.png")


@pytest.mark.parametrize("size", ["1", "2", "32"])
def test_an_image_that_is_named_twice_is_answered_twice(folder: Path, capsys, size: str) -> None:
    images = [str(folder / name) for name in ("photo.png", "photo.jpg", "photo.png")]
    model = ["--pretrained-from-file", str(folder / "model.onnx"), "--json", "-b", size]
    assert classify.job([*model, "--image", *images]) == 0
    rows = top(capsys)
    assert [row["image"] for row in rows] == images
    assert rows[0] == rows[2]


def test_flags_that_an_engine_can_not_follow_are_refused(folder: Path, capsys) -> None:
    image = ["--json", "--image", str(folder / "photo.png")]
    engine = ["--pretrained-from-file", str(folder / "model.onnx"), *image]
    with pytest.raises(
        UserError, match=r"model\.onnx takes images of 32 px; leave --image-size out, or .*--dynamic-size"
    ):
        classify.job([*engine, "--image-size", "48"])
    with pytest.raises(UserError, match="--num-classes, --precision: an engine is what it was exported as"):
        classify.job([*engine, "--precision", "AMP", "--num-classes", "10"])
    # where the size is open, the engine sees what the weights see
    for file in ("open.onnx", "model.safetensors"):
        model = ["--pretrained-from-file", str(folder / file), "--arch", "cifar-resnet20", "--image-size", "48"]
        assert classify.job([*model, *image]) == 0
    engine_row, weights_row = top(capsys)
    assert [entry["index"] for entry in engine_row["top"]] == [entry["index"] for entry in weights_row["top"]]
    for ours, theirs in zip(engine_row["top"], weights_row["top"], strict=True):
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-4)
