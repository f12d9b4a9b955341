"""ONNX export with QuantizeLinear / DequantizeLinear (QDQ) nodes placed and encoded for one runtime."""

from __future__ import annotations

import json
import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from effnet_quant.card import ModelCard
from effnet_quant.errors import UserError
from effnet_quant.export.graph_writer import GraphWriter
from effnet_quant.export.image_input import describe, image_input, write_input
from effnet_quant.export.layer_weights import LayerWeights
from effnet_quant.export.needed_ranges import NeededRanges
from effnet_quant.export.operation import Operation, shape_of
from effnet_quant.export.operators import IDENTITIES, OPERATIONS
from effnet_quant.export.options import ExportOptions
from effnet_quant.export.rounding import (
    round_before_activations,
    round_before_max_pooling,
    round_gates,
    saturate_hard_sigmoids,
)
from effnet_quant.export.tracing import (
    FAKE_QUANTIZE,
    PAD_SAME,
    QUANTIZE_OUTPUT,
    TracedModel,
    image_channels,
    module_path,
    trace,
)
from effnet_quant.files import replace_file
from effnet_quant.models.weights import EXTRA_KEY, METADATA_KEY
from effnet_quant.quantization.grid import scale_and_zero_point
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.quantizer import AFFINE_UINT8
from effnet_quant.quantization.targets import Target, get_target

aten = torch.ops.aten
PLAIN = ExportOptions()
SIZE_TYPES = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)

_CONVOLUTIONS = frozenset({aten.conv2d.default, aten.conv2d.padding, aten.conv1d.default})
_LAYERS = _CONVOLUTIONS | {aten.linear.default}


def export_onnx(
    model: nn.Module,
    path: str | Path,
    image_size: int,
    *,
    target: str | Target = "onnxruntime",
    card: ModelCard | None = None,
    metadata: dict[str, Any] | None = None,
    options: ExportOptions = PLAIN,
) -> None:
    """Write ``model`` as ONNX: "input" (batch, C, image_size, image_size) float32 -> "logits", any batch; ``options`` give
    other forms. C is what the model takes.

    BatchNorm is folded into the convolutions. A quantized model gets int8 weights and QDQ nodes where ``target`` wants
    them; its ranges serve every target. For ONNX Runtime, outputs of convolutions are quantized too, so that they run as
    integer kernels: as the simulation does where calibration has been, else over the range that the next quantizer can
    tell apart (see ``ranges.py``).

    Args:
        model: a float or calibrated quantized model; left untouched.
        path: the file to write; replaced only when the new one is complete.
        image_size: height and width of the images, in pixels.
        target: "onnxruntime", "openvino" or "tensorrt", or rules of one that were changed (``Target.leaving_in_float``).
        card: what the file says of its model; the target and what it leaves in float are added. None for what ``metadata``
            says of it.
        metadata: further JSON values to store in the file; ``Engine.metadata`` has them.
        options: the form of the file.

    Raises:
        UserError: unknown target, a quantizer without range, or an operation the exporter does not know.
    """
    proto = build_onnx(model, image_size, target=target, card=card, metadata=metadata, options=options)
    replace_file(Path(path), proto.SerializeToString(deterministic=True))


def build_onnx(
    model: nn.Module,
    image_size: int,
    *,
    target: str | Target = "onnxruntime",
    card: ModelCard | None = None,
    metadata: dict[str, Any] | None = None,
    options: ExportOptions = PLAIN,
) -> onnx.ModelProto:
    """The model that ``export_onnx`` writes, checked by ``onnx.checker``."""
    rules = get_target(target)
    quantized = any(True for _ in quantizers(model))
    if options.fp16 and quantized and rules.quantized_outputs:
        raise UserError(
            f"{rules.name} has no integer kernels between float16 values; export the quantized model without fp16, or for "
            "another target."
        )
    channels = image_channels(model, image_size)
    traced = trace(model, rules, image_size, channels, dynamic_size=options.dynamic_size)
    exporter = _Exporter(traced, GraphWriter(rules, options.opset_for(quantized), options))
    image = image_input(channels, image_size, options)
    proto = exporter.run(image, options)
    proto.producer_name = "effnet_quant"
    left = tuple(sorted(get_target(rules.name).quantized - rules.quantized))
    card = replace(card or ModelCard.from_json(metadata or {}, "metadata"), target=rules.name, float_operations=left)
    entries = {
        METADATA_KEY: card.to_json(),
        EXTRA_KEY: {"image_size": image_size, **describe(image, options), **(metadata or {})},
    }
    onnx.helper.set_model_props(proto, {key: json.dumps(value, sort_keys=True) for key, value in entries.items()})
    onnx.checker.check_model(proto, full_check=True)
    return proto


