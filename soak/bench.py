# SPDX-License-Identifier: MIT
"""The ``bench`` command: every figure that tempo is judged by, beside its control in the same run.

Each round starts a worker process for each group of rows. The values are kept as pyperf benchmarks, with pyperf's
metadata, so that pyperf's own commands read the result; ratios are taken here, within a worker (see ``rows``).
"""

from __future__ import annotations

import argparse
import glob
import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from soak import baseline, environment, results, worker
from soak.options import complain, converter
from soak.progress import say
from soak.rows import DEFAULT_GROUPS, GROUPS, ROWS, Row
from soak.units import format_seconds, format_size, parse_count, parse_duration

FOLDER = baseline.FOLDER / "bench"
ROOT = environment.ROOT
WORKER_PATIENCE = 900.0
"""Seconds after which a worker counts as hung."""
FLOOR = 0.08
"""Two medians of one program on one machine may differ by that much; the spread tells only of a run's own minutes.

Three runs on 2026-11-24 on two shared cores (AMD EPYC, CPython 3.11.2) differed by 1 to 3 % in rows of one thread, by
10 % where 5 MiB are copied, and by 3 to 12 % in rows of several threads. A smaller change shows in the instructions.
"""
EMULATOR = ("qemu-aarch64-static", "-cpu", "cortex-a72")
UNITS = {"heap": "byte"}

EXAMPLE = """\
examples:
  python3 -m soak bench
  python3 -m soak bench --groups micro,soak_32 --rounds 3
  python3 -m soak bench --compare auto
  python3 -m soak bench --groups pi --arm64-root /srv/debian-arm64

exit code: 0 all was measured (a missed target is no failure), 1 a measurement went wrong, a file cannot be written, or
--compare found a ratio that is worse by more than its noise, 2 a bad option
"""

Rounds = list[dict[str, list[float]]]
"""What the workers of one group printed."""


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="what a call costs, what a soak reaches, beside controls and peers in the same run",
        description="Measure tempo beside queues, other batchers and the least that is possible (needs pyperf).",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main, parser=parser)
    add = parser.add_argument
    rounds = converter(partial(parse_count, most=1000))
    add("--rounds", type=rounds, default="5", metavar="N", help="worker processes a group (%(default)s)")
    time_ = converter(parse_duration)
    add("--duration", type=time_, default="1s", metavar="TIME", help="how long a soak lasts (%(default)s)")
    add(
        "--groups",
        type=converter(_parse_groups),
        default=",".join(DEFAULT_GROUPS),
        metavar="NAME,...",
        help=f"of {', '.join(GROUPS)}, or all (%(default)s)",
    )
    add("--json", type=Path, metavar="PATH", help="where pyperf's JSON goes (soak/out/bench.json)")
    add(
        "--compare",
        type=converter(_parse_baselines),
        metavar="auto|NAME",
        help="fail when a ratio is worse than in this baseline of soak/baselines/bench by more than its noise; auto: "
        "of this interpreter's, the one whose machine was about as fast",
    )
    add("--record", type=converter(_parse_new), metavar="auto|NAME", help="write the ratios as such a baseline")
    add("--arm64-root", type=Path, metavar="DIR", help="a Debian arm64 system for the group pi, run under qemu-user")
    add("--worker", choices=GROUPS, help=argparse.SUPPRESS)


def _parse_groups(text: str) -> tuple[str, ...]:
    names = GROUPS if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in GROUPS:
            raise ValueError(f"{name!r} is not a group (there are {', '.join(GROUPS)})")
    return names


def _own_name() -> str:
    place = environment.describe()
    return str(place["interpreter"]).lower().replace(" ", "-").replace(",", "")


def _parse_new(text: str) -> str:
    name = _own_name() if text == "auto" else text
    if not name or "/" in name or "\0" in name:
        raise ValueError(f"{text!r} is not a name")
    return name


Figures = Mapping[str, tuple[float, float, float, "float | None"]]


class Recorded(NamedTuple):
    """A baseline."""

    name: str
    rows: dict[str, tuple[float, float]]
    """Ratio and spread."""
    controls: dict[str, float]
    """Seconds of the controls, of some rows: how fast the machine was."""


def _parse_baselines(text: str) -> list[Recorded]:
    """Return the baselines that a run may be compared with: that of a name, or all of this interpreter's."""
    name = _parse_new(text)
    names = [name]
    if text == "auto":
        names += sorted(path.stem for path in FOLDER.glob(f"{glob.escape(name)}-*.json"))
    try:
        return [_load(name) for name in names]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{text!r}: no baseline {name} in soak/baselines/bench ({error})") from None


