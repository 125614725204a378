# SPDX-License-Identifier: MIT
"""The pictures of a report: plain figures in, matplotlib figures out. matplotlib is imported when one is drawn.

Colours are those of ``LIGHT``. In an SVG for a page they are CSS variables, so that one drawing serves light and dark.
"""

from __future__ import annotations

import html
import importlib
import io
import logging
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from soak.units import KIB, MIB, format_seconds

# Blue and vermilion are told apart with any colour vision (Okabe and Ito); lines differ in their dashes as well.
LIGHT = {
    "ink": "#1c2128",
    "muted": "#57606b",
    "grid": "#d5dae0",
    "main": "#0072b2",
    "limit": "#c04a00",
    "page": "#f3f5f7",
    "card": "#fefefe",
    "pass": "#00664e",
    "warn": "#7a5200",
    "fail": "#a8321f",
    "badge": "#fffffe",
}
DARK = {
    "ink": "#e8ebef",
    "muted": "#a3adb8",
    "grid": "#3a424c",
    "main": "#56b4e9",
    "limit": "#ff9f5a",
    "page": "#12161b",
    "card": "#1b2128",
    "pass": "#4fd1a5",
    "warn": "#f0bd4a",
    "fail": "#ff9584",
    "badge": "#12161a",
}

THEMES = (LIGHT, DARK)

WIDTH = 4.4
"""Inches of one chart, so that its letters have a readable size on a telephone."""
MOST_POINTS = 200
"""Points of one curve."""

_TIMES: Sequence[tuple[float, str, float]] = ((1.0, "s", 300.0), (60.0, "min", 3 * 3600.0), (3600.0, "h", math.inf))
"""(seconds of a unit, its name, up to how many seconds it is taken)."""

Point = tuple[float, float]


class Drawn(NamedTuple):
    """One point of a curve: some samples in a row. The mean is drawn, with a band from the least to the most."""

    time: float
    low: float
    mean: float
    high: float


class Line(NamedTuple):
    """A level to look at a curve, or a bar, against."""

    value: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A figure over the time of the load (seconds), from 0 up, with one level at most."""

    points: Sequence[Drawn]
    label: str
    lines: Sequence[Line] = ()

    @property
    def height(self) -> float:
        """Inches."""
        return 2.4

    def draw(self, axes: Any) -> int:
        """Draw it; return how many rows of words stand above the plot."""
        last = self.points[-1].time
        by, unit = next((by, unit) for by, unit, most in _TIMES if last <= most)
        times = [point.time / by for point in self.points]
        axes.fill_between(
            times,
            [point.low for point in self.points],
            [point.high for point in self.points],
            color=LIGHT["main"],
            alpha=0.25,
            linewidth=0,
        )
        axes.plot(times, [point.mean for point in self.points], color=LIGHT["main"], linewidth=1.6)
        for line in self.lines:
            axes.axhline(line.value, color=LIGHT["limit"], linewidth=1.4, linestyle=(0, (5, 2)))
            _word(axes, line.label, 1, "right")
        top = max([*(point.high for point in self.points), *(line.value for line in self.lines)])
        axes.set_ylim(0, top * 1.06 if top > 0 else 1)
        axes.set_xlim(0, times[-1] or 1)
        axes.grid(False, axis="x")
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", steps=[1, 2, 5, 10])
        axes.set_xlabel(f"time since the load began ({unit})")
        axes.set_ylabel(self.label)
        return len(self.lines)


@dataclass(frozen=True)
class Bars:
    """A few bars, (name, value, half of the spread, text), with levels beside them."""

    bars: Sequence[tuple[str, float, float, str]]
    label: str
    lines: Sequence[Line] = ()

    @property
    def height(self) -> float:
        """Inches."""
        return 1.1 + 0.42 * len(self.bars)

    def draw(self, axes: Any) -> int:
        """Draw it; return how many rows of words stand above the plot."""
        most = max([value + spread for _, value, spread, _ in self.bars] + [line.value for line in self.lines])
        axes.set_xlim(0, most * 1.12 if most > 0 else 1)
        for place, (_, value, spread, _) in enumerate(self.bars):
            axes.barh(place, value, 0.62, color=LIGHT["main"], alpha=1.0 if place == 0 else 0.55)
            if spread:
                axes.errorbar(value, place, xerr=spread, color=LIGHT["ink"], linewidth=1.4, capsize=4)
        _names(axes, [f"{name}\n{text}" for name, _, _, text in self.bars])
        axes.set_xlabel(self.label)
        return _levels(axes, self.lines)


@dataclass(frozen=True)
class Times:
    """A few times in seconds, (name, time), on a logarithmic axis, with levels beside them."""

    times: Sequence[tuple[str, float]]
    label: str
    lines: Sequence[Line] = ()

    @property
    def height(self) -> float:
        """Inches."""
        return 1.1 + 0.42 * len(self.times)

    def draw(self, axes: Any) -> int:
        """Draw it; return how many rows of words stand above the plot."""
        for place, (_, seconds) in enumerate(self.times):
            axes.plot([seconds], [place], "o", markersize=9, color=LIGHT["main"], clip_on=False)
        values = [seconds for _, seconds in self.times] + [line.value for line in self.lines]
        _time_axis(axes, min(values) / 2, max(values) * 4)
        _names(axes, [f"{name}\n{format_seconds(seconds)}" for name, seconds in self.times])
        axes.set_xlabel(self.label)
        return _levels(axes, self.lines)


@dataclass(frozen=True)
class Histogram:
    """Counts of times: pairs (from seconds, count), rising, each bucket up to the next one's."""

    buckets: Sequence[Point]
    label: str
    lines: Sequence[Line] = ()

    @property
    def height(self) -> float:
        """Inches."""
        return 2.4

    def draw(self, axes: Any) -> int:
        """Draw it; return how many rows of words stand above the plot."""
        edges = [low for low, _ in self.buckets]
        # Not up to the maximum: were that close to the last edge, a single probe would make a peak.
        edges.append(edges[-1] * (edges[-1] / edges[-2] if len(edges) > 1 else 1.1))
        counts = [count for _, count in self.buckets]
        total = sum(counts)
        # On a logarithmic axis buckets differ in width: what is drawn is the share for each doubling of the time.
        heights = [100 * count / total / math.log2(high / low) for count, low, high in zip(counts, edges, edges[1:])]
        axes.stairs(heights, edges, fill=True, color=LIGHT["main"], alpha=0.35, linewidth=0)
        axes.stairs(heights, edges, color=LIGHT["main"], linewidth=1.4)
        _time_axis(axes, edges[0] / 1.2, max([edges[-1], *(line.value for line in self.lines)]) * 1.6)
        axes.set_ylim(0, max(heights) * 1.1)
        axes.locator_params(axis="y", nbins=5)
        axes.set_xlabel(self.label)
        axes.set_ylabel("probes per doubling (%)")
        return _levels(axes, self.lines)


