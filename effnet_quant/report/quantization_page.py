"""The quantization report: one HTML page with everything in it, for any browser, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from effnet_quant.quantization.ptq.sensitivity import SensitivityTable
from effnet_quant.report.charts import STYLE, bar, histogram


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


_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .2rem 0 .6rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
p, figcaption { color: var(--faint); margin: .3rem 0 .8rem; } figcaption { font-size: .8rem; margin: .1rem 0 .5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line); overflow-wrap: normal; }
th:first-child, td:first-child, td.words, th.words { text-align: left; } th { color: var(--faint); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; } dd { margin: 0; }
dt { color: var(--faint); }
.layer { display: grid; grid-template-columns: 15rem 1fr 4.5rem 4.5rem; gap: .5rem; align-items: center; font-size: .85rem; }
.layer > :nth-child(n+3) { text-align: right; font-variant-numeric: tabular-nums; }
.head { color: var(--faint); font-weight: 600; }
.bar { width: 100%; height: .8rem; display: block; } .histogram { width: 100%; height: 5rem; display: block; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; } figure { margin: 0; }
.legend { white-space: nowrap; } .key { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem;
  vertical-align: -1px; }
@media (max-width: 40rem) { .layer { grid-template-columns: 1fr 3.6rem 3.6rem; row-gap: 0; margin-bottom: .35rem; }
  .layer > :first-child { grid-column: 1 / -1; } .head > :first-child { display: none; }
  th, td { padding: .3rem .25rem; font-size: .85rem; }
  .tried tr { display: grid; grid-template-columns: 4.6rem repeat(6, 1fr); border-bottom: 1px solid var(--line); }
  .tried th, .tried td { border: 0; padding: .2rem .1rem; font-size: .72rem; }
  .tried td:last-child { grid-column: 1 / -1; } .tried th:last-child { display: none; } }
"""


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
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{STYLE}{_STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], words: frozenset[int] = frozenset()) -> str:
    """Text in the first column and in those of ``words``, else numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="words"' if index in words else "" for index in range(len(cells))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{line(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _summary(page: Page) -> str:
    rows = [
        (
            variant.name,
            _number(variant.score),
            _number(variant.agreement),
            _number(variant.latency_ms),
            _number(None if variant.size_bytes is None else variant.size_bytes / 1e6),
        )
        for variant in page.summary
    ]
    header = ("network", page.score, "agree %", "ms", "MB")
    return f"<h2>Summary</h2>{_table(header, rows)}<p>{escape(page.judged_on)}</p>"


def _tried(page: Page) -> str:
    if not page.tried:
        return ""
    header, *rows = page.tried
    last = frozenset({len(header) - 1})
    return f'<h2>What was tried</h2><div class="tried">{_table(header, rows, last)}</div><p>{escape(page.ended)}</p>'


def _sensitivity(table: SensitivityTable | str) -> str:
    title = "<h2>Sensitivity</h2>"
    if isinstance(table, str):
        return f"{title}<p>{escape(table)}</p>"
    rows = table.worst_first()
    known = [row.sqnr for row in rows if row.sqnr is not None]
    longest = max([0.0, *known]) or 1.0
    lines = [
        f'<div class="layer"><span>{escape(row.layer)}</span>'
        f"{bar(1.0 if row.sqnr is None else row.sqnr / longest, 'first', f'{row.layer}: {_number(row.sqnr, 1)} dB')}"
        f"<span>{_number(row.sqnr, 1)}</span><span>{_number(row.loss)}</span></div>"
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
    return f"<h2>In float</h2>{_table(('place', 'why'), places, frozenset({1}))}"


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
