"""ONNX export with QuantizeLinear / DequantizeLinear (QDQ) nodes placed and encoded for one runtime."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from effnet_quant.deploy.graph import LARGEST_BIAS, GraphWriter
from effnet_quant.deploy.operators import IDENTITIES, OPERATION_KINDS, OPERATIONS
from effnet_quant.deploy.ranges import NeededRanges, affine_uint8
from effnet_quant.deploy.tracing import FAKE_QUANTIZE, TRACKED_RANGE, TracedModel, module_path, trace
from effnet_quant.errors import UserError
from effnet_quant.files import replace_file
from effnet_quant.models.weights import METADATA_KEY
from effnet_quant.quantization.targets import get_target

aten = torch.ops.aten
OPSET = 17


@dataclass
class _Layer:
    """Weights of a convolution or linear layer, BatchNorm folded in: float, or integers with a scale per channel."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    scale: NDArray[np.float32] | None

    def fold(self, factor: NDArray[np.float64], offset: NDArray[np.float64]) -> None:
        """Follow the layer by factor * y + offset per channel: weights and scales take the same factor.

        Integers keep their magnitude (-128, which only saturation reaches, becomes 127 where the factor is negative).
        """
        shape = (-1,) + (1,) * (self.weight.ndim - 1)
        if self.scale is None:
            self.weight = (self.weight * factor.reshape(shape)).astype(np.float32)
        else:
            self.weight = np.clip(self.weight * np.sign(factor).reshape(shape), -128, 127).astype(np.float32)
            self.scale = (self.scale * np.abs(factor)).astype(np.float32)
        bias = 0.0 if self.bias is None else self.bias
        self.bias = (bias * factor + offset).astype(np.float32)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    image_size: int,
    *,
    target: str = "onnxruntime",
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write ``model`` as ONNX (opset 17): "input" (batch, 3, image_size, image_size) float32 -> "logits", any batch.

    BatchNorm is folded into the convolutions. A quantized model gets int8 weights and QDQ nodes where ``target`` wants
    them; its ranges serve every target. For ONNX Runtime, outputs of convolutions get ranges too, so that they run as
    integer kernels: what calibration saw there, less what the next quantizer could not tell apart (see ``ranges.py``).

    Args:
        model: a float or calibrated quantized model; left untouched.
        path: the file to write; replaced only when the new one is complete.
        image_size: height and width of the images, in pixels.
        target: "onnxruntime", "openvino" or "tensorrt".
        metadata: JSON values to store in the file; an ``Engine`` returns them.

    Raises:
        UserError: unknown target, a quantizer without range, or an operation the exporter does not know.
    """
    proto = build_onnx(model, image_size, target=target, metadata=metadata)
    replace_file(Path(path), proto.SerializeToString(deterministic=True))


def build_onnx(
    model: nn.Module, image_size: int, *, target: str = "onnxruntime", metadata: dict[str, Any] | None = None
) -> onnx.ModelProto:
    """The model that ``export_onnx`` writes, checked by ``onnx.checker``."""
    exporter = _Exporter(trace(model, image_size), GraphWriter(get_target(target)))
    proto = exporter.run(image_size)
    proto.producer_name = "effnet_quant"
    stored = {"target": target, "image_size": image_size, **(metadata or {})}
    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(stored, sort_keys=True)})
    onnx.checker.check_model(proto, full_check=True)
    return proto


class _Exporter:
    """Walks a traced model once and writes its nodes."""

    def __init__(self, traced: TracedModel, writer: GraphWriter) -> None:
        self.traced = traced
        self.writer = writer
        self.target = writer.target
        self.names: dict[fx.Node, str] = {}
        self.input_scales: dict[str, float] = {}  # of values behind a quantizer
        self.integer_convolutions: set[str] = set()
        self.tracked: dict[str, tuple[float, float]] = {}  # extremes of values that calibration has seen

    def run(self, image_size: int) -> onnx.ModelProto:
        self.names[self.traced.input] = "input"
        for node in self.traced.nodes:
            if node.op == "call_function":
                self._emit(node)
        if self.target.quantized_outputs:
            self._quantize_outputs()
        output = self.names[self.traced.output]
        return self.writer.model("input", (3, image_size, image_size), output, OPSET)

    def _emit(self, node: fx.Node) -> None:
        path = module_path(node)
        if node.target is FAKE_QUANTIZE:
            if node.args[0] not in self.traced.constants:  # quantized weights are written with their layer
                self.names[node] = self._quantized_activation(node)
        elif node.target in (aten.conv2d.default, aten.linear.default):
            self.names[node] = self._weighted(node, path)
        elif node.target is aten.batch_norm.default:
            source = _foldable(node)
            if source is None:
                raise UserError(f"{path}: a BatchNorm that does not follow a convolution can't be exported.")
            self.names[node] = self.names[source]
        elif node.target is TRACKED_RANGE:
            self.names[node] = self.names[node.args[0]]  # type: ignore[index]
            self.tracked[self.names[node]] = node.args[1:]  # type: ignore[assignment]
        elif node.target in IDENTITIES:
            self.names[node] = self.names[node.args[0]]  # type: ignore[index]
        elif node.target in OPERATIONS:
            inputs = [self.names[argument] for argument in node.all_input_nodes]
            if node.target in (aten.add.Tensor, aten.mul.Tensor):  # x + x names its input twice
                inputs = [self.names[argument] for argument in node.args if isinstance(argument, fx.Node)]
            self.names[node] = OPERATIONS[node.target](self.writer, inputs, node, path)
        else:
            raise UserError(f"{path or 'the model'}: the operation {node.target} can't be exported to ONNX yet.")

    def _quantized_activation(self, node: fx.Node) -> str:
        source = self.names[node.args[0]]  # type: ignore[index]
        kinds = {OPERATION_KINDS.get(user.target) for user in node.users}
        if not kinds & self.target.quantized_inputs:
            return source
        scale = float(self._constant(node.args[1]))
        low, high = _bounds(node)
        path = module_path(node)
        zero_point = _zero_point(low, high, self.target.activation_dtype, path)
        if high - low < 255:  # the engine's integers are wider than the grid: saturate before
            ends = [self.writer.constant(f"{path}.{end}", np.array(end * scale, np.float32)) for end in (low, high)]
            source = self.writer.node("Clip", [source, *ends], path)
        name = self.writer.quantized_activation(source, scale, zero_point, path)
        self.input_scales[name] = scale
        return name

    def _weighted(self, node: fx.Node, path: str) -> str:
        layer = self._layer(node)
        normalisation = next((user for user in node.users if _foldable(user) is node), None)
        if normalisation is not None:
            layer.fold(*self._batch_norm(normalisation))
        x = self.names[node.args[0]]  # type: ignore[index]
        names = [x, *self._weight_and_bias(layer, self.input_scales.get(x), path)]
        if node.target is aten.linear.default:
            return self.writer.node("Gemm", names, path, transB=1)
        given: list[Any] = list(node.args[3:])
        stride, padding, dilation, groups = given + [1, 0, 1, 1][len(given) :]
        if isinstance(padding, str):
            raise UserError(f"{path}: padding={padding!r} can't be exported; give the padding as numbers.")
        name = self.writer.node(
            "Conv",
            names,
            path,
            kernel_shape=layer.weight.shape[2:],
            strides=_pair(stride),
            pads=_pair(padding) * 2,
            dilations=_pair(dilation),
            group=groups,
        )
        if layer.scale is not None and x in self.input_scales:
            self.integer_convolutions.add(name)
        return name

    def _weight_and_bias(self, layer: _Layer, input_scale: float | None, path: str) -> list[str]:
        bias = layer.bias
        if layer.scale is None:
            names = [self.writer.constant(f"{path}.weight", layer.weight)]
        else:
            if self.target.quantized_bias and bias is not None and input_scale is not None:
                _widen_scale_for_bias(layer, input_scale)
            names = [self.writer.quantized_weight(layer.weight.astype(np.int8), layer.scale, path)]
            if self.target.quantized_bias and bias is not None and input_scale is not None:
                bias_scale = (layer.scale * np.float32(input_scale)).astype(np.float32)
                return [*names, self.writer.quantized_bias(bias, bias_scale, path)]
        return names if bias is None else [*names, self.writer.constant(f"{path}.bias", bias)]

    def _layer(self, node: fx.Node) -> _Layer:
        weight_node = node.args[1]
        bias_node = node.args[2] if len(node.args) > 2 else None
        bias = None if bias_node is None else self._constant(bias_node).float().numpy()
        assert isinstance(weight_node, fx.Node)
        if weight_node in self.traced.constants:
            return _Layer(self._constant(weight_node).float().numpy(), bias, None)
        weight, scale = self._constant(weight_node.args[0]).float(), self._constant(weight_node.args[1]).float()
        low, high = _bounds(weight_node)
        if low < -128 or high > 127:
            raise UserError(f"{module_path(node)}: weights on the grid {low} … {high} can't be exported; int8 can.")
        integers = torch.clamp(torch.round(weight / scale), low, high)
        channels = len(weight)
        return _Layer(integers.numpy(), bias, scale.flatten().expand(channels).contiguous().numpy())

    def _batch_norm(self, node: fx.Node) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Factor and offset per channel of a BatchNorm in eval mode, in float64."""
        gamma, beta, mean, variance = (self._constant(argument).double().numpy() for argument in node.args[1:5])
        factor = gamma / np.sqrt(variance + node.args[7])
        return factor, beta - mean * factor

    def _constant(self, argument: Any) -> Tensor:
        return self.traced.constants[argument]

    def _quantize_outputs(self) -> None:
        """Put QDQ behind integer convolutions whose output is not quantized yet."""
        writer = self.writer
        ranges = NeededRanges(writer.nodes, writer.initializers)
        for layer in [node for node in writer.nodes if node.name in self.integer_convolutions]:
            value = layer.output[0]
            consumers = [node for node in writer.nodes if value in node.input]
            if len(consumers) == 1 and consumers[0].op_type == "QuantizeLinear":
                continue
            needed, tracked = ranges.of(value), self.tracked.get(value)
            if needed is None and tracked is None:
                continue  # stays a float convolution on dequantized inputs
            low, high = tracked or (-math.inf, math.inf)
            if needed is not None:
                low, high = max(low, needed.low), min(high, needed.high)
            scale, zero_point = affine_uint8(low, high)
            replacement = writer.quantized_activation(value, scale, zero_point, f"{layer.name}.output")
            for node in consumers:
                node.input[:] = [replacement if name == value else name for name in node.input]
            pair = writer.nodes[-2:]
            del writer.nodes[-2:]
            position = writer.nodes.index(layer) + 1
            writer.nodes[position:position] = pair


