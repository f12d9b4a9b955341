"""Cross-layer equalization (Nagel et al. 2019): scales channels between layers, so that rounding costs less.

The network computes the same in float. Where layers write a channel and others read it, the first divide it by a scale and
the others multiply it. The channels of an activation share one range: a channel as small as a step of the grid gains from
being larger, and the weights that read it lose a little. The scales minimise the noise of both in the network's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from effnet_quant.errors import UserError
from effnet_quant.quantization.eager_evaluation import Batch, eager_pass
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.ptq.blocks import traced_graph
from effnet_quant.quantization.ptq.high_bias_absorption import absorb_high_biases
from effnet_quant.quantization.ptq.step import DEFAULT_CONTEXT, StepContext, batches_on, checked_batches
from effnet_quant.quantization.ptq.streams import CEILING, Layer, Streams, find_streams
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.structure import leaves

_LARGEST_SCALE = 32.0
_AT_A_TIME = 16  # examples whose activations are in memory for the backward pass


@dataclass(frozen=True)
class Equalization:
    """Scales the channels between the layers of a model, where the float network then computes the same.

    Scales pass ReLU, pooling, residual additions, concatenations and the products of squeeze-and-excitation. Through a
    ReLU6 they pass only with ``headroom``. They do not pass SiLU or hard-swish, which are not
    homogeneous. Names and shapes in the state dict stay, and a BatchNorm stays a BatchNorm.

    It runs before calibration. A model with nothing to scale stays as it is, and ``context.progress`` gets a note.

    Attributes:
        examples: calibration examples to use.
        iterations: steps of Adam in which the scales are found.
        headroom: channels before a ReLU6 stay below its ceiling divided by this on the examples, and those that do not
            already keep their scale. None leaves all channels before a ReLU6 as they are: on other images some channels have
            many times their largest value on the examples, and a raised channel is cut off sooner.
    """

    examples: int = 64
    iterations: int = 100
    headroom: float | None = None

    def __call__(self, model: nn.Module, batches: Sequence[Batch], context: StepContext = DEFAULT_CONTEXT) -> None:
        equalize(model, batches, context, self)


def equalize(
    model: nn.Module,
    batches: Sequence[Batch],
    context: StepContext = DEFAULT_CONTEXT,
    how: Equalization = Equalization(),
) -> int:
    """Do what ``Equalization`` does. Returns how many channels were scaled.

    Raises:
        UserError: the model has ranges already, it can't be traced, or the batches can't be used.
    """
    batches = checked_batches(model, batches)
    if any(quantizer.enabled for _, quantizer in quantizers(model)):
        raise UserError("equalization changes the ranges; run it before the model is calibrated.")
    graph = traced_graph(model)
    streams = find_streams(model, graph, batches[0])
    if streams.fixed.all():
        context.progress("equalization: nothing to scale", 1, 1)
        return 0
    seen, weights = _observed(model, streams, batches, context, how.examples)
    scales = _best_scales(streams, seen, weights, how, context)
    apply_scales(streams, scales)
    lows = {
        node: channels.low.cpu() / scales[torch.from_numpy(streams.channels[node])] for node, channels in seen.items()
    }
    absorb_high_biases(model, streams, lows)
    return int((scales != 1).sum())


def apply_scales(streams: Streams, scales: Tensor) -> None:
    """Divide the channels of each stream by its scale, of shape (number of streams,)."""
    for layer in streams.layers:
        device = layer.module.weight.device
        layer.scale_output((1 / scales[torch.from_numpy(layer.writes)]).to(device))
        layer.scale_input(scales[torch.from_numpy(layer.input_streams())].to(device))


@dataclass
class _Seen:
    """What calibration examples showed of a value's channels, each (C,).

    Attributes:
        low, high: smallest and largest value.
        sensitivity: sum of the squared derivatives of the outputs; zeros are left out, because they are exact in any grid.
        most: sum of their products with the squared values: the noise if all values were rounded to zero.
    """

    low: Tensor
    high: Tensor
    sensitivity: Tensor
    most: Tensor


def _observed(
    model: nn.Module, streams: Streams, batches: Sequence[Batch], context: StepContext, most: int
) -> tuple[dict[fx.Node, _Seen], dict[Layer, Tensor]]:
    """The extremes of each value's channels, and how much noise in them or in the weights changes the outputs.

    A product of the outputs with random signs has a gradient whose square is, on average, the sum of the squares of all
    outputs' derivatives (Hutchinson). Each output counts in parts of its energy.
    """
    values = {node for sources in streams.rounded.values() for node in sources} | {*streams.clipped, *streams.rectified}
    observer = _Observer(model, streams.graph, {node for node in values if len(streams.channels[node])})
    generator = torch.Generator().manual_seed(context.seed)
    parameters: dict[Layer, nn.Parameter] = {layer: layer.module.weight for layer in streams.layers}  # type: ignore[misc]
    pieces = [
        piece for batch in batches for piece in (batch.split(_AT_A_TIME) if isinstance(batch, Tensor) else [batch])
    ]
    weights: dict[Layer, Tensor] = {}
    done = 0
    with eager_pass(model), _gradients_of(model, list(parameters.values())), torch.enable_grad():
        for arguments, examples in batches_on(model, pieces):
            if done >= most:
                break
            context.progress("equalization", done, most)
            wanting = tuple(
                value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
                for value in arguments
            )
            outputs = [value for value in leaves(observer.run(*wanting)).values() if value.requires_grad]
            total = sum(
                (value.float() * _signs(value, generator)).sum()
                / value.detach().float().square().mean().sqrt().clamp(min=1e-12)
                for value in outputs
            )
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
            for layer, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    weights[layer] = weights.get(layer, 0.0) + gradient.square()
            done += examples
    return observer.found, weights


def _signs(value: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, value.shape, generator=generator).to(value.device) * 2 - 1).to(value.dtype)


@contextmanager
def _gradients_of(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Within it only these weights have gradients."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)


class _Observer(fx.Interpreter):
    """Notes what ``_Seen`` holds of some nodes."""

    def __init__(self, model: nn.Module, graph: fx.Graph, nodes: set[fx.Node]) -> None:
        super().__init__(fx.GraphModule(model, graph))
        self._nodes = nodes
        self.found: dict[fx.Node, _Seen] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n not in self._nodes:
            return value
        others = [dimension for dimension in range(value.dim()) if dimension != 1]
        low, high = value.detach().amin(others), value.detach().amax(others)
        if n not in self.found:
            self.found[n] = _Seen(low, high, torch.zeros_like(low), torch.zeros_like(low))
        seen = self.found[n]
        seen.low, seen.high = torch.minimum(seen.low, low), torch.maximum(seen.high, high)

        own = value.detach().clone()  # a later operation may overwrite the value

        def note(gradient: Tensor) -> None:
            squared = gradient.square()
            seen.sensitivity.add_((squared * (own != 0)).sum(others))
            seen.most.add_((squared * own.square()).sum(others))

        if value.requires_grad:
            value.register_hook(note)
        return value


Term = Callable[[Tensor], Tensor]


def _best_scales(
    streams: Streams, seen: dict[fx.Node, _Seen], weights: dict[Layer, Tensor], how: Equalization, context: StepContext
) -> Tensor:
    """The scales with the least noise, 1 where a stream is fixed."""
    terms = [_weight_noise(layer, weights[layer]) for layer in streams.layers if layer in weights and _rounds(layer)]
    for quantizer, nodes in streams.rounded.items():
        if quantizer.simulated:
            terms += [_activation_noise(streams, node, seen[node], quantizer) for node in nodes if node in seen]
    fixed = torch.from_numpy(streams.fixed).clone()
    lowest = torch.full(fixed.shape, -math.log(_LARGEST_SCALE))
    for node in streams.clipped:
        channels = torch.from_numpy(streams.channels[node])
        if how.headroom is None:
            fixed[channels] = True
            continue
        share = seen[node].high.float().cpu() * how.headroom / CEILING
        fixed[channels[share >= 1]] = True
        lowest[channels] = torch.maximum(lowest[channels], share.clamp(min=1e-9).log())
    logs = nn.Parameter(torch.zeros(len(fixed)))
    optimizer = torch.optim.Adam([logs])
    with torch.enable_grad():
        for step in range(how.iterations):
            if step % 10 == 0:
                context.progress("scales", step, how.iterations)
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / how.iterations)
            noise = torch.stack([term(logs) for term in terms]).sum()
            if step == 0:
                start = noise.item()
            optimizer.zero_grad()
            (noise / start).backward()
            optimizer.step()
            with torch.no_grad():
                logs.copy_(torch.where(fixed, 0, torch.maximum(logs, lowest).clamp(max=math.log(_LARGEST_SCALE))))
    return logs.detach().exp()


def _rounds(layer: Layer) -> bool:
    quantizer = layer.module._weight_quantizer
    return isinstance(quantizer, TensorQuantizer) and quantizer.simulated


def _weight_noise(layer: Layer, sensitivity: Tensor) -> Term:
    """Noise of rounded weights: the square of the channel's step times the sensitivity of its weights."""
    weight, sensitivity = (
        values.detach().float().cpu().reshape(*values.shape[:2], -1) for values in (layer.module.weight, sensitivity)
    )
    largest, sensitivity = weight.abs().amax(2), sensitivity.sum(2)
    quantizer = layer.module._weight_quantizer
    assert isinstance(quantizer, TensorQuantizer)
    spec = quantizer.spec
    channels = torch.from_numpy(layer.input_streams())
    rows = channels[:1] if bool((channels == channels[:1]).all()) else channels
    factor = 1 / (12 * spec.bounds[1] ** 2)

    def noise(logs: Tensor) -> Tensor:
        scales = logs[rows].exp()
        steps = (largest * scales).amax(1 if spec.per_channel else (0, 1), keepdim=True)
        return factor * (steps.square() * (sensitivity / scales.square())).sum()

    return noise


def _activation_noise(streams: Streams, node: fx.Node, seen: _Seen, quantizer: TensorQuantizer) -> Term:
    """Noise of a rounded value: the square of its step times the sensitivity of its channels."""
    low, high = seen.low.float().cpu().clamp(max=0), seen.high.float().cpu().clamp(min=0)
    sensitivity, most, spec = seen.sensitivity.float().cpu(), seen.most.float().cpu(), quantizer.spec
    channels = torch.from_numpy(streams.channels[node])

    def noise(logs: Tensor) -> Tensor:
        scales = logs[channels].exp()
        if spec.symmetric:
            step = ((torch.maximum(-low, high) if spec.signed else high) / scales).amax() / spec.bounds[1]
        else:
            step = ((high / scales).amax() - (low / scales).amin()) / (spec.bounds[1] - spec.bounds[0])
        rounding = step.square() / 12 * scales.square() * sensitivity
        return (rounding * most / (rounding + most).clamp(min=1e-30)).sum()

    return noise
