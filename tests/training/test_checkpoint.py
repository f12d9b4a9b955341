"""Checkpoints: whole or not at all, and nothing in them is executed."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from effnet_quant.errors import UserError
from effnet_quant.training.checkpoint import load_checkpoint, prepare_workspace, save_checkpoint
from effnet_quant.training.resume_point import Position


def state(epoch):
    return {"epoch": epoch, "state_dict": {"w": torch.full((3,), float(epoch))}}


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    save_checkpoint(state(4), tmp_path, "last.pth.tar")
    loaded = load_checkpoint(tmp_path / "last.pth.tar")
    assert loaded["epoch"] == 4
    assert loaded["state_dict"]["w"].tolist() == [4.0, 4.0, 4.0]
    assert loaded["versions"]["torch"] == torch.__version__
    assert names(tmp_path) == ["last.pth.tar"]


def test_best_is_a_copy(tmp_path):
    save_checkpoint(state(1), tmp_path, "last.pth.tar", is_best=True)
    save_checkpoint(state(2), tmp_path, "last.pth.tar")
    assert load_checkpoint(tmp_path / "last.pth.tar")["epoch"] == 2
    assert load_checkpoint(tmp_path / "model_best.pth.tar")["epoch"] == 1


def test_gathering_keeps_the_latest_epochs(tmp_path):
    for epoch in range(8, 13):
        save_checkpoint(state(epoch), tmp_path, "last.pth.tar", gather=3)
    kept = {path.name: load_checkpoint(path)["epoch"] for path in sorted(tmp_path.glob("checkpoint_*"))}
    # NVIDIA's scripts name them after the epoch counted from 0
    assert kept == {f"checkpoint_{epoch - 1:04d}.pth.tar": epoch for epoch in (10, 11, 12)}


def test_gathering_leaves_what_an_earlier_run_left(tmp_path):
    for epoch in (88, 89):
        save_checkpoint(state(epoch), tmp_path, "last.pth.tar", gather=-1)
    for epoch in (1, 2, 3):
        save_checkpoint(state(epoch), tmp_path, "last.pth.tar", gather=2)
    numbers = [path.name[11:15] for path in sorted(tmp_path.glob("checkpoint_*"))]
    assert numbers == ["0001", "0002", "0087", "0088"]


def test_gathering_all_keeps_all(tmp_path):
    for epoch in range(1, 5):
        save_checkpoint(state(epoch), tmp_path, "last.pth.tar", gather=-1)
    assert names(tmp_path) == [*(f"checkpoint_{epoch:04d}.pth.tar" for epoch in range(4)), "last.pth.tar"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, step):
    save_checkpoint(state(1), tmp_path, "last.pth.tar")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, full_disk)
        with pytest.raises(UserError, match=r"last\.pth\.tar: the disk is full"):
            save_checkpoint(state(2), tmp_path, "last.pth.tar", is_best=True)
    assert load_checkpoint(tmp_path / "last.pth.tar")["epoch"] == 1
    assert names(tmp_path) == ["last.pth.tar"]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="gone"):
        save_checkpoint(state(1), tmp_path / "gone", "last.pth.tar")


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save_checkpoint(state(1), tmp_path, "last.pth.tar")
    finally:
        os.umask(before)
    assert (tmp_path / "last.pth.tar").stat().st_mode & 0o777 == 0o640


def test_plain_weights_are_no_checkpoint(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth is no checkpoint.*--pretrained-from-file"):
        load_checkpoint(tmp_path / "weights.pth")


def test_checkpoint_of_nvidias_scripts_with_a_numpy_learning_rate_loads(tmp_path):
    # their cosine schedule computes with numpy, so the optimizer's state in their checkpoints holds a numpy scalar
    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(0.08), "params": [0]}]}
    torch.save({**state(7), "best_prec1": 71.5, "optimizer": optimizer}, tmp_path / "nvidia.pth.tar")
    loaded = load_checkpoint(tmp_path / "nvidia.pth.tar")
    assert loaded["epoch"] == 7
    assert float(loaded["optimizer"]["param_groups"][0]["lr"]) == 0.08


def test_workspace_is_created_with_its_parents(tmp_path):
    workspace = prepare_workspace(tmp_path / "a" / "b")
    assert workspace.is_dir()
    assert names(workspace) == []


def test_workspace_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"workspace .*file/inside: Not a directory.*--workspace"):
        prepare_workspace(tmp_path / "file" / "inside")


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path):
    old, young = tmp_path / ".checkpoint.pth.tar.abcd1234", tmp_path / ".checkpoint.pth.tar.efgh5678"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    prepare_workspace(tmp_path)
    assert names(tmp_path) == [young.name]


WRONG = {
    "epoch": (-1, 10**30, 1.5, "x", float("nan"), True, torch.ones(2), [1]),
    "batch": (-1, 2**70, 1.5, True, "x"),
    "step": (-1, float("inf"), torch.tensor(3)),
    "epochs_since_best": (-1, "x"),
    "best_prec1": (float("nan"), "x", [1], torch.ones(3), torch.tensor(float("nan")), {}),
    "processes": (0, -1, "x"),
    "optimizer": ("x", [1], 3),
    "scaler": ("x", [], 3),
    "loss_sums": ("x", 3, [torch.ones(2)], torch.ones(7), torch.ones(2, 2), torch.full((2,), torch.nan)),
    "rng": ("x", 3, {}, torch.ones(3), [torch.ones(3)], ["x"], [None], [[]]),
    "cuda_rng": ("x", [1]),
    "config": (
        "x",
        [1],
        3,
        torch.ones(2),
        {"seed": "x"},
        {"seed": -1},
        {"seed": 2**80},
        {"batch_size": [1]},
        {"workers": "x"},
    ),
    "state_dict": ("x", 3, [], {}, {"a": 1}, {3: torch.ones(1)}, {"a": torch.tensor(float("nan"))}),
    "state_dict_ema": ("x", {}, {"a": {}}, {"a": torch.zeros(1).expand(10**9)}),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_an_entry_that_is_not_what_it_must_be_is_named(tmp_path, name, value):
    torch.save({"epoch": 1, "state_dict": {"a": torch.ones(1)}, name: value}, tmp_path / "c.pth.tar")
    says = "holds no weights|can't be used: a (holds|repeats)" if name.startswith("state_dict") else name
    with pytest.raises(UserError, match=rf"c\.pth\.tar .*({says})|c\.pth\.tar ({says})"):
        load_checkpoint(tmp_path / "c.pth.tar")


@pytest.mark.parametrize("best", [None, 77.1, 3, torch.tensor(77.1), float("-inf"), np.float64(77.1)])
def test_scores_of_nvidias_and_our_checkpoints_are_taken(tmp_path, best):
    torch.save({"epoch": 1, "state_dict": {"a": torch.ones(1)}, "best_prec1": best}, tmp_path / "c.pth.tar")
    assert Position.of(load_checkpoint(tmp_path / "c.pth.tar"), "c").epoch == 1
