"""Engine and load_engine: compiled models behind one interface for all runtimes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet_quant.card import InputSpec
from effnet_quant.engines.compiled import Compiled, Settings, run_in_batches
from effnet_quant.engines.cpu import cpu_has_bf16
from effnet_quant.engines.deployment import is_deployment, read_deployment
from effnet_quant.engines.onnx_file import read_onnx_card
from effnet_quant.engines.runtimes import BACKENDS, get_backend
from effnet_quant.engines.signature import MOST_NUMBERS, ArrayInput, arrange, has_nan
from effnet_quant.errors import UserError
from effnet_quant.files import existing_file
from effnet_quant.structure import map_leaves

PREDICTED_TOGETHER = 32  # images, so that a long list needs little memory

__all__ = ["BACKENDS", "Engine", "load_engine"]


class Engine:
    """A compiled model. Called with the model's arguments as arrays, it returns the model's results as arrays.

    Several threads may call one engine at the same time, and its ``predict``. Each gets the results that it
    would get alone. All methods may be called from any thread.

    Attributes:
        path: the file it was compiled from.
        backend: the runtime's name.
        settings: device, precision and threads.
        inputs: name, type and shape of each array that it takes.
        outputs: name, type and shape of each array in what it returns.
        precision: the precision of its arithmetic, e.g. "fp32", or "int8 + bf16".
        card: describes the model.
        metadata: the card as plain values, and further values that the exporter stored.
    """

    def __init__(
        self, compiled: Compiled, path: Path, backend: str, settings: Settings, *, allow_nan: bool = False
    ) -> None:
        self._run = compiled.run
        self._prepare = compiled.prepare
        self._forget = compiled.forget
        self._signature = compiled.signature
        self._batches = compiled.signature.smallest_batch, compiled.signature.largest_batch
        self.inputs = compiled.signature.inputs
        self.outputs = compiled.signature.outputs
        self.precision = compiled.precision
        self.card = compiled.card
        self.metadata = compiled.metadata
        self.path = path
        self.backend = backend
        self.settings = settings
        self._allow_nan = allow_nan

    @property
    def input(self) -> ArrayInput:
        """The first input."""
        return self.inputs[0]

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes, in the order of the outputs; None if the file has none."""
        return self.card.classes

    @property
    def image_spec(self) -> InputSpec:
        """The images that the model takes, and how they are prepared.

        Raises:
            UserError: the file does not say.
        """
        from effnet_quant.models.registry import CROP_MARGIN

        if self.card.input is not None:
            return self.card.input
        size = self.metadata.get("image_size")
        if size is None:
            raise UserError(
                f"{self.path} does not say how its images are prepared; export it with model2onnx.py, or with a card that "
                "has an InputSpec."
            )
        return InputSpec(size, size + CROP_MARGIN)

    def __repr__(self) -> str:
        def form(value: ArrayInput) -> str:
            sizes = ("any" if size is None else str(size) for size in value.shape)
            return f"{value.name} {value.dtype} ({', '.join(['N', *sizes])})"

        arch = f"{self.card.arch}, " if self.card.arch else ""
        classes = f", {len(self.classes)} classes" if self.classes else ""
        runs = f"{self.backend}, {self.precision}, {self.settings.device}"
        return f"Engine({str(self.path)!r}: {arch}{runs}; takes {', '.join(map(form, self.inputs))}{classes})"

    def predict(self, images: Any, topk: int = 5) -> Any:
        """The answers for images, prepared as the card says: for a classifier its likeliest classes and their probabilities.

        Args:
            images: a file's name or URL, a PIL image, an array of uint8 (H, W, 3), or a tensor of uint8 (3, H, W); or a list
                of these. Arrays (N, H, W, 3) are lists too.
            topk: classes in an answer, at most.

        Returns:
            ``{"top": [{"class": name, "index": 0 …, "probability": 0 … 1}, …]}`` for one image, the likeliest class first; a
            list of answers for a list. Other tasks have answers of their own (``Task.answers``).

        Raises:
            UserError: an image can't be read, the engine takes no single image, or the file does not say how to prepare one.
        """
        import torch

        from effnet_quant.data.image_arguments import as_pixels
        from effnet_quant.data.transforms import evaluation_transform, normalize
        from effnet_quant.tasks import get_task

        if len(self.inputs) != 1 or not self.input.is_image:
            raise UserError("predict is for engines that take one image; call this engine with its arrays.")
        if topk < 1:
            raise UserError("topk must be at least 1.")
        several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        given, spec, answers = list(images) if several else [images], self.image_spec, []
        transform, task = evaluation_transform(spec), get_task(self.card.task)
        for start in range(0, len(given), PREDICTED_TOGETHER):
            pixels = torch.stack([transform(as_pixels(image)) for image in given[start : start + PREDICTED_TOGETHER]])
            prepared = pixels if self.input.dtype == "uint8" else normalize(pixels, spec)
            outputs = map_leaves(torch.from_numpy, self.real(self(prepared.numpy().astype(self.input.dtype))))
            answers += task.answers(outputs, self.classes, topk)
        return answers if several else answers[0]

    def __call__(self, *arrays: NDArray[Any]) -> Any:
        """What the model returns for its arguments: an array, or tuples, lists and dicts of arrays.

        An image classifier takes normalised float32 images (N, C, H, W) and returns float32 logits (N, classes). A file
        exported with preprocessing takes uint8 pixels (N, C, H, W). A file of ``export_integer`` takes pixels and
        returns int32 logits. ``inputs`` lists types and shapes. The batch comes first
        and may have any size N >= 1: if the file limits it, arrays are split or padded. float16 outputs are returned as
        float32.

        Raises:
            UserError: the number, shape or type of the arrays is wrong, one holds NaN (unless ``load_engine`` was told
                ``allow_nan``), or the runtime fails.
        """
        checked = self.check(*arrays)
        try:
            outputs = run_in_batches(self._run, checked, *self._batches)
        except UserError:
            raise
        except Exception as error:  # each runtime has exceptions of its own
            raise UserError(f"{self.backend} can't run {self.path}: {_reason(error)}; check the arrays.") from error
        outputs = [output.astype(np.float32) if output.dtype == np.float16 else output for output in outputs]
        return arrange(outputs, self._signature.structure)

    def check(self, *arrays: NDArray[Any]) -> list[NDArray[Any]]:
        """The arguments of a call as contiguous arrays, without running the model.

        Raises:
            UserError: their number, shape or type is wrong, or one holds NaN.
        """
        if len(arrays) != len(self.inputs):
            names = ", ".join(value.name for value in self.inputs)
            raise UserError(f"the engine takes {len(self.inputs)} arrays ({names}), not {len(arrays)}.")
        checked = [self._checked(value, array) for value, array in zip(self.inputs, arrays, strict=True)]
        if any(len(array) != len(checked[0]) for array in checked):
            sizes = ", ".join(str(len(array)) for array in checked)
            raise UserError(f"the arrays have batches of {sizes}; give all inputs the same batch.")
        return checked

    def real(self, outputs: Any) -> Any:
        """What the engine returned, as real numbers. An integer file's int32 outputs are multiplied by the card's scale."""
        scale = self.card.output_scale
        if scale is None:
            return outputs
        return map_leaves(lambda array: (array * np.float64(scale)).astype(np.float32), outputs)

    def _checked(self, value: ArrayInput, array: NDArray[Any]) -> NDArray[Any]:
        try:
            array = np.asarray(array)
        except Exception as error:  # lists of unequal lengths, tensors on other devices or with gradients
            raise UserError(f"the engine takes arrays, not this {type(array).__name__}: {_reason(error)}.") from error
        shape = value.shape
        fits = array.ndim == 1 + len(shape) and all(
            size in (None, own) for size, own in zip(shape, array.shape[1:], strict=True)
        )
        images = value.is_image and len(self.inputs) == 1
        if not fits or len(array) == 0:
            expected = "x".join("any" if size is None else str(size) for size in shape)
            what, remedy = ("images", "; resize them first") if images else (f"the input '{value.name}'", "")
            raise UserError(f"the engine takes {what} of shape (N, {expected}), not {array.shape}{remedy}.")
        if array.dtype != value.dtype:
            if not images:
                raise UserError(f"the engine takes the input '{value.name}' as {value.dtype}, not {array.dtype}.")
            remedy = "give it pixels" if value.dtype == "uint8" else "normalise and convert them first"
            raise UserError(f"the engine takes {value.dtype} images, not {array.dtype}; {remedy}.")
        if array.size > MOST_NUMBERS and 0 in array.strides:
            raise UserError(f"the array repeats a few numbers to fill {array.shape}; give the engine smaller batches.")
        if not self._allow_nan and has_nan(array):
            what = "the images hold" if images else f"the input '{value.name}' holds"
            raise UserError(
                f"{what} NaN, for which no answer means anything; correct them, or load_engine(allow_nan=True)."
            )
        return np.ascontiguousarray(array)

    def warm_up(self, batch_size: int = 1, runs: int = 2, *, image_size: int | None = None) -> None:
        """Run a few batches of noise, because the first runs of a runtime are slow.

        OpenVINO also compiles a faster network for this batch size. Its results can differ in rounding, so call ``warm_up``
        before the first real arrays.

        Raises:
            UserError: the file leaves a size open, and neither its metadata nor ``image_size`` names one.
        """
        arrays = self.example_inputs(batch_size, image_size)
        smallest, largest = self._batches
        if self._prepare is not None and smallest <= batch_size <= (largest or batch_size):
            self._prepare([array.shape for array in arrays])
        for _ in range(runs):
            self(*arrays)

    def forget_shapes(self) -> None:
        """Drop what the runtime has compiled for single shapes.

        OpenVINO drops its networks, TensorRT its captured graphs. Other runtimes do nothing.
        """
        if self._forget is not None:
            self._forget()

    def example_inputs(self, batch_size: int, image_size: int | None = None) -> tuple[NDArray[Any], ...]:
        """Noise as input, one array for each input; the same in every call.

        Open sizes become ``image_size``, by default the image size in the file's metadata. Pixels are 0 to 255. Other
        integers are 0 or 1, which are valid indices in any vocabulary.

        Raises:
            UserError: as ``warm_up``, or there would be no numbers, or too many.
        """
        generator = np.random.default_rng(0)
        return tuple(self._noise(value, batch_size, image_size, generator) for value in self.inputs)

    def _noise(
        self, value: ArrayInput, batch_size: int, image_size: int | None, generator: np.random.Generator
    ) -> NDArray[Any]:
        size = image_size or self.metadata.get("image_size")
        if size is None and None in value.shape:
            raise UserError(f"{self.path} takes {'images' if value.is_image else value.name} of any size; say which.")
        shape = [batch_size, *(int(size or 0) if own is None else own for own in value.shape)]
        if min(shape) < 1 or math.prod(shape) > MOST_NUMBERS:
            raise UserError(
                f"a batch of {batch_size} would have the shape {tuple(shape)}; take another one or image size."
            )
        if np.issubdtype(value.dtype, np.floating):
            return generator.standard_normal(shape, np.float32).astype(value.dtype)
        return generator.integers(0, 256 if value.dtype == "uint8" and value.is_image else 2, shape).astype(value.dtype)


