"""Kills processes of a distributed training at random moments, and checks how the job ends or goes on.

    python benchmarks/lost_processes.py --moments 5 [--kinds epoch calibration checkpoint restart agent] [--seed 0]

Two Gloo processes train a small network. One gets SIGKILL in the middle of an epoch, in calibration, or while process 0
writes a checkpoint. A moment holds if the job ends within 30 seconds and names the process that was killed, and if the
checkpoint that is left is whole. With ``restart``, multiproc.py starts the processes again; with ``agent``, one of two
multiproc.py on this machine is killed, with or without its process, and comes back. Then the final weights, averages and
momenta must be those of a job that lost nothing, bit by bit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 30.0
STEPS = 12
RUN = (
    f"digits --arch cifar-resnet20 --num-classes 10 --image-size 32 -j 0 -b 8 --lr 0.01 --seed 3 --epochs 1 --prof {STEPS} "
    "-p 1 --use-ema 0.9 --mixup 0.2 --checkpoint-every-steps 1 --training-only"
).split()
KINDS = ("epoch", "calibration", "checkpoint", "restart", "agent")


class Job:
    """A running multiproc.py: its output so far, and the processes that it started."""

    def __init__(self, folder: Path, flags: list[str], script: str, arguments: list[str]) -> None:
        command = [sys.executable, REPOSITORY / "multiproc.py", "--log_dir", folder / "logs", *flags]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*map(str, command), str(REPOSITORY / script), *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def text(self) -> str:
        """What it has printed."""
        return "".join(self.lines)

    def wait_for(self, what: Callable[[], bool], seconds: float = 300) -> None:
        """Wait until a condition holds; raises RuntimeError if it never does."""
        deadline = time.monotonic() + seconds
        while not what():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"it never came to this:\n{self.text}")
            time.sleep(0.001)

    def said(self, pattern: str) -> bool:
        """Whether it has printed a line with ``pattern``."""
        return re.search(pattern, self.text) is not None

    def end(self, seconds: float) -> tuple[int, float]:
        """Wait for its end; returns the status and how long that took. It is killed if it takes longer than ``seconds``."""
        began = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        took = time.monotonic() - began
        self.kill()
        self._reader.join(5)
        return self.process.returncode, took

    def kill(self) -> None:
        """Kill it and its processes, if they still run."""
        for process in [*self.children(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()

    def children(self) -> list[int]:
        """The process ids of the training processes."""
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and self._is_child(int(name))]

    def child(self, rank: int) -> int:
        """The process id of one training process."""
        return next(process for process in self.children() if _rank(process) == rank)

    def _is_child(self, process: int) -> bool:
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        return int(fields[1]) == self.process.pid and _rank(process) is not None


def _rank(process: int) -> int | None:
    try:
        environment = Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return None
    found = re.search(rb"(?:^|\0)RANK=(\d+)", environment)
    return int(found.group(1)) if found else None


def training(folder: Path, flags: list[str]) -> Job:
    """Start the training in two processes of one machine."""
    return Job(folder, ["--nproc_per_node", "2", *flags], "main.py", [*RUN, "--workspace", str(folder / "run")])


def state(folder: Path) -> dict[str, Any]:
    """The job's latest checkpoint."""
    loaded: dict[str, Any] = torch.load(folder / "run" / "checkpoint.pth.tar", weights_only=True)
    return loaded


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Where two checkpoints differ, apart from the name of the job."""
    wrong = [f"{key} differs" for key in ("epoch", "batch", "step") if one[key] != two[key]]
    for part in ("state_dict", "state_dict_ema"):
        wrong += [
            f"{part} {name} differs" for name, tensor in one[part].items() if not torch.equal(two[part][name], tensor)
        ]
    momenta = [[entry["momentum_buffer"] for entry in each["optimizer"]["state"].values()] for each in (one, two)]
    wrong += ["momenta differ"] * (not all(map(torch.equal, *momenta)))
    return wrong[:3]


def killed(folder: Path, kind: str, rank: int, moment: random.Random) -> list[str]:
    """Kill one process of a job without restarts; returns what did not hold."""
    if kind == "calibration":
        from effnet_quant import create_model

        torch.manual_seed(0)
        torch.save(create_model("cifar-resnet20").state_dict(), folder / "float.pth")
        arguments = [*RUN, "--epochs", "0", "--calibration-images", "800", "--pretrained-from-file", "float.pth"]
        workspace = ["--workspace", str(folder / "run")]
        job = Job(folder, ["--nproc_per_node", "2"], "quant_main.py", [*arguments, *workspace])
        marker = f"calibrate: {moment.randrange(1, 30)}/"
    else:
        job = training(folder, [])
        marker = f"train: {moment.randrange(1, STEPS - 1)}/"
    try:
        job.wait_for(lambda: job.said(marker))
        if kind == "checkpoint":
            job.wait_for(lambda: bool(list((folder / "run").glob(".checkpoint.pth.tar.*"))))
        else:
            time.sleep(moment.uniform(0, 0.1))
        os.kill(job.child(rank), signal.SIGKILL)
        status, seconds = job.end(60)
    finally:
        job.kill()
    wrong = [f"took {seconds:.0f} s"] if seconds > LIMIT_SECONDS else []
    if status != 128 + signal.SIGKILL:
        wrong.append(f"status {status}")
    if f"process {rank} was killed by SIGKILL; the job has ended" not in job.text:
        wrong.append(f"it did not name process {rank}")
    if "Traceback" in job.text:
        wrong.append("a traceback")
    if kind != "calibration" and not 0 < state(folder)["step"] < STEPS:
        wrong.append("no whole checkpoint of the middle")
    return [*wrong, job.text] if wrong else []


def restarted(folder: Path, rank: int, moment: random.Random, straight: dict[str, Any]) -> list[str]:
    """Kill one process of a job that may restart twice, once in each attempt; returns what did not hold."""
    job = training(folder, ["--max-restarts", "2"])
    try:
        for attempt in (1, 2):
            done = moment.randrange(1, STEPS // 2)
            job.wait_for(lambda count=attempt: job.text.count("started again") == count - 1)  # type: ignore[misc]
            at = len(job.lines)
            job.wait_for(lambda at=at, done=done: sum("train: " in line for line in job.lines[at:]) >= done)  # type: ignore[misc]
            time.sleep(moment.uniform(0, 0.1))
            os.kill(job.child(rank), signal.SIGKILL)
            job.wait_for(lambda count=attempt: job.text.count("started again") == count)  # type: ignore[misc]
        status, _ = job.end(200)
    finally:
        job.kill()
    wrong = [f"status {status}"] if status else differences(straight, state(folder))
    return [*wrong, job.text] if wrong else []


def agent_lost(folder: Path, with_process: bool, moment: random.Random, straight: dict[str, Any]) -> list[str]:
    """Kill one of two multiproc.py, start it again, and wait for both; returns what did not hold."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", f"job{port}"]
    flags = ["--nnodes", "2", "--nproc_per_node", "1", *meet, "--max-restarts", "3"]
    workspace = ["--workspace", str(folder / "run")]
    jobs: list[Job] = []
    for node in range(2):
        (folder / f"node{node}").mkdir()

    def start(node: int) -> Job:
        job = Job(folder / f"node{node}", flags, "main.py", [*RUN, *workspace])
        jobs.append(job)
        return job

    try:
        first = start(0)
        time.sleep(3)  # the first one is the one that both meet at
        second = start(1)
        step = moment.randrange(1, STEPS - 2)  # the rendezvous decides which of them is process 0, which speaks
        first.wait_for(lambda: first.said(f"train: {step}/") or second.said(f"train: {step}/"))
        victims = [second.process.pid, *(second.children() if with_process else [])]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        time.sleep(moment.uniform(0, 3))
        again = start(1)
        statuses = [job.end(200)[0] for job in (first, again)]
    finally:
        for job in jobs:
            job.kill()
    texts = [job.text for job in jobs]
    wrong = [f"statuses {statuses}"] if any(statuses) else differences(straight, state(folder))
    if not any("started again: going on from" in text for text in texts):
        wrong.append("it did not go on from its checkpoint")
    return [*wrong, *texts] if wrong else []


def undisturbed(folder: Path) -> dict[str, Any]:
    """The last checkpoint of a job that loses nothing."""
    job = training(folder, [])
    status, _ = job.end(300)
    if status:
        raise RuntimeError(job.text)
    return state(folder)


def main() -> None:
    """Print a line for each kind, and what did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=5, help="moments of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what to lose")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        straight = undisturbed(Path(folder)) if {"restart", "agent"} & set(arguments.kinds) else {}
    print(f"{'lost':14}{'tried':>6}{'held':>6}", flush=True)
    for kind in arguments.kinds:
        moment = random.Random(f"{arguments.seed} {kind}")
        results = []
        for number in range(arguments.moments):
            with tempfile.TemporaryDirectory() as folder:
                if kind == "restart":
                    results.append(restarted(Path(folder), number % 2, moment, straight))
                elif kind == "agent":
                    results.append(agent_lost(Path(folder), number % 2 == 0, moment, straight))
                else:
                    results.append(killed(Path(folder), kind, number % 2, moment))
        bad = [result for result in results if result]
        failed += len(bad)
        print(f"{kind:14}{len(results):6}{len(results) - len(bad):6}", flush=True)
        for result in bad:
            print("  " + "\n    ".join("\n".join(result).splitlines()))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
