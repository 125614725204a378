# SPDX-License-Identifier: MIT
"""The ``report`` command: one HTML page, complete in itself, and one picture of a run's result and its samples.

A figure that the result does not have, or that is no number, is shown as not measured, and every text is escaped.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soak import charts, cli, environment, results, run, verdict
from soak.charts import Chart, Point
from soak.cli import MIB, complain, format_seconds, format_size

OUT = Path("soak/out")
TEMPLATE = Path(__file__).with_name("report.html.j2")
MOST_PROBLEMS = 50
MARKS = {verdict.PASS: "\u2713", verdict.WARN: "!", verdict.FAIL: "\u2717"}
"""With the colours, for those who cannot tell these apart."""

EXAMPLE = """\
example:
  python3 -m soak run --duration 30s && python3 -m soak report
  python3 -m soak report --run soak/out/soak-20261124-165922.json --html run.html --png run.png

The page needs Jinja2, charts and the picture matplotlib; without that, the page has the figures alone.
"""


class ReportError(Exception):
    """Why there is no report, in one line."""


def add_parser(commands: Any) -> None:
    purpose = "Make one HTML page, complete in itself, and one PNG picture of a result of `soak run`."
    add = cli.add_command(commands, "report", main, purpose, EXAMPLE)
    add("--run", type=cli.path, default=OUT / "latest.json", metavar="PATH", help="the result (%(default)s)")
    add("--out", type=cli.path, default=OUT, metavar="DIR", help="where report.html and report.png go (%(default)s)")
    add("--html", type=cli.path, metavar="PATH", help="the page's file (report.html in --out)")
    add("--png", type=cli.path, metavar="PATH", help="the picture's file (report.png in --out)")


def main(options: argparse.Namespace) -> int:
    """Read the run, write the page and the picture; return the exit code."""
    page_path, png_path = options.html or options.out / "report.html", options.png or options.out / "report.png"
    if len({path.resolve() for path in (options.run, page_path, png_path)}) < 3:
        options.parser.error("--run, --html and --png name one file twice: each needs its own")
    try:
        report = read(options.run)
    except ReportError as error:
        complain(str(error))
        return 1
    words, found = words_of(report), charts_of(report)
    head = f"{words['status'].upper()}: {words['note']}"
    lines = [f"{name} {state}: {note}" for name, state, note in words["findings"]]
    lines += [words["origin"], "", "   ".join(f"{name}: {value}" for name, value in words["tiles"].items())]
    files: list[tuple[Path, bytes]] = []
    words["charts"] = []
    try:
        words["charts"] = [(one, charts.svg(one, charts.LIGHT), charts.svg(one, charts.DARK)) for one in found]
        files.append((png_path, charts.png(head, words["status"], lines, found)))
    except ImportError:
        complain("no charts and no picture: matplotlib is not installed (make report installs it)")
        words["remarks"].append("Without charts: matplotlib was not installed where this page was made.")
    try:
        template = importlib.import_module("jinja2").Environment(autoescape=True)
    except ImportError:
        options.parser.error("report needs Jinja2: `make report` installs it, or: pip install jinja2")
    page = template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(words)
    files.insert(0, (page_path, page.encode()))
    written = [str(path) for path, content in files if results.write(path, content)]
    print("\n".join([head, *lines, f"written       {', '.join(written) or 'nothing'}"]), flush=True)
    return 0 if len(written) == len(files) else 1


# From the files to figures.


@dataclass(frozen=True)
class Report:
    """What is known of a run."""

    result: Mapping[str, Any]
    samples: Sequence[Mapping[str, float]]  # the figures of each that are numbers, in the order of their time
    unsampled: str  # why there are no samples; empty when there are

    def get(self, *keys: str) -> Any:
        """Return whatever ``keys`` lead to; None when they lead nowhere."""
        found: Any = self.result
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def number(self, *keys: str) -> float | None:
        """Return the figure that ``keys`` lead to; None when there is none."""
        return number(self.get(*keys))

    def status(self, name: str = "overall") -> str:
        """Return one verdict; what is none of the three is a fail."""
        status = self.get("verdict", name, "status")
        return status if status in (verdict.PASS, verdict.WARN) else verdict.FAIL


def number(value: object) -> float | None:
    """Return a finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e18:
        return None
    return float(value)