def _foldable(node: fx.Node) -> fx.Node | None:
    """The convolution whose only consumer is this BatchNorm in eval mode, or None."""
    if node.target is not aten.batch_norm.default or node.args[5]:
        return None
    source = node.args[0]
    if isinstance(source, fx.Node) and source.target is aten.conv2d.default and len(source.users) == 1:
        return source
    return None


def _bounds(node: fx.Node) -> tuple[int, int]:
    """Ends of the grid of a FAKE_QUANTIZE node, less the zero point."""
    low, high = node.args[2:]
    assert isinstance(low, int) and isinstance(high, int)
    return low, high


def _zero_point(low: int, high: int, dtype: str, path: str) -> int:
    """The integer that stands for 0.0 where the grid ``low`` … ``high`` around zero is stored as ``dtype``."""
    smallest = np.iinfo(dtype).min
    if high - low > 255:
        raise UserError(f"{path}: activations on the grid {low} … {high} can't be exported; 8 bits or fewer can.")
    zero_point = smallest + 128 if low >= -128 and high <= 127 else smallest - low
    if dtype == "int8" and zero_point != 0:
        raise UserError(
            f"{path}: this target takes no zero point, which activations on the grid {low} … {high} need; quantize "
            "with a symmetric preset."
        )
    return zero_point


def _widen_scale_for_bias(layer: _Layer, input_scale: float) -> None:
    """Raise the weight scale of channels whose bias would overflow int32 in units of the accumulator.

    Such a channel has weights so small beside its bias that a coarser grid changes its output by less than one part in a
    million.
    """
    assert layer.scale is not None and layer.bias is not None
    smallest = (np.abs(layer.bias).astype(np.float64) / (LARGEST_BIAS * input_scale)).astype(np.float32)
    wider = np.maximum(layer.scale, smallest)
    shape = (-1,) + (1,) * (layer.weight.ndim - 1)
    layer.weight = np.where(
        (wider > layer.scale).reshape(shape), np.rint(layer.weight * (layer.scale / wider).reshape(shape)), layer.weight
    )
    layer.scale = wider


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else [*value, *value][:2]
