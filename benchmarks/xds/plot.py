"""A picture of how the cost of a change grows with the number of providers, as SVG."""

import math
from collections.abc import Iterator, Sequence
from typing import Final

from benchmarks.xds.measure import REAL, Results
from benchmarks.xds.processes import LINEAR, LLMPLANE, SNAPSHOT, WHOLE

_COLOURS: Final = {LLMPLANE: "#0b6e4f", WHOLE: "#7cb518", SNAPSHOT: "#c1121f", LINEAR: "#f4a259"}
_WIDTH: Final = 320
_HEIGHT: Final = 230
_GAP: Final = 60
_PANELS: Final = ((True, 1), (True, 1000), (False, 1), (False, 1000))
"""Delta or not, and streams."""
_X: Final = (100, 10_000)
_Y: Final = (0.1, 10_000)
"""Milliseconds at the bottom and the top."""


def draw(results: Results) -> str:
    """Return the picture: a panel for each variant and for one and 1,000 streams."""
    width, height = 2 * (_WIDTH + _GAP) + 20, 2 * (_HEIGHT + _GAP) + 50
    style = "font: 12px sans-serif; fill: #222"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" style="{style}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (delta, streams) in enumerate(_PANELS):
        x, y = _GAP + number % 2 * (_WIDTH + _GAP), 30 + number // 2 * (_HEIGHT + _GAP)
        parts.append(f'<g transform="translate({x},{y})">')
        title = f"{'delta' if delta else 'state of the world'}, {streams:,} stream{'s'[: streams > 1]}"
        parts.append(f'<text x="0" y="-10" font-weight="bold">{title}</text>')
        parts += _axes()
        for server, colour in _COLOURS.items():
            points = [
                (cell.providers, found[server].p50)
                for cell, found in sorted(results.items(), key=lambda item: item[0].providers)
                if (cell.world, cell.delta, cell.streams) == (REAL, delta, streams)
            ]
            parts += _line([(count, p50) for count, p50 in points if p50 is not None], colour)
        parts.append("</g>")
    for number, (server, colour) in enumerate(_COLOURS.items()):
        x, y = _GAP + number * 175, height - 25
        parts.append(f'<rect x="{x}" y="{y - 10}" width="14" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{y}">{server}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _axes() -> Iterator[str]:
    for exponent in range(round(math.log10(_Y[0])), round(math.log10(_Y[1])) + 1):
        y = _y(10.0**exponent)
        yield f'<line x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{10.0**exponent:g} ms</text>'
    for count in (100, 1000, 10_000):
        yield f'<text x="{_x(count):.1f}" y="{_HEIGHT + 16}" text-anchor="middle">{count:,}</text>'
    yield f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 32}" text-anchor="middle">providers</text>'


def _line(points: Sequence[tuple[int, float]], colour: str) -> Iterator[str]:
    places = [(_x(count), _y(milliseconds)) for count, milliseconds in points]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for x, y in places:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'


def _x(count: float) -> float:
    return _WIDTH * _share(count, *_X)


def _y(milliseconds: float) -> float:
    return _HEIGHT * (1 - _share(milliseconds, *_Y))


def _share(value: float, least: float, most: float) -> float:
    return math.log(value / least) / math.log(most / least)
