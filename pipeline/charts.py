"""Line charts as small inline SVG, coloured by the page's own style sheet so that light, dark and print all work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy.typing as npt

MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 46, 10, 10, 40


@dataclass(frozen=True)
class Line:
    """One line: its points, the style sheet's class that colours it, and what a pointer resting on it reads."""

    x: npt.NDArray[Any]
    y: npt.NDArray[Any]
    css_class: str
    name: str
    dots: bool = False
    radius: npt.NDArray[Any] | None = None
    """Of each dot, where they are not all alike."""


@dataclass(frozen=True)
class Band:
    """What lies between two lines over the same x, such as a mean less and plus a standard deviation."""

    x: npt.NDArray[Any]
    low: npt.NDArray[Any]
    high: npt.NDArray[Any]
    css_class: str
    name: str


@dataclass(frozen=True)
class Axis:
    """An axis: its title and its ends."""

    title: str
    low: float
    high: float
    whole: bool = False
    """Whether only whole numbers stand on it, as for epochs."""

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers from end to end, at most `most`."""
        found = ticks(self.low, self.high, most)
        return [tick for tick in found if tick == int(tick)] if self.whole else found


def chart(
    lines: Sequence[Line],
    *,
    describe: str,
    x: Axis,
    y: Axis,
    size: tuple[int, int],
    diagonal: bool = False,
    bands: Sequence[Band] = (),
) -> str:
    """Draw a line chart.

    Args:
        lines: later ones lie on top.
        describe: the picture in words, for those who cannot see it.
        x: the horizontal axis.
        y: the vertical axis.
        size: width and height in the units that text is measured in.
        diagonal: draw the line from corner to corner: chance on a ROC plot, perfection on a reliability diagram.
        bands: areas, below all lines.
    """
    frame = _Frame(x, y, *size)
    body = [*frame.grid(), *([frame.line(x.low, y.low, x.high, y.high, "chance")] if diagonal else [])]
    body += [_fill(band, frame) for band in bands]
    body += [part for line in lines for part in _draw(line, frame)]
    return (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(describe)}" class="chart">'
        + "".join(body)
        + "</svg>"
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two others, at most `most`."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span))
    step = next(step for factor in (0.1, 0.2, 0.5, 1, 2, 5) if span / (step := factor * power) <= most - 1 + 1e-9)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Frame:
    """Turns values into places on the drawing."""

    x: Axis
    y: Axis
    width: int
    height: int

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x.low) / max(self.x.high - self.x.low, 1e-12)
        up = (y - self.y.low) / max(self.y.high - self.y.low, 1e-12)
        return (
            MARGIN_LEFT + across * (self.width - MARGIN_LEFT - MARGIN_RIGHT),
            self.height - MARGIN_BOTTOM - up * (self.height - MARGIN_TOP - MARGIN_BOTTOM),
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, css_class: str) -> str:
        (left, top), (right, bottom) = self.at(x1, y1), self.at(x2, y2)
        return f'<line class="{css_class}" x1="{left:.1f}" y1="{top:.1f}" x2="{right:.1f}" y2="{bottom:.1f}"/>'

    def grid(self) -> list[str]:
        parts = []
        for tick in self.x.ticks():
            left, bottom = self.at(tick, self.y.low)
            parts.append(self.line(tick, self.y.low, tick, self.y.high, "grid"))
            parts.append(
                f'<text class="tick" x="{left:.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{tick:g}</text>'
            )
        for tick in self.y.ticks():
            left, middle = self.at(self.x.low, tick)
            parts.append(self.line(self.x.low, tick, self.x.high, tick, "grid"))
            parts.append(
                f'<text class="tick" x="{left - 6:.1f}" y="{middle + 4:.1f}" text-anchor="end">{tick:g}</text>'
            )
        return [*parts, *self._titles()]

    def _titles(self) -> list[str]:
        middle_x = (MARGIN_LEFT + self.width - MARGIN_RIGHT) / 2
        middle_y = (MARGIN_TOP + self.height - MARGIN_BOTTOM) / 2
        return [
            f'<text class="axis" x="{middle_x:.0f}" y="{self.height - 6}" text-anchor="middle">'
            f"{escape(self.x.title)}</text>",
            f'<text class="axis" transform="translate(12 {middle_y:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y.title)}</text>",
        ]


def _fill(band: Band, frame: _Frame) -> str:
    there = [frame.at(float(x), float(y)) for x, y in zip(band.x, band.high, strict=True)]
    back = [frame.at(float(x), float(y)) for x, y in zip(band.x[::-1], band.low[::-1], strict=True)]
    points = " ".join(f"{across:.1f},{down:.1f}" for across, down in there + back)
    return f'<polygon class="{band.css_class}" points="{points}"><title>{escape(band.name)}</title></polygon>'


def _draw(line: Line, frame: _Frame) -> list[str]:
    places = [frame.at(float(x), float(y)) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(float(y))]
    points = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
    title = f"<title>{escape(line.name)}</title>"
    parts = [f'<polyline class="{line.css_class}" points="{points}">{title}</polyline>']
    if line.dots:
        radii = [2.2] * len(places) if line.radius is None else line.radius
        parts += [
            f'<circle class="{line.css_class}" cx="{across:.1f}" cy="{down:.1f}" r="{radius:.1f}"/>'
            for (across, down), radius in zip(places, radii, strict=True)
        ]
    return parts
