"""effnet-quant verify: compare an engine with its simulation, and check a graph against TensorRT's rules."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from effnet_quant.checks import AGREEMENT
from effnet_quant.cli.arguments import Parser, add_model_arguments
from effnet_quant.cli.engines import add_engine_arguments, chosen_engine, refuse_unused
from effnet_quant.cli.process import run
from effnet_quant.errors import UserError
from effnet_quant.tasks import get_task
from effnet_quant.terminal import printable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from effnet_quant.card import InputSpec, ModelCard
    from effnet_quant.checks.verify import Comparison
    from effnet_quant.engines.engine import Engine
    from effnet_quant.tasks.task import Task

BATCH = 32
LAYER_IMAGES = 8
_OF_COMPARISON = {
    "workers": "--workers",
    "min_agreement": "--min-agreement",
    "min_images": "--min-images",
    "layers": "--layers",
}
_OF_RUNNING = {
    "batch_size": "--batch-size",
    "backend": "--backend",
    "device": "--device",
    "engine_precision": "--engine-precision",
    "threads": "--threads",
}


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser("Compare an engine with its simulation on real images, or check a graph against TensorRT's rules.")
    add_model_arguments(parser, None)
    parser.add_argument("data", metavar="DATA", nargs="?", help="folder with val/<class>/, 'digits', 'cifar10' …")
    parser.add_argument("--model", metavar="FILE", dest="pretrained_from_file", help="same as --pretrained-from-file")
    parser.add_argument("--engine", required=True, metavar="FILE", help="the ONNX file, or a TensorRT plan")
    add_engine_arguments(parser)
    parser.add_argument("-b", "--batch-size", type=int, help=f"images per batch (default: {BATCH})")
    add_verify_arguments(parser)
    parser.add_argument("--lint", choices=("tensorrt",), help="check the graph against a runtime's placement rules")
    return parser


def job(arguments: Sequence[str]) -> int:
    """Verify as the command line says; returns the exit status, 1 if the engine fails."""
    parsed = build_parser().parse(arguments)
    if not parsed.data:
        if parsed.lint is None:
            raise UserError("on which images? Give DATA, or --lint tensorrt to check the graph alone.")
        refuse_unused(
            parsed, {**_OF_COMPARISON, **_OF_RUNNING}, "nothing is run without DATA; give it, or leave this out."
        )
    passed = True
    if parsed.lint is not None:
        passed = _lint(parsed.engine)
    if parsed.data:
        passed = _verify(parsed) and passed
    return 0 if passed else 1


def _lint(path: str) -> bool:
    from effnet_quant.checks.lint import lint_tensorrt
    from effnet_quant.engines.onnx_file import load_onnx, read_onnx

    read_onnx(path)  # a file that is missing or damaged is said there
    findings = lint_tensorrt(load_onnx(path))
    for finding in findings:
        print(printable(finding))
    print(
        f"{printable(path)}: {len(findings) or 'no'} finding{'s' * (len(findings) != 1)} against TensorRT's placement rules"
    )
    return not findings


def _verify(parsed: argparse.Namespace) -> bool:
    from effnet_quant.cli.file_card import card_to_start_from
    from effnet_quant.cli.model_flags import load_model

    engine = chosen_engine(parsed.engine, parsed)
    card_to_start_from(parsed)
    if not parsed.arch:
        parsed.arch = engine.card.arch
    parsed.image_size = None  # the file's
    model, card = load_model(parsed)
    return verify_engine(model, card, engine, parsed)


def add_verify_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the flags of the comparison."""
    parser = parser.add_argument_group("comparison")
    parser.add_argument("-j", "--workers", type=int, default=0, help="data loading processes")
    parser.add_argument(
        "--min-agreement",
        type=float,
        default=AGREEMENT,
        help="percent of images with the same class; fails if it is above the 95 %% interval of the agreement",
    )
    parser.add_argument("--min-images", type=int, default=1, help="images that must be there; fewer fail")
    parser.add_argument("--layers", action="store_true", help="print the table of layers also if the engine passes")


def refuse_comparison(parsed: argparse.Namespace) -> None:
    """Refuse the flags of ``add_verify_arguments`` if nothing is compared.

    Raises:
        UserError: one was given.
    """
    if parsed.tune:
        why = "this is of --verify; --tune reads a single batch. Give --verify too, or leave this out."
        refuse_unused(parsed, {"workers": "--workers"}, why)
    refuse_unused(parsed, _OF_COMPARISON, "nothing is compared without --verify; give it, or leave this out.")


