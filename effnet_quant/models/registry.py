"""The models by name: how each is built, its default image size and where its weights are published."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def _efficientnet(quantized: bool) -> Callable[..., nn.Module]:
    def build(**options: Any) -> nn.Module:
        # TensorRT fuses 1x1 convolutions best, and NVIDIA's quantized weights have that form
        return EfficientNet(**{**({"se_as_conv": True} if quantized else {}), **options})

    return build


_ENTRIES = {
    entry.name: entry
    for entry in (
        ModelEntry(
            "efficientnet-b0",
            _efficientnet(quantized=False),
            image_size=224,
            weights_url=f"{_NGC}/efficientnet_b0_pyt_amp/versions/20.12.0/files/nvidia_efficientnet-b0_210412.pth",
        ),
        ModelEntry(
            "efficientnet-quant-b0",
            _efficientnet(quantized=True),
            image_size=224,
            quantized=True,
            weights_url=f"{_NGC}/efficientnet_b0_pyt_qat_ckpt_fp32/versions/21.03.0/files/nvidia-efficientnet-quant-b0-130421.pth",
        ),
    )
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
