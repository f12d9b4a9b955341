"""OpenVINO, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from effnet_quant.deploy.backends.compiled import Compiled, Settings
from effnet_quant.deploy.backends.onnx_file import read_onnx
from effnet_quant.deploy.cpu import cpu_has_bf16, cpu_has_exact_int8
from effnet_quant.errors import UserError

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "bf16")


def compile_file(path: Path, settings: Settings) -> Compiled:
    """An inference request of an ONNX file.

    Raises:
        UserError: OpenVINO is missing, the CPU has no bfloat16, or the file is missing or damaged.
    """
    file = read_onnx(path)
    try:
        import openvino
    except ImportError as error:
        raise UserError("OpenVINO is not installed; pip install effnet-quant[openvino].") from error
    if settings.precision == "bf16" and not cpu_has_bf16():
        raise UserError("this CPU does not compute in bfloat16 (AVX512-BF16, AMX); take the precision fp32.")
    # without this, what the plugin leaves in floating point would become bfloat16 on CPUs with AMX, unasked
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if settings.precision == "bf16" else "f32"}
    if not cpu_has_exact_int8():
        properties["LP_TRANSFORMS_MODE"] = "NO"
    if settings.threads is not None:
        properties["INFERENCE_NUM_THREADS"] = settings.threads
    compiled = openvino.Core().compile_model(str(path), "CPU", properties)
    request = compiled.create_infer_request()
    return Compiled(
        lambda images: np.array(request.infer({0: images})[0]),
        file.input,
        file.precision(settings.precision),
        file.metadata,
    )
