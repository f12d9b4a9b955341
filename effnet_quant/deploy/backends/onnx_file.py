"""What an ONNX file says of itself, for the runtimes that take one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from effnet_quant.deploy.backends.compiled import ImageInput
from effnet_quant.errors import UserError
from effnet_quant.models.weights import METADATA_KEY

_DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.UINT8: "uint8",
}


@dataclass(frozen=True)
class OnnxFile:
    """What an image classifier's ONNX file says of itself.

    Attributes:
        input: what it takes.
        output: name of the logits.
        metadata: what ``export_onnx`` stored in it; empty for files of other tools.
        quantized: whether it has QuantizeLinear and DequantizeLinear nodes.
        half: whether it has constants in float16.
    """

    input: ImageInput
    output: str
    metadata: dict[str, Any]
    quantized: bool
    half: bool

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
            read_metadata(model),
            quantized=any(node.op_type == "DequantizeLinear" for node in model.graph.node),
            half=any(entry.data_type == onnx.TensorProto.FLOAT16 for entry in model.graph.initializer),
        )
    except (ValueError, IndexError, KeyError, TypeError, OSError) as error:
        raise _damaged(path) from error
    except Exception as error:  # protobuf's DecodeError, whose module depends on the protobuf version
        if type(error).__name__ != "DecodeError":
            raise
        raise _damaged(path) from error


def read_metadata(model: onnx.ModelProto) -> dict[str, Any]:
    """What ``export_onnx`` stored in a model; empty for models of other tools."""
    properties = {entry.key: entry.value for entry in model.metadata_props}
    return dict(json.loads(properties.get(METADATA_KEY, "{}")))


def _image_input(model: onnx.ModelProto) -> ImageInput:
    constants = {entry.name for entry in model.graph.initializer}
    (value,) = (entry for entry in model.graph.input if entry.name not in constants)
    tensor = value.type.tensor_type
    batch, first, second, third = (dimension.dim_value or None for dimension in tensor.shape.dim)
    return ImageInput(value.name, _DTYPES[tensor.elem_type], (first, second, third), batch or 1, batch)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is truncated, damaged or no ONNX file of an image classifier; export it again.")
