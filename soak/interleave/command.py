# SPDX-License-Identifier: MIT
"""The ``interleave`` command: whole walks, samples, a replay of one place, and the broken twins."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

from soak.interleave import twins, walk
from soak.options import complain, converter
from soak.units import parse_count, parse_duration

SHOWN = 3
"""Failures of one plan that are told; the walk of a plan ends with them."""


class Walked(NamedTuple):
    """What came of one plan's walk."""

    plan: walk.Plan
    runs: int
    failures: list[str]
    seconds: float


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "interleave",
        help="stop calls at each of their bytecodes, let others run, and check what came out",
        description="Walk the interleavings of tempo's calls, and find the broken twins.",
        epilog="exit code: 0 all held and each twin was found, 1 not, 2 a bad option; "
        "example: python3 -m soak interleave --depth 1 --only 'enqueue / stop'",
        allow_abbrev=False,
    )
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument(
        "--depth", choices=["1", "2", "all"], default="all", help="calls stopped in a run (%(default)s)"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="plans whose name has this in it")
    parser.add_argument(
        "--sample", type=converter(parse_duration), metavar="TIME", help="random stops for so long, in place of all"
    )
    parser.add_argument("--seed", type=int, help="of the sample (else a random one, which is printed)")
    parser.add_argument("--replay", metavar="PLACE", help="one run, at a place as a failure tells it")
    parser.add_argument("--twins", choices=["yes", "no"], default="yes", help="look for the broken twins (%(default)s)")
    parser.add_argument(
        "--workers",
        type=converter(partial(parse_count, most=999)),
        default=os.cpu_count() or 1,
        help="processes (%(default)s)",
    )
    parser.add_argument("--json", metavar="PATH", help="write the figures there too")


def main(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if options.replay is not None:
        return _replay(options)
    if options.sample is not None:
        return _sample(options)
    plans = [
        *(plan for plan in walk.PLANS if options.depth != "2"),
        *(plan for plan in walk.DEEP if options.depth != "1"),
    ]
    plans = [plan for plan in plans if options.only in str(plan)]
    if not plans:
        options.parser.error(f"argument --only: {options.only!r} is in the name of no plan")
    begin = time.monotonic()
    broken = runs = 0
    walked: dict[int, list[Walked]] = {1: [], 2: []}
    for done in each(plans, options.workers):
        walked[len(done.plan.calls) - 1].append(done)
        runs += done.runs
        broken += bool(done.failures)
        for failure in done.failures:
            print(f"BROKEN  {failure}", flush=True)
        print(f"{done.plan}: {done.runs} runs in {done.seconds:.1f} s", flush=True)
    found = [] if options.twins == "no" else list(look_for_twins(options.workers))
    missed = [name for name, place in found if place is None]
    for depth, some in walked.items():
        if some:
            bad = sum(bool(done.failures) for done in some)
            print(f"{depth} preempted: {len(some)} plans, {sum(done.runs for done in some):,} runs, {bad} plans broken")
    if found:
        print(f"broken twins: {len(found)}, found {len(found) - len(missed)}" + "".join(f", not {m}" for m in missed))
    seconds = time.monotonic() - begin
    print(f"{runs:,} runs in {seconds:.0f} s")
    if options.json is not None:
        figures = {
            "plans": {str(done.plan): done.runs for some in walked.values() for done in some},
            "runs": runs,
            "broken": broken,
            "twins": dict(found),
            "seconds": seconds,
        }
        try:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(figures, file, indent=1)
        except OSError as error:
            complain(f"cannot write {options.json!r}: {error.strerror}")
            return 1
    return int(bool(broken or missed))


def _pool(workers: int) -> ProcessPoolExecutor:
    """Processes that Ctrl-C ends without a word: the one that it is for is this one."""
    context = get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL))


def each(plans: list[walk.Plan], workers: int) -> Iterator[Walked]:
    """Walk the plans in processes of their own."""
    with _pool(workers) as pool:
        for future in as_completed([pool.submit(walk_one, plan) for plan in plans]):
            yield future.result()


def walk_one(plan: walk.Plan) -> Walked:
    """Walk a plan to its end, or until it broke too often."""
    import tempo  # noqa: PLC0415 - in the process that walks

    begin = time.monotonic()
    failures: list[str] = []
    runs = 0
    for outcome in walk.walk(tempo, plan):
        runs += 1
        if isinstance(outcome, walk.Failure):
            failures.append(str(outcome))
            if len(failures) == SHOWN:
                break
    return Walked(plan, runs, failures, time.monotonic() - begin)


def look_for_twins(workers: int) -> Iterator[tuple[str, str | None]]:
    """Look for each broken twin; yield its name, and where it was found (None: nowhere)."""
    with _pool(workers) as pool:
        for twin, place in zip(twins.TWINS, pool.map(twins.find, [twin.name for twin in twins.TWINS])):
            print(f"twin {twin.name!r}: {'NOT FOUND' if place is None else f'found: {place}'}", flush=True)
            yield twin.name, place


def _replay(options: argparse.Namespace) -> int:
    import tempo  # noqa: PLC0415 - as in walk_one

    try:
        plan, stops, order = walk.parse(options.replay)
    except ValueError as error:
        options.parser.error(f"argument --replay: {error}")
    outcome = walk.attempt(tempo, plan, stops, order)
    print(outcome if isinstance(outcome, walk.Failure) else f"held: {plan}, {outcome} of {len(stops)} were stopped")
    return int(isinstance(outcome, walk.Failure))


def _sample(options: argparse.Namespace) -> int:
    import tempo  # noqa: PLC0415 - as in walk_one

    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    end = time.monotonic() + options.sample
    runs = 0
    for outcome in walk.sample(tempo, seed):
        runs += 1
        if isinstance(outcome, walk.Failure):
            print(f"BROKEN  {outcome}", flush=True)
            return 1
        if time.monotonic() > end:
            break
    print(f"{runs:,} runs, all held")
    return 0
