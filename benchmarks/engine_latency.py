"""Claim: our INT8 engines are faster than ONNX Runtime's FP32 engine, and than the engines of today's tools.

Exports each network (random weights) once as float ONNX. ONNX Runtime's tool and NNCF make INT8 models of that file. From
the same weights and calibration images (noise) effnet-quant makes INT8 models of its own, one for each runtime. All run in
turns in one process, with the same number of threads. The table has the median of ONNX Runtime FP32 in milliseconds, and the
speed of the others over it (above 1 is faster). The last columns are our fastest engine: over ONNX Runtime FP32, and over
the fastest float engine of its own runtime (FP32 or bfloat16).

    python benchmarks/engine_latency.py                             224 px, batches of 1 and 32; about 20 minutes
    python benchmarks/engine_latency.py --networks timm:resnet50    one network: 5 to 11 minutes
    python benchmarks/engine_latency.py --networks timm:efficientnet_b0 --hard-swish    ours with hard-swish for SiLU

Peers run with their runtimes' default settings (on CPUs with AMX, OpenVINO then computes floats in bfloat16). Our engines
run as load_engine runs them. OpenVINO compiles all for the shape of the batch. Each engine is loaded several times, because
one file's speed differs by up to a fifth from load to load. On CPUs without VNNI, ONNX Runtime's default kernels saturate
and ours do not (docs/deployment.md), so compare on CPUs with VNNI. On others our w7a8 is measured too: its weights have 7
bits, so the fast kernels compute exactly. NNCF's columns need NNCF: pip install nncf.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray
from onnxruntime import quantization as tool
from onnxruntime.quantization.shape_inference import quant_pre_process
from random_weights import wake

from effnet_quant import calibrate, create_model, export_onnx, load_engine, quantize
from effnet_quant.checks.engines_machine import describe_engines_machine, machine_line
from effnet_quant.checks.latency import interleaved_seconds, rounds_for
from effnet_quant.engines.cpu import cpu_has_bf16, cpu_has_exact_int8
from effnet_quant.engines.openvino import OpenvinoRunner, shared_core
from effnet_quant.engines.signature import ArrayInput, ArrayOutput, Signature
from effnet_quant.models.activations import replace_silu

try:
    import nncf
except ImportError:
    nncf = None

Images = NDArray[np.float32]
Run = Callable[[Images], Any]
Load = Callable[[], Run]
NETWORKS = ("timm:efficientnet_b0", "timm:resnet50", "timm:mobilenetv2_100")
BASE = "ORT FP32 (ms)"
OWN_FLOATS = {
    "ORT": (BASE, "ORT FP32, hard-swish"),
    "OpenVINO": ("OpenVINO FP32", "OpenVINO bf16", "OpenVINO FP32, hard-swish"),
}
CALIBRATION_IMAGES = 8
LOADS = 3
SECONDS = 75  # for all engines of a network at one batch size, about


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="INT8 engines against FP32 and against today's tools.")
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(1, 32))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--hard-swish", action="store_true", help="ours, and two float columns, with hard-swish for SiLU"
    )
    arguments = parser.parse_args()
    print(machine_line(describe_engines_machine(arguments.threads)))
    if nncf is None:
        print("NNCF is not installed; its columns are left out.")
    if not cpu_has_bf16():
        print("This CPU does not compute in bfloat16; those columns are left out.")
    if not cpu_has_exact_int8():
        print("This CPU has no VNNI: the peers' engines saturate, ours compute what the graph says.")
    print()
    titles: list[str] = []
    for network in arguments.networks:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            engines = _engines(network, arguments, Path(folder))
            prepared = time.monotonic() - start
            for batch_size in arguments.batch_sizes:
                medians = _medians(list(engines.values()), batch_size, arguments.image_size)
                if not titles:
                    titles = list(engines)
                    print(f"| network, batch | {' | '.join(titles)} | best of ours | over its runtime's float |")
                    print("| --- " * (len(titles) + 3) + "|")
                print(_row(network, batch_size, dict(zip(engines, medians, strict=True))), flush=True)
        print(f"<!-- {network}: {prepared:.0f} s to prepare, {time.monotonic() - start:.0f} s in all -->", flush=True)


def _row(network: str, batch_size: int, medians: dict[str, float]) -> str:
    base = medians[BASE]
    cells = [f"{1e3 * base:.1f}", *(f"{base / seconds:.2f}x" for name, seconds in medians.items() if name != BASE)]
    best = min((name for name in medians if name.startswith("ours")), key=medians.__getitem__)
    runtime = best.rpartition(", ")[2]
    own_float = min(medians[name] for name in OWN_FLOATS[runtime] if name in medians)
    cells += [f"{base / medians[best]:.2f}x ({runtime})", f"{own_float / medians[best]:.2f}x"]
    return f"| {network.removeprefix('timm:')}, {batch_size} | {' | '.join(cells)} |"


def _medians(loads: Sequence[Load], batch_size: int, image_size: int) -> list[float]:
    images = np.random.default_rng(2).standard_normal((batch_size, 3, image_size, image_size), np.float32)
    seconds: list[list[float]] = [[] for _ in loads]
    for _ in range(LOADS):
        functions = [partial(load(), images) for load in loads]
        for function in functions:  # what runtimes put off until the first run of a shape
            function()
        start = time.perf_counter()
        for function in functions:
            function()
        average = (time.perf_counter() - start) / len(functions)
        rounds, runs_a_turn = rounds_for(SECONDS / LOADS / len(functions), average)
        for own, more in zip(seconds, interleaved_seconds(functions, rounds, runs_a_turn), strict=True):
            own.extend(more)
    return [statistics.median(own) for own in seconds]


def _engines(network: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Load]:
    """For each column a function that loads its engine, ONNX Runtime's float engine first."""
    image_size, threads = arguments.image_size, arguments.threads
    model, images = model_and_images(network, image_size)
    float_path = folder / "float.onnx"
    export_onnx(model, float_path, image_size)
    engines: dict[str, Load] = {
        BASE: partial(load_engine, float_path, threads=threads),
        "OpenVINO FP32": partial(load_engine, float_path, "openvino", threads=threads),
    }
    if cpu_has_bf16():
        engines["OpenVINO bf16"] = partial(load_engine, float_path, "openvino", precision="bf16", threads=threads)
    if arguments.hard_swish:  # from here on
        replace_silu(model)
        export_onnx(model, folder / "hard_float.onnx", image_size)
        engines["ORT FP32, hard-swish"] = partial(load_engine, folder / "hard_float.onnx", threads=threads)
        engines["OpenVINO FP32, hard-swish"] = partial(
            load_engine, folder / "hard_float.onnx", "openvino", threads=threads
        )
    if not cpu_has_exact_int8():
        exact = write_ours(copy.deepcopy(model), images, folder / "w7a8", "w7a8")
        engines["ours w7a8, ORT"] = partial(load_engine, exact["onnxruntime"], threads=threads)
        engines["ours w7a8, OpenVINO"] = partial(load_engine, exact["openvino"], "openvino", threads=threads)
    engines |= _ours(write_ours(model, images, folder), threads)
    engines |= _onnxruntime_tool(write_tools(float_path, images, folder), threads)
    if nncf is not None:
        engines |= _nncf(float_path, images, threads)
    return engines


