"""Engines: compiled models behind one interface."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from effnet_quant.errors import UserError
from effnet_quant.models.weights import METADATA_KEY

Runner = Callable[[NDArray[Any]], NDArray[np.float32]]


class Engine:
    """A compiled model; call it with images, get logits.

    Attributes:
        path: the ONNX file.
        backend: the runtime's name.
        metadata: what the exporter stored in the file: target, image_size and, where known, arch, classes, preprocessing.
    """

    def __init__(
        self, run: Runner, image_shape: tuple[int, int, int], path: Path, backend: str, metadata: dict[str, Any]
    ) -> None:  # image_shape: 0 for a size that is open
        self._run = run
        self.path = path
        self._image_shape = image_shape
        self.backend = backend
        self.metadata = metadata

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Logits (N, classes) of images (N, C, H, W), for any N >= 1: normalised float32 images, or uint8 pixels for an
        engine that normalises them itself.

        Raises:
            UserError: the images have another shape or type.
        """
        images = np.asarray(images)
        fits = images.ndim == 4 and all(
            size in (0, own) for size, own in zip(self._image_shape, images.shape[1:], strict=True)
        )
        if not fits or len(images) == 0:
            expected = "x".join("any" if size == 0 else str(size) for size in self._image_shape)
            raise UserError(f"the engine takes images of shape (N, {expected}), not {images.shape}; resize them first.")
        wanted = self.metadata.get("input", {}).get("type", "float32")
        if images.dtype != wanted:
            remedy = "give it pixels" if wanted == "uint8" else "normalise and convert them first"
            raise UserError(f"the engine takes {wanted} images, not {images.dtype}; {remedy}.")
        return self._run(np.ascontiguousarray(images))


def load_engine(path: str | Path, backend: str = "onnxruntime") -> Engine:
    """Compile an ONNX file for this machine.

    Args:
        path: a file written by ``export_onnx``.
        backend: "onnxruntime" or "openvino".

    Raises:
        UserError: the file is missing or damaged, the backend is unknown, refuses the file or is not installed.
    """
    path = Path(path)
    if backend not in _BACKENDS:
        raise UserError(f"there is no backend '{backend}'; choose one of: {', '.join(_BACKENDS)}.")
    if not path.is_file():
        raise UserError(f"there is no file {path}; check the path.")
    try:
        model = onnx.load(path)
        dimensions = model.graph.input[0].type.tensor_type.shape.dim
        channels, height, width = (dimension.dim_value for dimension in dimensions[1:])
        metadata = read_metadata(model)
    except (ValueError, IndexError, TypeError, OSError) as error:
        raise _damaged(path) from error
    except Exception as error:  # protobuf's DecodeError, whose module depends on the protobuf version
        if type(error).__name__ != "DecodeError":
            raise
        raise _damaged(path) from error
    try:
        run = _BACKENDS[backend](path)
    except UserError:
        raise
    except Exception as error:  # each runtime has exceptions of its own
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{backend} can't compile {path}: {reason}; export it again for this backend.") from error
    return Engine(run, (channels, height, width), path, backend, metadata)


def read_metadata(model: onnx.ModelProto) -> dict[str, Any]:
    """What ``export_onnx`` stored in a model; empty for models of other tools."""
    properties = {entry.key: entry.value for entry in model.metadata_props}
    return dict(json.loads(properties.get(METADATA_KEY, "{}")))


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is truncated, damaged or no ONNX file of an image classifier; export it again.")


def _onnxruntime(path: Path) -> Runner:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("ONNX Runtime is not installed; pip install onnxruntime.") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # On CPUs without VNNI the fast uint8 x int8 kernels saturate at 16 bits; with this entry ONNX Runtime uses kernels
    # that compute what the graph says (it has no effect where VNNI is present).
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _openvino(path: Path) -> Runner:
    try:
        import openvino
    except ImportError as error:
        raise UserError("OpenVINO is not installed; pip install effnet-quant[openvino].") from error
    # what the plugin leaves in floating point stays float32: on CPUs with AMX it would otherwise become bfloat16
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    if not cpu_has_exact_int8():
        settings["LP_TRANSFORMS_MODE"] = "NO"
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda images: np.array(request.infer({0: images})[0])


def cpu_has_exact_int8() -> bool:
    """Whether this CPU multiplies 8-bit integers into 32-bit sums in one instruction (VNNI, AMX).

    Without it, OpenVINO's integer kernels add pairs of products in 16 bits, which saturates and changes results (a top-1
    of 99.4 % fell to 96.7 % on the digits); ``load_engine`` then has it compute the same quantized values in float.
    Where the CPU's features can't be read (anything but Linux on x86), they are taken to be there.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True
    found = re.search(r"^flags\s*:(.*)$", flags, re.MULTILINE)
    return found is None or bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(found.group(1).split()))


_BACKENDS: dict[str, Callable[[Path], Runner]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
BACKENDS = tuple(_BACKENDS)
