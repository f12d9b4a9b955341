"""multiproc.py: several processes give what one would, and say what went wrong in any of them."""

from __future__ import annotations

import json
import math
import re
import shlex
import signal
import socket
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from effnet_quant import create_model

# the larger the batches, the less a value's rounding matters to BatchNorm over it
RUN = shlex.split(
    "digits --num-classes 10 --image-size 32 --data-backend pytorch -j 0 --epochs 1 --lr 0.01 --seed 3 "
    "--training-only -b 8"
)
FLOAT = ["--arch", "efficientnet-b0", "--dropout", 0, *RUN]
SMALL = ["--arch", "cifar-resnet20", *RUN]
TOGETHER = ["--nproc_per_node", 2]


@pytest.fixture
def script(tmp_path):
    """Writes a small script and returns its path."""

    def write(text):
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(text))
        return path

    return write


def train_loss(workspace):
    lines = (workspace / "experiment_raport.json").read_text().splitlines()
    return json.loads(lines[-1])["data"]["train.loss"]


def assert_same_training(one, two, steps):
    """Two processes, and one that added up the gradients of the same two batches, so that BatchNorm saw the same."""
    assert train_loss(two) == pytest.approx(train_loss(one), abs=1e-4)
    states = [torch.load(folder / "checkpoint.pth.tar", weights_only=True) for folder in (one, two)]
    assert [state["step"] for state in states] == [steps, steps]
    for name, tensor in states[0]["state_dict"].items():
        if "running" not in name and "num_batches" not in name and "output._" not in name:
            torch.testing.assert_close(states[1]["state_dict"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def compare_with_accumulation(run_process, run_script, tmp_path, script, arguments, steps):
    one, two = tmp_path / "one", tmp_path / "two"
    result = run_process(
        "multiproc.py", *TOGETHER, script, *arguments, "--prof", steps, "--workspace", two, cwd=tmp_path
    )
    assert result.code == 0, result.err
    accumulate = ["--optimizer-batch-size", 16, "--prof", 2 * steps]
    result = run_script(script.name, *arguments, *accumulate, "--workspace", one)
    assert result.code == 0, result.err
    assert_same_training(one, two, steps)


@pytest.fixture(scope="module")
def two_machines(run_script, start_process, tmp_path_factory):
    """Two processes on two "machines" on loopback, which run several command lines, and one alone, which runs the same:
    the folder of their workspaces, and what each machine said."""
    root = tmp_path_factory.mktemp("machines")
    torch.manual_seed(0)
    torch.save(create_model("cifar-resnet20").state_dict(), root / "float.pth")
    start = ["--pretrained-from-file", root / "float.pth"]
    calibrate = ["quant_main.py", *SMALL, *start, "--epochs", 0, "-b", 4, "-p", 1]
    calibrate += ["--calibration-method", "moving-average", "--calibration-images", 21]
    calibrated = ["--pretrained-from-file", root / "one" / "calibration" / "checkpoint.pth.tar"]
    trainings = {"float": ["main.py", *SMALL], "quantized": ["quant_main.py", *SMALL, *calibrated]}
    learned = ["quant_main.py", *SMALL, *start, "--quant-spec", "w8a8-lsq", "--gradual-start", 3, "--prof", 2]
    alone = [[*calibrate, "--workspace", root / "one" / "calibration"]]
    together = [
        [*calibrate, "--workspace", root / "two" / "calibration"],
        [*learned, "--calibration-images", 8, "--workspace", root / "two" / "learned"],
    ]
    for name, line in trainings.items():
        alone.append([*line, "--optimizer-batch-size", 16, "--prof", 4, "--workspace", root / "one" / name])
        together.append([*line, "--prof", 2, "--workspace", root / "two" / name])
    for line in alone:
        result = run_script(*line)
        assert result.code == 0, result.err
    (root / "jobs.json").write_text(json.dumps([[str(part) for part in line] for line in together]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [
        start_process(
            "multiproc.py", "--nnodes", 2, "--node_rank", rank, "--master_addr", "127.0.0.1", "--master_port", port,
            "--nproc_per_node", 1, "--log_dir", f"logs{rank}", Path(__file__).with_name("two_jobs.py"), "jobs.json",
            cwd=root,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    return root, outputs


@pytest.mark.parametrize("training", ["float", "quantized"])
def test_two_machines_are_one_process_with_the_doubled_batch(two_machines, training):
    root, _ = two_machines
    assert_same_training(root / "one" / training, root / "two" / training, steps=2)


def test_only_process_0_speaks_and_writes(two_machines):
    root, (first, second) = two_machines
    assert first[0].count("train.loss") == 3
    assert second[0] == ""
    (log,) = (root / "logs1").glob("*/attempt_0/0/stdout.log")
    assert log.read_text().count("train.loss") == 3
    files = sorted(path.name for path in (root / "two" / "float").iterdir())
    assert files == ["checkpoint.pth.tar", "experiment_raport.json", "run.yml"]


def test_calibration_images_are_shared_between_processes(two_machines):
    root, (first, _) = two_machines
    assert "calibrated on 21 images" in first[0]
    (log,) = (root / "logs1").glob("*/attempt_0/0/stderr.log")
    # 11 of 21 images are process 0's, 10 the other's, in batches of 4
    assert ("calibrate: 3/3" in first[1], "calibrate: 3/3" in log.read_text()) == (True, True)
    states = [
        torch.load(root / name / "calibration" / "checkpoint.pth.tar", weights_only=True)["state_dict"]
        for name in ("one", "two")
    ]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-6, atol=0, msg=name)


def test_learned_ranges_that_are_not_switched_on_yet_train_in_two_processes(two_machines):
    assert math.isfinite(train_loss(two_machines[0] / "two" / "learned"))


@pytest.mark.slow
def test_main_in_two_processes_is_one_with_the_doubled_batch(run_process, run_script, repository, tmp_path):
    compare_with_accumulation(run_process, run_script, tmp_path, repository / "main.py", FLOAT, 2)
    assert len(list((tmp_path / "multiproc_logs").glob("*/attempt_0/1/stdout.log"))) == 1
    # process 1 wrote nothing but its log
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "checkpoint.pth.tar",
        "experiment_raport.json",
    ]


@pytest.mark.slow
def test_quant_main_in_two_processes_is_one_with_the_doubled_batch(run_process, run_script, repository, tmp_path):
    start = ["--training-only", "--epochs", 1, "--prof", 1, "--workspace", tmp_path / "float"]
    result = run_script("main.py", *FLOAT, *start)
    assert result.code == 0, result.err
    weights = ["--pretrained-from-file", tmp_path / "float" / "checkpoint.pth.tar", "--calibration-images", 16]
    calibrated = tmp_path / "calibrated"
    arguments = ["--arch", "efficientnet-quant-b0", "--dropout", 0, *RUN]
    result = run_script("quant_main.py", *arguments, *weights, "--epochs", 0, "--workspace", calibrated)
    assert result.code == 0, result.err
    weights[1] = calibrated / "checkpoint.pth.tar"
    compare_with_accumulation(
        run_process, run_script, tmp_path, repository / "quant_main.py", [*arguments, *weights], 2
    )


def test_a_process_that_dies_ends_the_job_with_its_own_error(run_process, script, tmp_path):
    path = script(
        """
        import os, sys, time
        if os.environ["RANK"] == "1":
            print("error: image 7 is damaged", file=sys.stderr)
            sys.exit(2)
        time.sleep(60)
        """
    )
    start = time.monotonic()
    result = run_process("multiproc.py", *TOGETHER, path, cwd=tmp_path)
    assert time.monotonic() - start < 40
    assert result.code == 2
    assert "process 1 ended with status 2; the job has ended" in result.err
    assert "  error: image 7 is damaged" in result.err


def test_the_cause_is_told_from_its_consequences(run_process, repository, script, tmp_path):
    # process 0 loses its peer while it waits for it, and may be found dead first
    path = script(
        f"""
        import os, sys
        sys.path.insert(0, {str(repository)!r})
        import torch
        from effnet_quant.cli.process import run
        from effnet_quant.training.distributed import joined_world

        def job(arguments):
            with joined_world() as world:
                world.wait()
                if world.rank == 1:
                    os.kill(os.getpid(), 9)
                world.sum(torch.ones(3))
            return 0

        run(job)
        """
    )
    result = run_process("multiproc.py", *TOGETHER, path, cwd=tmp_path)
    assert result.code == 128 + signal.SIGKILL
    assert "process 1 was killed by SIGKILL" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1])
def test_signals_reach_every_process(start_process, script, tmp_path, number):
    path = script(
        """
        import os, signal, sys, time
        def handler(number, frame):
            open("seen" + os.environ["RANK"], "w").write(str(number))
            sys.exit(128 + number)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, handler)
        if os.environ["RANK"] == "0":
            while not os.path.exists("ready1"):
                time.sleep(0.05)
            print("ready", flush=True)
        else:
            open("ready1", "w").close()
        time.sleep(60)
        """
    )
    with start_process("multiproc.py", *TOGETHER, path, cwd=tmp_path) as process:
        guard = threading.Timer(60, process.kill)
        guard.start()
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        process.communicate()
        guard.cancel()
    assert process.returncode == 128 + number
    assert [(tmp_path / f"seen{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2


def test_a_checkpoint_that_cant_be_written_is_told_from_one_that_is(start_process, script, tmp_path):
    path = script(
        """
        import os, signal, time
        from effnet_quant.cli.process import run
        from effnet_quant.errors import UserError
        def job(arguments):
            got = []
            signal.signal(signal.SIGTERM, lambda *_: got.append(1))
            open("ready" + os.environ["RANK"], "w").close()
            while not os.path.exists("ready" + str(1 - int(os.environ["RANK"]))):
                time.sleep(0.05)
            if os.environ["RANK"] == "0":
                print("ready", flush=True)
            while not got:
                time.sleep(0.05)
            if os.environ["RANK"] == "0":
                raise UserError("the disk is full")
            return 143
        run(job)
        """
    )
    with start_process("multiproc.py", *TOGETHER, path, cwd=tmp_path) as process:
        guard = threading.Timer(60, process.kill)
        guard.start()
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
        guard.cancel()
    assert process.returncode == 2
    assert "error: the disk is full" in err


def test_processes_start_again_as_often_as_allowed(run_process, script, tmp_path):
    path = script(
        """
        import os, sys
        count = os.environ["TORCHELASTIC_RESTART_COUNT"]
        if os.environ["RANK"] == "0":
            print("start", count, flush=True)
        sys.exit(0 if count == "1" else 5)
        """
    )
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--rdzv_id", "again"]
    result = run_process("multiproc.py", *TOGETHER, *meet, "--max_restarts", 1, path, cwd=tmp_path)
    assert (result.code, result.out) == (0, "start 0\nstart 1\n")


def test_processes_that_start_again_do_not_meet_their_dead_selves(run_process, repository, script, tmp_path):
    # torch's shared store keeps the address of process 0; process 1, which comes first, must not try it
    path = script(
        f"""
        import os, sys, time
        sys.path.insert(0, {str(repository)!r})
        import torch
        from effnet_quant.cli.process import run
        from effnet_quant.training.distributed import joined_world

        def job(arguments):
            again, main = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1", os.environ["RANK"] == "0"
            if again and main:
                time.sleep(2)
            with joined_world() as world:
                total = world.sum(torch.ones(3))
                if not again and not main:
                    os.kill(os.getpid(), 9)
                world.wait()
            if main:
                print(total.tolist(), flush=True)
            return 0

        run(job)
        """
    )
    result = run_process("multiproc.py", *TOGETHER, "--max-restarts", 1, path, cwd=tmp_path)
    assert (result.code, result.out) == (0, "[2.0, 2.0, 2.0]\n"), result.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.py"], r"there is no script nowhere\.py"),
        (["--nproc_per_node", "0", "main.py"], "--nproc_per_node must be at least 1, not 0"),
        (["--nnodes", "two", "main.py"], "--nnodes is a number or MIN:MAX, not 'two'"),
        (["--nnodes", "2:1", "main.py"], "2:1 is not"),
        (["--max_restarts", "-1", "main.py"], "--max_restarts must be 0 or more, not -1"),
        (["--log_dir", "/dev/null/logs", "main.py"], "can't create .*--log_dir"),
        (["--rdzv_backend", "c10d", "--rdzv_conf", "x", "main.py"], "--rdzv_conf is KEY=VALUE"),
    ],
)
def test_bad_command_lines(run_script, repository, monkeypatch, arguments, says):
    monkeypatch.chdir(repository)
    result = run_script("multiproc.py", *arguments)
    assert result.code == 2
    assert re.search(says, result.error_lines[0])


@pytest.mark.slow
def test_sigterm_to_the_job_leaves_one_checkpoint_to_go_on_from(start_process, repository, tmp_path):
    workspace = tmp_path / "workspace"
    run = [*TOGETHER, repository / "main.py", *SMALL, "-p", 1, "--workspace", workspace]
    with start_process("multiproc.py", *run, cwd=tmp_path) as process:
        guard = threading.Timer(200, process.kill)
        guard.start()
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "train: 2/" in line:
                process.send_signal(signal.SIGTERM)
        guard.cancel()
    assert process.returncode == 128 + signal.SIGTERM, lines
    state = torch.load(workspace / "checkpoint.pth.tar", weights_only=True)
    assert state["epoch"] == 0
    assert state["batch"] == state["step"] >= 2
    assert len(state["rng"]) == state["processes"] == 2
    resume = ["--resume", workspace / "checkpoint.pth.tar", "--prof", state["batch"] + 1]
    with start_process("multiproc.py", *run, *resume, cwd=tmp_path) as process:
        _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert torch.load(workspace / "checkpoint.pth.tar", weights_only=True)["step"] == state["step"] + 1


def test_a_job_that_is_started_again_goes_on_from_its_checkpoint(run_script, tmp_path, monkeypatch):
    run = [*SMALL, "--prof", 1, "--workspace", tmp_path]
    assert run_script("main.py", *run).code == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    # what the job began with does not matter any more
    result = run_script("main.py", *run, "--epochs", 2, "--pretrained-from-file", "gone.safetensors")
    assert result.code == 0, result.err
    assert f"started again: going on from {tmp_path / 'checkpoint.pth.tar'}" in result.out
    assert torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["epoch"] == 2
    assert "epoch 2/2" in result.out
    assert "epoch 1/2" not in result.out


def test_a_job_that_is_started_again_leaves_an_earlier_jobs_checkpoint_alone(run_script, tmp_path, monkeypatch):
    run = [*SMALL, "--prof", 1, "--workspace", tmp_path]
    assert run_script("main.py", *run).code == 0
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({**torch.load(path, weights_only=True), "job": "an earlier one"}, path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = run_script("main.py", *run, "--overwrite")
    assert result.code == 0, result.err
    assert "started again" not in result.out
    assert "epoch 1/1: train.loss" in result.out