def verify_engine(model: nn.Module, card: ModelCard, engine: Engine, parsed: argparse.Namespace) -> bool:
    """Compare engine and model on the validation images of ``parsed.data``, and print the result.

    ``model`` is changed to simulate the engine's target.

    Returns:
        Whether there are enough images, and these do not exclude that the two agree often enough.
    """
    from effnet_quant.jobs.inference import compare_on, distance_to_qdq, simulate_engine, validation_loader
    from effnet_quant.quantization.placement.insertion import output_quantizers

    simulate_engine(model, engine)
    if engine.card.target == "onnxruntime" and any(place.range is None for place in output_quantizers(model)):
        print(
            "note: the weights bring no ranges for the outputs of convolutions; the engine rounds there and the simulation "
            "does not. Weights that quant_main.py calibrated or trained have them."
        )
    spec = engine.card.input or card.input
    assert spec is not None
    batch_size = BATCH if parsed.batch_size is None else parsed.batch_size
    loader = validation_loader(parsed.data, card, spec, batch_size, parsed.workers)
    task = get_task(card.task)
    comparison = compare_on(loader, engine, model, spec, task, parsed.min_agreement)
    _print(comparison, task, engine, parsed)
    if engine.card.output_scale is not None:
        distance, unit = distance_to_qdq(loader, engine, model, spec), engine.card.output_scale
        print(f"{'distance to the QDQ engine':<26} {distance:,} in the last place, at most (one is {unit:.3g})")
    if parsed.layers or comparison.agreement < parsed.min_agreement:
        _print_layers(model, engine, next(iter(loader.epoch()))[0][:LAYER_IMAGES], spec, asked=parsed.layers)
    return comparison.agrees(parsed.min_agreement) and comparison.images >= parsed.min_images


def _print_layers(model: nn.Module, engine: Engine, pixels: Tensor, spec: InputSpec, *, asked: bool) -> None:
    """Print the table of layers. If there is none and the user asked for it, print why."""
    from effnet_quant.checks.layer_comparison import compare_layers, format_layers, shows_layers
    from effnet_quant.data.transforms import normalize
    from effnet_quant.quantization.placement.insertion import quantizers

    if not any(True for _ in quantizers(model)):
        reason = "the model is not quantized"
    elif engine.card.output_scale is not None:
        reason = "the engine computes with integers alone"
    elif not shows_layers(engine):
        reason = f"{engine.backend} shows no values in between; verify the ONNX file in ONNX Runtime or OpenVINO"
    else:
        print(format_layers(compare_layers(engine, model, normalize(pixels, spec), pixels)))
        return
    if asked:
        print(f"note: there is no table of layers: {reason}.")


def _print(comparison: Comparison, task: Task, engine: Engine, parsed: argparse.Namespace) -> None:
    gate, score = parsed.min_agreement, comparison.score
    low, high = comparison.interval
    rows: dict[str, Any] = {
        "engine": f"{engine.backend}, {engine.precision}",
        "images": f"{comparison.images}",
        f"{score.title}, simulation": f"{comparison.simulation_score:.2f} {score.unit}",
        f"{score.title}, engine": f"{comparison.engine_score:.2f} {score.unit}",
        task.agreement_title: f"{comparison.agreement:.2f} % (95 % interval {low:.2f} to {high:.2f} %; gate {gate:g} %)",
        f"{task.error_title}, mean": f"{comparison.mean_error:.3g}",
        f"{task.error_title}, worst": f"{comparison.worst_error:.3g} (image {comparison.worst_image})",
        f"{task.error_title}, relative L2": f"{comparison.relative_error:.2e}",
    }
    for title, text in rows.items():
        print(f"{title:<26} {printable(text)}")
    if comparison.own_agreement < gate:
        print(f"{'simulation with itself':<26} {comparison.own_agreement:.2f} %, computed in float64")
    if comparison.agrees(gate) and comparison.images < parsed.min_images:
        print(f"{comparison.images} images are fewer than {parsed.min_images}; give more, or lower --min-images.")
    else:
        print(verdict(comparison, gate))


def verdict(comparison: Comparison, gate: float = AGREEMENT) -> str:
    """What a comparison says of an engine that must agree with its simulation on ``gate`` percent of the images."""
    low, high = comparison.interval
    if not comparison.agrees(gate):
        return "the engine departs from the simulation"
    if high < gate:
        return (
            "the engine is as close to the simulation as the simulation is to itself: this network amplifies single "
            f"roundings, and its simulation in float64 has the same answer on {comparison.own_agreement:.2f} %"
        )
    if low >= gate:
        return "the engine does what the simulation says"
    count = comparison.images_to_decide(gate)
    enough = f"{count:,} images like these would decide" if count else "no number of images like these would decide"
    said = "does what the simulation says on" if comparison.agreement >= gate else "may depart from the simulation on"
    return f"the engine {said} these {comparison.images} images, too few for {gate:g} %; {enough}"


def main() -> None:
    """Entry point of ``effnet-quant verify``."""
    run(job)
