"""predict: every image once, whatever ends a run."""

from __future__ import annotations

import io
import json
import signal
import tarfile
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from effnet_quant import InputSpec, ModelCard, UserError, export_onnx, load_engine, predict
from effnet_quant.data import image_parts as parts_module
from effnet_quant.engines.deployment import Deployment, write_deployment

CARD = ModelCard(num_classes=3, classes=("apple", "bear", "cat"), input=InputSpec(32, 36))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> Path:
    """A deploy.json."""
    folder = tmp_path_factory.mktemp("deployed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    export_onnx(model.eval(), folder / "engine.onnx", 32, card=CARD)
    size = (folder / "engine.onnx").stat().st_size
    return write_deployment(Deployment("engine.onnx", size, "onnxruntime", "fp32", 1), folder)


@pytest.fixture
def engine(deployed):
    return load_engine(deployed)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("part-*.jsonl")) for line in path.read_text().splitlines()]


def alike(one: list[dict], other: list[dict]) -> bool:
    """Whether two answers name the same classes, with the same probabilities but for rounding."""
    return [entry["class"] for entry in one] == [entry["class"] for entry in other] and [
        entry["probability"] for entry in one
    ] == pytest.approx([entry["probability"] for entry in other], abs=1e-5)


def pack(path: Path, files: list[Path]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, file in enumerate(files):
            archive.add(file, f"{number:04}{file.suffix}")
            label = tarfile.TarInfo(f"{number:04}.cls")
            archive.addfile(label, io.BytesIO())


def test_a_folder_and_its_answers(engine, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "FILES_IN_A_PART", 10)
    result = predict(engine, image_folder / "val", tmp_path / "out", topk=2)
    assert (result.images, result.before, result.unreadable) == (18, 0, 0)
    lines = lines_of(tmp_path / "out")
    names = sorted(str(path.relative_to(image_folder / "val")) for path in (image_folder / "val").rglob("*.*g"))
    assert sorted(line["image"] for line in lines) == names
    for line in lines[:3]:
        assert alike(line["top"], engine.predict(str(image_folder / "val" / line["image"]), 2)["top"])
    # a run that was killed left the second part and a temporary file out
    (tmp_path / "out" / "part-00001.jsonl").unlink()
    (tmp_path / "out" / ".part-00001.jsonl.abc").write_text("half")
    first = (tmp_path / "out" / "part-00000.jsonl").stat().st_mtime_ns
    again = predict(engine, image_folder / "val", tmp_path / "out", topk=2)
    assert (again.images, again.before) == (18, 10)
    assert lines_of(tmp_path / "out") == lines
    assert (tmp_path / "out" / "part-00000.jsonl").stat().st_mtime_ns == first
    assert not list((tmp_path / "out").glob(".part*"))


def test_tars_and_what_can_not_be_read(engine, image_folder, tmp_path):
    files = sorted((image_folder / "train").rglob("*.*g"))
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff no image")
    shards = tmp_path / "shards"
    shards.mkdir()
    pack(shards / "0.tar", files[:9])
    pack(shards / "1.tar", [*files[9:], bad])
    result = predict(engine, shards, tmp_path / "out")
    assert (result.images, result.unreadable) == (19, 1)
    lines = {line["image"]: line for line in lines_of(tmp_path / "out")}
    assert len(lines) == 19
    assert alike(lines["0.tar/0003" + files[3].suffix]["top"], engine.predict(str(files[3]))["top"])
    assert "1.tar/0009.jpg is not an image or is damaged" in lines["1.tar/0009.jpg"]["error"]


def test_what_is_refused(engine, image_folder, tmp_path):
    with pytest.raises(UserError, match="there are no images at"):
        predict(engine, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        predict(engine, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match="no tar file or is damaged"):
        predict(engine, tmp_path / "broken.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    predict(engine, image_folder / "val", tmp_path / "out")
    with pytest.raises(UserError, match="answers of another run"):
        predict(engine, image_folder / "train", tmp_path / "out")
    with pytest.raises(UserError, match="answers of another run"):
        predict(engine, image_folder / "val", tmp_path / "out", topk=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        predict(engine, image_folder / "val", tmp_path / "mine")
    (tmp_path / "mine" / "predict.json").write_text("{}")
    with pytest.raises(UserError, match="is not of effnet-quant predict"):
        predict(engine, image_folder / "val", tmp_path / "mine")


@pytest.mark.slow
def test_a_killed_run_goes_on(start_process, run_process, deployed, write_images, tmp_path):
    write_images(tmp_path / "images", 3000, size=(48, 48))
    command = ["effnet_quant/__main__.py", "predict", "images", "--engine", deployed, "--output", "out"]
    process = start_process(*command, cwd=tmp_path)
    while not (tmp_path / "out" / "part-00000.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = run_process(*command, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "answers for 3000 images, " in result.out
    names = [line["image"] for line in lines_of(tmp_path / "out")]
    assert len(names) == 3000
    assert len(set(names)) == 3000
