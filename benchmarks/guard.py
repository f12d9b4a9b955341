"""Guards a refactoring: the bytes of exported files and the losses of training must not change.

    python benchmarks/guard.py --write before.json      on the commit before
    python benchmarks/guard.py --check before.json      after the change, on the same machine

Ten networks with fixed weights (seed 0) are calibrated on seed-0 noise and exported for every target, float and quantized.
There is one sha256 of each file, and one of its graph without the metadata. Then main.py and quant_main.py run 20 steps on
the digits; each loss is a row. ``--check`` prints the rows that differ and ends with status 1 if there are any.

The figures depend on the processor and on torch's version, so they are compared, not committed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from random_weights import wake, with_statistics

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, whatever is installed

from effnet_quant import calibrate, create_model, export_onnx, quantize

NETWORKS = (
    "efficientnet-b0",
    "efficientnet-widese-b0",
    "efficientnet-quant-b0",
    "efficientnet-quant-b4",
    "cifar-resnet20",
    "timm:resnet50",
    "timm:mobilenetv3_large_100",
    "timm:tf_efficientnet_lite0",
    "timm:densenet121",
    "torchvision:shufflenet_v2_x1_0",
)
TARGETS = ("onnxruntime", "openvino", "tensorrt")
IMAGE_SIZE = 64
STEPS = 20
TRAINING = (
    "digits --arch efficientnet-b0 --num-classes 10 --image-size 32 -b 16 -j 0 --data-backend pytorch --lr 0.02 --seed 0 "
    f"--prof 1 --epochs {STEPS} --training-only"
).split()


def main() -> int:
    """Write or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", metavar="FILE", help="record the figures of this checkout")
    parser.add_argument("--check", metavar="FILE", help="compare this checkout with figures recorded before")
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--no-training", action="store_true", help="only the exported files")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, str] = {}
    for name in parsed.networks:
        print(name, file=sys.stderr, flush=True)
        rows |= dict(exported(name))
    if not parsed.no_training:
        rows |= dict(losses())
    if parsed.write:
        Path(parsed.write).write_text(json.dumps(rows, indent=1))
    if not parsed.check:
        return 0
    before = json.loads(Path(parsed.check).read_text())
    different = [row for row in rows if rows[row] != before.get(row)]
    for row in different:
        print(f"{row}: {before.get(row)} -> {rows[row]}")
    print(f"{len(rows) - len(different)} of {len(rows)} figures are as before")
    return 1 if different else 0


@torch.no_grad()
def exported(name: str) -> Iterator[tuple[str, str]]:
    """Hashes of the files of a network, float and quantized, for every target."""
    torch.manual_seed(0)
    classes = {} if name.startswith("cifar") else {"num_classes": 100}
    images = torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    model = wake(with_statistics(create_model(name, **classes))).eval()
    quantized = "-quant-" in name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        if not quantized:
            yield from _hashes(model, path, f"{name} float")
            quantize(model)
        calibrate(model, images.split(4), method="max")
        yield from _hashes(model, path, f"{name} int8")


def _hashes(model: torch.nn.Module, path: Path, name: str) -> Iterator[tuple[str, str]]:
    for target in TARGETS:
        export_onnx(model, path, IMAGE_SIZE, target=target)
        yield f"{name} {target} file", hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        graph = onnx.load(path).graph.SerializeToString(deterministic=True)
        yield f"{name} {target} graph", hashlib.sha256(graph).hexdigest()[:16]


def losses() -> Iterator[tuple[str, str]]:
    """The losses of the first steps of float training and of QAT on the digits, by the scripts."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _run("main.py", folder, "float")
        weights = ["--pretrained-from-file", f"{folder}/float/checkpoint.pth.tar", "--arch", "efficientnet-quant-b0"]
        calibration = ["--calibration-images", "64", "--calibration-method", "max", "--target", "onnxruntime"]
        yield from _run("quant_main.py", folder, "qat", *weights, *calibration)


def _run(script: str, folder: str, name: str, *flags: str) -> Iterator[tuple[str, str]]:
    workspace = Path(folder, name)
    command = [sys.executable, Path(__file__).parents[1] / script, *TRAINING, *flags, "--workspace", workspace]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (workspace / "experiment_raport.json").read_text().splitlines()]
    steps = [line["data"]["train.loss"] for line in lines if line["step"]]
    assert len(steps) == STEPS
    yield from ((f"{name} loss {step}", repr(loss)) for step, loss in enumerate(steps))


if __name__ == "__main__":
    sys.exit(main())
