"""model2trt.py: build a TensorRT plan from an ONNX file, for this machine's card."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from effnet_quant.cli.arguments import Parser
from effnet_quant.cli.process import run
from effnet_quant.engines.tensorrt.build_options import HARDWARE_COMPATIBILITY, BuildOptions
from effnet_quant.engines.tensorrt.inspector import format_layers, summarize
from effnet_quant.errors import UserError
from effnet_quant.terminal import printable

_USUAL = BuildOptions()


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser("Build a TensorRT plan from an ONNX file; the precisions are those in the file.")
    add = parser.add_argument
    add("onnx", metavar="ONNX", help="a file that model2onnx.py wrote with --target tensorrt")
    add("--output", metavar="FILE.plan", help="the plan (default: the ONNX file's name with .plan)")
    add("--min-batch", type=int, default=_USUAL.smallest_batch, help="fewest images per run")
    add("-b", "--batch-size", type=int, help="images per run to tune for (default: 32, or the nearest allowed)")
    add("--max-batch", type=int, default=_USUAL.largest_batch, help="most images per run")
    add("--image-size", type=int, help="image size in pixels, if the ONNX file leaves it open")
    add("--workspace", type=int, metavar="MIB", help="memory that a layer may use (default: all of the card's)")
    add(
        "--timing-cache",
        metavar="FILE",
        help="file of layer timings, read and written (default: one in the cache)",
    )
    add("--version-compatible", action="store_true", help="let later versions of TensorRT run the plan")
    add(
        "--hardware-compatible",
        choices=HARDWARE_COMPATIBILITY,
        default=_USUAL.hardware_compatible,
        help="let other cards run the plan",
    )
    add("--layers", action="store_true", help="print the precision of every layer instead of a summary")
    return parser


def job(arguments: Sequence[str]) -> int:
    """Build as the command line says; returns the exit status."""
    parsed = build_parser().parse(arguments)
    output = Path(parsed.output or Path(parsed.onnx).with_suffix(".plan"))
    if output.suffix != ".plan":
        raise UserError(f"the other scripts know a plan by its name; call it {output.with_suffix('.plan')}.")
    usual = parsed.batch_size
    if usual is None:
        usual = min(max(_USUAL.usual_batch, parsed.min_batch), parsed.max_batch)
    options = BuildOptions(
        parsed.min_batch,
        usual,
        parsed.max_batch,
        parsed.image_size,
        parsed.workspace,
        parsed.version_compatible,
        parsed.hardware_compatible,
    )
    from effnet_quant.engines.tensorrt.plans import compile_engine

    print("building the plan; unless it is kept from before, that takes minutes", file=sys.stderr, flush=True)
    plan = compile_engine(parsed.onnx, output, options, timing_cache=parsed.timing_cache)
    print(format_layers(plan.layers) if parsed.layers else summarize(plan.layers))
    machine = f"{plan.machine.card} and TensorRT {plan.machine.tensorrt}"
    print(
        f"{printable(str(plan.path))}: {plan.path.stat().st_size:,} bytes, for {machine}, "
        f"{plan.input.smallest_batch} to {plan.input.largest_batch} images a run"
    )
    return 0


def main() -> None:
    """Entry point of the script."""
    run(job)
