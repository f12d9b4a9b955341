"""What a quantized number looks like: bits, granularity, symmetry, and where which choice holds."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from effnet_quant.errors import UserError

FLOAT = "float"  # an override that leaves a place unquantized
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


@dataclass(frozen=True)
class TensorSpec:
    """An integer grid, and how many ranges a tensor has on it.

    With ``symmetric``, scale = amax / largest integer and the zero point is 0. Otherwise (affine) the range [amin, amax],
    widened to hold zero, is spread over the whole grid, and the zero point is the integer that stands for 0.0.

    Attributes:
        bits: width of the integer, 2 to 8 or 16; 8 gives the grid -128 … 127.
        per_channel: one range per output channel of weights, which is their dimension 0, or one per tensor.
        symmetric: zero point 0, or affine.
        signed: -2**(bits - 1) … 2**(bits - 1) - 1, or 0 … 2**bits - 1. A symmetric unsigned grid has no negative values.
        narrow: leave out the smallest integer of a signed grid: -127 … 127.
        learned: the range is a parameter that training moves (LSQ), or stays what calibration made it.

    Raises:
        UserError: another width, or a narrow unsigned grid.
    """

    bits: int = 8
    per_channel: bool = False
    symmetric: bool = True
    signed: bool = True
    narrow: bool = False
    learned: bool = False

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise UserError(
                f"a grid of {self.bits} bits is not supported; choose one of {', '.join(map(str, WIDTHS))}."
            )
        if self.narrow and not self.signed:
            raise UserError("a narrow grid leaves out the smallest negative integer, so it must be signed.")

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest integer of the grid."""
        if not self.signed:
            return 0, 2**self.bits - 1
        return -(2 ** (self.bits - 1)) + self.narrow, 2 ** (self.bits - 1) - 1

    def amax_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the range of weights of this shape: (C, 1, 1, 1) for a convolution's with ``per_channel``, else ()."""
        return (shape[0], *(1 for _ in shape[1:])) if self.per_channel else ()

    def __str__(self) -> str:
        words = [f"{'int' if self.signed else 'uint'}{self.bits}"]
        words += [word for word, given in (("narrow", self.narrow), ("affine", not self.symmetric)) if given]
        words.append("per output channel" if self.per_channel else "per tensor")
        return ", ".join([*words, "learned"] if self.learned else words)


@dataclass(frozen=True)
class QuantSpec:
    """How a network is quantized.

    Attributes:
        weight: the grid of weights; by default per output channel.
        activation: the grid of activations; always one range per tensor.
        overrides: (pattern, QuantSpec, or None for float), in order; the last pattern that matches a place wins. A pattern
            matches a module by its name, with wildcards, and then everything inside it: "stem", "layers.0.*",
            "*._weight_quantizer". ``with_overrides`` takes them as a mapping.

    Raises:
        UserError: activations with a range per channel.
    """

    weight: TensorSpec = TensorSpec(bits=8, per_channel=True)
    activation: TensorSpec = TensorSpec(bits=8)
    overrides: tuple[tuple[str, QuantSpec | None], ...] = ()

    def __post_init__(self) -> None:
        if self.activation.per_channel:
            raise UserError("activations have one range per tensor; only weights can have one per channel.")

    def with_overrides(self, overrides: Mapping[str, Override] | Iterable[tuple[str, Override]]) -> QuantSpec:
        """The same spec with more overrides, e.g. ``{"stem.*": "w8a16", "classifier": None}``; "float" is the same as None.

        Raises:
            UserError: a pattern is no text, or its spec means nothing or has overrides of its own.
        """
        pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
        return replace(self, overrides=(*self.overrides, *(_override(pattern, spec) for pattern, spec in pairs)))

    def override(self, name: str) -> QuantSpec | Literal["base"] | None:
        """What the overrides say of the module or quantizer ``name``: a spec, None for float, "base" for nothing."""
        for pattern, spec in reversed(self.overrides):
            if _matches(name, pattern):
                return spec
        return "base"

    def at(self, name: str) -> QuantSpec | None:
        """The spec of the module or quantizer ``name``, overrides included; None for float."""
        override = self.override(name)
        return self if override == "base" else override

    def unmatched(self, names: list[str]) -> list[str]:
        """The patterns that match none of ``names``."""
        return [pattern for pattern, _ in self.overrides if not any(_matches(name, pattern) for name in names)]

    def learned(self) -> QuantSpec:
        """The same grids with ranges that training moves (LSQ)."""
        return replace(
            self, weight=replace(self.weight, learned=True), activation=replace(self.activation, learned=True)
        )

    def to_json(self) -> dict[str, Any]:
        """The spec as plain values, which ``resolve_spec`` reads back."""
        return {
            "weight": asdict(self.weight),
            "activation": asdict(self.activation),
            # pairs, because their order counts, which writers of JSON may change in a mapping
            "overrides": [[name, None if spec is None else spec.to_json()] for name, spec in self.overrides],
        }