def model_and_images(network: str, image_size: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """The float network with random weights, and noise to calibrate with, the same in every run."""
    torch.manual_seed(0)
    model = wake(create_model(network)).eval()
    return model, torch.randn(CALIBRATION_IMAGES, 3, image_size, image_size)


def write_ours(model: torch.nn.Module, images: torch.Tensor, folder: Path, preset: str = "w8a8") -> dict[str, Path]:
    """Quantize the model in place and export it for each runtime; returns the files by target."""
    folder.mkdir(exist_ok=True)
    quantize(model, preset)
    calibrate(model, images.split(8), method="max")
    paths = {target: folder / f"{target}.onnx" for target in ("onnxruntime", "openvino")}
    for target, path in paths.items():
        export_onnx(model, path, images.shape[-1], target=target)
    return paths


def _ours(paths: dict[str, Path], threads: int) -> dict[str, Load]:
    engines: dict[str, Load] = {
        "ours INT8, ORT": partial(load_engine, paths["onnxruntime"], threads=threads),
        "ours INT8, OpenVINO": partial(load_engine, paths["openvino"], "openvino", threads=threads),
    }
    if cpu_has_bf16():
        in_bf16 = partial(load_engine, paths["openvino"], "openvino", precision="bf16", threads=threads)
        engines["ours INT8 + bf16, OpenVINO"] = in_bf16
    return engines


class _Reader(tool.CalibrationDataReader):
    """Hands the calibration images to ONNX Runtime's tool, one at a time."""

    def __init__(self, images: torch.Tensor) -> None:
        self._images = iter(images.split(1))

    def get_next(self) -> dict[str, Images] | None:
        image = next(self._images, None)
        return None if image is None else {"input": image.numpy()}


def write_tools(float_path: Path, images: torch.Tensor, folder: Path) -> dict[str, Path]:
    """Files of ONNX Runtime's tool: "u8" with unsigned activations, its default, and "s8" symmetric, as for TensorRT."""
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(float_path), str(prepared), skip_symbolic_shape=True)
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    paths = {name: folder / f"{name}.onnx" for name in ("u8", "s8")}
    for name, activations, options in (("u8", tool.QuantType.QUInt8, {}), ("s8", tool.QuantType.QInt8, symmetric)):
        tool.quantize_static(
            prepared,
            paths[name],
            _Reader(images),
            quant_format=tool.QuantFormat.QDQ,
            per_channel=True,
            activation_type=activations,
            weight_type=tool.QuantType.QInt8,
            extra_options=options,
        )
    return paths


