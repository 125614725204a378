# SPDX-License-Identifier: MIT
"""The ``report`` command: one HTML page, complete in itself, and one picture of a run's result and its samples.

A result is a file that anyone may have sent: a figure that is missing, or is none, is shown as not measured, and every
text is escaped.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soak import baseline, charts, results, run, verdict
from soak.charts import Bars, Chart, Curve, Histogram, Line, Point, Times
from soak.options import complain, converter, parse_path
from soak.units import MIB, format_seconds, format_size

OUT = Path("soak/out")
MOST_PROBLEMS = 50
"""Lines of trouble that are shown."""
LONGEST = 2000
"""Characters of one text that are shown."""

EXAMPLE = """\
example:
  python3 -m soak run --duration 30s && python3 -m soak report
  python3 -m soak report --run soak/out/soak-20261124-165922.json --html run.html --png run.png

Charts and the picture need matplotlib; without it, the page has the figures alone.
exit code: 0 written, 1 a file cannot be read or written or is no result, 2 a bad option
"""

SIZES = ("payload", "max_batch_bytes", "max_buffered_bytes")
SECONDS = ("duration", "interval", "consumer_delay")
LEFT_OUT = ("executable",)
"""A path may tell its owner's name, and reports are for others."""


class ReportError(Exception):
    """Why there is no report, in one line."""


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="one HTML page and one picture of a run",
        description="Make one HTML page, complete in itself, and one PNG picture of a result of `soak run`.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main, parser=parser)
    path = converter(parse_path)
    add = parser.add_argument
    add("--run", type=path, default=OUT / "latest.json", metavar="PATH", help="the result (%(default)s)")
    add("--out", type=path, default=OUT, metavar="DIR", help="where report.html and report.png go (%(default)s)")
    add("--html", type=path, metavar="PATH", help="the page's file (report.html in --out)")
    add("--png", type=path, metavar="PATH", help="the picture's file (report.png in --out)")


def main(options: argparse.Namespace) -> int:
    """Read the run, write the page and the picture; return the exit code."""
    page_path, png_path = options.html or options.out / "report.html", options.png or options.out / "report.png"
    if len({os.path.realpath(path) for path in (options.run, page_path, png_path)}) < 3:
        options.parser.error("--run, --html and --png name one file twice: each needs its own")
    try:
        report = read(options.run)
        pictures = charts_of(report)
        try:
            drawn = [charts.svg(chart, number) for number, chart in enumerate(pictures)]
            picture = charts.png([*head_of(report), origin_of(report)], report.status, tiles_of(report), pictures)
        except ImportError:
            complain("no charts and no picture: matplotlib is not installed (make report installs it)")
            drawn, picture = None, None
    except ReportError as error:
        complain(str(error))
        return 1
    written = []
    files = [(page_path, page(report, pictures, drawn).encode())]
    if picture is not None:
        files.append((png_path, picture))
    for path, content in files:
        try:
            written.append(write(path, content))
        except ReportError as error:
            complain(str(error))
    lines = head_of(report)[:1]
    if len(written) < len(files):
        lines = [*head_of(report), *(f"{what}: {value}" for what, value in tiles_of(report)), origin_of(report)]
    print("\n".join([*lines, f"written       {', '.join(written) or 'nothing'}"]), flush=True)
    return 0 if len(written) == len(files) else 1


def write(path: Path, content: bytes) -> str:
    """Write one file, with its folder; return its name and size. Raises ReportError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        results.replace(path, content)
    except OSError as error:
        raise ReportError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
    return f"{path} ({format_size(len(content))})"


# From the files to figures


@dataclass(frozen=True)
class Report:
    """What is known of a run."""

    result: Mapping[str, Any]
    samples: Sequence[Mapping[str, float]]
    """The figures of each sample that are numbers, in the order of their time."""
    unsampled: str
    """Why there are no samples; empty when there are."""

    def number(self, *keys: str) -> float | None:
        """Return the figure that ``keys`` lead to; None when there is none, or it is not a finite number."""
        return number(self.get(*keys))

    def get(self, *keys: str) -> Any:
        """Return whatever ``keys`` lead to; None when they lead nowhere."""
        found: Any = self.result
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    @property
    def status(self) -> str:
        """The overall verdict; what is none of the three is a fail."""
        return self.status_of("overall")

    def status_of(self, name: str) -> str:
        """Return one verdict."""
        status = self.get("verdict", name, "status")
        return status if status in (verdict.PASS, verdict.WARN) else verdict.FAIL


def number(value: object) -> float | None:
    """Return a finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e18:
        return None
    return float(value) if math.isfinite(value) else None


