"""``make demo``: the whole job on scikit-learn's digits, by the scripts' command lines."""

from __future__ import annotations

import copy
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torchvision.io import write_png

from effnet_quant.api import create_model
from effnet_quant.card import InputSpec
from effnet_quant.checks.latency import median_seconds
from effnet_quant.checks.verify import compare
from effnet_quant.data.arrays import DigitsSource
from effnet_quant.data.data_argument import DIGITS
from effnet_quant.data.loaders import Loader
from effnet_quant.data.transforms import evaluation_transform, normalize
from effnet_quant.engines.cpu import cpu_has_exact_int8
from effnet_quant.engines.engine import load_engine
from effnet_quant.errors import UserError
from effnet_quant.quantization.placement.insertion import simulate_target
from effnet_quant.report.summary import Row, draw_summary, format_table, write_summary
from effnet_quant.training.checkpoint import prepare_workspace

FLOAT, QUANTIZED = "efficientnet-b0", "efficientnet-quant-b0"
IMAGE_SIZE = 48
COMMON = f"--num-classes 10 --image-size {IMAGE_SIZE} --data-backend pytorch --bn-momentum 0.1 -b 32 --seed 0"
THROUGHPUT_BATCH = 32
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def run_demo(folder: str, epochs: int, qat_epochs: int) -> None:
    """Train, calibrate, fine-tune, export and run EfficientNet-B0 on handwritten digits; print the table.

    Args:
        folder: folder for all files of the demo.
        epochs: epochs of float training.
        qat_epochs: epochs of training with fake quantization.

    Raises:
        UserError: a script failed.
    """
    start = time.monotonic()
    workspace = prepare_workspace(folder)
    paths = _run_scripts(workspace, epochs, qat_epochs)
    rows = _measure(paths)
    write_summary(rows, workspace / "summary.json")
    draw_summary(rows, workspace / "summary.png", "EfficientNet-B0 on handwritten digits, this machine's CPU")
    print(f"\n{format_table(rows)}\n")
    print(
        f"top-1 of each variant itself on {len(DigitsSource('val'))} test images; simulated: fake quantization in PyTorch; "
        "agreement: with the PyTorch model the engine was made from."
    )
    for sentence in _slower_than_float(rows):
        print(f"note: {sentence}.")
    if not cpu_has_exact_int8():
        print(
            "note: this CPU has no VNNI, so OpenVINO computes the INT8 engine's quantized values in float; see w7a8 in "
            "docs/deployment.md."
        )
    print(f"rows: {workspace / 'summary.json'}, picture: {workspace / 'summary.png'}")
    print(f"{time.monotonic() - start:.0f} s in all")


def _run_scripts(workspace: Path, epochs: int, qat_epochs: int) -> dict[str, Path]:
    """Run every stage by its command line; returns the resulting files by variant."""
    paths = {name: workspace / f"{name}.safetensors" for name in ("fp32", "ptq", "qat")}
    for runtime in RUNTIMES:
        paths |= {f"{name}_{runtime}": workspace / f"{name}_{runtime}.onnx" for name in ("fp32", "int8")}
    for stage in ("fp32", "ptq", "qat"):  # delete an earlier demo's logs and checkpoints
        shutil.rmtree(workspace / stage, ignore_errors=True)

    fp32, ptq, qat = (workspace / stage for stage in ("fp32", "ptq", "qat"))
    main, quant_main = (
        f"main.py {DIGITS} --arch {FLOAT} {COMMON}",
        f"quant_main.py {DIGITS} --arch {QUANTIZED} {COMMON}",
    )
    schedule = "--lr-schedule cosine --label-smoothing 0.1"
    _script(f"{main} --epochs {epochs} --lr 0.03 --nesterov {schedule} --workspace", fp32)
    _extract(fp32, paths["fp32"])
    _script(f"{main} --evaluate --pretrained-from-file", paths["fp32"], "--workspace", fp32)
    _script(f"{quant_main} --epochs 0 --pretrained-from-file", paths["fp32"], "--workspace", ptq)
    _extract(ptq, paths["ptq"])
    tune = f"--epochs {qat_epochs} --lr 0.002 {schedule}"
    _script(f"{quant_main} {tune} --pretrained-from-file", paths["ptq"], "--workspace", qat)
    _extract(qat, paths["qat"])
    for runtime in RUNTIMES:
        export = f"model2onnx.py --target {runtime} --arch"
        for name, arch, weights in (("fp32", FLOAT, "fp32"), ("int8", QUANTIZED, "qat")):
            output = paths[f"{name}_{runtime}"]
            _script(f"{export} {arch} --pretrained-from-file", paths[weights], "--output", output)
    digit = workspace / "digit.png"
    write_png(DigitsSource("val").read(0), str(digit))
    _script("classify.py --pretrained-from-file", paths["int8_onnxruntime"], "--image", digit)
    return paths


