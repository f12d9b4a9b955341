"""Claim: PTQ recipes keep more of a network than the tools of the field, at 8 and at 4 bits.

The networks are those of calibration_default.py. Every row is calibrated on the same images (seed 0) and tested on others.
Our rows and those of ONNX Runtime's tool and NNCF are engines. Those of nvidia-modelopt and AIMET are their own simulations.
Prints top-1, agreement with the float network, the SQNR of the logits in dB, the file's bytes over float's, and
the CPU seconds of all threads that quantization took, as markdown rows while they are measured.

    python benchmarks/ptq.py ../shared/data --networks cifar-resnet20 --specs w8a8 w4a8 w4a4
    python benchmarks/ptq.py ../shared/data --networks timm:tf_efficientnet_lite0 --lite0 FOLDER --specs w4a8

Peers that are not installed are left out with a line. Into a folder of their own, for PYTHONPATH:

    pip install --target FOLDER nncf nvidia-modelopt aimet-torch
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from calibration_default import NETWORKS, Experiment, experiment
from cifar_calibration import ARCHIVE, MODEL, WEIGHTS, decibels, logits_of
from torch import Tensor, nn

from effnet_quant import export_onnx, load_engine, ptq
from effnet_quant.quantization.recipe import RECIPES
from effnet_quant.quantization.targets import TARGETS

Measured = tuple[Callable[[Tensor], Tensor], str, int | None]  # logits, "engine" or "simulation", bytes of the file
BATCH = 50


def main() -> None:
    """Measure every row of the table."""
    parser = argparse.ArgumentParser(description="PTQ recipes beside the tools of the field.")
    parser.add_argument("data", type=Path, help=f"folder with {ARCHIVE}, {WEIGHTS} and ImageNet's samples")
    parser.add_argument("--networks", nargs="+", default=[MODEL], choices=NETWORKS)
    parser.add_argument("--specs", nargs="+", default=["w8a8", "w4a8"])
    parser.add_argument("--targets", nargs="+", default=["onnxruntime"], choices=tuple(TARGETS))
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--images", type=int, default=10_000, help="test images of CIFAR-10")
    parser.add_argument("--lite0", type=Path, help="where the package with Lite0's weights is installed")
    arguments = parser.parse_args()
    for name in arguments.networks:
        of = experiment(name, arguments)
        of.build().eval()
        truth = logits_of(of.build(), of.images)
        top1 = 100 * float((truth.argmax(1) == of.labels).double().mean())
        print(f"\n{name}: {len(of.calibration)} images to calibrate, {len(of.images)} to test, float {top1:.2f} %\n")
        print("| spec | who | judged by | top-1 % | agreement % | dB | bytes over float | CPU s |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            float_file = Path(folder, "float.onnx")
            export_onnx(of.build().eval(), float_file, of.images.shape[-1])
            for spec in arguments.specs:
                rows = (*ours(of, spec, arguments, folder), *peers(of, spec, arguments.peers, float_file))
                for who, measure in rows:
                    show(spec, who, measure, of, truth, float_file.stat().st_size)


def show(spec: str, who: str, measure: Callable[[], Measured], of: Experiment, truth: Tensor, float_bytes: int) -> None:
    """Measure one row and print it."""
    start = time.process_time()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            run, judge, size = measure()
            seconds = time.process_time() - start
            logits = torch.cat([run(images) for images in of.images.split(BATCH)])
    except ImportError as error:
        print(f"{who} is left out: {error}", file=sys.stderr)
        return
    top1 = 100 * float((logits.argmax(1) == of.labels).double().mean())
    agreement = 100 * float((logits.argmax(1) == truth.argmax(1)).double().mean())
    share = "" if size is None else f"{size / float_bytes:.3f}"
    figures = f"{top1:.2f} | {agreement:.2f} | {decibels(truth, logits):.2f} | {share} | {seconds:.0f}"
    print(f"| {spec} | {who} | {judge} | {figures} |", flush=True)


def ours(
    of: Experiment, spec: str, arguments: argparse.Namespace, folder: str
) -> Iterator[tuple[str, Callable[[], Measured]]]:
    """Our recipes for every target; judged by ONNX Runtime or OpenVINO, or simulated for TensorRT."""
    for target in arguments.targets:
        for recipe in arguments.recipes:

            def measure(target: str = target, recipe: str = recipe) -> Measured:
                model = ptq(of.build().eval(), of.calibration.split(BATCH), spec, target=target, recipe=recipe)
                if target == "tensorrt":
                    return lambda images: logits_of(model, images), "simulation", None
                path = Path(folder, f"{target}-{spec}-{recipe}.onnx")
                export_onnx(model, path, of.images.shape[-1], target=target)
                engine = load_engine(path, target)
                return lambda images: torch.from_numpy(engine(images.numpy())), "engine", path.stat().st_size

            yield f"{recipe}, {target}", measure


def peers(
    of: Experiment, spec: str, wanted: list[str], float_file: Path
) -> Iterator[tuple[str, Callable[[], Measured]]]:
    """The peers that have this spec."""
    for name in wanted:
        specs, quantized = PEERS[name]
        if spec in specs:
            yield name, lambda quantized=quantized: quantized(of, spec, float_file)


class _Reader:
    """Hands ONNX Runtime's tool one image at a time."""

    def __init__(self, images: Tensor) -> None:
        self._images = iter(images.split(1))

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._images, None)
        return None if image is None else {"input": image.numpy()}


