"""A run overwrites no other run, and goes on with the data that it began with."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
import torch

from effnet_quant.training.workspace import LOCK, locked

NETWORK = shlex.split("--arch cifar-resnet20 --image-size 32 -b 6 -j 0 --seed 3 --training-only")
DIGITS = ["digits", *NETWORK, "--num-classes", 10, "--prof", 1]


@pytest.fixture(scope="module")
def trained(run_script, tmp_path_factory):
    """A workspace with the checkpoint of one epoch."""
    workspace = tmp_path_factory.mktemp("trained")
    result = run_script("main.py", *DIGITS, "--epochs", 1, "--workspace", workspace)
    assert result.code == 0, result.err
    return workspace


@pytest.fixture
def workspace(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "workspace")


def epochs(workspace):
    return torch.load(workspace / "checkpoint.pth.tar", weights_only=True)["epoch"]


@pytest.mark.parametrize("kept", ["checkpoint.pth.tar", "model_best.pth.tar"])
def test_a_new_run_where_a_checkpoint_lies_is_refused_with_the_ways_on(run_script, workspace, kept):
    (workspace / "checkpoint.pth.tar").rename(workspace / kept)
    before = (workspace / kept).read_bytes()
    result = run_script("main.py", *DIGITS, "--epochs", 1, "--workspace", workspace)
    assert result.code == 2
    (error,) = result.error_lines
    path = workspace / kept
    ways = f"go on from it with --resume {path}, choose another --workspace, or replace it with --overwrite."
    assert error == f"error: {path} is an earlier run's checkpoint; {ways}"
    assert path.read_bytes() == before
    assert {path.name for path in workspace.iterdir()} == {kept, "experiment_raport.json", "run.yml"}


def test_the_ways_on(run_script, workspace, tmp_path):
    ways = {
        "overwritten": (["--epochs", 1, "--overwrite"], 1),
        "resumed": (["--epochs", 2, "--resume", workspace / "checkpoint.pth.tar"], 2),
        "without checkpoints": (["--epochs", 1, "--no-checkpoints"], 2),
        "evaluated": (["--evaluate"], 2),
    }
    for way, (flags, expected) in ways.items():
        result = run_script("main.py", *DIGITS, *flags, "--workspace", workspace)
        assert result.code == 0, (way, result.err)
        assert epochs(workspace) == expected, way


def test_a_second_run_at_the_same_time_is_refused(run_script, workspace):
    before = (workspace / "checkpoint.pth.tar").read_bytes()
    resume = ["--epochs", 2, "--resume", workspace / "checkpoint.pth.tar", "--workspace", workspace]
    with locked(workspace):
        result = run_script("main.py", *DIGITS, *resume)
        evaluated = run_script("main.py", *DIGITS, "--evaluate", "--workspace", workspace)
    assert result.code == 2
    assert f"another run uses {workspace} (process " in result.error_lines[0]
    assert (workspace / "checkpoint.pth.tar").read_bytes() == before
    assert evaluated.code == 0, evaluated.err
    assert not (workspace / LOCK).exists()
    assert run_script("main.py", *DIGITS, *resume).code == 0
    assert not (workspace / LOCK).exists()


def test_a_run_that_fails_gives_its_lock_back(run_script, tmp_path):
    result = run_script("main.py", *DIGITS, "--epochs", 1, "--lr", 1e39, "--prof", 3, "--workspace", tmp_path)
    assert result.code == 2
    assert "not finite" in result.err
    assert not (tmp_path / LOCK).exists()


@pytest.fixture(scope="module")
def pictures(run_script, image_folder, tmp_path_factory):
    """A run on a folder of pictures: its command line, and its workspace."""
    workspace = tmp_path_factory.mktemp("pictures")
    command = [*NETWORK, "--num-classes", 3, "--workspace", workspace]
    result = run_script("main.py", image_folder, *command, "--epochs", 1)
    assert result.code == 0, result.err
    return command, workspace / "checkpoint.pth.tar"


@pytest.mark.parametrize(
    ("renamed", "says"),
    [
        ({"bear": "dog"}, "it lacks bear and adds dog; resume on the data that the run began with, or start"),
        ({"bear": None}, "it lacks bear;"),
        ({"apple": "zebra"}, "it lacks apple and adds zebra;"),
    ],
)
def test_resuming_on_other_classes_is_refused(run_script, image_folder, pictures, tmp_path, renamed, says):
    command, checkpoint = pictures
    data = shutil.copytree(image_folder, tmp_path / "data")
    for old, new in renamed.items():
        for split in ("train", "val"):
            if new is None:
                shutil.rmtree(data / split / old)
            else:
                (data / split / old).rename(data / split / new)
    before = checkpoint.read_bytes()
    result = run_script("main.py", data, *command, "--epochs", 2, "--resume", checkpoint)
    assert result.code == 2
    assert f"{data} has other classes than {checkpoint}: {says}" in result.error_lines[0]
    assert checkpoint.read_bytes() == before
    if None not in renamed.values():
        result = run_script("main.py", data, *command[:-1], tmp_path, "--evaluate", "--resume", checkpoint)
        assert result.code == 0, result.err
        assert "note: " in result.err
        assert "They count by their order." in result.err


@pytest.mark.parametrize("change", ["moved", "renamed", "fewer"])
def test_other_images_of_the_same_classes_are_said(run_script, image_folder, pictures, tmp_path, change, write_images):
    command, checkpoint = pictures
    data = shutil.copytree(image_folder, tmp_path / "data")
    if change == "renamed":
        (data / "train/bear/01.png").rename(data / "train/bear/other.png")
    elif change == "fewer":
        (data / "train/bear/01.png").unlink()
    result = run_script("main.py", data, *command[:-1], tmp_path, "--epochs", 2, "--resume", checkpoint)
    assert result.code == 0, result.err
    said = f"note: {data} has other training images than {checkpoint} began with (18 then, "
    assert (said in result.err) == (change != "moved")
    if change == "fewer":
        assert "17 now)" in result.err
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert state["data"]["images"] == (17 if change == "fewer" else 18)
    json.dumps(state["data"])
