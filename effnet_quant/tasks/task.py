"""What a task is: all that training, verification and reports have to know of what a network is for."""

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
"""What a network returns: a tensor, or tuples, lists and dicts of tensors. Examples are the first dimension."""

Targets = Any
"""What is right for a batch, as its data source gives it: a tensor, or a list with an entry for each example."""

Inputs = Any
"""What a network is called with: a tensor, or a tuple of its arguments."""

Loss = Callable[[Outputs, Targets, Inputs], Tensor]
"""The mean loss of a batch, a scalar. Outputs are float32. Inputs are as the network takes them, for a loss that asks
another network too. It is called within the network's autocast."""

_T = TypeVar("_T", bound="Task")


class Processes(Protocol):
    """The processes that share the examples of a metric, as ``training.distributed.World`` is."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """One CPU tensor of equal shape from each process."""


class Metric(ABC):
    """What a network reaches on a data set, one batch after another."""

    @abstractmethod
    def add(self, outputs: Outputs, targets: Targets) -> None:
        """Count a batch; each example counts once, whatever the size of its batch."""

    @abstractmethod
    def merge(self, processes: Processes) -> None:
        """Count what the other processes have counted; all of them call it, once, after the last batch."""

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
        """The value, with its sign turned where lower is better: of two networks the better one has more."""
        return value if self.higher_is_better else -value


@dataclass(frozen=True)
class Task(ABC):
    """What a network is for. Its options are the fields of a subclass.

    Attributes:
        name: in ``TASKS`` and in files.
        score: decides which checkpoint is the best, and stands in reports.
        output_names: of a network's outputs, in exported files.
        agreement_title: when two networks agree on an example, in two words.
        error_title: the difference of a number in the outputs, in two words.
    """

    name: ClassVar[str]
    score: ClassVar[Score]
    output_names: ClassVar[tuple[str, ...]]
    agreement_title: ClassVar[str]
    error_title: ClassVar[str]

    def configured(self: _T, config: Any) -> _T:
        """This task with the options that ``config`` (a ``TrainConfig``) has under the same names."""
        names = [field.name for field in dataclasses.fields(self) if hasattr(config, field.name)]
        return dataclasses.replace(self, **{name: getattr(config, name) for name in names})

    @abstractmethod
    def loss(self, outputs: Outputs, targets: Targets, inputs: Inputs) -> Tensor:
        """What training minimises; see ``Loss``."""

    @abstractmethod
    def distillation_loss(self, outputs: Outputs, teacher_outputs: Outputs, temperature: float) -> Tensor:
        """How far a network is from its teacher on a batch, a scalar.

        ``temperature``, above 0, softens both where outputs are scores of classes; elsewhere it changes nothing.
        """

    def mixed(self, inputs: Inputs, targets: Targets, num_classes: int, seed: int) -> tuple[Inputs, Targets]:
        """A training batch with its examples mixed, if the options ask for that; ``seed`` decides how."""
        return inputs, targets

    @abstractmethod
    def metric(self, device: torch.device) -> Metric:
        """A new metric for outputs and targets on ``device``."""

    @abstractmethod
    def predictions(self, outputs: Outputs) -> Sequence[Any] | Tensor:
        """What raw outputs say, one entry for each example."""

    @abstractmethod
    def agreement(self, one: Any, other: Any) -> Tensor:
        """How far the predictions of two networks agree: for each example 0 … 1, float64 (N,)."""

    def compared(self, outputs: Outputs) -> dict[str, Tensor]:
        """The tensors, by path, whose numbers an engine must share with its simulation: all that hold floats."""
        return {path: tensor for path, tensor in leaves(outputs).items() if tensor.is_floating_point()}

    @abstractmethod
    def answers(self, outputs: Outputs, classes: Sequence[str] | None, count: int) -> list[dict[str, Any]]:
        """What raw outputs say to a person, as JSON values, one for each example.

        Args:
            outputs: on the CPU.
            classes: their names, None if they have none.
            count: at most so many findings for each example, the likeliest first.
        """

    @abstractmethod
    def answer_text(self, answer: dict[str, Any]) -> str:
        """One of ``answers`` as lines of text."""
