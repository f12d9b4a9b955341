"""Traces a model to a TracedGraph: a flat graph of ATen operations in which each quantizer is one node."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from effnet_quant.errors import UserError
from effnet_quant.export.custom_ops import conv_same, quantize
from effnet_quant.export.traced_graph import TracedGraph
from effnet_quant.quantization.placement.insertion import quantizers, simulate_target
from effnet_quant.quantization.placement.summary import refused_by_export
from effnet_quant.quantization.quantized_layers import QuantGate
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.targets import Target

BATCH = 2  # of the traced inputs, because torch.export fixes sizes of 1


class _MarkedQuantizer(nn.Module):
    """Stands in for a quantizer while the model is traced."""

    scale: Tensor

    def __init__(self, scale: Tensor, zero_point: int, low: int, high: int) -> None:
        super().__init__()
        self.integers = zero_point, low, high
        self.register_buffer("scale", scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        return quantize(x, self.scale, *self.integers) if isinstance(x, Tensor) else x


class _MarkedSameConv(nn.Module):
    """Stands in for timm's Conv2dSame while the model is traced.

    Conv2dSame computes its padding from the image size. With an open size torch.export takes too long to trace that.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._input_quantizer = getattr(conv, "_input_quantizer", nn.Identity())
        self._weight_quantizer = getattr(conv, "_weight_quantizer", nn.Identity())
        self.stride, self.groups = list(conv.stride), conv.groups

    def forward(self, x: Tensor) -> Tensor:
        x = self._input_quantizer(x)
        return conv_same(x, self._weight_quantizer(self.weight), self.bias, self.stride, self.groups)


def _pads_same(module: nn.Module) -> bool:
    """Whether ``module`` is a Conv2dSame of timm, float or quantized, whose padding ONNX Runtime can compute.

    ONNX Runtime can if there is no dilation and the stride skips no pixels, or the kernel has size 1.
    """
    if type(module).__name__ not in ("Conv2dSame", "QuantConv2dSame") or not isinstance(module, nn.Conv2d):
        return False
    steps = zip(module.kernel_size, module.stride, strict=True)
    return module.dilation == (1, 1) and all(kernel == 1 or kernel >= stride for kernel, stride in steps)


def trace_image(
    model: nn.Module, target: Target, image_size: int, in_channels: int = 3, *, dynamic_size: bool = False
) -> TracedGraph:
    """Trace ``model`` on square images, with an open batch and the quantizers of ``target``; ``model`` stays unchanged.

    With ``dynamic_size`` height and width stay open too.

    Raises:
        UserError: the model has quantizers without ranges or a layer that no file holds, can't be traced, or takes images of
            one size only.
    """
    marked = _marked(model, target, same_convolutions=dynamic_size)
    images = torch.zeros(BATCH, in_channels, image_size, image_size)
    dimensions: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if dynamic_size:
        dimensions |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    try:
        traced = _traced(marked, (images,), (dimensions,))
    except Exception as error:  # whatever a model's own code raises, and torch.export
        why = _reason(marked, error)
        if _wants_other_dimensions(error):
            why += "; if it takes no square images, give examples of its arguments as inputs="
        elif _is_about_sizes(error):
            why += "; is the image size large enough for it?"
        raise UserError(f"the model can't be traced at {image_size} px: {why}") from error
    open_sizes = [isinstance(size, torch.SymInt) for size in traced.inputs[0].meta["val"].shape[2:]]
    if dynamic_size and not (
        all(open_sizes) and _runs(marked, images.new_zeros(1, in_channels, image_size + 32, image_size))
    ):
        raise UserError(f"the model takes images of {image_size} px only; export it without a dynamic size.")
    return traced


def trace_inputs(model: nn.Module, target: Target, examples: tuple[Tensor, ...]) -> TracedGraph:
    """Trace ``model`` on ``examples``, with the quantizers of ``target``; ``model`` stays unchanged.

    The batch is the first dimension of the first input, and of each other input of the same length. It stays open,
    unless the model accepts only the examples' length.

    Raises:
        UserError: the model has quantizers without ranges, or can't be traced.
    """
    marked = _marked(model, target)
    own = tuple(_cpu(example) for example in examples)
    batch = own[0].shape[0] if own[0].ndim else 0
    batched = [bool(batch) and example.ndim > 0 and example.shape[0] == batch for example in own]
    while any(batched):
        given = tuple(_rows(one) if varies else one for one, varies in zip(own, batched, strict=True))
        dimensions = tuple({0: torch.export.Dim.AUTO} if varies else None for varies in batched)
        try:
            traced = _traced(marked, given, dimensions)
        except Exception:  # whatever the model's own code raises at another batch than the example's, and torch.export
            break
        free = [_first_is_open(node) for node in traced.inputs]
        if free == batched:
            return traced
        batched = free  # the rest keeps the size of its example
    try:
        return _traced(marked, own, (None,) * len(own))
    except Exception as error:
        raise UserError(f"the model can't be traced: {_reason(marked, error)}") from error


