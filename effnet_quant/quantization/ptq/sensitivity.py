"""Measures what each layer costs when it alone is quantized."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from effnet_quant.errors import UserError
from effnet_quant.quantization.eager_evaluation import Batch, device_of
from effnet_quant.quantization.ptq.partial_runs import (
    PartialRuns,
    output_quantizers_of_layers,
    quantizers_of_layer,
    rounding,
)
from effnet_quant.quantization.ptq.step import DEFAULT_CONTEXT, StepContext, checked_batches
from effnet_quant.quantization.quantized_layers import layer_operation
from effnet_quant.quantization.quantizer import in_float
from effnet_quant.structure import in_float32, leaves, map_leaves
from effnet_quant.tasks.classification import CLASSIFICATION
from effnet_quant.tasks.task import Outputs, Targets, Task


@dataclass(frozen=True)
class Figures:
    """A network's outputs beside those of the float network, on the same examples.

    Attributes:
        noise: ||outputs - float outputs||² / ||float outputs||².
        agreement: share of the examples, in percent, on which both agree, as the task defines it.
        score: the task's score; None without targets.
    """

    noise: float
    agreement: float
    score: float | None

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise ratio of the outputs in dB: infinite without noise, NaN if an output is NaN."""
        if math.isnan(self.noise):
            return math.nan
        return math.inf if self.noise == 0 else -10 * math.log10(self.noise)


class Judge:
    """Compares outputs with those of the float network.

    Args:
        reference: outputs of the float network, as ``PartialRuns.outputs`` yields them.
        targets: the right answers, one entry for each batch; None if they are not known.
        task: what the network is for.
        device: of the outputs.

    Attributes:
        float: the float network's own figures.
        task: what the network is for.

    Raises:
        UserError: there are more or fewer targets than examples.
    """

    def __init__(
        self,
        reference: Iterable[tuple[slice, Outputs]],
        targets: Sequence[Targets] | None,
        task: Task,
        device: torch.device,
    ) -> None:
        self.task = task
        self._device = device
        self._targets = None if targets is None else _joined(targets)
        parts = [
            map_leaves(lambda x: x.cpu(), in_float32(outputs)) for _, outputs in reference
        ]  # the CPU has the memory
        self._reference = _joined_outputs(parts)
        examples = len(next(iter(leaves(self._reference).values())))
        if self._targets is not None and len(self._targets) != examples:
            raise UserError(f"there are {len(self._targets)} targets for {examples} examples; give one for each.")
        self.float = self.figures([(slice(0, examples), map_leaves(lambda x: x.to(device), self._reference))])

    def figures(self, found: Iterable[tuple[slice, Outputs]]) -> Figures:
        """The figures of outputs for the same rows as the reference's, in any order."""
        signal = noise = agreed = 0.0
        examples = 0
        metric = None if self._targets is None else self.task.metric(self._device)
        for rows, results in found:
            outputs = in_float32(results)
            wanted = self._wanted(rows)
            ours, theirs = self.task.compared(outputs), self.task.compared(wanted)
            signal += sum(value.double().square().sum().item() for value in theirs.values())
            noise += sum((ours[path] - value).double().square().sum().item() for path, value in theirs.items())
            agreed += self.task.agreement(self.task.predictions(outputs), self.task.predictions(wanted)).sum().item()
            examples += rows.stop - rows.start
            if metric is not None and self._targets is not None:
                targets = self._targets[rows]
                metric.add(outputs, targets.to(self._device) if isinstance(targets, torch.Tensor) else targets)
        score = None if metric is None else metric.results()[self.task.score.key]
        return Figures(noise / signal if signal else math.nan, 100 * agreed / examples, score)

    def _wanted(self, rows: slice) -> Outputs:
        return map_leaves(lambda x: x[rows].to(self._device), self._reference)

    def loss(self, figures: Figures) -> float:
        """How far a network falls behind the float network: by the score, without targets by the agreement in points."""
        if figures.score is None or self.float.score is None:
            return 100 - figures.agreement
        ranked = self.task.score.ranked
        return ranked(self.float.score) - ranked(figures.score)


def _joined_outputs(parts: list[Outputs]) -> Outputs:
    """One structure with the examples of all."""
    paths = [leaves(part) for part in parts]
    joined = iter([torch.cat([part[path] for part in paths]) for path in paths[0]])
    return map_leaves(lambda _: next(joined), parts[0])


def _joined(targets: Sequence[Targets]) -> Any:
    if all(isinstance(part, torch.Tensor) for part in targets):
        return torch.cat(list(targets))
    return [entry for part in targets for entry in part]


