"""TensorSpec and QuantSpec: bits, granularity and symmetry of each quantizer; the presets."""

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
    """The integer grid of a tensor, and whether the tensor has one range or one per channel.

    A symmetric grid has scale = amax / largest integer and zero point 0. An affine grid spreads the range [amin, amax],
    widened to hold zero, over all its integers; the zero point is the integer that stands for 0.0.

    Attributes:
        bits: width of the integer, 2 to 8 or 16; 8 gives the grid -128 … 127.
        per_channel: one range per output channel (dimension 0 of weights); else one per tensor.
        symmetric: a symmetric grid; else an affine one.
        signed: the integers -2**(bits - 1) … 2**(bits - 1) - 1; else 0 … 2**bits - 1. A symmetric unsigned grid has no
            negative values.
        narrow: leave out the smallest integer of a signed grid: -127 … 127.
        learned: training moves the range (LSQ); else the range stays as calibrated.

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
        """Shape of amax for weights of this shape: with ``per_channel`` e.g. (C, 1, 1, 1) for a convolution, else ()."""
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
        overrides: pairs of a pattern and a QuantSpec, or None for float. The last pattern that matches wins. A pattern is
            the name of a module or quantizer and may have wildcards: "stem", "layers.0.*", "*._weight_quantizer". It also
            matches everything inside the module. ``with_overrides`` takes a mapping too.

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
            UserError: a pattern is no text, or its spec is invalid or has overrides of its own.
        """
        pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
        return replace(self, overrides=(*self.overrides, *(_override(pattern, spec) for pattern, spec in pairs)))

    def override(self, name: str) -> QuantSpec | Literal["base"] | None:
        """The override of the module or quantizer ``name``: a spec, None for float, or "base" if no pattern matches."""
        for pattern, spec in reversed(self.overrides):
            if matches(name, pattern):
                return spec
        return "base"

    def at(self, name: str) -> QuantSpec | None:
        """The spec of the module or quantizer ``name``, overrides included; None for float."""
        override = self.override(name)
        return self if override == "base" else override

    def unmatched(self, names: list[str]) -> list[str]:
        """The patterns that match none of ``names``."""
        return [pattern for pattern, _ in self.overrides if not any(matches(name, pattern) for name in names)]

    def learned(self) -> QuantSpec:
        """The same spec with learned ranges (LSQ)."""
        return replace(
            self, weight=replace(self.weight, learned=True), activation=replace(self.activation, learned=True)
        )

    def to_json(self) -> dict[str, Any]:
        """The spec as plain values; ``resolve_spec`` reads them."""
        return {
            "weight": asdict(self.weight),
            "activation": asdict(self.activation),
            # pairs, because the order matters and JSON writers may change that of a mapping
            "overrides": [[name, None if spec is None else spec.to_json()] for name, spec in self.overrides],
        }


class SpecLookup:
    """Looks up the spec of each quantizer by its name while quantizers are placed.

    Attributes:
        names: all names looked up so far.
    """

    def __init__(self, spec: QuantSpec) -> None:
        self._spec = spec
        self.names: list[str] = []

    def at(self, name: str) -> QuantSpec | None:
        """The spec of the quantizer ``name``; None for float."""
        self.names.append(name)
        return self._spec.at(name)

    def check_overrides(self) -> None:
        """Raise a UserError if an override matches none of the names looked up."""
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


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern, as in ``QuantSpec.overrides``, matches a name or the name of a module around it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))


_INT4_WEIGHT = TensorSpec(bits=4, per_channel=True)
_FIXED = {
    "w8a8": QuantSpec(),
    "w8a8-affine": QuantSpec(activation=TensorSpec(bits=8, symmetric=False, signed=False)),
    # Fast kernels of CPUs without VNNI add two products in 16 bits. Products of uint8 and 7 bits fit.
    "w7a8": QuantSpec(weight=TensorSpec(bits=7, per_channel=True)),
    "w8a16": QuantSpec(activation=TensorSpec(bits=16)),
    "w4a8": QuantSpec(weight=_INT4_WEIGHT),
    # Affine, because a symmetric grid would leave half of its 16 values unused behind a ReLU.
    "w4a4": QuantSpec(weight=_INT4_WEIGHT, activation=TensorSpec(bits=4, symmetric=False, signed=False)),
}
PRESETS = _FIXED | {f"{name}-lsq": spec.learned() for name, spec in _FIXED.items()}


def resolve_spec(spec: str | QuantSpec | Mapping[str, Any]) -> QuantSpec:
    """The QuantSpec of a preset's name or of a mapping (as in YAML). A QuantSpec is returned as it is.

    A mapping changes the preset named by ``preset`` (default w8a8). ``weight`` and ``activation`` hold the fields of
    TensorSpec that differ. ``overrides`` maps patterns to specs of any of these forms, to "float" or to null. It may be a
    list of pairs, as ``to_json`` writes it.

    Raises:
        UserError: there is no preset of that name, or an entry of the mapping is invalid.
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
    """The same changes with ``per_channel`` instead of ``axis``, which specs of earlier versions have (0 or null)."""
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
    """Whether ranges calibrated for one spec are valid for the other. Fixed ranges are valid as learned ones, and back."""
    return _all_learned(one) == _all_learned(other)


def _all_learned(spec: QuantSpec) -> QuantSpec:
    overrides = tuple((name, None if other is None else other.learned()) for name, other in spec.overrides)
    return replace(spec.learned(), overrides=overrides)
