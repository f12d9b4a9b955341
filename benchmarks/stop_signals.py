"""Sends stop signals to the scripts at random moments of each phase, and checks how they end.

    python benchmarks/stop_signals.py --moments 10 [--phases calibration export] [--signal SIGINT] [--seed 0]

A moment holds if the script ends within ten seconds, with status 128 + the signal (or 0, if its work was done by then),
says so in one sentence without a traceback, and leaves no half-written file and no lock. In training it must also leave
a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 10.0
NETWORK = "--arch cifar-resnet20 --num-classes 10"
SMALL = f"{NETWORK} --image-size 32 -b 4 -p 1 --seed 3 --epochs 1"
TWO = f"{SMALL} --num-classes 2 -j 2"


@dataclass(frozen=True)
class Phase:
    """What a script does when the signal comes.

    Attributes:
        name: its name.
        command: the script and its arguments; ``{stage}`` stands for the folder of ``prepare``, ``{out}`` for a new folder.
        marker: pattern of the line that shows the phase's start; None for the process's start.
        spread: the signal comes up to so many seconds later.
        checkpoint: whether a checkpoint must be there at the end.
    """

    name: str
    command: str
    marker: str | None
    spread: float
    checkpoint: bool = False


PHASES = [
    Phase("start-up", f"main.py digits {SMALL} -j 2 --workspace {{out}}", None, 3),
    Phase("waiting for data", f"main.py {{stage}}/large {TWO} -b 64 --workspace {{out}}", "data backend", 6, True),
    Phase(
        "calibration",
        f"quant_main.py digits {SMALL} --epochs 0 --pretrained-from-file {{stage}}/float.pth --workspace {{out}}",
        "calibrate: 1/",
        4,
    ),
    Phase("training", f"main.py digits {SMALL} --workspace {{out}}", "train: 1/", 4, True),
    Phase("training in workers", f"main.py {{stage}}/small {TWO} --workspace {{out}}", "train: 1/", 4, True),
    Phase(
        "a step of a minute",
        "main.py synthetic --arch efficientnet-b0 -b 256 --seed 3 --epochs 1 --workspace {out}",
        "data backend",
        20,
        True,
    ),
    Phase("validation", f"main.py digits {SMALL} --prof 350 --workspace {{out}}", "val: 1/", 1.5, True),
    Phase(
        "export",
        "model2onnx.py --arch efficientnet-quant-b0 --pretrained-from-file {stage}/b0.pth --output {out}/b0.onnx",
        None,
        12,
    ),
    Phase(
        "verify",
        "-m effnet_quant verify digits --arch cifar-resnet20 --num-classes 10 --model {stage}/ranges/checkpoint.pth.tar "
        "--engine {stage}/small.onnx --layers -b 1",
        None,
        8,
    ),
    Phase("packing", "-m effnet_quant data {stage}/small --check -j 2 --pack {out}/shards", None, 6),
    Phase("classify", "classify.py --arch cifar-resnet20 --num-classes 10 --pretrained-from-file {stage}/float.pth "
          "--image {stage}/small/train -b 1", None, 6),
]  # fmt: skip


@dataclass
class Ending:
    """How a script ended after the signal.

    Attributes:
        after: seconds from the phase's start to the signal.
        seconds: from the signal to the end.
        status: exit status.
        text: what it had printed.
        wrong: what did not hold; empty if all did.
    """

    after: float
    seconds: float
    status: int
    text: str
    wrong: list[str] = field(default_factory=list)


def prepare(stage: Path) -> None:
    """Make weights, an engine, a folder of 3,000 small images and one of 200 large ones."""
    from effnet_quant import create_model

    torch.manual_seed(0)
    torch.save(create_model("cifar-resnet20").state_dict(), stage / "float.pth")
    noise = np.random.default_rng(0)
    for name, count, size in (("small", 1500, 32), ("large", 100, 3000)):
        for label in ("a", "b"):
            (stage / name / "train" / label).mkdir(parents=True)
            image = Image.fromarray(noise.integers(0, 256, (size, size, 3), dtype=np.uint8))
            first = stage / name / "train" / label / "0.jpg"
            image.save(first)
            for number in range(1, count):
                os.link(first, first.with_name(f"{number}.jpg"))
        os.symlink("train", stage / name / "val")


def prepare_engine(stage: Path) -> None:
    """Make what ``export`` and ``verify`` need too."""
    from effnet_quant import create_model
    from effnet_quant.quantization.quantizer import TensorQuantizer

    model = create_model("efficientnet-quant-b0")
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            for buffer in (*module.buffers(recurse=False), *module.parameters(recurse=False)):
                buffer.data.fill_(1.0)
    torch.save(model.state_dict(), stage / "b0.pth")
    start = f"--pretrained-from-file {stage}/float.pth --workspace {stage}/ranges"
    run = f"quant_main.py digits {SMALL} -b 64 --epochs 0 {start}"
    export = (
        f"model2onnx.py {NETWORK} --pretrained-from-file {stage}/ranges/checkpoint.pth.tar --output {stage}/small.onnx"
    )
    for command in (run, export):
        script, *words = command.split()
        subprocess.run([sys.executable, REPOSITORY / script, *words], check=True, capture_output=True)


def stop(phase: Phase, stage: Path, number: int, moment: random.Random) -> Ending:
    """Start the phase's script, send it the signal at a random moment, and judge its end."""
    with tempfile.TemporaryDirectory() as out:
        words = phase.command.format(stage=stage, out=out).split()
        script = words if words[0] == "-m" else [str(REPOSITORY / words[0]), *words[1:]]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            [sys.executable, *script],
            cwd=out,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            lines: list[str] = []
            begun = threading.Event()
            reader = threading.Thread(target=_read, args=(process, phase.marker, lines, begun))
            reader.start()
            if phase.marker is None:
                _wait_for_handlers(process)
            elif not begun.wait(300):
                process.kill()
            after = moment.uniform(0, phase.spread)
            time.sleep(after)
            sent = time.monotonic()
            process.send_signal(number)
            try:
                status = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            seconds = time.monotonic() - sent
            reader.join()
        ending = Ending(after, seconds, status, "".join(lines))
        ending.wrong = _judged(phase, ending, number, Path(out))
        return ending


