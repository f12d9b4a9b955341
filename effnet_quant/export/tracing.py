"""From a model to a flat graph of ATen operations in which every quantizer is one node."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from effnet_quant.errors import UserError
from effnet_quant.quantization.placement.insertion import quantizers, simulate_target
from effnet_quant.quantization.quantized_layers import QuantGate
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.targets import Target


@torch.library.custom_op("effnet_quant::fake_quantize", mutates_args=())
def fake_quantize_node(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Marks a quantizer in a traced graph; computes what the quantizer does."""
    return torch.clamp(torch.round(x / scale), low, high) * scale


@fake_quantize_node.register_fake
def _(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("effnet_quant::quantize_output", mutates_args=())
def quantize_output_node(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Marks the quantizer of an output in a traced graph; computes what it does."""
    return (torch.clamp(torch.round(x / scale) + zero_point, 0, 255) - zero_point) * scale


@quantize_output_node.register_fake
def _(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("effnet_quant::pad_same", mutates_args=())
def pad_same_node(x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:
    """Marks the zeros that TensorFlow's "SAME" puts around images of any size, one more at the end if their number is odd,
    before a convolution; puts them there."""
    pads: list[int] = []
    for size, length, step in zip(x.shape[-2:], kernel, stride, strict=True):
        missing = _padded(size, length, step) - size
        pads = [missing // 2, missing - missing // 2, *pads]  # PyTorch lists the last dimension first
    return F.pad(x, pads)


@pad_same_node.register_fake
def _(x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:
    sizes = [_padded(size, length, step) for size, length, step in zip(x.shape[-2:], kernel, stride, strict=True)]
    return x.new_empty([*x.shape[:-2], *sizes])


def _padded(size: Any, kernel: int, stride: int) -> Any:
    """The size at which a convolution's last step ends with the image."""
    return size if kernel == 1 else (size - 1) // stride * stride + kernel


PAD_SAME = torch.ops.effnet_quant.pad_same.default
QUANTIZE_OUTPUT = torch.ops.effnet_quant.quantize_output.default
FAKE_QUANTIZE = torch.ops.effnet_quant.fake_quantize.default


class _MarkedQuantizer(nn.Module):
    """Stands in for a TensorQuantizer while the model is traced; its bounds are the grid's, less the zero point."""

    scale: Tensor

    def __init__(self, name: str, quantizer: TensorQuantizer) -> None:
        super().__init__()
        zero_points = quantizer.zero_point.unique()
        if len(zero_points) > 1:
            raise UserError(f"{name}: a zero point per channel can't be exported; choose a symmetric grid.")
        low, high = quantizer.spec.bounds
        self.bounds = low - int(zero_points), high - int(zero_points)
        self.register_buffer("scale", quantizer.scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.bounds
        return fake_quantize_node(x, self.scale, low, high)


class _MarkedOutput(nn.Module):
    """Stands in for the quantizer of an output."""

    def __init__(self, scale: float, zero_point: int) -> None:
        super().__init__()
        self.scale, self.zero_point = scale, zero_point

    def forward(self, x: Tensor) -> Tensor:
        return quantize_output_node(x, self.scale, self.zero_point)


def _mark(name: str, quantizer: TensorQuantizer) -> nn.Module:
    if quantizer.role == "output":
        return _MarkedOutput(quantizer.scale.item(), int(quantizer.zero_point))
    return _MarkedQuantizer(name, quantizer)


class _MarkedSameConv(nn.Module):
    """Stands in for timm's Conv2dSame. What that computes of the image's size, torch.export can't trace in sensible time if
    the size is open."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._input_quantizer = getattr(conv, "_input_quantizer", nn.Identity())
        self._weight_quantizer = getattr(conv, "_weight_quantizer", nn.Identity())
        self.kernel, self.stride, self.groups = list(conv.kernel_size), list(conv.stride), conv.groups

    def forward(self, x: Tensor) -> Tensor:
        x = pad_same_node(self._input_quantizer(x), self.kernel, self.stride)
        return F.conv2d(x, self._weight_quantizer(self.weight), self.bias, self.stride, groups=self.groups)


def _pads_same(module: nn.Module) -> bool:
    """Whether it is timm's Conv2dSame or its quantized twin, in a form for which ONNX Runtime computes the padding: not
    dilated, and stepping over no pixel that it might have to pad."""
    if type(module).__name__ not in ("Conv2dSame", "QuantConv2dSame") or not isinstance(module, nn.Conv2d):
        return False
    steps = zip(module.kernel_size, module.stride, strict=True)
    return module.dilation == (1, 1) and all(kernel == 1 or kernel >= stride for kernel, stride in steps)


class TracedModel:
    """The operations of a model in eval mode, in order, with its parameters and buffers as constants.

    Attributes:
        nodes: the graph's nodes; each ``call_function`` node has an ATen overload or ``FAKE_QUANTIZE``, ``QUANTIZE_OUTPUT``
            or ``PAD_SAME`` as target.
        constants: the value of every placeholder node but the input's, as float32 (or integer) CPU tensors.
        input: the placeholder of the images.
        output: the node that computes the logits.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        signature = program.graph_signature
        values = {**dict(program.state_dict), **program.constants}
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        names.update(signature.inputs_to_lifted_tensor_constants)
        self.nodes = list(program.graph.nodes)
        self.constants: dict[fx.Node, Tensor] = {}
        for node in self.nodes:
            if node.op != "placeholder":
                continue
            if node.name in names:
                self.constants[node] = values[names[node.name]].detach().cpu()
            else:
                self.input = node
        output_node = next(node for node in self.nodes if node.op == "output")
        self.output: fx.Node = output_node.args[0][0]

    def fold_constant(self, node: fx.Node) -> bool:
        """Compute ``node`` and count it among the constants, if it depends on no input; says whether it did."""
        if any(value not in self.constants for value in node.all_input_nodes):
            return False
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda value: self.constants[value])
        self.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return True


@torch.no_grad()
def image_channels(model: nn.Module, image_size: int) -> int:
    """Channels of the images that a model takes: those of its first convolution, unless the images reach that transformed
    (by a cosine transform, say) and the model takes 3."""
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    if first == 3:
        return first
    probed = copy.deepcopy(model).cpu().float().eval()
    for channels in (first, 3):
        try:
            probed(torch.zeros(1, channels, image_size, image_size))
        except Exception:  # whatever a model's own code raises at images of another shape
            continue
        return channels
    return first


def trace(
    model: nn.Module, target: Target, image_size: int, in_channels: int = 3, *, dynamic_size: bool = False
) -> TracedModel:
    """Trace ``model``, with the quantizers that ``target`` wants, on an image batch of dynamic size, with
    ``dynamic_size`` on images of any height and width too; the
    model itself is left untouched.

    Raises:
        UserError: the model has quantizers without ranges, can't be traced, or takes images of one size only.
    """
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
        if isinstance(module, TensorQuantizer) and module.role != "gate":
            marked.set_submodule(name, _mark(name, module) if module.rounds else nn.Identity())
        elif isinstance(module, QuantGate):
            marked.set_submodule(name, module.activation())
    if dynamic_size:
        for name, module in list(marked.named_modules()):
            if _pads_same(module):
                marked.set_submodule(name, _MarkedSameConv(module))
    images = torch.zeros(2, in_channels, image_size, image_size)
    dimensions = {0: torch.export.Dim("batch", min=1)}
    if dynamic_size:
        dimensions |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    try:
        with torch.no_grad():
            program = torch.export.export(marked, (images,), dynamic_shapes=(dimensions,), strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the model can't be traced at {image_size} px: {reason}; is the image size large enough for it?"
        ) from error
    traced = TracedModel(program)
    open_sizes = [isinstance(size, torch.SymInt) for size in traced.input.meta["val"].shape[2:]]
    if dynamic_size and not (
        all(open_sizes) and _runs(marked, images.new_zeros(1, in_channels, image_size + 32, image_size))
    ):
        raise UserError(f"the model takes images of {image_size} px only; export it without a dynamic size.")
    return traced


def _runs(model: nn.Module, images: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(images)
    except RuntimeError:
        return False
    return True


def module_path(node: fx.Node) -> str:
    """Dotted name of the module that a node comes from, e.g. "stem.conv"."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths else ""
