"""SIGTERM and SIGUSR1, as a job scheduler sends them, SIGKILL, a full disk, and what comes after."""

from __future__ import annotations

import json
import random
import shlex
import signal
import threading
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
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


def test_killed_run_ends_with_the_weights_of_one_that_ran_through(start_process, run_script, tmp_path):
    run = [*RUN, "--prof", 6, "--checkpoint-every-steps", 1, "--use-ema", 0.9, "--mixup", 0.2, "--epochs", 1]
    step = random.randrange(1, 6)  # any: the test holds for all
    with start_process("main.py", *run, "--workspace", tmp_path / "killed", cwd=tmp_path) as process:
        guard = threading.Timer(120, process.kill)
        guard.start()
        for line in process.stderr:
            if f"train: {step}/" in line:
                process.kill()
        guard.cancel()
    assert process.returncode == -signal.SIGKILL
    checkpoint = tmp_path / "killed" / "checkpoint.pth.tar"
    assert torch.load(checkpoint, weights_only=True)["batch"] in (step, step + 1)
    resumed = run_script("main.py", *run, "--workspace", tmp_path / "killed", "--resume", checkpoint)
    straight = run_script("main.py", *run, "--workspace", tmp_path / "straight")
    assert (resumed.code, straight.code) == (0, 0)
    states = [torch.load(tmp_path / name / "checkpoint.pth.tar", weights_only=True) for name in ("killed", "straight")]
    assert [state["epoch"] for state in states] == [1, 1]
    for part in ("state_dict", "state_dict_ema"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), (step, name)
    for one, other in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"]), step
    losses = [
        json.loads((tmp_path / name / "experiment_raport.json").read_text())["data"]["train.loss"]
        for name in ("killed", "straight")
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_usr1_ends_with_a_status_to_requeue_on(start_process, tmp_path):
    with start_process("main.py", *RUN, "--workspace", tmp_path, cwd=tmp_path) as process:
        guard = threading.Timer(120, process.kill)
        guard.start()
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "train: 2/" in line:
                process.send_signal(signal.SIGUSR1)
        guard.cancel()
    assert process.returncode == 128 + signal.SIGUSR1 == 138
    assert f"stopped by SIGUSR1; go on with --resume {tmp_path / 'checkpoint.pth.tar'}" in "".join(lines)


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(start_process, tmp_path):
    """A file-size limit stands in for the disk: the first checkpoint fits, one with momentum and average does not."""
    workspace = tmp_path / "workspace"
    first = [*RUN, "--prof", 1, "--momentum", 0, "--workspace", workspace]
    with start_process("main.py", *first, cwd=tmp_path) as process:
        process.communicate(timeout=120)
    assert process.returncode == 0
    checkpoint = workspace / "checkpoint.pth.tar"
    before = checkpoint.read_bytes()
    run = [*RUN, "--prof", 1, "--use-ema", 0.9, "--workspace", workspace]
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 1000},) * 2)"
    script = tmp_path / "limited.py"
    script.write_text(f"""import signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
{limit}
sys.path.insert(0, {str(REPOSITORY)!r})
from effnet_quant.cli.main import main
main()
""")
    with start_process(script, *run, cwd=tmp_path) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"can't write {checkpoint}" in err
    assert checkpoint.read_bytes() == before
    assert not list(workspace.glob(".*"))
