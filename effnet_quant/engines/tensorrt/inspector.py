"""Reads the precision of each layer of a plan from TensorRT's engine inspector."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from effnet_quant.terminal import printable

UNKNOWN = "?"
# TensorRT 11 has "DataType": "Half"; TensorRT 10 has "Format/Datatype": "Channel major FP16 format where channel % 8 == 0".
_TYPES = (
    ("int8", r"\bu?int8\b"),
    ("int4", r"\bint4\b"),
    ("fp8", r"\bfp8\b"),
    ("bf16", r"\b(bf16|bfloat16)\b"),
    ("fp16", r"\b(fp16|half)\b"),
    ("fp32", r"\b(fp32|float)\b"),
    ("int32", r"\bint32\b"),
    ("int64", r"\bint64\b"),
    ("bool", r"\bbool\b"),
)


@dataclass(frozen=True)
class LayerPrecision:
    """One fused layer of a plan. Types are "int8", "fp16", "fp32" …, or "?" if unknown.

    Attributes:
        name: the joined names of the ONNX nodes in it.
        kind: TensorRT's type of layer, e.g. "CaskConvolution", "Reformat".
        inputs, outputs: types of its tensors.
        weights: type of its weights, None without any.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: str | None

    @property
    def computes_in(self) -> str:
        """The type of the weights, else of the first input."""
        return self.weights or next(iter(self.inputs), UNKNOWN)


def read_layers(information: str) -> list[LayerPrecision]:
    """The layers in the JSON text of ``EngineInspector.get_engine_information``, of TensorRT 10 or 11."""
    return [_layer(entry) for entry in json.loads(information).get("Layers", [])]


def summarize(layers: list[LayerPrecision]) -> str:
    """Count the layers of each kind by type: one line per kind, the most frequent first."""
    kinds = Counter(layer.kind for layer in layers)
    lines = []
    for kind, _ in sorted(kinds.items(), key=lambda item: (-item[1], item[0])):
        types = Counter(layer.computes_in for layer in layers if layer.kind == kind)
        lines.append(f"{kind:<24} " + ", ".join(f"{count} {name}" for name, count in types.most_common()))
    return "\n".join(lines)


def format_layers(layers: list[LayerPrecision]) -> str:
    """The table of all layers as text."""
    lines = [f"{'in':<12} {'weights':<8} {'out':<12} {'kind':<24} layer"]
    for layer in layers:
        inputs, outputs = (", ".join(types) for types in (layer.inputs, layer.outputs))
        lines.append(f"{inputs:<12} {layer.weights or '':<8} {outputs:<12} {layer.kind:<24} {printable(layer.name)}")
    return "\n".join(lines)


def _layer(entry: Any) -> LayerPrecision:
    if isinstance(entry, str):  # a plan that was built without detailed profiling verbosity
        return LayerPrecision(entry, UNKNOWN, (), (), None)
    weights = entry.get("Weights")
    has_weights = isinstance(weights, dict) and weights.get("Count", 1)
    return LayerPrecision(
        name=entry.get("Name", UNKNOWN),
        kind=entry.get("LayerType", UNKNOWN),
        inputs=tuple(_type_of(tensor) for tensor in entry.get("Inputs", [])),
        outputs=tuple(_type_of(tensor) for tensor in entry.get("Outputs", [])),
        weights=_type_in(str(weights.get("Type", ""))) if has_weights else None,
    )


def _type_of(tensor: dict[str, Any]) -> str:
    return _type_in(str(tensor.get("DataType") or tensor.get("Format/Datatype") or tensor.get("Format") or ""))


def _type_in(text: str) -> str:
    return next((name for name, pattern in _TYPES if re.search(pattern, text, re.IGNORECASE)), UNKNOWN)
