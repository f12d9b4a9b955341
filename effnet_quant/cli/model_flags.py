"""The model that the flags of model2onnx.py, classify.py and effnet-quant verify ask for."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from torch import nn

from effnet_quant.api import build, choose_card, has_ranges, left_out
from effnet_quant.card import ModelCard
from effnet_quant.cli.arguments import model_options
from effnet_quant.cli.quantization import asked_overrides, asked_spec
from effnet_quant.errors import UserError
from effnet_quant.jobs.config import StartConfig
from effnet_quant.jobs.run import starting_weights
from effnet_quant.models.registry import get_entry
from effnet_quant.terminal import printable


def load_model(parsed: argparse.Namespace) -> tuple[nn.Module, ModelCard]:
    """The model of ``--arch`` in eval mode and its card, with weights of ``--pretrained-from-file`` or ``--pretrained``.

    ``--arch`` is the weights' if ``card_to_start_from`` took it from them. The number of classes is the weights' unless the
    user gave another. A network whose name leaves open whether it is quantized is, if the weights bring ranges.

    Raises:
        UserError: unknown model, no weights, weights that do not fit, or a quantized model with float weights.
    """
    if not parsed.arch:
        silent = f"{parsed.pretrained_from_file} does not say; give" if parsed.pretrained_from_file else "Give"
        raise UserError(f"which model is it? {silent} its name with --arch.")
    start = StartConfig(weights=parsed.pretrained_from_file, ema=parsed.ema, pretrained=parsed.pretrained)
    weights = starting_weights(start, get_entry(parsed.arch))
    if weights is None:
        raise UserError("there are no weights; give them with --pretrained-from-file or --pretrained.")
    card = choose_card(
        parsed.arch,
        weights,
        num_classes=parsed.num_classes if "num_classes" in parsed.explicit else None,
        quant_spec=asked_spec(parsed),
        overrides=asked_overrides(parsed),
        hard_swish=parsed.hard_swish or None,
    )
    if parsed.image_size is not None:
        assert card.input is not None
        card = replace(card, input=card.input.resized(parsed.image_size))
    model = build(card, weights, **model_options(parsed))
    for sentence in left_out(weights, model, card):
        print(f"note: {printable(sentence)}", file=sys.stderr)
    if not has_ranges(model):
        raise UserError(
            f"{weights.source} holds float weights without ranges; calibrate them with quant_main.py --epochs 0, or use "
            "the float model."
        )
    return model.eval(), card
