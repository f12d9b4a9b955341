"""The quantization report: one HTML page with everything in it, for any browser, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from effnet_quant.quantization.ptq.sensitivity import SensitivityTable
from effnet_quant.report.charts import bar, histogram
from effnet_quant.report.html_page import html_page, number, table


@dataclass(frozen=True)
class Variant:
    """A row of the summary; None where nothing was measured.

    Attributes:
        name: e.g. "engine".
        score: the task's score, in the score's unit.
        agreement: with the float network, in percent of the images.
        latency_ms: median milliseconds for one image.
        size_bytes: of the engine's file.
    """

    name: str
    score: float | None
    agreement: float | None
    latency_ms: float | None
    size_bytes: int | None


@dataclass(frozen=True)
class Values:
    """The values of a tensor and its range.

    Attributes:
        grid: in words, e.g. "int8, per tensor".
        counts: of the values in equal bins over ``seen``.
        seen: smallest and largest value.
        chosen: both ends of the range; the outermost ones of a range per channel.
        clipped: share of the values that saturate, 0 … 1; None if it is not known.
        sqnr: signal to quantization noise ratio of the tensor in dB; None if it is not known or infinite.
    """

    grid: str
    counts: tuple[int, ...]
    seen: tuple[float, float]
    chosen: tuple[float, float]
    clipped: float | None
    sqnr: float | None


@dataclass(frozen=True)
class Layer:
    """A layer's tensors; None for a tensor that stays in float.

    Attributes:
        name: of the layer.
        weights, activations: its weights, and what it takes.
    """

    name: str
    weights: Values | None
    activations: Values | None


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Attributes:
        title: e.g. the network's name.
        facts: pairs of a name and a value, e.g. the target.
        score: title and unit of the task's score.
        judged_on: which images the summary is about.
        summary: the variants.
        sensitivity: what each layer costs alone, or a sentence that says why that is not known.
        layers: in the order of the network.
        in_float: pairs of a place and the reason.
        tried: header and rows of what autoquant tried; empty if it did not run.
        ended: why autoquant ended.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    score: str
    judged_on: str
    summary: Sequence[Variant]
    sensitivity: SensitivityTable | str
    layers: Sequence[Layer]
    in_float: Sequence[tuple[str, str]]
    tried: Sequence[Sequence[str]] = field(default=())
    ended: str = ""


def quantization_page(page: Page) -> str:
    """The page as HTML, complete in itself: it loads nothing."""
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in page.facts)
    sections = [
        f"<h1>{escape(page.title)}</h1><dl>{facts}</dl>",
        _summary(page),
        _tried(page),
        _sensitivity(page.sensitivity),
        _in_float(page.in_float),
        _layers(page.layers),
    ]
    return html_page(page.title, sections)


def _summary(page: Page) -> str:
    rows = [
        (
            variant.name,
            number(variant.score),
            number(variant.agreement),
            number(variant.latency_ms),
            number(None if variant.size_bytes is None else variant.size_bytes / 1e6),
        )
        for variant in page.summary
    ]
    header = ("network", page.score, "agree %", "ms", "MB")
    return f"<h2>Summary</h2>{table(header, rows)}<p>{escape(page.judged_on)}</p>"


def _tried(page: Page) -> str:
    if not page.tried:
        return ""
    header, *rows = page.tried
    last = frozenset({len(header) - 1})
    return f'<h2>What was tried</h2><div class="tried">{table(header, rows, last)}</div><p>{escape(page.ended)}</p>'


def _sensitivity(table: SensitivityTable | str) -> str:
    title = "<h2>Sensitivity</h2>"
    if isinstance(table, str):
        return f"{title}<p>{escape(table)}</p>"
    rows = table.worst_first()
    known = [row.sqnr for row in rows if row.sqnr is not None]
    longest = max([0.0, *known]) or 1.0
    lines = [
        f'<div class="layer"><span>{escape(row.layer)}</span>'
        f"{bar(1.0 if row.sqnr is None else row.sqnr / longest, 'first', f'{row.layer}: {number(row.sqnr, 1)} dB')}"
        f"<span>{number(row.sqnr, 1)}</span><span>{number(row.loss)}</span></div>"
        for row in rows
    ]
    return (
        f"{title}<p>The outputs' signal to noise ratio when one layer alone is quantized, and what is lost ("
        f"{escape(table.measure)}), on {table.examples} calibration images. Short bars are sensitive layers.</p>"
        '<div class="layer head"><span>layer</span><span></span><span>dB</span><span>loss</span></div>' + "".join(lines)
    )


def _in_float(places: Sequence[tuple[str, str]]) -> str:
    if not places:
        return "<h2>In float</h2><p>Nothing that the runtime could compute with integers is left in float.</p>"
    return f"<h2>In float</h2>{table(('place', 'why'), places, frozenset({1}))}"


def _layers(layers: Sequence[Layer]) -> str:
    cards = []
    for layer in layers:
        parts = [_figure("weights", layer.weights), _figure("activations", layer.activations)]
        cards.append(f'<div class="card"><h3>{escape(layer.name)}</h3>{"".join(parts)}</div>')
    key = "".join(
        f'<span class="legend"><svg class="key" viewBox="0 0 1 1"><rect class="{colour}" width="1" height="1"/></svg>{word}'
        "</span> "
        for colour, word in (("first", "inside the range"), ("second", "clipped"))
    )
    return (
        "<h2>Layers</h2><p>Values before quantization, counted on a logarithmic scale. Dashed lines are the ends of the "
        f'range. {key}</p><div class="cards">{"".join(cards)}</div>'
    )


def _figure(title: str, values: Values | None) -> str:
    if values is None:
        return f"<figure><figcaption>{title}: float</figcaption></figure>"
    clipped = "" if values.clipped is None else f", {100 * values.clipped:.3g} % clipped"
    noise = "" if values.sqnr is None else f", {values.sqnr:.1f} dB"
    words = (
        f"{title}: {values.grid}; seen {values.seen[0]:.3g} … {values.seen[1]:.3g}, range {values.chosen[0]:.3g} … "
        f"{values.chosen[1]:.3g}{clipped}{noise}"
    )
    return (
        f"<figure>{histogram(values.counts, values.seen, values.chosen, words)}"
        f"<figcaption>{escape(words)}</figcaption></figure>"
    )
