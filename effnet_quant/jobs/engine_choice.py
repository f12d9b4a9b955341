"""Which of the engines that ``deploy`` has measured is kept: Candidate, Deployed, choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from effnet_quant.checks import AGREEMENT
from effnet_quant.checks.footprint import Footprint
from effnet_quant.checks.latency import Latency
from effnet_quant.checks.verify import Comparison
from effnet_quant.engines.engine import Engine
from effnet_quant.quantization.targets import Target
from effnet_quant.report.deployment_page import EngineRow, format_engines

FASTER = 1.02  # over the best float engine, for integers to be worth their rounding


@dataclass
class Candidate:
    """An engine on its way through the measurements.

    Attributes:
        name: in the table.
        runtime, precision: how it is run.
        rules: of the placement; None for a float engine.
        path: of its file.
    """

    name: str
    runtime: str
    precision: str
    rules: Target | None
    path: Path
    engine: Engine | None = None
    comparison: Comparison | None = None
    footprint: Footprint | None = None
    single: Latency | None = None
    many: Latency | None = None
    note: str = ""

    @property
    def quantized(self) -> bool:
        """Whether it computes with integers."""
        return self.rules is not None

    @property
    def usable(self) -> bool:
        """Whether it agrees with its simulation, and has been timed."""
        return self.single is not None and self.comparison is not None and self.comparison.agrees()

    @property
    def seconds(self) -> float:
        """Median time of one image."""
        assert self.single is not None
        return self.single.p50

    def row(self) -> EngineRow:
        """Its row in the table."""
        row = EngineRow(self.name, self.quantized, note=self.note)
        if self.path.is_file():
            row = replace(row, size_bytes=self.path.stat().st_size)
        if self.comparison is not None:
            row = replace(row, score=self.comparison.engine_score, agreement=self.comparison.agreement)
        if (one := self.single) is not None:
            average, p50, p95, p99 = (1e3 * seconds for seconds in (one.average, one.p50, one.p95, one.p99))
            row = replace(row, average=average, p50=p50, p95=p95, p99=p99)
        if self.many is not None:
            row = replace(row, throughput=self.many.throughput)
        if (found := self.footprint) is not None:
            row = replace(row, load_seconds=found.load_seconds, peak_bytes=found.peak_bytes)
        return row


@dataclass(frozen=True)
class Deployed:
    """What ``deploy`` measured and kept.

    Attributes:
        rows: the engines, the fastest first.
        score: title and unit of the task's score.
        kept: name of the engine that was kept; None if none agrees.
        quantized: whether that one computes with integers.
        speedup: of the fastest 8-bit engine that agrees over the fastest float engine, for one image; None without one of
            the two.
        path: deploy.json; None if no engine was kept.
        sentence: what came out, in words.
    """

    rows: tuple[EngineRow, ...]
    score: str
    kept: str | None
    quantized: bool
    speedup: float | None
    path: Path | None
    sentence: str

    def __str__(self) -> str:
        """The table as text, and the sentence."""
        return f"{format_engines(self.rows, self.score)}\n{self.sentence}"


def choose(candidates: Sequence[Candidate]) -> tuple[Candidate | None, float | None, str]:
    """The engine to keep, the speed of the fastest 8-bit engine over the fastest float engine, and a sentence.

    Engines count that agree with their simulation. The fastest 8-bit engine is kept if its speed is at least FASTER times
    that of the fastest float engine. Else the float engine is kept.
    """
    usable = sorted((one for one in candidates if one.usable), key=lambda one: one.seconds)
    floating = next((one for one in usable if not one.quantized), None)
    integer = next((one for one in usable if one.quantized), None)
    if integer is None and floating is None:
        return (
            None,
            None,
            f"no engine agrees with its simulation on at least {AGREEMENT:g} % of the images; none is kept.",
        )
    if integer is None:
        assert floating is not None
        return floating, None, f"no 8-bit engine agrees with its simulation; the float engine is kept: {floating.name}."
    if floating is None:
        return integer, None, f"kept: {integer.name}; no float engine could be measured."
    speedup = floating.seconds / integer.seconds
    if speedup >= FASTER:
        return integer, speedup, f"kept: {integer.name}, {speedup:.2f} times as fast as {floating.name}."
    sentence = (
        f"no 8-bit engine is {FASTER:g} times as fast as the best float engine here ({integer.name}: {speedup:.2f} times); "
        f"the float engine is kept: {floating.name}."
    )
    return floating, speedup, sentence