class SpecLookup:
    """What a spec says of each quantizer, asked by the quantizer's name when it is placed.

    Attributes:
        names: those that were asked for.
    """

    def __init__(self, spec: QuantSpec) -> None:
        self._spec = spec
        self.names: list[str] = []

    def at(self, name: str) -> QuantSpec | None:
        """The spec of the quantizer ``name``; None for float."""
        self.names.append(name)
        return self._spec.at(name)

    def check_overrides(self) -> None:
        """Raises UserError where an override matches none of the names that were asked for."""
        if unmatched := self._spec.unmatched(self.names):
            raise UserError(f"the override '{unmatched[0]}' matches no quantizer of the model; check the name.")


Override = str | QuantSpec | Mapping[str, Any] | None


def _override(pattern: Any, spec: Override) -> tuple[str, QuantSpec | None]:
    if not isinstance(pattern, str):
        raise UserError(f"an override's pattern is a module's name, not {pattern!r}; put it in quotes.")
    resolved = None if spec in (None, FLOAT) else resolve_spec(spec)
    if resolved is not None and resolved.overrides:
        raise UserError(f"the override '{pattern}' has overrides of its own; list them beside it.")
    return pattern, resolved


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))


_INT4_WEIGHT = TensorSpec(bits=4, per_channel=True)
_FIXED = {
    "w8a8": QuantSpec(),
    "w8a8-affine": QuantSpec(activation=TensorSpec(bits=8, symmetric=False, signed=False)),
    # two products of uint8 and 7 bits fit into 16: what fast kernels of CPUs without VNNI add
    "w7a8": QuantSpec(weight=TensorSpec(bits=7, per_channel=True)),
    "w8a16": QuantSpec(activation=TensorSpec(bits=16)),
    "w4a8": QuantSpec(weight=_INT4_WEIGHT),
    # 16 values are too few to leave half of them unused behind a ReLU: affine
    "w4a4": QuantSpec(weight=_INT4_WEIGHT, activation=TensorSpec(bits=4, symmetric=False, signed=False)),
}
PRESETS = _FIXED | {f"{name}-lsq": spec.learned() for name, spec in _FIXED.items()}


def resolve_spec(spec: str | QuantSpec | Mapping[str, Any]) -> QuantSpec:
    """The QuantSpec of a preset's name, of a mapping (as in YAML), or the given one.

    A mapping starts from ``preset`` (default w8a8) and changes it: ``weight`` and ``activation`` hold the fields of
    TensorSpec that differ, ``overrides`` maps patterns to specs of any of these forms or to "float" (or null); it may be a
    list of pairs, as ``to_json`` writes it.

    Raises:
        UserError: there is no preset of that name, or an entry of the mapping means nothing.
    """
    if isinstance(spec, QuantSpec):
        return spec
    if isinstance(spec, str):
        if spec not in PRESETS:
            raise UserError(f"there is no quantization preset '{spec}'; choose one of: {', '.join(PRESETS)}.")
        return PRESETS[spec]
    if not isinstance(spec, Mapping):
        raise UserError(f"a quantization spec is a preset's name or a mapping, not {spec!r}.")
    _check_keys(spec, {"preset", "weight", "activation", "overrides"}, "a quantization spec")
    base = resolve_spec(spec.get("preset", "w8a8"))
    resolved = replace(
        base,
        weight=_changed(base.weight, spec.get("weight", {}), "weight"),
        activation=_changed(base.activation, spec.get("activation", {}), "activation"),
    )
    overrides = spec.get("overrides") or {}
    pairs = isinstance(overrides, list) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in overrides
    )
    if not isinstance(overrides, Mapping) and not pairs:
        raise UserError(f"overrides map patterns to specs; {overrides!r} does not.")
    return resolved.with_overrides(overrides)


def _changed(tensor: TensorSpec, changes: Any, role: str) -> TensorSpec:
    if not isinstance(changes, Mapping):
        raise UserError(f"{role}: expected entries such as 'bits: 4', not {changes!r}.")
    changes = _without_axis(changes, role)
    kinds = {field.name: type(field.default) for field in fields(TensorSpec)}
    _check_keys(changes, set(kinds), role)
    for name, value in changes.items():
        if type(value) is not kinds[name]:
            raise UserError(f"{role}: {name}: {value!r} is not {kinds[name].__name__}.")
    return replace(tensor, **changes)


def _without_axis(changes: Mapping[str, Any], role: str) -> Mapping[str, Any]:
    """The same with ``per_channel`` in the place of ``axis``, as specs of earlier versions have it: 0 or null."""
    if "axis" not in changes:
        return changes
    axis = changes["axis"]
    if "per_channel" in changes or type(axis) not in (int, type(None)) or axis not in (0, None):
        raise UserError(
            f"{role}: axis: {axis!r} means nothing; write per_channel: true for a range per output channel, or "
            "per_channel: false for one per tensor."
        )
    others = {name: value for name, value in changes.items() if name != "axis"}
    return {**others, "per_channel": axis is not None}


def _check_keys(given: Mapping[str, Any], known: set[str], what: str) -> None:
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        raise UserError(f"{what} has no entry '{unknown[0]}'; it takes: {', '.join(sorted(known))}.")


def same_grids(one: QuantSpec, other: QuantSpec) -> bool:
    """Whether ranges of one spec mean the same on the other. Fixed ranges may become learned ones."""
    return _all_learned(one) == _all_learned(other)


def _all_learned(spec: QuantSpec) -> QuantSpec:
    overrides = tuple((name, None if other is None else other.learned()) for name, other in spec.overrides)
    return replace(spec.learned(), overrides=overrides)