def _onnxruntime_tool(paths: dict[str, Path], threads: int) -> dict[str, Load]:
    return {
        "ORT's tool u8": partial(_onnxruntime, paths["u8"], threads),
        "ORT's tool s8": partial(_onnxruntime, paths["s8"], threads),
        "ORT's tool s8, OpenVINO": partial(_openvino, shared_core().read_model(paths["s8"]), threads),
    }


def _nncf(float_path: Path, images: torch.Tensor, threads: int) -> dict[str, Load]:
    calibration = nncf.Dataset(list(images.split(1)), lambda image: image.numpy())
    in_float = nncf.IgnoredScope(types=["Multiply", "ReduceMean", "GroupConvolution"], validate=False)
    nncf.set_log_level(logging.ERROR)
    engines = {}
    for name, scope in (("NNCF, OpenVINO", None), ("NNCF less products, means, depthwise", in_float)):
        model = shared_core().read_model(float_path)
        with contextlib.redirect_stdout(sys.stderr):  # progress bars; the table goes to standard output
            quantized = nncf.quantize(model, calibration, subset_size=len(images), ignored_scope=scope)
        engines[name] = partial(_openvino, quantized, threads)
    return engines


def _onnxruntime(path: Path, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"input": images})


def _openvino(model: openvino.Model, threads: int) -> Run:
    shape = tuple(size.get_length() if size.is_static else None for size in list(model.input(0).partial_shape)[1:])
    taken = ArrayInput(model.input(0).any_name, "float32", shape)
    signature = Signature((taken,), (ArrayOutput(model.output(0).any_name, "float32"),))
    runner = OpenvinoRunner(shared_core(), model, signature, {"INFERENCE_NUM_THREADS": threads})
    return lambda images: runner([images])[0]


if __name__ == "__main__":
    main()
