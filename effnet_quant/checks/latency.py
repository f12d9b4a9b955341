"""Measures how long functions and engines take for a batch."""

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
    """Wall-clock seconds of each timed run, ``rounds * runs_a_turn`` for each function.

    The functions take turns, in another order each round, so that other load on the machine slows all alike. Each turn
    starts with a pause, in which threads of the previous function stop spinning. Without it, ONNX Runtime's took up to a
    fifth of the next function's speed on two cores. Then follows one untimed run, which fills the caches.
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
    """Median of ``interleaved_seconds`` of each function. To tell differences of a few percent, raise ``rounds``."""
    return [statistics.median(own_times) for own_times in interleaved_seconds(runs, rounds)]


@dataclass(frozen=True)
class Latency:
    """Times of batches of one size, in seconds; the same figures as ``--mode benchmark_inference``.

    Attributes:
        batch_size: images a batch.
        runs: number of timed runs.
        average, p50, p95, p99: mean, and quantiles without interpolation.
    """

    batch_size: int
    runs: int
    average: float
    p50: float
    p95: float
    p99: float

    @staticmethod
    def of(batch_size: int, seconds: Sequence[float]) -> Latency:
        """Compute the figures from the seconds of single runs."""
        p50, p95, p99 = np.quantile(seconds, (0.50, 0.95, 0.99), method="nearest").tolist()
        return Latency(batch_size, len(seconds), statistics.fmean(seconds), p50, p95, p99)

    @property
    def throughput(self) -> float:
        """Images a second on average."""
        return self.batch_size / self.average


def measure_engines(
    engines: Sequence[Engine], batch_sizes: Sequence[int], seconds: float, image_size: int | None = None
) -> Iterator[list[Latency]]:
    """Yield, for each batch size, the latencies of all engines in their order, measured in turns.

    The inputs are noise. At each batch size each engine is warmed up and then runs for about ``seconds``, at least three
    rounds. Engines first drop what they compiled for earlier batch sizes, so that the sizes do not affect each other.

    Raises:
        UserError: an engine has open sizes, and neither its metadata nor ``image_size`` names one.
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
    """Choose ``rounds`` and ``runs_a_turn`` of ``interleaved_seconds`` so that each function takes about ``seconds``.

    ``run_seconds`` is the time of one run.
    """
    turn = (1 + RUNS_A_TURN) * run_seconds
    if FEWEST_ROUNDS * turn <= seconds:
        return min(int(seconds / turn), MOST_ROUNDS), RUNS_A_TURN
    return FEWEST_ROUNDS, 2
