"""effnet-quant predict: an engine's answers for all images of a folder or of tars."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from effnet_quant.cli.arguments import Parser
from effnet_quant.cli.engines import add_engine_arguments, chosen_engine, is_engine
from effnet_quant.cli.process import run
from effnet_quant.errors import UserError
from effnet_quant.terminal import printable


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser(
        "Write an engine's answers for all images of a folder or of tars, as JSON lines. A killed run goes on."
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder of images, a .tar file, or a folder of tars (WebDataset's shards)")
    add("--engine", required=True, metavar="FILE", help="deploy.json, an ONNX file, a plan or a .pte file")
    add("--output", required=True, metavar="FOLDER", help="folder of the answers, part-00000.jsonl …")
    add("--topk", type=int, default=5, help="classes in an answer")
    add_engine_arguments(parser)
    return parser


def job(arguments: Sequence[str]) -> int:
    """Predict as the command line says; returns the exit status, 2 if an image could not be read."""
    parsed = build_parser().parse(arguments)
    if not is_engine(parsed.engine):
        raise UserError(
            f"{parsed.engine} is no engine; give a deploy.json, or export the weights with effnet-quant export."
        )
    from effnet_quant.jobs.prediction import predict
    from effnet_quant.training.progress import ProgressLines

    engine = chosen_engine(parsed.engine, parsed)
    result = predict(engine, parsed.source, parsed.output, topk=parsed.topk, progress=ProgressLines())
    own = result.images - result.before
    speed = f", {own / result.seconds:.0f} images/s" if own and result.seconds else ""
    earlier = f", {result.before} of them in an earlier run" if result.before else ""
    print(f"{printable(parsed.output)}: answers for {result.images} images{earlier}{speed}")
    if result.unreadable:
        print(f"{result.unreadable} images could not be read; their lines have an error.", file=sys.stderr)
    return 2 if result.unreadable else 0


def main() -> None:
    """Entry point of ``effnet-quant predict``."""
    run(job)
