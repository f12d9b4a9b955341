"""The checker of TensorRT's placement rules: silent on our graphs, and loud about each fault put into one."""

import copy
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from effnet_quant import calibrate, quantize
from effnet_quant.deploy.lint import lint_tensorrt
from effnet_quant.deploy.onnx import build_onnx


class Residual(nn.Module):
    """Two convolutions, a shortcut and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        return self.fc(torch.relu(self.conv2(x) + x).mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    torch.manual_seed(0)
    model = calibrate(quantize(Residual().eval()), [torch.randn(4, 3, 16, 16)], method="max")
    return build_onnx(model, 16, target="tensorrt")


def named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def set_constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    entry = next(entry for entry in model.graph.initializer if entry.name == name)
    entry.CopyFrom(numpy_helper.from_array(value, name))


def shift_zero_point(model: onnx.ModelProto) -> None:
    set_constant(model, "conv2._input_quantizer.zero_point", np.array(3, np.int8))


def store_unsigned(model: onnx.ModelProto) -> None:
    set_constant(model, "conv2._input_quantizer.zero_point", np.array(0, np.uint8))


def scale_per_input_channel(model: onnx.ModelProto) -> None:
    named(model, "conv2.weight/DequantizeLinear").attribute[0].i = 1


def leave_the_input_in_float(model: onnx.ModelProto) -> None:
    quantize_node = named(model, "conv2._input_quantizer/QuantizeLinear")
    named(model, "conv2/Conv").input[0] = quantize_node.input[0]


def round_before_the_activation(model: onnx.ModelProto) -> None:
    relu = named(model, "Relu")
    parameters = ["conv2._input_quantizer.scale", "conv2._input_quantizer.zero_point"]
    position = list(model.graph.node).index(relu)
    nodes = [
        helper.make_node("QuantizeLinear", [relu.input[0], *parameters], ["early"], name="early/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["early", *parameters], ["late"], name="early/DequantizeLinear"),
    ]
    relu.input[0] = "late"
    for node in reversed(nodes):
        model.graph.node.insert(position, node)


def leave_the_shortcut_in_float(model: onnx.ModelProto) -> None:
    add = named(model, "Add")
    index = next(index for index, name in enumerate(add.input) if name.endswith("DequantizeLinear"))
    add.input[index] = named(model, add.input[index].replace("Dequantize", "Quantize")).input[0]


def test_our_graph_keeps_the_rules(graph: onnx.ModelProto) -> None:
    assert lint_tensorrt(graph) == []
    assert {"QuantizeLinear", "Conv", "Add", "Relu", "Gemm"} <= {node.op_type for node in graph.graph.node}


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        (shift_zero_point, "conv2._input_quantizer/QuantizeLinear: a zero point is not 0"),
        (store_unsigned, "conv2._input_quantizer/QuantizeLinear: uint8 values"),
        (scale_per_input_channel, "conv2.weight/DequantizeLinear: weights have a scale per index of axis 1"),
        (leave_the_input_in_float, "conv2/Conv: its weights are quantized and its input are not"),
        (round_before_the_activation, "early/QuantizeLinear: sits between conv1/Conv and Relu"),
        (leave_the_shortcut_in_float, "Add: the operand beside conv2/Conv is not quantized"),
    ],
)
def test_every_fault_is_found(graph: onnx.ModelProto, fault: Callable[[onnx.ModelProto], None], finding: str) -> None:
    faulty = copy.deepcopy(graph)
    fault(faulty)
    assert any(line.startswith(finding) for line in lint_tensorrt(faulty)), lint_tensorrt(faulty)
