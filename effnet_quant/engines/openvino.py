"""OpenVINO, on the CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet_quant.engines.compiled import Compiled, Settings
from effnet_quant.engines.cpu import cpu_has_bf16, cpu_has_exact_int8
from effnet_quant.engines.onnx_file import OnnxFile, read_onnx
from effnet_quant.errors import UserError

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "bf16")
# Compiled for one shape, a network runs up to a fifth faster than with an open batch (int8 kernels, mobilenetv2_100).
SHAPES_COMPILED = 4


def compile_file(path: Path, settings: Settings) -> Compiled:
    """An ONNX file, compiled for each shape of images when it first comes.

    Raises:
        UserError: OpenVINO is missing, the CPU has no bfloat16, or the file is missing or damaged.
    """
    file = read_onnx(path)
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise UserError("OpenVINO is not installed; pip install effnet-quant[openvino].") from error
    if settings.precision == "bf16" and not cpu_has_bf16():
        raise UserError("this CPU does not compute in bfloat16 (AVX512-BF16, AMX); take the precision fp32.")
    core = shared_core()
    run = OpenvinoRunner(core, core.read_model(path), compile_properties(file, settings))
    return Compiled(run, file.input, file.precision(settings.precision), file.card, file.metadata, run.forget)


def compile_properties(file: OnnxFile, settings: Settings) -> dict[str, Any]:
    """What OpenVINO is told for a file to compute what it says."""
    # without this, what the plugin leaves in floating point would become bfloat16 on CPUs with AMX, unasked
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if settings.precision == "bf16" else "f32"}
    if not (cpu_has_exact_int8() or file.fits_16_bits):
        properties["LP_TRANSFORMS_MODE"] = "NO"
    elif file.adds_integers:
        # the compiler of elementwise operations takes the additions before the convolutions in front can: these then write
        # floats for it to read. It has nothing else to do here, so it is switched off.
        properties["SNIPPETS_MODE"] = "DISABLE"
    if settings.threads is not None:
        properties["INFERENCE_NUM_THREADS"] = settings.threads
    return properties


@cache
def shared_core() -> Any:
    """One for the process, never let go: a Core gives the main thread a stack for signal handlers, and when several come
    and go in another order, one that has been freed; the next SIGCHLD then ends the process (OpenVINO 2026.4)."""
    import openvino

    return openvino.Core()


class OpenvinoRunner:
    """Runs a model on NumPy images: the first few shapes each on a network of their own, others on one for any shape.

    Which of the two a shape gets never changes, so the same images give the same logits.
    """

    def __init__(self, core: Any, model: Any, properties: dict[str, Any]) -> None:
        self._core = core
        self._model = model
        self._properties = properties
        self._requests: dict[tuple[int, ...], Any] = {}
        self._any_shape: Any = None

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        request = self._requests.get(images.shape)
        if request is None:
            request = self._request_for(images.shape)
        return np.array(request.infer({0: images}, share_inputs=True)[0])

    def forget(self) -> None:
        """Start again: the next shapes are the first."""
        self._requests.clear()
        self._any_shape = None

    def _request_for(self, shape: tuple[int, ...]) -> Any:
        if len(self._requests) < SHAPES_COMPILED:
            model = self._model.clone()
            model.reshape(list(shape))
            self._requests[shape] = self._compile(model)
            return self._requests[shape]
        if self._any_shape is None:
            self._any_shape = self._compile(self._model)
        return self._any_shape

    def _compile(self, model: Any) -> Any:
        return self._core.compile_model(model, "CPU", self._properties).create_infer_request()