def read(path: Path) -> Report:
    """Read a result and its samples. Raises ReportError when the file cannot be read or is no result."""
    try:
        result = json.loads(path.read_bytes())
    except OSError as error:
        hint = " (make soak makes one)" if isinstance(error, FileNotFoundError) else ""
        raise ReportError(f"cannot read {str(path)!r}: {error.strerror or error}{hint}") from None
    except (ValueError, RecursionError):
        raise ReportError(f"{str(path)!r} is no result of `soak run`: not JSON") from None
    parts = ("verdict", "config", "environment")
    if not isinstance(result, dict) or not all(isinstance(result.get(part), dict) for part in parts):
        raise ReportError(f"{str(path)!r} is no result of `soak run`: without {', '.join(parts)}")
    if result.get("schema") != run.SCHEMA:
        raise ReportError(f"{str(path)!r} has schema {plain(result.get('schema'))[:20]}; this reads {run.SCHEMA}")
    name = result.get("samples")
    if not isinstance(name, str) or Path(name).name != name or "\0" in name:
        return Report(result, [], "the result names no file of samples")
    # A result may stand elsewhere (--json) than its samples (--out).
    for folder in (path.parent, OUT):
        try:
            with open(folder / name, encoding="utf-8", errors="replace") as lines:
                samples = sorted(read_samples(lines, result.get("started")), key=lambda sample: sample["elapsed"])
        except OSError as error:
            why = f"its samples, {name!r}, cannot be read: {error.strerror or error}"
        else:
            return Report(result, samples, "" if samples else f"{name!r} holds no samples of this run")
    return Report(result, [], why)


def read_samples(lines: Iterator[str], started: object) -> Iterator[dict[str, float]]:
    """Yield the samples of a run's stream; none when its header names another start. Broken lines are left out."""
    for line in lines:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line of a run that was killed
        if not isinstance(content, dict):
            continue
        if content.get("type") == "header" and content.get("started") != started:
            return
        figures = {key: figure for key, value in content.items() if (figure := number(value)) is not None}
        if content.get("type") == "sample" and figures.get("elapsed", -1) >= 0:
            yield figures


def levels(samples: Sequence[Mapping[str, float]], key: str) -> list[Point]:
    """Return a figure of each sample that has it, over the time."""
    return [(sample["elapsed"], sample[key]) for sample in samples if key in sample]


def rates(samples: Sequence[Mapping[str, float]], key: str) -> list[Point]:
    """Return how a count grew a second, at the end of each interval.

    The sample after the end follows the one before within moments: it takes that one's place, instead of making a rate
    of almost no time.
    """
    counts = [(0.0, 0.0), *levels(samples, key)]
    usual = statistics.median([now - then for (then, _), (now, _) in zip(counts, counts[1:])] or [0.0])
    kept = counts[:1]
    for point in counts[1:]:
        while len(kept) > 1 and point[0] - kept[-1][0] < usual / 2:
            kept.pop()
        if point[0] > kept[-1][0]:
            kept.append(point)
    return [(now, (count - before) / (now - then)) for (then, before), (now, count) in zip(kept, kept[1:])]


# From figures to words and charts


def count(value: float | None) -> str:
    """Return a count, or a rate, for people."""
    return "not measured" if value is None else f"{value:,.0f}"


def length(seconds: float | None) -> str:
    """Return a time for people that may be long.

    >>> length(20.0), length(86400.0)
    ('20.00 s', '24.00 h')
    """
    if seconds is None or seconds < 600:
        return format_seconds(seconds)
    return f"{seconds / 60:.1f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.2f} h"


def size(value: float | None) -> str:
    """Return a size in bytes for people."""
    return "not measured" if value is None else format_size(value)


