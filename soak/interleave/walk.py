# SPDX-License-Identifier: MIT
"""Stops a call at each of its bytecodes, lets others run to their end or until they block, goes on, and checks.

Or makes another call there, in the same thread, as a signal handler or a finalizer does.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from soak.interleave.scenes import STATES, Scene
from soak.interleave.schedule import Schedule


class Plan(NamedTuple):
    """Calls to interleave in a state: the first is stopped, the second too when there are three."""

    calls: tuple[str, ...]
    state: str
    consumer: bool  # one waits already when they begin
    nested: bool = False  # the second is made within the first, in its thread

    @property
    def kind(self) -> str:
        return "nested" if self.nested else "one preempted" if len(self.calls) == 2 else "two preempted"

    def __str__(self) -> str:
        calls = f"{self.calls[1]} inside {self.calls[0]}" if self.nested else " / ".join(self.calls)
        return f"{calls} in {self.state!r}{' with a consumer' if self.consumer else ''}"


PRODUCERS = ("enqueue", "enqueue waiting", "aenqueue", "enqueue_many")
OTHERS = ("get", "flush", "shutdown", "stop", "wait")
PAIRS = (
    *itertools.product(PRODUCERS, ("enqueue", "enqueue_many", "get", "flush", "shutdown", "stop", "stats")),
    *itertools.product(OTHERS, (*PRODUCERS, *OTHERS, "stats")),
)
INSIDE = ("enqueue", "enqueue waiting", "enqueue two", "enqueue_many", "stats", "interrupt")
NESTED = [
    pair for pair in itertools.product((*PRODUCERS, *OTHERS, "stats"), INSIDE) if pair != ("aenqueue", "interrupt")
]
TRIPLES = (("enqueue", "enqueue", "get"), ("enqueue", "enqueue", "wait"),
           ("enqueue", "shutdown", "wait"), ("shutdown", "enqueue", "wait"))  # fmt: skip
DEEP_STATES = ("empty", "open batch with credit", "one short of a batch", "one short of the buffer", "full, one waits")

PLANS = [
    *(Plan(*each) for each in itertools.product(PAIRS, STATES, (False, True))),
    *(Plan(*each, nested=True) for each in itertools.product(NESTED, STATES, (False, True))),
    *(Plan(*each) for each in itertools.product(TRIPLES, DEEP_STATES, (False,))),
]


def play(schedule: Schedule, plan: Plan, stops: Sequence[int], order: int = 0) -> int:
    """Interleave the plan's calls once; return how many were stopped, up to the first that ended before.

    stops: after how many bytecodes (of three calls: lines) the first is stopped, and the second of three; order: which
    of two that were stopped goes on first. Raises AssertionError, and what else came out of tempo.
    """
    schedule.by_line = len(stops) > 1
    schedule.at_signals = plan.calls[-1] == "interrupt"
    kind = "atake all" if plan.nested and not schedule.at_signals else "take all"  # the first one never looks up
    scene = Scene(schedule, plan.state, kind if plan.consumer else "", plan.nested)
    try:
        actors = [scene.begin(call) for call in plan.calls[: len(stops)]]
        if plan.nested:
            actors[0].nested = lambda: scene.make(plan.calls[1], "Z")
        for actor, stop in zip(actors, stops, strict=True):
            if schedule.run(actor, stop) == "blocked" and len(stops) == 1:
                scene.nudge()
                if schedule.ready(actor):  # what it waited for has come: on to the stop
                    schedule.run(actor, stop)
        stopped = [actor.steps >= stop for actor, stop in zip(actors, stops, strict=True)]
        if not plan.nested:
            schedule.run(scene.begin(plan.calls[-1]))
        for actor in reversed(actors) if order else actors:
            if schedule.ready(actor):
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
    for first in itertools.count(1):
        for rest in ((second,) for second in itertools.count(1)) if len(plan.calls) > 2 else [()]:
            for order in range(len(plan.calls) - 1):
                outcome = attempt(schedule, plan, (first, *rest), order)
                yield outcome
            if outcome == 0:
                return
            if outcome == 1:
                break


def sample(schedule: Schedule, seed: int) -> Iterator[int | str]:
    """Play plans with their calls stopped at random, without end."""
    chance = random.Random(seed)
    most: dict[tuple[str, ...], list[int]] = {}  # bytecodes of the calls, as far as it is known
    while True:
        plan = chance.choice(PLANS)
        bounds = most.setdefault((plan.state, *plan.calls), [1000] * (1 if plan.nested else len(plan.calls) - 1))
        stops = tuple(chance.randint(1, bound) for bound in bounds)
        outcome = attempt(schedule, plan, stops, chance.randrange(2))
        yield outcome
        if isinstance(outcome, int) and outcome < len(stops):
            bounds[outcome] = max(50, stops[outcome])
