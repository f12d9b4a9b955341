"""What several test rooms share: running the scripts, and small image folders."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effnet_quant.training.signals import STOPPING

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class ScriptResult:
    """How a script ended."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self):
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def _run_in_process(script, *arguments):
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = [script, *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in STOPPING}  # a script keeps its own to the process's end
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return ScriptResult(code, out.getvalue(), err.getvalue())


def _start_process(script, *arguments, cwd):
    # processes that run beside each other must not each start a thread a core
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run_process(script, *arguments, cwd):
    with _start_process(script, *arguments, cwd=cwd) as process:
        out, err = process.communicate(timeout=300)
    return ScriptResult(process.returncode, out, err)


def _write_images(folder, count, *, seed=0, size=(40, 36)):
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}{'.png' if index % 2 else '.jpg'}")


@pytest.fixture(scope="session")
def repository():
    """The folder of the scripts."""
    return REPOSITORY


@pytest.fixture(scope="session")
def run_script():
    """Runs a script's file in this process as ``__main__``: (script, *arguments) -> ScriptResult.

    An exception that the script lets through reaches the test.
    """
    return _run_in_process


@pytest.fixture(scope="session")
def run_process():
    """Runs a script as the user would: (script, *arguments, cwd) -> ScriptResult."""
    return _run_process


@pytest.fixture(scope="session")
def start_process():
    """Starts a script as the user would: (script, *arguments, cwd) -> Popen."""
    return _start_process


@pytest.fixture(scope="session")
def write_images():
    """Fills a folder with random JPEG and PNG images: (folder, count, seed=, size=)."""
    return _write_images


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder data set: train/ and val/ with the classes apple, bear and cat, six images each; not to be changed."""
    root = tmp_path_factory.mktemp("images")
    for split_seed, split in enumerate(("train", "val")):
        for class_seed, name in enumerate(("apple", "bear", "cat")):
            _write_images(root / split / name, 6, seed=10 * split_seed + class_seed)
    return root
