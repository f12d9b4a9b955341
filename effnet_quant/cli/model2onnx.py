"""model2onnx.py: export weights to an ONNX file for one runtime."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.cli.arguments import Parser, add_model_arguments
from effnet_quant.cli.engines import refuse_unused
from effnet_quant.cli.process import run
from effnet_quant.cli.quantization import add_spec_arguments
from effnet_quant.cli.verify import add_verify_arguments, refuse_comparison, verify_engine
from effnet_quant.errors import UserError
from effnet_quant.export.options import OPSETS, ExportOptions
from effnet_quant.files import check_writable
from effnet_quant.quantization.targets import TARGETS, get_target
from effnet_quant.terminal import printable

if TYPE_CHECKING:
    from torch import nn

    from effnet_quant.checks.tuning import Tuning

TUNE_BATCH = 8
_OF_ONNX = {
    "opset": "--opset",
    "dynamic_size": "--dynamic-size",
    "fp16": "--fp16 or --fp32",
    "with_preprocessing": "--with-preprocessing",
    "weights": "--weights",
}


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser("Export a model, float or quantized, to ONNX, or to ExecuTorch.")
    add_model_arguments(parser, None)
    add_spec_arguments(parser)
    parser.add_argument("--image-size", type=int, help="image size in pixels (default: the weights', else the model's)")
    parser.add_argument(
        "-b",
        "--batch-size",
        type=int,
        help="images per batch of --verify (default: 32) and --tune (default: 8); the file takes any batch size",
    )
    parser.add_argument(
        "--target", choices=tuple(TARGETS), help="the runtime to export for (default: see docs/deployment.md)"
    )
    _add_form_arguments(parser)
    parser.add_argument(
        "--output", metavar="FILE", help="file to write (default: <arch>.onnx, or .pte, with : replaced by -)"
    )
    parser.add_argument("--verify", metavar="DATA", dest="data", help="compare the engine with its simulation on DATA")
    parser.add_argument(
        "--tune",
        metavar="DATA",
        help="measure with DATA's images which operations are faster in float on this machine, and leave them so",
    )
    parser.add_argument(
        "--allow-slower",
        action="store_true",
        help="with --tune: exit with status 0 even if the network is faster in float",
    )
    add_verify_arguments(parser)
    return parser


def job(arguments: Sequence[str]) -> int:
    """Export as the command line says; returns the exit status."""
    parsed = build_parser().parse(arguments)
    from effnet_quant.cli.file_card import card_to_start_from
    from effnet_quant.cli.model_flags import load_model
    from effnet_quant.engines.engine import load_engine
    from effnet_quant.export.file_formats import export_for

    _refuse_idle_flags(parsed)
    said = card_to_start_from(parsed)
    parsed.target = parsed.target or _usual_target(said)
    if get_target(parsed.target).suffix != ".onnx":
        refuse_unused(parsed, _OF_ONNX, f"{parsed.target} reads no ONNX file; leave this out.")
    if (parsed.data or parsed.tune) and parsed.target == "tensorrt" and importlib.util.find_spec("tensorrt") is None:
        raise UserError(
            "--verify and --tune run the engine, and TensorRT is not installed; check the graph with "
            "effnet-quant verify --lint tensorrt."
        )
    if parsed.target == "integer":
        refuse_unused(parsed, _OF_ONNX | {"tune": "--tune"}, "an integer file has one form; leave this out.")
    ExportOptions(opset=parsed.opset)  # report a wrong opset before the model is built
    output = parsed.output or f"{parsed.arch}{get_target(parsed.target).suffix}".replace(":", "-")
    check_writable(Path(output))
    model, card = load_model(parsed)
    _note_coarser_grids(model, card, parsed.target)
    assert card.input is not None
    image_size = card.input.image_size
    options = ExportOptions(
        opset=parsed.opset,
        dynamic_size=parsed.dynamic_size,
        fp16=parsed.fp16,
        normalisation=card.input if parsed.with_preprocessing else None,
        float_weights=parsed.weights == "float",
        int4_weights=parsed.weights != "int8",
    )
    tuning = _tune(model, card, card.input, options, parsed) if parsed.tune else None
    rules = tuning.target if tuning else get_target(parsed.target)
    precision = tuning.precision if tuning else None
    if tuning:
        card = replace(card, tuned_precision=precision)
    left_out = export_for(model, Path(output), image_size, rules, card, options)
    print(f"{printable(output)}: {os.path.getsize(output):,} bytes, for {parsed.target}, any batch size")
    for name, count in left_out.items():
        print(f"note: {count} x {name} runs outside of XNNPACK, in portable kernels.")
    status = 0
    if tuning is not None and tuning.speedup < 1 and not parsed.allow_slower:
        print(
            f"{output} is slower than its float version on this machine ({tuning.speedup:.2f} times its speed); deploy the "
            "float network here, or accept it with --allow-slower.",
            file=sys.stderr,
        )
        status = 1
    if parsed.data and not verify_engine(model, card, load_engine(output, parsed.target, precision=precision), parsed):
        status = 1
    return status


def _usual_target(said: ModelCard) -> str:
    """The weights' target. ONNX Runtime in place of TensorRT where that is missing, and for weights without a target."""
    if said.target == "tensorrt" and importlib.util.find_spec("tensorrt") is None:
        return "onnxruntime"
    return said.target or "onnxruntime"


