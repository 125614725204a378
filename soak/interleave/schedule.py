# SPDX-License-Identifier: MIT
"""Real threads that run one at a time, stop at a given bytecode of tempo's, and block where nobody else would.

A schedule loads tempo (or a broken twin) with a lock and a clock of its own: CPython's pure-Python RLock and Condition,
built on that lock, and `time.monotonic` stand in for the real ones. So it knows at once that a thread blocks, time
passes only when nothing else can, and runs can be repeated.
"""

from __future__ import annotations

import asyncio
import dis
import inspect
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any
from unittest import mock

SOURCE = Path(__file__).resolve().parents[2] / "tempo.py"
FOREVER = float("inf")
PATIENCE = 20.0
"""Real seconds for which a thread may run before it counts as one that loops for ever."""


class Abandoned(BaseException):
    """Ends a thread whose run is over."""


class Stuck(Exception):
    """A thread neither ended nor blocked."""


def closed_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


class Actor(threading.Thread):
    """A thread of a schedule's that makes one call, as far as it is told to go."""

    def __init__(self, schedule: Schedule, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.schedule, self.work = schedule, work
        schedule.actors.append(self)
        self.turn = closed_lock()
        self.state = "ready"  # or "stopped" (at a bytecode), "blocked", "ended"
        self.waits_for: object = None
        self.until = FOREVER  # when it goes on all the same
        self.error: BaseException | None = None
        self.steps = self.stop_at = 0  # bytecodes passed; where to stop (0: nowhere)
        self.nested: Callable[[], object] | None = None  # to be done there instead
        self.start()

    def run(self) -> None:
        self.turn.acquire()
        try:
            if self.stop_at:
                sys.settrace(self.schedule.trace)
            self.work()
        except BaseException as error:
            self.error = error
        finally:
            sys.settrace(None)
            self.state = "ended"
            self.schedule.turn.release()


class Schedule:
    """Loads a tempo, and decides which of its threads runs when."""

    def __init__(self, source: str | None = None) -> None:
        """source: the text of a tempo.py; else the one of this repository."""
        self.now = 1000.0
        self.turn = closed_lock()  # the controller's
        self.actors: list[Actor] = []
        self.by_line = False  # stops are counted in lines, not in bytecodes
        self.at_signals = False  # or only in those before which the interpreter looks for signals
        self.returned = False
        self.over = False
        __import__("tempo")  # so that what it imports is there, with the real threading
        threads, clock, self.module = ModuleType("threading"), ModuleType("time"), ModuleType("tempo_in_a_schedule")
        vars(threads).update(vars(threading), _allocate_lock=partial(Lock, self))
        exec("".join(map(inspect.getsource, (threading._RLock, threading.Condition))), vars(threads))
        vars(threads).update(RLock=vars(threads)["_RLock"])
        vars(clock).update(vars(time), monotonic=lambda: self.now)
        modules = {"threading": threads, "time": clock, self.module.__name__: self.module}
        with mock.patch.dict(sys.modules, modules), mock.patch("atexit.register"), mock.patch("os.register_at_fork"):
            exec(compile(source or SOURCE.read_text(encoding="utf-8"), str(SOURCE), "exec"), vars(self.module))

    def run(self, actor: Actor, stop_at: int = 0) -> str:
        """Let an actor go on until it ends, blocks, or has passed so many bytecodes (0: no limit); return its state."""
        if actor.state != "ended":
            actor.stop_at = stop_at
            actor.turn.release()
            if not self.turn.acquire(timeout=PATIENCE):
                raise Stuck(f"a thread runs for {PATIENCE} s")
        return actor.state

    def ready(self, actor: Actor) -> bool:
        """Whether an actor can go on now."""
        return actor.state in ("ready", "stopped") or (actor.state == "blocked" and self.now >= actor.until)

    def settle(self, seconds: float = 0.0) -> None:
        """Let all actors go on until none can; then let the time pass, from deadline to deadline."""
        end = self.now + seconds
        for _ in range(10_000):
            actor = next(filter(self.ready, self.actors), None)
            if actor is not None:
                self.run(actor)
            elif self.now < end:
                self.now = min([end, *(actor.until for actor in self.actors if actor.state == "blocked")])
            else:
                return
        raise Stuck("goes on for ever")

    def close(self) -> None:
        """End what is left of the run."""
        self.over = True
        for actor in self.actors:
            while self.run(actor) != "ended":  # a `finally` may block once more
                pass
            actor.join(PATIENCE)
        self.actors.clear()
        self.over = False

    # -- In an actor's thread ----------------------------------------------------------------------------------------

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_globals is not vars(self.module):
            return None
        frame.f_trace = self._local  # before the next line: 3.13 looks only then whether there is one
        frame.f_trace_opcodes, frame.f_trace_lines = not self.by_line, self.by_line
        return self._local

    def _local(self, frame: FrameType, event: str, arg: object) -> Any:
        returned, self.returned = self.returned, event == "return"  # behind a call of Python code it does not look
        passed = not self.at_signals or (not returned and frame.f_lasti in signal_points(frame.f_code))
        if event in ("opcode", "line") and passed:
            self.point()
        return self._local

    def point(self) -> None:
        """Stop here, or make the nested call, when the actor has passed as many bytecodes as it should."""
        actor = threading.current_thread()
        assert isinstance(actor, Actor), "the controller itself would block"
        actor.steps += 1
        if actor.steps == actor.stop_at:
            if actor.nested is None:
                self.pause(actor, "stopped")
            else:
                actor.nested()

    def pause(self, actor: Actor, state: str, waits_for: object = None, until: float = FOREVER) -> None:
        """Give the turn back to the controller until it comes again."""
        if not self.over:
            actor.state, actor.waits_for, actor.until = state, waits_for, until
            self.turn.release()
            actor.turn.acquire()
            actor.state = "ready"
        if self.over:
            raise Abandoned

    def block(self, key: object, until: float) -> None:
        """Wait in this actor until `wake(key)`, or until that time."""
        actor = threading.current_thread()
        assert isinstance(actor, Actor), "the controller itself would block"
        self.pause(actor, "blocked", key, until)

    def wake(self, key: object) -> None:
        """Let those go on that wait for key."""
        for actor in self.actors:
            if actor.waits_for is key and actor.state == "blocked":
                actor.state = "ready"


class Lock:
    """As threading.Lock. A wait for it is one more point at which a call can be stopped or interrupted."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        schedule = self._schedule
        until = schedule.now if not blocking else FOREVER if timeout < 0 else schedule.now + timeout
        if self._held and schedule.now < until:
            schedule.point()
        while self._held:
            if schedule.now >= until:
                return False
            schedule.block(self, until)
        self._held = True
        return True

    def release(self) -> None:
        self._held = False
        self._schedule.wake(self)


class Loop(asyncio.BaseEventLoop):
    """An event loop on a schedule's clock that watches no files: where it would select, its actor blocks."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self._schedule = schedule
        self._selector = self
        self._woken = False

    def time(self) -> float:
        return self._schedule.now

    def select(self, timeout: float | None) -> list[object]:
        if timeout != 0 and not self._woken:
            self._schedule.block(self, FOREVER if timeout is None else self.time() + timeout)
        self._woken = False
        return []

    def _process_events(self, events: list[object]) -> None:
        pass

    def _write_to_self(self) -> None:
        self._woken = True
        self._schedule.wake(self)


@cache
def signal_points(code: CodeType) -> set[int]:
    """Return the offsets of bytecodes before which CPython looks for signals: behind calls, and at the beginning."""
    every = list(dis.get_instructions(code))
    return {after.offset for one, after in pairwise(every) if one.opname.startswith(("CALL", "RESUME"))}
