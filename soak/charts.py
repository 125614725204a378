# SPDX-License-Identifier: MIT
"""The pictures of a report, drawn by matplotlib, which is imported when one is drawn.

A chart is drawn once for a light and once for a dark page; a page shows the one that fits.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from soak.cli import format_seconds

Theme = Mapping[str, str]
# Blue and vermilion are told apart with any colour vision (Okabe and Ito); limits are dashed as well.
LIGHT: Theme = {
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
DARK: Theme = {
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
WIDTH, HEIGHT = 4.4, 2.5
"""Inches of one chart, so that its letters have a readable size on a telephone."""
MOST_POINTS = 200
"""Points of one curve."""

Point = tuple[float, float]
Draw = Callable[[Any, Theme], None]


@dataclass(frozen=True)
class Chart:
    """One picture with its words."""

    title: str
    caption: str
    draw: Draw


class Drawn(NamedTuple):
    """One point of a curve: some samples in a row. The mean is drawn, with a band from the least to the most."""

    time: float
    low: float
    mean: float
    high: float


def downsample(points: Sequence[Point]) -> list[Drawn]:
    """Return at most MOST_POINTS points that keep every extreme."""
    each = max(1, math.ceil(len(points) / MOST_POINTS))
    drawn = []
    for start in range(0, len(points), each):
        times, values = zip(*points[start : start + each])
        drawn.append(Drawn(sum(times) / len(times), min(values), sum(values) / len(values), max(values)))
    return drawn


def curve(points: Sequence[Point], label: str, limit: tuple[float, str] | None = None) -> Draw:
    """Return what draws a figure over the time of the load (seconds), from 0 up, and its limit (value, words)."""

    def draw(axes: Any, theme: Theme) -> None:
        minutes = points[-1][0] > 300
        drawn = downsample([(time / 60 if minutes else time, value) for time, value in points])
        times = [point.time for point in drawn]
        band = [point.low for point in drawn], [point.high for point in drawn]
        axes.fill_between(times, *band, color=theme["main"], alpha=0.25, linewidth=0)
        axes.plot(times, [point.mean for point in drawn], color=theme["main"], linewidth=1.6)
        top = max([*band[1], limit[0] if limit else 0.0])
        axes.set(ylim=(0, top * 1.06 or 1), xlim=(0, times[-1] or 1), ylabel=label)
        axes.set_xlabel(f"time since the load began ({'min' if minutes else 's'})")
        axes.yaxis.set_major_formatter("{x:,.10g}")
        axes.grid(False, axis="x")
        if limit is not None:
            axes.axhline(limit[0], color=theme["limit"], linewidth=1.4, linestyle="--")
            _word(axes, limit[1], theme, 1.0)

    return draw


def bars(values: Sequence[tuple[str, float]], label: str, limit: tuple[float, str]) -> Draw:
    """Return what draws a few bars (name, value), and a limit (value, words)."""

    def draw(axes: Any, theme: Theme) -> None:
        names = [name for name, _ in values]
        axes.barh(range(len(names)), [value for _, value in values], 0.55, color=theme["main"])
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 1.12 * max([limit[0], *(value for _, value in values)])), xlabel=label)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.axvline(limit[0], color=theme["limit"], linewidth=1.4, linestyle="--")
        _word(axes, limit[1], theme, 1.0)

    return draw


def histogram(buckets: Sequence[Point], label: str, marks: Sequence[tuple[float, str]]) -> Draw:
    """Return what draws counts of times, pairs (from seconds, count) that rise; and marks (seconds, words)."""

    def draw(axes: Any, theme: Theme) -> None:
        each = max(1, math.ceil(len(buckets) / 64))
        groups = [buckets[start : start + each] for start in range(0, len(buckets), each)]
        edges = [group[0][0] for group in groups]
        edges.append(edges[-1] * (edges[-1] / edges[-2] if len(edges) > 1 else 1.1))
        counts = [sum(count for _, count in group) for group in groups]
        # On a logarithmic axis buckets differ in width: what is drawn is the share for each doubling of the time.
        shares = [
            100 * count / sum(counts) / math.log2(high / low) for count, low, high in zip(counts, edges, edges[1:])
        ]
        axes.stairs(shares, edges, fill=True, color=theme["main"], alpha=0.6, linewidth=0)
        axes.set_xscale("log")
        ticker = importlib.import_module("matplotlib.ticker")
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda seconds, _: short_time(seconds)))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set(xlabel=label, ylabel="probes per doubling (%)")
        for seconds, _ in marks:
            axes.axvline(seconds, color=theme["limit"], linewidth=1.4, linestyle="--")
        _word(axes, ", ".join(f"{words} {format_seconds(seconds)}" for seconds, words in marks), theme, 1.0)

    return draw


def _word(axes: Any, text: str, theme: Theme, place: float) -> None:
    """Write above the plot, where no curve gets in the way."""
    axes.annotate(text, (place, 1.02), xycoords="axes fraction", ha="right", va="bottom", color=theme["limit"])


def short_time(seconds: float) -> str:
    """Return a round time as a tick shows it.

    >>> short_time(0.01), short_time(0.5), short_time(2e-05), short_time(5.0)
    ('10 ms', '500 ms', '20 us', '5 s')
    """
    units = ((1, "s"), (1e-3, "ms"), (1e-6, "us"))
    by, unit = next(((by, unit) for by, unit in units if seconds >= 0.999 * by), (1e-9, "ns"))
    return f"{seconds / by:.3g} {unit}"


def svg(chart: Chart, theme: Theme) -> str:
    """Return one chart as the address of an image. Raises ImportError when there is no matplotlib."""
    with _matplotlib(theme) as figures:
        figure = figures.Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="none")
        chart.draw(figure.add_subplot(), theme)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def png(head: Sequence[str], status: str, tiles: Sequence[tuple[str, str]], charts: Sequence[Chart]) -> bytes:
    """Return all in one picture, light: the verdict (``head``, its first line large), the key figures, the charts.

    Raises ImportError when there is no matplotlib.
    """
    text = [line for words in head[1:] for line in textwrap.wrap(words, 120, subsequent_indent="    ")]
    figures_of = "   ".join(f"{name}: {value}" for name, value in tiles)
    text += ["", *textwrap.wrap(figures_of, 120)]
    rows = math.ceil(len(charts) / 2)
    heights = [0.6 + 0.2 * len(text), *[HEIGHT + 0.5] * rows]
    with _matplotlib(LIGHT) as figures:
        figure = figures.Figure(figsize=(11, sum(heights)), layout="constrained", facecolor=LIGHT["card"], dpi=110)
        grid = figure.add_gridspec(1 + rows, 2, height_ratios=heights)
        top = figure.add_subplot(grid[0, :])
        top.set_axis_off()
        top.set_title(textwrap.shorten(head[0], 90), loc="left", size=17, weight="bold", color=LIGHT[status])
        top.text(0, 1, "\n".join(text), va="top", transform=top.transAxes, linespacing=1.35)
        for place, chart in enumerate(charts):
            axes = figure.add_subplot(grid[1 + place // 2, place % 2])
            chart.draw(axes, LIGHT)
            axes.set_title(chart.title, loc="left", weight="bold", pad=20)
        content = io.BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


@contextlib.contextmanager
def _matplotlib(theme: Theme) -> Iterator[Any]:
    """Import matplotlib.figure and set the style for what is drawn within. Raises ImportError when it is missing."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells about its cache of fonts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that no font has
        matplotlib = importlib.import_module("matplotlib")
        figures = importlib.import_module("matplotlib.figure")
        style: dict[str, Any] = {
            "svg.fonttype": "none",
            "svg.hashsalt": "tempo",
            "text.parse_math": False,
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.facecolor": "none",
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
        }
        muted = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        style |= {**dict.fromkeys(muted, theme["muted"]), "text.color": theme["ink"], "grid.color": theme["grid"]}
        with matplotlib.rc_context(style):
            yield figures
