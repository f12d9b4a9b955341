"""What model2onnx.py and classify.py have in common: a model in eval mode from arguments and a weights file."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from torch import nn

from effnet_quant.api import create_model
from effnet_quant.cli.arguments import model_options, refuse_unavailable
from effnet_quant.data.transforms import CROP_MARGIN, Preprocessing
from effnet_quant.errors import UserError
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import load_weights, read_weights


def load_model(arguments: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model of ``--arch`` with the weights of ``--pretrained-from-file``, and what the file says of itself.

    The number of classes is the file's unless the user gave another. The metadata always has "arch", "num_classes" and
    "preprocessing".

    Raises:
        UserError: unknown model, no weights, weights that do not fit, or a quantized model with float weights.
    """
    if not arguments.arch:
        raise UserError("which model is it? Give its name with --arch.")
    refuse_unavailable(arguments)
    entry = get_entry(arguments.arch)
    if not arguments.pretrained_from_file:
        raise UserError("there are no weights; give them with --pretrained-from-file.")
    weights = read_weights(arguments.pretrained_from_file)
    num_classes = arguments.num_classes
    if "num_classes" not in arguments.explicit and weights.num_classes is not None:
        num_classes = weights.num_classes
    model = create_model(arguments.arch, num_classes, **model_options(arguments))
    if not load_weights(model, weights):
        raise UserError(
            f"{arguments.pretrained_from_file} holds float weights without ranges; calibrate them with "
            f"quant_main.py --epochs 0, or use the float model."
        )
    if not entry.quantized and any(name.endswith("_amax") for name in weights.tensors):
        print(f"note: {arguments.arch} is a float model; the ranges in the weights are left out", file=sys.stderr)
    if "preprocessing" in weights.metadata:
        preprocessing = Preprocessing.from_json(weights.metadata["preprocessing"])
    else:
        preprocessing = Preprocessing(entry.image_size, entry.image_size + CROP_MARGIN)
    if arguments.image_size is not None:
        preprocessing = preprocessing.resized(arguments.image_size)
    metadata = {"arch": arguments.arch, "num_classes": num_classes, "preprocessing": preprocessing.to_json()}
    if "classes" in weights.metadata:
        metadata["classes"] = weights.metadata["classes"]
    return model.eval(), metadata
