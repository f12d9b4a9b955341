"""Task: the loss, metric, predictions and wording that training, verification and reports need."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from effnet_quant.structure import leaves

Outputs = Any
"""A network's outputs: a tensor, or tuples, lists and dicts of tensors. The first dimension counts examples."""

Targets = Any
"""The right answers of a batch, as its data source gives them: a tensor, or a list with one entry per example."""

Inputs = Any
"""A network's inputs: a tensor, or a tuple of its arguments."""

Loss = Callable[[Outputs, Targets, Inputs], Tensor]
"""The mean loss of a batch, a scalar. Outputs are float32. A loss that runs another network, such as a teacher, needs the
inputs. It is called within the network's autocast."""

_T = TypeVar("_T", bound="Task")


class Processes(Protocol):
    """The processes that share the examples of a metric, e.g. a ``training.distributed.World``."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """One CPU tensor of equal shape from each process."""


class Metric(ABC):
    """Collects figures of a network on a data set, batch by batch."""

    @abstractmethod
    def add(self, outputs: Outputs, targets: Targets) -> None:
        """Count a batch. Each example has the same weight, whatever the size of its batch."""

    @abstractmethod
    def merge(self, processes: Processes) -> None:
        """Add the counts of the other processes. All processes call it once, after the last batch."""

    @abstractmethod
    def results(self) -> dict[str, float]:
        """The figures by name."""


@dataclass(frozen=True)
class Score:
    """The figure of a metric that decides which of two networks is better.

    Attributes:
        key: its name among ``Metric.results``.
        title: its name in sentences and tables.
        unit: e.g. "%" or "dB".
        higher_is_better: False for rates of errors.
    """

    key: str
    title: str
    unit: str
    higher_is_better: bool = True

    def ranked(self, value: float) -> float:
        """The value, negated if lower is better. So the better of two networks has the higher result."""
        return value if self.higher_is_better else -value


@dataclass(frozen=True)
class Task(ABC):
    """What a network is for. A subclass has its options as fields.

    Attributes:
        name: in ``TASKS`` and in files.
        score: the figure that decides which checkpoint is best; reports show it.
        output_names: names of a network's outputs in exported files.
        agreement_title: title of the share of examples on which two networks agree, e.g. "same class".
        error_title: title of the error of an engine's outputs, e.g. "logit error".
    """

    name: ClassVar[str]
    score: ClassVar[Score]
    output_names: ClassVar[tuple[str, ...]]
    agreement_title: ClassVar[str]
    error_title: ClassVar[str]

    def configured(self: _T, config: Any) -> _T:
        """A copy of this task with its options taken from the fields of ``config`` (a ``TrainConfig``) by name."""
        names = [field.name for field in dataclasses.fields(self) if hasattr(config, field.name)]
        return dataclasses.replace(self, **{name: getattr(config, name) for name in names})

    @abstractmethod
    def loss(self, outputs: Outputs, targets: Targets, inputs: Inputs) -> Tensor:
        """The loss that training minimises; see ``Loss``."""

    @abstractmethod
    def distillation_loss(self, outputs: Outputs, teacher_outputs: Outputs, temperature: float) -> Tensor:
        """The distance between a network's and its teacher's outputs on a batch, a scalar.

        ``temperature``, above 0, softens scores of classes; other outputs ignore it.
        """

    def mixed(self, inputs: Inputs, targets: Targets, num_classes: int, seed: int) -> tuple[Inputs, Targets]:
        """A training batch, with its examples mixed (e.g. mixup) if the options ask for that. ``seed`` decides how."""
        return inputs, targets

    @abstractmethod
    def metric(self, device: torch.device) -> Metric:
        """A new metric for outputs and targets on ``device``."""

    @abstractmethod
    def predictions(self, outputs: Outputs) -> Sequence[Any] | Tensor:
        """The predictions in raw outputs, one entry per example."""

    @abstractmethod
    def agreement(self, one: Any, other: Any) -> Tensor:
        """The agreement of two networks' predictions: 0 … 1 for each example, float64 (N,)."""

    def compared(self, outputs: Outputs) -> dict[str, Tensor]:
        """The output tensors, by path, that verify compares between engine and simulation: all that hold floats."""
        return {path: tensor for path, tensor in leaves(outputs).items() if tensor.is_floating_point()}

    @abstractmethod
    def answers(self, outputs: Outputs, classes: Sequence[str] | None, count: int) -> list[dict[str, Any]]:
        """The answers shown to a person, as JSON values, one per example.

        Args:
            outputs: raw outputs, on the CPU.
            classes: names of the classes; None if unknown.
            count: most findings per example, the likeliest first.
        """

    @abstractmethod
    def answer_text(self, answer: dict[str, Any]) -> str:
        """One entry of ``answers`` as lines of text, with names from files made ``printable``."""
