"""The flags that choose and read data, through main.py."""

from __future__ import annotations

import json
import os
import shlex
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_quant.data.folders import FolderSource
from effnet_quant.data.shards import pack

TINY = shlex.split("--arch cifar-resnet20 --image-size 32 --epochs 1 -b 6 --seed 1 --lr 0.01")


def raport(folder):
    return [json.loads(line)["data"] for line in (folder / "experiment_raport.json").read_text().splitlines()]


@pytest.mark.parametrize("data", [["nowhere", "--data-backend", "synthetic"], ["synthetic"]])
def test_synthetic_images_need_no_data(run_script, tmp_path, data):
    arguments = ["--num-classes", 7, "--prof", 3, "-j", 2, "--workspace", tmp_path]
    result = run_script("main.py", *data, *TINY, *arguments)
    assert result.code == 0, result.err
    (metrics,) = raport(tmp_path)
    assert min(metrics["train.loss"], metrics["val.loss"]) > 0


def test_an_epoch_of_shards_goes_on_with_as_many_workers(run_script, image_folder, tmp_path):
    pytest.importorskip("webdataset", reason="needs the extra 'webdataset'")
    for split in ("train", "val"):
        assert len(list(pack(FolderSource(image_folder / split), tmp_path / split, 5))) == 18
    arguments = [tmp_path, *TINY, "--num-classes", 3, "--data-backend", "pytorch", "--workspace", tmp_path]
    result = run_script("main.py", *arguments, "-j", 1)
    assert result.code == 0, result.err
    checkpoint = tmp_path / "checkpoint.pth.tar"
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "epoch": 0, "batch": 2}, checkpoint)
    result = run_script("main.py", *arguments, "-j", 2, "--resume", checkpoint)
    assert result.code == 2
    assert "an epoch of shards that 1 workers read; resume it with -j 1." in result.err
    result = run_script("main.py", *arguments, "-j", 1, "--resume", checkpoint, "-p", 1)
    assert result.code == 0, result.err
    assert "train: 1/1" in result.err


def test_a_worker_that_dies_names_its_file(run_script, image_folder, tmp_path, monkeypatch):
    load = FolderSource.load

    def deadly(source, index):  # as a crash of a decoder would end the worker
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(source, index)

    monkeypatch.setattr(FolderSource, "load", deadly)
    arguments = [*TINY, "--num-classes", 3, "-j", 1, "--data-backend", "pytorch", "--workspace", tmp_path]
    result = run_script("main.py", image_folder, *arguments)
    assert result.code == 2
    (sentence,) = result.error_lines
    assert sentence.startswith(f"error: a data worker died while it was reading {image_folder}/train/apple/05.png;")


CIFAR_IN_TWO_PROCESSES = """
import sys, time
import torch, torchvision
from pathlib import Path
from effnet_quant.cli import main
from effnet_quant.cli.process import run

class Slow(torchvision.datasets.FakeData):  # a download that takes a while, which only one process may start
    targets, classes = [0, 1] * 12, ["cat", "dog"]
    data = torch.randint(0, 256, (24, 32, 32, 3), dtype=torch.uint8).numpy()

    def __init__(self, root, train, download):
        whole, begun = Path(root, f"whole{train}"), Path(root, f"begun{train}")
        if not whole.exists():
            begun.touch(exist_ok=False)
            time.sleep(2)
            whole.touch()

torchvision.datasets.CIFAR10 = Slow
run(main.job)
"""


@pytest.mark.slow
def test_one_process_downloads_for_all(run_process, repository, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(repository))
    (tmp_path / "script.py").write_text(CIFAR_IN_TWO_PROCESSES)
    flags = [*TINY, "--num-classes", 2, "-j", 0, "--data-backend", "pytorch", "--prof", 1, "--workspace", tmp_path]
    result = run_process("multiproc.py", "--nproc_per_node", 2, tmp_path / "script.py", "cifar10", *flags, cwd=tmp_path)
    assert result.code == 0, result.err


def test_a_flag_for_timms_crop(image_folder):
    timm_data = pytest.importorskip("timm.data")
    from effnet_quant.cli.main import build_parser
    from effnet_quant.cli.training import settings
    from effnet_quant.data.decoding import EncodedImage
    from effnet_quant.data.transforms import evaluation_transform

    flags = shlex.split("--arch efficientnet-b0 --image-size 112 --crop-pct 0.875 --interpolation bicubic")
    spec = settings(build_parser().parse([str(image_folder), *flags])).card.input
    theirs = timm_data.create_transform(112, interpolation="bicubic", crop_pct=0.875, normalize=False)
    differences = []
    for path in sorted((image_folder / "val").rglob("*.png")):
        with Image.open(path) as image:
            expected = torch.as_tensor(np.array(theirs(image.convert("RGB"))))
        ours = evaluation_transform(spec)(EncodedImage(np.fromfile(path, dtype=np.uint8)))
        assert ours.shape == expected.shape == (3, 112, 112)
        differences.append((ours.float() - expected).abs().mean().item())
    assert max(differences) < 1.5
