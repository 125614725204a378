# SPDX-License-Identifier: MIT
"""The ``interleave`` command: the whole walk, a seeded sample of it, or the broken twins."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from soak.interleave import twins, walk
from soak.interleave.schedule import Schedule

POSSIBLE = sys.implementation.name == "cpython" and sys.version_info[:2] != (3, 12)
"""Whether this interpreter can stop a thread at a bytecode."""


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "interleave",
        description="Stop tempo's calls at each of their bytecodes, let others run, check; then find the broken twins.",
        epilog="exit code: 0 all held and each twin was found, 1 not; example: python3 -m soak interleave --seconds 60",
    )
    parser.set_defaults(main=main, parser=parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--seconds", type=float, metavar="N", help="a random sample for so long, in place of all")
    what.add_argument("--twins", action="store_true", help="only the broken twins")
    what.add_argument("--only", metavar="TEXT", help="only plans whose name contains this, and no twins")
    parser.add_argument("--seed", type=int, metavar="S", help="of the sample (else a random one, which is printed)")


def main(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    begin = time.monotonic()
    bad = 0
    if not POSSIBLE:
        print("left out: this interpreter cannot stop a thread at a bytecode")
    elif options.seconds is not None:
        bad = run_sample(options.seconds, random.randrange(1 << 32) if options.seed is None else options.seed)
    else:
        plans = [plan for plan in walk.PLANS if (options.only or "") in str(plan) and not options.twins]
        if options.only is not None and not plans:
            options.parser.error(f"argument --only: {options.only!r} is in the name of no plan")
        bad = run_all(plans) + (find_twins() if options.only is None else 0)
    print(f"{time.monotonic() - begin:.0f} s")
    return int(bad > 0)


def in_processes(work: Callable[[Any], Any], many: Iterable[Any]) -> Iterator[Any]:
    """Yield the results as they come. Ctrl-C ends the processes without a word: it is for this one."""
    quiet = (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=signal.signal, initargs=quiet) as pool:
        for future in as_completed([pool.submit(work, one) for one in many]):
            yield future.result()


def run_all(plans: list[walk.Plan]) -> int:
    """Walk the plans; return how many broke."""
    kinds: dict[str, Counter[str]] = {}
    for done, (plan, runs, failures) in enumerate(in_processes(walk_one, plans), 1):
        print(*(f"BROKEN  {failure}\n" for failure in failures), sep="", end="")
        print(f"{done:5} of {len(plans)}: {plan}: {runs} runs", flush=True)
        kinds.setdefault(plan.kind, Counter()).update(plans=1, runs=runs, broken=bool(failures))
    for kind, row in kinds.items():
        print(f"{kind:16} {row['plans']:5} plans {row['runs']:9,} runs {row['broken']:5} broken")
    return sum(row["broken"] for row in kinds.values())


def walk_one(plan: walk.Plan) -> tuple[walk.Plan, int, list[str]]:
    """Walk a plan to its end, or until it broke three times; return it, the number of runs, and the failures."""
    runs, failures = 0, []
    for outcome in walk.walk(Schedule(), plan):
        runs += 1
        if isinstance(outcome, str):
            failures.append(outcome)
            if len(failures) == 3:
                break
    return plan, runs, failures


def run_sample(seconds: float, seed: int) -> int:
    """Walk at random for so long, or until a run breaks; return how many did."""
    print(f"seed {seed}", flush=True)
    end = time.monotonic() + seconds
    runs, outcomes = 0, walk.sample(Schedule(), seed)
    outcome = next(outcomes)
    while not isinstance(outcome, str) and time.monotonic() < end:
        runs, outcome = runs + 1, next(outcomes)
    print(f"BROKEN  {outcome}" if isinstance(outcome, str) else f"{runs:,} runs, all held")
    return int(isinstance(outcome, str))


def find_twins() -> int:
    """Look for each broken twin; return how many were not found."""
    places = dict(in_processes(twins.find, twins.TWINS))
    for name, place in places.items():
        print(f"twin {name!r}: {place or 'NOT FOUND'}")
    return sum(place is None for place in places.values())