def _load(name: str) -> Recorded:
    content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    rows = {row: (float(value["ratio"]), float(value["spread"])) for row, value in content["rows"].items()}
    controls = {row: float(value["control"]) for row, value in content["rows"].items() if "control" in value}
    return Recorded(name, rows, controls)


def nearest(figures: Figures, recorded: Sequence[Recorded]) -> Recorded:
    """Return the baseline of the machine that was about as fast.

    Ratios are not free of it: what copies memory does not become faster as a processor's core does. So the nearest is
    the one whose controls took about the same time: the mean of the logarithms of their ratios is the least.
    """

    def distance(one: Recorded) -> float:
        steps = [
            abs(math.log(now / seconds))
            for row, seconds in one.controls.items()
            if row in figures and (now := figures[row][3])
        ]
        return sum(steps) / len(steps) if steps else math.inf

    return min(recorded, key=distance)


def main(options: argparse.Namespace) -> int:
    """Run the rounds, write pyperf's JSON, print the table; return the exit code."""
    if options.worker is not None:
        return worker.main(options.worker, options.duration)
    try:
        pyperf = importlib.import_module("pyperf")  # the workers must run without it
    except ImportError:
        options.parser.error("bench needs pyperf: `make bench` installs it, or: pip install pyperf")
    groups = list(options.groups)
    if "pi" in groups and options.arm64_root is None:
        say("pi is left out: it needs --arm64-root")
        groups.remove("pi")
    measured: dict[str, Rounds] = {group: [] for group in groups}
    try:
        for number in range(options.rounds):
            for group in groups:
                say(f"round {number + 1} of {options.rounds}: {group}")
                measured[group].append(_work(group, options, quiet=number > 0))
    except RuntimeError as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130

    place = environment.describe()
    figures = {row.name: figure for row in ROWS if (figure := evaluate(row, measured.get(row.group, [])))}
    print(table(figures, place))
    path = options.json or ROOT / "soak" / "out" / "bench.json"
    well = _write(path, lambda: _suite(pyperf, measured, place).dump(str(path), replace=True))
    if options.record is not None:
        file = FOLDER / f"{options.record}.json"
        well &= _write(file, lambda: results.replace(file, as_record(figures, place)))
    if options.compare is None:
        return 0 if well else 1
    recorded = nearest(figures, options.compare)
    worse = compare(figures, recorded.rows)
    for line in worse:
        print(line)
    print(f"{'WORSE than' if worse else 'not worse than'} soak/baselines/bench/{recorded.name}.json")
    return 0 if well and not worse else 1


def _write(path: Path, write: Callable[[], object]) -> bool:
    """Write a file, with its folder; tell in one line that it was written, or why it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        complain(f"cannot write {str(path)!r}: {error.strerror or error}")
        return False
    print(f"written {path}", flush=True)
    return True


def _work(group: str, options: argparse.Namespace, quiet: bool) -> dict[str, list[float]]:
    """Run one worker process; return its values. Raises RuntimeError when it fails or hangs."""
    command = [sys.executable]
    if group == "pi":
        root = options.arm64_root
        command = [*EMULATOR, "-L", str(root), str(root / "usr/bin/python3")]
    command += ["-m", "soak", "bench", "--worker", group, "--duration", f"{options.duration:.9f}s"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WORKER_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{group}: the worker did not end within {WORKER_PATIENCE:.0f} s") from None
    except OSError as error:
        raise RuntimeError(f"{group}: cannot run {command[0]!r}: {error.strerror or error}") from None
    lines = done.stderr.strip().splitlines()
    if done.returncode:
        raise RuntimeError(f"{group}: {lines[-1] if lines else f'exit code {done.returncode}'}")
    if not quiet:
        for line in lines:
            say(line)
    values: dict[str, list[float]] = json.loads(done.stdout)
    return values


def evaluate(row: Row, rounds: Rounds) -> tuple[float, float, float, float | None] | None:
    """Return the ratio (or figure), its spread, the subject's value and the control's; None when not measured.

    The ratio and both values are medians over the rounds.
    """
    ratios, subjects, controls = [], [], []
    for values in rounds:
        subject, control = values.get(row.subject), values.get(row.control or row.subject)
        if not subject or not control:
            return None
        if row.best:
            ours, theirs = min(subject), min(control)
            ratio = ours / theirs
        else:
            ours, theirs = median(subject), median(control)
            ratio = median([a / b for a, b in zip(subject, control)])
        if row.control is None:
            ratio = ours
        elif row.least:
            ratio = 1 / ratio
        ratios.append(ratio)
        subjects.append(ours)
        controls.append(theirs)
    if not ratios:
        return None
    return median(ratios), spread_of(ratios), median(subjects), None if row.control is None else median(controls)


def spread_of(values: Iterable[float]) -> float:
    """Return half of the range in which the middle half of the values lies; of few, half of their whole range.

    >>> spread_of([5.0, 1.0, 3.0]), spread_of([1.0, 2.0, 3.0, 4.0, 9.0, 9.0, 9.0, 99.0])
    (2.0, 3.0)
    """
    ranked = sorted(values)
    cut = len(ranked) // 4
    return (ranked[len(ranked) - 1 - cut] - ranked[cut]) / 2


def compare(figures: Figures, recorded: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return a line for each ratio that is worse than recorded by more than both spreads and FLOOR allow."""
    worse = []
    for row in ROWS:
        if row.control is None or row.name not in figures or row.name not in recorded:
            continue
        ratio, spread = figures[row.name][:2]
        before, noise = recorded[row.name]
        allowed = spread + noise + FLOOR * before
        if (before - ratio if row.least else ratio - before) > allowed:
            worse.append(f"{row.name}: {ratio:.3f}, was {before:.3f} (noise {allowed:.3f})")
    return worse


