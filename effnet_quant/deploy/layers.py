"""Where do engine and simulation part? The inputs of every quantized layer, side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from effnet_quant.errors import UserError
from effnet_quant.quantization.insertion import quantizers
from effnet_quant.quantization.qat import float_teacher

_MARK = "_quantizer/DequantizeLinear"
# A ratio this high is float rounding; below it, a layer counts as departing from the simulation.
FAITHFUL_DB = 30.0


@dataclass(frozen=True)
class LayerRow:
    """One quantized value, named by its quantizer; ratios are signal-to-quantization-noise in decibels, inf if equal.

    Attributes:
        name: the quantizer.
        engine_to_simulation: how near the engine is to the simulation.
        simulation_to_float: how near the simulation is to the float network.
    """

    name: str
    engine_to_simulation: float
    simulation_to_float: float


@torch.no_grad()
def compare_layers(
    path: str | Path, simulation: nn.Module, images: Tensor, pixels: Tensor | None = None
) -> list[LayerRow]:
    """The values behind every activation quantizer that the file has, in the file's order; ``images`` is (N, C, H, W),
    normalised, and ``pixels`` the same as uint8, for a file that normalises them itself.

    ONNX Runtime computes the file with these values as further outputs; the simulation must be the one it was exported
    from, in eval mode on the CPU.

    Raises:
        UserError: ONNX Runtime is missing, or the file has no such values.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("the table of layers needs ONNX Runtime; pip install onnxruntime.") from error
    proto = onnx.load(path)
    known = dict(quantizers(simulation))
    wanted = {
        node.output[0]: node.name.removesuffix("/DequantizeLinear")
        for node in proto.graph.node
        if node.name.endswith(_MARK) and node.name.removesuffix("/DequantizeLinear") in known
    }
    if not wanted:
        raise UserError(f"{path} has no quantized layers of this model to compare; was it exported from another one?")
    for name in wanted:
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    if any(entry.data_type == onnx.TensorProto.FLOAT16 for entry in proto.graph.initializer):
        # ONNX Runtime 1.31's optimizer changes what quantized graphs in float16 compute
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    fed = pixels if pixels is not None and entry.type == "tensor(uint8)" else images
    values = session.run(list(wanted), {entry.name: fed.numpy()})
    simulated = _behind_quantizers(simulation, images)
    in_float = _behind_quantizers(float_teacher(simulation), images)
    for name, value in zip(wanted.values(), values, strict=True):
        if value.shape != tuple(simulated[name].shape):
            raise UserError(f"{path} has another shape than the model at {name}; was it exported from another one?")
    return [
        LayerRow(
            name,
            _ratio(simulated[name], torch.from_numpy(np.asarray(value))),
            _ratio(in_float[name], simulated[name]),
        )
        for name, value in zip(wanted.values(), values, strict=True)
    ]


def format_layers(rows: list[LayerRow]) -> str:
    """The table as text; ends with the first layer that departs from the simulation, if one does."""
    lines = [f"{'values behind':<50} {'engine/simulation':>18} {'simulation/float':>17}"]
    lines += [f"{row.name:<50} {row.engine_to_simulation:15.1f} dB {row.simulation_to_float:14.1f} dB" for row in rows]
    departing = next((row for row in rows if row.engine_to_simulation < FAITHFUL_DB), None)
    if departing is None:
        lines.append(f"no layer departs from the simulation (all at {FAITHFUL_DB:.0f} dB or more)")
    else:
        lines.append(f"the first layer that departs from the simulation: {departing.name}")
    return "\n".join(lines)


def _behind_quantizers(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    hooks = [
        quantizer.register_forward_hook(lambda _, args, output, name=name: seen.__setitem__(name, output.clone()))
        for name, quantizer in quantizers(model)
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _ratio(signal: Tensor, other: Tensor) -> float:
    """10 log10(|signal|^2 / |other - signal|^2)."""
    power = signal.double().square().sum().item()
    noise = (other.double() - signal.double()).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf
