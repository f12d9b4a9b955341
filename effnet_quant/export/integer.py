"""Integer-only export: an ONNX file with integer operators only, from uint8 images to int32 logits. See docs/integer.md."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import helper
from torch import nn

from effnet_quant.card import CARD_KEY, EXTRA_KEY, SIGNATURE_KEY, InputSpec, ModelCard
from effnet_quant.errors import UserError
from effnet_quant.export.integer_lowering import lower
from effnet_quant.export.options import ExportOptions
from effnet_quant.export.passes import run_passes
from effnet_quant.export.signature import signature
from effnet_quant.export.tracing import trace_image
from effnet_quant.files import replace_file
from effnet_quant.integer.program import Program
from effnet_quant.integer.storage import to_model
from effnet_quant.models.input_channels import image_channels
from effnet_quant.models.registry import CROP_MARGIN
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.targets import get_target
from effnet_quant.saved_model import card_of

TARGET = "integer"


def export_integer(model: nn.Module, path: str | Path, image_size: int, *, card: ModelCard | None = None) -> None:
    """Write a quantized classifier as an ONNX file that computes with integers only, the same bits on any machine.

    The file takes uint8 images (N, C, image_size, image_size), "input", of any batch size. It gives int32 logits, "logits";
    ``card.output_scale`` of the file says what one unit stands for. The image's normalisation is in the file's first table.

    Args:
        model: quantized and calibrated; left untouched.
        path: the file to write; replaced only when the new one is complete.
        image_size: height and width of the images, in pixels.
        card: describes the model; ``card.input`` says how images are normalised. None takes what ``create_model`` and
            ``quantize`` know. A model without it gets ImageNet's mean and std for three channels, else pixels / 255.

    Raises:
        UserError: the model is not quantized or calibrated, an operation has no integer rule, or sums do not fit 32 bits.
    """
    proto = build_integer(model, image_size, card=card)
    replace_file(Path(path), proto.SerializeToString(deterministic=True))


def build_integer(model: nn.Module, image_size: int, *, card: ModelCard | None = None) -> onnx.ModelProto:
    """Return the ONNX model that ``export_integer`` writes, checked by ``onnx.checker``."""
    card = card_of(model) if card is None else card
    spec = _images(model, image_size, card)
    program = integer_program(model, image_size, spec)
    proto = to_model(program)
    card = replace(card, target=TARGET, input=spec, float_operations=(), output_scale=program.scale)
    about = {
        "image_size": image_size,
        "input": {"name": proto.graph.input[0].name, "type": "uint8", "layout": "NCHW"},
        "output": {"name": proto.graph.output[0].name, "type": "int32"},
    }
    own = {entry.key: entry.value for entry in proto.metadata_props}
    texts = {CARD_KEY: card.to_json(), EXTRA_KEY: about}
    described = {key: json.dumps(values, sort_keys=True) for key, values in texts.items()}
    helper.set_model_props(proto, {**own, **described, SIGNATURE_KEY: json.dumps(signature(proto, 0))})
    onnx.checker.check_model(proto, full_check=True)
    return proto


def integer_program(model: nn.Module, image_size: int, spec: InputSpec) -> Program:
    """The integer program of a quantized model, for images normalised as ``spec`` says.

    Raises:
        UserError: as ``export_integer``.
    """
    if not any(True for _ in quantizers(model)):
        raise UserError("the model is in float; quantize and calibrate it before an integer export.")
    target = get_target(TARGET)
    traced = trace_image(model, target, image_size, spec.channels)
    program = lower(run_passes(traced, target, ExportOptions()), spec)
    try:
        program.check()
    except ValueError as error:
        raise UserError(f"the network can't be computed with integers alone: {error}.") from error
    return program


def _images(model: nn.Module, image_size: int, card: ModelCard) -> InputSpec:
    """How the model's images are normalised."""
    channels = image_channels(model, image_size)
    if card.input is not None and card.input.channels == channels:
        return card.input.resized(image_size)
    spec = InputSpec(image_size, image_size + CROP_MARGIN)
    return spec if channels == 3 else replace(spec, mean=(0.0,) * channels, std=(1.0,) * channels)
