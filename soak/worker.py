# SPDX-License-Identifier: MIT
"""One round of one group of the benchmark, in a process of its own; its result is JSON on standard output.

The subjects of a group take turns, so that what disturbs the machine disturbs all of them alike.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from time import perf_counter

import tempo
from soak import handover, heap, micro
from soak.calibration import calibrate
from soak.config import Config
from soak.crew import PATIENCE, join
from soak.drive import drive
from soak.load import Load
from soak.rows import BARE, FIRST, SCALING, SOAKS
from soak.units import MIB

MICRO_TURNS = 20
HANDOVER_TURNS = 3
SOAK_TURNS = 3
FLUSHES = 200
FLUSH_INTERVAL = 0.01

Values = dict[str, list[float]]


def _in_turns(subjects: dict[str, Callable[[], float]], turns: int) -> Values:
    """Measure all subjects, ``turns`` times, each time beginning with another."""
    names = list(subjects)
    values: Values = {name: [] for name in names}
    for turn in range(turns + 1):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            value = subjects[name]()
            if turn:  # the first one warms up
                values[name].append(value)
    return values


def run_micro(seconds: float) -> Values:
    """One thread: what a call costs."""
    return _in_turns(micro.subjects(), MICRO_TURNS)


def run_handover(seconds: float) -> Values:
    """Thread to thread, with the peers that are installed."""
    subjects = handover.subjects()
    for name, (package, make) in handover.PEERS.items():
        try:
            subjects[name] = make()
        except ImportError:
            print(f"{name} is left out: {package} is not installed", file=sys.stderr)
    return _in_turns(subjects, HANDOVER_TURNS)


def soak(name: str, config: Config, seconds: float, turns: int = SOAK_TURNS) -> Values:
    """The soak between two halves of its calibration, some times. Raises AssertionError when anything went wrong."""
    values: Values = {name: [], name + BARE: []}
    for key in ("_drain", "_shutdown", "_slowest"):
        values[name + key] = []
    for turn in range(turns):
        before = calibrate(config, seconds / 2)
        load = Load(config)
        outcome = drive(config, seconds, load)
        after = calibrate(config, seconds / 2)
        delivered = sum(taken.events for taken in load.taken)
        assert not outcome.problems, outcome.problems[0]
        assert delivered == sum(load.accepted) > 0, f"{delivered} delivered, {sum(load.accepted)} accepted"
        assert not sum(load.refused), f"{sum(load.refused)} refused"
        assert not sum(taken.out_of_order for taken in load.taken)
        assert outcome.drain_seconds is not None
        assert outcome.shutdown_seconds is not None
        if not turn and turns > 1:
            continue  # warms up
        values[name].append((outcome.load_seconds + outcome.drain_seconds) / delivered)
        values[name + BARE].append(2 / (before.events_per_second + after.events_per_second))
        values[name + "_drain"].append(outcome.drain_seconds)
        values[name + "_shutdown"].append(outcome.shutdown_seconds)
        values[name + "_slowest"].append(min(load.accepted) * config.producers / delivered)
    return values


def run_heap(seconds: float) -> Values:
    """The peak of the traced heap in the first soak: the dispatcher, its producers and consumer, and the harness."""
    measured = heap.measure(SOAKS[FIRST][1], 2 * seconds)
    if measured.peak is None:
        print("heap is left out: this interpreter has no tracemalloc", file=sys.stderr)
        return {}
    assert not measured.outcome.problems, measured.outcome.problems[0]
    assert measured.peak_buffered > MIB, "the buffer was never half full"
    return {"heap": [float(measured.peak)]}


def run_flush(seconds: float) -> Values:
    """How much later than its interval a lone payload reaches a consumer that waits, at the 99th percentile."""
    dispatcher = tempo.Dispatcher(interval=FLUSH_INTERVAL, max_buffered_bytes=MIB)
    arrived: list[float] = []
    ready = threading.Semaphore(0)

    def consume() -> None:
        for _ in dispatcher:
            arrived.append(perf_counter())
            ready.release()

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    late = []
    for i in range(FLUSHES):
        while dispatcher.stats().waiting_consumers == 0:
            ready.acquire(timeout=0.0001)
        sent = perf_counter()
        dispatcher.enqueue(b"event %d" % i)
        assert ready.acquire(timeout=PATIENCE), "the interval did not flush"
        late.append(arrived[-1] - sent - FLUSH_INTERVAL)
    dispatcher.shutdown()
    assert not join([consumer], PATIENCE)
    assert len(arrived) == FLUSHES
    late.sort()
    return {"flush_p99": [max(0.0, late[FLUSHES * 99 // 100])]}


def run_pi(seconds: float) -> Values:
    """The rate of the first soak, without a comparison: for an interpreter that runs under an emulator."""
    load = Load(SOAKS[FIRST][1])
    outcome = drive(SOAKS[FIRST][1], seconds, load)
    delivered = sum(taken.events for taken in load.taken)
    assert not outcome.problems, outcome.problems[0]
    assert delivered == sum(load.accepted) > 0
    assert outcome.drain_seconds is not None
    return {"pi": [delivered / (outcome.load_seconds + outcome.drain_seconds)]}


def run_scaling(seconds: float) -> Values:
    """The soak at many sizes, each once."""
    values: Values = {}
    for name, (_, config) in SCALING.items():
        print(name, file=sys.stderr, flush=True)
        found = soak(name, config, seconds, turns=1)
        values.update({key: found[key] for key in (name, name + BARE)})
    return values


def main(group: str, seconds: float) -> int:
    """Measure one group and print its values, in seconds a payload if nothing else is said."""
    if group in SOAKS:
        values = soak(group, SOAKS[group][1], seconds)
    else:
        values = {
            "micro": run_micro,
            "handover": run_handover,
            "heap": run_heap,
            "flush": run_flush,
            "pi": run_pi,
            "scaling": run_scaling,
        }[group](seconds)
    json.dump(values, sys.stdout)
    return 0
