# SPDX-License-Identifier: MIT
"""The ``interleave`` command: stops a call at each of its bytecodes, lets others run, goes on, and checks."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count, product
from multiprocessing import get_context
from typing import Any, NamedTuple

from soak import cli
from soak.interleave.scenes import STATES, Scene
from soak.interleave.schedule import FOREVER, Actor, Schedule
from soak.interleave.twins import TWINS, Twin

POSSIBLE = sys.implementation.name == "cpython" and sys.version_info[:2] != (3, 12)  # to stop a thread at a bytecode


class Plan(NamedTuple):
    """Calls to interleave in a state: the first is stopped, the second too when there are three."""

    calls: tuple[str, ...]
    state: str
    consumer: bool  # one waits already when they begin
    nested: bool = False  # the second is made within the first, in its thread, as a signal handler or a finalizer does

    def __str__(self) -> str:
        calls = f"{self.calls[1]} inside {self.calls[0]}" if self.nested else " / ".join(self.calls)
        return f"{calls} in {self.state!r}{' with a consumer' if self.consumer else ''}"


CALLS = ("enqueue", "enqueue waiting", "aenqueue", "enqueue_many", "get", "wait", "flush", "shutdown", "stop", "stats")
INSIDE = ("enqueue", "enqueue waiting", "enqueue two", "enqueue_many", "stats", "interrupt")
# Left out: asyncio loses a callback; a batch that its taker still has while it waits for room is overtaken by others.
ODD = {("aenqueue", "interrupt"), ("get", "enqueue waiting"), ("wait", "enqueue waiting")}
NESTED = [pair for pair in product(CALLS, INSIDE) if pair not in ODD]
TRIPLES = (("enqueue", "enqueue", "get"), ("enqueue", "enqueue", "wait"),
           ("enqueue", "shutdown", "wait"), ("shutdown", "enqueue", "wait"))  # fmt: skip
DEEP = ("empty", "open batch with credit", "one short of a batch", "one short of the buffer", "full, one waits")
PLANS = [
    *(Plan(*each) for each in product(product(CALLS[:-1], CALLS), STATES, (False, True))),
    *(Plan(*each, nested=True) for each in product(NESTED, STATES, (False, True))),
    *(Plan(*each) for each in product(TRIPLES, DEEP, (False,))),
]


def play(schedule: Schedule, plan: Plan, stops: tuple[int, ...], order: int = 0) -> int:
    """Interleave the plan's calls once; return how many were stopped, up to the first that ended before.

    stops: after how many bytecodes (of three calls: lines) the first is stopped, and the second of three. order: 1
    lets the second of two stopped calls go on first, and a single one last of all. Raises AssertionError, and what else
    came out of tempo.
    """
    schedule.by_line = len(stops) > 1
    schedule.nested = plan.calls[1] if plan.nested else ""
    kind = "atake all" if plan.nested and plan.calls[-1] != "interrupt" else "take all"  # the first one never looks up
    scene = Scene(schedule, plan.state, kind if plan.consumer else "", plan.nested)
    try:
        actors = [scene.begin(call) for call in plan.calls[: len(stops)]]
        if plan.nested:
            actors[0].nested = lambda: scene.make(plan.calls[1], "Z")
        for actor, stop in zip(actors, stops, strict=True):
            if schedule.run(actor, stop) == "blocked" and len(stops) == 1:
                scene.nudge()
                if actor.ready():  # what it waited for has come: on to the stop
                    schedule.run(actor, stop)
        stopped = [actor.steps >= stop for actor, stop in zip(actors, stops, strict=True)]
        if not plan.nested:
            schedule.run(scene.begin(plan.calls[-1]))
        others = reversed(actors) if len(stops) > 1 else schedule.actors
        for actor in filter(Actor.ready, others if order else actors):
            schedule.run(actor)
        scene.check()
        return [*stopped, False].index(False)
    finally:
        schedule.close()


def attempt(schedule: Schedule, plan: Plan, stops: tuple[int, ...], order: int = 0) -> int | str:
    """As play; return what did not hold, and where."""
    try:
        return play(schedule, plan, stops, order)
    except Exception as error:  # of any kind: none may come out of tempo here
        return f"{plan}, stopped at {stops}, order {order}: {type(error).__name__}: {error}"


def walk(schedule: Schedule, plan: Plan) -> Iterator[int | str]:
    """Play the plan with its calls stopped at each of their bytecodes."""
    orders = 2 if len(plan.calls) > 2 or (plan.consumer and not plan.nested) else 1
    for first in count(1):
        for rest in ((second,) for second in count(1)) if len(plan.calls) > 2 else [()]:
            for order in range(orders):
                outcome = attempt(schedule, plan, (first, *rest), order)
                yield outcome
            if outcome == 0:
                return
            if outcome == 1:
                break


def sample(schedule: Schedule, plans: list[Plan], seed: int) -> Iterator[int | str]:
    """Play some plans with their calls stopped at random, without end."""
    chance = random.Random(seed)
    most: dict[tuple[str, ...], list[int]] = {}  # bytecodes of the calls, as far as it is known
    while True:
        plan = chance.choice(plans)
        bounds = most.setdefault((plan.state, *plan.calls), [1000] * (len(plan.calls) - 1))
        stops = tuple(chance.randint(1, bound) for bound in bounds)
        outcome = attempt(schedule, plan, stops, chance.randrange(2))
        yield outcome
        if isinstance(outcome, int) and outcome < len(stops):
            bounds[outcome] = max(50, stops[outcome])


def until_broken(outcomes: Iterable[int | str], seconds: float = FOREVER) -> tuple[int, str]:
    """Run until one breaks, to the end, or for so long; return how many there were, and what did not hold, if any."""
    end, runs = time.monotonic() + seconds, 0
    for runs, outcome in enumerate(outcomes, 1):
        if isinstance(outcome, str) or time.monotonic() >= end:
            return runs, outcome if isinstance(outcome, str) else ""
    return runs, ""


def add_parser(commands: Any) -> None:
    purpose = "Stop tempo's calls at each of their bytecodes, let others run, check; then find the broken twins."
    add = cli.add_command(commands, "interleave", main, purpose, "example: python3 -m soak interleave --seconds 60\n")
    add("--only", default="", metavar="TEXT", help="only plans whose name contains this, and no twins")
    add("--twins", action="store_true", help="only the broken twins")
    add("--seconds", type=float, metavar="N", help="only a random sample, for so long")
    add("--seed", type=int, metavar="S", help="of the sample (by default a random one, which is printed)")


def main(options: argparse.Namespace) -> int:
    plans = [plan for plan in PLANS if options.only in str(plan)]
    if not plans:
        options.parser.error(f"argument --only: {options.only!r} is in the name of no plan")
    if options.twins and (options.only or options.seconds is not None):
        options.parser.error("argument --twins: takes neither --only nor --seconds")
    bad = 0
    if not POSSIBLE:
        print("left out: this interpreter cannot stop a thread at a bytecode")
    elif options.seconds is not None:
        seed = random.randrange(1 << 32) if options.seed is None else options.seed
        print(f"seed {seed}", flush=True)
        runs, broken = until_broken(sample(Schedule(), plans, seed), options.seconds)
        print(f"BROKEN  {broken}" if broken else f"{runs:,} runs, all held")
        bad = int(broken != "")
    else:
        bad = walk_all([*([] if options.twins else plans), *([] if options.only else TWINS)])
    return int(bad > 0)


def walk_one(work: Plan | Twin) -> tuple[int, str]:
    """Walk a plan, or those plans in which a twin must break; return the number of runs, and what broke, if any."""
    if isinstance(work, Plan):
        return until_broken(walk(Schedule(), work))
    schedule, plans = Schedule(work.source()), (plan for plan in PLANS if work.where in str(plan))
    return until_broken(outcome for plan in plans for outcome in walk(schedule, plan))


def begin_process(cores: Any) -> None:
    """Keep to one core, since one thread runs at a time; let Ctrl-C, which is for the first process, end this one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})


def walk_all(works: list[Plan | Twin]) -> int:
    """Walk on all cores; return how many plans broke, and twins did not."""
    cores, spawn = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0), get_context("spawn")
    total, bad, queue = 0, 0, spawn.Queue()
    for core in cores:
        queue.put(core)
    with ProcessPoolExecutor(len(cores), spawn, begin_process, (queue,)) as pool:
        for work, (runs, broken) in zip(works, pool.map(walk_one, works)):
            well = (broken != "") == isinstance(work, Twin)
            print(f"{'' if well else 'FAILED  '}{work}: {runs:,} runs, {broken or 'all held'}", flush=True)
            total, bad = total + runs, bad + (not well)
    print(f"{len(works)} plans and twins, {total:,} runs, {bad} failed")
    return bad
