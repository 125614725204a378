# SPDX-License-Identifier: MIT
"""The ``overhead`` command: what the harness itself takes of the rate that it measures.

Short loads on fresh dispatchers, all with the settings of ``run``, in one process and in rounds, each in an order of
its own: one that nobody looks at, one with the probes, one with all that ``run`` does while it loads, with either
display, and the census. What a way of looking costs is 1 less its rate over that of the unwatched load of the same
round, so that a machine whose speed changes from minute to minute changes both. A second unwatched load, which costs
nothing, says how far off these figures are.

Where other programs take their share of the cores, rates tell little. The CPU time that an event takes, of all threads
together, hardly depends on them, and under one GIL it is what bounds the rate: so the same is told of it, and it is
what the target is for.

Samples, each synced, and displays come as often as in a ``run`` of the usual length, at least two a load; and a line at
its end, which is more often than there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from soak import census, environment, interrupts, results, settings
from soak.bench import spread_of
from soak.config import Config
from soak.drive import Outcome, drive
from soak.load import Load
from soak.options import complain, converter, parse_path
from soak.payloads import STRIDE
from soak.progress import LiveMonitor, Monitor, SilentMonitor, Stream, say
from soak.units import format_seconds, parse_count, parse_duration

TARGET = 0.03
"""What the load of ``run`` may lose by being looked at."""
ERROR = 1.86
"""The standard error of a median, in spreads (half of the middle range) over the root of how many values there are."""
LEAST_ROUNDS = 8
"""Of fewer, the spread says little, and of one nothing."""
MOST_ROUNDS = 1000
USUAL = 300.0
"""Seconds that ``run`` loads when it is not told else."""

EXAMPLE = """\
examples:
  python3 -m soak overhead
  python3 -m soak overhead --rounds 40 --duration 2s --producers 8 --json overhead.json

