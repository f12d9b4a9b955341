"""How long a batch takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

ROUNDS = 5
RUNS_A_TURN = 5


def median_seconds(runs: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """Median wall-clock seconds of each function.

    The functions take turns, so that what else the machine does hits all of them alike. A turn starts with a run that is
    not timed: the threads of the function before may still be spinning, and caches hold its data. Two functions within a
    few percent of each other want more ``rounds``.
    """
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for own_times, run in zip(times, runs, strict=True):
            run()
            for _ in range(RUNS_A_TURN):
                start = time.perf_counter()
                run()
                own_times.append(time.perf_counter() - start)
    return [statistics.median(own_times) for own_times in times]
