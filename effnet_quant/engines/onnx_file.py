"""Reads ONNX files: signature, card, metadata, and facts about the graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from effnet_quant.card import CARD_KEY, EXTRA_KEY, SIGNATURE_KEY, ModelCard, parse_json
from effnet_quant.engines.signature import ArrayInput, ArrayOutput, Signature
from effnet_quant.errors import UserError

_IMAGE_TYPES = ("float32", "float16", "uint8")
# the operators of a residual network of convolutions, ReLUs and additions; below, those that normalise its images
_PLAIN_OPERATORS = frozenset(
    {"Conv", "Gemm", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Flatten", "Reshape"}
    | {"QuantizeLinear", "DequantizeLinear"}
)
_SCALING_OPERATORS = frozenset({"Add", "Mul", "Cast"})


@dataclass(frozen=True)
class OnnxFile:
    """What is known of an ONNX file.

    Attributes:
        signature: what it takes and gives.
        card: describes the model; empty for files of other tools.
        metadata: the card as plain values, and further values that ``export_onnx`` stored.
        quantized: whether it has QuantizeLinear and DequantizeLinear nodes.
        half: whether it has constants in float16.
        packed: whether it has constants in INT4.
        fits_16_bits: whether all weights are integers of 7 bits or fewer. The sum of two products with 8-bit activations
            then fits 16 bits.
        adds_integers: whether it is a quantized ResNet: its only elementwise operations are ReLUs and additions of quantized
            shortcuts to convolutions.
    """

    signature: Signature
    card: ModelCard
    metadata: dict[str, Any]
    quantized: bool
    half: bool
    packed: bool
    fits_16_bits: bool
    adds_integers: bool

    def precision(self, floats: str) -> str:
        """The engine's precision, if its runtime computes float32 operations in ``floats``."""
        floats = "fp16" if self.half else floats
        return f"int8 + {floats}" if self.quantized else floats


def read_onnx(path: str | Path) -> OnnxFile:
    """Read an ONNX file of ``export_onnx``, or of another tool if it has one input of images and one output.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    model = _load(path)
    card = read_card(model, str(path))  # its refusal says more than that the file is damaged
    try:
        return OnnxFile(
            _signature(model),
            card,
            read_metadata(model),
            quantized=any(node.op_type == "DequantizeLinear" for node in model.graph.node),
            half=any(entry.data_type == onnx.TensorProto.FLOAT16 for entry in model.graph.initializer),
            packed=any(entry.data_type == onnx.TensorProto.INT4 for entry in model.graph.initializer),
            fits_16_bits=_fits_16_bits(model),
            adds_integers=_adds_integers(model),
        )
    except Exception as error:  # nonsense fails in as many ways as there are fields
        raise _damaged(path) from error


def read_onnx_card(path: Path) -> ModelCard:
    """The card of an ONNX file; empty for files of other tools.

    Raises:
        UserError: the file is missing or damaged, or its card can't be used.
    """
    return read_card(_load(path), str(path))


def _load(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise UserError(f"there is no file {path}; check the path.")
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's DecodeError, whose module depends on its version, and onnx's own
        raise _damaged(path) from error


def read_card(model: onnx.ModelProto, source: str = "the file") -> ModelCard:
    """The card in a model's metadata; empty for models of other tools.

    Raises:
        UserError: the card can't be used.
    """
    return ModelCard.from_text(_properties(model).get(CARD_KEY, "{}"), source)


def read_metadata(model: onnx.ModelProto) -> dict[str, Any]:
    """The metadata that ``export_onnx`` stored, card included, as plain values; empty for models of other tools."""
    properties = _properties(model)
    values: dict[str, Any] = {}
    for key in (EXTRA_KEY, CARD_KEY):
        entry = parse_json(properties.get(key, "{}"), "the file")
        values |= entry if isinstance(entry, dict) else {}
    values.pop("version", None)  # of the card's format
    return values


def _properties(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _fits_16_bits(model: onnx.ModelProto) -> bool:
    weights = [entry for entry in model.graph.initializer if len(entry.dims) > 1]
    bytes_each = [onnx.numpy_helper.to_array(entry) for entry in weights if entry.data_type == onnx.TensorProto.INT8]
    packed = any(entry.data_type == onnx.TensorProto.INT4 for entry in weights)
    # 2 * 255 * 64 = 32,640
    return (packed or bool(bytes_each)) and all(values.min() >= -64 and values.max() <= 64 for values in bytes_each)


def _adds_integers(model: onnx.ModelProto) -> bool:
    nodes = model.graph.node
    zero_points = {entry.name for entry in model.graph.initializer if _is_unsigned_zero(entry)}
    never_negative = {
        node.output[0] for node in nodes if node.op_type == "DequantizeLinear" and zero_points & set(node.input[2:])
    }
    computed = {value.name for value in model.graph.input}
    adds = False
    for node in nodes:  # in the order in which they run
        operands = computed & set(node.input)
        computed |= set(node.output) if operands else set()
        if node.op_type == "Add" and len(operands) == 2:
            adds |= bool(operands & never_negative)
        elif not (node.op_type in _PLAIN_OPERATORS or (node.op_type in _SCALING_OPERATORS and len(operands) < 2)):
            return False
    return adds


def _is_unsigned_zero(entry: onnx.TensorProto) -> bool:
    return entry.data_type == onnx.TensorProto.UINT8 and not onnx.numpy_helper.to_array(entry).any()


def _signature(model: onnx.ModelProto) -> Signature:
    constants = {entry.name for entry in model.graph.initializer}
    inputs = {value.name: _input(value) for value in model.graph.input if value.name not in constants}
    outputs = {value.name: _output(value) for value in model.graph.output}
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if SIGNATURE_KEY not in properties:
        (image,) = inputs.values()
        if not image.is_image or image.dtype not in _IMAGE_TYPES:
            raise ValueError("the input is no image")
        return Signature((image,), tuple(outputs.values())[:1])
    said = parse_json(properties[SIGNATURE_KEY], "the file")
    taken, given = ([entry["name"] for entry in said[kind]] for kind in ("inputs", "outputs"))
    if sorted(taken) != sorted(inputs) or sorted(given) != sorted(outputs):
        raise ValueError("the graph has other inputs or outputs")
    for entry in said["inputs"]:
        batch, *shape = entry["shape"]
        own = inputs[entry["name"]]
        if (entry["dtype"], batch, tuple(shape)) != (own.dtype, own.largest_batch, own.shape):
            raise ValueError(f"the graph has another input {entry['name']}")
    for entry in said["outputs"]:
        if entry["dtype"] != outputs[entry["name"]].dtype:
            raise ValueError(f"the graph has another output {entry['name']}")
    ordered = tuple(inputs[name] for name in taken), tuple(outputs[name] for name in given)
    return Signature(*ordered, said["structure"])


def _input(value: onnx.ValueInfoProto) -> ArrayInput:
    batch, *shape = _sizes(value)
    return ArrayInput(value.name, _dtype(value), tuple(shape), batch or 1, batch)


def _output(value: onnx.ValueInfoProto) -> ArrayOutput:
    has_shape = value.type.tensor_type.HasField("shape")
    return ArrayOutput(value.name, _dtype(value), tuple(_sizes(value)[1:]) if has_shape else None)


def _sizes(value: onnx.ValueInfoProto) -> list[int | None]:
    return [dimension.dim_value or None for dimension in value.type.tensor_type.shape.dim]


def _dtype(value: onnx.ValueInfoProto) -> str:
    return str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is truncated, damaged or no ONNX file of a model that engines run; export it again.")
