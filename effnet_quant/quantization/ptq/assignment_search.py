"""Searches the bits of each layer along a path from the cheapest network to the best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from effnet_quant.errors import UserError
from effnet_quant.quantization.ptq.sensitivity import Judge
from effnet_quant.quantization.spec import QuantSpec
from effnet_quant.tasks.task import Outputs

BASE = "w8a8"  # of all that lies between layers
BIT_OPERATIONS, WEIGHT_BYTES, LATENCY = "bit-operations", "weight-bytes", "latency"
COSTS = (BIT_OPERATIONS, WEIGHT_BYTES, LATENCY)
TRIALS = 16  # whole networks that are measured to make one that meets a target cheaper

Assignment = Mapping[str, str]  # from a layer's name to a candidate


@dataclass(frozen=True)
class Budget:
    """The most that a network may cost.

    Attributes:
        cost: "bit-operations" (multiply-adds x bits of a weight x bits of an activation, for one example), "weight-bytes" or
            "latency" in milliseconds.
        amount: the limit; with ``share`` as a share of what the network costs with every layer in w8a8.
        share: whether ``amount`` is such a share.

    Raises:
        UserError: another cost, or an amount that is not above 0.
    """

    cost: str
    amount: float
    share: bool = False

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise UserError(f"a budget limits one of {', '.join(COSTS)}, not '{self.cost}'.")
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise UserError(f"a budget must be above 0, not {self.amount:g}.")

    @staticmethod
    def parse(text: str) -> Budget:
        """The budget in words: "weight-bytes=52.5%" is a share of w8a8's, "latency=3.2" is 3.2 ms.

        Raises:
            UserError: the text has another form.
        """
        cost, separator, amount = text.partition("=")
        try:
            if not separator:
                raise ValueError
            number = float(amount.removesuffix("%"))
        except ValueError as error:
            raise UserError(
                f"the budget {text!r} can't be read; write e.g. weight-bytes=52.5% (of w8a8's) or latency=3.2 (ms)."
            ) from error
        share = amount.endswith("%")
        return Budget(cost, number / 100 if share else number, share)


@dataclass(frozen=True)
class Measured:
    """A whole network that was measured.

    Attributes:
        cost: as the search counts it.
        loss: how much of the task's score is lost; without targets, 100 - agreement.
        sqnr: of the outputs, in dB.
    """

    cost: float
    loss: float
    sqnr: float


class Network(Protocol):
    """A network whose layers can take any candidate."""

    def cost(self, kind: str, layer: str, candidate: str) -> float:
        """The cost of a layer; for latency, which no layer has alone, its bit operations."""

    def run(self, assignment: Assignment) -> Iterator[tuple[slice, Outputs]]:
        """The outputs of the whole network, everything quantized."""

    def spec_of(self, assignment: Assignment) -> QuantSpec:
        """The assignment as a spec."""


class Search:
    """Looks for an assignment along the path from every layer's cheapest candidate to its best."""

    def __init__(
        self,
        network: Network,
        judge: Judge,
        noise: Mapping[str, Mapping[str, float]],
        budget: Budget | None,
        latency: Callable[[QuantSpec], float] | None,
    ) -> None:
        self.history: dict[tuple[str, ...], Measured] = {}
        self._seen: list[Assignment] = []
        self._network = network
        self._judge = judge
        self._noise = noise
        self._budget = budget
        self._latency = latency
        self._kind = BIT_OPERATIONS if budget is None else budget.cost
        self._latencies: dict[tuple[str, ...], float] = {}
        # candidates by layer, the cheapest first; each dearer one makes less noise
        self._ladder = {layer: self._rungs(layer) for layer in noise}
        self.path = self._path()

    def measured(self, assignment: Assignment) -> Measured:
        """Measure a whole network, once."""
        key = tuple(assignment.values())
        if key not in self.history:
            figures = self._judge.figures(self._network.run(assignment))
            self.history[key] = Measured(self.cost(assignment), self._judge.loss(figures), figures.sqnr)
            self._seen.append(assignment)
        return self.history[key]

    def cost(self, assignment: Assignment) -> float:
        """The cost that the search counts."""
        if self._kind != LATENCY:
            return sum(self._network.cost(self._kind, *pair) for pair in assignment.items())
        key = tuple(assignment.values())
        if key not in self._latencies:
            assert self._latency is not None
            self._latencies[key] = self._latency(self._network.spec_of(assignment))
        return self._latencies[key]

    def for_target(self, drop: float) -> tuple[Assignment, bool]:
        """The cheapest assignment whose loss is at most ``drop``, and whether there is one."""
        low, high = 0, len(self.path) - 1
        if self.measured(self.path[high]).loss > drop:
            best = min(self._seen, key=lambda assignment: self.measured(assignment).loss)
            return best, False
        while low < high:
            middle = (low + high) // 2
            if self.measured(self.path[middle]).loss <= drop:
                high = middle
            else:
                low = middle + 1
        return self._lowered(self.path[high], drop), True

    def _lowered(self, found: Assignment, drop: float) -> Assignment:
        """Lower layers, those first that save most, as long as the loss stays within ``drop``."""
        refused: set[tuple[str, str]] = set()
        for _ in range(TRIALS):
            steps = []
            for layer, chosen in found.items():
                ladder = self._ladder[layer]
                below = ladder.index(chosen) - 1
                if below >= 0 and (layer, ladder[below]) not in refused:
                    saved = self._network.cost(self._kind, layer, chosen) - self._network.cost(
                        self._kind, layer, ladder[below]
                    )
                    added = self._noise[layer][ladder[below]] - self._noise[layer][chosen]
                    steps.append((saved / max(added, 1e-30), layer, ladder[below]))
            if not steps:
                break
            _, layer, lower = max(steps)
            trial = {**found, layer: lower}
            if self.measured(trial).loss <= drop:
                found = trial
            else:
                refused.add((layer, lower))
        return found

    def for_budget(self) -> tuple[Assignment, bool]:
        """The assignment with the least noise within the budget."""
        assert self._budget is not None
        limit = self._budget.amount
        if self._budget.share:
            limit *= self.cost(dict.fromkeys(self._noise, BASE))
        if self.cost(self.path[0]) > limit:
            raise UserError(
                f"the budget of {limit:.4g} ({self._budget.cost}) can't be met: the cheapest network costs "
                f"{self.cost(self.path[0]):.4g}; raise it, or add cheaper candidates."
            )
        low, high = 0, len(self.path) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.cost(self.path[middle]) <= limit:
                low = middle
            else:
                high = middle - 1
        found = dict(self.path[low])
        if self._kind != LATENCY:
            found = self._filled(found, limit)
        return found, True

    def _filled(self, found: dict[str, str], limit: float) -> dict[str, str]:
        """Raise the layers for which there is still room, the path's next ones first."""
        spent = self.cost(found)
        for before, after in itertools.pairwise(self.path):
            (layer,) = (name for name in after if after[name] != before[name])
            if found[layer] != before[layer]:
                continue
            more = self._network.cost(self._kind, layer, after[layer]) - self._network.cost(
                self._kind, layer, found[layer]
            )
            if spent + more <= limit:
                found[layer] = after[layer]
                spent += more
        return found

    def _rungs(self, layer: str) -> list[str]:
        """The candidates on the lower convex hull of noise over cost."""
        noise = {name: min(value, 1e6) for name, value in self._noise[layer].items()}
        cost = {name: self._network.cost(self._kind, layer, name) for name in noise}
        work = {name: self._network.cost(BIT_OPERATIONS, layer, name) for name in noise}
        rungs: list[str] = []
        for name in sorted(noise, key=lambda name: (cost[name], work[name])):
            # Of two with the same weight bytes, the one that computes with fewer bits stands.
            if rungs and (noise[name] >= noise[rungs[-1]] or cost[name] == cost[rungs[-1]]):
                continue
            while len(rungs) > 1 and _slope(cost, noise, rungs[-1], name) > _slope(cost, noise, rungs[-2], rungs[-1]):
                rungs.pop()
            rungs.append(name)
        return rungs

    def _path(self) -> list[dict[str, str]]:
        """Assignments from the cheapest to the best, each with one layer raised."""
        steps: list[tuple[float, str, str]] = []
        for layer, rungs in self._ladder.items():
            noise = {name: min(value, 1e6) for name, value in self._noise[layer].items()}
            cost = {name: self._network.cost(self._kind, layer, name) for name in noise}
            steps += [(_slope(cost, noise, low, high), layer, high) for low, high in itertools.pairwise(rungs)]
        path = [{layer: rungs[0] for layer, rungs in self._ladder.items()}]
        # Slopes fall along a convex hull, and sorting is stable: a layer's steps keep their order.
        for _, layer, high in sorted(steps, key=lambda step: -step[0]):
            path.append({**path[-1], layer: high})
        return path


def _slope(cost: Mapping[str, float], noise: Mapping[str, float], low: str, high: str) -> float:
    """Noise saved for each unit of cost."""
    more = cost[high] - cost[low]
    return math.inf if more <= 0 else (noise[low] - noise[high]) / more
