"""ONNX export with QuantizeLinear / DequantizeLinear (QDQ) nodes placed and encoded for one runtime."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from torch import Tensor, nn

from effnet_quant.card import CARD_KEY, EXTRA_KEY, SIGNATURE_KEY, ModelCard
from effnet_quant.errors import UserError
from effnet_quant.export.graph_writer import GraphWriter, TooLargeForHalf
from effnet_quant.export.image_input import describe, image_input, write_input
from effnet_quant.export.onnx_writer import OnnxWriter
from effnet_quant.export.options import ExportOptions
from effnet_quant.export.passes import run_passes
from effnet_quant.export.signature import (
    dimension_names,
    input_names,
    output_names,
    signature,
    value_infos,
)
from effnet_quant.export.traced_graph import TracedGraph
from effnet_quant.export.tracing import trace_image, trace_inputs
from effnet_quant.files import replace_file
from effnet_quant.models.input_channels import image_channels
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.targets import Target, get_target
from effnet_quant.saved_model import card_of
from effnet_quant.tasks import get_task

PLAIN = ExportOptions()


def export_onnx(
    model: nn.Module,
    path: str | Path,
    image_size: int | None = None,
    *,
    inputs: tuple[Tensor, ...] | None = None,
    target: str | Target = "onnxruntime",
    card: ModelCard | None = None,
    metadata: dict[str, Any] | None = None,
    options: ExportOptions = PLAIN,
) -> None:
    """Write ``model`` as an ONNX file that takes any batch size.

    Give either ``image_size`` or ``inputs``. ``image_size`` is for models of one batch of square images. The file's input
    is then "input", float32 (batch, C, image_size, image_size). A 2-D result is called "logits".

    ``inputs`` is for all other models. It holds an example tensor of each argument, the batch first if there is one. The
    file's inputs have the names of the arguments. The model may return tensors, or tuples, lists or dicts of tensors.
    Outputs are named after a dict's keys, else "output_0", "output_1" and so on.

    BatchNorm is folded into the convolutions. A quantized model gets int8 or INT4 weights, and QDQ nodes where ``target``
    wants them. The same ranges serve every target. For ONNX Runtime, outputs of convolutions are quantized too, so that
    integer kernels run. Calibrated ranges of outputs are used as the simulation uses them. Missing ones are computed by
    passes/needed_ranges.py.

    Args:
        model: a float or calibrated quantized model; left untouched.
        path: the file to write; replaced only when the new one is complete.
        image_size: height and width of the images, in pixels.
        inputs: an example tensor of each argument. Their values do not matter.
        target: "onnxruntime", "openvino" or "tensorrt", or changed rules of one (``Target.leaving_in_float``).
        card: describes the model. ``target`` and the operations left in float are added. None makes a card of ``metadata``.
            If that describes no model, the card is what ``create_model`` and ``quantize`` know.
        metadata: further JSON values to store in the file; ``Engine.metadata`` has them.
        options: the form of the file.

    Raises:
        UserError: unknown target, a quantizer without range, or an operation the exporter does not know.
    """
    proto = build_onnx(model, image_size, inputs=inputs, target=target, card=card, metadata=metadata, options=options)
    replace_file(Path(path), proto.SerializeToString(deterministic=True))


def build_onnx(
    model: nn.Module,
    image_size: int | None = None,
    *,
    inputs: tuple[Tensor, ...] | None = None,
    target: str | Target = "onnxruntime",
    card: ModelCard | None = None,
    metadata: dict[str, Any] | None = None,
    options: ExportOptions = PLAIN,
) -> onnx.ModelProto:
    """Return the ONNX model that ``export_onnx`` writes, checked by ``onnx.checker``."""
    rules = get_target(target)
    quantized = any(True for _ in quantizers(model))
    if options.fp16 is None and quantized and rules.half_floats:

        def build(*, fp16: bool) -> onnx.ModelProto:
            chosen = replace(options, fp16=fp16)
            return build_onnx(
                model, image_size, inputs=inputs, target=target, card=card, metadata=metadata, options=chosen
            )

        try:
            return build(fp16=True)
        except TooLargeForHalf as error:
            warnings.warn(f"{str(error).partition(';')[0]}; the file computes in float32.", stacklevel=2)
            return build(fp16=False)
    if rules.suffix != ".onnx":
        raise UserError(f"{rules.name} reads {rules.suffix} files, not ONNX; take export_{rules.name}.")
    if rules.halves_up:  # QuantizeLinear rounds them to even
        raise UserError(f"a file for the target {rules.name} has no float operations; write it with export_integer.")
    if options.fp16 and quantized and rules.quantized_outputs:
        raise UserError(
            f"{rules.name} has no integer kernels between float16 values; export the quantized model without fp16, or for "
            "another target."
        )
    about_images: dict[str, Any] = {}
    if image_size is not None and inputs is None:
        channels = image_channels(model, image_size)
        traced = trace_image(model, rules, image_size, channels, dynamic_size=options.dynamic_size)
        described = [image_input(channels, image_size, options)]
    else:
        examples = _examples(image_size, inputs, options)
        names = input_names(model, len(examples))
        traced = trace_inputs(model, rules, examples)
        described = value_infos(traced.inputs, names, {})
    left = tuple(sorted(get_target(rules.name).quantized - rules.quantized))
    card = card or ModelCard.from_json(metadata or {}, "metadata")
    if card == ModelCard():  # nothing was said
        card = card_of(model)
        if card.input is not None and image_size is not None:
            fits = card.input.channels == image_channels(
                model, image_size
            )  # else its mean and std are another network's
            card = replace(card, input=card.input.resized(image_size) if fits else None)
    card = replace(card, target=rules.name, float_operations=left)
    known = get_task(card.task).output_names if inputs is None else ()
    proto = _write(run_passes(traced, rules, options), described, rules, options, quantized, known)
    if inputs is None:
        about_images = {"image_size": image_size, **describe(described[0], proto.graph.output[0], options)}
    returned = json.dumps(signature(proto, traced.structure))  # a dict's keys stay in the model's order
    entries = {CARD_KEY: card.to_json(), EXTRA_KEY: {**about_images, **(metadata or {})}}
    texts = {key: json.dumps(values, sort_keys=True) for key, values in entries.items()}
    helper.set_model_props(proto, {**texts, SIGNATURE_KEY: returned})
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _examples(image_size: int | None, inputs: tuple[Tensor, ...] | None, options: ExportOptions) -> tuple[Tensor, ...]:
    examples = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
    if image_size is not None or not examples or not all(isinstance(example, Tensor) for example in examples):
        raise UserError(
            "give either the size of the images, or inputs: a tuple with an example tensor of each argument."
        )
    if options.dynamic_size or options.normalisation is not None:
        raise UserError("open sizes and preprocessing in the graph are for square images; give image_size, not inputs.")
    return examples


def _write(
    traced: TracedGraph,
    inputs: list[onnx.ValueInfoProto],
    target: Target,
    options: ExportOptions,
    quantized: bool,
    known: tuple[str, ...],
) -> onnx.ModelProto:
    """Write a graph after its passes as an ONNX model. ``known``: the names that the task gives outputs."""
    names = output_names(traced, known)
    if clash := {value.name for value in inputs} & set(names):
        raise UserError(f"{', '.join(sorted(clash))} is an input and an output; rename the key of the result.")
    packs = target.int4_weights and options.packs
    opset = options.opset_for(quantized, packed=packs and traced.has_narrow_weights, wide=traced.has_wide_activations)
    writer = GraphWriter(target, opset, options)
    writer.reserve([*(value.name for value in inputs), *names])
    entered = [
        write_input(writer, value.name, options) if is_float else value.name
        for value, is_float in zip(
            inputs, (node.meta["val"].is_floating_point() for node in traced.inputs), strict=True
        )
    ]
    values = OnnxWriter(traced, writer, float_weights=options.float_weights, packs=packs).run(entered)
    if options.fp16:
        values = [
            writer.node("Cast", [value], name, to=TensorProto.FLOAT) if node.meta["val"].is_floating_point() else value
            for value, name, node in zip(values, names, traced.outputs, strict=True)
        ]
    if names == list(known):
        outputs = [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, ["batch", None])]
    else:
        outputs = value_infos(traced.outputs, names, dimension_names(traced.inputs, inputs))
    return writer.model(inputs, outputs, values)
