"""Settings and Compiled: what a backend gets and what it returns."""

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
    """How to compile a file.

    Attributes:
        device: one of the backend's DEVICES.
        precision: one of the backend's PRECISIONS.
        threads: of the CPU; None leaves the number to the runtime.
    """

    device: str
    precision: str
    threads: int | None = None


@dataclass(frozen=True)
class Compiled:
    """A file made ready to run. All its functions may be called from several threads at a time.

    Attributes:
        run: maps the signature's inputs, within their batches, to its outputs.
        signature: what it takes and gives.
        precision: "fp32", "fp16" …, with "int8 + " in front if the file is quantized.
        card: describes the model.
        metadata: the card as plain values, and the file's further metadata.
        prepare: compiles for given input shapes, batch included, ahead of the first run; None if the runtime does not need
        it.
        forget: drops what was compiled for single shapes; None if the runtime compiles nothing for single shapes.
    """

    run: Runner
    signature: Signature
    precision: str
    card: ModelCard = field(default_factory=ModelCard)
    metadata: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Sequence[tuple[int, ...]]], None] | None = None
    forget: Callable[[], None] | None = None


def run_in_batches(run: Runner, inputs: Arrays, smallest: int, largest: int | None) -> Arrays:
    """Run a batch of any size with a runner that takes ``smallest`` to ``largest`` entries at a time.

    Larger batches are split, all inputs alike. Smaller ones are padded with copies of the last entry; the copies' outputs
    are dropped.

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
