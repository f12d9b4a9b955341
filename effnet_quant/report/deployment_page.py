"""The table of engines that ``deploy`` measured, as text and as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from effnet_quant.report.charts import bar
from effnet_quant.report.html_page import html_page, number, table


@dataclass(frozen=True)
class EngineRow:
    """An engine and what was measured of it; None where nothing was.

    Attributes:
        name: e.g. "INT8, openvino, bf16".
        quantized: whether it computes with integers.
        score: the task's score, in the score's unit.
        agreement: with its simulation, in percent of the images.
        average, p50, p95, p99: milliseconds for one image.
        throughput: images a second in large batches.
        size_bytes: of the engine's file.
        load_seconds: until the first answer, in a process of its own.
        peak_bytes: memory of that process.
        note: e.g. why it can't be kept; else empty.
    """

    name: str
    quantized: bool
    score: float | None = None
    agreement: float | None = None
    average: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    throughput: float | None = None
    size_bytes: int | None = None
    load_seconds: float | None = None
    peak_bytes: int | None = None
    note: str = ""


def header(score: str) -> tuple[str, ...]:
    """The titles of the columns; ``score`` is title and unit of the task's score."""
    return (
        "engine",
        score,
        "agree %",
        "avg ms",
        "50 % ms",
        "95 % ms",
        "99 % ms",
        "images/s",
        "MB",
        "load s",
        "peak MB",
        "",
    )


def cells(row: EngineRow) -> tuple[str, ...]:
    """A row as text."""
    return (
        row.name,
        number(row.score),
        number(row.agreement),
        *(number(value) for value in (row.average, row.p50, row.p95, row.p99)),
        number(row.throughput, 0),
        number(None if row.size_bytes is None else row.size_bytes / 1e6),
        number(row.load_seconds),
        number(None if row.peak_bytes is None else row.peak_bytes / 1e6, 0),
        row.note,
    )


def format_engines(rows: Sequence[EngineRow], score: str) -> str:
    """The table as text."""
    lines = [header(score), *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    text = []
    for first, *numbers, note in lines:
        aligned = [f"{entry:>{width}}" for entry, width in zip(numbers, widths[1:], strict=True)]
        text.append("  ".join([f"{first:<{widths[0]}}", *aligned, note]).rstrip())
    return "\n".join(text)


def deployment_page(title: str, rows: Sequence[EngineRow], score: str, facts: Sequence[tuple[str, str]]) -> str:
    """The page as HTML, complete in itself.

    Args:
        title: e.g. the network's name.
        rows: the engines, in the order of the table.
        score: title and unit of the task's score.
        facts: pairs of a name and a value, e.g. the machine.
    """
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    last = frozenset({len(header(score)) - 1})
    return html_page(
        title,
        [
            f"<h1>{escape(title)}</h1><dl>{listed}</dl>",
            f"<h2>Engines</h2>{table(header(score), [cells(row) for row in rows], last)}",
            _bars("Milliseconds for one image, median; shorter is faster", rows, [row.p50 for row in rows], 2),
            _bars("Images a second in large batches; longer is faster", rows, [row.throughput for row in rows], 0),
        ],
    )


def _bars(title: str, rows: Sequence[EngineRow], values: Sequence[float | None], digits: int) -> str:
    longest = max((value for value in values if value is not None), default=0.0)
    if not longest:
        return ""
    lines = [
        f'<div class="layer"><span>{escape(row.name)}</span>'
        f"{bar(value / longest, 'first' if row.quantized else 'second', f'{row.name}: {number(value, digits)}')}"
        f"<span>{number(value, digits)}</span></div>"
        for row, value in zip(rows, values, strict=True)
        if value is not None
    ]
    keys = (("first", "8 bits"), ("second", "float"))
    legend = " ".join(
        f'<span class="legend"><svg class="key" viewBox="0 0 10 10"><rect class="{colour}" width="10" height="10"/></svg>'
        f"{words}</span>"
        for colour, words in keys
    )
    return f"<h2>{escape(title)}</h2><p>{legend}</p>" + "".join(lines)