def read(path: Path) -> Report:
    """Read a result and its samples. Raises ReportError when the file cannot be read or is no result."""
    try:
        result = json.loads(path.read_bytes())
        if not all(isinstance(result[part], dict) for part in ("verdict", "config", "environment")):
            raise TypeError
    except OSError as error:
        hint = " (make soak makes one)" if isinstance(error, FileNotFoundError) else ""
        raise ReportError(f"cannot read {str(path)!r}: {error.strerror or error}{hint}") from None
    except (ValueError, TypeError, LookupError):
        raise ReportError(f"{str(path)!r} is no result of `soak run`") from None
    if result.get("schema") != run.SCHEMA:
        raise ReportError(f"{str(path)!r} has schema {result.get('schema')!r}; this reads {run.SCHEMA}")
    name = Path(str(result.get("samples"))).name
    # A result may stand elsewhere (--json) than its samples (--out).
    folder = path.parent if (path.parent / name).exists() else OUT
    try:
        with open(folder / name, encoding="utf-8", errors="replace") as lines:
            samples = sorted(read_samples(lines, result.get("started")), key=lambda sample: sample["elapsed"])
    except OSError as error:
        return Report(result, [], f"its samples, {name!r}, cannot be read: {error.strerror or error}")
    return Report(result, samples, "" if samples else f"{name!r} holds no samples of this run")


def read_samples(lines: Iterable[str], started: object) -> Iterator[dict[str, float]]:
    """Yield the samples of a run's stream; none when its header names another start. Broken lines are left out."""
    for line in lines:
        try:
            content = dict(json.loads(line))
        except (ValueError, TypeError):
            continue  # the last line of a run that was killed
        if content.get("type") == "header" and content.get("started") != started:
            return
        figures = {key: figure for key, value in content.items() if (figure := number(value)) is not None}
        if content.get("type") == "sample" and figures.get("elapsed", -1) >= 0:
            yield figures


def levels(samples: Sequence[Mapping[str, float]], key: str, unit: float = 1.0) -> list[Point]:
    """Return a figure of each sample that has it, over the time."""
    return [(sample["elapsed"], sample[key] / unit) for sample in samples if key in sample]


def rates(samples: Sequence[Mapping[str, float]], key: str) -> list[Point]:
    """Return how a count grew a second, at the end of each interval.

    The sample after the end follows the one before within moments: it replaces that one, instead of making a rate of
    almost no time.
    """
    counts = [(0.0, 0.0), *levels(samples, key)]
    usual = statistics.median([now - then for (then, _), (now, _) in itertools.pairwise(counts)] or [0.0])
    if len(counts) > 2 and counts[-1][0] - counts[-2][0] < usual / 2:
        del counts[-2]
    pairs = itertools.pairwise(counts)
    return [(now, (count - before) / (now - then)) for (then, before), (now, count) in pairs if now > then]


# From figures to words and charts.


def count(value: float | None) -> str:
    """Return a count, or a rate, for people."""
    return "not measured" if value is None else f"{value:,.0f}"


def plain(value: object) -> str:
    """Return any value as one line of printable text, of bounded length; None is unknown."""
    text = "unknown" if value is None else str(value)[:2000]
    return "".join(letter if letter.isprintable() else " " for letter in text)


def words_of(report: Report) -> dict[str, Any]:
    """Return what the page says, but for its charts."""
    note = plain(report.get("verdict", "overall", "note")) + (" (interrupted)" if report.get("interrupted") else "")
    names = ("correctness", "throughput", "memory", "drain")
    # What ran where: a figure is nothing without it.
    place = {key: plain(report.get("environment", key)) for key in environment.LINE_KEYS}
    threads = ", ".join(f"{plain(report.get('config', name))} {name}" for name in ("producers", "consumers"))
    load = f"{format_seconds(report.number('load_seconds'))} of load, {threads}"
    problems = [plain(problem) for problem in report.get("problems") or ()]
    more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    return {
        "status": report.status(),
        "note": note,
        "marks": MARKS,
        "light": charts.LIGHT,
        "dark": charts.DARK,
        "origin": f"{plain(report.get('started')).replace('T', ' ', 1)}, {load}; {environment.line(place)}",
        "findings": [(name, report.status(name), plain(report.get("verdict", name, "note"))) for name in names],
        "problems": problems[:MOST_PROBLEMS] + more,
        "tiles": tiles_of(report),
        "remarks": [f"Nothing over time: {report.unsampled}."] if report.unsampled else [],
        "tables": [(title, _rows(report.get(title.lower()))) for title in ("Config", "Environment")],
    }


