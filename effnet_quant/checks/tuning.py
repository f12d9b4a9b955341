"""Measures placements on this machine: which operations of a quantized network pay for being integers?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from effnet_quant.checks.latency import median_seconds
from effnet_quant.errors import UserError
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.targets import OPERATIONS, Target

# A placement must be this much faster before it counts: differences below are the machine's.
PAYS = 0.97
SCREENING_ROUNDS, FINAL_ROUNDS = 2, 4


OWN, FLOAT = "target's own", "float"


@dataclass(frozen=True)
class Tuning:
    """What was measured.

    Attributes:
        seconds: median time of a batch, by candidate, in the order measured; the final run's where there are two.
        chosen: the name of the fastest candidate that has integers.
        target: its rules.
        precision: what it computes in where the file says float.
        float_seconds: of the network in float, in the final run, in the precision in which that is fastest.
    """

    seconds: dict[str, float]
    chosen: str
    target: Target
    precision: str
    float_seconds: float

    @property
    def speedup(self) -> float:
        """Of the chosen placement over float."""
        return self.float_seconds / self.seconds[self.chosen]


@dataclass(frozen=True)
class _Candidate:
    """Operations of the target that are left in float, and the precision of what is."""

    left: tuple[str, ...]
    precision: str


def tune(
    model: nn.Module,
    rules: Target,
    compile_for: Callable[[Target, str], Callable[[], Any]],
    say: Callable[[str], None],
    precisions: Sequence[str] = ("fp32",),
) -> Tuning:
    """Measure the target's own placement and all in float, in every precision; in the precision that suits the first, the
    same with one kind of operation in float; then leave in float what paid, alone and together, and measure these once
    more.

    Each candidate is timed in turns with the target's own placement, so that no more than the finalists are in memory at a
    time.

    Args:
        model: the calibrated quantized network.
        rules: the target's.
        compile_for: makes an engine for changed rules and a precision, and gives what runs it on one batch.
        say: gets progress, one line at a time.
        precisions: in which the runtime can compute what is float, on this machine; its usual one first.

    Raises:
        UserError: the model is not quantized.
    """
    present = operations_of(model) & rules.quantized
    if not present:
        raise UserError("a float network has nothing to tune; give quantized weights.")
    everything = tuple(rules.quantized)
    # without convolutions in integers hardly anything is: that is the float network
    singles = [name for name in OPERATIONS if name in present - {"conv"}]
    candidates: dict[str, _Candidate] = {}
    seconds: dict[str, float] = {}
    total, start = 2 * len(precisions) + len(singles), time.monotonic()

    def compiled(name: str, left: tuple[str, ...], precision: str) -> Callable[[], Any]:
        candidates[name] = _Candidate(left, precision)
        run = compile_for(rules.leaving_in_float(left), precision)
        run()  # some runtimes compile when they see the images
        return run

    def measured(name: str) -> None:
        # the finalists are measured once more
        remaining = (time.monotonic() - start) / len(seconds) * (total + 4 - len(seconds))
        say(f"{len(seconds)}/{total} placements measured: {name}; about {remaining:.0f} s to go")

    def against(reference: Callable[[], Any], own: str, name: str, left: tuple[str, ...], precision: str) -> None:
        first, second = median_seconds([reference, compiled(name, left, precision)], SCREENING_ROUNDS)
        seconds[name] = seconds[own] * second / first
        measured(name)

    owns = {precision: _named(OWN, precision, precisions) for precision in precisions}
    floats = {precision: _named(FLOAT, precision, precisions) for precision in precisions}
    usual = owns[precisions[0]]
    reference = compiled(usual, (), precisions[0])
    (seconds[usual],) = median_seconds([reference], SCREENING_ROUNDS)
    measured(usual)
    for precision in precisions:
        if precision != precisions[0]:
            against(reference, usual, owns[precision], (), precision)
        against(reference, usual, floats[precision], everything, precision)
    best = min(precisions, key=lambda precision: seconds[owns[precision]])
    own = owns[best]
    floating = min(floats.values(), key=seconds.__getitem__)
    if own != usual:
        reference = compiled(own, (), best)
    for operation in singles:
        against(reference, own, _named(f"{operation} in float", best, precisions), (operation,), best)
    paying = [name for name in seconds if len(candidates[name].left) == 1 and seconds[name] < PAYS * seconds[own]]
    paying.sort(key=seconds.__getitem__)
    finalists = {floating: candidates[floating], **{name: candidates[name] for name in paying[:1]}}
    if len(paying) > 1:
        operations = tuple(operation for name in paying for operation in candidates[name].left)
        together = _named(" + ".join(f"{operation} in float" for operation in operations), best, precisions)
        finalists[together] = _Candidate(operations, best)
    say(f"measuring {', '.join([own, *finalists])} once more")
    runs = {own: reference}
    for name, candidate in finalists.items():
        runs[name] = compiled(name, candidate.left, candidate.precision)
    seconds |= dict(zip(runs, median_seconds(list(runs.values()), FINAL_ROUNDS), strict=True))
    chosen = min((name for name in runs if name != floating), key=seconds.__getitem__)
    if seconds[chosen] >= PAYS * seconds[own]:
        chosen = own
    target = rules.leaving_in_float(candidates[chosen].left)
    return Tuning(seconds, chosen, target, best, seconds[floating])


def _named(name: str, precision: str, precisions: Sequence[str]) -> str:
    return name if precision == precisions[0] else f"{name}, {precision}"


def operations_of(model: nn.Module) -> set[str]:
    """The targets' OPERATIONS that a quantized model has."""
    return {module.operation for module in model.modules() if isinstance(module, TensorQuantizer)}


def format_tuning(tuning: Tuning) -> str:
    """The table as text, the fastest placement first."""
    lines = [f"{'placement':<40} {'ms a batch':>10} {'over float':>11}"]
    for name, seconds in sorted(tuning.seconds.items(), key=lambda entry: entry[1]):
        mark = " <- chosen" if name == tuning.chosen else ""
        lines.append(f"{name:<40} {1e3 * seconds:10.2f} {tuning.float_seconds / seconds:10.2f}x{mark}")
    return "\n".join(lines)