def _judged(phase: Phase, ending: Ending, number: int, out: Path) -> list[str]:
    wrong = []
    if ending.seconds > LIMIT_SECONDS:
        wrong.append(f"took {ending.seconds:.1f} s")
    said = ending.text.count(f"stopped by {signal.Signals(number).name}")
    if (ending.status, said) not in ((128 + number, 1), (0, 0)):
        wrong.append(f"status {ending.status}, {said} sentences")
    if "Traceback" in ending.text or "Exception ignored" in ending.text:
        wrong.append("a traceback")
    left = [path.name for path in out.rglob("*") if path.name.startswith(".") or "lock" in path.name]
    if left:
        wrong.append(f"left {', '.join(left)}")
    if phase.checkpoint and not (out / "checkpoint.pth.tar").is_file():
        wrong.append("no checkpoint")
    return wrong


def _read(process: subprocess.Popen[str], marker: str | None, lines: list[str], begun: threading.Event) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if marker is not None and re.search(marker, line):
            begun.set()
    begun.set()


def _wait_for_handlers(process: subprocess.Popen[str]) -> None:
    """Wait until the script handles SIGTERM, a tenth of a second after its start. Before, the signal just ends Python."""
    bit = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = re.search(r"SigCgt:\s*(\w+)", status)
        if caught and int(caught.group(1), 16) & bit:
            return
        time.sleep(0.005)


def main() -> None:
    """Print a line for each phase, and what did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=10, help="moments of each phase")
    parser.add_argument("--phases", nargs="+", default=[phase.name for phase in PHASES], help="names of phases")
    parser.add_argument("--signal", default="SIGTERM", help="the signal")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    arguments = parser.parse_args()
    number = signal.Signals[arguments.signal]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        prepare(stage)
        if {"export", "verify"} & set(arguments.phases):
            prepare_engine(stage)
        print(f"{'phase':22}{'tried':>6}{'held':>6}{'done first':>12}{'slowest end':>13}", flush=True)
        for phase in PHASES:
            if phase.name not in arguments.phases:
                continue
            moment = random.Random(f"{arguments.seed} {phase.name}")
            endings = [stop(phase, stage, number, moment) for _ in range(arguments.moments)]
            bad = [ending for ending in endings if ending.wrong]
            failed += len(bad)
            done = sum(ending.status == 0 for ending in endings)
            slowest = max(ending.seconds for ending in endings)
            held = len(endings) - len(bad)
            print(f"{phase.name:22}{len(endings):6}{held:6}{done:12}{slowest:11.1f} s", flush=True)
            for ending in bad:
                print(
                    f"  after {ending.after:.2f} s: {'; '.join(ending.wrong)}\n    "
                    + ending.text[-1500:].replace("\n", "\n    ")
                )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
