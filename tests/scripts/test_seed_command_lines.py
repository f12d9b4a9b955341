"""The command lines of NVIDIA's README, with their placeholders filled in, on a small folder of images.

What stands behind EXTRA keeps a run short; everything before it is as printed there.
"""

# ruff: noqa: E501  (command lines as printed)

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_quant import calibrate, create_model, quantize

SEED = Path(__file__).parents[3] / "shared" / "seeds" / "efficientnet-for-pytorch.md"
EVALUATE = "python ./main.py --arch efficientnet-<version> --evaluate --epochs 1"
LAUNCH = "python ./launch.py --model efficientnet-<version>"
BENCHMARK = "<path to imagenet> --raport-file benchmark.json --epochs 1 --prof 100"
TOGETHER = "python ./multiproc.py --nproc_per_node 8"
QUANT = "--arch efficientnet-quant-<version>"
TRAINING = [
    "python ./main.py --arch efficientnet-<version> --label-smoothing 0.1 <path to imagenet>",
    "python ./main.py --arch efficientnet-<version> --label-smoothing 0.1 --amp --static-loss-scale 256 "
    "<path to imagenet>",
    f"python ./quant_main.py <path to imagenet> {QUANT} --epochs <# of QAT epochs> "
    "--pretrained-from-file <path to non-quantized model weights> "
    "<any other parameters for training such as batch, momentum etc.>",
    f"python ./quant_main.py <path to imagenet> {QUANT} --resume <path to mid-training checkpoint> ...",
]
EVALUATION = [
    f"{EVALUATE} --pretrained -b <batch size> <path to imagenet>",
    f"{EVALUATE} --resume <path to checkpoint> -b <batch size> <path to imagenet>",
    f"{EVALUATE} --pretrained-from-file <path to pretrained weights> -b <batch size> <path to imagenet>",
    f"python ./quant_main.py {QUANT} --evaluate --epochs 1 --resume <path to quant checkpoint> -b <batch size> "
    "<path to imagenet>",
]
CLASSIFICATION = [
    "python classify.py --arch efficientnet-<version> --pretrained --precision AMP|FP32 --image <path to JPEG image>",
    "python classify.py --arch efficientnet-<version> --pretrained-from-file <path to weights from previous step> "
    "--precision AMP|FP32 --image <path to JPEG image>",
    f"python classify.py {QUANT} --pretrained-from-file <path to quant weights> --image <path to JPEG image>",
]
BENCHMARKS = [
    f"{LAUNCH} --precision FP32 --mode benchmark_training --platform DGX1V {BENCHMARK}",
    f"{LAUNCH} --precision TF32 --mode benchmark_training --platform DGXA100 {BENCHMARK}",
    f"{LAUNCH} --precision AMP --mode benchmark_training --platform <DGX1V|DGXA100> {BENCHMARK}",
    f"{LAUNCH} --precision FP32 --mode benchmark_inference --platform DGX1V {BENCHMARK}",
    f"{LAUNCH} --precision TF32 --mode benchmark_inference --platform DGXA100 {BENCHMARK}",
    f"{LAUNCH} --precision AMP --mode benchmark_inference --platform <DGX1V|DGXA100> {BENCHMARK}",
]
SEVERAL_PROCESSES = [
    f"{TOGETHER} ./main.py --arch efficientnet-<version> --label-smoothing 0.1 <path to imagenet>",
    f"{TOGETHER} ./main.py --arch efficientnet-<version> --label-smoothing 0.1 --amp --static-loss-scale 256 <path to imagenet>",
    f"{TOGETHER} ./quant_main.py {QUANT} ... <path to imagenet>",
    f"{TOGETHER} ./launch.py --model efficientnet-<version> --precision TF32 --mode benchmark_training --platform DGXA100 {BENCHMARK}",
    f"{TOGETHER} ./launch.py --model efficientnet-<version> --precision AMP --mode benchmark_training "
    f"--platform <DGX1V|DGXA100> {BENCHMARK}",
]
CONVERSION = [
    "python checkpoint2model.py --checkpoint-path <path to checkpoint> --weight-path <path where weights will be stored>",
    "python checkpoint2model.py --checkpoint-path <path to quant checkpoint> --weight-path <path where quant weights will be stored>",
    f"python model2onnx.py {QUANT} --pretrained-from-file <path to model quant weights> -b <batch size> --trt True",
]
EXTRA = shlex.split("--image-size 32 -b 2 -j 0 --prof 1 -p 1")


@pytest.fixture(scope="module")
def fill(tmp_path_factory):
    """Fills in a line's placeholders and splits it: (line, **other placeholders) -> [script, *arguments]."""
    root = tmp_path_factory.mktemp("seed")
    images = root / "imagenet"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "image.jpg")
    for split in ("train", "val"):
        for number in range(1000):
            folder = images / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            os.link(root / "image.jpg", folder / "image.jpg")
    torch.manual_seed(0)
    model = create_model("efficientnet-b0").eval()
    cache = root / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(model.state_dict(), cache / "nvidia_efficientnet-b0_210412.pth")  # where --pretrained looks first
    torch.save({"epoch": 0, "state_dict": model.state_dict()}, root / "checkpoint.pth.tar")
    quantize(model)
    calibrate(model, [torch.randn(2, 3, 32, 32)], method="max")
    torch.save(model.state_dict(), root / "quant.pth")
    torch.save({"epoch": 0, "state_dict": model.state_dict()}, root / "quant.pth.tar")
    weights = cache / "nvidia_efficientnet-b0_210412.pth"
    places = {
        "<version>": "b0", "<path to imagenet>": images, "<batch size>": 2, "<# of QAT epochs>": 1,
        "<path to checkpoint>": root / "checkpoint.pth.tar", "<path to pretrained weights>": weights,
        "<path to non-quantized model weights>": weights, "<path to weights from previous step>": weights,
        "<path to mid-training checkpoint>": root / "quant.pth.tar",
        "<path to quant checkpoint>": root / "quant.pth.tar", "<path to quant weights>": root / "quant.pth",
        "<path to model quant weights>": root / "quant.pth", "<path to JPEG image>": root / "image.jpg",
        "<path where weights will be stored>": "weights.pth", "<path where quant weights will be stored>": "quant.pth",
        "<any other parameters for training such as batch, momentum etc.>": "--momentum 0.89", "...": "",
        "<DGX1V|DGXA100>": "DGXA100", "AMP|FP32": "AMP",
    }  # fmt: skip

    def filled(line):
        for placeholder, value in places.items():
            line = line.replace(placeholder, str(value))
        assert not re.search(r"<[^>]+>", line), line
        python, script, *arguments = shlex.split(line)
        assert python == "python"
        return [script.removeprefix("./"), *arguments]

    filled.root = root
    return filled


