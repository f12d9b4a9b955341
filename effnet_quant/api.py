"""The public functions that join several rooms; import them from ``effnet_quant``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import load_weights, read_weights
from effnet_quant.quantization.insertion import quantize


def create_model(name: str, num_classes: int = 1000, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """Build a registered model, in training mode, on the CPU.

    Args:
        name: one of ``list_models()``; the ``-quant-`` ones come with quantizers (off until they have ranges).
        num_classes: number of logits.
        weights: a ``.safetensors``, ``.pth`` or ``.pth.tar`` file to load; random initialisation without it.
        **options: of ``EfficientNet``, e.g. ``dropout``, ``bn_momentum``, ``se_as_conv``, ``in_channels``.

    Raises:
        UserError: unknown name, or weights that are missing, damaged or do not fit.
    """
    entry = get_entry(name)
    model = entry.build(num_classes=num_classes, **options)
    if entry.quantized:
        quantize(model)
    if weights is not None:
        load_weights(model, read_weights(weights))
    return model
