# SPDX-License-Identifier: MIT
"""The life of one pass over a new dispatcher: start, load, drain, shutdown. Whatever hangs, it ends and says so."""

from __future__ import annotations

import faulthandler
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import tempo
from soak import interrupts
from soak.config import Config
from soak.load import Load

PATIENCE = 60.0  # seconds that a thread, a flush or a shutdown may take before it counts as hung
HURRY = 0.1  # seconds that a load lasts at least, even after an interrupt


class Crew:
    """Threads that begin together; an exception in one of them is kept in ``problems``."""

    def __init__(self) -> None:
        self.go = threading.Event()  # they wait for it
        self.trouble = threading.Event()  # set with the first problem, so that nobody waits the pass out
        self.expected: tuple[type[BaseException], ...] = ()  # what threads may raise once they were released
        self.problems: list[str] = []  # one line each; appended by any thread

    def start(self, name: str, work: Callable[..., object], *args: object) -> threading.Thread:
        """Start a daemon thread that calls ``work(*args)`` once ``go`` is set. Raises RuntimeError as Thread.start."""

        def run() -> None:
            self.go.wait()
            try:
                work(*args)
            except BaseException as error:  # a thread that ends in SystemExit has not done its work either
                if not isinstance(error, self.expected):
                    self.report(f"{name}: {describe(error)}")

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    def report(self, problem: str, hung: bool = False) -> None:
        """Keep a problem; ``hung``: write every thread's stack to stderr."""
        self.problems.append(problem)
        self.trouble.set()
        if hung:
            faulthandler.dump_traceback(all_threads=True)

    def call(self, function: Callable[..., Any], patience: float, **options: Any) -> tuple[Any, float]:
        """Call a function on a new thread; return its value (None after a problem) and its seconds.

        Its own timeout may be what is broken, so it is waited for ``patience`` seconds at most.
        """
        values: list[Any] = []
        name, started = function.__name__, time.perf_counter()
        thread = self.start(name, lambda: values.append(function(**options)))
        if join([thread], patience):
            self.report(f"{name} did not return within {patience:.0f} s", hung=True)
        return values[0] if values else None, time.perf_counter() - started


def describe(error: BaseException) -> str:
    """Return an exception in one line, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}{place}".split())


def join(threads: Iterable[threading.Thread], seconds: float) -> list[str]:
    """Wait at most ``seconds`` for all ``threads`` together; return the names of those still running."""
    deadline = time.monotonic() + seconds
    late = []
    for thread in threads:
        # In glances: an interrupt whose wake-up is lost is seen after one.
        while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            thread.join(min(interrupts.GLANCE, left))
        if thread.is_alive():
            late.append(thread.name)
    return late


@dataclass
class Outcome:
    """What a pass came to. Times in seconds; None: that did not come about."""

    load_seconds: float = 0.0  # from the start of all threads until the last producer stopped
    drain_seconds: float | None = None  # from there until everything accepted was delivered
    shutdown_seconds: float | None = None
    stats: tempo.Stats | None = None  # after shutdown
    problems: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.load_seconds + (self.drain_seconds or 0.0)

    def as_json(self) -> dict[str, object]:
        return {**vars(self), "stats": None if self.stats is None else self.stats._asdict()}


Sampler = Callable[[float, tempo.Stats], None]


def drive(config: Config, seconds: float, load: Load, sample: Sampler | None = None, every: float = 1.0) -> Outcome:
    """Run a load for ``seconds`` on a new dispatcher, drain it and shut it down.

    ``sample(elapsed, stats)`` is called in this thread about every ``every`` seconds and once after the end. Under
    ``interrupts.kept()`` the first interrupt ends the load early, and cuts each later one short. Any other
    KeyboardInterrupt is raised, after the threads were told to end.
    """
    seconds = min(HURRY, seconds) if interrupts.seen() else seconds
    outcome, crew, halt = Outcome(), Crew(), list[bool]()
    patience = PATIENCE + config.longest_drain
    dispatcher = tempo.Dispatcher(
        interval=config.interval, max_batch_bytes=config.max_batch_bytes, max_buffered_bytes=config.max_buffered_bytes
    )
    producers: list[threading.Thread] = []
    consumers: list[threading.Thread] = []

    def watch() -> None:
        """Wait until the load's end, sampling; return early when a thread failed, all is sent, or nothing moves."""
        deadline = started + seconds
        now = moved = started
        delivered, due = 0, started + every
        while now < deadline and not interrupts.wait(crew.trouble, max(0.0, min(due, deadline) - now)):
            now = time.perf_counter()
            if now < due:
                continue
            due = max(due + every, now)
            stats, _ = crew.call(dispatcher.stats, PATIENCE)
            if stats is None or not any(producer.is_alive() for producer in producers):
                return
            now = time.perf_counter()
            if sample is not None:
                sample(now - started, stats)
            if stats.delivered != delivered:
                delivered, moved = stats.delivered, now
            elif now - moved > patience:
                crew.report(f"nothing was delivered for {patience:.0f} s", hung=True)

    def stop() -> None:
        """Release every thread that still waits; what it then raises is no problem."""
        crew.expected = (tempo.Closed,)
        crew.call(dispatcher.stop, PATIENCE)

    try:
        for index in range(config.consumers):
            consumers.append(crew.start(f"consumer {index}", load.consume, index, dispatcher))
        for index in range(config.producers):
            producers.append(crew.start(f"producer {index}", load.produce, index, dispatcher, halt))
    except (RuntimeError, MemoryError) as error:
        crew.report(f"only {len(consumers)} consumers and {len(producers)} producers could be started: {error}")
    started = time.perf_counter()
    crew.go.set()
    try:
        watch()
    except interrupts.Interrupted:
        # An interrupt from before the load would leave nothing to judge.
        crew.trouble.wait(max(0.0, started + min(HURRY, seconds) - time.perf_counter()))
    except BaseException:
        halt.append(True)
        stop()
        raise
    halt.append(True)

    # After a problem nobody may be left to make room for producers that wait: then they are released by stop().
    if not crew.trouble.is_set() and (late := join(producers, patience)):
        crew.report(f"{len(late)} producers did not stop within {patience:.0f} s ({late[0]} first)", hung=True)
    stopped = time.perf_counter()
    outcome.load_seconds = stopped - started
    if not crew.trouble.is_set():
        flushed, _ = crew.call(dispatcher.flush, 2 * patience, timeout=patience)
        if flushed:
            outcome.drain_seconds = time.perf_counter() - stopped
        else:
            crew.report(f"flush() gave {flushed!r}: not all was delivered within {patience:.0f} s")
        _, outcome.shutdown_seconds = crew.call(dispatcher.shutdown, 2 * patience, timeout=patience)
    if crew.trouble.is_set():
        stop()
        if late := join(producers, PATIENCE):
            crew.report(f"{len(late)} producers kept running after stop() ({late[0]} first)")
    if late := join(consumers, patience):
        crew.report(f"{len(late)} consumers did not end within {patience:.0f} s ({late[0]} first)", hung=True)

    outcome.stats, _ = crew.call(dispatcher.stats, PATIENCE)
    if sample is not None and outcome.stats is not None:
        sample(time.perf_counter() - started, outcome.stats)
    outcome.problems = crew.problems
    return outcome
