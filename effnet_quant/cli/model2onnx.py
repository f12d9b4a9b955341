"""model2onnx.py: from weights to an ONNX file for one runtime."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from effnet_quant.cli.arguments import Parser, add_model_arguments
from effnet_quant.cli.inference import load_model
from effnet_quant.cli.process import run
from effnet_quant.cli.quantization import add_spec_arguments
from effnet_quant.cli.verify import add_verify_arguments, verify_engine
from effnet_quant.deploy.engine import load_engine
from effnet_quant.deploy.onnx import export_onnx
from effnet_quant.deploy.options import OPSETS, ExportOptions, Normalisation
from effnet_quant.errors import UserError
from effnet_quant.files import check_writable
from effnet_quant.quantization.targets import TARGETS


def job(arguments: Sequence[str]) -> int:
    """Export as the command line says; returns the exit status."""
    parser = Parser("Export a model, float or quantized, to ONNX.")
    add_model_arguments(parser, None)
    add_spec_arguments(parser)
    parser.add_argument("--image-size", type=int, help="image size in pixels (default: the weights', else the model's)")
    parser.add_argument(
        "-b", "--batch-size", type=int, default=None, help="of --verify (default: 32); the exported batch is dynamic"
    )
    parser.add_argument("--target", choices=tuple(TARGETS), default="onnxruntime", help="the runtime to export for")
    _add_form_arguments(parser)
    parser.add_argument("--output", metavar="FILE", help="file to write (default: <arch>.onnx, with - for :)")
    parser.add_argument("--verify", metavar="DATA", dest="data", help="compare the engine with the simulation on DATA")
    add_verify_arguments(parser)
    parsed = parser.parse(arguments)
    if parsed.data and parsed.target == "tensorrt" and importlib.util.find_spec("tensorrt") is None:
        raise UserError(
            "--verify runs the engine, and TensorRT is not installed; check the graph with "
            "python -m effnet_quant.deploy.verify --lint tensorrt."
        )
    ExportOptions(opset=parsed.opset)  # a wrong one is said before the model is built
    output = parsed.output or f"{parsed.arch}.onnx".replace(":", "-")
    check_writable(Path(output))
    model, metadata = load_model(parsed)
    preprocessing = metadata["preprocessing"]
    options = ExportOptions(
        opset=parsed.opset,
        dynamic_size=parsed.dynamic_size,
        fp16=parsed.fp16,
        normalisation=Normalisation(preprocessing["mean"], preprocessing["std"]) if parsed.with_preprocessing else None,
        float_weights=parsed.weights == "float",
    )
    export_onnx(model, output, preprocessing["image_size"], target=parsed.target, metadata=metadata, options=options)
    print(f"{output}: {os.path.getsize(output):,} bytes, for {parsed.target}, any batch size")
    if not parsed.data:
        return 0
    return 0 if verify_engine(model, metadata, load_engine(output, parsed.target), parsed) else 1


def _add_form_arguments(parser: argparse.ArgumentParser) -> None:
    """In which form the file is written."""
    add = parser.add_argument
    add(
        "--opset",
        type=int,
        help=f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[-1]} (default: the lowest that does)",
    )
    add("--dynamic-size", action="store_true", help="leave height and width of the images open")
    add("--fp16", action="store_true", help="compute in float16 what is not integer; input and logits stay float32")
    add("--with-preprocessing", action="store_true", help="take uint8 images (N, 3, H, W), normalise them in the graph")
    add("--weights", choices=("int8", "float"), default="int8", help="how the file stores quantized weights")


def main() -> None:
    """Entry point of the script."""
    run(job)
