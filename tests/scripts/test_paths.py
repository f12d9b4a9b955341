"""Paths that no file can have, and folders in place of files: one sentence from every script."""

from __future__ import annotations

import pytest
import torch

from effnet_quant import create_model
from effnet_quant.card import ModelCard
from effnet_quant.models.weights import write_weights

PATHS = {
    "NUL": ("x\0y", "has a character that none has"),
    "long": ("a" * 300, "too long for the name of a file"),
    "long in all": ("a/" * 3000, "too long for the name of a file"),
}
# {} is the path, {weights} a weights file, {data} a folder of images, {output} a folder to write to
LINES = {
    "image": "classify.py --arch cifar-resnet20 --pretrained-from-file {weights} --image {}.jpg",
    "weights": "classify.py --arch cifar-resnet20 --pretrained-from-file {}.pth --image {data}/val/cat/00.jpg",
    "engine": "classify.py --pretrained-from-file {}e.onnx --image {data}/val/cat/00.jpg",
    "resume": "main.py {data} --arch cifar-resnet20 --num-classes 3 --resume {} --workspace {output}",
    "data": "main.py {} --arch cifar-resnet20 --workspace {output}",
    "workspace": "main.py {data} --arch cifar-resnet20 --num-classes 3 -j 0 --workspace {}",
    "raport": "main.py {data} --arch cifar-resnet20 --num-classes 3 -j 0 --workspace {output} --raport-file {}",
    "recipes": "launch.py --cfg_file {} --list",
    "checkpoint": "checkpoint2model.py --checkpoint-path {} --weight-path {output}/w.pth",
    "weights to write": "checkpoint2model.py --checkpoint-path {weights} --weight-path {}.pth",
    "ONNX to write": "model2onnx.py --arch cifar-resnet20 --pretrained-from-file {weights} --output {}",
    "lint": "effnet_quant/__main__.py verify --engine {} --lint tensorrt",
    "latency": "effnet_quant/__main__.py latency {}",
    "figures to write": "effnet_quant/__main__.py latency {weights} --json {}",
    "engine to serve": "effnet_quant/__main__.py serve {} {output}/repository --backend onnxruntime",
    "repository": "effnet_quant/__main__.py serve {weights} {} --backend onnxruntime",
    "name to serve": "effnet_quant/__main__.py serve {weights} {output}/repository --backend onnxruntime --name {}",
    "data to look at": "effnet_quant/__main__.py data {}",
    "shards to write": "effnet_quant/__main__.py data {data} -j 0 --pack {}",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    torch.manual_seed(0)
    write_weights(path, create_model("cifar-resnet20", 3).state_dict(), ModelCard(arch="cifar-resnet20", num_classes=3))
    return path


@pytest.fixture
def run_line(run_script, weights, image_folder, tmp_path, monkeypatch):
    """Runs one of LINES with a path in an empty folder: (name, path) -> ScriptResult."""
    monkeypatch.chdir(tmp_path)

    def run(name, path):
        places = {"weights": weights, "data": image_folder, "output": tmp_path}
        return run_script(*(word.format(path, **places) for word in LINES[name].split()))

    return run


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("name", LINES)
def test_a_path_that_no_file_can_have_is_one_sentence(run_line, name, kind, tmp_path):
    path, says = PATHS[kind]
    if name == "name to serve" and kind == "long in all":
        says = "can't be the name of a model"
    result = run_line(name, path)
    assert (result.code, len(result.error_lines)) == (2, 1), result.err
    assert says in result.err
    assert result.error_lines[0].isprintable()
    assert [entry for entry in tmp_path.rglob("*") if entry.is_file()] == []


@pytest.mark.parametrize("name", ["weights", "engine", "resume", "recipes", "checkpoint", "lint", "engine to serve"])
def test_a_folder_in_place_of_a_file_is_said(run_line, name, tmp_path):
    for suffix in ("", ".pth", "e.onnx"):
        (tmp_path / f"folder{suffix}").mkdir()
    result = run_line(name, tmp_path / "folder")
    assert (result.code, len(result.error_lines)) == (2, 1), result.err
    assert "is a folder; name a file in it" in result.err or "there is no recipe file" in result.err