def load_engine(
    path: str | Path,
    backend: str | None = None,
    *,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    allow_nan: bool = False,
) -> Engine:
    """Make a model ready to run on this machine. Several threads may call the engine at the same time.

    Args:
        path: an ONNX file written by ``export_onnx``; for "tensorrt" also a plan written by ``compile_engine``; for
            "executorch" a file of ``export_executorch``; for "torch" a weights file or checkpoint; for "integer" a file of
            ``export_integer``. Or the deploy.json of ``deploy``. It names a file beside it, a backend, a precision and
            threads; the arguments below win over it.
        backend: "onnxruntime", "openvino", "executorch", "tensorrt", "integer", or "torch" for the model itself, float or
            simulated. None is deploy.json's, else "onnxruntime".
        device: "cpu" or "cuda"; None for the backend's usual one.
        precision: of operations that the file leaves in floating point: "fp32", with OpenVINO and torch also "bf16", with
            torch also "fp16". TensorRT takes all precisions from the file. None takes the precision that the file was tuned
            for (``model2onnx.py --tune``) if the backend and the machine support it, else the backend's first.
        threads: CPU threads of one call; None leaves the number to the runtime. With "torch" and ``threads``, calls from
            several threads take turns, because PyTorch has one number of threads per process.
        allow_nan: let arrays with NaN through; by default they are refused. 8-bit networks turn NaN into any number.

    Raises:
        UserError: the file is missing, damaged or of another kind, or the backend is unknown, not installed, does not run
            on this device or in this precision, or refuses the file.
    """
    if is_deployment(path):
        chosen, path = read_deployment(path)
        if backend in (None, chosen.backend):
            precision = precision or chosen.precision
        backend = backend or chosen.backend
        if threads is None and device != "cuda":
            threads = chosen.threads
    backend = backend or "onnxruntime"
    module = get_backend(backend)
    device = _choice(backend, "run on the device", device, module.DEVICES)
    if precision is not None:
        _choice(backend, "compute in", precision, module.PRECISIONS)
    if threads is not None and (threads < 1 or device != "cpu"):
        raise UserError(f"{threads} threads? They are those of the CPU, at least 1.")
    path = existing_file(path)
    settings = Settings(device, precision or _usual_precision(path, backend), threads)
    try:
        compiled = module.compile_file(path, settings)
    except UserError:
        raise
    except Exception as error:  # each runtime has exceptions of its own
        raise UserError(
            f"{backend} can't compile {path}: {_reason(error)}; export it again for this backend."
        ) from error
    return Engine(compiled, path, backend, settings, allow_nan=allow_nan)


def usable_precisions(backend: str) -> tuple[str, ...]:
    """The backend's precisions for floating-point operations on this machine, its default first."""
    return tuple(name for name in get_backend(backend).PRECISIONS if name != "bf16" or cpu_has_bf16())


def _usual_precision(path: Path, backend: str) -> str:
    """The one that the file was tuned for, where it can be had."""
    usable = usable_precisions(backend)
    if path.suffix == ".onnx" and len(usable) > 1:
        tuned = read_onnx_card(path).tuned_precision
        if tuned in usable:
            return tuned
    return usable[0]


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _choice(backend: str, what: str, wanted: str | None, own: tuple[str, ...]) -> str:
    if wanted is None:
        return own[0]
    if wanted not in own:
        raise UserError(f"{backend} does not {what} '{wanted}'; choose one of: {', '.join(own)}.")
    return wanted
