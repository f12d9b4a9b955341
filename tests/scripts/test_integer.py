"""The target "integer" on the command line: calibrated, exported, verified, and flags that mean nothing there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
WEIGHTS = DATA / "cifar-resnet20.safetensors"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason=f"there is no {WEIGHTS}")
def test_from_weights_to_a_verified_integer_file(tmp_path: Path) -> None:
    model = ("--arch", "cifar-resnet20", "--image-size", "32")
    calibrated = run(
        *("quant_main.py", "digits", *model, "--epochs", "0", "--pretrained-from-file", WEIGHTS),
        *("--workspace", tmp_path, "-b", "32", "--target", "integer"),
    )
    assert calibrated.returncode == 0, calibrated.stderr
    export = ("model2onnx.py", "--arch", "cifar-resnet20", "--pretrained-from-file", tmp_path / "checkpoint.pth.tar")
    file = tmp_path / "integer.onnx"
    refused = run(*export, "--target", "integer", "--fp16", "--output", file)
    assert (refused.returncode, file.exists()) == (2, False)
    assert "--fp16: an integer file has one form" in refused.stderr
    verified = run(*export, "--target", "integer", "--output", file, "--verify", "digits")
    assert verified.returncode == 0, verified.stderr
    assert "integer, int32" in verified.stdout
    assert "distance to the QDQ engine" in verified.stdout
