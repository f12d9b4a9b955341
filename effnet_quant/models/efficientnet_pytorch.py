"""The names that weights have in the EfficientNet-PyTorch package, as timm's names.

The package, lukemelas/EfficientNet-PyTorch, numbers all blocks from 0 and starts names with an underscore:
``_blocks.3._depthwise_conv.weight``. timm numbers stages and the blocks in each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_INSIDE = {"_depthwise_conv": "conv_dw", "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_EXPANDING = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
_PLAIN = {"_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # blocks without expansion
_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.")


def has_package_names(names: Iterable[str]) -> bool:
    """Whether the names are those of the EfficientNet-PyTorch package."""
    return {"_conv_stem.weight", "_bn0.weight"} <= set(names)


def takes_package_weights(model: nn.Module) -> bool:
    """Whether the model is one of timm's tf_efficientnet_*, which pad as the package does.

    Other EfficientNets have the same shapes, but pad both sides alike, so their logits differ.
    """
    names = {name for name, _ in model.named_parameters()}
    pads_same = any("Conv2dSame" in type(module).__name__ for module in model.modules())
    return pads_same and {"conv_stem.weight", "conv_head.weight", "blocks.0.0.conv_dw.weight"} <= names


def with_timm_names(given: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """The entries of ``given`` under timm's names. Names without a counterpart stay as they are.

    Args:
        given: entries with the package's names.
        own: the names of timm's model, from which the blocks of each stage are counted.
    """
    blocks = list(dict.fromkeys(match[0] for name in own if (match := re.match(r"blocks\.\d+\.\d+\.", name))))
    expanding = {match[1] for name in given if (match := _BLOCK.match(name)) and match[2] == "_expand_conv"}
    return {_timm_name(name, blocks, expanding): value for name, value in given.items()}


def _timm_name(name: str, blocks: list[str], expanding: set[str]) -> str:
    match = _BLOCK.match(name)
    if match is None:
        layer, _, entry = name.partition(".")
        return f"{_OUTSIDE[layer]}.{entry}" if layer in _OUTSIDE else name
    layers = _INSIDE | (_EXPANDING if match[1] in expanding else _PLAIN)
    number = int(match[1])
    if number >= len(blocks) or match[2] not in layers:
        return name
    return f"{blocks[number]}{layers[match[2]]}.{name[match.end() :]}"
