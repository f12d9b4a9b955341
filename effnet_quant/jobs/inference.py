"""Runs engines on the images of a data set: to compare them with their simulation, and to tune the placement."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.checks import AGREEMENT
from effnet_quant.checks.tuning import Tuning, tune
from effnet_quant.checks.verify import Comparison, compare
from effnet_quant.data.backends import open_loader
from effnet_quant.data.data_argument import open_sources, open_validation
from effnet_quant.data.loaders import Loader
from effnet_quant.data.sources import ImageSource
from effnet_quant.data.transforms import evaluation_transform, normalize
from effnet_quant.engines.engine import Engine, load_engine, usable_precisions
from effnet_quant.engines.tensorrt.plans import compile_engine, discard_plan
from effnet_quant.errors import UserError
from effnet_quant.export.file_formats import export_for
from effnet_quant.export.onnx import export_onnx
from effnet_quant.export.options import ExportOptions
from effnet_quant.quantization.placement.insertion import simulate_target
from effnet_quant.quantization.targets import Target, get_target
from effnet_quant.tasks.task import Task


def run_engine(engine: Engine, pixels: Tensor, spec: InputSpec) -> Tensor:
    """The engine's outputs for uint8 images (N, C, H, W), as real numbers.

    The images are normalised here if the engine takes float images.
    """
    images = pixels if engine.input.dtype == "uint8" else normalize(pixels, spec)
    return torch.from_numpy(engine.real(engine(images.numpy())))


def distance_to_qdq(loader: Loader, engine: Engine, model: nn.Module, spec: InputSpec) -> int:
    """How far an integer engine's outputs are from those of ONNX Runtime's engine of the same network, at most.

    The unit is the last place of the integer outputs. The two are not promised to be equal: the QDQ file rounds halves to
    even and computes its scales in float.

    Args:
        loader: the images.
        engine: of ``export_integer``.
        model: the quantized network that it was exported from.
        spec: how images are normalised.
    """
    scale = engine.card.output_scale
    assert scale is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "qdq.onnx")
        export_onnx(model, path, spec.image_size, target="onnxruntime")
        qdq = load_engine(path)
    distances = [
        (run_engine(qdq, pixels, spec).double() / scale - torch.from_numpy(engine(pixels.numpy()))).abs().max()
        for pixels, _ in loader.epoch()
    ]
    return round(float(torch.stack(distances).max()))


def validation_loader(data: str, card: ModelCard, spec: InputSpec, batch_size: int, workers: int = 0) -> Loader:
    """Load the validation images of ``data``, transformed for the model. Labels refer to the card's classes, if any.

    Raises:
        UserError: there are no such images, or the batch size is below 1.
    """
    if batch_size < 1:
        raise UserError("--batch-size must be at least 1.")
    source = open_validation(data, None if card.classes is None else list(card.classes))
    return open_loader("pytorch", source, evaluation_transform(spec), batch_size, torch.device("cpu"), workers=workers)


def open_images(data: str, card: ModelCard) -> ImageSource:
    """The validation images of ``data``. Labels refer to the card's classes, if any.

    Raises:
        UserError: there are no such images, or their classes are not the model's.
    """
    source = open_validation(data, None if card.classes is None else list(card.classes))
    count = len(source.classes)
    if card.num_classes is not None and count != card.num_classes:
        raise UserError(f"{data} has {count} classes, but the model has {card.num_classes}; give its data.")
    if card.classes is not None and (unknown := [name for name in source.classes if name not in card.classes]):
        raise UserError(f"{data} has the class {unknown[0]}, which the model does not know; give its data.")
    return source


def training_batches(
    data: str, card: ModelCard, spec: InputSpec, count: int, batch_size: int, workers: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Normalised batches of ``count`` training images, spread evenly over the set, and their labels.

    Raises:
        UserError: there are no training images, or the card's classes are not the data's.
    """
    source, _ = open_sources(data)
    if card.num_classes is not None and len(source.classes) != card.num_classes:
        raise UserError(
            f"{data} has {len(source.classes)} classes, but the model has {card.num_classes}; give its data."
        )
    count = min(count, len(source))
    loader = open_loader(
        "pytorch",
        source,
        evaluation_transform(spec),
        batch_size,
        torch.device("cpu"),
        workers=workers,
        indices=torch.arange(count) * len(source) // count,
    )
    pairs = [(normalize(pixels, spec), labels) for pixels, labels in loader.epoch()]
    return [images for images, _ in pairs], [labels for _, labels in pairs]


def simulate_engine(model: nn.Module, engine: Engine) -> nn.Module:
    """Let the simulation round where the engine does, according to its card. Changes the model in place and returns it."""
    card = engine.card
    if card.target is None:
        return model
    return simulate_target(model, get_target(card.target).leaving_in_float(card.float_operations))


def compare_on(
    loader: Loader, engine: Engine, model: nn.Module, spec: InputSpec, task: Task, gate: float = AGREEMENT
) -> Comparison:
    """Compare an engine with its simulation on the images of a loader.

    If the engine fails the gate, in percent, the simulation is compared with itself too.

    Raises:
        UserError: there are no images, or the outputs of the two have different shapes.
    """
    comparison = compare(
        lambda pixels: run_engine(engine, torch.from_numpy(pixels), spec).numpy(),
        lambda pixels: model(normalize(pixels, spec)),
        loader.epoch(),
        task,
    )
    if comparison.agrees(gate):
        return comparison
    return replace(comparison, own_agreement=own_agreement(model, loader.epoch(), spec, task))


def own_agreement(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], spec: InputSpec, task: Task) -> float:
    """The share of images, in percent, on which a simulation agrees with itself computed in float64.

    Args:
        model: in eval mode on the CPU; it is not changed.
        batches: uint8 images (N, C, H, W) and their targets.
        spec: how images are normalised.
        task: says when two answers agree.
    """
    exact = copy.deepcopy(model).double()
    return compare(
        lambda pixels: exact(normalize(torch.from_numpy(pixels), spec).double()).numpy(),
        lambda pixels: model(normalize(pixels, spec)),
        batches,
        task,
    ).agreement


def tune_on(
    pixels: Tensor,
    model: nn.Module,
    spec: InputSpec,
    target: str,
    options: ExportOptions,
    say: Callable[[str], None],
    precisions: Sequence[str] | None = None,
) -> Tuning:
    """Measure which operations run faster in float for ``target`` on this machine, with a batch of images.

    Args:
        pixels: uint8 (N, C, H, W).
        model: the calibrated quantized network.
        spec: how to normalise the pixels.
        target: the runtime.
        options: the form of the file.
        say: receives progress lines.
        precisions: precisions to try for float operations; None for all that this machine can use.

    Raises:
        UserError: the model is not quantized, or the runtime is missing.
    """
    with tempfile.TemporaryDirectory() as folder:

        def compile_for(rules: Target, precision: str) -> Callable[[], Any]:
            path = Path(folder, f"candidate{rules.suffix}")
            export_for(model, path, spec.image_size, rules, options=options)
            engine = load_engine(path, target, precision=precision)
            if target == "tensorrt":
                discard_plan(compile_engine(path))  # or the cache would keep the plan of every candidate
            return lambda: run_engine(engine, pixels, spec)

        return tune(model, get_target(target), compile_for, say, precisions or usable_precisions(target))