def _tool(of: Experiment, float_file: Path, **options: object) -> Measured:
    from onnxruntime import quantization as tool
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, path = float_file.with_name("prepared.onnx"), float_file.with_name("tool.onnx")
    quant_pre_process(str(float_file), str(prepared), skip_symbolic_shape=True)
    tool.quantize_static(
        prepared, path, _Reader(of.calibration), quant_format=tool.QuantFormat.QDQ, per_channel=True, **options
    )
    engine = load_engine(path, "onnxruntime")
    return lambda images: torch.from_numpy(engine(images.numpy())), "engine", path.stat().st_size


def tool_unsigned(of: Experiment, spec: str, float_file: Path) -> Measured:
    """ONNX Runtime's tool, MinMax, uint8 activations."""
    from onnxruntime.quantization import QuantType

    return _tool(of, float_file, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)


def tool_symmetric(of: Experiment, spec: str, float_file: Path) -> Measured:
    """ONNX Runtime's tool, MinMax, symmetric int8."""
    from onnxruntime.quantization import QuantType

    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    return _tool(of, float_file, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, extra_options=symmetric)


def _nncf(of: Experiment, float_file: Path, preset: str) -> Measured:
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    core = openvino.Core()
    data = nncf.Dataset(list(of.calibration.split(1)), lambda image: image.numpy())
    quantized = nncf.quantize(
        core.read_model(float_file),
        data,
        preset=nncf.QuantizationPreset(preset),
        subset_size=len(of.calibration),
        fast_bias_correction=False,
    )
    path = float_file.with_name("nncf.xml")
    openvino.save_model(quantized, path, compress_to_fp16=False)
    compiled = core.compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    size = path.with_suffix(".bin").stat().st_size
    return lambda images: torch.from_numpy(np.array(compiled([images.numpy()])[0])), "engine", size


def nncf_performance(of: Experiment, spec: str, float_file: Path) -> Measured:
    """NNCF, performance preset, with bias correction."""
    return _nncf(of, float_file, "performance")


def nncf_mixed(of: Experiment, spec: str, float_file: Path) -> Measured:
    """NNCF, mixed preset, with bias correction."""
    return _nncf(of, float_file, "mixed")


def modelopt(of: Experiment, spec: str, float_file: Path) -> Measured:
    """nvidia-modelopt, INT8 with its default algorithm (max)."""
    import modelopt.torch.quantization as mtq

    model = mtq.quantize(
        of.build().eval(), copy.deepcopy(mtq.INT8_DEFAULT_CFG), lambda net: logits_of(net, of.calibration)
    )
    return lambda images: logits_of(model, images), "simulation", None


def _aimet(of: Experiment, spec: str, *, rounds: int | None, equalize: bool) -> Measured:
    from aimet_common.defs import QuantScheme
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.cross_layer_equalization import equalize_model
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    bits = int(spec[1])
    example = of.calibration[:1]
    model: nn.Module = prepare_model(of.build().eval())
    if equalize:
        equalize_model(model, tuple(example.shape), example)
    else:
        fold_all_batch_norms(model, tuple(example.shape), dummy_input=example)

    def calibrate(net: nn.Module, _: object = None) -> None:
        with torch.no_grad():
            for images in of.calibration.split(BATCH):
                net(images)

    folder = Path(tempfile.mkdtemp())
    if rounds is not None:
        from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters

        batches = [(images, 0) for images in of.calibration.split(BATCH)]
        parameters = AdaroundParameters(batches, len(batches), rounds, forward_fn=lambda net, batch: net(batch[0]))
        model = Adaround.apply_adaround(
            model, example, parameters, str(folder), "adaround", bits, quant_scheme=QuantScheme.min_max
        )
    simulated = QuantizationSimModel(
        model, example, quant_scheme=QuantScheme.min_max, default_output_bw=8, default_param_bw=bits
    )
    if rounds is not None:
        simulated.set_and_freeze_param_encodings(str(folder / "adaround.encodings"))
    simulated.compute_encodings(calibrate, None)
    return lambda images: logits_of(simulated.model, images), "simulation", None


def aimet(of: Experiment, spec: str, float_file: Path) -> Measured:
    """AIMET, min-max, BatchNorm folded."""
    return _aimet(of, spec, rounds=None, equalize=False)


def aimet_equalized(of: Experiment, spec: str, float_file: Path) -> Measured:
    """AIMET, min-max, after cross-layer equalization."""
    return _aimet(of, spec, rounds=None, equalize=True)


def aimet_adaround(of: Experiment, spec: str, float_file: Path) -> Measured:
    """AIMET's AdaRound, 300 iterations a layer."""
    return _aimet(of, spec, rounds=300, equalize=False)


PEERS: dict[str, tuple[tuple[str, ...], Callable[[Experiment, str, Path], Measured]]] = {
    "ONNX Runtime's tool, uint8": (("w8a8",), tool_unsigned),
    "ONNX Runtime's tool, symmetric int8": (("w8a8",), tool_symmetric),
    "NNCF, performance": (("w8a8",), nncf_performance),
    "NNCF, mixed": (("w8a8",), nncf_mixed),
    "nvidia-modelopt": (("w8a8",), modelopt),
    "AIMET": (("w8a8", "w4a8"), aimet),
    "AIMET, equalized": (("w8a8", "w4a8"), aimet_equalized),
    "AIMET, AdaRound 300": (("w4a8",), aimet_adaround),
}


if __name__ == "__main__":
    main()
