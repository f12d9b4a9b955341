"""What an ONNX file says of itself, for the runtimes that take one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from effnet_quant.card import ModelCard, parse_json
from effnet_quant.engines.compiled import ImageInput
from effnet_quant.errors import UserError
from effnet_quant.models.weights import EXTRA_KEY, METADATA_KEY, SIGNATURE_KEY

_DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.UINT8: "uint8",
}
# what a residual network of convolutions, ReLUs and additions consists of, and what prepares its images
_PLAIN_OPERATORS = frozenset(
    {"Conv", "Gemm", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Flatten", "Reshape"}
    | {"QuantizeLinear", "DequantizeLinear"}
)
_SCALING_OPERATORS = frozenset({"Add", "Mul", "Cast"})


@dataclass(frozen=True)
class OnnxFile:
    """What an image classifier's ONNX file says of itself.

    Attributes:
        input: what it takes.
        output: name of the logits.
        card: what it says of its model; empty for files of other tools.
        metadata: the same as plain values, with what ``export_onnx`` stored besides.
        quantized: whether it has QuantizeLinear and DequantizeLinear nodes.
        half: whether it has constants in float16.
        fits_16_bits: whether all its weights are stored as integers of 7 bits or fewer, so that two products with 8-bit
            activations add up in 16 bits without saturation.
        adds_integers: whether it adds integers that a ReLU gave to what convolutions give, and does nothing else element by
            element: a quantized ResNet.
    """

    input: ImageInput
    output: str
    card: ModelCard
    metadata: dict[str, Any]
    quantized: bool
    half: bool
    fits_16_bits: bool
    adds_integers: bool

    def precision(self, floats: str) -> str:
        """What an engine computes in whose runtime computes float32 as ``floats``."""
        floats = "fp16" if self.half else floats
        return f"int8 + {floats}" if self.quantized else floats


def read_onnx(path: str | Path) -> OnnxFile:
    """Read an image classifier's ONNX file.

    Raises:
        UserError: the file is missing, damaged, or holds something else than an image classifier.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; check the path.")
    try:
        model = onnx.load(path)
        return OnnxFile(
            _image_input(model),
            model.graph.output[0].name,
            read_card(model, str(path)),
            read_metadata(model),
            quantized=any(node.op_type == "DequantizeLinear" for node in model.graph.node),
            half=any(entry.data_type == onnx.TensorProto.FLOAT16 for entry in model.graph.initializer),
            fits_16_bits=_fits_16_bits(model),
            adds_integers=_adds_integers(model),
        )
    except (ValueError, IndexError, KeyError, TypeError, OSError) as error:
        raise _damaged(path) from error
    except Exception as error:  # protobuf's DecodeError, whose module depends on the protobuf version
        if type(error).__name__ != "DecodeError":
            raise
        raise _damaged(path) from error


def read_card(model: onnx.ModelProto, source: str = "the file") -> ModelCard:
    """What a file says of its model.

    Raises:
        UserError: that can't be used.
    """
    return ModelCard.from_text(_properties(model).get(METADATA_KEY, "{}"), source)


def read_metadata(model: onnx.ModelProto) -> dict[str, Any]:
    """What ``export_onnx`` stored in a model, as plain values; empty for models of other tools."""
    properties = _properties(model)
    values: dict[str, Any] = {}
    for key in (EXTRA_KEY, SIGNATURE_KEY, METADATA_KEY):
        entry = parse_json(properties.get(key, "{}"), "the file")
        values |= entry if isinstance(entry, dict) else {}
    return values


def _properties(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _fits_16_bits(model: onnx.ModelProto) -> bool:
    weights = [
        onnx.numpy_helper.to_array(entry)
        for entry in model.graph.initializer
        if entry.data_type == onnx.TensorProto.INT8 and len(entry.dims) > 1
    ]
    # 2 * 255 * 64 = 32,640
    return bool(weights) and all(values.min() >= -64 and values.max() <= 64 for values in weights)


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


def _image_input(model: onnx.ModelProto) -> ImageInput:
    constants = {entry.name for entry in model.graph.initializer}
    (value,) = (entry for entry in model.graph.input if entry.name not in constants)
    tensor = value.type.tensor_type
    batch, first, second, third = (dimension.dim_value or None for dimension in tensor.shape.dim)
    return ImageInput(value.name, _DTYPES[tensor.elem_type], (first, second, third), batch or 1, batch)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is truncated, damaged or no ONNX file of an image classifier; export it again.")