@dataclass(frozen=True)
class Chart:
    """One picture with its words."""

    title: str
    caption: str
    content: Curve | Bars | Times | Histogram


def downsample(points: Sequence[Point], most: int = MOST_POINTS) -> list[Drawn]:
    """Return at most ``most`` points that keep every extreme.

    >>> downsample([(1.0, 5.0), (2.0, 9.0), (3.0, 1.0)], most=2)
    [Drawn(time=1.5, low=5.0, mean=7.0, high=9.0), Drawn(time=3.0, low=1.0, mean=1.0, high=1.0)]
    """
    drawn = []
    for group in _groups(points, most):
        times, values = zip(*group)
        drawn.append(Drawn(sum(times) / len(times), min(values), sum(values) / len(values), max(values)))
    return drawn


def coarsen(buckets: Sequence[Point], most: int = 64) -> list[Point]:
    """Return at most ``most`` buckets: neighbours added up.

    >>> coarsen([(1.0, 5), (2.0, 9), (3.0, 1)], most=2)
    [(1.0, 14), (3.0, 1)]
    """
    return [(group[0][0], sum(count for _, count in group)) for group in _groups(buckets, most)]


def _groups(points: Sequence[Point], most: int) -> list[Sequence[Point]]:
    size = max(1, math.ceil(len(points) / most))
    return [points[start : start + size] for start in range(0, len(points), size)]


def count_unit(most: float) -> tuple[float, str]:
    """Return the unit for counts up to ``most``: what to divide by, and its word with a blank, if any.

    >>> count_unit(532029.0), count_unit(12.0)
    ((1000.0, 'thousand '), (1.0, ''))
    """
    units = ((1e6, "million "), (1e3, "thousand "))
    return next((unit for unit in units if most >= 5 * unit[0]), (1.0, ""))


def bytes_unit(most: float) -> tuple[float, str]:
    """Return the unit for sizes up to ``most`` bytes: what to divide by, and its name."""
    return (MIB, "MiB") if most >= MIB else (KIB, "KiB") if most >= KIB else (1.0, "bytes")


def svg(chart: Chart, number: int) -> str:
    """Return one chart for a page: no fixed size, its colours the page's, its ids its own by ``number``.

    Raises ImportError when there is no matplotlib.
    """
    with _matplotlib() as figures:
        figure = figures.Figure(figsize=(WIDTH, chart.content.height), layout="constrained", facecolor="none")
        chart.content.draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", drawn, flags=re.DOTALL)
    # The page's own letters: they need no font in the file, and can be read out, searched and copied.
    drawn = re.sub(r"font: ((?:\w+ )*[\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", drawn)
    for name, colour in LIGHT.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>c{number}-", drawn).replace("xlink:href", "href")
    box = re.search(r'viewBox="[^"]*"', drawn)
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(chart.title)}">'
    return re.sub(r">\s+<", "><", re.sub(r"^<svg[^>]*>", opening, drawn)).strip()


