"""SIGTERM, as a job scheduler sends it, and what comes after."""

from __future__ import annotations

import json
import shlex
import signal
import threading

import pytest
import torch

RUN = shlex.split(
    "digits --arch efficientnet-b0 --num-classes 10 --image-size 32 --data-backend pytorch -b 4 -p 1 --epochs 1 "
    "--lr 0.01 --seed 3"
)


@pytest.fixture(scope="module")
def terminated(start_process, tmp_path_factory):
    """A training that got SIGTERM after three steps: its exit status, its error output and its workspace."""
    workspace = tmp_path_factory.mktemp("terminated")
    with start_process("main.py", *RUN, "--workspace", workspace, cwd=workspace) as process:
        guard = threading.Timer(120, process.kill)
        guard.start()
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if "train: 3/" in line:
                    process.send_signal(signal.SIGTERM)
        finally:
            guard.cancel()
    return process.returncode, "".join(lines), workspace


def test_exit_status_is_143_and_the_way_on_is_named(terminated):
    code, err, workspace = terminated
    assert code == 128 + signal.SIGTERM == 143
    assert f"stopped by SIGTERM; go on with --resume {workspace / 'checkpoint.pth.tar'}" in err
    assert "Traceback" not in err


def test_checkpoint_of_the_moment_is_whole(terminated):
    _, err, workspace = terminated
    state = torch.load(workspace / "checkpoint.pth.tar", weights_only=True)
    steps = err.count("train: ")
    assert state["epoch"] == 0
    assert 3 <= state["batch"] <= steps + 1  # the line of a step is printed when the next batch is asked for
    assert int(state["state_dict"]["stem.bn.num_batches_tracked"]) == state["batch"]
    assert sorted(path.name for path in workspace.iterdir()) == ["checkpoint.pth.tar", "experiment_raport.json"]


def test_resume_goes_on_from_there(run_script, terminated, tmp_path):
    path = terminated[2] / "checkpoint.pth.tar"
    batch = torch.load(path, weights_only=True)["batch"]
    result = run_script("main.py", *RUN, "--resume", path, "--workspace", tmp_path, "--prof", batch + 2)
    assert result.code == 0, result.err
    assert "train: 1/2," in result.err
    assert "train: 3/" not in result.err
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert (state["epoch"], state["batch"]) == (1, 0)
    assert int(state["state_dict"]["stem.bn.num_batches_tracked"]) == batch + 2
    (line,) = (tmp_path / "experiment_raport.json").read_text().splitlines()
    assert json.loads(line)["step"] == [0]
