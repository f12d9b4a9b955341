"""ptq: from a float model to a calibrated one, by a named list of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.errors import UserError
from effnet_quant.quantization.choices import DEFAULT_RECIPE
from effnet_quant.quantization.eager_evaluation import Batch, device_of, eager_pass, model_arguments
from effnet_quant.quantization.placement.insertion import quantize
from effnet_quant.quantization.ptq.adaptive_rounding import AdaptiveRounding
from effnet_quant.quantization.ptq.bias_correction import BiasCorrection
from effnet_quant.quantization.ptq.calibration_choice import Calibration, calibrate_best
from effnet_quant.quantization.ptq.compensated_rounding import CompensatedRounding
from effnet_quant.quantization.ptq.equalization import Equalization, equalize
from effnet_quant.quantization.ptq.judge import Judge, restore, saved
from effnet_quant.quantization.ptq.range_refinement import RangeRefinement
from effnet_quant.quantization.ptq.reconstruction import Reconstruction
from effnet_quant.quantization.ptq.step import DEFAULT_CONTEXT, Step, StepContext, checked_batches
from effnet_quant.quantization.spec import QuantSpec

FEWEST_EXAMPLES = 8  # with fewer, an error on the calibration images says little

Recipe = str | Sequence[Step]


@dataclass(frozen=True)
class Standard:
    """The recipe "standard": equalization, the best calibration method, finer ranges, compensated rounding, bias correction.

    Each part stays only if it brings the outputs for calibration images nearer to those of the float network. Equalization
    is tried against none, with a calibration each. No part sees a label.

    Attributes:
        methods: the calibration methods among which each calibration chooses.
        equalization, refinement, rounding, correction: the other steps. Without the last two where the rounding and biases
            are learned afterwards.
        judged: calibration examples on which errors are measured.
    """

    methods: tuple[tuple[str, float | None], ...] = (
        ("max", None),
        ("percentile", 99.99),
        ("mse", None),
    )
    equalization: Equalization = field(default_factory=Equalization)
    refinement: RangeRefinement = field(default_factory=RangeRefinement)
    rounding: CompensatedRounding | None = field(default_factory=CompensatedRounding)
    correction: BiasCorrection | None = field(default_factory=BiasCorrection)
    judged: int = 128

    def __call__(self, model: nn.Module, batches: Sequence[Batch], context: StepContext = DEFAULT_CONTEXT) -> None:
        batches = checked_batches(model, batches)
        judge, start = Judge(model, batches, self.judged), saved(model)
        error = calibrate_best(model, batches, judge, self.methods, context)
        plain = saved(model)
        restore(model, start)
        if equalize(model, batches, context, self.equalization) and (
            (equalized := calibrate_best(model, batches, judge, self.methods, context)) < error
        ):
            error = equalized
        else:
            restore(model, plain)
        error = judge.keeps(lambda: self.refinement(model, batches, context), error)
        for step in (self.rounding, self.correction):
            if step is not None:
                error = judge.keeps(partial(step, model, batches, context), error)


# Weights and biases that moved would make another float network, which learned rounding imitates.
_BEFORE_LEARNING = Standard(rounding=None, correction=None)
RECIPES: dict[str, tuple[Step, ...]] = {
    "minmax": (Calibration("max"),),
    "standard": (Standard(),),
    "adaround": (_BEFORE_LEARNING, AdaptiveRounding()),
    "reconstruct": (_BEFORE_LEARNING, Reconstruction()),
}


def ptq(
    model: nn.Module,
    batches: Iterable[Batch],
    spec: str | QuantSpec | Mapping[str, Any] = "w8a8",
    target: str = "onnxruntime",
    recipe: Recipe = DEFAULT_RECIPE,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> nn.Module:
    """Quantize a trained float model without training, in place.

    Args:
        model: a float model, as ``quantize`` takes it.
        batches: calibration examples, as ``calibrate`` takes them. They are kept in memory.
        spec: a preset's name, a QuantSpec or a mapping, as ``quantize`` takes it.
        target: the runtime to quantize for.
        recipe: "minmax", "standard", "adaround", "reconstruct", or a list of steps of ``quantization.ptq``, which run in
            turn.
        seed: of everything random.
        folder: where large activations and finished blocks are kept; None for the folder for temporary files.
        progress: called with the title of a part, and how much of it is done: ``progress("calibration", 3, 8)``.

    Returns:
        The same model with ranges; ``export_onnx`` writes it.

    Raises:
        UserError: there is no such recipe, or the model or the batches can't be used.
    """
    resolve_recipe(recipe)
    quantize(model, spec, target=target)
    context = StepContext(seed=seed, folder=None if folder is None else Path(folder))
    if progress is not None:
        context = StepContext(seed=seed, folder=context.folder, progress=progress)
    apply_recipe(model, batches, recipe, context)
    return model


def apply_recipe(
    model: nn.Module, batches: Iterable[Batch], recipe: Recipe = DEFAULT_RECIPE, context: StepContext = DEFAULT_CONTEXT
) -> None:
    """Run the steps of a recipe on a model that ``quantize`` has been through.

    Raises:
        UserError: there is no such recipe, or the model or the batches can't be used.
    """
    steps = resolve_recipe(recipe)
    usable = _of_several_examples(checked_batches(model, batches))
    _check_fit(model, usable)
    examples = sum(model_arguments(batch, torch.device("cpu"))[1] for batch in usable)
    if isinstance(recipe, str) and recipe != "minmax" and examples < FEWEST_EXAMPLES:
        raise UserError(
            f"the recipe '{recipe}' needs at least {FEWEST_EXAMPLES} calibration images, not {examples}; give more, or take "
            "the recipe 'minmax'."
        )
    for step in steps:
        step(model, usable, context)


def resolve_recipe(recipe: Recipe) -> Sequence[Step]:
    """The steps of a recipe.

    Raises:
        UserError: there is no recipe of that name, or a step can't be called.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise UserError(f"there is no PTQ recipe '{recipe}'; choose one of: {', '.join(RECIPES)}.")
        return RECIPES[recipe]
    for step in recipe:
        if not callable(step):
            raise UserError(f"a recipe's steps are objects such as Equalization(), not {step!r}.")
    return list(recipe)


def _of_several_examples(batches: list[Batch]) -> list[Batch]:
    """The same images in larger batches, if they come one by one: a block's values are told apart by their number."""
    single = all(isinstance(batch, Tensor) and len(batch) == 1 for batch in batches)
    same = len({batch.shape for batch in batches if isinstance(batch, Tensor)}) == 1
    return list(torch.cat(batches).split(32)) if single and same else batches  # type: ignore[arg-type]


def _check_fit(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Raises UserError if the model can't take the first batch, or the batches differ in more than their length."""
    shapes = {tuple(batch.shape[1:]) for batch in batches if isinstance(batch, Tensor)}
    if len(shapes) > 1:
        raise UserError(
            f"the calibration images have several shapes, {', '.join(map(str, sorted(shapes)))}; resize them to one."
        )
    arguments, _ = model_arguments(batches[0], device_of(model))
    try:
        with eager_pass(model):
            model(*arguments)
    except (RuntimeError, ValueError, TypeError) as error:
        shape = " ".join(str(tuple(value.shape)) for value in arguments if isinstance(value, Tensor))
        raise UserError(
            f"the model can't take calibration examples of shape {shape}; check their size and channels "
            f"({str(error).splitlines()[0]})."
        ) from error
