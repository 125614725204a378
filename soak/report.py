# SPDX-License-Identifier: MIT
"""The ``report`` command: one HTML page, complete in itself, and one picture of a run's result and its samples."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soak import charts, cli, environment, results, run, verdict
from soak.charts import Chart, Point
from soak.cli import MIB, Failure, complain, format_seconds, format_size

OUT = Path("soak/out")
TEMPLATE = Path(__file__).with_name("report.html.j2")
MOST_PROBLEMS = 50
MARKS = {verdict.PASS: "\u2713", verdict.WARN: "!", verdict.FAIL: "\u2717"}
"""With the colours, for those who cannot tell these apart."""

EXAMPLE = """\
example:
  python3 -m soak run --duration 30s && python3 -m soak report
  python3 -m soak report --run soak/out/soak-20261124-165922.json --out pages

The page needs Jinja2, charts and the picture matplotlib; without that, the page has the figures alone.
"""


def add_parser(commands: Any) -> None:
    purpose = "Make one HTML page, complete in itself, and one PNG picture of a result of `soak run`."
    add = cli.add_command(commands, "report", main, purpose, EXAMPLE)
    add("--run", type=cli.path, default=OUT / "latest.json", metavar="PATH", help="the result (%(default)s)")
    add("--out", type=cli.path, default=OUT, metavar="DIR", help="where report.html and report.png go (%(default)s)")


def main(options: argparse.Namespace) -> int:
    report = read(options.run)
    words, found = words_of(report), charts_of(report)
    head = f"{words['status'].upper()}: {words['note']}"
    lines = [f"{name} {state}: {note}" for name, state, note in words["findings"]]
    lines += [words["origin"], "", "   ".join(f"{name}: {value}" for name, value in words["tiles"].items())]
    files: dict[str, bytes] = {}
    words["charts"] = []
    try:
        words["charts"] = [(one, charts.svg(one, charts.LIGHT), charts.svg(one, charts.DARK)) for one in found]
        files["report.png"] = charts.png(head, words["status"], lines, found)
    except ImportError:
        complain("no charts and no picture: matplotlib is not installed (make report installs it)")
        words["remarks"].append("Without charts: matplotlib was not installed where this page was made.")
    try:
        template = importlib.import_module("jinja2").Environment(autoescape=True)
    except ImportError:
        options.parser.error("report needs Jinja2: `make report` installs it, or: pip install jinja2")
    files["report.html"] = template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(words).encode()
    written = [name for name, content in files.items() if results.write(options.out / name, content)]
    print("\n".join([head, *lines, f"written       {', '.join(written) or 'nothing'} in {options.out}"]), flush=True)
    return 0 if len(written) == len(files) else 1


# From the files to figures.


@dataclass(frozen=True)
class Report:
    """What is known of a run."""

    result: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]  # in the order of their time
    unsampled: str  # why there are no samples; empty when there are

    def get(self, *keys: str) -> Any:
        """Return what ``keys`` lead to; None when that was not measured."""
        found: Any = self.result
        for key in keys:
            found = None if found is None else found[key]
        return found


def read(path: Path) -> Report:
    """Read a result and its samples. Raises Failure when the file cannot be read or is no result."""
    try:
        result = json.loads(path.read_bytes())
        schema, name = result["schema"], str(result["samples"])
    except OSError as error:
        hint = " (make soak makes one)" if isinstance(error, FileNotFoundError) else ""
        raise Failure(f"cannot read {str(path)!r}: {error.strerror or error}{hint}") from None
    except (ValueError, TypeError, LookupError):
        raise Failure(f"{str(path)!r} is no result of `soak run`") from None
    if schema != run.SCHEMA:
        raise Failure(f"{str(path)!r} has schema {schema!r}; this reads {run.SCHEMA}")
    # A result may stand elsewhere (--json) than its samples (--out).
    folder = path.parent if (path.parent / name).exists() else OUT
    samples = []
    try:
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a run that was killed
                samples.append(json.loads(line))
    except OSError as error:
        return Report(result, [], f"its samples, {name!r}, cannot be read: {error.strerror or error}")
    samples = [sample for sample in samples if sample["type"] == "sample"]
    return Report(result, samples, "" if samples else f"{name!r} holds no samples")


def levels(samples: Sequence[Mapping[str, Any]], key: str, unit: float = 1.0) -> list[Point]:
    """Return a figure of each sample that has it, over the time."""
    return [(sample["elapsed"], sample[key] / unit) for sample in samples if sample[key] is not None]


def rates(samples: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
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
    get = report.get
    findings = {name: (one["status"], plain(one["note"])) for name, one in get("verdict").items()}
    status, note = findings.pop("overall")
    config, problems = get("config"), get("problems")
    more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    load = f"{format_seconds(get('load_seconds'))} of load, {config['producers']} producers"
    # What ran where: a figure is nothing without it.
    place = plain(environment.line(get("environment")))
    return {
        "status": status,
        "note": note + " (interrupted)" * get("interrupted"),
        "marks": MARKS,
        "light": charts.LIGHT,
        "dark": charts.DARK,
        "origin": f"{get('started').replace('T', ' ')}, {load}, {config['consumers']} consumers; {place}",
        "findings": [(name, *finding) for name, finding in findings.items()],
        "problems": [*map(plain, problems[:MOST_PROBLEMS]), *more],
        "tiles": tiles_of(report),
        "remarks": [f"Nothing over time: {report.unsampled}."] if report.unsampled else [],
        "tables": [(title, _rows(get(title.lower()))) for title in ("Config", "Environment")],
    }


def tiles_of(report: Report) -> dict[str, str]:
    get, ratio = report.get, report.get("ratio")
    counts = {"delivered": "events delivered", "lost": "lost", "duplicated": "repeated", "rejected": "refused"}
    return {
        "delivered events/s": count(get("delivered_per_second")),
        "share of calibration": "not measured" if ratio is None else f"{ratio:.3f}",
        **{words: count(get(key)) for key, words in counts.items()},
        f"heap, bound {format_size(get('heap', 'bound_bytes'))}": format_size(get("peak_heap_bytes")),
        "latency, median": format_seconds(get("latency_seconds", "p50")),
        "latency, 99th percentile": format_seconds(get("latency_seconds", "p99")),
        "drain": format_seconds(get("drain_seconds")),
    }


def charts_of(report: Report) -> list[Chart]:
    get, samples, found = report.get, report.samples, list[Chart]()

    def over_time(
        title: str, caption: str, what: str, points: list[Point], limit: tuple[float, str] | None = None
    ) -> None:
        if any(value for _, value in points):
            caption += f" {len(points):,} samples, as means of {charts.means_of(points)}."
            found.append(Chart(title, caption, charts.curve(points, what, limit)))

    bare, limit = get("calibration"), get("config", "max_buffered_bytes")
    caption = "The load pass. Dashed: what the same producers reach when they only format the events (the calibration)."
    level = (bare, f"no dispatcher: {count(bare)}/s")
    over_time("Delivered", caption, "events/s", rates(samples, "delivered"), level)
    fullest = format_size(get("stats", "peak_buffered_bytes"))
    caption = f"At the moment of each sample; by the dispatcher's own count at most {fullest}."
    level = (limit / MIB, f"limit {format_size(limit)}")
    over_time("Buffer", caption, "buffered (MiB)", levels(samples, "buffered_bytes", MIB), level)

    times = {name: seconds * 1e3 for name in ("p50", "p99", "max") if (seconds := get("latency_seconds", name))}
    if times:
        caption = f"From enqueue to a consumer's hands, {count(get('latency_seconds', 'samples'))} probes."
        found.append(Chart("Latency", caption, charts.bars(times, "latency (ms)")))

    caption = f"Of the whole process, as the system counts it; at most {format_size(get('peak_rss_bytes'))}."
    over_time("Resident memory", caption, "RSS (MiB)", levels(samples, "rss_bytes", MIB))
    if get("rejected"):
        caption = f"Because the buffer was full, and dropped by the producers: {count(get('rejected'))} in all."
        over_time("Refused", caption, "events/s", rates(samples, "rejected"))
    else:
        caption = "None was refused: a producer waits for room. So many did at the moment of each sample."
        over_time("Waiting producers", caption, "producers", levels(samples, "waiting_producers"))

    if (heap := get("peak_heap_bytes")) is not None:
        bound, took = get("heap", "bound_bytes"), format_seconds(get("heap", "seconds"))
        caption = f"From a separate pass of {took} under tracemalloc: dispatcher, producers, consumers and harness."
        values = {"traced peak": heap / MIB, "fullest buffer": get("heap", "peak_buffered_bytes") / MIB}
        drawn = charts.bars(values, "bytes on the heap (MiB)", (bound / MIB, f"bound {format_size(bound)}"))
        found.append(Chart("Heap", caption, drawn))
    return found


def _rows(values: Mapping[str, object]) -> list[tuple[str, str]]:
    return [(key.replace("_bytes", "").replace("_", " "), _shown(key, value)) for key, value in values.items()]


def _shown(key: str, value: object) -> str:
    if isinstance(value, (int, float)) and (key.endswith("_bytes") or key == "payload"):
        return format_size(value)
    if isinstance(value, (int, float)) and key in ("duration", "interval", "consumer_delay"):
        return format_seconds(value)
    if key == "sink":
        return plain(value).partition(":")[0]  # its kind: a path or an address is for its owner
    return "none" if value is None and key == "max_batch_bytes" else plain(value)
