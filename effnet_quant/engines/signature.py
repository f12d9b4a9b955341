"""Signature: the inputs and outputs of a model as arrays, and the structure of its return value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The model's return value with an output's position at each leaf: an int, or one of the keys "tuple", "list" and "dict".
Structure = int | dict[str, Any]
INPUT_TYPES = ("float32", "float16", "uint8", "int32", "int64", "bool")
# of one input in one run, 4 GiB in float32; a file with larger fixed sizes is damaged
MOST_NUMBERS = 1 << 30


@dataclass(frozen=True)
class ArrayInput:
    """An array that a model takes; the batch is its first dimension.

    Attributes:
        name: of the input.
        dtype: NumPy's name of the type, one of INPUT_TYPES.
        shape: without the batch, (C, H, W) for images; None is an open size.
        smallest_batch, largest_batch: limits of the batch in one run; largest None is no limit.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    smallest_batch: int = 1
    largest_batch: int | None = None

    @property
    def is_image(self) -> bool:
        """Whether it has the three dimensions of an image."""
        return len(self.shape) == 3


@dataclass(frozen=True)
class ArrayOutput:
    """An array that a model gives; the batch is its first dimension.

    Attributes:
        name: of the output.
        dtype: NumPy's name of the type in the file.
        shape: without the batch; None is an open or unknown size. None for the whole shape if nothing is known.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None = None


@dataclass(frozen=True)
class Signature:
    """Inputs, outputs and return value of a file.

    Attributes:
        inputs: in the order of the model's arguments.
        outputs: in the order of the positions in ``structure``.
        structure: of the model's return value.

    Raises:
        ValueError: the parts contradict each other.
    """

    inputs: tuple[ArrayInput, ...]
    outputs: tuple[ArrayOutput, ...]
    structure: Structure = 0

    def __post_init__(self) -> None:
        if not self.inputs or not self.outputs:
            raise ValueError("a model has inputs and outputs")
        if any(not 0 <= leaf < len(self.outputs) for leaf in _leaves(self.structure)):
            raise ValueError("the structure counts other outputs")
        for value in self.inputs:
            sizes = [size for size in (value.largest_batch, *value.shape) if size is not None]
            if value.dtype not in INPUT_TYPES or value.smallest_batch < 1 or min(sizes, default=1) < 1:
                raise ValueError(f"{value.name} is no array that a model takes")
            if math.prod([value.smallest_batch, *(size for size in value.shape if size is not None)]) > MOST_NUMBERS:
                raise ValueError(f"{value.name} is larger than any machine's")
        if self.largest_batch is not None and self.largest_batch < self.smallest_batch:
            raise ValueError("the inputs take no common batch")

    @property
    def smallest_batch(self) -> int:
        """The smallest batch that all inputs accept in one run."""
        return max(value.smallest_batch for value in self.inputs)

    @property
    def largest_batch(self) -> int | None:
        """The largest batch that all inputs accept in one run; None is no limit."""
        return min((value.largest_batch for value in self.inputs if value.largest_batch is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``from_json``."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Signature:
        """The inverse of ``to_json``.

        Raises:
            ValueError, KeyError, TypeError: the values are no signature.
        """
        return Signature(
            tuple(ArrayInput(**{**value, "shape": tuple(value["shape"])}) for value in values["inputs"]),
            tuple(
                ArrayOutput(**{**value, "shape": None if value["shape"] is None else tuple(value["shape"])})
                for value in values["outputs"]
            ),
            values["structure"],
        )


def has_nan(array: NDArray[Any]) -> bool:
    """Whether a number is NaN. Costs one pass over the array."""
    if array.dtype == np.float16:  # whose minimum is slow; above infinity's bits lie those of NaN
        bits = np.ascontiguousarray(array).view(np.uint16) & 0x7FFF
        return bool(bits.max() > 0x7C00)
    return np.issubdtype(array.dtype, np.floating) and bool(np.isnan(array.min()))


def arrange(outputs: Sequence[NDArray[Any]], structure: Structure) -> Any:
    """The model's return value: one array, or tuples, lists and dicts of arrays."""
    if isinstance(structure, int):
        return outputs[structure]
    ((kind, parts),) = structure.items()
    if kind == "dict":
        return {name: arrange(outputs, part) for name, part in parts.items()}
    values = [arrange(outputs, part) for part in parts]
    return tuple(values) if kind == "tuple" else values


def _leaves(structure: Any) -> Iterator[int]:
    if isinstance(structure, int) and not isinstance(structure, bool):
        yield structure
        return
    if not isinstance(structure, dict):
        raise ValueError(f"{structure!r:.40} is no structure")
    ((kind, parts),) = structure.items()
    if not isinstance(parts, {"tuple": list, "list": list, "dict": dict}[kind]):
        raise ValueError(f"a {kind} of something else")
    for part in parts.values() if kind == "dict" else parts:
        yield from _leaves(part)
