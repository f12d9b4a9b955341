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
from effnet_quant.checks.lint import lint_tensorrt
from effnet_quant.export.onnx import build_onnx


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


def leave_the_shortcut_in_float(model: onnx.ModelProto) -> None:
    add = named(model, "Add")
    index = next(index for index, name in enumerate(add.input) if name.endswith("DequantizeLinear"))
    add.input[index] = named(model, add.input[index].replace("Dequantize", "Quantize")).input[0]


def insert_pair(model: onnx.ModelProto, value: str, user: onnx.NodeProto) -> None:
    """QuantizeLinear and DequantizeLinear, "early", on a value on its way to one node."""
    parameters = ["conv2._input_quantizer.scale", "conv2._input_quantizer.zero_point"]
    position = list(model.graph.node).index(user)
    nodes = [
        helper.make_node("QuantizeLinear", [value, *parameters], ["early"], name="early/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["early", *parameters], ["late"], name="early/DequantizeLinear"),
    ]
    user.input[list(user.input).index(value)] = "late"
    for node in reversed(nodes):
        model.graph.node.insert(position, node)


def round_before_the_activation(model: onnx.ModelProto) -> None:
    insert_pair(model, "conv1/Conv", named(model, "Relu"))


def round_between_addition_and_activation(model: onnx.ModelProto) -> None:
    add = named(model, "Add")
    (relu,) = (node for node in model.graph.node if add.output[0] in node.input)
    insert_pair(model, add.output[0], relu)


def round_between_convolution_and_addition(model: onnx.ModelProto) -> None:
    insert_pair(model, "conv2/Conv", named(model, "Add"))


def leave_out_the_zero_point(model: onnx.ModelProto) -> None:
    del named(model, "conv2._input_quantizer/QuantizeLinear").input[2]


def compute_the_zero_point(model: onnx.ModelProto) -> None:
    named(model, "conv2._input_quantizer/QuantizeLinear").input[2] = "somewhere"


def concatenate_two_grids(model: onnx.ModelProto) -> None:
    other = copy.deepcopy(named(model, "conv1._input_quantizer/DequantizeLinear"))
    own = named(model, "conv2._input_quantizer/DequantizeLinear")
    joined = helper.make_node("Concat", [own.output[0], other.output[0]], ["joined"], name="joined/Concat", axis=1)
    model.graph.node.append(joined)


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
        (round_between_addition_and_activation, "early/QuantizeLinear: sits between Add and Relu"),
        (round_between_convolution_and_addition, "early/QuantizeLinear: sits between conv2/Conv and Add"),
        (leave_out_the_zero_point, "conv2._input_quantizer/QuantizeLinear: without a zero point it gives uint8"),
        (compute_the_zero_point, "conv2._input_quantizer/QuantizeLinear: the zero point is computed"),
        (concatenate_two_grids, "joined/Concat: its inputs are quantized with different scales"),
        (leave_the_shortcut_in_float, "Add: the operand beside conv2/Conv is not quantized"),
    ],
)
def test_every_fault_is_found(graph: onnx.ModelProto, fault: Callable[[onnx.ModelProto], None], finding: str) -> None:
    faulty = copy.deepcopy(graph)
    fault(faulty)
    assert any(line.startswith(finding) for line in lint_tensorrt(faulty)), lint_tensorrt(faulty)


def test_a_scale_in_a_constant_node_and_an_axis_from_the_end_are_understood(graph: onnx.ModelProto) -> None:
    written = copy.deepcopy(graph)
    named(written, "conv2.weight/DequantizeLinear").attribute[0].i = -4
    name = "conv2._input_quantizer.scale"
    (entry,) = (entry for entry in written.graph.initializer if entry.name == name)
    written.graph.node.insert(0, helper.make_node("Constant", [], [name], value=entry))
    written.graph.initializer.remove(entry)
    assert lint_tensorrt(written) == []
    onnx.checker.check_model(written, full_check=True)


@pytest.mark.parametrize(("axis", "findings"), [(1, 0), (0, 1)])
def test_a_transposed_convolution_has_its_output_channels_second(axis: int, findings: int) -> None:
    constants = {
        "scale": np.array(0.1, np.float32),
        "zero": np.array(0, np.int8),
        "weight": np.ones((2, 3, 1, 1), np.int8),
        "scales": np.full(3 if axis else 2, 0.1, np.float32),
        "zeros": np.zeros(3 if axis else 2, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="d"),
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], name="w", axis=axis),
        helper.make_node("ConvTranspose", ["d", "w"], ["y"], name="deconv"),
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = helper.make_model(helper.make_graph(nodes, "deconv", [], [], initializers))
    assert len(lint_tensorrt(model)) == findings
