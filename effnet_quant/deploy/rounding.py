"""Moves QuantizeLinear in front of operations that commute with rounding, for runtimes that want integers right behind a
convolution or addition.

Relu and Clip keep the order of values and the quantizer's rounding does too, so quantizing first and clipping the integers
gives the very same integers, and the convolution writes them itself. Max pooling, transposing and the like only pick and
move values.
"""

from __future__ import annotations

import numpy as np
import onnx

from effnet_quant.deploy.graph import GraphWriter
from effnet_quant.quantization.modules import SIGMOID_STEPS

# rounded sigmoids lie between 0 and 1
SIGMOID_SCALE = float(np.float32(1 / SIGMOID_STEPS))
_MOVING = {"MaxPool", "Reshape", "Flatten", "Transpose", "Unsqueeze"}


def round_before_activations(writer: GraphWriter) -> None:
    """Rewrite the graph in place; its values stay the same to the last bit."""
    pending = [node for node in writer.nodes if node.op_type == "QuantizeLinear"]
    while pending:
        quantize = pending.pop()
        producer = next((node for node in writer.nodes if quantize.input[0] in node.output), None)
        if producer is None or len(_consumers(writer, producer.output[0])) != 1:
            continue
        if producer.op_type in ("Relu", "Clip"):
            _clip_integers(writer, producer, quantize)
            pending.append(quantize)
        elif producer.op_type in _MOVING:
            pending += _quantize_input(writer, producer, quantize)


def round_sigmoids(writer: GraphWriter) -> None:
    """Put a pair behind the Sigmoid of each x * sigmoid(x) whose x is quantized, as QuantSiLU simulates it; in place.

    The sigmoid of 256 integers is a table of 256 integers, and the product one of integers.
    """
    producers = {name: node for node in writer.nodes for name in node.output}
    for sigmoid in [node for node in writer.nodes if node.op_type == "Sigmoid"]:
        source = producers.get(sigmoid.input[0])
        users = _consumers(writer, sigmoid.output[0])
        silu = len(users) == 1 and users[0].op_type == "Mul" and sigmoid.input[0] in users[0].input
        if silu and source is not None and source.op_type == "DequantizeLinear":
            value = sigmoid.output[0]
            rounded = writer.quantized_activation(value, SIGMOID_SCALE, 0, sigmoid.name)
            users[0].input[:] = [rounded if name == value else name for name in users[0].input]


def _clip_integers(writer: GraphWriter, clip: onnx.NodeProto, quantize: onnx.NodeProto) -> None:
    scale, zero_point = (writer.initializers[name] for name in quantize.input[1:3])
    limits = np.iinfo(zero_point.dtype)
    bounds = (
        [0.0, np.inf] if clip.op_type == "Relu" else [_bound(writer, clip, 1, -np.inf), _bound(writer, clip, 2, np.inf)]
    )
    low, high = (
        int(np.clip(np.rint(np.float32(bound) / scale) + int(zero_point), limits.min, limits.max)) for bound in bounds
    )
    clipped, integers = clip.output[0], quantize.output[0]
    quantize.input[0] = clip.input[0]
    writer.nodes.remove(clip)
    if (low, high) == (limits.min, limits.max):
        return
    for node in _consumers(writer, integers):
        node.input[:] = [clipped if name == integers else name for name in node.input]
    inputs = [
        integers,
        writer.constant(f"{clip.name}.low", np.array(low, zero_point.dtype)),
        writer.constant(f"{clip.name}.high", np.array(high, zero_point.dtype)),
    ]
    writer.nodes.append(onnx.helper.make_node("Clip", inputs, [clipped], name=clip.name))


def _bound(writer: GraphWriter, clip: onnx.NodeProto, index: int, default: float) -> float:
    name = clip.input[index] if len(clip.input) > index else ""
    return float(writer.initializers[name]) if name else default


def _quantize_input(writer: GraphWriter, node: onnx.NodeProto, quantize: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Put a pair with the grid of ``quantize`` in front of ``node``; returns its QuantizeLinear if it is a new one."""
    scale, zero_point = (writer.initializers[name] for name in quantize.input[1:3])
    before = len(writer.nodes)
    node.input[0] = writer.quantized_activation(node.input[0], float(scale), int(zero_point), f"{node.name}.input")
    return writer.nodes[before : before + 1]


def _consumers(writer: GraphWriter, value: str) -> list[onnx.NodeProto]:
    return [node for node in writer.nodes if value in node.input]
