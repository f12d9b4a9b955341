"""effnet-quant deploy: from weights to the fastest engine on this machine that agrees with its simulation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from effnet_quant.cli.arguments import Parser, add_model_arguments
from effnet_quant.cli.process import run
from effnet_quant.cli.quantization import add_spec_arguments, seconds_of
from effnet_quant.engines.runtimes import RUNTIMES, how_to_install, installed
from effnet_quant.errors import UserError
from effnet_quant.terminal import printable, shell_word


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser("Find the fastest engine on this machine that agrees with its simulation, and keep it in a folder.")
    add_model_arguments(parser, None)
    add_spec_arguments(parser)
    add = parser.add_argument
    add("data", metavar="DATA", help="a folder with train/ and val/, or another name from docs/data.md")
    add(
        "--weights",
        metavar="FILE",
        dest="pretrained_from_file",
        help="float or calibrated weights; same as --pretrained-from-file",
    )
    add("--output", metavar="FOLDER", help="folder of the engine (default: a folder deploy beside the weights)")
    add("--runtimes", nargs="+", choices=RUNTIMES, help="runtimes to try (default: all that are installed)")
    add("--images", type=int, default=512, help="validation images to compare on, at most")
    add("--image-size", type=int, help="image size in pixels (default: the weights', else the model's)")
    add("--threads", type=int, help="CPU threads of the engine (default: each runtime's own choice)")
    add("--time-budget", default="5m", metavar="TIME", help="time for all of it, e.g. 90s, 5m or 1h")
    return parser


def job(arguments: Sequence[str]) -> int:
    """Deploy as the command line says; returns the exit status, 1 if no 8-bit engine is worth it."""
    parsed = build_parser().parse(arguments)
    if not parsed.pretrained_from_file and not parsed.pretrained:
        raise UserError("there are no weights; give them with --weights.")
    budget = seconds_of(parsed.time_budget)
    output = Path(parsed.output or _usual_output(parsed.pretrained_from_file))
    from effnet_quant.cli.file_card import card_to_start_from
    from effnet_quant.cli.model_flags import load_model
    from effnet_quant.jobs.deploy import deploy, usable_runtimes
    from effnet_quant.training.progress import ProgressLines

    usable_runtimes(parsed.runtimes)
    for name in RUNTIMES if parsed.runtimes is None else ():
        if not installed(name):
            print(f"note: {name} is not installed here; {how_to_install(name)}.", file=sys.stderr)
    card_to_start_from(parsed)
    model, card = load_model(parsed)
    result = deploy(
        model,
        parsed.data,
        output,
        card=card,
        runtimes=parsed.runtimes,
        images=parsed.images,
        threads=parsed.threads,
        time_budget=budget,
        say=_say,
        progress=ProgressLines(),
    )
    for line in str(result).splitlines():
        print(printable(line))
    if result.path is not None:
        command = f"effnet-quant classify --pretrained-from-file {shell_word(result.path)} --image IMAGE"
        print(printable(f"{result.path}; run it: {command}"))
    return 0 if result.quantized else 1


def _say(text: str) -> None:
    for line in text.splitlines():
        print(printable(line), file=sys.stderr, flush=True)


def _usual_output(weights: str | None) -> str:
    return str(Path(weights).parent / "deploy") if weights else "deploy"


def main() -> None:
    """Entry point of ``effnet-quant deploy``."""
    run(job)