class _Exporter:
    """Walks a traced model once and writes its nodes."""

    def __init__(self, traced: TracedModel, writer: GraphWriter) -> None:
        self.traced = traced
        self.writer = writer
        self.target = writer.target
        self.names: dict[fx.Node, str] = {}
        self.parts: dict[fx.Node, list[str]] = {}  # of operations with several results
        self.input_scales: dict[str, float] = {}  # of values behind a quantizer
        self.integer_convolutions: set[str] = set()

    def run(self, image: onnx.ValueInfoProto, options: ExportOptions) -> onnx.ModelProto:
        self.names[self.traced.input] = write_input(self.writer, image.name, options)
        for node in self.traced.nodes:
            if node.op == "call_function":
                self._emit(node)
        if self.target.quantized_outputs:
            round_before_activations(self.writer)
            self._quantize_outputs()
        elif self.target.pools_integers:
            round_before_max_pooling(self.writer)
        if "silu" in self.target.quantized:
            round_gates(self.writer)
            saturate_hard_sigmoids(self.writer)
        output = self.names[self.traced.output]
        if options.fp16:
            output = self.writer.node("Cast", [output], "logits", to=onnx.TensorProto.FLOAT)
        return self.writer.model(image, output)

    def _emit(self, node: fx.Node) -> None:
        path = module_path(node)
        if node.target is FAKE_QUANTIZE and node.args[0] not in self.traced.constants:
            self.names[node] = self._quantized_activation(node)
        elif isinstance(node.meta.get("val"), SIZE_TYPES) or not node.users:
            return  # a size, or a check of one: shapes are known when the graph is written
        elif self.traced.fold_constant(node):
            return
        elif node.target in _LAYERS:
            self.names[node] = self._weighted(node, path)
        elif (folded_into := _foldable(node)) is not None:
            self.names[node] = self.names[folded_into]
        elif node.target is QUANTIZE_OUTPUT:
            scale, zero_point = node.args[1:]
            self.names[node] = self.writer.quantized_activation(self._tensor(node.args[0]), scale, zero_point, path)  # type: ignore[arg-type]
        elif node.target in IDENTITIES or node.target is PAD_SAME:  # the convolution says that
            self.names[node] = self._tensor(node.args[0])
        elif node.target is operator.getitem:
            self.names[node] = self.parts[node.args[0]][node.args[1]]  # type: ignore[index]
        elif node.target in OPERATIONS:
            written = OPERATIONS[node.target](Operation(self.writer, node, self._tensor, path))
            if isinstance(written, list):
                self.parts[node] = written
            else:
                self.names[node] = written
        else:
            raise UserError(f"{path or 'the model'}: the operation {node.target} can't be exported to ONNX yet.")

    def _tensor(self, value: Any) -> str:
        if not isinstance(value, fx.Node):
            return self.writer.constant("number", np.array(value, np.float32))
        if value not in self.names and value in self.traced.constants:
            self.names[value] = self.writer.constant(value.name, self.traced.constants[value].numpy())
        if value not in self.names:
            raise UserError(
                f"{module_path(value) or 'the model'}: computes with the images' size, which can't be exported; leave "
                "their size fixed."
            )
        return self.names[value]

    def _quantized_activation(self, node: fx.Node) -> str:
        source = self._tensor(node.args[0])
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
        if node.target is aten.linear.default:
            x = self._tensor(node.args[0])
            matrix = len(shape_of(node)) == 2
            # the bias of a Gemm is inside its integer kernel, that of a MatMul is an addition in float behind it
            names = [x, *layer.write(self.writer, path, self.input_scales.get(x) if matrix else None)]
            if matrix:
                return self.writer.node("Gemm", names, path, transB=1)
            self.writer.transpose_weight(names[1])
            product = self.writer.node("MatMul", names[:2], path)
            return self.writer.node("Add", [product, names[2]], path) if len(names) > 2 else product
        source, padding = _spatial_padding(node)
        padded: dict[str, Any] = {"auto_pad": "SAME_UPPER"} if source.target is PAD_SAME else {"pads": padding}
        x = self._tensor(source)
        names = [x, *layer.write(self.writer, path, self.input_scales.get(x))]
        operation = Operation(self.writer, node, self._tensor, path)
        name = self.writer.node(
            "Conv",
            names,
            path,
            kernel_shape=layer.weight.shape[2:],
            strides=_per_dimension(operation["stride"], layer.weight.ndim - 2),
            **padded,
            dilations=_per_dimension(operation["dilation"], layer.weight.ndim - 2),
            group=operation["groups"],
        )
        if layer.scale is not None and x in self.input_scales:
            self.integer_convolutions.add(name)
        return name

    def _layer(self, node: fx.Node) -> LayerWeights:
        weight_node = node.args[1]
        bias_node = node.args[2] if len(node.args) > 2 else None
        bias = None if bias_node is None else self._constant(bias_node).float().numpy()
        assert isinstance(weight_node, fx.Node)
        if weight_node not in self.traced.constants and weight_node.target is not FAKE_QUANTIZE:
            raise UserError(
                f"{module_path(node) or 'the model'}: a convolution whose weights are computed from the image "
                "(a conditional convolution) can't be exported; choose a network with fixed weights."
            )
        if weight_node.target is not FAKE_QUANTIZE:
            return LayerWeights(self._constant(weight_node).float().numpy(), bias, None)
        weight, scale = self._constant(weight_node.args[0]).float(), self._constant(weight_node.args[1]).float()
        low, high = _bounds(weight_node)
        if low < -128 or high > 127:
            raise UserError(f"{module_path(node)}: weights on the grid {low} … {high} can't be exported; int8 can.")
        # in units of the scale; a weight file of integers holds them rounded
        steps = weight / scale if self.writer.float_weights else torch.round(weight / scale)
        channels = len(weight)
        return LayerWeights(
            torch.clamp(steps, low, high).numpy(), bias, scale.flatten().expand(channels).contiguous().numpy()
        )

    def _batch_norm(self, node: fx.Node) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Factor and offset per channel of a BatchNorm in eval mode, in float64."""
        gamma, beta, mean, variance = (self._constant(argument).double().numpy() for argument in node.args[1:5])
        factor = gamma / np.sqrt(variance + node.args[7])
        return factor, beta - mean * factor

    def _constant(self, argument: Any) -> Tensor:
        return self.traced.constants[argument]

    def _quantize_outputs(self) -> None:
        """Put QDQ behind integer convolutions whose output is not quantized: where calibration has not been, as with
        NVIDIA's published weights, and for rounding that the simulation does before the activation."""
        writer = self.writer
        ranges = NeededRanges(writer.nodes, writer.initializers)
        for layer in [node for node in writer.nodes if node.name in self.integer_convolutions]:
            value = layer.output[0]
            consumers = [node for node in writer.nodes if value in node.input]
            if len(consumers) == 1 and consumers[0].op_type == "QuantizeLinear":
                continue
            needed = ranges.of(value)
            if needed is None:
                continue  # stays a float convolution on dequantized inputs
            low, high = torch.tensor(needed.low), torch.tensor(needed.high)
            scale, zero_point = scale_and_zero_point(high, AFFINE_UINT8, low)
            assert zero_point is not None
            name = f"{layer.name}.output"
            replacement = writer.quantized_activation(value, scale.item(), int(zero_point), name)
            for node in consumers:
                node.input[:] = [replacement if name == value else name for name in node.input]


