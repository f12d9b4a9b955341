"""What a backend is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet_quant.card import ModelCard
from effnet_quant.engines.signature import Signature
from effnet_quant.errors import UserError

Arrays = Sequence[NDArray[Any]]
Runner = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Settings:
    """How to compile: device and precision are among the backend's own; ``threads`` None leaves it to the runtime."""

    device: str
    precision: str
    threads: int | None = None


@dataclass(frozen=True)
class Compiled:
    """A file made ready to run. All its functions may be called from several threads at a time.

    Attributes:
        run: maps the signature's inputs, within their batches, to its outputs.
        signature: what it takes and gives.
        precision: what it computes in: "fp32", "fp16" …, with "int8 + " in front where some of it is quantized.
        card: what the file says of its model.
        metadata: the same as plain values, and what else the file says.
        prepare: compiles for arrays of these shapes, batch included, before they come; None if that gains nothing.
        forget: lets go of what was compiled for the shapes that came so far; None if nothing is.
    """

    run: Runner
    signature: Signature
    precision: str
    card: ModelCard = field(default_factory=ModelCard)
    metadata: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Sequence[tuple[int, ...]]], None] | None = None
    forget: Callable[[], None] | None = None


def run_in_batches(run: Runner, inputs: Arrays, smallest: int, largest: int | None) -> Arrays:
    """Outputs for batches of any size from a runner that takes ``smallest`` to ``largest`` entries at a time.

    Larger batches are split, all inputs alike. What is missing to the smallest is filled with copies of the last entry,
    whose outputs are dropped.

    Raises:
        UserError: an output that has no batch would have to be split or joined.
    """
    count = len(inputs[0])
    if smallest <= count <= (largest or count):
        return run(inputs)
    size = largest or count
    parts: list[list[NDArray[Any]]] = []
    for start in range(0, count, size):
        part = [array[start : start + size] for array in inputs]
        own = len(part[0])
        if missing := max(smallest - own, 0):
            part = [np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) for array in part]
        outputs = run(part)
        if any(output.ndim == 0 or len(output) != own + missing for output in outputs):
            raise UserError(f"an output has no batch; call the engine with {size} entries at a time.")
        parts.append([output[:own] for output in outputs])
    return parts[0] if len(parts) == 1 else [np.concatenate(joined) for joined in zip(*parts, strict=True)]
