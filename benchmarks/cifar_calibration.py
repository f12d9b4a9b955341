"""Claim: on CIFAR-10, post-training quantization to 8 bits keeps a ResNet-20's accuracy within 0.2 points.

Runs every calibration method with every preset, on published weights and real images: 512 training images for calibration
(seed 0), all 10,000 test images for the measurement. For the simulation of each target it prints top-1, the agreement with
the float network's predictions, and the logits' signal to quantization noise ratio. At the end it prints the same figures
for other
tools, with the same network and images: ONNX Runtime's tool, as an engine with exact kernels, and nvidia-modelopt's
simulation (if installed: pip install nvidia-modelopt requests).

    python benchmarks/cifar_calibration.py ../shared/data
    python benchmarks/cifar_calibration.py ../shared/data --targets --presets w8a8      the tools alone
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime import quantization as tool
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from torch import Tensor, nn

from effnet_quant import create_model, export_onnx, load_engine, quantize
from effnet_quant.data.transforms import normalize
from effnet_quant.models.registry import get_entry
from effnet_quant.quantization.calibration import METHODS, collect, set_ranges
from effnet_quant.quantization.targets import TARGETS

ARCHIVE, WEIGHTS, MODEL = "cifar10-jpeg.tar.xz", "cifar-resnet20.safetensors", "cifar-resnet20"
PRESETS = ("w8a8", "w8a8-affine", "w8a16", "w4a8", "w4a4")


def read_images(archive: Path, split: str, chosen: Iterable[int] | None = None) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, 32, 32) and labels of a split, or of the ``chosen`` positions in the order of the names."""
    with tarfile.open(archive) as tar:
        files = {item.name: tar.extractfile(item) for item in tar if f"{split}/" in item.name and item.isfile()}
        contents = {name: file.read() for name, file in files.items() if file is not None}
    names = sorted(contents)
    classes = sorted({Path(name).parent.name for name in names})
    names = names if chosen is None else [names[index] for index in chosen]
    pixels = [np.asarray(Image.open(io.BytesIO(contents[name])).convert("RGB")) for name in names]
    labels = [classes.index(Path(name).parent.name) for name in names]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits for normalised images, in eval mode."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(500)])


def decibels(signal: Tensor, noisy: Tensor) -> float:
    """Signal to noise ratio in dB."""
    return float(10 * torch.log10(signal.double().square().sum() / (noisy - signal).double().square().sum()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Calibration methods x presets on CIFAR-10.")
    parser.add_argument("data", type=Path, help=f"folder with {ARCHIVE} and {WEIGHTS}")
    parser.add_argument("--percentile", type=float, nargs="+", default=[99.9, 99.99, 99.999])
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--targets", nargs="*", choices=tuple(TARGETS), default=tuple(TARGETS))
    arguments = parser.parse_args()
    chosen = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))[:512].tolist()
    preprocessing = get_entry(MODEL).input
    calibration = normalize(read_images(arguments.data / ARCHIVE, "train", chosen)[0], preprocessing)
    images, labels = read_images(arguments.data / ARCHIVE, "test")
    images = normalize(images, preprocessing)
    weights = arguments.data / WEIGHTS

    truth = logits_of(create_model(MODEL, weights=weights), images)
    print(f"float: top-1 {100 * (truth.argmax(1) == labels).double().mean():.2f} %", flush=True)
    print(f"{'target':20} {'preset':14} {'method':22} {'top-1 %':>8} {'agree %':>8} {'SQNR dB':>8}")

    def show(target: str, preset: str, method: str, logits: Tensor) -> None:
        top1 = 100 * (logits.argmax(1) == labels).double().mean()
        agreement = 100 * (logits.argmax(1) == truth.argmax(1)).double().mean()
        noise = decibels(truth, logits)
        print(f"{target:20} {preset:14} {method:22} {top1:8.2f} {agreement:8.2f} {noise:8.2f}", flush=True)

    for target, preset in itertools.product(arguments.targets, arguments.presets):
        model = quantize(create_model(MODEL, weights=weights), preset, target=target)
        # one pass over the images serves every method that wants histograms
        seen = {method: collect(model, calibration.split(64), method) for method in ("moving-average", "mse")}
        for method in METHODS:
            for percentile in arguments.percentile if method == "percentile" else [100.0]:
                set_ranges(model, seen.get(method, seen["mse"]), method, percentile)
                name = f"{method} {percentile}" if method == "percentile" else method
                show(target, preset, name, logits_of(model, images))
    model = create_model(MODEL, weights=weights).eval()
    _show_modelopt(model, calibration, images, show)
    _show_onnxruntimes_tool(model, calibration, images, show)


Show = Callable[[str, str, str, Tensor], None]


def _show_modelopt(model: nn.Module, calibration: Tensor, images: Tensor, show: Show) -> None:
    try:
        import modelopt.torch.quantization as mtq
    except ImportError:
        print("nvidia-modelopt is not installed, so it is left out")
        return
    theirs = mtq.quantize(copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, lambda model: logits_of(model, calibration))
    show("nvidia-modelopt", "int8", "max", logits_of(theirs, images))


class _Reader(tool.CalibrationDataReader):
    """Hands out the calibration images."""

    def __init__(self, images: Tensor) -> None:
        self._batches = iter(images.split(64))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"input": batch.numpy()}


def _show_onnxruntimes_tool(model: nn.Module, calibration: Tensor, images: Tensor, show: Show) -> None:
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    grids = {"uint8, affine": (tool.QuantType.QUInt8, {}), "int8, symmetric": (tool.QuantType.QInt8, symmetric)}
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, written = (Path(folder, f"{name}.onnx") for name in ("float", "prepared", "int8"))
        export_onnx(model, source, images.shape[-1])
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        for (name, (activations, options)), method in itertools.product(grids.items(), tool.CalibrationMethod):
            if method == tool.CalibrationMethod.Distribution:  # of float8
                continue
            tool.quantize_static(
                prepared,
                written,
                _Reader(calibration),
                per_channel=True,
                activation_type=activations,
                weight_type=tool.QuantType.QInt8,
                calibrate_method=method,
                extra_options=options,
            )
            engine = load_engine(written)  # which asks for exact kernels
            logits = [torch.from_numpy(engine(batch.numpy())) for batch in images.split(500)]
            show(f"ONNX Runtime {onnxruntime.__version__}", name, method.name.lower(), torch.cat(logits))


if __name__ == "__main__":
    main()
