"""From a folder of pictures to a verified INT8 engine with two commands: effnet-quant train and effnet-quant quantize."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from effnet_quant import UserError, train
from effnet_quant.cli import app
from effnet_quant.engines.engine import load_engine
from effnet_quant.jobs.preset import Row
from effnet_quant.models.weights import read_weights
from effnet_quant.training.checkpoint import load_checkpoint

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten pictures of each of three colours, with noise, as folders of classes alone; not to be changed."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for index in range(10):
            pixels = np.clip(generator.normal(colour, 40, (24, 28, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def verb(monkeypatch, capsys, tmp_path):
    """Runs effnet-quant in an empty folder: (*words) -> (status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("effnet_quant.jobs.preset.within_reach", lambda place: False)  # no test downloads weights

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["effnet-quant", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            app.main()
        return end.value.code, *capsys.readouterr()

    return run


def test_two_commands(verb, pictures, tmp_path):
    status, out, err = verb("train", pictures, "--epochs", 6)
    assert status == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    assert f"from {pictures}: 24 training images of 3 classes, pictures of about 24 px" in out
    assert "the published weights of torchvision:mobilenet_v2 can't be reached: starts from random weights" in out
    assert "trains small-resnet9 at 32 px, 6 epochs of batches of 6, learning rate 0.03; a flag changes each" in out
    assert out.endswith(f"next: effnet-quant quantize runs/{run.name}\n")
    assert Image.open(run / "training.png").width > 800
    config = load_checkpoint(run / "checkpoint.pth.tar")["config"]
    assert (config["epochs"], config["lr_schedule"], config["warmup"], config["seed"]) == (6, "cosine", 1, 0)

    # the result against the raport file and the pictures
    result = json.loads((run / "result.json").read_text())
    lines = [json.loads(line) for line in (run / "experiment_raport.json").read_text().splitlines()]
    scores = [line["data"]["val.top1"] for line in lines]
    assert result["top1"] == pytest.approx(max(scores), abs=100 / 6)  # bfloat16 in training may move an image
    assert result["best_epoch"] == scores.index(max(scores)) + 1 == load_checkpoint(run / "model_best.pth.tar")["epoch"]
    assert [sum(row) for row in result["confusion"]] == [2, 2, 2]
    assert result["data"] == str(pictures)
    assert f"top-1 {result['top1']:.2f} % of 6 validation images" in out

    status, out, err = verb("quantize", f"runs/{run.name}")
    assert status == 0, err
    assert "quantized by the recipe standard with 24 images" in out
    assert f"runs/{run.name}/int8.onnx: the engine does what the simulation says on these 6 images, too few for" in out
    assert out.endswith(f"--pretrained-from-file runs/{run.name}/int8.onnx --image photo.jpg\n")
    engine = load_engine(run / "int8.onnx")
    assert engine.classes == ("blue", "green", "red")
    assert read_weights(run / "int8.safetensors").card.target == "onnxruntime"
    rows = json.loads((run / "summary.json").read_text())
    assert [row["variant"] for row in rows] == ["FP32 engine", "INT8 engine"]
    assert rows[1]["size_bytes"] == (run / "int8.onnx").stat().st_size < 0.3 * rows[0]["size_bytes"]
    answer = engine.predict(pictures / "red" / "0.png")
    assert answer["top"][0]["class"] in COLOURS


@pytest.mark.slow
def test_a_flag_overrides_the_preset_and_a_run_goes_on_with_its_own_settings(verb, pictures, tmp_path):
    status, _, err = verb("train", pictures, "--epochs", 4, "--run-epochs", 2, "--lr", 0.02, "--workspace", "here")
    assert status == 0, err
    assert not (tmp_path / "here" / "result.json").exists()
    status, out, err = verb("quantize", "here")
    assert (status, out) == (2, "")
    assert err.startswith("error: here holds no result.json, which effnet-quant train writes at its end; finish")
    status, out, err = verb("train", pictures, "--resume", "here/checkpoint.pth.tar")
    assert status == 0, err
    assert "epoch 3/4" in out
    assert "epoch 1/4" not in out
    config = load_checkpoint(tmp_path / "here" / "checkpoint.pth.tar")["config"]
    assert (config["epochs"], config["lr"]) == (4, 0.02)
    assert json.loads((tmp_path / "here" / "result.json").read_text())["epochs"] == 4
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_images_of_a_training_must_still_be_there(verb, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    assert verb("train", "data", "--epochs", 1, "--workspace", "here")[0] == 0
    shutil.move(tmp_path / "data", tmp_path / "moved")
    status, out, err = verb("quantize", "here")
    assert (status, out) == (2, "")
    assert err.startswith(
        f"error: the images of here are no longer in {tmp_path / 'data'}; put them there again, or give"
    )


@pytest.mark.slow
def test_the_same_from_python(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("effnet_quant.jobs.preset.within_reach", lambda place: False)
    monkeypatch.setattr("effnet_quant.jobs.preset.ROWS_FROM_NOTHING", (Row(float("inf"), 2, 8, 0.05),))
    result = train(str(pictures))
    assert (result.epochs, result.images, result.classes) == (2, 6, ["blue", "green", "red"])
    assert (tmp_path / result.folder / "training.png").is_file()
    assert result.per_class() == [100 * row[index] / 2 for index, row in enumerate(result.confusion)]
    assert "trains small-resnet9 at 32 px, 2 epochs of batches of 6, learning rate 0.05" in capsys.readouterr().out
    with pytest.raises(UserError, match="chooses all settings; give a ModelCard"):
        train(str(pictures), "digits")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda root: [shutil.rmtree(folder) for folder in root.iterdir()],
            "there is no folder {root}/train; DATA must hold a folder of each class, or train/<class>/ and val/<class>/.",
        ),
        (
            lambda root: [shutil.rmtree(root / name) for name in ("blue", "red")],
            "{root} has one class, green; a classifier",
        ),
        (
            lambda root: [file.unlink() for file in (root / "red").iterdir()],
            "the class red of {root} has no training images; add some, or remove its folder.",
        ),
        (
            lambda root: [file.unlink() for file in sorted((root / "red").iterdir())[3:]],
            "the class red of {root} has 2 training images; give at least 5 of every class, better 100.",
        ),
    ],
    ids=["empty", "one class", "empty class", "few images"],
)
def test_data_that_can_not_be_learned_is_one_sentence(verb, pictures, tmp_path, change, sentence):
    root = tmp_path / "data"
    shutil.copytree(pictures, root)
    change(root)
    status, out, err = verb("train", root)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {sentence.format(root=root)}")
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
