"""Compares an engine with its simulation on the same examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effnet_quant.checks import AGREEMENT
from effnet_quant.errors import UserError
from effnet_quant.structure import in_float32, map_leaves
from effnet_quant.tasks.classification import CLASSIFICATION
from effnet_quant.tasks.task import Inputs, Outputs, Score, Targets, Task

_Z = 1.959964  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Comparison:
    """An engine beside its simulation.

    Attributes:
        images: how many examples were compared; images, for most tasks.
        engine, simulation: the figures of the task's metric.
        score: the figure that counts.
        agreement: share of the examples, in percent, on which both agree, as the task defines it.
        relative_error: ||engine - simulation|| / ||simulation|| over all numbers of the outputs; NaN if all are zero or
            there are none.
        mean_error, worst_error: mean and largest absolute difference of two numbers.
        worst_image: position of the example with the largest difference.
        own_agreement: share of the examples, in percent, on which the simulation agrees with itself computed in float64;
            100 unless it was measured.
    """

    images: int
    engine: dict[str, float]
    simulation: dict[str, float]
    score: Score
    agreement: float
    relative_error: float
    mean_error: float
    worst_error: float
    worst_image: int
    own_agreement: float = 100.0

    @property
    def engine_score(self) -> float:
        """The engine's score, in the score's unit."""
        return self.engine[self.score.key]

    @property
    def simulation_score(self) -> float:
        """The simulation's score, in the score's unit."""
        return self.simulation[self.score.key]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the agreement on further images of this kind, in percent (Wilson 1927)."""
        share, spread = self.agreement / 100, _Z * _Z / self.images
        middle = (share + spread / 2) / (1 + spread)
        half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
        return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)

    def gate(self, wanted: float = AGREEMENT) -> float:
        """The agreement, in percent, that an engine must reach: ``wanted``, or the simulation's with itself if that is less.

        A deep network may amplify a single rounding until its last layers round differently. No engine can agree with such
        a simulation more often than the simulation does with itself.
        """
        return min(wanted, self.own_agreement)

    def agrees(self, wanted: float = AGREEMENT) -> bool:
        """Whether these images do not exclude that the engine reaches its gate."""
        return self.interval[1] >= self.gate(wanted)

    def images_to_decide(self, gate: float) -> int | None:
        """How many images with this agreement would put ``gate``, in percent, outside the interval; None for no number."""
        share, wanted = self.agreement / 100, gate / 100
        if share == wanted or not 0 < wanted < 1:
            return None
        # a share lies in Wilson's interval if it is not rejected by the score test
        return math.ceil(_Z * _Z * wanted * (1 - wanted) / (share - wanted) ** 2 * (1 + 1e-9))


@torch.no_grad()
def compare(
    engine: Callable[..., Any],
    simulation: Callable[..., Outputs],
    batches: Iterable[tuple[Inputs, Targets]],
    task: Task = CLASSIFICATION,
) -> Comparison:
    """Run engine and simulation on the same batches.

    Args:
        engine: takes NumPy arrays; returns the simulation's outputs with arrays in place of tensors.
        simulation: takes and returns tensors on the CPU. A network must be in eval mode; it is not changed.
        batches: pairs of inputs and targets. Inputs are a tensor or a tuple of the arguments of both; images are normalised.
            Targets are those of ``task``.
        task: what the network is for.

    Raises:
        UserError: there are no examples, or the outputs of the two have different shapes.
    """
    cpu = torch.device("cpu")
    engine_metric, simulation_metric = task.metric(cpu), task.metric(cpu)
    errors = _Errors()
    agreements: list[Tensor] = []
    for inputs, targets in batches:
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        got = in_float32(map_leaves(torch.from_numpy, engine(*(tensor.numpy() for tensor in arguments))))
        expected = in_float32(simulation(*arguments))
        errors.add(task.compared(got), task.compared(expected))
        engine_metric.add(got, targets)
        simulation_metric.add(expected, targets)
        agreements.append(task.agreement(task.predictions(got), task.predictions(expected)))
    if not agreements:
        raise UserError("there are no images to compare the engine and its simulation on.")
    agreement = torch.cat(agreements)
    return Comparison(
        images=len(agreement),
        engine=engine_metric.results(),
        simulation=simulation_metric.results(),
        score=task.score,
        agreement=100 * agreement.mean().item(),
        relative_error=errors.relative,
        mean_error=errors.mean,
        worst_error=errors.worst,
        worst_image=errors.worst_example,
    )


class _Errors:
    """Differences of outputs, summed over batches in float64."""

    def __init__(self) -> None:
        self._sum = self._squares = self._expected_squares = 0.0
        self._numbers = 0
        self._worst: list[Tensor] = []  # of each example

    def add(self, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        shapes, wanted = _shapes(got), _shapes(expected)
        if shapes != wanted:
            raise UserError(
                f"the engine's outputs have the shape {_words(shapes)} and the model's {_words(wanted)}; give the weights "
                "that the engine was exported from."
            )
        worst = []
        for path, simulated in expected.items():
            difference = (got[path] - simulated).double().abs()
            self._sum += difference.sum().item()
            self._squares += difference.square().sum().item()
            self._expected_squares += simulated.double().square().sum().item()
            self._numbers += difference.numel()
            if difference.numel():
                worst.append(difference.reshape(len(difference), -1).amax(1))
        if worst:
            self._worst.append(torch.stack(worst).amax(0))

    @property
    def relative(self) -> float:
        if self._expected_squares == 0:
            return math.nan if self._squares == 0 else math.inf
        return math.sqrt(self._squares / self._expected_squares)

    @property
    def mean(self) -> float:
        return self._sum / self._numbers if self._numbers else math.nan

    @property
    def worst(self) -> float:
        return torch.cat(self._worst).max().item() if self._worst else math.nan

    @property
    def worst_example(self) -> int:
        return int(torch.cat(self._worst).argmax()) if self._worst else 0


def _shapes(outputs: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(tensor.shape) for path, tensor in outputs.items()}


def _words(shapes: dict[str, tuple[int, ...]]) -> str:
    named = [f"{path} {shape}".strip() for path, shape in sorted(shapes.items())]
    return ", ".join(named) or "of nothing"
