# SPDX-License-Identifier: MIT
"""Threads whose errors are kept, and waits that always end."""

from __future__ import annotations

import faulthandler
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds that a thread, a flush or a shutdown may take before it counts as hung."""


class Crew:
    """The threads of one pass. They wait for ``go``, and an exception in one of them is kept in ``problems``."""

    def __init__(self) -> None:
        self.go = threading.Event()
        # Set as soon as one thread failed, so that whoever waits for the pass's end need not wait it out.
        self.trouble = threading.Event()
        # What threads may raise without it being a problem: what they were released with, after the first problem.
        self.expected: tuple[type[BaseException], ...] = ()
        # One line each. Appended by the threads (list.append is atomic), read by the main thread.
        self.problems: list[str] = []

    def start(self, name: str, work: Callable[..., None], *args: object) -> threading.Thread:
        """Start a daemon thread that calls ``work(*args)`` once ``go`` is set. Raises RuntimeError as Thread.start."""
        thread = threading.Thread(target=self._guard, args=(name, work, args), name=name, daemon=True)
        thread.start()
        return thread

    def _guard(self, name: str, work: Callable[..., None], args: tuple[object, ...]) -> None:
        self.go.wait()
        try:
            work(*args)
        except BaseException as error:  # a thread that ends in SystemExit or MemoryError has not done its work either
            if not isinstance(error, self.expected):
                self.report(f"{name}: {describe(error)}")

    def report(self, problem: str) -> None:
        """Keep a problem; the pass it belongs to has failed."""
        self.problems.append(problem)
        self.trouble.set()


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
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            late.append(thread.name)
    return late


def dump_stacks() -> None:
    """Write every thread's stack to stderr: what hung, and where."""
    faulthandler.dump_traceback(all_threads=True)


class Call(Generic[T]):
    """A call of ``function`` on a thread of its own, waited for at most ``patience`` seconds.

    Its own timeout may be what is broken, so it is not relied on. ``seconds`` is how long the call itself took;
    ``problem`` is None, or one line.
    """

    def __init__(self, name: str, function: Callable[..., T], patience: float, **options: Any) -> None:
        self.value: T | None = None
        self.seconds = 0.0
        self.problem: str | None = None
        thread = threading.Thread(target=self._call, args=(name, function, options), name=name, daemon=True)
        started = time.perf_counter()
        thread.start()
        if join([thread], patience):
            self.seconds = time.perf_counter() - started
            self.problem = f"{name} did not return within {patience:.0f} s"
            dump_stacks()

    def _call(self, name: str, function: Callable[..., T], options: dict[str, Any]) -> None:
        started = time.perf_counter()
        try:
            self.value = function(**options)
        except BaseException as error:
            self.problem = f"{name}: {describe(error)}"
        self.seconds = time.perf_counter() - started
