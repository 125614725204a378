# SPDX-License-Identifier: MIT
"""The life of one pass over a fresh dispatcher: start, load, drain, shutdown. Whatever hangs, it ends, and says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import tempo
from soak import interrupts
from soak.config import Config
from soak.crew import PATIENCE, Call, Crew, dump_stacks, join

HURRY = 0.1
"""Seconds that a load lasts at least, after an interrupt too."""


class Work(Protocol):
    """What the threads of a pass do. ``halt`` is empty until producers shall stop; they look at it now and then."""

    def produce(self, index: int, dispatcher: tempo.Dispatcher, halt: list[bool]) -> None:
        """Send until ``halt`` holds something, or until all is sent: when no producer is left, the load is over."""

    def consume(self, index: int, dispatcher: tempo.Dispatcher) -> None:
        """Receive until the dispatcher is drained."""


@dataclass
class Outcome:
    """What a pass came to. Times in seconds."""

    load_seconds: float = 0.0
    """From the start of all threads until the last producer had stopped."""
    drain_seconds: float | None = None
    """From there until everything accepted was delivered; None when that did not come about."""
    shutdown_seconds: float | None = None
    stats: tempo.Stats | None = None
    """The dispatcher's own account after shutdown; None when it does not answer."""
    interrupted: bool = False
    problems: list[str] = field(default_factory=list)


Sampler = Callable[[float, tempo.Stats], None]


def drive(config: Config, seconds: float, work: Work, sample: Sampler | None = None, every: float = 1.0) -> Outcome:
    """Run ``work`` for ``seconds`` on a new dispatcher, then drain it and shut it down.

    ``sample(elapsed, stats)`` is called in this thread about each ``every`` seconds and once after the end. Under
    ``interrupts.kept()`` the first interrupt ends the load early, and is pending when it comes as that drains. Any
    KeyboardInterrupt else is raised; during the load, its threads are told to end.
    """
    outcome = Outcome()
    patience = PATIENCE + config.longest_drain
    crew = Crew()
    halt: list[bool] = []
    dispatcher = tempo.Dispatcher(
        interval=config.interval,
        max_batch_bytes=config.max_batch_bytes,
        max_buffered_bytes=config.max_buffered_bytes,
    )
    producers: list[threading.Thread] = []
    consumers: list[threading.Thread] = []
    try:
        for index in range(config.consumers):
            consumers.append(crew.start(f"consumer {index}", work.consume, index, dispatcher))
        for index in range(config.producers):
            producers.append(crew.start(f"producer {index}", work.produce, index, dispatcher, halt))
    except (RuntimeError, MemoryError) as error:
        crew.report(f"only {len(consumers)} consumers and {len(producers)} producers could be started: {error}")

    started = time.perf_counter()
    crew.go.set()
    try:
        _wait(crew, producers, dispatcher, started, seconds, patience, sample, every)
    except interrupts.Interrupted:
        outcome.interrupted = True
        # One that came before the load did would leave nothing to judge.
        crew.trouble.wait(max(0.0, started + min(HURRY, seconds) - time.perf_counter()))
    except BaseException:
        halt.append(True)
        _stop(dispatcher, crew)
        raise
    halt.append(True)

    # After a problem nobody may be left to make room for producers that wait: stop() below releases them.
    late = join(producers, 2.0 if crew.trouble.is_set() else patience)
    stopped = time.perf_counter()
    outcome.load_seconds = stopped - started
    if late and not crew.trouble.is_set():
        crew.report(f"{len(late)} producers did not stop within {patience:.0f} s ({late[0]} first)")
        dump_stacks()
    if late or not any(consumer.is_alive() for consumer in consumers):
        _stop(dispatcher, crew)
        late = join(producers, PATIENCE)
        if late:
            crew.report(f"{len(late)} producers kept running after stop() ({late[0]} first)")
    else:
        flush = Call("flush", dispatcher.flush, 2 * patience, timeout=patience)
        if flush.value:
            outcome.drain_seconds = time.perf_counter() - stopped
        else:
            crew.report(flush.problem or f"flush() gave {flush.value!r}: not all was delivered within {patience:.0f} s")
        shutdown = Call("shutdown", dispatcher.shutdown, 2 * patience, timeout=patience)
        outcome.shutdown_seconds = shutdown.seconds
        if shutdown.problem is not None:
            crew.report(shutdown.problem)
            _stop(dispatcher, crew)
    late = join(consumers, patience)
    if late:
        crew.report(f"{len(late)} consumers did not end within {patience:.0f} s after shutdown ({late[0]} first)")
        dump_stacks()

    stats = Call("stats", dispatcher.stats, PATIENCE)
    if stats.problem is not None:
        crew.report(stats.problem)
    outcome.stats = stats.value
    if sample is not None and stats.value is not None:
        sample(time.perf_counter() - started, stats.value)
    outcome.problems = crew.problems
    return outcome


def _wait(
    crew: Crew,
    producers: list[threading.Thread],
    dispatcher: tempo.Dispatcher,
    started: float,
    seconds: float,
    patience: float,
    sample: Sampler | None,
    every: float,
) -> None:
    """Wait until the load's end, sampling; return early when a thread failed, all is sent, or nothing moves."""
    deadline = started + seconds
    now = moved = started
    delivered = 0
    due = started + every
    while now < deadline and not interrupts.wait(crew.trouble, max(0.0, min(due, deadline) - now)):
        now = time.perf_counter()
        if now >= due:
            due = max(due + every, now)
            if not any(producer.is_alive() for producer in producers):
                return
            snapshot = Call("stats", dispatcher.stats, PATIENCE)
            now = time.perf_counter()
            if snapshot.value is None:
                crew.report(snapshot.problem or "stats() gave None")
                return
            if sample is not None:
                sample(now - started, snapshot.value)
            if snapshot.value.delivered != delivered:
                delivered, moved = snapshot.value.delivered, now
            elif now - moved > patience:
                crew.report(f"nothing was delivered for {patience:.0f} s")
                dump_stacks()


def _stop(dispatcher: tempo.Dispatcher, crew: Crew) -> None:
    """Release every thread that still waits; that they then raise is no problem of its own."""
    crew.expected = (tempo.Closed,)
    stop = Call("stop", dispatcher.stop, PATIENCE)
    if stop.problem is not None:
        crew.report(stop.problem)
