"""Targets: what each runtime wants of a quantized graph, as data; one file per runtime holds its row and the reasons."""

from __future__ import annotations

from effnet_quant.errors import UserError
from effnet_quant.quantization.targets.onnxruntime import ONNXRUNTIME
from effnet_quant.quantization.targets.openvino import OPENVINO
from effnet_quant.quantization.targets.rules import OPERATIONS, FollowsTarget, Target
from effnet_quant.quantization.targets.tensorrt import TENSORRT

TARGETS = {target.name: target for target in (ONNXRUNTIME, OPENVINO, TENSORRT)}

__all__ = ["OPERATIONS", "TARGETS", "FollowsTarget", "Target", "get_target"]


def get_target(name: str | Target) -> Target:
    """The rules of the named runtime; rules are given back as they are.

    Raises:
        UserError: there is no such target.
    """
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise UserError(f"there is no target '{name}'; choose one of: {', '.join(TARGETS)}.")
    return TARGETS[name]
