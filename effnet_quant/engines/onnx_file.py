"""Reads ONNX files: signature, card, metadata, and facts about the graph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from effnet_quant.card import CARD_KEY, EXTRA_KEY, LARGEST_IMAGE, SIGNATURE_KEY, ModelCard, parse_json
from effnet_quant.engines.signature import MOST_NUMBERS, ArrayInput, ArrayOutput, Signature
from effnet_quant.errors import UserError
from effnet_quant.files import existing_file

_IMAGE_TYPES = ("float32", "float16", "uint8")
# the operators of a residual network of convolutions, ReLUs and additions; below, those that normalise its images
_PLAIN_OPERATORS = frozenset(
    {"Conv", "Gemm", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Flatten", "Reshape"}
    | {"QuantizeLinear", "DequantizeLinear"}
)
# what the operators that are looked at here and in checks/lint.py can't be without
_LEAST_INPUTS = dict.fromkeys(
    ("QuantizeLinear", "DequantizeLinear", "Conv", "ConvTranspose", "Gemm", "MatMul", "Add"), 2
)
# types that store several numbers in a byte
_BITS = {
    getattr(onnx.TensorProto, name): bits
    for name, bits in (("INT4", 4), ("UINT4", 4), ("FLOAT4E2M1", 4), ("INT2", 2), ("UINT2", 2))
    if hasattr(onnx.TensorProto, name)
}
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
        if self.card.output_scale is not None:
            return "int32"
        floats = "fp16" if self.half else floats
        return f"int8 + {floats}" if self.quantized else floats


def read_onnx(path: str | Path) -> OnnxFile:
    """Read an ONNX file of ``export_onnx``, or of another tool if it has one input of images and one output.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    model = load_onnx(path)
    card = read_card(model, str(path))  # its refusal says more than that the file is damaged
    try:
        file = OnnxFile(
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
    image = file.signature.inputs[0]
    if card.input is not None and image.is_image and image.shape[0] not in (None, card.input.channels):
        raise UserError(
            f"{path} contradicts itself: its graph takes images of {image.shape[0]} channels, and its card has mean and std "
            f"of {card.input.channels}; export it again."
        )
    return file


def read_onnx_card(path: Path) -> ModelCard:
    """The card of an ONNX file; empty for files of other tools.

    Raises:
        UserError: the file is missing or damaged, or its card can't be used.
    """
    return read_card(load_onnx(path), str(path))


def load_onnx(path: str | Path) -> onnx.ModelProto:
    """The model in an ONNX file, and in files beside it that hold its weights.

    Raises:
        UserError: the file is missing or damaged, a tensor's size contradicts its numbers, or weights lie outside its
            folder.
    """
    path = existing_file(path)
    try:
        model = onnx.load(path, load_external_data=False)
        tensors = list(_tensors(model.graph))
        outside = [tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]
        for tensor in outside:
            _check_external(tensor, path.parent)
        if outside:
            onnx.load_external_data_for_model(model, str(path.parent))
        for tensor in tensors:
            _check_size(tensor)
        for node in model.graph.node:
            _check_node(node)
    except UserError:
        raise
    except Exception as error:  # protobuf's DecodeError, whose module depends on its version, and onnx's own
        raise _damaged(path) from error
    return model


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All constants of a graph and of the graphs in it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _tensors(inner)


def _check_node(node: onnx.NodeProto) -> None:
    """Raises ValueError if a node lacks what its operator can't be without."""
    value = [attribute for attribute in node.attribute if attribute.name == "value"]
    constant = node.op_type != "Constant" or (len(node.attribute) > 0 and all(entry.HasField("t") for entry in value))
    if not node.output or not constant or len(node.input) < _LEAST_INPUTS.get(node.op_type, 0):
        raise ValueError(f"{node.name} is no {node.op_type}")


def _check_external(tensor: onnx.TensorProto, folder: Path) -> None:
    """Raises UserError if a tensor's numbers lie outside the folder, or ValueError if there are not so many."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    place = (folder / said["location"]).resolve()
    if not place.is_relative_to(folder.resolve()) or not place.is_file():
        raise UserError(f"{tensor.name} has its numbers in {said['location']}, which is no file beside the ONNX file.")
    offset = int(said.get("offset", 0))
    length = int(said.get("length", place.stat().st_size - offset))
    if offset < 0 or not 0 <= length <= place.stat().st_size - offset:
        raise ValueError(f"{tensor.name} is longer than its file")


def _check_size(tensor: onnx.TensorProto) -> None:
    """Raises ValueError if a tensor's dimensions promise other numbers than it has."""
    if min(tensor.dims, default=0) < 0:
        raise ValueError(f"{tensor.name} has negative dimensions")
    bits = _BITS.get(tensor.data_type, 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    if tensor.HasField("raw_data") and -(-math.prod(tensor.dims) * bits // 8) != len(tensor.raw_data):
        raise ValueError(f"{tensor.name} has other dimensions than numbers")
    if not tensor.HasField("raw_data") and math.prod(tensor.dims) > MOST_NUMBERS:
        raise ValueError(f"{tensor.name} has other dimensions than numbers")


def read_card(model: onnx.ModelProto, source: str = "the file") -> ModelCard:
    """The card in a model's metadata; empty for models of other tools.

    Raises:
        UserError: the card can't be used.
    """
    return ModelCard.from_text(_properties(model).get(CARD_KEY, "{}"), source)


def read_metadata(model: onnx.ModelProto) -> dict[str, Any]:
    """The metadata that ``export_onnx`` stored, card included, as plain values; empty for models of other tools.

    Raises:
        UserError: it is no JSON.
        ValueError: its image size is none.
    """
    properties = _properties(model)
    values: dict[str, Any] = {}
    for key in (EXTRA_KEY, CARD_KEY):
        entry = parse_json(properties.get(key, "{}"), "the file")
        values |= entry if isinstance(entry, dict) else {}
    values.pop("version", None)  # of the card's format
    return checked_metadata(values)


def checked_metadata(values: Any) -> dict[str, Any]:
    """The metadata of a file, if its image size is one.

    Raises:
        ValueError: it is not.
    """
    size = values.get("image_size", 1) if isinstance(values, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LARGEST_IMAGE:
        raise ValueError(f"{size!r:.40} is no image size")
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
