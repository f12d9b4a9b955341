"""Measures placements on this machine: which operations of a quantized network pay for being integers?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from effnet_quant.deploy.latency import median_seconds
from effnet_quant.errors import UserError
from effnet_quant.quantization.insertion import quantizers
from effnet_quant.quantization.modules import QuantSiLU
from effnet_quant.quantization.targets import OPERATIONS, Target

# A placement must be this much faster before it counts: differences below are the machine's.
PAYS = 0.97
SCREENING_ROUNDS, FINAL_ROUNDS = 2, 4


@dataclass(frozen=True)
class Tuning:
    """What was measured.

    Attributes:
        seconds: median time of a batch, by placement, in the order measured; the final run's where there are two.
        chosen: the name of the fastest placement that has integers.
        target: its rules.
        float_seconds: of the network in float, in the final run.
    """

    seconds: dict[str, float]
    chosen: str
    target: Target
    float_seconds: float

    @property
    def speedup(self) -> float:
        """Of the chosen placement over float."""
        return self.float_seconds / self.seconds[self.chosen]


def tune(
    model: nn.Module,
    rules: Target,
    compile_for: Callable[[Target], Callable[[], Any]],
    say: Callable[[str], None],
) -> Tuning:
    """Measure the target's own placement, the same with one kind of operation in float, and all in float, in turns; then
    leave in float what paid, alone and together, and measure these once more.

    Args:
        model: the calibrated quantized network.
        rules: the target's.
        compile_for: makes an engine for changed rules, and gives what runs it on one batch.
        say: gets progress, one line at a time.

    Raises:
        UserError: the model is not quantized.
    """
    present = operations_of(model) & rules.quantized
    if not present:
        raise UserError("a float network has nothing to tune; give quantized weights.")
    left: dict[str, tuple[str, ...]] = {"target's own": (), "float": tuple(rules.quantized)}
    # without convolutions in integers hardly anything is: that is the float network
    left |= {f"{name} in float": (name,) for name in OPERATIONS if name in present - {"conv"}}
    runs: dict[str, Callable[[], Any]] = {}
    start = time.monotonic()
    for count, (name, operations) in enumerate(left.items(), 1):
        runs[name] = compile_for(rules.leaving_in_float(operations))
        # measuring takes about as long again
        remaining = (time.monotonic() - start) / count * (2 * len(left) - count)
        say(f"{count}/{len(left)} placements compiled: {name}; about {remaining:.0f} s to go")
    seconds = _measure(runs, left, SCREENING_ROUNDS)
    own = seconds["target's own"]
    paying = sorted((name for name in left if _is_single(left[name]) and seconds[name] < PAYS * own), key=seconds.get)  # type: ignore[arg-type]
    contenders = ["target's own", "float", *paying[:1]]
    if len(paying) > 1:
        together = " + ".join(paying)
        left[together] = tuple(operation for name in paying for operation in left[name])
        runs[together] = compile_for(rules.leaving_in_float(left[together]))
        contenders.append(together)
    say(f"measuring {', '.join(contenders)} once more")
    seconds |= _measure(runs, contenders, FINAL_ROUNDS)
    chosen = min((name for name in contenders if name != "float"), key=seconds.__getitem__)
    if seconds[chosen] >= PAYS * seconds["target's own"]:
        chosen = "target's own"
    return Tuning(seconds, chosen, rules.leaving_in_float(left[chosen]), seconds["float"])


def operations_of(model: nn.Module) -> set[str]:
    """The targets' OPERATIONS that a quantized model has."""
    found = {quantizer.operation for _, quantizer in quantizers(model)}
    return found | ({"silu"} if any(isinstance(module, QuantSiLU) for module in model.modules()) else set())


def format_tuning(tuning: Tuning) -> str:
    """The table as text, the fastest placement first."""
    lines = [f"{'placement':<40} {'ms a batch':>10} {'over float':>11}"]
    for name, seconds in sorted(tuning.seconds.items(), key=lambda entry: entry[1]):
        mark = " <- chosen" if name == tuning.chosen else ""
        lines.append(f"{name:<40} {1e3 * seconds:10.2f} {tuning.float_seconds / seconds:10.2f}x{mark}")
    return "\n".join(lines)


def _is_single(operations: tuple[str, ...]) -> bool:
    return len(operations) == 1


def _measure(runs: dict[str, Callable[[], Any]], names: Iterable[str], rounds: int) -> dict[str, float]:
    names = list(names)
    return dict(zip(names, median_seconds([runs[name] for name in names], rounds), strict=True))