@pytest.fixture
def run_line(fill, run_script, tmp_path, monkeypatch):
    """Runs a line and what is added to it in an empty folder; it must succeed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(fill.root / "torch"))

    def run(line, *extra):
        result = run_script(*fill(line), *extra)
        assert result.code == 0, result.err
        return result

    return run


def raport(path):
    return [json.loads(line)["data"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("line", TRAINING)
def test_training(run_line, tmp_path, line):
    run_line(line, *EXTRA, "--epochs", 1, *(["--calibration-images", 4] if "quant_main" in line else []))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pth.tar", "experiment_raport.json", "model_best.pth.tar", "run.yml",
    ]  # fmt: skip
    assert raport(tmp_path / "experiment_raport.json")[-1]["train.loss"] > 0


@pytest.mark.parametrize("line", EVALUATION)
def test_evaluation(run_line, tmp_path, line):
    run_line(line, *EXTRA)
    (data,) = raport(tmp_path / "experiment_raport.json")
    assert {"val.loss", "val.top1", "val.top5", "val.total_ips", "val.compute_ips"} <= set(data)


@pytest.mark.parametrize("line", CLASSIFICATION)
def test_classification(run_line, line):
    assert len(run_line(line).out.splitlines()) == 6


@pytest.mark.parametrize("line", BENCHMARKS)
def test_benchmark(run_line, tmp_path, line):
    run_line(line, *EXTRA, "--prof", 3)
    (data,) = raport(tmp_path / "benchmark.json")
    part = "train" if "benchmark_training" in line else "val"
    assert {f"{part}.compute_ips", f"{part}.compute_latency", f"{part}.compute_latency_at99"} <= set(data)
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]


def test_conversion(run_line, tmp_path):
    for line in CONVERSION:
        run_line(line, *(["--image-size", 32] if "onnx" in line else []))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "efficientnet-quant-b0.onnx",
        "quant.pth",
        "weights.pth",
    ]


@pytest.mark.slow
def test_several_processes(fill, run_process, tmp_path):
    """One line of each script; the two processes, which take seconds to start, run all three."""
    jobs = []
    for number in (1, 2, 4):
        multiproc, flag, _, *job = fill(SEVERAL_PROCESSES[number])
        assert (multiproc, flag) == ("multiproc.py", "--nproc_per_node")
        if "quant_main" in job[0]:
            job += ["--pretrained-from-file", fill.root / "quant.pth", "--calibration-images", 4]
        jobs.append([*job, *EXTRA, "--epochs", 1, "--training-only", "--no-checkpoints", "--workspace", tmp_path])
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps([[str(part).removeprefix("./") for part in job] for job in jobs]))
    script = Path(__file__).with_name("two_jobs.py")
    result = run_process("multiproc.py", "--nproc_per_node", 2, script, path, cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.out.count("epoch 1/1: train.loss") == 3
    assert "no GPU: --amp runs in bfloat16, without a loss scale" in result.out


@pytest.mark.slow
@pytest.mark.parametrize("line", SEVERAL_PROCESSES)
def test_every_line_for_several_processes(fill, run_process, tmp_path, line):
    script, *arguments = fill(line.replace("--nproc_per_node 8", "--nproc_per_node 2"))  # cores that there are
    arguments = [
        str(Path(__file__).parents[2] / argument) if argument.startswith("./") else argument for argument in arguments
    ]
    weights = ["--pretrained-from-file", fill.root / "quant.pth"] if "quant_main" in line else []
    result = run_process(script, *arguments, *EXTRA, "--epochs", 1, "--workspace", tmp_path, *weights, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "epoch 1/1: train.loss" in result.out


@pytest.mark.parametrize(
    "script",
    ["main.py", "quant_main.py", "launch.py", "multiproc.py", "checkpoint2model.py", "model2onnx.py", "classify.py"],
)
def test_help(run_script, script):
    assert run_script(script, "-h").code == 0


@pytest.mark.skipif(not SEED.is_file(), reason="NVIDIA's README is not beside the project")
def test_no_line_is_forgotten():
    ours = set()
    for lines in (TRAINING, EVALUATION, CLASSIFICATION, BENCHMARKS, SEVERAL_PROCESSES, CONVERSION):
        ours |= set(lines)
    # the README has one placeholder for checkpoints of both kinds
    ours = {line.replace("--resume <path to quant checkpoint>", "--resume <path to checkpoint>") for line in ours}
    printed = {" ".join(line.split()) for line in re.findall(r"`(python [^`]+)`", SEED.read_text())}
    assert {line for line in printed if not re.search(r"main\.py (-h|--help)$", line)} == ours
