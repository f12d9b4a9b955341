"""Where a script's weights come from, and what it says about them."""

from __future__ import annotations

import argparse
import sys

from torch import nn

from effnet_quant.errors import UserError
from effnet_quant.models.entry import ModelEntry
from effnet_quant.models.weights import Weights, load_weights, other_class_count, read_weights
from effnet_quant.quantization.placement.insertion import quantizers


def given_weights(arguments: argparse.Namespace, entry: ModelEntry) -> Weights | None:
    """The weights of ``--pretrained-from-file`` or ``--pretrained``; None without either.

    Raises:
        UserError: both are given, or the weights can't be had.
    """
    path = arguments.pretrained_from_file
    if arguments.pretrained and path:
        raise UserError("--pretrained and --pretrained-from-file both bring weights; give one of them.")
    if arguments.ema and not path:
        raise UserError("--ema chooses among the weights of a checkpoint; give it with --pretrained-from-file.")
    if arguments.pretrained:
        return entry.pretrained()
    return read_weights(path, ema=arguments.ema) if path else None


def load_given(model: nn.Module, weights: Weights, arch: str, *, new_classifier: bool = False) -> bool:
    """``load_weights``, saying what of the weights is left out."""
    other = other_class_count(model, weights)
    has_ranges = load_weights(model, weights, new_classifier=new_classifier)
    if other is not None:
        print(f"note: {weights.source} is for {other} classes; the classifier starts anew", file=sys.stderr)
    if weights.has_ranges and not any(True for _ in quantizers(model)):
        print(f"note: {arch} is a float model here; the ranges in the weights are left out", file=sys.stderr)
    return has_ranges