def plain(value: object) -> str:
    """Return any value as one line of printable text, of bounded length; None is unknown."""
    text = "unknown" if value is None else str(value) if isinstance(value, (str, int, float)) else "unreadable"
    line = "".join(letter if letter.isprintable() else " " for letter in text[: LONGEST + 1])
    return line if len(line) <= LONGEST else line[:LONGEST] + " ..."


def head_of(report: Report) -> list[str]:
    """Return the verdict, the worst first and large, then a line for each part, then what ran."""
    note = report.get("verdict", "overall", "note")
    first = f"{report.status.upper()}: {plain(note)}"
    if report.get("interrupted"):
        seconds = report.number("load_seconds")
        first += " (interrupted" + (")" if seconds is None else f" after {length(seconds)} of load)")
    lines = [first]
    lines += [f"{name} {status}: {note}" for name, status, note in findings_of(report)]
    return lines


def findings_of(report: Report) -> list[tuple[str, str, str]]:
    """Return each part of the verdict: its name, its status, its note."""
    parts = ("correctness", "throughput", "memory", "drain")
    return [(name, report.status_of(name), plain(report.get("verdict", name, "note"))) for name in parts]


def origin_of(report: Report) -> str:
    """Return one line that says what ran where: a figure is nothing without it."""
    place, config = report.get("environment"), report.get("config")
    commit = plain(place.get("commit"))
    dirty = "-dirty" if commit.endswith("-dirty") else ""
    threads = ", ".join(f"{plain(config.get(f'{who}s'))} {who}{'s' * (config.get(f'{who}s') != 1)}" for who in _THREADS)
    return (
        f"{plain(report.get('started')).replace('T', ' ', 1)}, {length(report.number('load_seconds'))} of load,"
        f" {threads}; {plain(place.get('machine'))}, {plain(place.get('cores'))} cores,"
        f" {plain(place.get('interpreter'))} ({plain(place.get('python'))}), commit {commit[:12]}{dirty}"
    )


_THREADS = ("producer", "consumer")


def tiles_of(report: Report) -> list[tuple[str, str]]:
    """Return the key figures: (what, how much)."""
    ratio = report.number("ratio")
    number = report.number
    return [
        ("delivered events/s", count(number("delivered_per_second"))),
        ("share of calibration", "not measured" if ratio is None else f"{ratio:.3f}"),
        ("events delivered", count(number("delivered"))),
        ("lost", count(number("lost"))),
        ("repeated", count(number("duplicated"))),
        ("refused", count(number("rejected"))),
        (f"heap, bound {size(number('heap', 'bound_bytes'))}", size(number("peak_heap_bytes"))),
        ("latency, median", format_seconds(number("latency_seconds", "p50"))),
        ("latency, 99th percentile", format_seconds(number("latency_seconds", "p99"))),
        ("drain", format_seconds(number("drain_seconds"))),
    ]


def charts_of(report: Report) -> list[Chart]:
    """Return the charts that there are figures for."""
    makers = (_delivered, _buffer, _latency, _rss, _backpressure, _heap, _ratio, _end)
    return [chart for chart in (make(report) for make in makers) if chart is not None]


def _curve(title: str, caption: str, what: str, points: Sequence[Point], unit: float, lines: Sequence[Line]) -> Chart:
    """Return a chart over time; ``unit`` is what the values are divided by, those of ``lines`` are already."""
    drawn = charts.downsample([(time, value / unit) for time, value in points])
    each = math.ceil(len(points) / charts.MOST_POINTS)
    if each > 1:
        caption += f" {len(points):,} points, drawn {each} by {each}: their mean, and a band from least to most."
    else:
        caption += f" {len(points):,} points, each drawn."
    return Chart(title, caption, Curve(drawn, what, lines))


def _delivered(report: Report) -> Chart | None:
    points, calibration = rates(report.samples, "delivered"), report.number("calibration")
    if not points:
        return None
    unit, word = charts.count_unit(max(rate for _, rate in points))
    lines = [] if calibration is None else [Line(calibration / unit, f"no dispatcher: {count(calibration)}/s")]
    caption = "The load pass. Dashed: what the same producers reach when they only format the events (the calibration)."
    return _curve("Delivered", caption, f"{word}events/s", points, unit, lines)


