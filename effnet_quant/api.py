"""The public functions that join several rooms; import them from ``effnet_quant``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from effnet_quant.errors import UserError
from effnet_quant.models.activations import replace_silu
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import Weights, load_weights, read_weights
from effnet_quant.quantization.placement.insertion import quantize
from effnet_quant.quantization.spec import QuantSpec
from effnet_quant.quantization.targets import get_target

HARD_SWISH_KEY = "hard_swish"  # in the metadata of checkpoints and weights


def create_model(
    name: str,
    num_classes: int | None = None,
    weights: str | Path | Weights | None = None,
    *,
    pretrained: bool = False,
    quantized: bool | None = None,
    quant_spec: str | QuantSpec | Mapping[str, Any] | None = None,
    target: str | None = None,
    hard_swish: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model, in training mode, on the CPU.

    Args:
        name: one of ``list_models()``, or ``timm:<name>`` or ``torchvision:<name>``.
        num_classes: number of logits; None for as many as the weights have, else the model's own number.
        weights: a ``.safetensors``, ``.pth`` or ``.pth.tar`` file to load; random initialisation without it.
        pretrained: load the published weights instead.
        quantized: whether quantizers are placed (they are off until they have ranges). None: the ``efficientnet-*``
            models as their names say, any other if the weights bring ranges.
        quant_spec: how, as ``resolve_spec`` takes it; None for what the weights say of themselves, else "w8a8".
        target: the runtime that a quantized network simulates (``simulate_target``); None for ``simulated_target``'s.
        hard_swish: put hard-swish in the place of SiLU (``replace_silu``); None for what the weights say of themselves, else
            SiLU.
        **options: of the network, e.g. ``dropout``, ``bn_momentum``, ``survival_prob``, ``in_channels``, and ``se_as_conv``
            of the EfficientNets.

    Raises:
        UserError: unknown name or option, a network without SiLU where ``hard_swish`` is asked for, or weights that are
            missing, damaged or do not fit.
    """
    entry = get_entry(name)
    if pretrained and weights is not None:
        raise UserError("weights= and pretrained=True both bring weights; give one of them.")
    given = entry.pretrained() if pretrained else weights
    if given is not None and not isinstance(given, Weights):
        given = read_weights(given)
    if quantized is None:
        quantized = given is not None and given.has_ranges if entry.quantized is None else entry.quantized
    if num_classes is None:
        num_classes = entry.num_classes if given is None else entry.class_count(given)
    model = entry.create(num_classes, **options)
    said = {} if given is None else given.metadata
    wanted = said.get(HARD_SWISH_KEY, False) if hard_swish is None else hard_swish
    if wanted and not replace_silu(model):
        raise UserError(f"{name} has no SiLU that hard-swish could take the place of; leave it out.")
    if quantized:
        if quant_spec is None:
            quant_spec = said.get("quant_spec", "w8a8")
        quantize(model, quant_spec, target=target or simulated_target(name, said))
    if given is not None:
        load_weights(model, given)
    return model


def simulated_target(name: str, metadata: Mapping[str, Any]) -> str:
    """The runtime that a quantized model of this name simulates where nobody asks for one: what the metadata of its weights
    says, else "tensorrt" for ``efficientnet-quant-*``, which compute NVIDIA's numbers, and "onnxruntime" for the others."""
    default = "tensorrt" if get_entry(name).quantized else "onnxruntime"
    return get_target(str(metadata.get("quant_target", default))).name
