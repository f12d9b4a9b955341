"""Measures on this machine which operations of a quantized network are faster in float."""

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

# A placement counts as faster below this share of the time; smaller differences are noise of the machine.
PAYS = 0.97
SCREENING_ROUNDS, FINAL_ROUNDS = 2, 4


OWN, FLOAT = "target's own", "float"


@dataclass(frozen=True)
class Tuning:
    """What was measured.

    Attributes:
        seconds: median time of a batch by candidate, in the order measured. Finalists have the time of the final run.
        chosen: the fastest candidate with integers; the target's own placement unless another is at least 3 % faster.
        target: the rules of ``chosen``.
        precision: of the operations that ``chosen`` leaves in float.
        float_seconds: of the network in float, in its fastest precision, in the final run.
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
    """Operations of the target that are left in float, and the precision in which they run."""

    left: tuple[str, ...]
    precision: str


def tune(
    model: nn.Module,
    rules: Target,
    compile_for: Callable[[Target, str], Callable[[], Any]],
    say: Callable[[str], None],
    precisions: Sequence[str] = ("fp32",),
) -> Tuning:
    """Find the fastest placement.

    1. Measure the target's own placement, and the whole network in float, in every precision.
    2. In the best precision of the target's own placement, measure it with one kind of operation in float.
    3. Measure the finalists again: float, the best of step 2, and all of step 2 together that were at least 3 % faster.

    Each candidate is timed in turns with the target's own placement. So only the finalists are in memory at the same time.

    Args:
        model: the calibrated quantized network.
        rules: of the target.
        compile_for: compiles an engine for given rules and a precision; returns a function that runs one batch.
        say: takes progress messages, one line each.
        precisions: of the runtime for floating-point operations on this machine, its default first.

    Raises:
        UserError: the model is not quantized.
    """
    present = operations_of(model) & rules.quantized
    if not present:
        raise UserError("a float network has nothing to tune; give quantized weights.")
    everything = tuple(rules.quantized)
    # without integer convolutions hardly any integers are left, which is the float network
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
    """The kinds of operations, of OPERATIONS, that have quantizers in the model."""
    return {module.operation for module in model.modules() if isinstance(module, TensorQuantizer)}


def format_tuning(tuning: Tuning) -> str:
    """The table as text, the fastest placement first."""
    lines = [f"{'placement':<40} {'ms a batch':>10} {'over float':>11}"]
    for name, seconds in sorted(tuning.seconds.items(), key=lambda entry: entry[1]):
        mark = " <- chosen" if name == tuning.chosen else ""
        lines.append(f"{name:<40} {1e3 * seconds:10.2f} {tuning.float_seconds / seconds:10.2f}x{mark}")
    return "\n".join(lines)
