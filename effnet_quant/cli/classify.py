"""classify.py: classify images with weights or an engine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.cli.arguments import Parser, add_model_arguments
from effnet_quant.cli.engines import add_engine_arguments, chosen_engine, is_engine, refuse_unused
from effnet_quant.cli.process import run
from effnet_quant.cli.quantization import add_spec_arguments
from effnet_quant.errors import UserError
from effnet_quant.tasks import get_task
from effnet_quant.terminal import printable

if TYPE_CHECKING:
    from torch import Tensor

    Predict = Callable[[Tensor], Tensor]

# flags for weights alone: an engine was built with its own
_OF_WEIGHTS = {
    "num_classes": "--num-classes",
    "trt": "--trt",
    "hard_swish": "--hard-swish",
    "ema": "--ema",
    "precision": "--precision",
    "quant_spec": "--quant-spec",
    "quant_override": "--quant-override",
}


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser("Classify images with PyTorch weights, an ONNX file or a TensorRT plan.")
    add_model_arguments(parser, None)
    add_spec_arguments(parser)
    parser.add_argument(
        "--image", required=True, nargs="+", metavar="IMAGE", help="files, folders, URLs, or - for standard input"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        help="image size in pixels (default: the weights', else the model's); only for engines with an open size",
    )
    parser.add_argument("--precision", choices=("AMP", "FP32"), default="FP32", help="arithmetic of PyTorch weights")
    add_engine_arguments(parser)
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="images computed together")
    parser.add_argument("--topk", type=int, default=5, help="classes to print for each image")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image")
    return parser


def job(arguments: Sequence[str]) -> int:
    """Classify as the command line says; returns the exit status, 2 if an image could not be read."""
    parsed = build_parser().parse(arguments)
    if not parsed.pretrained_from_file and not parsed.pretrained:
        raise UserError(
            "there are no weights; give a weights, .onnx or .plan file with --pretrained-from-file, or --pretrained."
        )
    if min(parsed.batch_size, parsed.topk) < 1:
        raise UserError("--batch-size and --topk must be at least 1.")
    import torch

    from effnet_quant.data.image_arguments import expand, read_named
    from effnet_quant.data.transforms import evaluation_transform

    names = expand(parsed.image)
    # a single image is read before the model is built, so that a wrong path shows at once
    ready = {names[0]: read_named(names[0])} if len(names) == 1 else {}
    predict, card, spec = _classifier(parsed)
    transform, task = evaluation_transform(spec), get_task(card.task)
    unreadable = 0
    for start in range(0, len(names), parsed.batch_size):
        read: list[str] = []
        images: list[Tensor] = []
        for name in names[start : start + parsed.batch_size]:
            try:
                images.append(transform(ready[name] if name in ready else read_named(name)))
                read.append(name)
            except UserError as error:
                print(error, file=sys.stderr)
                unreadable += 1
        if images:
            with torch.no_grad():
                outputs = predict(torch.stack(images))
            for name, answer in zip(read, task.answers(outputs, card.classes, parsed.topk), strict=True):
                if parsed.json:
                    print(json.dumps({"image": name, **answer}), flush=True)
                else:
                    print(printable(name), task.answer_text(answer), sep="\n", flush=True)
    return 2 if unreadable else 0


def _classifier(parsed: argparse.Namespace) -> tuple[Predict, ModelCard, InputSpec]:
    """A function from uint8 images (N, 3, H, W) to outputs, the model's card, and the input spec of its images."""
    import torch

    from effnet_quant.cli.file_card import card_to_start_from
    from effnet_quant.cli.model_flags import load_model
    from effnet_quant.data.transforms import normalize
    from effnet_quant.jobs.inference import run_engine

    if is_engine(parsed.pretrained_from_file or ""):
        refuse_unused(parsed, _OF_WEIGHTS, "an engine is what it was exported as; give weights, or leave this out.")
        engine = chosen_engine(parsed.pretrained_from_file, parsed)
        spec = engine.image_spec
        if parsed.image_size is not None:
            if None not in engine.input.shape:
                raise UserError(
                    f"{engine.path} takes images of {spec.image_size} px; leave --image-size out, or export it with "
                    "--dynamic-size."
                )
            spec = spec.resized(parsed.image_size)
        return (lambda pixels: run_engine(engine, pixels, spec)), engine.card, spec
    of_engines = {"engine_precision": "--engine-precision", "threads": "--threads"}
    refuse_unused(parsed, of_engines, "PyTorch weights are no engine; take --precision, or leave this out.")
    if parsed.backend not in (None, "torch"):
        raise UserError(f"{parsed.backend} takes no weights; export them with model2onnx.py, or leave --backend out.")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no CUDA card; leave --device out.")
    card_to_start_from(parsed)
    model, card = load_model(parsed)
    assert card.input is not None
    spec = card.input
    device = torch.device(parsed.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(device)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16

    def predict(pixels: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=parsed.precision == "AMP"):
            return model(normalize(pixels.to(device), spec)).float().cpu()

    return predict, card, spec


def main() -> None:
    """Entry point of the script."""
    run(job)
