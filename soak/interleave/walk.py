# SPDX-License-Identifier: MIT
"""Stops a call at each of its bytecodes, lets others run to their end or until they block, goes on, and checks."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

from soak.interleave.scenes import DEEP_STATES, PAIRS, STATES, TRIPLES, Scene
from soak.interleave.schedule import Actor


class Plan(NamedTuple):
    """Calls to interleave in a state. The first is stopped, the second too when there are three."""

    calls: tuple[str, ...]
    state: str
    consumer: bool  # one waits already when they begin

    def __str__(self) -> str:
        return f"{' / '.join(self.calls)} in {self.state!r}{' with a consumer' if self.consumer else ''}"


class Failure(NamedTuple):
    """Where something did not hold."""

    plan: Plan
    stops: tuple[int, ...]
    order: int
    what: str

    def __str__(self) -> str:
        return f"{self.plan}, stopped at {self.stops}, order {self.order}: {self.what}"


PLANS = [Plan(pair, state, consumer) for pair in PAIRS for state in STATES for consumer in (False, True)]
DEEP = [Plan(triple, state, False) for triple in TRIPLES for state in DEEP_STATES]
DEEP.append(Plan(("stop", "stop", "stats"), "one short of a batch", False))  # one claims what the other looks at


def play(module: ModuleType, plan: Plan, stops: Sequence[int], order: int = 0) -> int:
    """Interleave the plan's calls once; return how many were stopped, up to the first that ended before.

    stops: after how many bytecodes the first call is stopped, and the second of three; order: of two that were stopped,
    which one goes on first. Raises Broken.
    """
    scene = Scene(module, plan.state, plan.consumer, private=len(stops) < 2)
    try:
        stopped: list[bool] = []
        actors = []
        for call, steps in itertools.zip_longest(plan.calls, stops, fillvalue=0):
            actor = scene.begin(str(call), counts=bool(steps))
            actors.append(actor)
            alone = bool(steps) and len(stops) == 1
            state = past_a_wait(scene, actor, int(steps)) if alone else scene.schedule.run(actor, int(steps))
            stopped.append(state == "stopped")
        for actor in actors[: len(stops)] if order == 0 else reversed(actors[: len(stops)]):
            if scene.schedule.ready(actor):
                scene.schedule.run(actor)
        scene.check()
        return stopped.index(False)  # the last one never is
    finally:
        scene.schedule.close()


def past_a_wait(scene: Scene, actor: Actor, steps: int = 0) -> str:
    """As Schedule.run; what comes after a wait is run too."""
    state = scene.schedule.run(actor, steps)
    if state == "blocked":
        scene.schedule.run(scene.begin("nudge"))
        if scene.schedule.ready(actor):
            state = scene.schedule.run(actor, steps and steps - actor.steps)
    return state


def attempt(module: ModuleType, plan: Plan, stops: tuple[int, ...], order: int = 0) -> int | Failure:
    """As play, with the failure returned."""
    try:
        return play(module, plan, stops, order)
    except Exception as error:  # of any kind: none may come out of tempo here
        return Failure(plan, stops, order, f"{type(error).__name__}: {error}")


def walk(module: ModuleType, plan: Plan) -> Iterator[int | Failure]:
    """Play the plan with its calls stopped at each of their bytecodes."""
    if len(plan.calls) == 2:
        for stop in itertools.count(1):
            outcome = attempt(module, plan, (stop,))
            yield outcome
            if outcome == 0:
                return
    for first in itertools.count(1):
        for second in itertools.count(1):
            for order in (0, 1):
                outcome = attempt(module, plan, (first, second), order)
                yield outcome
            if outcome == 0:
                return
            if outcome == 1 or isinstance(outcome, Failure):
                break


def length(module: ModuleType, plan: Plan, which: int = 0) -> int:
    """How many bytecodes a call of the plan has, when it runs first and alone."""
    scene = Scene(module, plan.state, plan.consumer, private=len(plan.calls) < 3)
    try:
        actor = scene.begin(plan.calls[which], counts=True)
        past_a_wait(scene, actor)
        return actor.steps
    finally:
        scene.schedule.close()


def sample(module: ModuleType, seed: int) -> Iterator[int | Failure]:
    """Play plans with their calls stopped at random, without end."""
    chance = random.Random(seed)
    lengths: dict[tuple[Plan, int], int] = {}
    while True:
        plan = chance.choice(PLANS if chance.random() < 0.8 else DEEP)
        stops = []
        for which in range(len(plan.calls) - 1):
            if (plan, which) not in lengths:
                lengths[plan, which] = length(module, plan, which)
            stops.append(chance.randint(1, lengths[plan, which]))
        yield attempt(module, plan, tuple(stops), chance.randrange(2))


def parse(text: str) -> tuple[Plan, tuple[int, ...], int]:
    """Read what a Failure's text says of where it was.

    Raises: ValueError, when it is no such text.
    """
    found = re.match(r"(.+) in '(.+)'( with a consumer)?, stopped at \(([\d, ]+)\), order (\d)", text)
    with contextlib.suppress(KeyError):
        if found is not None:
            plan = Plan(tuple(found[1].split(" / ")), found[2], found[3] is not None)
            if plan in PLANS or plan in DEEP:
                return plan, tuple(int(stop) for stop in found[4].split(",") if stop.strip()), int(found[5])
    raise ValueError(f"{text!r} is no place: as a failure tells it, up to the order")