def _buffer(report: Report) -> Chart | None:
    points, limit = levels(report.samples, "buffered_bytes"), report.number("config", "max_buffered_bytes")
    if not points:
        return None
    unit, name = charts.bytes_unit(max([fill for _, fill in points] + [limit or 0]))
    lines = [] if limit is None else [Line(limit / unit, f"limit {size(limit)}")]
    caption = "What was buffered at the moment of each sample; the last is after the drain."
    peak = report.number("stats", "peak_buffered_bytes")
    if peak is not None:
        caption += f" In between, by the dispatcher's own count, it was never over {size(peak)}."
    return _curve("Buffer", caption, f"buffered ({name})", points, unit, lines)


def _backpressure(report: Report) -> Chart | None:
    refused = report.number("rejected")
    if refused or report.get("config", "on_full") == "raise":
        points = rates(report.samples, "rejected")
        unit, word = charts.count_unit(max([rate for _, rate in points] or [0]))
        caption = f"Refused because the buffer was full, and dropped by the producers: {count(refused)} in all."
        return _curve("Refused", caption, f"{word}events/s", points, unit, ()) if points else None
    points = levels(report.samples, "waiting_producers")
    if not any(waiting for _, waiting in points):
        return None
    producers = report.number("config", "producers")
    lines = [] if producers is None else [Line(producers, f"all producers: {count(producers)}")]
    caption = "None was refused: a producer waits for room. So many did at the moment of each sample."
    return _curve("Waiting producers", caption, "producers", points, 1, lines)


def _rss(report: Report) -> Chart | None:
    points, peak = levels(report.samples, "rss_bytes"), report.number("peak_rss_bytes")
    if not points:
        return None
    unit, name = charts.bytes_unit(max(rss for _, rss in points))
    caption = (
        "Resident memory of the whole process, as the system counts it: interpreter, harness and dispatcher, after"
        f" the passes before this one; at most {size(peak)}. The bound is about the heap alone, in its own chart."
    )
    return _curve("Resident memory", caption, f"RSS ({name})", points, unit, ())


def _heap(report: Report) -> Chart | None:
    peak, bound = report.number("peak_heap_bytes"), report.number("heap", "bound_bytes")
    fullest, allowance = report.number("heap", "peak_buffered_bytes"), report.number("heap", "allowance_bytes")
    if peak is None or bound is None:
        return None
    unit, name = charts.bytes_unit(max(peak, bound))
    bars = [("traced peak", peak / unit, 0.0, size(peak))]
    bars += [] if fullest is None else [("fullest buffer", fullest / unit, 0.0, size(fullest))]
    caption = (
        f"From a pass of its own, {format_seconds(report.number('heap', 'seconds'))} of the same load under"
        " tracemalloc, because tracing slows a program. The peak is all that Python allocated in it: dispatcher,"
        f" producers, consumers and harness. The harness may take {size(allowance)} above the bound, with a warning."
    )
    return Chart(
        "Heap", caption, Bars(bars, f"bytes on the heap ({name})", [Line(bound / unit, f"bound {size(bound)}")])
    )


def _latency(report: Report) -> Chart | None:
    found = report.get("latency_seconds", "buckets")
    pairs = [pair for pair in found if isinstance(pair, list) and len(pair) == 2] if isinstance(found, list) else []
    read = [(number(low), number(many)) for low, many in pairs]
    # An axis of doublings has no place for a time of 0.
    buckets = sorted(
        {max(low, 1e-9): many for low, many in read if low is not None and many is not None and many >= 0}.items()
    )
    if not any(many > 0 for _, many in buckets):
        return None
    lines = [
        Line(seconds, f"{name} {format_seconds(seconds)}")
        for name, seconds in ((name, report.number("latency_seconds", name)) for name in ("p50", "p99", "max"))
        if seconds and seconds > 0
    ]
    probes = report.number("latency_seconds", "samples") or 0.0
    delivered = report.number("delivered") or 0.0
    share = f", one event in {round(delivered / probes):,}" if delivered >= probes > 0 else ""
    caption = (
        f"From enqueue to a consumer's hands, {count(probes)} probes{share}. The area is the share of the probes: a"
        " doubling of the time is equally wide everywhere."
    )
    return Chart("Latency", caption, Histogram(charts.coarsen(buckets), "latency (logarithmic)", lines))


