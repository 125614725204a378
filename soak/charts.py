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
import statistics
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Theme = Mapping[str, str]
NAMES = ("ink", "muted", "grid", "main", "limit", "page", "card", "pass", "warn", "fail", "badge")
# Blue and vermilion are told apart with any colour vision (Okabe and Ito); limits are dashed as well.
_LIGHT = "#1c2128 #57606b #d5dae0 #0072b2 #c04a00 #f3f5f7 #fefefe #00664e #7a5200 #a8321f #fffffe"
_DARK = "#e8ebef #a3adb8 #3a424c #56b4e9 #ff9f5a #12161b #1b2128 #4fd1a5 #f0bd4a #ff9584 #12161a"
LIGHT, DARK = (dict(zip(NAMES, colours.split())) for colours in (_LIGHT, _DARK))
WIDTH, HEIGHT = 4.4, 2.5  # inches of one chart, so that its letters have a readable size on a telephone
MOST_POINTS = 300  # of a curve: more would be closer than a pixel

Point = tuple[float, float]
Draw = Callable[[Any, Theme], None]


class Chart(NamedTuple):
    """One picture with its words."""

    title: str
    caption: str
    draw: Draw


def means_of(points: Sequence[Point]) -> int:
    """Return how many points are drawn as one, their mean."""
    return math.ceil(len(points) / MOST_POINTS)


def curve(points: Sequence[Point], label: str, limit: tuple[float, str] | None = None) -> Draw:
    """Return what draws a figure over the time of the load (seconds), from 0 up, and its limit (value, words)."""
    size = means_of(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]

    def draw(axes: Any, theme: Theme) -> None:
        times, values = zip(*((some[-1][0], statistics.fmean(value for _, value in some)) for some in groups))
        axes.plot(times, values, color=theme["main"], linewidth=1.6)
        top = max([*values, limit[0] if limit else 0.0])
        axes.set(ylim=(0, top * 1.06 or 1), xlim=(0, times[-1] or 1), ylabel=label)
        axes.set_xlabel("time since the load began (s)")
        axes.yaxis.set_major_formatter("{x:,.10g}")
        axes.grid(False, axis="x")
        _limit(axes, axes.axhline, limit, theme)

    return draw


def bars(values: Mapping[str, float], label: str, limit: tuple[float, str] | None = None) -> Draw:
    """Return what draws a few bars with their values, and a limit (value, words)."""

    def draw(axes: Any, theme: Theme) -> None:
        drawn = axes.barh(list(values), list(values.values()), 0.55, color=theme["main"])
        axes.bar_label(drawn, fmt="%.3g", padding=3, color=theme["ink"])
        axes.set(xlim=(0, 1.15 * max(limit[0] if limit else 0, *values.values())), xlabel=label)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        _limit(axes, axes.axvline, limit, theme)

    return draw


def _limit(axes: Any, line: Any, limit: tuple[float, str] | None, theme: Theme) -> None:
    """Draw a limit, and its words above the plot, where no curve gets in the way."""
    if limit is not None:
        line(limit[0], color=theme["limit"], linewidth=1.4, linestyle="--")
        axes.annotate(limit[1], (1, 1.02), xycoords="axes fraction", ha="right", va="bottom", color=theme["limit"])


def svg(chart: Chart, theme: Theme) -> str:
    """Return one chart as the address of an image. Raises ImportError when there is no matplotlib."""
    with _matplotlib(theme) as figures:
        figure = figures.Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="none")
        chart.draw(figure.add_subplot(), theme)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def png(head: str, status: str, lines: Sequence[str], charts: Sequence[Chart]) -> bytes:
    """Return all in one picture, light: the verdict, lines of text, the charts. Raises ImportError as svg."""
    text = [line for words in lines for line in textwrap.wrap(words, 120, subsequent_indent="    ")]
    rows = math.ceil(len(charts) / 2)
    heights = [0.6 + 0.2 * len(text), *[HEIGHT + 0.5] * rows]
    with _matplotlib(LIGHT) as figures:
        figure = figures.Figure(figsize=(11, sum(heights)), layout="constrained", facecolor=LIGHT["card"], dpi=110)
        grid = figure.add_gridspec(1 + rows, 2, height_ratios=heights)
        top = figure.add_subplot(grid[0, :])
        top.set_axis_off()
        top.set_title(textwrap.shorten(head, 90), loc="left", size=17, weight="bold", color=LIGHT[status])
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
        style: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "tempo", "text.parse_math": False}
        style |= {"font.size": 10, "axes.facecolor": "none", "axes.grid": True, "axes.axisbelow": True}
        style |= {f"axes.spines.{side}": False for side in ("top", "right", "left")}
        style |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), theme["muted"])
        with matplotlib.rc_context({**style, "text.color": theme["ink"], "grid.color": theme["grid"]}):
            yield importlib.import_module("matplotlib.figure")
