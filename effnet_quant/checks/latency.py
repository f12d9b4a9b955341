"""How long a batch takes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from effnet_quant.engines.engine import Engine

ROUNDS = 5
RUNS_A_TURN = 5
PAUSE = 0.02  # seconds
MOST_ROUNDS = 100
FEWEST_ROUNDS = 3


def interleaved_seconds(
    runs: Sequence[Callable[[], Any]], rounds: int = ROUNDS, runs_a_turn: int = RUNS_A_TURN
) -> list[list[float]]:
    """Wall-clock seconds of every timed run of each function, ``rounds * runs_a_turn`` of them.

    The functions take turns, so that what else the machine does hits all of them alike, in another order each round. A turn
    starts with a pause, in which threads of the function before stop spinning (ONNX Runtime's took up to a fifth of the
    next one's speed, on two cores), and with a run that is not timed: caches hold the other's data.
    """
    times: list[list[float]] = [[] for _ in runs]
    order, shuffled = list(range(len(runs))), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for index in order:
            time.sleep(PAUSE)
            runs[index]()
            for _ in range(runs_a_turn):
                start = time.perf_counter()
                runs[index]()
                times[index].append(time.perf_counter() - start)
    return times


def median_seconds(runs: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """Median of ``interleaved_seconds`` of each function. Two within a few percent of each other want more ``rounds``."""
    return [statistics.median(own_times) for own_times in interleaved_seconds(runs, rounds)]


@dataclass(frozen=True)
class Latency:
    """How long batches of one size took, in seconds; the figures are those of ``--mode benchmark_inference``.

    Attributes:
        batch_size: images a batch.
        runs: how many were timed.
        average, p50, p95, p99: mean and quantiles (the nearest run's time).
    """

    batch_size: int
    runs: int
    average: float
    p50: float
    p95: float
    p99: float

    @staticmethod
    def of(batch_size: int, seconds: Sequence[float]) -> Latency:
        """The figures of single runs' times."""
        p50, p95, p99 = np.quantile(seconds, (0.50, 0.95, 0.99), method="nearest").tolist()
        return Latency(batch_size, len(seconds), statistics.fmean(seconds), p50, p95, p99)

    @property
    def throughput(self) -> float:
        """Images a second on average."""
        return self.batch_size / self.average


def measure_engines(
    engines: Sequence[Engine], batch_sizes: Sequence[int], seconds: float, image_size: int | None = None
) -> Iterator[list[Latency]]:
    """For each batch size the latencies of the engines, in their order, measured in turns.

    The inputs are noise. Each engine is warmed up and runs for about ``seconds`` at each batch size, at least three
    rounds however long they take. What it compiled for the sizes before is let go first, so that each size runs as if it
    were the only one.

    Raises:
        UserError: an engine takes images of any size, and nothing says which.
    """
    for batch_size in batch_sizes:
        for engine in engines:
            engine.forget_shapes()
        runs = [partial(engine, *engine.example_inputs(batch_size, image_size)) for engine in engines]
        slowest = 0.0
        for engine, run in zip(engines, runs, strict=True):
            engine.warm_up(batch_size, image_size=image_size)
            start = time.perf_counter()
            run()
            slowest = max(slowest, time.perf_counter() - start)
        times = interleaved_seconds(runs, *rounds_for(seconds, slowest))
        yield [Latency.of(batch_size, own_times) for own_times in times]


def rounds_for(seconds: float, run_seconds: float) -> tuple[int, int]:
    """``rounds`` and ``runs_a_turn`` of ``interleaved_seconds`` so that a function takes about ``seconds``.

    ``run_seconds`` is what one run of it takes.
    """
    turn = (1 + RUNS_A_TURN) * run_seconds
    if FEWEST_ROUNDS * turn <= seconds:
        return min(int(seconds / turn), MOST_ROUNDS), RUNS_A_TURN
    return FEWEST_ROUNDS, 2
