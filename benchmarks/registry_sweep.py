"""Exports every registered network for every target, float and quantized, and runs it in ONNX Runtime and OpenVINO.

    python benchmarks/registry_sweep.py                         all of ``list_models()``
    python benchmarks/registry_sweep.py efficientnet-quant-b7 … only these

Prints the table of docs/models.md. Weights and BatchNorm's statistics are random, the images are noise, so the
results say nothing of accuracy. tests/export/test_registered.py checks the rows.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from model_sweep import moved_by_biases, relative_error
from random_weights import with_statistics
from torch import Tensor, nn

from effnet_quant import calibrate, create_model, export_onnx, list_models, load_engine, quantize
from effnet_quant.checks.layer_comparison import compare_layers
from effnet_quant.checks.lint import lint_tensorrt
from effnet_quant.export.onnx import build_onnx
from effnet_quant.models.registry import get_entry
from effnet_quant.quantization.placement.insertion import simulate_target

IMAGES = 16


@dataclass
class Quantized:
    """Results of the quantized network; units as in ``Row``."""

    export_seconds: dict[str, float]
    """CPU time, by target."""
    size: float
    errors: dict[str, float]
    """The engine against the simulation of its target; TensorRT's graph in ONNX Runtime."""
    layer_error: float
    """The same in ONNX Runtime for the layer where it is largest, by itself."""
    rounding_error: float
    """Simulation against itself with every bias as far off as rounding it to the engine's integers can put it."""
    agreement: float
    """Share of the images with the same largest logit in ONNX Runtime and the simulation."""
    findings: list[str]
    """Against TensorRT's placement rules, of the graph exported for it."""


@dataclass
class Row:
    """Results of one network: sizes of the ONNX files in MB, errors as relative L2 of the logits."""

    name: str
    image_size: int
    export_seconds: float
    """CPU time of the float export."""
    size: float
    errors: dict[str, float]
    """Float engines against PyTorch, by runtime."""
    quantized: Quantized | None
    """None for a name that means the float network."""


@torch.no_grad()
def examine(name: str, image_size: int) -> Row:
    """Take one registered network through its exports, and compare each with PyTorch on IMAGES images."""
    torch.manual_seed(0)
    entry = get_entry(name)
    model = with_statistics(create_model(name, num_classes=100, quantized=False)).eval()
    images = torch.randn(IMAGES, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "float.onnx")
        seconds = _export(model, path, image_size, "onnxruntime")
        expected = model(images)
        errors = {
            runtime: relative_error(_run(path, runtime, images), expected) for runtime in ("onnxruntime", "openvino")
        }
        row = Row(name, image_size, seconds, path.stat().st_size / 1e6, errors, None)
        if entry.quantized is not False:
            row.quantized = _quantized(model, images, Path(folder))
        return row


def _quantized(model: nn.Module, images: Tensor, folder: Path) -> Quantized:
    calibrate(quantize(model), images.split(8), method="max")
    size = images.shape[-1]
    paths = {target: folder / f"{target}.onnx" for target in ("onnxruntime", "openvino", "tensorrt")}
    seconds = {target: _export(model, path, size, target) for target, path in paths.items()}
    errors = {}
    for target, path in paths.items():
        expected = simulate_target(model, target)(images)
        computed = _run(path, "openvino" if target == "openvino" else "onnxruntime", images)
        errors[target] = relative_error(computed, expected)
        if target == "onnxruntime":
            agreement = float((computed.argmax(1) == expected.argmax(1)).float().mean())
    simulate_target(model, "onnxruntime")
    worst = min(row.by_itself for row in compare_layers(load_engine(paths["onnxruntime"]), model, images[:4]))
    return Quantized(
        seconds,
        paths["onnxruntime"].stat().st_size / 1e6,
        errors,
        layer_error=10 ** (-worst / 20),
        rounding_error=moved_by_biases(model, images, model(images)),
        agreement=agreement,
        findings=lint_tensorrt(build_onnx(model, size, target="tensorrt")),
    )


def _export(model: nn.Module, path: Path, image_size: int, target: str) -> float:
    start = time.process_time()
    export_onnx(model, path, image_size, target=target)
    return time.process_time() - start


def _run(path: Path, runtime: str, images: Tensor) -> Tensor:
    engine = load_engine(path, runtime, threads=1)
    return torch.from_numpy(engine(images.numpy()))


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| network | px | float: export, s | ONNX Runtime | OpenVINO | INT8: export, s | MB, float and INT8 | ONNX Runtime "
        "| OpenVINO | TensorRT's graph | worst layer by itself | biases alone | same argmax | lint |",
        "| --- " * 14 + "|",
    ]
    for row in rows:
        cells = [row.name, str(row.image_size), f"{row.export_seconds:.1f}"]
        cells += [f"{row.errors[runtime]:.0e}" for runtime in ("onnxruntime", "openvino")]
        own = row.quantized
        if own is None:
            cells += ["", f"{row.size:.1f}", *[""] * 7]
        else:
            cells += [f"{max(own.export_seconds.values()):.1f}", f"{row.size:.1f}, {own.size:.1f}"]
            cells += [f"{own.errors[target]:.4f}" for target in ("onnxruntime", "openvino", "tensorrt")]
            cells += [f"{own.layer_error:.4f}", f"{own.rounding_error:.4f}", f"{own.agreement:.0%}"]
            cells.append(str(len(own.findings)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def default_size(name: str) -> int:
    """Small images: an export does not depend on their size, only the time to run it."""
    return 32 if name.startswith(("cifar", "small")) else 64


def main() -> None:
    """Entry point."""
    rows = []
    print(table(rows))
    for name in sys.argv[1:] or list_models():
        rows.append(examine(name, default_size(name)))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        for line in rows[-1].quantized.findings if rows[-1].quantized else ():
            print(f"    {line}", flush=True)


if __name__ == "__main__":
    main()
