"""export_for: writes the file that a target's runtime reads, whatever its format."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from effnet_quant.card import ModelCard
from effnet_quant.export.onnx import export_onnx
from effnet_quant.export.options import ExportOptions
from effnet_quant.quantization.targets import Target


def export_for(
    model: nn.Module,
    path: Path,
    image_size: int,
    target: Target,
    card: ModelCard | None = None,
    options: ExportOptions | None = None,
) -> dict[str, int]:
    """Write a model of images for one runtime, with ``export_onnx``, ``export_executorch`` or ``export_integer``.

    Args:
        model, path, image_size, card: as these take them.
        target: the runtime's rules.
        options: the form of an ONNX file; other formats have none.

    Returns:
        What the runtime's fast kernels leave out, as ``export_executorch`` counts it; nothing for ONNX files.

    Raises:
        UserError: as these.
    """
    if target.suffix == ".pte":
        from effnet_quant.export.executorch import export_executorch

        return export_executorch(model, path, image_size, target=target, card=card)
    if target.halves_up:
        from effnet_quant.export.integer import export_integer

        export_integer(model, path, image_size, card=card)
        return {}
    export_onnx(model, path, image_size, target=target, card=card, options=options or ExportOptions())
    return {}
