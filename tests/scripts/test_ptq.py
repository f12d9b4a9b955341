"""quant_main.py --ptq: quantization without training, by a recipe's name."""

from __future__ import annotations

import shlex
import time

import pytest
import torch

from effnet_quant import create_model
from effnet_quant.models.weights import write_weights

NETWORK = shlex.split(
    "--arch cifar-resnet20 --num-classes 3 --image-size 32 -b 6 --data-backend pytorch -j 0 --seed 1 --epochs 0"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A float network's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "float.safetensors"
    write_weights(path, create_model("cifar-resnet20", 3).state_dict())
    return path


def test_a_recipe_writes_a_checkpoint_that_exports(run_script, image_folder, weights, tmp_path):
    start = ["--pretrained-from-file", weights, "--workspace", tmp_path]
    result = run_script("quant_main.py", image_folder, *NETWORK, "--ptq", "standard", *start)
    assert result.code == 0, result.err
    assert "quantized by the recipe standard" in result.out
    assert "bias correction: 20/20, 0 s left" in result.err
    exported = run_script(
        "model2onnx.py",
        *shlex.split("--arch cifar-resnet20 --num-classes 3 --image-size 32"),
        *("--pretrained-from-file", tmp_path / "checkpoint.pth.tar", "--output", tmp_path / "int8.onnx"),
    )
    assert exported.code == 0, exported.err

    again = run_script(
        "quant_main.py", image_folder, *NETWORK, "--ptq", "minmax",
        *("--pretrained-from-file", tmp_path / "checkpoint.pth.tar", "--workspace", tmp_path / "again"),
    )  # fmt: skip
    assert again.code == 2
    assert "the weights bring their ranges; --ptq starts from float weights" in again.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ptq best", "--ptq best: there is no such recipe; choose one of: minmax, standard, adaround, reconstruct."),
        ("--ptq standard --epochs 2", "--ptq quantizes without training; add --epochs 0."),
        (
            "--ptq standard --percentile 99.9",
            "--ptq and --percentile exclude each other: the recipe chooses the ranges.",
        ),
        ("--ptq minmax --distill teacher.pth", "--ptq and --distill exclude each other: nothing is trained."),
        ("--ptq standard --calibration-images 4", "needs at least 8 calibration images, not 4"),
    ],
)
def test_bad_flags_are_one_sentence(run_script, image_folder, weights, tmp_path, flags, message):
    start = ["--pretrained-from-file", weights, "--workspace", tmp_path / "run"]
    result = run_script("quant_main.py", image_folder, *NETWORK, *shlex.split(flags), *start)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("error:") == 1 and "Traceback" not in result.err


@pytest.mark.slow
def test_a_killed_reconstruction_goes_on_with_the_block_it_was_at(
    start_process, run_script, image_folder, weights, tmp_path
):
    command = ["quant_main.py", image_folder, *NETWORK, "--ptq", "reconstruct", "--pretrained-from-file", weights]
    whole = run_script(*command, "--workspace", tmp_path / "whole")
    assert whole.code == 0, whole.err
    assert not (tmp_path / "whole" / "ptq").exists()

    killed = tmp_path / "killed"
    with start_process(*command, "--workspace", killed, cwd=tmp_path) as process:
        while len(list(killed.glob("ptq/*/block-*.safetensors"))) < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.kill()
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("ptq/*/block-*.safetensors")}
    resumed = run_script(*command, "--workspace", killed)
    assert resumed.code == 0, resumed.err
    assert 3 <= len(kept) < 9
    results = [torch.load(tmp_path / name / "checkpoint.pth.tar")["state_dict"] for name in ("whole", "killed")]
    assert all(torch.equal(results[0][key], value) for key, value in results[1].items())