def _ratio(report: Report) -> Chart | None:
    ratio, name = report.number("ratio"), report.get("baseline")
    if ratio is None:
        return None
    bars = [("this run", ratio, 0.0, f"{ratio:.3f}")]
    caption = (
        "Delivered events/s over the calibration of the same run: what compares from hour to hour, and machine to"
        " machine."
    )
    if name is None:
        note = plain(report.get("verdict", "throughput", "note"))
        caption += f" {note[:1].upper()}{note[1:]}."
    else:
        try:
            figures = baseline.load(str(name)).expected("ratio")
        except ValueError:
            figures = None
        if figures is None:
            caption += f" The baseline, {plain(name)}, cannot be read any more."
        else:
            _, expected, spread = figures
            bars.append(("baseline", expected, spread, f"{expected:.3f} +- {spread:.3f}"))
            caption += f" Below it the baseline, {plain(name)}, with its spread."
    return Chart("Share of calibration", caption, Bars(bars, "share of calibration", [Line(1.0, "no dispatcher: 1")]))


def _end(report: Report) -> Chart | None:
    found = [(name, report.number(f"{name}_seconds")) for name in ("drain", "shutdown")]
    times = [(name, max(seconds, 1e-6)) for name, seconds in found if seconds is not None]
    if not times:
        return None
    lines = [Line(verdict.DRAIN_WARN, "warns from 500 ms"), Line(verdict.DRAIN_FAIL, "fails from 5 s")]
    caption = (
        "Drain: from the last producer's stop until all that was accepted was delivered"
        + (", which did not come about." if report.number("drain_seconds") is None else ".")
        + " Shutdown: the call of shutdown() after that. The lines are the limits of the drain."
    )
    return Chart("The end", caption, Times(times, "time (logarithmic)", lines))


# From words and charts to the page

MARKS = {verdict.PASS: "\u2713", verdict.WARN: "!", verdict.FAIL: "\u2717"}
"""Beside the colours, for those who cannot tell these apart."""

STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.45 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0.25rem 0 0.5rem; }
h1 b { display: inline-block; padding: 0.05em 0.45em; border-radius: 0.3em; color: var(--badge); margin-right: 0.3em; }
h1.pass b { background: var(--pass); } h1.warn b { background: var(--warn); } h1.fail b { background: var(--fail); }
h2 { font-size: 1.05rem; margin: 0 0 0.5rem; }
p { margin: 0.25rem 0; }
.origin, figcaption, dt, th, footer, .muted { color: var(--muted); }
.origin, figcaption, footer, td, th { font-size: 0.9rem; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 0.5rem; padding: 0.75rem; margin: 0; }
.findings { list-style: none; padding: 0.25rem 0.75rem; margin: 0.75rem 0; }
.findings li { display: grid; grid-template-columns: 4rem 7rem 1fr; gap: 0 0.5rem; padding: 0.3rem 0; }
.findings b.pass { color: var(--pass); } .findings b.warn { color: var(--warn); }
.findings b.fail { color: var(--fail); }
.tiles, .grid { display: grid; gap: 0.75rem; margin: 0.75rem 0; }
.tiles { grid-template-columns: repeat(2, 1fr); }
@media (min-width: 45rem) { .tiles { grid-template-columns: repeat(5, 1fr); } }
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.tiles dt { font-size: 0.8rem; line-height: 1.25; }
.tiles dd { margin: 0; font-size: 1.2rem; font-weight: 600; }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.grid > :last-child:nth-child(odd) { grid-column: 1 / -1; }
ul { margin: 0; padding-left: 1.2rem; }
svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: 0.2rem 0.5rem 0.2rem 0; border-top: 1px solid var(--grid); }
th { font-weight: 400; width: 45%; }
@media (max-width: 30rem) {
  h1 { font-size: 1.4rem; }
  .findings li { grid-template-columns: 4rem 1fr; }
  .findings span { grid-column: 1 / 3; }
}
"""


def page(report: Report, pictures: Sequence[Chart], drawn: Sequence[str] | None) -> str:
    """Return the page: the verdict, the key figures, the charts (``drawn``, None without matplotlib), the tables."""
    esc = html.escape
    head, _, note = head_of(report)[0].partition(": ")
    findings = "".join(
        f'<li><b class="{status}">{MARKS[status]} {status}</b><b>{name}</b><span>{esc(note)}</span></li>\n'
        for name, status, note in findings_of(report)
    )
    tiles = "".join(
        f'<div class="card"><dt>{esc(what)}</dt><dd>{esc(value)}</dd></div>\n' for what, value in tiles_of(report)
    )
    light, dark = (" ".join(f"--{name}: {colour};" for name, colour in theme.items()) for theme in charts.THEMES)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{esc(head)}: soak of tempo.py</title>
<style>
:root {{ {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{STYLE}</style>
</head>
<body>
<main>
<h1 class="{report.status}"><b>{MARKS[report.status]} {esc(head)}</b>{esc(note)}</h1>
<p class="origin">Soak of tempo.py. {esc(origin_of(report))}</p>
<ul class="findings card">
{findings}</ul>
{_problems(report)}<dl class="tiles">
{tiles}</dl>
{_remarks(report, drawn)}<div class="grid">
{_figures(pictures, drawn)}{_on_record()}</div>
<div class="grid">
{_table("Settings", report.get("config"))}{_table("Environment", report.get("environment"))}</div>
<footer>Made by <code>python3 -m soak report</code>. How to read the figures: <code>soak/README.md</code>.</footer>
</main>
</body>
</html>
"""


