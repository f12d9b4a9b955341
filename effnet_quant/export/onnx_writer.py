"""OnnxWriter: writes a traced graph as ONNX, node by node, after the passes."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from effnet_quant.errors import UserError
from effnet_quant.export.custom_ops import CONV_PADDED, CONV_SAME, QUANTIZE, QUANTIZED_HARD_SIGMOID
from effnet_quant.export.graph_writer import GraphWriter
from effnet_quant.export.operation import Operation
from effnet_quant.export.operators import OPERATIONS
from effnet_quant.export.passes.convolution_padding import per_dimension
from effnet_quant.export.traced_graph import TracedGraph, argument, kind_of, module_path, shape_of
from effnet_quant.quantization.operation_kinds import Kind

aten = torch.ops.aten
_SIZES = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


class OnnxWriter:
    """Writes the operations of a graph.

    Args:
        traced: the graph.
        writer: takes the ONNX nodes.
        float_weights: store quantized weights as floats with a QuantizeLinear behind them.
        packs: store weights of 4 bits and fewer as INT4.
    """

    def __init__(self, traced: TracedGraph, writer: GraphWriter, *, float_weights: bool, packs: bool) -> None:
        self.traced = traced
        self.writer = writer
        self.float_weights = float_weights
        self.packs = packs
        self.names: dict[fx.Node, str] = {}
        self.parts: dict[fx.Node, list[str]] = {}  # of operations with several results

    def run(self, inputs: list[str]) -> list[str]:
        """Write every node; returns the names of the outputs.

        Args:
            inputs: for each input of the model, the name of the value that the first layers take.
        """
        self.names = dict(zip(self.traced.inputs, inputs, strict=True))
        for node in self.traced.operations():
            if not isinstance(node.meta.get("val"), _SIZES):  # ATen computes sizes; the file holds them as numbers
                self._write(node)
        return [self._tensor(node) for node in self.traced.outputs]

    def _write(self, node: fx.Node) -> None:
        path = module_path(node)
        if node.target is QUANTIZE:
            if node.args[0] not in self.traced.constants:
                grid = self.traced.grid(node)
                source = self._tensor(node.args[0])
                integers = (grid.zero_point, grid.low, grid.high)
                self.names[node] = self.writer.quantized(source, float(grid.scale), *integers, path)
        elif node.target is QUANTIZED_HARD_SIGMOID:
            scale = float(self.traced.constants[node.args[1]])  # type: ignore[index]
            self.names[node] = self.writer.quantized_hard_sigmoid(self._tensor(node.args[0]), scale, path)
        elif Kind.CONVOLVES in kind_of(node):
            self.names[node] = self._convolution(node, path)
        elif node.target is aten.linear.default:
            self.names[node] = self._linear(node, path)
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
        if "quantizer" in node.meta:  # layer comparison finds quantized values by this name
            self.names[node] = self.writer.rename(self.names[node], f"{node.meta['quantizer']}/DequantizeLinear")

    def _tensor(self, value: Any, like: fx.Node | None = None) -> str:
        """The ONNX name of a value. A Python number becomes a constant of the type of ``like`` (default: float32)."""
        if not isinstance(value, fx.Node):
            integers = like is not None and not like.meta["val"].is_floating_point()
            return self.writer.constant("number", np.array(value, np.int64 if integers else np.float32))
        if value not in self.names and value in self.traced.constants:
            self.names[value] = self.writer.constant(value.name, self.traced.constants[value].numpy())
        if value not in self.names and value.target is QUANTIZE:
            self.names[value] = self._stored(value, module_path(value))
        if value not in self.names:
            raise UserError(
                f"{module_path(value) or 'the model'}: computes with the images' size, which can't be exported; leave "
                "their size fixed."
            )
        return self.names[value]

    def _convolution(self, node: fx.Node, path: str) -> str:
        names = [self._tensor(node.args[0]), *self._parameters(node, path)]
        kernel = [int(size) for size in shape_of(node.args[1])[2:]]
        dims = len(kernel)
        if node.target is CONV_SAME:
            padded: dict[str, Any] = {"auto_pad": "SAME_UPPER"}
        elif node.target is CONV_PADDED:
            padded = {"pads": argument(node, "padding")}
        else:
            padded = {"pads": per_dimension(argument(node, "padding"), dims) * 2}
        dilation = 1 if node.target is CONV_SAME else argument(node, "dilation")
        return self.writer.node(
            "Conv",
            names,
            path,
            kernel_shape=kernel,
            strides=per_dimension(argument(node, "stride"), dims),
            **padded,
            dilations=per_dimension(dilation, dims),
            group=argument(node, "groups"),
        )

    def _linear(self, node: fx.Node, path: str) -> str:
        x, matrix = self._tensor(node.args[0]), len(shape_of(node)) == 2
        # MatMul takes (in, out). The constant itself is transposed: behind a Transpose node, runtimes compute in float
        names = [x, *self._parameters(node, path, transposed=not matrix)]
        if matrix:
            return self.writer.node("Gemm", names, path, transB=1)
        product = self.writer.node("MatMul", names[:2], path)
        return self.writer.node("Add", [product, names[2]], path) if len(names) > 2 else product

    def _parameters(self, node: fx.Node, path: str, *, transposed: bool = False) -> list[str]:
        """Write a layer's weights and bias; returns their names."""
        if self.traced.weights(node) is None:
            raise UserError(
                f"{path or 'the model'}: a convolution whose weights are computed from the image "
                "(a conditional convolution) can't be exported; choose a network with fixed weights."
            )
        product = transposed and not self.traced.is_byte(node.args[0])
        names = [self._parameter(node.args[1], f"{path}.weight", transposed=transposed, layer=True, product=product)]
        if len(node.args) > 2 and node.args[2] is not None:
            names.append(self._parameter(node.args[2], f"{path}.bias"))
        return names

    def _parameter(
        self, node: Any, path: str, *, transposed: bool = False, layer: bool = False, product: bool = False
    ) -> str:
        """Write a constant. ``layer``: it is a layer's weights; ``product``: of a MatMul that computes in float."""
        if node.target is QUANTIZE:
            return self._stored(node, path, transposed=transposed, layer=layer, product=product)
        value = self.traced.constants[node].float().numpy()
        return self.writer.constant(path, np.ascontiguousarray(value.T) if transposed else value)

    def _stored(
        self, node: fx.Node, path: str, *, transposed: bool = False, layer: bool = False, product: bool = False
    ) -> str:
        """Write a quantized constant as integers, with one scale for each index of its first dimension."""
        grid, value = self.traced.grid(node), self.traced.constants[node.args[0]].float()  # type: ignore[index]
        scale = grid.scale if not value.ndim else grid.scale.flatten().expand(len(value)).contiguous()
        steps = scale.double().reshape((-1,) + (1,) * (value.ndim - 1)) if value.ndim else scale.double()
        axis = 1 if transposed else 0
        if layer and self.float_weights and not product:
            if (grid.low, grid.high) != (-128, 127):  # QuantizeLinear saturates at the ends of int8
                value = torch.clamp(value, grid.low * steps, grid.high * steps).float()
            return self.writer.rounded(_oriented(value, transposed), scale.numpy(), path, axis)
        integers = torch.clamp(torch.round(value.double() / steps) + grid.zero_point, grid.low, grid.high)
        stored = _oriented(integers.to(_integer_type(grid.low, grid.high)), transposed)
        packed = self.packs and layer and grid.narrow
        if product and grid.zero_point == 0:
            return self.writer.scaled(stored, scale.numpy(), path, axis, packed=packed)
        return self.writer.dequantized(stored, scale.numpy(), grid.zero_point, path, axis, packed=packed)


def _oriented(value: torch.Tensor, transposed: bool) -> np.ndarray:
    return np.ascontiguousarray(value.numpy().T if transposed else value.numpy())


def _integer_type(low: int, high: int) -> torch.dtype:
    """The first of int8, uint8 and int32 that holds the grid."""
    for dtype in (torch.int8, torch.uint8):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32
