"""The registry: how each model is built, its default image size and where its weights are published."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass, replace
from functools import partial

from effnet_quant.card import InputSpec
from effnet_quant.errors import UserError
from effnet_quant.models.cifar_resnet import CifarResNet
from effnet_quant.models.download import fetch
from effnet_quant.models.efficientnet import EfficientNet
from effnet_quant.models.entry import ModelEntry
from effnet_quant.models.external import HUB, external_entry, list_external, same_in_libraries
from effnet_quant.models.small_resnet import SmallResNet
from effnet_quant.models.weights import Weights, read_weights

LIBRARIES = ("timm", "torchvision")
CROP_MARGIN = 32  # NVIDIA's evaluation transform scales the shorter side to image size + 32 before the crop
_NGC = "https://api.ngc.nvidia.com/v2/models/nvidia"
_AKAMASTER = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models"


@dataclass(frozen=True)
class _Scaling:
    """Compound scaling of one EfficientNet (Tan & Le 2019), with NVIDIA's dropout and survival probability."""

    width: float
    depth: float
    image_size: int
    dropout: float
    survival_prob: float = 1.0


_SCALINGS = {
    "b0": _Scaling(1.0, 1.0, 224, 0.2),
    "b1": _Scaling(1.0, 1.1, 240, 0.2),
    "b2": _Scaling(1.1, 1.2, 260, 0.3),
    "b3": _Scaling(1.2, 1.4, 300, 0.3),
    "b4": _Scaling(1.4, 1.8, 380, 0.4, 0.8),
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


_CIFAR_WEIGHTS = {
    20: "resnet20-12fca82f.th",
    32: "resnet32-d509ac18.th",
    44: "resnet44-014dd654.th",
    56: "resnet56-4bfd9763.th",
    110: "resnet110-1d1ed7c2.th",
}

# NVIDIA's names for networks of the libraries
_NVIDIAS_NAMES = {
    "resnet50": "torchvision:resnet50",
    "resnext101-32x4d": "timm:resnext101_32x4d",
    "se-resnext101-32x4d": "timm:seresnext101_32x4d",
}


def _published(url: str) -> Weights:
    return read_weights(fetch(url))


def _efficientnet(member: str, *, wide_se: bool, quantized: bool) -> ModelEntry:
    name = "-".join(["efficientnet", *["quant"] * quantized, *["widese"] * wide_se, member])
    scaling = _SCALINGS[member]
    build = partial(
        EfficientNet,
        width=scaling.width,
        depth=scaling.depth,
        dropout=scaling.dropout,
        survival_prob=scaling.survival_prob,
        wide_se=wide_se,
        # TensorRT fuses 1x1 convolutions best, and NVIDIA's quantized weights have that form
        se_as_conv=quantized,
    )
    url = f"{_NGC}/{_NGC_WEIGHTS[name]}" if name in _NGC_WEIGHTS else None
    return ModelEntry(
        name,
        build,
        InputSpec(scaling.image_size, scaling.image_size + CROP_MARGIN),
        quantized=quantized,
        weights_at=url,
        fetch_weights=partial(_published, url) if url else None,
    )


def _cifar_resnet(depth: int) -> ModelEntry:
    url = f"{_AKAMASTER}/{_CIFAR_WEIGHTS[depth]}"
    return ModelEntry(
        f"cifar-resnet{depth}",
        partial(CifarResNet, depth=depth),
        InputSpec(32, 32),
        num_classes=10,
        weights_at=url,
        fetch_weights=partial(_published, url),
    )


_ENTRIES = {
    entry.name: entry
    for entry in (
        *(
            _efficientnet(member, wide_se=wide_se, quantized=quantized)
            for quantized in (False, True)
            for wide_se in (False, True)
            for member in _SCALINGS
        ),
        *(_cifar_resnet(depth) for depth in _CIFAR_WEIGHTS),
        ModelEntry("small-resnet9", SmallResNet, InputSpec(32, 32), num_classes=10),
    )
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell-style pattern, sorted.

    Only patterns that name timm or torchvision list that library's networks, e.g. ``timm:resnet*``. NVIDIA's names resnet50,
    resnext101-32x4d and se-resnext101-32x4d for three of these networks are not listed.

    Raises:
        UserError: the pattern names timm, but timm is not installed.
    """
    library = pattern.partition(":")[0]
    names = list_external(library) if library in LIBRARIES else list(_ENTRIES)
    return sorted(fnmatch.filter(names, pattern))


def get_entry(name: str) -> ModelEntry:
    """The registry's entry of a model.

    Raises:
        UserError: there is no such model. The message names similar ones.
    """
    if name.startswith(HUB):
        return external_entry(f"timm:{name}")
    if name.partition(":")[0] in LIBRARIES:
        return external_entry(name)
    if name in _NVIDIAS_NAMES:
        return replace(external_entry(_NVIDIAS_NAMES[name]), name=name, input=InputSpec(224, 224 + CROP_MARGIN))
    if name not in _ENTRIES:
        near = same_in_libraries(name)
        near += difflib.get_close_matches(name, [*_ENTRIES, *_NVIDIAS_NAMES], n=3, cutoff=0.5)
        hint = f"did you mean: {', '.join(near)}?" if near else "effnet-quant models lists them."
        raise UserError(f"there is no model '{name}'; {hint}")
    return _ENTRIES[name]
