"""The models by name: how each is built, its default image size and where its weights are published."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from effnet_quant.errors import UserError
from effnet_quant.models.efficientnet import EfficientNet

_NGC = "https://api.ngc.nvidia.com/v2/models/nvidia"


@dataclass(frozen=True)
class ModelEntry:
    """One model of the registry.

    Attributes:
        name: as on the command line.
        build: builds the float network from the keyword options of ``EfficientNet``.
        image_size: the height and width it was designed for, in pixels.
        quantized: whether quantizers are placed in the network once it is built.
        weights_url: where NVIDIA publishes its weights, if it does.
    """

    name: str
    build: Callable[..., nn.Module]
    image_size: int
    quantized: bool = False
    weights_url: str | None = None


@dataclass(frozen=True)
class _Scaling:
    """Compound scaling of one member of the family (Tan & Le 2019): width, depth, image size, dropout."""

    width: float
    depth: float
    image_size: int
    dropout: float


_SCALINGS = {
    "b0": _Scaling(1.0, 1.0, 224, 0.2),
    "b1": _Scaling(1.0, 1.1, 240, 0.2),
    "b2": _Scaling(1.1, 1.2, 260, 0.3),
    "b3": _Scaling(1.2, 1.4, 300, 0.3),
    "b4": _Scaling(1.4, 1.8, 380, 0.4),
    "b5": _Scaling(1.6, 2.2, 456, 0.4),
    "b6": _Scaling(1.8, 2.6, 528, 0.5),
    "b7": _Scaling(2.0, 3.1, 600, 0.5),
}
_NGC_WEIGHTS = {
    "efficientnet-b0": "efficientnet_b0_pyt_amp/versions/20.12.0/files/nvidia_efficientnet-b0_210412.pth",
    "efficientnet-b4": "efficientnet_b4_pyt_amp/versions/20.12.0/files/nvidia_efficientnet-b4_210412.pth",
    "efficientnet-widese-b0": "efficientnet_widese_b0_pyt_amp/versions/20.12.0/files/nvidia_efficientnet-widese-b0_210412.pth",
    "efficientnet-widese-b4": "efficientnet_widese_b4_pyt_amp/versions/20.12.0/files/nvidia_efficientnet-widese-b4_210412.pth",
    "efficientnet-quant-b0": "efficientnet_b0_pyt_qat_ckpt_fp32/versions/21.03.0/files/nvidia-efficientnet-quant-b0-130421.pth",
    "efficientnet-quant-b4": "efficientnet_b4_pyt_qat_ckpt_fp32/versions/21.03.0/files/nvidia-efficientnet-quant-b4-130421.pth",
}


def _entry(member: str, *, wide_se: bool, quantized: bool) -> ModelEntry:
    name = "-".join(["efficientnet", *["quant"] * quantized, *["widese"] * wide_se, member])
    scaling = _SCALINGS[member]
    build = partial(
        EfficientNet,
        width=scaling.width,
        depth=scaling.depth,
        dropout=scaling.dropout,
        wide_se=wide_se,
        # TensorRT fuses 1x1 convolutions best, and NVIDIA's quantized weights have that form
        se_as_conv=quantized,
    )
    url = f"{_NGC}/{_NGC_WEIGHTS[name]}" if name in _NGC_WEIGHTS else None
    return ModelEntry(name, build, scaling.image_size, quantized, url)


_ENTRIES = {
    entry.name: entry
    for quantized in (False, True)
    for wide_se in (False, True)
    for entry in (_entry(member, wide_se=wide_se, quantized=quantized) for member in _SCALINGS)
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell-style pattern, sorted."""
    return sorted(fnmatch.filter(_ENTRIES, pattern))


def get_entry(name: str) -> ModelEntry:
    """The registry's entry of a model.

    Raises:
        UserError: there is no such model; the sentence names the nearest ones.
    """
    if name not in _ENTRIES:
        near = difflib.get_close_matches(name, _ENTRIES, n=3, cutoff=0.5) or list_models()
        raise UserError(f"there is no model '{name}'; did you mean: {', '.join(near)}?")
    return _ENTRIES[name]