def _first_is_open(node: fx.Node) -> bool:
    """Whether the first dimension of a traced value is open. torch.export may have bound its symbol to a number."""
    shape = node.meta["val"].shape
    return bool(shape) and isinstance(shape[0], torch.SymInt) and not shape[0].node.expr.is_number


def _cpu(example: Tensor) -> Tensor:
    example = example.detach().cpu().contiguous()
    return example.float() if example.is_floating_point() else example


def _rows(example: Tensor) -> Tensor:
    """The example, repeated along the batch if it has fewer than BATCH rows."""
    return example if len(example) >= BATCH else torch.cat([example] * BATCH)[:BATCH]


def _marked(model: nn.Module, target: Target, *, same_convolutions: bool = False) -> nn.Module:
    """A copy of ``model`` in which each quantizer of ``target`` is one ``quantize`` operation."""
    for name, kind in refused_by_export(model):
        raise UserError(f"{name}: an ONNX file can't hold a layer of the kind {kind}; export the part without it.")
    marked = simulate_target(copy.deepcopy(model), target)
    wanted = {name: quantizer for name, quantizer in quantizers(marked) if quantizer.simulated}
    missing = [name for name, quantizer in wanted.items() if not quantizer.calibrated]
    if missing:
        raise UserError(
            f"{len(missing)} quantizers have no range yet ({', '.join(missing[:3])}, …); "
            "calibrate the model or load quantized weights before exporting it."
        )
    marked = marked.cpu().float().eval().to(memory_format=torch.contiguous_format)
    for name, module in list(marked.named_modules()):
        twin: nn.Module = nn.Identity()
        if isinstance(module, TensorQuantizer):
            if module.role == "gate":  # replaced together with its QuantGate
                continue
            if module.rounds:
                zero_points = module.zero_point.unique()
                if len(zero_points) > 1:
                    raise UserError(f"{name}: a zero point per channel can't be exported; choose a symmetric grid.")
                twin = _MarkedQuantizer(module.scale, int(zero_points), *module.spec.bounds)
        elif isinstance(module, QuantGate):
            twin = module.activation()
        else:
            continue
        marked.set_submodule(name, twin)
    if same_convolutions:
        for name, module in list(marked.named_modules()):
            if _pads_same(module):
                marked.set_submodule(name, _MarkedSameConv(module))
    return marked


def _traced(model: nn.Module, examples: tuple[Tensor, ...], dimensions: tuple[Any, ...]) -> TracedGraph:
    with torch.no_grad(), quiet(), _plain_attention():
        program = torch.export.export(model, examples, dynamic_shapes=_by_parameter(model, dimensions), strict=False)
    signature = program.graph_signature
    values = {**dict(program.state_dict), **program.constants}
    graph = program.graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs, constants = [], {}
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        else:
            constants[node] = values[str(spec.target)].detach().cpu()
    output = graph.output_node()
    results = zip(output.args[0], signature.output_specs, strict=True)
    outputs = tuple(value for value, spec in results if spec.kind is OutputKind.USER_OUTPUT)
    for value in outputs:
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
            raise UserError(f"it returns {value!r} beside tensors; return tensors, or tuples, lists or dicts of them.")
    output.args = (outputs,)
    structure = pytree.tree_unflatten(range(len(outputs)), program.call_spec.out_spec)
    return TracedGraph(graph, inputs, constants, structure)


def _by_parameter(model: nn.Module, dimensions: tuple[Any, ...]) -> tuple[Any, ...]:
    """``dimensions`` with one entry per parameter of forward, as torch.export wants them: ``*args`` is one parameter."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return dimensions
    own = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*dimensions[:own], dimensions[own:])


def _runs(model: nn.Module, images: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(images)
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch.export and what takes its graphs. They print much about a model that they can't take."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Have nn.MultiheadAttention compute with operations that a file can hold, not with its fused one."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _reason(model: nn.Module, error: Exception) -> str:
    """Name of the innermost module whose forward was running, and the first line of the error."""
    names = {id(module): name for name, module in model.named_modules()}
    where, frame = "", error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        where = names.get(id(owner), where) if frame.tb_frame.f_code.co_name == "forward" else where
        frame = frame.tb_next
    said = _first_line(error)
    if "data-dependent" in said:
        said = (
            "its Python code decides by the values of a tensor, which a file can't; use torch.where, or export the part "
            "before that"
        )
    return f"{where}: {said}" if where else said


def _wants_other_dimensions(error: Exception) -> bool:
    """Whether a layer got another number of dimensions or channels than it takes, as Conv1d and Conv3d do of images."""
    return bool(re.search(r"expected .*(\b[1-6]-?d\b|\bchannels\b)", _first_line(error).lower()))


def _is_about_sizes(error: Exception) -> bool:
    """Whether an operation failed because of a tensor's size."""
    text = _first_line(error).lower()
    branches = "data-dependent" in text  # torch.export lists "size-like symbols" there
    return isinstance(error, RuntimeError) and not branches and any(word in text for word in ("size", "shape"))