def _note_coarser_grids(model: nn.Module, card: ModelCard, target: str) -> None:
    from effnet_quant.quantization.placement.insertion import quantizers

    trained = card.target
    unsigned = any(quantizer.spec.symmetric and not quantizer.spec.signed for _, quantizer in quantizers(model))
    if trained and unsigned and not get_target(target).unsigned:
        print(
            f"note: these weights are for {trained}, which has half of {target}'s step where no value is negative; "
            f"quant_main.py --target {target} calibrates and trains for {target}."
        )


def _tune(
    model: nn.Module, card: ModelCard, spec: InputSpec, options: ExportOptions, parsed: argparse.Namespace
) -> Tuning:
    """Measure placements on one batch of validation images, and print the table."""
    from effnet_quant.checks.tuning import format_tuning
    from effnet_quant.engines.engine import usable_precisions
    from effnet_quant.jobs.inference import tune_on, validation_loader

    batch_size = TUNE_BATCH if parsed.batch_size is None else parsed.batch_size
    pixels, _ = next(validation_loader(parsed.tune, card, spec, batch_size).epoch())
    start = time.monotonic()
    tuning = tune_on(pixels, model, spec, parsed.target, options, lambda line: print(line, file=sys.stderr, flush=True))
    print(format_tuning(tuning))
    if tuning.precision != usable_precisions(parsed.target)[0]:
        print(f"It computes in {tuning.precision} what is not integer; load_engine does so for this file.")
    print(f"{len(pixels)} images of {spec.image_size} px a batch, {time.monotonic() - start:.0f} s of measuring")
    return tuning


def _refuse_idle_flags(parsed: argparse.Namespace) -> None:
    """Refuse flags that would do nothing. -b alone gets a note, because NVIDIA's command line has it."""
    if not parsed.tune:
        refuse_unused(parsed, {"allow_slower": "--allow-slower"}, "nothing is measured without --tune.")
    if not parsed.data:
        refuse_comparison(parsed)
        if parsed.batch_size is not None and not parsed.tune:
            print("note: -b is of --verify and --tune; the exported file takes any batch size.")


def _add_form_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the file's form."""
    add = parser.add_argument
    add(
        "--opset",
        type=int,
        help=f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[-1]} (default: the lowest possible)",
    )
    add("--dynamic-size", action="store_true", help="accept images of any height and width")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--fp16",
        action="store_true",
        default=None,
        help="compute float operations in float16; input and logits stay float32 (default: INT8 for tensorrt)",
    )
    precision.add_argument(
        "--fp32",
        dest="fp16",
        action="store_false",
        default=None,
        help="compute float operations in float32 (default for all other files)",
    )
    add(
        "--with-preprocessing",
        action="store_true",
        help="take uint8 images (N, 3, H, W) and normalise them in the graph",
    )
    add(
        "--weights",
        choices=("int4", "int8", "float"),
        default="int4",
        help="the smallest type in which the file stores quantized weights (int4, the default: those of 4 bits and fewer, "
        "where the target takes them)",
    )


def main() -> None:
    """Entry point of the script."""
    run(job)
