"""Moves QuantizeLinear in front of operations that commute with rounding, for runtimes that want integers right behind a
convolution or addition.

Relu and Clip keep the order of values and the quantizer's rounding does too, so quantizing first and clipping the integers
gives the very same integers, and the convolution writes them itself. Max pooling, transposing and the like only pick and
move values. And finds the gates of SiLU and hard-swish with integers.
"""

from __future__ import annotations

import math

import numpy as np
import onnx

from effnet_quant.export.graph_writer import GraphWriter
from effnet_quant.quantization.quantized_layers import GATE_STEPS

GATE_SCALE = float(np.float32(1 / GATE_STEPS))  # gates lie between 0 and 1
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
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


def round_before_max_pooling(writer: GraphWriter) -> None:
    """Move the pair behind each MaxPool, where nothing else takes its result, in front of it; in place, and exact.

    For runtimes that pool integers where they get some, and whose convolution in front then writes them.
    """
    producers = {name: node for node in writer.nodes for name in node.output}
    for quantize in [node for node in writer.nodes if node.op_type == QUANTIZE]:
        pool = producers.get(quantize.input[0])
        if pool is None or pool.op_type != "MaxPool" or len(_consumers(writer, pool.output[0])) != 1:
            continue
        (dequantize,) = _consumers(writer, quantize.output[0])
        rounded, pooled = f"{pool.name}.rounded", dequantize.output[0]
        quantize.input[0], pool.input[0] = pool.input[0], rounded
        dequantize.output[0], pool.output[0] = rounded, pooled


def round_gates(writer: GraphWriter) -> None:
    """Put a pair behind the gate of each SiLU and hard-swish whose input is quantized, as QuantGate simulates it; in place.

    SiLU's gate is a sigmoid: of 256 integers, a table of 256 integers. Hard-swish becomes a product with its gate,
    HardSigmoid. Both products are then of integers.
    """
    producers = {name: node for node in writer.nodes for name in node.output}
    for node in list(writer.nodes):
        source = producers.get(node.input[0]) if node.op_type in ("Sigmoid", "HardSwish") else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        product = node
        if node.op_type == "HardSwish":
            gate = writer.node("HardSigmoid", [node.input[0]], node.name, alpha=1 / 6, beta=0.5)
            node.op_type = "Mul"
            node.input.append(gate)
        else:
            gate = node.output[0]
            users = _consumers(writer, gate)
            if not (len(users) == 1 and users[0].op_type == "Mul" and node.input[0] in users[0].input):
                continue
            product = users[0]
        rounded = writer.quantized_activation(gate, GATE_SCALE, 0, node.name)
        product.input[:] = [rounded if name == gate else name for name in product.input]


def saturate_hard_sigmoids(writer: GraphWriter) -> None:
    """Let a sum of integers that saturates take the place of HardSigmoid between quantized values; in place.

    clamp((x + 3) / 6, 0, 1) on a grid of step s from zero on is x + 3 on one of step 6 s, whose integers end where the clamp
    does, as a step of at most 1/255 makes sure. The runtime has no integer HardSigmoid, but additions.
    """
    producers = {name: node for node in writer.nodes for name in node.output}
    for node in [node for node in writer.nodes if node.op_type == "HardSigmoid"]:
        source, users = producers.get(node.input[0]), _consumers(writer, node.output[0])
        if source is None or source.op_type != "DequantizeLinear" or [user.op_type for user in users] != [QUANTIZE]:
            continue
        scale, zero_point = (writer.initializers[name] for name in users[0].input[1:3])
        slope = {attribute.name: attribute.f for attribute in node.attribute}
        sixth = math.isclose(slope["alpha"], 1 / 6, rel_tol=1e-6) and slope["beta"] == 0.5
        if not sixth or zero_point != 0 or zero_point.dtype != np.uint8 or scale > np.float32(GATE_SCALE):
            continue
        three = [
            writer.constant(f"{node.name}.{name}", value)
            for name, value in (
                ("offset", np.array(1, np.uint8)),
                ("offset_scale", np.array(3, np.float32)),
                ("offset_zero_point", np.array(0, np.uint8)),
            )
        ]
        node.op_type = "Add"
        del node.attribute[:]
        node.input.append(writer.node(DEQUANTIZE, three, node.name))
        users[0].input[1] = writer.constant(f"{node.name}.scale", np.array(6 * scale, np.float32))


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
