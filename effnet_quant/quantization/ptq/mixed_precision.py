"""Chooses the bits of each layer: the cheapest network that loses little, or the best one within a budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effnet_quant.errors import UserError
from effnet_quant.quantization.calibration import collect, set_ranges
from effnet_quant.quantization.calibration.calibrator import Calibrator
from effnet_quant.quantization.calibration.methods import DEFAULT_METHOD, Method, calibrator_factory
from effnet_quant.quantization.eager_evaluation import Batch, device_of, eager_pass
from effnet_quant.quantization.placement.insertion import quantize, quantizers, simulate_target
from effnet_quant.quantization.ptq.assignment_search import (
    BASE,
    BIT_OPERATIONS,
    LATENCY,
    WEIGHT_BYTES,
    Assignment,
    Budget,
    Measured,
    Search,
)
from effnet_quant.quantization.ptq.layer_costs import LayerCost, layer_costs
from effnet_quant.quantization.ptq.partial_runs import PartialRuns, output_quantizers_of_layers
from effnet_quant.quantization.ptq.sensitivity import Figures, Judge, measure_of
from effnet_quant.quantization.ptq.step import DEFAULT_CONTEXT, StepContext, batches_on, checked_batches
from effnet_quant.quantization.quantized_layers import float_weight
from effnet_quant.quantization.quantizer import TensorQuantizer, in_float
from effnet_quant.quantization.spec import FLOAT, QuantSpec, resolve_spec
from effnet_quant.quantization.targets import Target, get_target
from effnet_quant.tasks.classification import CLASSIFICATION
from effnet_quant.tasks.task import Outputs, Targets, Task

CANDIDATES = ("w4a8", "w8a8", "w8a16", FLOAT)


@dataclass(frozen=True)
class MixedPrecision:
    """The bits that were chosen for each layer.

    Attributes:
        assignment: the candidate of each layer.
        spec: the same as a QuantSpec, with an override for each layer that is not w8a8.
        found: the network as it was measured in the end.
        reached: whether it meets the target.
        measure: what ``found.loss`` counts, e.g. "top-1, %".
        sqnr: of the outputs in dB when one layer alone has a candidate, by layer and candidate.
        costs: weight bytes and bit operations of the network, and of all layers in w4a8 and in w8a8.
        history: all whole networks that were measured, in turn.
    """

    assignment: dict[str, str]
    spec: QuantSpec
    found: Measured
    reached: bool
    measure: str
    sqnr: dict[str, dict[str, float]]
    costs: dict[str, dict[str, float]]
    history: tuple[Measured, ...]

    def __str__(self) -> str:
        """A table of the layers, and a few lines about the whole."""
        names = list(next(iter(self.sqnr.values())))
        width = max(len("layer"), *map(len, self.assignment))
        lines = [f"{'layer':<{width}}  {'chosen':<6}" + "".join(f"  {name + ' dB':>9}" for name in names)]
        for layer, chosen in self.assignment.items():
            figures = "".join(f"  {self.sqnr[layer][name]:>9.1f}" for name in names)
            lines.append(f"{layer:<{width}}  {chosen:<6}{figures}")
        for cost, values in self.costs.items():
            lines.append(f"{cost}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        lines.append(
            f"loss {self.found.loss:.2f} ({self.measure}), {self.found.sqnr:.1f} dB, {len(self.history)} networks measured"
        )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "assignment": self.assignment,
            "spec": self.spec.to_json(),
            "loss": self.found.loss,
            "sqnr": self.found.sqnr,
            "reached": self.reached,
            "measure": self.measure,
            "costs": self.costs,
        }


def mixed_precision(
    model: nn.Module,
    batches: Iterable[Batch],
    targets: Sequence[Targets] | None = None,
    *,
    target_drop: float | None = None,
    budget: Budget | None = None,
    candidates: Sequence[str] = CANDIDATES,
    target: str | Target = "onnxruntime",
    method: Method = DEFAULT_METHOD,
    latency: Callable[[QuantSpec], float] | None = None,
    task: Task = CLASSIFICATION,
    context: StepContext = DEFAULT_CONTEXT,
) -> MixedPrecision:
    """Choose a candidate for each layer from the noise that each makes alone, and check whole networks.

    Give either ``target_drop`` or ``budget``. The noise of the outputs is taken to add up over the layers. From every layer
    in its cheapest candidate on, the layer is raised next that saves most noise for its cost. Where that path first meets
    the target, or last fits the budget, is found by halving, with whole networks measured. For a target, layers are then
    lowered one by one as long as the network still meets it.

    Args:
        model: a float model, or one that ``quantize`` has been through with w8a8, e.g. an equalized one. It is not changed.
        batches: calibration examples, as ``calibrate`` takes them.
        targets: the right answers, one entry for each batch. None: losses are counted in points of agreement with the
            float network.
        target_drop: the most of the task's score that may be lost, in points.
        budget: the most that the network may cost.
        candidates: presets, and "float".
        target: the runtime to simulate.
        method: how ranges are chosen, as ``calibrate`` takes it.
        latency: measures the engine of a spec, in milliseconds; needed for a budget of latency.
        task: what the network is for.
        context: memory, folder and progress.

    Returns:
        The choice. ``reached`` is false if no assignment met the target; then the best one measured is returned.

    Raises:
        UserError: no examples, a model that can't be traced, an unknown candidate, both or neither of target and budget, or
            a budget that the cheapest network exceeds.
    """
    if (target_drop is None) == (budget is None):
        raise UserError("mixed precision needs a target or a budget, one of the two.")
    if target_drop is not None and not target_drop >= 0:
        raise UserError(f"a target drop is at least 0 points, not {target_drop:g}.")
    if budget is not None and budget.cost == LATENCY and latency is None:
        raise UserError("a budget of latency needs an engine to measure; give the function latency.")
    specs = {name: None if name == FLOAT else resolve_spec(name) for name in candidates}
    if not specs:
        raise UserError("mixed precision needs candidates to choose from.")
    rules = get_target(target)
    model = copy.deepcopy(model)
    if any(True for _ in quantizers(model)):
        simulate_target(model, rules)
    else:
        quantize(model, BASE, target=rules.name)
        simulate_target(model, rules)
    batches = checked_batches(model, batches)
    network = _Network(model, batches, specs, rules, calibrator_factory(method))
    with network.stays_in_float():
        judge, noise = _noise_of_layers(network, targets, task, context)
    search = Search(network, judge, noise, budget, latency)
    assignment, reached = search.for_target(target_drop) if target_drop is not None else search.for_budget()
    spec = network.spec_of(assignment)
    sqnr = {layer: {name: Figures(value, 0, None).sqnr for name, value in own.items()} for layer, own in noise.items()}
    return MixedPrecision(
        dict(assignment),
        spec,
        search.measured(assignment),
        reached,
        measure_of(judge),
        sqnr,
        network.cost_table(assignment),
        tuple(search.history.values()),
    )


class _Network:
    """A quantized copy of the model whose layers can take any candidate."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        specs: Mapping[str, QuantSpec | None],
        rules: Target,
        make: Callable[[], Calibrator],
    ) -> None:
        self.model = model
        self.batches = batches
        self.specs = specs
        collected = collect(model, batches, make)
        set_ranges(model, collected, make)
        self.outputs = output_quantizers_of_layers(model)
        self.costs: dict[str, LayerCost] = layer_costs(model, batches[0])
        own: dict[str, tuple[TensorQuantizer, TensorQuantizer]] = {}
        for name in self.costs:
            layer = model.get_submodule(name)
            at_input, at_weight = layer._input_quantizer, layer._weight_quantizer
            if isinstance(at_input, TensorQuantizer) and isinstance(at_weight, TensorQuantizer):
                own[name] = at_input, at_weight
        self.layers = list(own)
        self._own = own
        self._variants: dict[tuple[str, str], tuple[nn.Module, nn.Module]] = {}
        for name, (at_input, at_weight) in own.items():
            for candidate, spec in specs.items():
                if spec is None:
                    self._variants[name, candidate] = nn.Identity(), nn.Identity()
                    continue
                seen = make()
                seen.adopt(collected[f"{name}._input_quantizer"])
                weight = float_weight(model.get_submodule(name)).detach().float()
                values = TensorQuantizer(spec.activation, operation=at_input.operation)
                values.never_negative = at_input.never_negative
                shape = spec.weight.amax_shape(tuple(weight.shape))
                weights = TensorQuantizer(spec.weight, shape, at_weight.operation, role="weight")
                for quantizer in (values, weights):
                    quantizer.to(weight.device).eval().follow(rules)
                values.set_range(*(torch.tensor(end) for end in seen.range(values.spec)))
                weights.set_range(*make().weight_range(weight, weights.spec))
                self._variants[name, candidate] = values, weights

    def spec_of(self, assignment: Assignment) -> QuantSpec:
        """The assignment as a spec, which ``quantize`` takes."""
        others = [(layer, name) for layer, name in assignment.items() if name != BASE]
        return resolve_spec(BASE).with_overrides(others)

    def cost(self, kind: str, layer: str, candidate: str) -> float:
        """The cost of a layer; for latency, whose cost no layer has alone, its bit operations."""
        cost, spec = self.costs[layer], self.specs[candidate]
        return cost.weight_bytes(spec) if kind == WEIGHT_BYTES else cost.bit_operations(spec)

    def cost_table(self, assignment: Assignment) -> dict[str, dict[str, float]]:
        """Weight bytes and bit operations of an assignment, and of all layers in w4a8 and w8a8."""
        table: dict[str, dict[str, float]] = {}
        for kind in (WEIGHT_BYTES, BIT_OPERATIONS):
            table[kind] = {"chosen": sum(self.cost(kind, *pair) for pair in assignment.items())}
            for preset in ("w4a8", "w8a8"):
                spec = resolve_spec(preset)
                costs = [self.costs[layer] for layer in self.layers]
                table[kind][preset] = sum(
                    cost.weight_bytes(spec) if kind == WEIGHT_BYTES else cost.bit_operations(spec) for cost in costs
                )
        return table

    @contextmanager
    def stays_in_float(self) -> Iterator[None]:
        """Within the block only layers that ``layer_in`` holds are rounded."""
        with in_float(self.model):
            yield

    @contextmanager
    def layer_in(self, layer: str, candidate: str) -> Iterator[None]:
        """Within the block the layer computes in a candidate."""
        self._install(layer, self._variants[layer, candidate], self._integer(candidate))
        try:
            yield
        finally:
            self._install(layer, self._own[layer], False)

    def _integer(self, candidate: str) -> bool:
        """Whether the layer's engine writes 8-bit integers, as ``output_quantizer`` says."""
        spec = self.specs[candidate]
        return spec is not None and spec.weight.bits <= 8 and spec.activation.bits <= 8

    def _install(self, layer: str, places: tuple[nn.Module, nn.Module], rounds_output: bool) -> None:
        module = self.model.get_submodule(layer)
        module._input_quantizer, module._weight_quantizer = places
        if layer in self.outputs:
            self.outputs[layer].enabled = rounds_output and self.outputs[layer].calibrated

    def run(self, assignment: Assignment) -> Iterator[tuple[slice, Outputs]]:
        """The outputs of the whole network, everything quantized."""
        for layer, candidate in assignment.items():
            self._install(layer, self._variants[layer, candidate], self._integer(candidate))
        start = 0
        with eager_pass(self.model):
            for arguments, examples in batches_on(self.model, self.batches):
                yield slice(start, start + examples), self.model(*arguments)
                start += examples


def _noise_of_layers(
    network: _Network, targets: Sequence[Targets] | None, task: Task, context: StepContext
) -> tuple[Judge, dict[str, dict[str, float]]]:
    """The noise of the outputs with one layer in one candidate, by layer and candidate."""
    runs = PartialRuns(network.model, network.batches, context)
    judge = Judge(runs.outputs(), targets, task, device_of(network.model))
    noise: dict[str, dict[str, float]] = {}
    for layer in runs.layers():
        if layer not in network.layers:
            continue
        context.progress("sensitivity", len(noise), len(network.layers))
        noise[layer] = {}
        for candidate, spec in network.specs.items():
            if spec is None:
                noise[layer][candidate] = 0.0
                continue
            with network.layer_in(layer, candidate):
                found = judge.figures(runs.outputs()).noise
            noise[layer][candidate] = math.inf if math.isnan(found) else found
    context.progress("sensitivity", len(noise), len(noise))
    return judge, noise
