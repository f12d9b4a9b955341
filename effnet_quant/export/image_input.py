"""The input of a graph of images: normalised float numbers, or uint8 pixels that the graph normalises."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from effnet_quant.errors import UserError
from effnet_quant.export.graph_writer import GraphWriter
from effnet_quant.export.options import ExportOptions


def image_input(channels: int, image_size: int, options: ExportOptions) -> onnx.ValueInfoProto:
    """The graph's input: float32 (batch, C, H, W), or uint8 of the same shape where the graph normalises."""
    size: list[int | str] = ["height", "width"] if options.dynamic_size else [image_size, image_size]
    if options.normalisation is None:
        return helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", channels, *size])
    if len(options.normalisation.mean) != channels:
        raise UserError(
            f"the model takes {channels} channels and the normalisation has {len(options.normalisation.mean)}; export "
            "without preprocessing."
        )
    return helper.make_tensor_value_info("input", TensorProto.UINT8, ["batch", channels, *size])


def write_input(writer: GraphWriter, name: str, options: ExportOptions) -> str:
    """Write normalisation and casts, as ``options`` ask; returns the name of the normalised images (N, C, H, W)."""
    if options.normalisation is not None:
        deviation = 255 * np.array(options.normalisation.std)
        shift = -255 * np.array(options.normalisation.mean) / deviation
        per_channel = [value.astype(np.float32)[:, None, None] for value in (1 / deviation, shift)]
        scale, offset = (
            writer.constant(f"{name}.{role}", value, half=False)
            for role, value in zip(("scale", "shift"), per_channel, strict=True)
        )
        numbers = writer.node("Cast", [name], name, to=TensorProto.FLOAT)
        name = writer.node("Add", [writer.node("Mul", [numbers, scale], name), offset], name)
    return writer.node("Cast", [name], name, to=TensorProto.FLOAT16) if options.fp16 else name


def describe(image: onnx.ValueInfoProto, output: onnx.ValueInfoProto, options: ExportOptions) -> dict[str, Any]:
    """The metadata of a file's input and its first output: name, type, layout."""
    dtype = "float32" if options.normalisation is None else "uint8"
    return {
        "input": {"name": image.name, "type": dtype, "layout": "NCHW"},
        "output": {"name": output.name, "type": "float32"},
    }
