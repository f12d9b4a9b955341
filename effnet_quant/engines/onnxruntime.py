"""ONNX Runtime, on the CPU or on a CUDA card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from effnet_quant.engines.compiled import Arrays, Compiled, Settings
from effnet_quant.engines.cpu import cpu_flags, cpu_has_exact_int8
from effnet_quant.engines.onnx_file import OnnxFile, read_onnx
from effnet_quant.errors import UserError

DEVICES = ("cpu", "cuda")
PRECISIONS = ("fp32",)
_CUDA = "CUDAExecutionProvider"
_FIRST_WITH_INT4 = (1, 23)  # whose Cast takes INT4


def compile_file(path: Path, settings: Settings) -> Compiled:
    """Compile an ONNX file as a session.

    Raises:
        UserError: ONNX Runtime is missing or has no CUDA, or the file is missing or damaged.
    """
    file = read_onnx(path)
    onnxruntime = library()
    version = onnxruntime.__version__
    if file.packed and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _FIRST_WITH_INT4:
        raise UserError(
            f"ONNX Runtime {version} can't read the 4-bit weights of {path}; install 1.23 or later, or export with "
            "--weights int8."
        )
    providers = ["CPUExecutionProvider"]
    if settings.device == "cuda":
        if _CUDA not in onnxruntime.get_available_providers():
            raise UserError("this ONNX Runtime can't use a GPU; pip install onnxruntime-gpu, or take the device cpu.")
        import torch  # noqa: F401  # brings the CUDA libraries that ONNX Runtime wants loaded

        providers = [_CUDA, *providers]
    options = session_options(file, settings)
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    if settings.device == "cuda" and _CUDA not in session.get_providers():
        raise UserError("ONNX Runtime found no CUDA card that it can use; take the device cpu.")
    inputs, outputs = ([value.name for value in values] for values in (file.signature.inputs, file.signature.outputs))

    def run_session(arrays: Arrays) -> Arrays:
        # a session may be run by several threads at once
        return session.run(outputs, dict(zip(inputs, arrays, strict=True)))

    return Compiled(run_session, file.signature, file.precision("fp32"), file.card, file.metadata)


def library() -> Any:
    """The module onnxruntime, with its telemetry off: some of its wheels report events to their maker.

    Raises:
        UserError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("ONNX Runtime is not installed; pip install onnxruntime.") from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def session_options(file: OnnxFile, settings: Settings) -> Any:
    """The onnxruntime.SessionOptions for a file. They avoid kernels and optimizations that change its results."""
    onnxruntime = library()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    if cpu_flags() is None or not cpu_has_exact_int8():
        # On CPUs without VNNI the fast uint8 x int8 kernels saturate at 16 bits. With this entry ONNX Runtime uses slower,
        # exact kernels. It is not set on CPUs with VNNI: the fast kernels are exact there, and the entry would cost speed.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if file.quantized and file.half:
        # ONNX Runtime 1.31's optimizer changes what quantized graphs in float16 compute
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options