exit code: 0 measured (a missed target is no failure), 1 a load went wrong or a file cannot be written, 2 a bad option
"""

BARE, AGAIN = "unwatched", "again"
WAYS: Mapping[str, str] = {
    BARE: "no probes, no samples, no display",
    AGAIN: "the same once more: what is not 0 here is noise",
    "probes": f"one event in {STRIDE} is a probe, and consumers look for them",
    "samples": "that, and samples into a synced file: run --display none",
    "plain": "that, and a line now and then: run --display plain",
    "live": "the same with the live display: run --display live",
    "census": "each event checksummed and its order checked: the census pass",
}
"""Each way of looking at a load, and what it is."""
WATCHED = ("samples", "plain", "live")
"""What ``run`` does while it loads, and so what the target is for."""


class Terminal(io.StringIO):
    """A terminal in memory, so that what is drawn does not depend on where this runs, nor gets in the way."""

    def isatty(self) -> bool:
        """Return that this is one."""
        return True


class Measured(NamedTuple):
    """What one load came to."""

    rate: float  # delivered events a second
    cpu: float  # CPU seconds of this process an event


Rounds = Sequence[Mapping[str, Measured]]


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "overhead",
        help="what the harness's own looking costs",
        description="Load with and without probes, samples and display, in turns, and tell what each takes.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main, parser=parser)
    add = parser.add_argument
    rounds = converter(partial(parse_count, most=MOST_ROUNDS))
    add("--rounds", type=rounds, default="20", metavar="N", help="how often each is measured (%(default)s)")
    time_ = converter(parse_duration)
    add("--duration", type=time_, default="2s", metavar="TIME", help="how long each load lasts (%(default)s)")
    settings.add_settings(parser)
    add("--json", type=converter(parse_path), metavar="PATH", help="write the figures there too")


def main(options: argparse.Namespace) -> int:
    """Measure in turns, print the table, write the figures; return the exit code."""
    config = settings.config_from(options, options.duration)
    rounds: list[dict[str, Measured]] = []
    try:
        with interrupts.kept(), tempfile.TemporaryDirectory(prefix="soak-") as folder:
            ways = subjects(config, Path(folder))
            for number in range(options.rounds + 1):  # the first one warms up
                say(f"round {number} of {options.rounds}: {len(ways)} loads of {format_seconds(config.duration)}")
                rounds.append(in_turn(ways, number))
    except KeyboardInterrupt:
        complain("interrupted: nothing is told")
        return 130
    except (RuntimeError, OSError) as error:
        complain(str(error))
        return 1
    figures = evaluate(rounds[1:])
    place = environment.describe()
    print("\n".join(table(figures, len(rounds) - 1, place)), flush=True)
    if options.json is None:
        return 0
    content = {
        "schema": 1,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "rounds": len(rounds) - 1,
        "target": TARGET,
        "ways": figures,
        # Of each load events a second and CPU seconds an event.
        "loads": [{name: list(measured) for name, measured in each.items()} for each in rounds[1:]],
        "config": config.as_json(),
        "environment": place,
    }
    try:
        results.replace(options.json, results.as_text(content).encode())
    except OSError as error:
        complain(f"cannot write --json {str(options.json)!r}: {error.strerror or error}; the figures go to stdout")
        print(json.dumps(content, indent=2), flush=True)
        return 1
    return 0


def subjects(config: Config, folder: Path) -> dict[str, Callable[[], Measured]]:
    """Return what measures each way of looking; the streams of samples go into ``folder``."""
    ways: dict[str, Callable[[], Measured]] = {
        BARE: partial(_unsampled, config, False),
        AGAIN: partial(_unsampled, config, False),
        "probes": partial(_unsampled, config, True),
        "samples": partial(_sampled, config, folder, SilentMonitor),
        "plain": partial(_sampled, config, folder, Monitor),
        "live": partial(_sampled, config, folder, partial(LiveMonitor, heap=None)),
        "census": partial(_counted, config),
    }
    try:
        LiveMonitor(config, None, None, None)
    except ImportError:
        say("live is left out: rich is not installed")
        del ways["live"]
    return ways


def in_turn(ways: Mapping[str, Callable[[], Measured]], number: int) -> dict[str, Measured]:
    """Measure each way once, in another order in each round: what one load leaves behind is not the same one's."""
    names = list(ways)
    random.Random(number).shuffle(names)
    return {name: ways[name]() for name in names}


def _timed(work: Callable[[], tuple[int, Outcome]]) -> Measured:
    """Measure one load. Raises RuntimeError when something went wrong in it, KeyboardInterrupt when one ended it."""
    before = time.process_time()
    delivered, outcome = work()
    cpu = time.process_time() - before
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.problems or not delivered:
        raise RuntimeError(outcome.problems[0] if outcome.problems else "nothing was delivered")
    return Measured(delivered / (outcome.load_seconds + (outcome.drain_seconds or 0.0)), cpu / delivered)


def _unsampled(config: Config, probes: bool) -> Measured:
    """A load without samples: stats() is not even called while it lasts."""
    load = Load(config, probes=probes)

    def work() -> tuple[int, Outcome]:
        outcome = drive(config, config.duration, load, every=2 * config.duration)
        sent = sum(sent.probes for sent in load.sent)
        assert sum(taken.probes for taken in load.taken) == sent and (probes or not sent)
        return sum(taken.events for taken in load.taken), outcome

    return _timed(work)


def _sampled(config: Config, folder: Path, make: Callable[..., Monitor]) -> Measured:
    """A load as ``run`` does it; its display is drawn into memory."""
    load = Load(config)
    stream = Stream(folder / f"{time.perf_counter_ns()}.jsonl")
    terminal = Terminal()

    def work() -> tuple[int, Outcome]:
        every = min(make(config, None, seconds=USUAL).every, config.duration / 2)
        # A line comes after a quarter of the seconds given.
        with make(config, stream, seconds=4 * config.duration) as monitor:
            outcome = drive(config, config.duration, load, monitor.sample, every)
        return sum(taken.events for taken in load.taken), outcome

    try:
        with contextlib.redirect_stderr(terminal):
            measured = _timed(work)
    finally:
        stream.close()
    if stream.error is not None:
        raise stream.error
    assert len(stream.path.read_bytes().splitlines()) > 1
    assert bool(terminal.getvalue()) == (make is not SilentMonitor)
    stream.path.unlink()
    return measured


