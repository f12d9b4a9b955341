"""Charts as SVG text, for light and dark screens, in the colours of Okabe and Ito (2008) for colour-blind eyes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

# Names of CSS; every page and picture with a chart holds this text once.
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1a1a1a; --faint: #6b6b6b; --line: #d9d9d9;
  --first: #0072B2; --second: #D55E00; --third: #007a5a; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #ececec; --faint: #a6a6a6; --line: #3a3f46;
  --first: #56B4E9; --second: #E69F00; --third: #3fc79a; } }
.first { fill: var(--first); } .second { fill: var(--second); } .third { fill: var(--third); }
.edge { stroke: var(--second); stroke-width: 1.5; stroke-dasharray: 4 3; vector-effect: non-scaling-stroke; }
.axis { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
"""


def bar_chart(bars: Sequence[tuple[str, float, str]], title: str, axis: str) -> str:
    """A picture of horizontal bars, a file by itself.

    Args:
        bars: name, length and the number as text, from top to bottom. Lengths are not negative.
        title: above the bars.
        axis: what the lengths are, with their unit.
    """
    row, left, right, top = 18, 8 + 6.2 * max((len(name) for name, _, _ in bars), default=0), 60, 46
    width, height = left + 420 + right, top + row * len(bars) + 8
    longest = max((length for _, length, _ in bars if math.isfinite(length)), default=0) or 1
    parts = []
    for index, (name, length, text) in enumerate(bars):
        y = top + row * index
        extent = 420 * min(length, longest) / longest
        parts.append(
            f'<text x="{left - 6:.1f}" y="{y + 12}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="first" x="{left:.1f}" y="{y + 2}" width="{extent:.1f}" height="{row - 5}"/>'
            f'<text x="{left + extent + 5:.1f}" y="{y + 12}">{escape(text)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}">'
        f"<style>{STYLE}svg {{ background: var(--paper); }} text {{ font: 11px sans-serif; fill: var(--ink); }}</style>"
        f'<text x="8" y="18" style="font-size:14px">{escape(title)}</text>'
        f'<text x="8" y="36" style="fill:var(--faint)">{escape(axis)}</text>{"".join(parts)}</svg>\n'
    )


def bar(share: float, colour: str, label: str) -> str:
    """A bar as wide as its place in the page. ``share`` is 0 … 1, ``colour`` is first, second or third."""
    return (
        f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f'<rect class="{colour}" width="{100 * min(max(share, 0.0), 1.0):.2f}" height="10"/></svg>'
    )


def histogram(
    counts: Sequence[float], extent: tuple[float, float], limits: tuple[float, float] | None, label: str
) -> str:
    """Counts of values in equal bins over ``extent``, on a logarithmic scale, with dashed lines at ``limits``.

    Bins beyond the limits have the second colour: their values are clipped.
    """
    low, span = extent[0], (extent[1] - extent[0]) or 1.0
    most = math.log1p(max(counts, default=0.0)) or 1.0
    width = 100 / max(len(counts), 1)
    paths = {"first": "", "second": ""}
    for index, count in enumerate(counts):
        if count > 0:
            centre = low + span * (index + 0.5) / len(counts)
            clipped = limits is not None and not limits[0] <= centre <= limits[1]
            tall = max(38 * math.log1p(count) / most, 0.5)
            paths["second" if clipped else "first"] += (
                f"M{width * index:.1f} 40v-{tall:.1f}h{width * 0.9:.1f}v{tall:.1f}z"
            )
    lines = "".join(
        f'<line class="edge" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="40"/>'
        for limit in limits or ()
        if 0 <= (x := 100 * (limit - low) / span) <= 100
    )
    bins = "".join(f'<path class="{colour}" d="{path}"/>' for colour, path in paths.items() if path)
    return (
        f'<svg class="histogram" viewBox="0 0 100 41" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f'{bins}{lines}<line class="axis" x1="0" x2="100" y1="40.5" y2="40.5"/></svg>'
    )
