# SPDX-License-Identifier: MIT
"""The ``bench`` command: rounds of pyperf's runner over ``soak.benchmarks``, ratios within a round, the comparison.

A ratio is what tempo takes over what its control takes in the same round: absolute times change from hour to hour on a
shared machine, and such ratios change much less. They are kept as a second pyperf suite (seconds that tempo takes
for a second of the control's), so that pyperf compares them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from soak import baseline, cli, environment
from soak.cli import Failure, format_seconds, say

FOLDER = baseline.FOLDER / "bench"
OUT = environment.ROOT / "soak" / "out" / "bench.json"
GROUPS = {"calls": 20, "threads": 3, "full": 10, "peers": 3, "coroutines": 3, "soaks": 3, "producers": 3}
"""And the values of a round: more where they take milliseconds."""
PATIENCE = 900.0  # seconds after which a round of one group counts as hung
FLOOR = 0.10
"""One program on one machine may differ by that share; a record tells only of its own minutes."""

EXAMPLE = """\
examples:
  python3 -m soak bench
  python3 -m soak bench --groups calls,soaks --rounds 3
  python3 -m soak bench --compare auto
  python3 -m soak bench --python python3.14t --groups producers
"""


ROWS = {
    "enqueue / queue.Queue.put": ("enqueue", "queue_put"),
    "enqueue_many / enqueue": ("enqueue_many", "enqueue"),
    "refusal / queue.Full": ("refusal", "queue_full"),
    "whole way / queue.Queue": ("way", "queue_way"),
    "whole way / SimpleQueue": ("way", "simple_queue_way"),
    "threads / queue.Queue batcher": ("handover", "queue_batcher"),
    "threads / SimpleQueue batcher": ("handover", "simple_queue_batcher"),
    "threads / QueueListener": ("handover", "queue_listener"),
    "threads / OpenTelemetry": ("handover", "opentelemetry"),
    "threads / Kafka's test broker": ("handover", "kafka"),
    "full buffer / bounded Queue": ("full_buffer", "full_queue"),
    "coroutines / asyncio.Queue": ("coroutines", "asyncio_queue"),
    "coroutines / janus": ("coroutines", "janus"),
    "32 producers, of bare": ("soak_32", "soak_32_bare"),
    "32 KiB batches, of bare": ("soak_32k", "soak_32k_bare"),
    "1 producer, of bare": ("soak_1", "soak_1_bare"),
    "256 producers, of bare": ("soak_256", "soak_256_bare"),
    **{f"{number} producers / Queue": (f"tempo_{number}", f"queue_{number}") for number in (1, 2, 4, 8)},
    **{f"{number} producers / SimpleQueue": (f"tempo_{number}", f"simple_queue_{number}") for number in (1, 2, 4, 8)},
}
"""Comparisons by name: a subject and its control. A soak is shown as a share of the control's rate."""


def add_parser(commands: Any) -> None:
    purpose = "Measure tempo, queues and other batchers in one run (needs pyperf)."
    add = cli.add_command(commands, "bench", main, purpose, EXAMPLE)
    add("--rounds", type=cli.count(1000), default="5", metavar="N", help="worker processes a subject (%(default)s)")
    add("--duration", type=cli.duration, default="1s", metavar="TIME", help="how long a soak lasts (%(default)s)")
    shown = f"of {', '.join(GROUPS)} (%(default)s)"
    add("--groups", type=cli.names(*GROUPS), default="all", metavar="NAME,...", help=shown)
    add("--python", default=sys.executable, metavar="PATH", help="an interpreter that has pyperf (this one)")
    add("--json", type=cli.path, default=OUT, metavar="PATH", help="where pyperf's JSON goes (soak/out/bench.json)")
    shown = "fail when a ratio is worse, in its best round, than ever in this baseline of soak/baselines/bench"
    add("--compare", type=recorded, metavar="auto|NAME", help=shown)
    add("--record", type=name_of, metavar="auto|NAME", help="write the ratios as such a baseline")


def name_of(text: str) -> str:
    """Return a baseline's name; ``auto`` is this interpreter's."""
    if text == "auto":
        return str(environment.describe()["interpreter"]).lower().replace(" ", "-").replace(",", "")
    return baseline.new_name(text)


def recorded(text: str) -> Path:
    path = FOLDER / f"{name_of(text)}.json"
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no {path.name} in soak/baselines/bench")
    return path


