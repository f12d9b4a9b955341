"""What model2onnx.py, classify.py and verify have in common: a model in eval mode from arguments and a weights file, and
an engine on pixels."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.api import HARD_SWISH_KEY, create_model, simulated_target
from effnet_quant.cli.arguments import model_options
from effnet_quant.cli.quantization import SPEC_KEY, TARGET_KEY, chosen_spec
from effnet_quant.cli.weights import given_weights, load_given
from effnet_quant.data.transforms import Preprocessing, normalize
from effnet_quant.engines.engine import Engine
from effnet_quant.errors import UserError
from effnet_quant.models.registry import get_entry


def load_model(arguments: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model of ``--arch`` with the weights of ``--pretrained-from-file`` or ``--pretrained``, and what they say of
    themselves.

    The number of classes is the weights' unless the user gave another. A network whose name leaves open whether it is
    quantized is, if the weights bring ranges. The metadata always has "arch", "num_classes" and "preprocessing".

    Raises:
        UserError: unknown model, no weights, weights that do not fit, or a quantized model with float weights.
    """
    if not arguments.arch:
        raise UserError("which model is it? Give its name with --arch.")
    entry = get_entry(arguments.arch)
    weights = given_weights(arguments, entry)
    if weights is None:
        raise UserError("there are no weights; give them with --pretrained-from-file or --pretrained.")
    explicit = "num_classes" in arguments.explicit
    num_classes = arguments.num_classes if explicit else entry.class_count(weights)
    quantized = weights.has_ranges if entry.quantized is None else entry.quantized
    spec = chosen_spec(arguments, weights.metadata)
    options = model_options(arguments)
    target = simulated_target(arguments.arch, weights.metadata) if quantized else None
    hard_swish = arguments.hard_swish or bool(weights.metadata.get(HARD_SWISH_KEY))
    model = create_model(
        arguments.arch,
        num_classes,
        quantized=quantized,
        quant_spec=spec,
        target=target,
        hard_swish=hard_swish,
        **options,
    )
    if not load_given(model, weights, arguments.arch):
        raise UserError(
            f"{weights.source} holds float weights without ranges; calibrate them with quant_main.py --epochs 0, or use "
            "the float model."
        )
    if "preprocessing" in weights.metadata:
        preprocessing = Preprocessing.from_json(weights.metadata["preprocessing"])
    else:
        preprocessing = Preprocessing(**asdict(entry.input))
    if arguments.image_size is not None:
        preprocessing = preprocessing.resized(arguments.image_size)
    metadata = {"arch": arguments.arch, "num_classes": num_classes, "preprocessing": preprocessing.to_json()}
    if quantized:
        metadata[SPEC_KEY] = spec.to_json()
        if TARGET_KEY in weights.metadata:
            metadata[TARGET_KEY] = target
    if hard_swish:
        metadata[HARD_SWISH_KEY] = True
    if "classes" in weights.metadata:
        metadata["classes"] = weights.metadata["classes"]
    return model.eval(), metadata


def run_engine(engine: Engine, pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The outputs for uint8 images (N, C, H, W), normalised here unless the engine does that itself."""
    if engine.input.dtype == "uint8":
        return torch.from_numpy(engine(pixels.numpy()))
    return torch.from_numpy(engine(normalize(pixels, preprocessing).numpy()))
