"""ModelCard: the description of a model that weights, checkpoints, ONNX files and engines carry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from effnet_quant.errors import UserError

VERSION = 1
# Entries of .safetensors and ONNX files: the card, the inputs and outputs, further entries of the exporting program
CARD_KEY = "effnet_quant"
SIGNATURE_KEY = "effnet_quant.signature"
EXTRA_KEY = "effnet_quant.metadata"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bilinear", "bicubic")
HARD_SWISH = "hard_swish"
CLASSIFICATION = "classification"  # the task of a file that names none

LARGEST_IMAGE = 2**12  # pixels a side; of larger images, a single layer's output would fill a machine's memory
MOST_CHANNELS = 2**10
LARGEST_CLASS_COUNT = 10**7
LARGEST_JSON = 2**26  # characters; ten million class names fit
_LARGEST_NUMBER, _SMALLEST_STD = 1e9, 1e-9  # of mean and std; beyond them, normalised pixels are no float32
_DEEPEST = 16  # levels of lists and mappings; a quantization spec has five


@dataclass(frozen=True)
class InputSpec:
    """The images that a model takes, and their preparation at evaluation.

    Attributes:
        image_size: height and width of the centre crop, in pixels.
        resize_size: length of an image's shorter side after scaling and before the crop, in pixels.
        interpolation: "bilinear" or "bicubic".
        mean, std: one number per channel, for pixel values in 0 … 1.

    Raises:
        UserError: an invalid value.
    """

    image_size: int
    resize_size: int
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name, largest in (("image_size", LARGEST_IMAGE), ("resize_size", 2 * LARGEST_IMAGE)):
            size = getattr(self, name)
            if not _is_integer(size) or not 1 <= size <= largest:
                raise UserError(f"{name} must be between 1 and {largest} pixels, not {_shown(size)}.")
        if self.interpolation not in INTERPOLATIONS:
            choices = " or ".join(INTERPOLATIONS)
            raise UserError(f"interpolation must be {choices}, not {_shown(self.interpolation)}.")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if not isinstance(numbers, (list, tuple)) or not 1 <= len(numbers) <= MOST_CHANNELS:
                raise UserError(f"{name} must be 1 to {MOST_CHANNELS} numbers, one per channel, not {_shown(numbers)}.")
            if not all(map(_is_finite, numbers)):
                raise UserError(f"{name} must be one finite number per channel, not {_shown(numbers)}.")
            object.__setattr__(self, name, tuple(numbers))
        if len(self.mean) != len(self.std) or min(self.std) < _SMALLEST_STD:
            raise UserError(f"mean and std must have one number per channel each, and std at least {_SMALLEST_STD:g}.")

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return len(self.mean)

    def resized(self, image_size: int) -> InputSpec:
        """A copy for another image size, with the same margin around the crop."""
        return replace(self, image_size=image_size, resize_size=image_size + self.resize_size - self.image_size)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {
            "image_size": self.image_size,
            "resize_size": self.resize_size,
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @staticmethod
    def from_json(values: Any) -> InputSpec:
        """The inverse of ``to_json``.

        Raises:
            UserError: an entry is missing, unknown or of a wrong type.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"preprocessing must be a mapping, not {_shown(values)}.")
        names = {"image_size", "resize_size", "interpolation", "mean", "std"}
        if different := names ^ set(map(str, values)):
            raise UserError(
                f"preprocessing must have the entries {', '.join(sorted(names))}; check {_shown(min(different))}."
            )
        return InputSpec(**values)


