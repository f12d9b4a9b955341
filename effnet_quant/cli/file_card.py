"""The card of the weights file that a command line names, and the flags that it answers."""

from __future__ import annotations

import argparse
import os
import sys

from effnet_quant.card import ModelCard
from effnet_quant.errors import UserError
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import read_card


def card_to_start_from(parsed: argparse.Namespace, *, quantized: bool = False) -> ModelCard:
    """The card of the file of ``--resume`` or ``--pretrained-from-file``; an empty card without a file.

    Sets ``parsed.arch`` to the file's if the user gave none. Prints what is taken from the file.

    Args:
        parsed: the flags of ``add_model_arguments``.
        quantized: whether the script quantizes. A float EfficientNet's file then stands for its quantized twin.

    Raises:
        UserError: the file is missing or damaged, or its card can't be used.
    """
    path = getattr(parsed, "resume", None) or parsed.pretrained_from_file
    if not path:
        return ModelCard()
    said = read_card(path)
    taken = []
    if said.arch and "arch" not in parsed.explicit:
        parsed.arch = _twin(said.arch) if quantized else said.arch
        taken.append(f"--arch {parsed.arch}")
    if said.num_classes and "num_classes" not in parsed.explicit:
        taken.append(f"{said.num_classes} classes")
    if said.input is not None and getattr(parsed, "image_size", None) is None:
        taken.append(f"images of {said.input.image_size} px")
    if said.activation and not parsed.hard_swish:
        taken.append(said.activation.replace("_", "-"))
    if said.target and quantized and parsed.target is None:
        taken.append(f"--target {said.target}")
    if taken and os.environ.get("RANK", "0") == "0":
        print(f"from {path}: {', '.join(taken)}", file=sys.stderr)
    return said


def _twin(arch: str) -> str:
    """The name of the quantized form of a network."""
    try:
        is_float = get_entry(arch).quantized is False
    except UserError:  # said later, with the flag's name
        return arch
    return arch.replace("efficientnet-", "efficientnet-quant-", 1) if is_float else arch