def _problems(report: Report) -> str:
    found = report.get("problems")
    if not isinstance(found, list) or not found:
        return ""
    lines = [plain(problem) for problem in found[:MOST_PROBLEMS]]
    if len(found) > MOST_PROBLEMS:
        lines.append(f"and {len(found) - MOST_PROBLEMS} more")
    items = "".join(f"<li>{html.escape(line)}</li>\n" for line in lines)
    return f'<section class="card"><h2>What went wrong</h2>\n<ul>\n{items}</ul></section>\n'


def _remarks(report: Report, drawn: Sequence[str] | None) -> str:
    remarks = []
    if report.unsampled:
        remarks.append(f"Nothing over time: {report.unsampled}.")
    if drawn is None:
        remarks.append("Without charts: matplotlib was not installed where this page was made.")
    return "".join(f'<p class="muted">{html.escape(remark)}</p>\n' for remark in remarks)


def _figures(pictures: Sequence[Chart], drawn: Sequence[str] | None) -> str:
    return "".join(
        f'<figure class="card"><h2>{html.escape(chart.title)}</h2>\n{image}\n'
        f"<figcaption>{html.escape(chart.caption)}</figcaption></figure>\n"
        for chart, image in zip(pictures, drawn or ())
    )


def _on_record() -> str:
    items = "".join(f"<li>{html.escape(plain(words))}</li>\n" for words in baseline.records("auto"))
    title = "On record, not compared: other programs, on other machines"
    return f'<section class="card"><h2>{title}</h2>\n<ul>\n{items}</ul></section>\n' if items else ""


def _table(title: str, values: Mapping[str, object]) -> str:
    esc = html.escape
    rows = "".join(
        f"<tr><th>{esc(_spoken(key))}</th><td>{esc(_shown(key, value))}</td></tr>\n"
        for key, value in values.items()
        if key not in LEFT_OUT
    )
    return f'<section class="card"><h2>{title}</h2>\n<table>\n{rows}</table></section>\n'


def _spoken(key: str) -> str:
    return plain(key).replace("_bytes", "").replace("_", " ")


def _shown(key: str, value: object) -> str:
    """Return a setting, or what is known of the machine, for people."""
    figure = number(value)
    if key == "memory_bytes" and figure is not None:
        return f"{figure / (1024 * MIB):.1f} GiB"
    if key in SIZES and figure is not None:
        return format_size(figure)
    if key in SECONDS and figure is not None:
        return length(figure)
    if key == "sink":
        return plain(value).partition(":")[0]  # its kind: a path or an address is for its owner
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None and key == "max_batch_bytes" else plain(value)