def table(figures: Figures, place: Mapping[str, object]) -> str:
    """Return the result for people: a line a row, the target beside it, the records below."""
    lines = [
        f"{'row':<26} {'measured':>10} {'spread':>9} {'target':>10} {'':<6} {'tempo':>9} {'control':>9}",
    ]
    for row in ROWS:
        if row.name not in figures:
            continue
        value, spread, subject, control = figures[row.name]
        met = row.met(value)
        mark = "" if met is None else "met" if met else "MISSED"
        aim = "" if row.target is None else ("≥ " if row.least else "≤ ") + _show(row.target, row.unit)
        lines.append(
            f"{row.name:<26} {_show(value, row.unit):>10} {_show(spread, row.unit):>9} {aim:>10} {mark:<6}"
            f" {_show(subject, 'second') if control else '':>9} {_show(control, 'second') if control else '':>9}"
            f"  {row.what}"
        )
    lines.append(
        f"on {place['machine']}, {place['cores']} cores, {place['interpreter']} ({place['python']}, {place['build']}),"
        f" commit {str(place['commit'] or 'unknown')[:12]}; ratios within a worker process, medians over the rounds"
    )
    records = baseline.records("auto")
    if records:
        lines.append(f"on record (not measured here): {'; '.join(records)}")
    return "\n".join(lines)


def _show(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "second":
        return f"{value * 1e9:,.0f} ns" if value < 1e-5 else format_seconds(value)
    if unit == "byte":
        return format_size(round(value))
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if math.isfinite(value) else "?"


def _suite(pyperf: Any, measured: Mapping[str, Rounds], place: Mapping[str, object]) -> Any:
    """Return the values as pyperf benchmarks, a run a worker process."""
    notes = {f"soak_{key}": str(value) for key, value in place.items() if value is not None}
    benchmarks = []
    for group, rounds in measured.items():
        for name in rounds[0] if rounds else ():
            metadata = {"name": name, "unit": UNITS.get(name, "second"), "soak_group": group, **notes}
            runs = [
                # A drain or a lateness can be 0, which is no value for pyperf.
                pyperf.Run([max(value, 1e-9) for value in values[name]], metadata=metadata, collect_metadata=True)
                for values in rounds
                if values.get(name)
            ]
            benchmarks.append(pyperf.Benchmark(runs))
    return pyperf.BenchmarkSuite(benchmarks)


def as_record(figures: Figures, place: Mapping[str, object]) -> bytes:
    """Return the ratios as a baseline's file."""
    rows = {
        row.name: {
            "ratio": round(figures[row.name][0], 4),
            "spread": round(figures[row.name][1], 4),
            "control": float(f"{control:.4g}"),
        }
        for row in ROWS
        if row.name in figures and (control := figures[row.name][3]) is not None
    }
    keys: Sequence[str] = ("machine", "cpu", "cores", "kernel", "python", "build", "compiler", "commit")
    content = {
        "what": "ratios of `python3 -m soak bench`, medians over its rounds; spread: half of their middle range;"
        " control: seconds",
        "recorded": time.strftime("%Y-%m-%d"),
        "environment": {key: place[key] for key in keys},
        "rows": rows,
    }
    return (json.dumps(content, indent=2) + "\n").encode()
