"""What the HTML pages share: the frame, the style, tables and numbers. A page loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from effnet_quant.report.charts import STYLE

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


def html_page(title: str, sections: Sequence[str]) -> str:
    """A page as HTML, complete in itself.

    Args:
        title: as plain text.
        sections: as HTML; empty ones are left out.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def number(value: float | None, digits: int = 2) -> str:
    """A number as text, with a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: frozenset[int] = frozenset()) -> str:
    """A table as HTML. Cells are plain text: words in the first column and in those of ``words``, else numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="words"' if index in words else "" for index in range(len(cells))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{line(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
