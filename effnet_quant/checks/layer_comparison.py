"""Compares engine and simulation at every quantizer, to find the first layer that departs."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from effnet_quant.engines.engine import Engine
from effnet_quant.engines.onnx_file import load_onnx, read_onnx
from effnet_quant.engines.onnxruntime import library, session_options
from effnet_quant.engines.openvino import compile_properties, shared_core
from effnet_quant.errors import UserError
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.qat import float_teacher

_MARK = re.compile(r"(.+)/DequantizeLinear(?:_(\d+))?")
# Below this ratio a layer departs from the simulation; float rounding alone stays above it.
FAITHFUL_DB = 30.0


@dataclass(frozen=True)
class LayerRow:
    """One quantized value. Ratios are signal to quantization noise in decibels, inf if equal.

    Attributes:
        name: the quantizer, with the number of the use if several values share its range; or an output.
        by_itself: engine against a simulation that gets the engine's values behind all earlier quantizers. Differences of
            earlier layers, which a network may amplify, are thus left out.
        engine_to_simulation: engine against simulation.
        simulation_to_float: simulation against the float network.
    """

    name: str
    by_itself: float
    engine_to_simulation: float
    simulation_to_float: float


@torch.no_grad()
def compare_layers(
    engine: Engine, simulation: nn.Module, inputs: Tensor | Sequence[Tensor], pixels: Tensor | None = None
) -> list[LayerRow]:
    """Compare the values behind every activation quantizer of the engine's file, in the file's order, and the outputs.

    The engine's runtime computes these values as further outputs of the file, in the engine's precision. It can't fuse
    operations across such an output, so an error of a fusion may stay hidden.

    Args:
        engine: of ONNX Runtime or OpenVINO.
        simulation: the model that the file was exported from, in eval mode on the CPU.
        inputs: one batch of the model's arguments; images are (N, C, H, W), normalised.
        pixels: the same images as uint8, for a file that normalises them itself.

    Raises:
        UserError: the runtime can't show intermediate values, or the file has no quantizer of this model.
    """
    path = engine.path
    if not shows_layers(engine):
        raise UserError(f"{engine.backend} shows no values in between; compare {path} in ONNX Runtime or OpenVINO.")
    proto = load_onnx(path)
    known = dict(quantizers(simulation))
    uses: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for node in proto.graph.node:
        mark = _MARK.fullmatch(node.output[0])
        if mark and mark[1] in known:
            uses[mark[1]].append((int(mark[2] or 0), node.output[0]))
    wanted = [output for name in uses for _, output in sorted(uses[name])]
    if not wanted:
        raise UserError(f"{path} has no quantized layers of this model to compare; was it exported from another one?")
    for name in wanted:
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    fed = (pixels,) if pixels is not None and engine.input.dtype == "uint8" else arguments
    compute = _in_openvino if engine.backend == "openvino" else _in_onnxruntime
    # in the order in which the model returns them
    outputs = [value.name for value in engine.outputs]
    wanted = [*outputs, *wanted]
    computed = compute(proto, engine, [tensor.numpy() for tensor in fed], wanted)
    values = {name: torch.from_numpy(value).float() for name, value in zip(wanted, computed, strict=True)}
    simulated = _behind_quantizers(simulation, arguments, outputs)
    in_float = _behind_quantizers(float_teacher(simulation), arguments, outputs)
    seen = {name: [values[output] for _, output in sorted(uses[name])] for name in uses}
    seen |= {name: [values[name]] for name in outputs}
    # the file has a value once that two quantizers with one range round; uses then can't be matched, so they are left out
    seen = {name: own for name, own in seen.items() if len(own) == len(simulated[name])}
    for name, own in seen.items():
        if [value.shape for value in own] != [value.shape for value in simulated[name]]:
            raise UserError(f"{path} has another shape than the model at {name}; was it exported from another one?")
    continued = _behind_quantizers(simulation, arguments, outputs, seen)
    return [
        LayerRow(
            name if len(seen[name]) == 1 else f"{name} (use {use + 1})",
            _ratio(continued[name][use], value),
            _ratio(simulated[name][use], value),
            _ratio(in_float[name][use], simulated[name][use]),
        )
        for name in seen
        for use, value in enumerate(seen[name])
    ]


def shows_layers(engine: Engine) -> bool:
    """Whether the engine's runtime can show intermediate values, as real numbers."""
    return engine.backend in ("onnxruntime", "openvino") and engine.card.output_scale is None


def _in_onnxruntime(
    proto: onnx.ModelProto, engine: Engine, arrays: list[NDArray[Any]], wanted: list[str]
) -> list[NDArray[Any]]:
    """The wanted outputs of ``proto``, which is the engine's file with more of them."""
    options = session_options(read_onnx(engine.path), engine.settings)
    session = library().InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fed = {value.name: array for value, array in zip(engine.inputs, arrays, strict=True)}
    return session.run(wanted, fed)


def _in_openvino(
    proto: onnx.ModelProto, engine: Engine, arrays: list[NDArray[Any]], wanted: list[str]
) -> list[NDArray[Any]]:
    """The wanted outputs of ``proto``, which is the engine's file with more of them."""
    core = shared_core()
    properties = compile_properties(read_onnx(engine.path), engine.settings)
    compiled = core.compile_model(core.read_model(proto.SerializeToString()), "CPU", properties)
    results = compiled({value.name: array for value, array in zip(engine.inputs, arrays, strict=True)})
    places = {value.name: index for index, value in enumerate(proto.graph.output)}
    return [np.array(results[places[name]]) for name in wanted]


def format_layers(rows: list[LayerRow]) -> str:
    """The table as text. The last line names the first layer that departs from the simulation, if any."""
    lines = [f"{'values behind':<50} {'engine/simulation':>18} {'of this layer':>14} {'simulation/float':>17}"]
    lines += [
        f"{row.name:<50} {row.engine_to_simulation:15.1f} dB {row.by_itself:11.1f} dB {row.simulation_to_float:14.1f} dB"
        for row in rows
    ]
    departing = next((row for row in rows if row.by_itself < FAITHFUL_DB), None)
    if departing is None:
        lines.append(f"no layer departs from the simulation (all at {FAITHFUL_DB:.0f} dB or more)")
    else:
        lines.append(f"the first layer that departs from the simulation: {departing.name}")
    return "\n".join(lines)


def _behind_quantizers(
    model: nn.Module,
    arguments: Sequence[Tensor],
    outputs: Sequence[str],
    given: Mapping[str, list[Tensor]] | None = None,
) -> dict[str, list[Tensor]]:
    """Run the model; return the output of every use of each quantizer, and the outputs.

    Where ``given`` has values for a quantizer, the model continues with them instead of its own.
    """
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def hook(name: str, output: Tensor) -> Tensor:
        seen[name].append(output.clone())
        return given[name][len(seen[name]) - 1] if given and name in given else output

    hooks = [
        quantizer.register_forward_hook(lambda _, args, output, name=name: hook(name, output))
        for name, quantizer in quantizers(model)
    ]
    try:
        returned, _ = tree_flatten(model(*arguments))
        seen |= {name: [value] for name, value in zip(outputs, returned, strict=True)}
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def _ratio(signal: Tensor, other: Tensor) -> float:
    """10 log10(|signal|^2 / |other - signal|^2)."""
    power = signal.double().square().sum().item()
    noise = (other.double() - signal.double()).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf
