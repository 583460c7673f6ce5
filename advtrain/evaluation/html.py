"""Self-contained HTML pages, without network or scripts: escaping, style sheet and tables.

The style supports narrow windows and dark mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from advtrain.text import one_line

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #5d666f; --line: #d5dade; --back: #fff; --card: #f5f7f8;
  --blue: #1f6feb; --good: #1a7f37; --bad: #c62828; --warn: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ea; --dim: #9aa4ad; --line: #3a4148; --back: #16191c;
  --card: #20252a; --blue: #6ea8fe; --good: #57c46f; --bad: #ff7b72; --warn: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.2rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; } .dim { color: var(--dim); } code { overflow-wrap: anywhere; font-size: .9em; }
pre { background: var(--card); padding: .7rem; overflow-x: auto; border-radius: .4rem; font-size: .85rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: var(--dim); white-space: normal; vertical-align: bottom; }
@media (max-width: 36rem) { body { padding: .8rem; } th, td { padding: .3rem .2rem; font-size: .8rem; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); } }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem .9rem; margin: .7rem 0; }
.facts dt { color: var(--dim); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.confusion { width: auto; } .confusion td, .confusion th { text-align: center; min-width: 2em; }
.confusion td:first-child { text-align: left; font-weight: 600; color: var(--dim); }
.confusion .hit { background: color-mix(in srgb, var(--good) calc(60% * var(--share)), transparent); }
.confusion .miss { background: color-mix(in srgb, var(--bad) calc(60% * var(--share)), transparent); }
.passed, .trusted { color: var(--good); } .failed, .broken { color: var(--bad); }
.warning { color: var(--warn); } .skipped, .unchecked { color: var(--dim); }
.check { border-left: 4px solid currentColor; padding: .1rem 0 .1rem .8rem; margin: .9rem 0; }
.check * { color: var(--ink); } .check .verdict { color: inherit; font-weight: 600; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .8rem; }
figure { margin: 0; background: var(--card); border-radius: .5rem; padding: .6rem; }
figure div { display: grid; grid-template-columns: repeat(3, 1fr); gap: .3rem; }
figure img { width: 100%; image-rendering: pixelated; display: block; }
figure.text { margin: .6rem 0; overflow-wrap: anywhere; }
figcaption { font-size: .85rem; margin-top: .4rem; }
svg { width: 100%; height: auto; max-width: 40rem; } svg text { fill: var(--dim); font-size: 12px; }
@media (max-width: 36rem) { svg text { font-size: 19px; } }
"""


class Html(str):
    """Text that is HTML already; `fill` escapes any other."""

    __slots__ = ()


def fill(template: str, *values: object) -> Html:
    """Return the template with each `{}` replaced by a value, escaped unless it is Html.

    Args:
        template: constant HTML. Attributes that hold a value must be in quotes.
        values: texts, numbers, and Html made by this function.
    """
    safe = (value if isinstance(value, Html) else escape(one_line(str(value))) for value in values)
    return Html(template.format(*safe))


def joined(parts: Iterable[Html]) -> Html:
    """Return the parts one after the other."""
    return Html("".join(parts))


def document(title: str, body: Html, style: str = "") -> str:
    """Return a complete page; `title` is plain text, `style` is extra CSS."""
    return fill(
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        "<title>{}</title><style>{}</style></head><body>{}</body></html>\n",
        title,
        Html(STYLE + style),
        body,
    )


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Html:
    """Return an HTML table; a wide table scrolls on its own, also by keyboard."""
    lines = joined(fill("<tr>{}</tr>", joined(fill("<td>{}</td>", cell) for cell in row)) for row in rows)
    cells = joined(fill("<th>{}</th>", name) for name in head)
    return fill("<div class=wide tabindex=0><table><tr>{}</tr>{}</table></div>", cells, lines)


def fact_list(facts: Mapping[str, str]) -> Html:
    """Return a list of names and values in two columns."""
    pairs = (fill("<dt>{}</dt><dd>{}</dd>", name, value) for name, value in facts.items())
    return fill("<dl class=facts>{}</dl>", joined(pairs))


def axis_titles(below: str, beside: str, x: float, y: float, left: float, middle: float) -> Html:
    """Return the axis titles of an SVG chart.

    Args:
        below: title of the x axis, centered at (x, y).
        beside: title of the y axis, turned, centered at (left, middle).
    """
    return fill(
        "<text x='{}' y='{}' text-anchor=middle>{}</text>"
        "<text transform='translate({} {}) rotate(-90)' text-anchor=middle>{}</text>",
        x,
        y,
        below,
        left,
        middle,
        beside,
    )