def _spatial_padding(node: fx.Node) -> tuple[fx.Node, list[int]]:
    """A convolution's input and its padding as ONNX lists it (all begins, all ends), zeros padded before it included."""
    convolution = Operation(None, node, str, module_path(node))  # type: ignore[arg-type]
    source, padding = node.args[0], convolution["padding"]
    kernel = [int(size) for size in shape_of(node.args[1])[2:]]
    dims = len(kernel)
    if padding in ("same", "valid"):
        dilation = _per_dimension(convolution["dilation"], dims)
        totals = [(size - 1) * step * (padding == "same") for size, step in zip(kernel, dilation, strict=True)]
        begins = [total // 2 for total in totals]
        ends = [total - begin for total, begin in zip(totals, begins, strict=True)]
    else:
        begins, ends = _per_dimension(padding, dims), _per_dimension(padding, dims)
    assert isinstance(source, fx.Node)
    if source.target in (aten.pad.default, aten.constant_pad_nd.default):
        pad = Operation(None, source, str, "")  # type: ignore[arg-type]
        amounts = list(pad["pad"])
        constant = source.target is aten.constant_pad_nd.default or pad["mode"] == "constant"
        numbers = all(isinstance(amount, int) for amount in amounts)
        if constant and not pad["value"] and len(amounts) == 2 * dims and numbers and min(amounts) >= 0:
            for index in range(dims):  # PyTorch lists the last dimension first
                begins[dims - 1 - index] += amounts[2 * index]
                ends[dims - 1 - index] += amounts[2 * index + 1]
            return source.args[0], [*begins, *ends]  # type: ignore[return-value]
    return source, [*begins, *ends]


def _foldable(node: fx.Node) -> fx.Node | None:
    """The convolution whose only consumer is this BatchNorm in eval mode, or None."""
    if node.target is not aten.batch_norm.default or node.args[5]:
        return None
    source = node.args[0]
    if isinstance(source, fx.Node) and source.target in _CONVOLUTIONS and len(source.users) == 1:
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
    narrow = low >= -128 and high <= 127 and (low < 0 or dtype == "int8")
    zero_point = smallest + 128 if narrow else smallest - low
    if dtype == "int8" and zero_point != 0:
        raise UserError(
            f"{path}: this target takes no zero point, which activations on the grid {low} … {high} need; quantize "
            "with a symmetric preset."
        )
    return zero_point


def _per_dimension(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values * dims)[:dims]
