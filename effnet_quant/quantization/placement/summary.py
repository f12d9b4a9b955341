"""summarize: what of a quantized model is 8-bit, what stays in float and why, and what export refuses."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from effnet_quant.errors import UserError
from effnet_quant.quantization.eager_evaluation import eager_pass
from effnet_quant.quantization.placement.symbolic_trace import trace_operations
from effnet_quant.quantization.quantizer import TensorQuantizer

_NO_8_BIT_FORM = (
    nn.Conv1d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Bilinear,
)
# torch.export takes them apart into operations that the writer does not know
NOT_EXPORTED = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
_WEIGHTS_OF_ITS_OWN = "a function, whose weights no quantizer sees; nn.Conv2d or nn.Linear would be quantized"
_TWO_ACTIVATIONS = "a product of two activations"
_FUNCTIONS: dict[Callable[..., object], str] = {
    **{function: _WEIGHTS_OF_ITS_OWN for function in (F.conv1d, F.conv2d, F.conv3d, F.linear, F.bilinear)},
    **{function: _WEIGHTS_OF_ITS_OWN for function in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)},
    **{function: _TWO_ACTIVATIONS for function in (torch.matmul, torch.bmm, torch.baddbmm, operator.matmul)},
    F.scaled_dot_product_attention: _TWO_ACTIVATIONS,
}
_OPERATIONS = ("add", "mul", "concat", "pool")
_SHOWN = 3  # names of modules in one place of the text


@dataclass(frozen=True)
class FloatPart:
    """Layers or operations of one kind that stay in float.

    Attributes:
        kind: class of the layers, or name of the function.
        reason: why they stay in float.
        names: the layers, or the modules that call the function.
    """

    kind: str
    reason: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.names)} {self.kind} ({_listed(self.names)}): {self.reason}"


@dataclass(frozen=True, repr=False)
class QuantizationSummary:
    """What of a model is quantized. ``print`` shows three lines.

    Attributes:
        quantized: how many layers and operations have quantized operands, by kind.
        weights: share of the model's parameters that are quantized, 0 … 1.
        in_float: what computes in float, although it multiplies or adds as quantized layers do.
        refused: layers that ``export_onnx`` can't write, with their class.
    """

    quantized: dict[str, int]
    weights: float
    in_float: tuple[FloatPart, ...]
    refused: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.quantized.items())
        in_float = "; ".join(map(str, self.in_float)) or "nothing that multiplies or adds"
        refused = ", ".join(f"{name} ({kind})" for name, kind in self.refused)
        return (
            f"quantized: {counts}; {100 * self.weights:.1f} % of the weights\n"
            f"in float: {in_float}\n"
            f"export: {f'ONNX has no form for {refused}' if refused else 'no layer is known to be in the way'}"
        )


def summarize(model: nn.Module) -> QuantizationSummary:
    """Say what ``quantize`` did to ``model``.

    Raises:
        UserError: the model has no quantizers.
    """
    modules = dict(model.named_modules())
    if not any(isinstance(module, TensorQuantizer) for module in modules.values()):
        raise UserError("the model has no quantizers; call quantize(model) first.")
    layers = {name: module for name, module in modules.items() if hasattr(module, "_weight_quantizer")}
    integer = {name: layer for name, layer in layers.items() if _is_quantized(layer)}
    parts: dict[tuple[str, str], list[str]] = {}

    def note(kind: str, reason: str, name: str) -> None:
        parts.setdefault((kind, reason), []).append(name or "the model")

    for name, layer in layers.items():
        if name not in integer:
            note(_kind(layer), "the spec or the runtime leaves it in float", name)
    for name, module in modules.items():
        if isinstance(module, _NO_8_BIT_FORM):
            note(type(module).__name__, "a kind of layer that has no 8-bit form here", name)
        elif name.rpartition(".")[0] not in layers and _counts_as_operation(name, module, simulated=False):
            note(str(module.operation), "the runtime computes it in float", name)
    with eager_pass(model):
        graph, opaque = trace_operations(model)
    for kind, reason, name in _functions(graph):
        note(kind, reason, name)
    for name in opaque if graph is not None else [""]:
        note("part", "it can't be traced; its layers are quantized, what happens between them is not", name)
    total = sum(parameter.numel() for parameter in model.parameters())
    quantized = sum(parameter.numel() for parameter in {layer.weight for layer in integer.values()})
    return QuantizationSummary(
        dict(Counter(map(_kind, integer.values())) + _operations(modules)),
        quantized / max(total, 1),
        tuple(FloatPart(kind, reason, tuple(names)) for (kind, reason), names in parts.items()),
        tuple(refused_by_export(model)),
    )


def refused_by_export(model: nn.Module) -> list[tuple[str, str]]:
    """Names and classes of the layers that ``export_onnx`` can't write."""
    return [
        (name or "the model", type(module).__name__)
        for name, module in model.named_modules()
        if isinstance(module, NOT_EXPORTED)
    ]


def _is_quantized(layer: nn.Module) -> bool:
    operands = (layer._input_quantizer, layer._weight_quantizer)
    return all(isinstance(operand, TensorQuantizer) and operand.simulated for operand in operands)


def _kind(layer: nn.Module) -> str:
    return "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"


def _operations(modules: dict[str, nn.Module]) -> Counter[str]:
    """How many operations beside convolutions and linear layers have quantized operands."""
    return Counter(
        str(module.operation)
        for name, module in modules.items()
        if _counts_as_operation(name, module, simulated=True) and module.operation in _OPERATIONS
    )


def _counts_as_operation(name: str, module: nn.Module, *, simulated: bool) -> bool:
    """Whether the module is the quantizer of an operand; of a product's two, the first one counts."""
    is_operand = isinstance(module, TensorQuantizer) and module.role == "input" and module.simulated is simulated
    return is_operand and not name.rpartition(".")[2].startswith("mul_b_quantizer")


def _functions(graph: fx.Graph | None) -> Iterable[tuple[str, str, str]]:
    """Kind, reason and calling module of the functions in a graph that multiply in float."""
    for node in () if graph is None else graph.nodes:
        target = torch.matmul if node.op == "call_method" and node.target in ("matmul", "__matmul__") else node.target
        if node.op in ("call_function", "call_method") and target in _FUNCTIONS:
            yield getattr(target, "__name__", str(target)), _FUNCTIONS[target], _caller(node)


def _caller(node: fx.Node) -> str:
    """The module that holds the nearest layer before ``node``: a traced forward no longer says which module calls what."""
    reached, seen = [node], {node}
    for before in reached:
        if before.op == "call_module":
            return str(before.target).rpartition(".")[0]
        reached += [one for one in before.all_input_nodes if one not in seen]
        seen.update(before.all_input_nodes)
    return ""


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
