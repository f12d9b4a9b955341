"""From a float and a quantized network to their engines, compared with PyTorch on the validation images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from effnet_quant.api import build, choose_card
from effnet_quant.checks.latency import median_seconds
from effnet_quant.checks.verify import Comparison
from effnet_quant.engines.engine import Engine, load_engine
from effnet_quant.errors import UserError
from effnet_quant.export.onnx import export_onnx
from effnet_quant.jobs.inference import compare_on, simulate_engine, validation_loader
from effnet_quant.models.weights import read_weights, write_weights
from effnet_quant.report.summary import Row
from effnet_quant.tasks import get_task

FLOAT, INT8 = "float.onnx", "int8.onnx"
WEIGHTS = "int8.safetensors"
_BATCH = 32


@dataclass(frozen=True)
class VerifiedEngine:
    """An INT8 engine and what was measured of it.

    Attributes:
        path: the ONNX file.
        comparison: the engine beside its simulation.
        rows: the float and the INT8 engine with their scores, sizes and speeds on this machine.
    """

    path: Path
    comparison: Comparison
    rows: list[Row]


def export_verified(float_weights: Path, quantized: Path, data: str, folder: Path, target: str) -> VerifiedEngine:
    """Export a float network and its quantized form, compare both engines with PyTorch, and time them in turns.

    Writes ``float.onnx``, ``int8.onnx`` and ``int8.safetensors``.

    Args:
        float_weights, quantized: checkpoints or weights files with cards.
        data: the DATA argument; its validation images are compared.
        folder: where the files go.
        target: the runtime, which must be installed.

    Raises:
        UserError: a file can't be used, the network can't be exported, or there are no validation images.
    """
    engines, comparisons = [], []
    for name, weights in ((FLOAT, float_weights), (INT8, quantized)):
        engine, comparison = _compared(weights, folder / name, data, target, quantized=name == INT8)
        engines.append(engine)
        comparisons.append(comparison)
    one = [partial(engine, *engine.example_inputs(1)) for engine in engines]
    many = [partial(engine, *engine.example_inputs(_BATCH)) for engine in engines]
    rows = [
        Row(title, comparison.engine_score, 1e3 * single, _BATCH / batch, (folder / name).stat().st_size, agreement)
        for title, name, comparison, single, batch, agreement in zip(
            ("FP32 engine", "INT8 engine"),
            (FLOAT, INT8),
            comparisons,
            median_seconds(one),
            median_seconds(many),
            [comparison.agreement for comparison in comparisons],
            strict=True,
        )
    ]
    return VerifiedEngine(folder / INT8, comparisons[1], rows)


def _compared(path: Path, output: Path, data: str, target: str, *, quantized: bool) -> tuple[Engine, Comparison]:
    """Export the network of a checkpoint, and compare its engine with its simulation."""
    weights = read_weights(path)
    if weights.card.arch is None:
        raise UserError(f"{path} does not say of which network it is; train again, or export it with --arch.")
    card = choose_card(weights.card.arch, weights, quantized=quantized)
    model = build(card, weights).eval()
    assert card.input is not None
    if quantized:
        write_weights(output.parent / WEIGHTS, model.state_dict(), card)
    export_onnx(model, output, card.input.image_size, target=target, card=card)
    engine = load_engine(output, target)
    loader = validation_loader(data, card, card.input, _BATCH)
    return engine, compare_on(loader, engine, simulate_engine(model, engine), card.input, get_task(card.task))