@dataclass(frozen=True)
class LayerSensitivity:
    """The network with one layer quantized.

    Attributes:
        layer: its name.
        operation: its kind, of the targets' OPERATIONS.
        sqnr: of the network's outputs, in dB; None without any noise.
        agreement: with the float network, in percent of the examples.
        loss: how much of the task's score is lost, in the score's unit; without targets, 100 - agreement.
    """

    layer: str
    operation: str
    sqnr: float | None
    agreement: float
    loss: float


@dataclass(frozen=True)
class SensitivityTable:
    """What each layer costs when it alone is quantized.

    Attributes:
        rows: one entry a layer, in the order of the network.
        measure: what ``loss`` counts, e.g. "top-1, %".
        examples: how many there were.
        float_score: the score of the float network; None without targets.
        evaluations: what the table cost, in passes of all blocks over all examples.
    """

    rows: tuple[LayerSensitivity, ...]
    measure: str
    examples: int
    float_score: float | None
    evaluations: float

    def worst_first(self) -> list[LayerSensitivity]:
        """The rows, those with the most noise first."""
        return sorted(self.rows, key=lambda row: math.inf if row.sqnr is None else row.sqnr)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """The table as text, the most sensitive layer first."""
        width = max(len("layer"), *(len(row.layer) for row in self.rows))
        lines = [f"{'layer':<{width}}  {'operation':<9}  {'SQNR dB':>8}  {'agree %':>8}  {'loss':>7}"]
        for row in self.worst_first():
            sqnr = "none" if row.sqnr is None else f"{row.sqnr:.1f}"
            lines.append(
                f"{row.layer:<{width}}  {row.operation:<9}  {sqnr:>8}  {row.agreement:>8.2f}  {row.loss:>7.2f}"
            )
        each = self.evaluations / len(self.rows)
        lines.append(
            f"{self.examples} examples; loss: {self.measure}; the table cost {each:.2f} evaluations of the network a layer"
        )
        return "\n".join(lines)


def sensitivity(
    model: nn.Module,
    batches: Iterable[Batch],
    targets: Sequence[Targets] | None = None,
    task: Task = CLASSIFICATION,
    context: StepContext = DEFAULT_CONTEXT,
) -> SensitivityTable:
    """Measure, layer by layer, what a network loses when that layer alone is quantized.

    A layer is a convolution or linear layer with the quantizers of its input, weights and output. The float values at the
    start of each block are kept, and only the blocks from the layer on run. So a table costs about half an evaluation a
    layer. The model is left as it was.

    Args:
        model: a model that ``quantize`` has been through, with ranges.
        batches: examples, as ``calibrate`` takes them.
        targets: the right answers, one entry for each batch; None if they are not known.
        task: what the network is for.
        context: memory, folder and progress.

    Raises:
        UserError: no examples, no quantizers, NaN in a batch, no ranges, or a model that can't be traced.
    """
    batches = checked_batches(model, batches)
    runs = PartialRuns(model, batches, context)
    outputs = output_quantizers_of_layers(model)
    rows: list[LayerSensitivity] = []
    with in_float(model):
        judge = Judge(runs.outputs(), targets, task, device_of(model))
        for layer, total in _counted(runs, model):
            context.progress("sensitivity", len(rows), total)
            quantizers = quantizers_of_layer(model, layer, outputs)
            if not quantizers:
                continue  # the spec leaves it in float
            for quantizer in quantizers:
                if not quantizer.calibrated:
                    raise UserError(f"{layer} has no ranges; calibrate the model first.")
            with rounding(quantizers):
                figures = judge.figures(runs.outputs())
            rows.append(row_of(model, layer, figures, judge))
    context.progress("sensitivity", len(rows), len(rows))
    if not rows:
        raise UserError("the quantization spec leaves every layer in float; there is nothing to measure.")
    return SensitivityTable(tuple(rows), measure_of(judge), len(runs), judge.float.score, runs.block_runs / runs.blocks)


def row_of(model: nn.Module, layer: str, figures: Figures, judge: Judge) -> LayerSensitivity:
    """The row of a layer."""
    sqnr = figures.sqnr
    return LayerSensitivity(
        layer,
        layer_operation(model.get_submodule(layer)),
        None if math.isinf(sqnr) else sqnr,
        figures.agreement,
        judge.loss(figures),
    )


def measure_of(judge: Judge) -> str:
    """What ``Judge.loss`` counts, in words."""
    score = judge.task.score
    return f"{judge.task.agreement_title}, %" if judge.float.score is None else f"{score.title}, {score.unit}"


def _counted(runs: PartialRuns, model: nn.Module) -> Iterator[tuple[str, int]]:
    total = sum(hasattr(module, "_weight_quantizer") for module in model.modules())
    for layer in runs.layers():
        yield layer, total
