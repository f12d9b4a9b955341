"""Engines: compiled models behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet_quant.engines.compiled import Compiled, Settings, run_in_batches
from effnet_quant.engines.cpu import cpu_has_bf16
from effnet_quant.engines.runtimes import BACKENDS, get_backend
from effnet_quant.errors import UserError

__all__ = ["BACKENDS", "Engine", "load_engine"]


class Engine:
    """A compiled model; call it with images, get logits.

    Attributes:
        path: the file it was compiled from.
        backend: the runtime's name.
        settings: device, precision and threads.
        input: name, type and shape of what it takes.
        precision: what it computes in, e.g. "fp32", or "int8 + bf16".
        card: what the file says of its model.
        metadata: the same as plain values, and what else the exporter stored.
    """

    def __init__(self, compiled: Compiled, path: Path, backend: str, settings: Settings) -> None:
        self._run = compiled.run
        self._forget = compiled.forget
        self.input = compiled.input
        self.precision = compiled.precision
        self.card = compiled.card
        self.metadata = compiled.metadata
        self.path = path
        self.backend = backend
        self.settings = settings

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Logits (N, classes), float32, of normalised float32 images (N, C, H, W), for any N >= 1.

        An engine that normalises by itself takes pixels, uint8 (N, C, H, W); ``input`` says so. Where a file takes a
        fixed or bounded number of images, they are split and filled up.

        Raises:
            UserError: the images have another shape or type.
        """
        images = np.asarray(images)
        shape, wanted = self.input.shape, np.dtype(self.input.dtype)
        fits = images.ndim == 4 and all(size in (None, own) for size, own in zip(shape, images.shape[1:], strict=True))
        if not fits or len(images) == 0:
            expected = "x".join("any" if size is None else str(size) for size in shape)
            raise UserError(f"the engine takes images of shape (N, {expected}), not {images.shape}; resize them first.")
        if images.dtype != wanted:
            remedy = "give it pixels" if wanted == np.uint8 else "normalise and convert them first"
            raise UserError(f"the engine takes {wanted} images, not {images.dtype}; {remedy}.")
        images = np.ascontiguousarray(images)
        logits = run_in_batches(self._run, images, self.input.smallest_batch, self.input.largest_batch)
        return logits.astype(np.float32, copy=False)

    def warm_up(self, batch_size: int = 1, runs: int = 2, *, image_size: int | None = None) -> None:
        """Run a few batches of noise, so that later ones don't pay for what a runtime puts off until then.

        Raises:
            UserError: the file leaves the image size open and neither it nor ``image_size`` names one.
        """
        images = self.example_images(batch_size, image_size)
        for _ in range(runs):
            self(images)

    def forget_shapes(self) -> None:
        """Let go of what the runtime has compiled for the shapes of images that came so far.

        OpenVINO compiles the first few shapes apart, which is faster, and TensorRT captures the last few; after this, the
        next ones are the first. For other runtimes it does nothing.
        """
        if self._forget is not None:
            self._forget()

    def example_images(self, batch_size: int, image_size: int | None = None) -> NDArray[Any]:
        """Noise that the engine takes, always the same; sizes that the file leaves open are ``image_size``, else those that
        the file was made for.

        Raises:
            UserError: as ``warm_up``.
        """
        size = image_size or self.metadata.get("image_size")
        if size is None and None in self.input.shape:
            raise UserError(f"{self.path} takes images of any size; say which.")
        shape = [batch_size, *(int(size or 0) if own is None else own for own in self.input.shape)]
        generator = np.random.default_rng(0)
        if self.input.dtype == "uint8":
            return generator.integers(0, 256, shape, dtype=np.uint8)
        return generator.standard_normal(shape, np.float32).astype(self.input.dtype)


def load_engine(
    path: str | Path,
    backend: str = "onnxruntime",
    *,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
) -> Engine:
    """Make a model ready to run on this machine.

    Args:
        path: an ONNX file written by ``export_onnx``; for "tensorrt" also a plan written by ``compile_engine``; for
            "torch" a weights file or checkpoint.
        backend: "onnxruntime", "openvino", "tensorrt", or "torch" for the model itself, float or simulated.
        device: "cpu" or "cuda"; None for the backend's usual one.
        precision: how the backend computes what the file leaves in floating point: "fp32"; OpenVINO and torch also in
            "bf16", torch in "fp16". Integers are the file's. TensorRT takes all precisions from the file.
        threads: on the CPU; None leaves it to the runtime.

    Raises:
        UserError: the file is missing, damaged or of another kind, or the backend is unknown, not installed, does not run
            on this device or in this precision, or refuses the file.
    """
    module, path = get_backend(backend), Path(path)
    settings = Settings(
        _choice(backend, "run on the device", device, module.DEVICES),
        _choice(backend, "compute in", precision, module.PRECISIONS),
        threads,
    )
    if threads is not None and (threads < 1 or settings.device != "cpu"):
        raise UserError(f"{threads} threads? They are those of the CPU, at least 1.")
    if not path.is_file():
        raise UserError(f"there is no file {path}; check the path.")
    try:
        compiled = module.compile_file(path, settings)
    except UserError:
        raise
    except Exception as error:  # each runtime has exceptions of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{backend} can't compile {path}: {reason}; export it again for this backend.") from error
    return Engine(compiled, path, backend, settings)


def usable_precisions(backend: str) -> tuple[str, ...]:
    """In what a backend computes on this machine what a file leaves in floating point, its usual way first."""
    return tuple(name for name in get_backend(backend).PRECISIONS if name != "bf16" or cpu_has_bf16())


def _choice(backend: str, what: str, wanted: str | None, own: tuple[str, ...]) -> str:
    if wanted is None:
        return own[0]
    if wanted not in own:
        raise UserError(f"{backend} does not {what} '{wanted}'; choose one of: {', '.join(own)}.")
    return wanted