def png(head: Sequence[str], status: str, tiles: Sequence[tuple[str, str]], charts: Sequence[Chart]) -> bytes:
    """Return all in one picture, light: the verdict (``head``, its first line large), the tiles, the charts.

    Raises ImportError when there is no matplotlib.
    """
    title = textwrap.wrap(head[0], 58)
    lines = [line for text in head[1:] for line in textwrap.wrap(text, 120, subsequent_indent="    ")]
    pairs = [charts[at : at + 2] for at in range(0, len(charts), 2)]
    heights = [0.3 + 0.4 * len(title) + 0.21 * len(lines), 1.25]
    heights += [max(chart.content.height for chart in pair) + 0.3 for pair in pairs]
    with _matplotlib() as figures:
        figure = figures.Figure(figsize=(11, sum(heights)), layout="constrained", facecolor=LIGHT["card"], dpi=110)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)
        for part in parts:
            part.set_facecolor("none")
        inch = 1 / heights[0]
        text = {"va": "top", "color": LIGHT["ink"]}
        large = {**text, "color": LIGHT[status], "size": 20, "weight": "bold"}
        parts[0].text(0.015, 1 - 0.12 * inch, "\n".join(title), **large)
        parts[0].text(
            0.015, 1 - (0.18 + 0.4 * len(title)) * inch, "\n".join(lines), size=10.5, linespacing=1.35, **text
        )
        across = math.ceil(len(tiles) / 2)
        for place, (name, value) in enumerate(tiles):
            left, below = 0.015 + place % across / across, 0.5 * (place // across)
            parts[1].text(left, 0.95 - below, value, size=15, weight="bold", **text)
            parts[1].text(left, 0.95 - below - 0.2, name, size=9.5, **{**text, "color": LIGHT["muted"]})
        for part, pair in zip(parts[2:], pairs):
            places = part.subplots(1, 2, squeeze=False)[0]
            pad = 8 + 13 * max(chart.content.draw(axes) for axes, chart in zip(places, pair))
            for axes, chart in zip(places, pair):
                axes.set_title(chart.title, loc="left", size=12, weight="bold", color=LIGHT["ink"], pad=pad)
            for axes in places[len(pair) :]:
                axes.set_axis_off()
        content = io.BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


@contextmanager
def _matplotlib() -> Iterator[Any]:
    """Import matplotlib.figure and set it up for what is drawn within. Raises ImportError when it is missing."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells about its cache of fonts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that no font has, a feature that goes in a year
        matplotlib = importlib.import_module("matplotlib")
        figures = importlib.import_module("matplotlib.figure")
        parameters = {
            "svg.fonttype": "none",
            "svg.hashsalt": "tempo",
            "text.parse_math": False,
            "font.family": "sans-serif",
            "font.size": 10,
            "text.color": LIGHT["ink"],
            "axes.edgecolor": LIGHT["muted"],
            "axes.facecolor": "none",
            "axes.labelcolor": LIGHT["muted"],
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "grid.color": LIGHT["grid"],
            "grid.linewidth": 0.8,
            "xtick.color": LIGHT["muted"],
            "ytick.color": LIGHT["muted"],
            "ytick.major.size": 0,
        }
        with matplotlib.rc_context(parameters):
            yield figures


def _time_axis(axes: Any, low: float, high: float) -> None:
    """Make x a logarithmic axis of seconds whose ticks are times as people say them."""
    ticker = importlib.import_module("matplotlib.ticker")
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
    step = max(1, math.ceil(decades / 6))
    axes.xaxis.set_major_locator(ticker.LogLocator(base=10.0**step, subs=subs, numticks=20))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda seconds, _: short_time(seconds)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def short_time(seconds: float) -> str:
    """Return a round time as a tick says it.

    >>> short_time(0.01), short_time(0.5), short_time(2e-05), short_time(5.0)
    ('10 ms', '500 ms', '20 us', '5 s')
    """
    by, unit = next(
        ((by, unit) for by, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "us")) if seconds >= 0.999 * by), (1e-9, "ns")
    )
    return f"{seconds / by:.3g} {unit}"


def _names(axes: Any, names: Sequence[str]) -> None:
    """Name the places of a chart with one bar, or point, above the other; the first one is at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(False, axis="y")


def _levels(axes: Any, lines: Sequence[Line]) -> int:
    """Draw upright levels, their words above the plot, in as many rows as keep them apart; return these."""
    taken: list[float] = []
    for line in sorted(lines, key=lambda line: line.value):
        axes.axvline(line.value, color=LIGHT["limit"], linewidth=1.4, linestyle=(0, (5, 2)))
        place = (axes.transScale + axes.transLimits).transform((line.value, 0))[0]
        half = 0.0095 * len(line.label)
        middle = min(max(place, half), 1 - half)
        row = next((row for row, end in enumerate(taken) if middle - half > end + 0.02), len(taken))
        taken[row : row + 1] = [middle + half]
        _word(axes, line.label, middle, "center", row)
    return len(taken)


def _word(axes: Any, text: str, place: float, align: str, row: int = 0) -> None:
    """Write above the plot, where no curve gets in the way; ``place`` is a share of its width."""
    above = {"xytext": (0, 3 + 13 * row), "textcoords": "offset points"}
    axes.annotate(text, (place, 1), xycoords="axes fraction", ha=align, color=LIGHT["limit"], **above)