def main(options: argparse.Namespace) -> int:
    try:
        pyperf = importlib.import_module("pyperf")
    except ImportError:
        options.parser.error("bench needs pyperf: `make bench` installs it, or: pip install pyperf")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bench.json")
        for number in range(options.rounds):
            for group in options.groups:
                say(f"round {number + 1} of {options.rounds}: {group}")
                measure(path, group, options, quiet=number > 0)
        suite = pyperf.BenchmarkSuite.load(str(path))
    ratios = ratios_of(pyperf, suite)
    print(table(suite, ratios))
    files = [(suite, options.json), *([(ratios, FOLDER / f"{options.record}.json")] if options.record else [])]
    for found, path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.dump(str(path), replace=True)
        print(f"written {path}", flush=True)
    if options.compare is None:
        return 0
    print(comparison(options.compare, ratios))
    worse = compare(pyperf.BenchmarkSuite.load(str(options.compare)), ratios)
    print("\n".join(worse or [f"not worse than {options.compare}"]))
    return 1 if worse else 0


def measure(path: Path, group: str, options: argparse.Namespace, quiet: bool) -> None:
    """Run one round of a group; append its values to a file. Raises Failure when it fails or hangs."""
    command = [options.python, "-m", "soak.benchmarks", "--groups", group, "--quiet", "--append", str(path)]
    command += ["--duration", f"{options.duration * 1e9:.0f}ns", "--copy-env", "--values", str(GROUPS[group])]
    settings: Any = {"cwd": environment.ROOT, "env": {**os.environ, "PYTHONPATH": str(environment.ROOT)}}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True, **settings)
    except (subprocess.SubprocessError, OSError) as error:
        say(str(getattr(error, "stderr", None) or ""))  # the whole of it: the worker's own error comes first
        raise Failure(f"{group}: {error}") from None
    if done.stderr and not quiet:
        say(done.stderr.strip())


def rounds_of(suite: Any, name: str) -> list[float]:
    """Return the best value of each round, in seconds a payload (other programs only slow it); empty: not measured."""
    if name not in suite.get_benchmark_names():
        return []
    return [min(run.values) for run in suite.get_benchmark(name).get_runs()]


def ratios_of(pyperf: Any, suite: Any) -> Any:
    """Return the ratio of each row and round, as a suite."""
    notes = {f"soak_{key}": str(value) for key, value in environment.describe().items() if value is not None}
    benchmarks = []
    for name, (subject, control) in ROWS.items():
        metadata = {"name": name, "unit": "second", **notes}
        pairs = zip(rounds_of(suite, subject), rounds_of(suite, control))
        runs = [pyperf.Run([ours / theirs], metadata=metadata, collect_metadata=False) for ours, theirs in pairs]
        if runs:
            benchmarks.append(pyperf.Benchmark(runs))
    return pyperf.BenchmarkSuite(benchmarks)


def table(suite: Any, ratios: Any) -> str:
    """Return the result for people: a line a row."""
    lines = [f"{'row':<32} {'measured':>9} {'spread':>7} {'tempo':>9} {'control':>9}"]
    for name in ratios.get_benchmark_names():
        ratio = ratios.get_benchmark(name)
        median = ratio.median()
        shown = 1 / median if ROWS[name][0].startswith("soak_") else median
        spread = spread_of(ratio) * shown / median
        times = [format_seconds(statistics.median(rounds_of(suite, measured))) for measured in ROWS[name]]
        lines.append(f"{name:<32} {shown:>9.3g} {spread:>7.2g} {times[0]:>9} {times[1]:>9}")
    lines.append(f"on {environment.line(environment.describe())}; medians over the rounds")
    return "\n".join(lines)


def spread_of(benchmark: Any) -> float:
    """Return the median distance from the median; 0 of one value."""
    return float(benchmark.median_abs_dev()) if benchmark.get_nvalue() > 1 else 0.0


def compare(before: Any, now: Any) -> list[str]:
    """Return a line for each ratio whose best round is worse than the worst recorded one, by more than FLOOR.

    Medians of a few rounds differ by chance: how threads take turns under a GIL changes from one process to the next.
    """
    worse = []
    for name in sorted(set(before.get_benchmark_names()) & set(now.get_benchmark_names())):
        best, worst = min(now.get_benchmark(name).get_values()), max(before.get_benchmark(name).get_values())
        if best > (1 + FLOOR) * worst:
            worse.append(f"WORSE: {name}: {best:.3f} at best, was {worst:.3f} at worst")
    return worse


def comparison(before: Path, now: Any) -> str:
    """Return pyperf's own comparison; a second of the control's is its unit."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "now.json"))
        now.dump(path)
        command = [sys.executable, "-m", "pyperf", "compare_to", "--table", str(before), path]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