def tiles_of(report: Report) -> dict[str, str]:
    """Return the key figures."""
    figure, ratio = report.number, report.number("ratio")
    counts = {"delivered": "events delivered", "lost": "lost", "duplicated": "repeated", "rejected": "refused"}
    return {
        "delivered events/s": count(figure("delivered_per_second")),
        "share of calibration": "not measured" if ratio is None else f"{ratio:.3f}",
        **{words: count(figure(key)) for key, words in counts.items()},
        f"heap, bound {format_size(figure('heap', 'bound_bytes'))}": format_size(figure("peak_heap_bytes")),
        "latency, median": format_seconds(figure("latency_seconds", "p50")),
        "latency, 99th percentile": format_seconds(figure("latency_seconds", "p99")),
        "drain": format_seconds(figure("drain_seconds")),
    }


def charts_of(report: Report) -> list[Chart]:
    """Return the charts that there are figures for."""
    figure, samples, found = report.number, report.samples, list[Chart]()

    def over_time(
        title: str, caption: str, what: str, points: list[Point], limit: tuple[float, str] | None = None
    ) -> None:
        if any(value for _, value in points):
            found.append(Chart(title, f"{caption} {len(points):,} samples.", charts.curve(points, what, limit)))

    bare, limit = figure("calibration"), figure("config", "max_buffered_bytes")
    caption = "The load pass. Dashed: what the same producers reach when they only format the events (the calibration)."
    level = None if bare is None else (bare, f"no dispatcher: {count(bare)}/s")
    over_time("Delivered", caption, "events/s", rates(samples, "delivered"), level)
    fullest = format_size(figure("stats", "peak_buffered_bytes"))
    caption = f"At the moment of each sample; by the dispatcher's own count at most {fullest}."
    level = None if limit is None else (limit / MIB, f"limit {format_size(limit)}")
    over_time("Buffer", caption, "buffered (MiB)", levels(samples, "buffered_bytes", MIB), level)

    times = {name: seconds * 1e3 for name in ("p50", "p99", "max") if (seconds := figure("latency_seconds", name))}
    if times:
        caption = f"From enqueue to a consumer's hands, {count(figure('latency_seconds', 'samples'))} probes."
        found.append(Chart("Latency", caption, charts.bars(times, "latency (ms)")))

    caption = f"Of the whole process, as the system counts it; at most {format_size(figure('peak_rss_bytes'))}."
    over_time("Resident memory", caption, "RSS (MiB)", levels(samples, "rss_bytes", MIB))
    if figure("rejected"):
        caption = f"Because the buffer was full, and dropped by the producers: {count(figure('rejected'))} in all."
        over_time("Refused", caption, "events/s", rates(samples, "rejected"))
    else:
        caption = "None was refused: a producer waits for room. So many did at the moment of each sample."
        over_time("Waiting producers", caption, "producers", levels(samples, "waiting_producers"))

    heap, bound = figure("peak_heap_bytes"), figure("heap", "bound_bytes")
    if heap is not None and bound is not None:
        took = format_seconds(figure("heap", "seconds"))
        caption = f"From a separate pass of {took} under tracemalloc: dispatcher, producers, consumers and harness."
        values = {"traced peak": heap / MIB, "fullest buffer": (figure("heap", "peak_buffered_bytes") or 0) / MIB}
        drawn = charts.bars(values, "bytes on the heap (MiB)", (bound / MIB, f"bound {format_size(bound)}"))
        found.append(Chart("Heap", caption, drawn))
    return found


def _rows(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return settings, or what is known of the machine, for people."""
    return [(plain(key).replace("_bytes", "").replace("_", " "), _shown(key, value)) for key, value in values.items()]


def _shown(key: str, value: object) -> str:
    figure = number(value)
    if figure is not None and (key.endswith("_bytes") or key == "payload"):
        return format_size(figure)
    if figure is not None and key in ("duration", "interval", "consumer_delay"):
        return format_seconds(figure)
    if key == "sink":
        return plain(value).partition(":")[0]  # its kind: a path or an address is for its owner
    return "none" if value is None and key == "max_batch_bytes" else plain(value)