def _extract(workspace: Path, weights: Path) -> None:
    # the last checkpoint: the best one was chosen on the images that the table reports on
    _script("checkpoint2model.py --checkpoint-path", workspace / "checkpoint.pth.tar", "--weight-path", weights)


def _script(command: str, *more: str | Path) -> None:
    """Print a script's command line, then run it."""
    script, *arguments = [*command.split(), *map(str, more)]
    print(f"\n$ python {shlex.join([script, *arguments])}", flush=True)
    result = subprocess.run([sys.executable, script, *arguments], check=False)
    if result.returncode != 0:
        raise UserError(f"{script} ended with status {result.returncode}; the demo runs from the repository's root.")


@dataclass(frozen=True)
class _Variant:
    """A row of the table before its speed is known; ``run`` maps float32 images (N, 3, H, W) to outputs, in NumPy."""

    title: str
    path: Path
    run: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    simulation: nn.Module
    is_engine: bool


def _measure(paths: dict[str, Path]) -> list[Row]:
    """Evaluate every variant on the test images, and time all of them in turns."""
    preprocessing = InputSpec(IMAGE_SIZE, IMAGE_SIZE)
    loader = Loader(DigitsSource("val"), evaluation_transform(preprocessing), THROUGHPUT_BATCH)
    batches = [(normalize(images, preprocessing), labels) for images, labels in loader.epoch()]
    models = {
        name: create_model(FLOAT if name == "fp32" else QUANTIZED, 10, paths[name]).eval()
        for name in ("fp32", "ptq", "qat")
    }
    variants = [
        _Variant(title, paths[name], _in_numpy(models[name]), models[name], is_engine=False)
        for name, title in (("fp32", "FP32"), ("ptq", "PTQ simulated"), ("qat", "QAT simulated"))
    ]
    for precision, simulation in (("FP32", "fp32"), ("INT8", "qat")):
        for runtime, title in RUNTIMES.items():
            path = paths[f"{precision.lower()}_{runtime}"]
            engine = load_engine(path, runtime)
            simulated = simulate_target(copy.deepcopy(models[simulation]), runtime)
            variants.append(_Variant(f"{precision} engine ({title})", path, engine, simulated, is_engine=True))
    comparisons = [compare(variant.run, variant.simulation, batches) for variant in variants]
    many = batches[0][0].numpy()
    single = median_seconds([partial(variant.run, many[:1]) for variant in variants])
    batch = median_seconds([partial(variant.run, many) for variant in variants])
    return [
        Row(
            variant.title,
            comparison.engine_score,
            1e3 * seconds_of_one,
            len(many) / seconds_of_many,
            variant.path.stat().st_size,
            comparison.agreement if variant.is_engine else None,
        )
        for variant, comparison, seconds_of_one, seconds_of_many in zip(
            variants, comparisons, single, batch, strict=True
        )
    ]


def _in_numpy(model: nn.Module) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return np.asarray(model(torch.from_numpy(images)))

    return run


def _slower_than_float(rows: Sequence[Row]) -> list[str]:
    """A sentence for each INT8 engine that is slower than the same runtime's float engine."""
    by_name = {row.variant: row for row in rows}
    sentences = []
    for title in RUNTIMES.values():
        integer, floating = by_name[f"INT8 engine ({title})"], by_name[f"FP32 engine ({title})"]
        slower = []
        if integer.latency_ms > floating.latency_ms:
            slower.append(f"batch 1: {floating.latency_ms / integer.latency_ms:.2f}x")
        if integer.images_per_s < floating.images_per_s:
            slower.append(f"batch {THROUGHPUT_BATCH}: {integer.images_per_s / floating.images_per_s:.2f}x")
        if slower:
            sentences.append(f"{integer.variant} is slower than its float engine here ({', '.join(slower)} its speed)")
    return sentences