@dataclass(frozen=True)
class ModelCard:
    """The description of a model in a file. None means unknown, unless an attribute says otherwise.

    Attributes:
        arch: name of the model in the registry.
        task: name of the model's task in effnet_quant.tasks.
        num_classes: number of classes.
        classes: names of the classes, in the order of the outputs.
        input: the images that the model takes.
        activation: "hard_swish" if hard-swish replaces SiLU.
        quant_spec: the quantization spec, as plain values of ``QuantSpec.to_json``; None for a float model.
        target: the runtime that a quantized model simulates, or that a file was exported for.
        tuned_precision: the precision that ``--tune`` chose for the file's float operations.
        float_operations: operations that the target computes with integers but this file keeps in float.
        output_scale: the real number that one unit of an integer file's outputs stands for.

    Raises:
        UserError: a value of a wrong type, or an invalid one.
    """

    arch: str | None = None
    task: str = CLASSIFICATION
    num_classes: int | None = None
    classes: tuple[str, ...] | None = None
    input: InputSpec | None = None
    activation: str | None = None
    quant_spec: Mapping[str, Any] | None = None
    target: str | None = None
    tuned_precision: str | None = None
    float_operations: tuple[str, ...] = field(default=())
    output_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("arch", "activation", "target", "tuned_precision"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise UserError(f"{name} must be a name, not {_shown(getattr(self, name))}.")
        if not isinstance(self.task, str):
            raise UserError(f"task must be a name, not {_shown(self.task)}.")
        if self.activation not in (None, HARD_SWISH):
            raise UserError(f"activation must be {HARD_SWISH} or left out, not {_shown(self.activation)}.")
        count = self.num_classes
        if count is not None and (not _is_integer(count) or not 1 <= count <= LARGEST_CLASS_COUNT):
            raise UserError(f"num_classes must be between 1 and {LARGEST_CLASS_COUNT}, not {_shown(count)}.")
        for name in ("classes", "float_operations"):
            names = getattr(self, name)
            if names is not None and not _are_names(names):
                raise UserError(f"{name} must be a list of names, not {_shown(names)}.")
            object.__setattr__(self, name, None if names is None else tuple(names))
        if self.classes is not None and count is not None and len(self.classes) != count:
            raise UserError(f"there are {len(self.classes)} names of classes, but num_classes is {count}.")
        if not isinstance(self.input, (InputSpec, type(None))):
            raise UserError(f"input must be an InputSpec, not {_shown(self.input)}.")
        if not isinstance(self.quant_spec, (Mapping, type(None))):
            raise UserError(f"quant_spec must be a mapping, not {_shown(self.quant_spec)}.")
        scale = self.output_scale
        if scale is not None and not (_is_finite(scale) and scale > 0):
            raise UserError(f"output_scale must be a positive number, not {_shown(scale)}.")

    @property
    def quantized(self) -> bool:
        """Whether quantizers are placed in the model."""
        return self.quant_spec is not None

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file; unknown values are left out."""
        values: dict[str, Any] = {
            "version": VERSION,
            "arch": self.arch,
            "task": None if self.task == CLASSIFICATION else self.task,
            "num_classes": self.num_classes,
            "classes": None if self.classes is None else list(self.classes),
            "preprocessing": None if self.input is None else self.input.to_json(),
            "activation": self.activation,
            "quant_spec": None if self.quant_spec is None else dict(self.quant_spec),
            "target": self.target,
            "tuned_precision": self.tuned_precision,
            "float_operations": list(self.float_operations) or None,
            "output_scale": self.output_scale,
        }
        return {name: value for name, value in values.items() if value is not None}

    @staticmethod
    def from_json(values: Any, source: str = "the file") -> ModelCard:
        """The card of plain values, as ``to_json`` writes them. Values from files older than cards are read too.

        Args:
            values: a mapping; empty for a file without a card.
            source: names the file in messages.

        Raises:
            UserError: a wrong type, an unknown version or entry, or values nested too deep.
        """
        try:
            return _card(values)
        except UserError as error:
            raise UserError(f"{source} describes its model in a way that can't be used: {error}") from error

    @staticmethod
    def from_text(text: str, source: str = "the file") -> ModelCard:
        """The card of a JSON text.

        Raises:
            UserError: the text is no JSON, or ``from_json`` refuses it.
        """
        return ModelCard.from_json(parse_json(text, source), source)


def parse_json(text: str, source: str) -> Any:
    """The values of a JSON text from a file of unknown origin.

    Raises:
        UserError: the text is too long, nested too deep or no JSON.
    """
    try:
        if len(text) > LARGEST_JSON:
            raise ValueError("too long")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} describes its model in a way that can't be used: it is not valid JSON.") from error


def _card(values: Any) -> ModelCard:
    if not isinstance(values, Mapping):
        raise UserError(f"expected a mapping, not {_shown(values)}.")
    _check_depth(values)
    if "version" not in values:
        return _card_of_before(values)
    if values["version"] != VERSION or not _is_integer(values["version"]):
        version = _shown(values["version"])
        raise UserError(f"its version is {version}, but this program reads version {VERSION}; update effnet-quant.")
    rest = {name: value for name, value in values.items() if name != "version"}
    if "preprocessing" in rest:
        rest["input"] = InputSpec.from_json(rest.pop("preprocessing"))
    known = set(ModelCard.__dataclass_fields__)
    if unknown := [str(name) for name in rest if name not in known]:
        raise UserError(f"the entry {_shown(unknown[0])} is unknown; a card may have {', '.join(sorted(known))}.")
    return ModelCard(**rest)


def _card_of_before(values: Mapping[str, Any]) -> ModelCard:
    """The card of a file from before cards had a version. Its other entries are the user's own and are ignored."""
    names = ("arch", "num_classes", "classes", "quant_spec", "tuned_precision", "float_operations")
    known = {name: values[name] for name in names if values.get(name) is not None}
    if values.get("preprocessing") is not None:
        known["input"] = InputSpec.from_json(values["preprocessing"])
    if values.get("hard_swish"):
        known["activation"] = HARD_SWISH
    target = values.get("target", values.get("quant_target"))
    return ModelCard(**known, target=target)


def _check_depth(values: Any) -> None:
    level: list[Any] = [values]
    for _ in range(_DEEPEST):
        level = [
            inner
            for value in level
            if isinstance(value, (Mapping, list, tuple))
            for inner in (value.values() if isinstance(value, Mapping) else value)
            if isinstance(inner, (Mapping, list, tuple))
        ]
        if not level:
            return
    raise UserError(f"its values are nested more than {_DEEPEST} deep.")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER


def _are_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(name, str) for name in value)


def _shown(value: Any) -> str:
    """A value for a message, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
