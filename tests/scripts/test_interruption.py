"""Ctrl-C, SIGUSR1 as a job scheduler sends it, SIGKILL, a full disk, and what comes after; test_multiproc.py has SIGTERM."""

from __future__ import annotations

import json
import random
import shlex
import signal
import threading
from pathlib import Path

import pytest
import torch

from effnet_quant import create_model

REPOSITORY = Path(__file__).parents[2]
RUN = shlex.split(
    "digits --arch cifar-resnet20 --num-classes 10 --image-size 32 --data-backend pytorch -b 4 -p 1 --epochs 1 "
    "--lr 0.01 --seed 3"
)


@pytest.fixture(scope="module")
def interrupted(start_process, tmp_path_factory):
    """A training that got Ctrl-C after three steps: its exit status, its error output and its workspace."""
    workspace = tmp_path_factory.mktemp("interrupted")
    with start_process("main.py", *RUN, "--workspace", workspace, cwd=workspace) as process:
        guard = threading.Timer(120, process.kill)
        guard.start()
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if "train: 3/" in line:
                    process.send_signal(signal.SIGINT)
        finally:
            guard.cancel()
    return process.returncode, "".join(lines), workspace


def test_exit_status_is_130_and_the_way_on_is_named(interrupted):
    code, err, workspace = interrupted
    assert code == 128 + signal.SIGINT == 130
    assert f"stopped by SIGINT; go on with --resume {workspace / 'checkpoint.pth.tar'}" in err
    assert "Traceback" not in err


def test_checkpoint_of_the_moment_is_whole(interrupted):
    _, err, workspace = interrupted
    state = torch.load(workspace / "checkpoint.pth.tar", weights_only=True)
    steps = err.count("train: ")
    assert state["epoch"] == 0
    assert 3 <= state["batch"] <= steps + 1  # the line of a step is printed when the next batch is asked for
    assert int(state["state_dict"]["bn1.num_batches_tracked"]) == state["batch"]
    files = sorted(path.name for path in workspace.iterdir())
    assert files == ["checkpoint.pth.tar", "experiment_raport.json", "run.yml"]


def test_resume_goes_on_from_there(run_script, interrupted, tmp_path):
    path = interrupted[2] / "checkpoint.pth.tar"
    batch = torch.load(path, weights_only=True)["batch"]
    result = run_script("main.py", *RUN, "--resume", path, "--workspace", tmp_path, "--prof", batch + 2)
    assert result.code == 0, result.err
    assert "train: 1/2," in result.err
    assert "train: 3/" not in result.err
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert (state["epoch"], state["batch"]) == (1, 0)
    assert int(state["state_dict"]["bn1.num_batches_tracked"]) == batch + 2
    (line,) = (tmp_path / "experiment_raport.json").read_text().splitlines()
    assert json.loads(line)["step"] == [0]


def test_killed_training_ends_with_the_weights_of_one_that_ran_through(start_process, run_script, tmp_path):
    """Quantized, from float weights over a calibration; the next one is a float network with dropout."""
    weights = tmp_path / "float.pth"
    torch.manual_seed(0)
    torch.save(create_model("cifar-resnet20").state_dict(), weights)
    run = [*RUN, "--calibration-images", 8]
    kill_and_resume(start_process, run_script, tmp_path, "quant_main.py", run, ["--pretrained-from-file", weights])


@pytest.mark.slow
def test_killed_float_training_ends_with_the_weights_of_one_that_ran_through(start_process, run_script, tmp_path):
    kill_and_resume(start_process, run_script, tmp_path, "main.py", [*RUN, "--arch", "efficientnet-b0"], [])


def kill_and_resume(start_process, run_script, tmp_path, script, run, start):
    run = [*run, "--prof", 6, "--checkpoint-every-steps", 1, "--use-ema", 0.9, "--mixup", 0.2]
    step = random.randrange(1, 6)  # any: the test holds for all
    with start_process(script, *run, *start, "--workspace", tmp_path / "killed", cwd=tmp_path) as process:
        guard = threading.Timer(120, process.kill)
        guard.start()
        for line in process.stderr:
            if f"train: {step}/" in line:
                process.kill()
        guard.cancel()
    assert process.returncode == -signal.SIGKILL
    checkpoint = tmp_path / "killed" / "checkpoint.pth.tar"
    assert torch.load(checkpoint, weights_only=True)["batch"] in (step, step + 1)
    resumed = run_script(script, *run, "--workspace", tmp_path / "killed", "--resume", checkpoint)
    straight = run_script(script, *run, *start, "--workspace", tmp_path / "straight")
    assert (resumed.code, straight.code) == (0, 0), resumed.err + straight.err
    states = [torch.load(tmp_path / name / "checkpoint.pth.tar", weights_only=True) for name in ("killed", "straight")]
    assert [state["epoch"] for state in states] == [1, 1]
    for part in ("state_dict", "state_dict_ema"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), (step, name)
    for one, other in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"]), step
    losses = [
        json.loads((tmp_path / name / "experiment_raport.json").read_text().splitlines()[-1])["data"]["train.loss"]
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


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(run_script, start_process, tmp_path):
    """A file-size limit stands in for the disk: the first checkpoint fits, one with momentum and average does not."""
    workspace = tmp_path / "workspace"
    assert run_script("main.py", *RUN, "--prof", 1, "--momentum", 0, "--workspace", workspace).code == 0
    checkpoint = workspace / "checkpoint.pth.tar"
    before = checkpoint.read_bytes()
    run = [*RUN, "--prof", 1, "--use-ema", 0.9, "--workspace", workspace, "--overwrite"]
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
