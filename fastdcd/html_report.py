"""Self-contained HTML pages with figures drawn as inline SVG: no scripts, no fonts, nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#3d6fd9", "#e0823d", "#2f9e7a", "#c4527f", "#8a63c9", "#b8992f", "#4aa3c7", "#7d8794")


def colour(number: int) -> str:
    """The colour of a page's curve or bar by its number: those of COLOURS, then hues that never repeat."""
    if number < len(COLOURS):
        return COLOURS[number]
    return f"hsl({number * 137.5 % 360:.0f} 50% 52%)"  # the golden angle: neighbours are far apart


# One colour for a method, in every picture: README's chart, the demo's, the report.
METHODS = {"no teacher": "#8a8a8a", "KD": "#3b78b8", "DCD": "#2f9e7a", "DCD + KD": "#c8502d"}


def shade(hexadecimal: str, number: int) -> str:
    """A colour for the number-th curve of one kind: the colour itself, then lighter ones."""
    share = 1 - 0.55**number
    channels = (int(hexadecimal[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(each + (225 - each) * share):02x}" for each in channels)


_STYLE = """
:root { --ink: #1c2330; --soft: #667085; --line: #e2e6ec; --back: #f6f7f9; --card: #fff; --good: #1f8a5f; --warn: #c2571a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #313845; --back: #14181f; --card: #1c222c; --good: #4cc38a; --warn: #f0955a; }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -.01em } h2 { font-size: 16px; margin: 0 0 14px }
p { margin: 6px 0 } .soft { color: var(--soft) } .small { font-size: 13px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px; margin-top: 18px; min-width: 0 }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 0 18px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 18px }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px }
.tile b { display: block; font-size: 23px; font-variant-numeric: tabular-nums; letter-spacing: -.01em }
.verdict { border-left: 5px solid var(--warn) } .verdict.good { border-left-color: var(--good) }
.verdict strong { color: var(--warn) } .verdict.good strong { color: var(--good) }
code { background: var(--back); border: 1px solid var(--line); border-radius: 5px; padding: 1px 6px; font-size: 13px; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px }
th { text-align: right; color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line); padding: 4px 8px }
td { text-align: right; padding: 5px 8px; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: nowrap } tr:last-child td { border-bottom: 0 }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--ink); font-size: 12px } svg .soft { fill: var(--soft) }
svg .axis { stroke: var(--line) } svg .mark { stroke: var(--ink); stroke-dasharray: 3 3 }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; margin-bottom: 8px }
.legend i, td i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px }
"""


@dataclass(frozen=True)
class Line:
    """A curve of a figure: points (x, y) in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


def document(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """A whole page. `title` and `subtitle` are text, `parts` are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head>\n'
        f'<body><main><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>\n'
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def card(title: str, body: str, *, note: str = "", name: str = "") -> str:
    """A framed part of a page; `name` becomes its id."""
    below = f'<p class="soft small">{escape(note)}</p>' if note else ""
    return f'<section class="card" id="{escape(name)}"><h2>{escape(title)}</h2>{body}{below}</section>'


def grid(parts: Iterable[str]) -> str:
    """Cards side by side, where there is room."""
    return f'<div class="grid">{"".join(parts)}</div>'


def tiles(values: dict[str, str]) -> str:
    """Figures to see first: label -> value."""
    each = (
        f'<div class="tile"><span class="soft small">{escape(label)}</span><b>{escape(value)}</b></div>'
        for label, value in values.items()
    )
    return f'<div class="tiles">{"".join(each)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, colours: Sequence[str] = ()) -> str:
    """A table of text; the first column names the row, beside its colour in figures if `colours` has one each."""
    top = "".join(f"<th>{escape(each)}</th>" for each in head) if any(head) else ""
    body = ""
    for number, row in enumerate(rows):
        dot = f'<i style="background:{colours[number]}"></i>' if colours else ""
        body += (
            "<tr>"
            + f"<td>{dot}{escape(row[0])}</td>"
            + "".join(f"<td>{escape(e)}</td>" for e in row[1:])
            + "</tr>"
        )
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if top else ''}<tbody>{body}</tbody></table>"


def legend(names: Sequence[str], fills: Sequence[str] = ()) -> str:
    """Names beside the colours of a figure."""
    each = (
        f'<span><i style="background:{fills[number] if fills else colour(number)}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(each)}</div>'


def waterfall(rows: Sequence[tuple[str, float, str]], *, unit: str = "ms", key: Sequence[str] = ()) -> str:
    """Bars one after the other: (name, length, label), each beginning where the last ended. Colours follow `key`, the
    names of all bars of a page."""
    total = sum(length for _, length, _ in rows) or 1.0
    height, left, width = 26, 130, 820
    parts, start = [], 0.0
    for tick in ticks(0, total):
        x = left + width * tick / total
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{len(rows) * height}"/>')
        parts.append(
            f'<text class="soft" x="{x:.1f}" y="{len(rows) * height + 16}" text-anchor="middle">{number(tick)}</text>'
        )
    for row, (name, length, label) in enumerate(rows):
        x, y = left + width * start / total, row * height
        bar = max(width * length / total, 1.5)
        fill = colour(key.index(name) if key else row)
        parts.append(f'<text x="0" y="{y + 17}">{escape(name)}</text>')
        parts.append(
            f'<rect x="{x:.1f}" y="{y + 4}" width="{bar:.1f}" height="{height - 8}" rx="3" fill="{fill}">'
            f"<title>{escape(name)}: {escape(label)}</title></rect>"
        )
        fits = x + bar + 120 < 1000
        anchor, at = ("start", x + bar + 6) if fits else ("end", x - 6)
        parts.append(f'<text class="soft" x="{at:.1f}" y="{y + 17}" text-anchor="{anchor}">{escape(label)}</text>')
        start += length
    end = len(rows) * height
    parts.append(f'<text class="soft" x="{left + width + 22}" y="{end + 16}">{escape(unit)}</text>')
    return _svg(1000, end + 22, parts)


def stack(parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar divided among (name, size, label), with a legend."""
    total = sum(size for _, size, _ in parts) or 1.0
    drawn, start = [], 0.0
    for row, (name, size, label) in enumerate(parts):
        width = 500 * size / total
        drawn.append(
            f'<rect x="{start:.1f}" y="0" width="{width:.1f}" height="30" fill="{colour(row)}">'
            f"<title>{escape(name)}: {escape(label)}</title></rect>"
        )
        start += width
    names = [f"{name} {label}" for name, _, label in parts]
    return _svg(500, 30, drawn) + '<div style="height:12px"></div>' + legend(names)


def stacks(
    rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], *, unit: str = "ms", key: Sequence[str] = ()
) -> str:
    """Bars below each other over one axis, each divided as the first: (name, a length for each of `names`). Colours
    follow `key`, the names of all divisions of a page."""
    fills = [colour(key.index(name) if key else place) for place, name in enumerate(names)]
    top = max(sum(lengths) for _, lengths in rows) or 1.0
    height, left, width = 26, 70, 880
    drawn = []
    for tick in ticks(0, top):
        x, below = left + width * tick / top, len(rows) * height
        drawn.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{below}"/>')
        drawn.append(
            f'<text class="soft" x="{x:.1f}" y="{below + 16}" text-anchor="middle">{number(tick)} {unit}</text>'
        )
    for row, (name, lengths) in enumerate(rows):
        x, y = float(left), row * height
        drawn.append(f'<text x="0" y="{y + 17}">{escape(name)}</text>')
        for place, length in enumerate(lengths):
            bar = width * length / top
            drawn.append(
                f'<rect x="{x:.1f}" y="{y + 4}" width="{bar:.1f}" height="{height - 8}" '
                f'fill="{fills[place]}"><title>{escape(names[place])}: {number(length)} {unit}</title></rect>'
            )
            x += bar
    return legend(names, fills) + _svg(1000, len(rows) * height + 22, drawn)


def histogram(values: Sequence[float], marks: dict[str, float], *, unit: str, bins: int = 40) -> str:
    """Counts of `values`, with named marks on the axis."""
    top = max([*values, *marks.values()]) * 1.02 or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(int(value / top * bins), bins - 1)] += 1
    width, height, most = 480, 190, max(counts)
    drawn = [
        f'<rect x="{10 + width * i / bins + 0.5:.1f}" y="{height - 150 * math.sqrt(count / most):.1f}" '
        f'width="{width / bins - 1:.1f}" height="{150 * math.sqrt(count / most):.1f}" fill="{COLOURS[0]}">'
        f"<title>{count} steps</title></rect>"
        for i, count in enumerate(counts)
        if count
    ]
    for row, (name, value) in enumerate(marks.items()):
        x = 10 + width * value / top
        anchor = "end" if x > width * 0.65 else "start"
        at = x - 4 if anchor == "end" else x + 4
        drawn.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{3 + 13 * row}" y2="{height}"/>')
        drawn.append(
            f'<text x="{at:.1f}" y="{12 + 13 * row}" text-anchor="{anchor}">{escape(name)}: {number(value)} {unit}</text>'
        )
    drawn.append(f'<line class="axis" x1="10" x2="{10 + width}" y1="{height}" y2="{height}"/>')
    drawn += [
        f'<text class="soft" x="{10 + width * tick / top:.1f}" y="{height + 15}" text-anchor="middle">{number(tick)}</text>'
        for tick in ticks(0, top)
    ]
    return _svg(500, height + 20, drawn)


def chart(
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    colours: Mapping[str, str] | None = None,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Curves over one x axis. `colours` has one for each curve's name; `levels` are named values of y, drawn across."""
    colours = colours or {line.name: colour(number) for number, line in enumerate(lines)}
    points = [point for line in lines for point in line.points]
    if not points:
        return '<p class="soft">no figures</p>'
    left, width, height = 52, 440, 190
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    levels = levels if points and levels else {}
    heights = [*(p[1] for p in points), *levels.values()]
    y_low, y_high = min(heights), max(heights)
    if y_low >= 0 and y_low < 0.6 * y_high:
        y_low = 0.0
    if y_high == y_low:
        y_high = y_low + (abs(y_low) or 1.0)
    y_high += 0.04 * (y_high - y_low)
    x_span = (x_high - x_low) or 1.0

    def across(value: float) -> float:
        return left + width * (value - x_low) / x_span

    def up(value: float) -> float:
        return 14 + height - height * (value - y_low) / (y_high - y_low)

    drawn = [f'<text class="soft" x="0" y="9">{escape(y)}</text>']
    for tick in ticks(y_low, y_high):
        drawn.append(
            f'<line class="axis" x1="{left}" x2="{left + width}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        )
        drawn.append(
            f'<text class="soft" x="{left - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick in ticks(x_low, x_high):
        drawn.append(
            f'<text class="soft" x="{across(tick):.1f}" y="{height + 30}" text-anchor="middle">{number(tick)}</text>'
        )
    drawn.append(f'<text class="soft" x="{left + width}" y="{height + 46}" text-anchor="end">{escape(x)}</text>')
    for name, value in levels.items():
        drawn.append(
            f'<line class="mark" x1="{left}" x2="{left + width}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>'
            f'<text class="soft" x="{left + 4}" y="{up(value) - 4:.1f}">{escape(name)} {number(value)}</text>'
        )
    for line in lines:
        stroke = colours[line.name]
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in thin(line.points))
        if len(line.points) == 1:
            a, b = line.points[0]
            drawn.append(f'<circle cx="{across(a):.1f}" cy="{up(b):.1f}" r="3.5" fill="{stroke}"/>')
        drawn.append(
            f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="1.8" stroke-linejoin="round">'
            f"<title>{escape(line.name)}</title></polyline>"
        )
    return _svg(500, height + 50, drawn)


def thin(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most about `most` points: means of neighbours."""
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(a for a, _ in each) / len(each), sum(b for _, b in each) / len(each)) for each in groups]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [each * step for each in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number as short as it can be said."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _svg(width: int, height: int, parts: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