def _counted(config: Config) -> Measured:
    def work() -> tuple[int, Outcome]:
        counted, outcome = census.take(config, config.duration, every=2 * config.duration)
        outcome.problems += counted.problems
        return counted.delivered, outcome

    return _timed(work)


def evaluate(rounds: Rounds) -> dict[str, dict[str, float]]:
    """Return the median rate and CPU time of each way, and what it costs of the rate: measured, and by its CPU time.

    What the unwatched loads of a round came to is the mean of both; the second one is held against the first.

    >>> rounds = [{BARE: Measured(100.0, 1e-6), "plain": Measured(rate, 1.25e-6)} for rate in (99.0, 98.0, 94.0)]
    >>> {key: round(value, 3) for key, value in evaluate(rounds)["plain"].items() if "cpu" not in key}
    {'rate': 98.0, 'cost': 0.02, 'cost_spread': 0.025, 'cost_error': 0.027}
    >>> round(evaluate(rounds)["plain"]["cpu_cost"], 8)
    0.2
    """
    figures = {}
    for name in [way for way in WAYS if way in rounds[0]]:
        bare = [BARE] if name in (BARE, AGAIN) else [way for way in (BARE, AGAIN) if way in rounds[0]]
        costs = [1 - each[name].rate / mean(each[way].rate for way in bare) for each in rounds]
        cpu = [1 - mean(each[way].cpu for way in bare) / each[name].cpu for each in rounds]
        figures[name] = {
            "rate": median(each[name].rate for each in rounds),
            "cpu_seconds": median(each[name].cpu for each in rounds),
        }
        for key, values in (("cost", costs), ("cpu_cost", cpu)):
            spread = spread_of(values)
            error = ERROR * spread / math.sqrt(len(values))
            figures[name].update({key: median(values), f"{key}_spread": spread, f"{key}_error": error})
    return figures


def table(figures: Mapping[str, Mapping[str, float]], rounds: int, place: Mapping[str, Any]) -> list[str]:
    """Return the figures for people: a line a way of looking, and the target."""
    lines = [f"{'':<10} {'events/s':>10} {'costs':>8} {'+-':>8} {'CPU an event':>13} {'costs':>8} {'+-':>8}"]
    for name, found in figures.items():
        line = f"{name:<10} {found['rate']:>10,.0f} "
        line += " " * 18 if name == BARE else f"{found['cost']:>8.1%} {found['cost_error']:>8.1%} "
        line += f"{found['cpu_seconds'] * 1e9:>10,.0f} ns "
        line += " " * 17 if name == BARE else f"{found['cpu_cost']:>8.1%} {found['cpu_cost_error']:>8.1%}"
        lines.append(f"{line}  {WAYS[name]}")
    cost, error = max(
        (found["cpu_cost"], found["cpu_cost_error"]) for name, found in figures.items() if name in WATCHED
    )
    word = "met" if cost + error < TARGET else "MISSED" if cost - error >= TARGET else "TOO NOISY to tell"
    if rounds < LEAST_ROUNDS:
        word = "TOO FEW ROUNDS to tell"
    lines.append(
        f"{word}: what run does while it loads costs {cost:.1%} +- {error:.1%} of the CPU time at most; less than"
        f" {TARGET:.0%} is aimed at"
    )
    lines.append(
        f"on {place['machine']}, {place['cores']} cores, {place['interpreter']} ({place['python']}, {place['build']}),"
        f" commit {str(place['commit'] or 'unknown')[:12]}; medians over {rounds} rounds of what is paired within one,"
        " and their standard errors"
    )
    return lines
