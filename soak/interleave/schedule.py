# SPDX-License-Identifier: MIT
"""Real threads that run one at a time, stop at a given bytecode of tempo's, and block where nobody else would.

A schedule loads tempo (or a broken twin) with its own lock, on which CPython's pure-Python RLock and Condition stand,
and its own clock. So it knows at once that a thread blocks, time passes only when nothing else can, and runs repeat.
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
from typing import Any, cast
from unittest import mock

SOURCE = Path(__file__).resolve().parents[2] / "tempo.py"
FOREVER = float("inf")
PATIENCE = 20.0  # real seconds for which a thread may run before it counts as one that loops for ever


class Actor(threading.Thread):
    """A thread of a schedule's that makes one call, as far as it is told to go."""

    def __init__(self, schedule: Schedule, name: str, work: Callable[[], object]) -> None:
        super().__init__(name=name, daemon=True)
        self.schedule, self.work, self.turn = schedule, work, threading.Lock()
        self.turn.acquire()
        self.state = "ready"  # or "blocked", "ended"
        self.lock: Lock | None = None  # that it waits for,
        self.until = FOREVER  # and when it goes on all the same
        self.error: BaseException | None = None
        self.steps = self.stop_at = 0  # bytecodes passed; where to stop (0: nowhere)
        self.nested: Callable[[], object] | None = None  # to be done there instead
        schedule.actors.append(self)
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

    def ready(self) -> bool:
        free = self.lock is None or not self.lock.held or self.schedule.now >= self.until
        return self.state == "ready" or (self.state == "blocked" and free)


class Schedule:
    """Loads a tempo (source: its text; None: this repository's), and decides which of its threads runs when."""

    def __init__(self, source: str | None = None) -> None:
        self.now = 1000.0
        self.turn = threading.Lock()  # the controller's
        self.turn.acquire()
        self.actors: list[Actor] = []
        self.by_line = False  # stops are counted in lines, not in bytecodes
        self.nested = ""  # what is called in a call: only where a signal handler or a finalizer may run
        self.returned = self.over = False
        __import__("tempo")  # so that what it imports is there, with the real threading
        threads, clock, self.module = ModuleType("threading"), ModuleType("time"), ModuleType("tempo_in_a_schedule")
        vars(threads).update(vars(threading), _allocate_lock=partial(Lock, self))
        sources = map(inspect.getsource, (threading._RLock, threading.Condition))
        exec("".join([*sources, "RLock = _RLock"]), vars(threads))
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
                raise RuntimeError(f"a thread runs for {PATIENCE} s")
        return actor.state

    def settle(self, seconds: float = 0.0) -> None:
        """Let all actors go on until none can; then let the time pass, from deadline to deadline."""
        end = self.now + seconds
        for _ in range(10_000):
            actor = next(filter(Actor.ready, self.actors), None)
            if actor is not None:
                self.run(actor)
            elif self.now < end:
                self.now = min([end, *(actor.until for actor in self.actors if actor.state == "blocked")])
            else:
                return
        raise RuntimeError("goes on for ever")

    def close(self) -> None:
        """End what is left of the run."""
        self.over = True
        for actor in self.actors:
            while self.run(actor) != "ended":  # a `finally` may block once more
                pass
            actor.join(PATIENCE)
        self.actors.clear()
        self.over = False

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_globals is not vars(self.module):
            return None
        frame.f_trace = self._local  # before the next line: 3.13 looks only then whether there is one
        frame.f_trace_opcodes, frame.f_trace_lines = not self.by_line, self.by_line
        return self._local

    def _local(self, frame: FrameType, event: str, arg: object) -> Any:
        behind, self.returned = self.returned, event == "return"
        if self.nested == "interrupt":  # behind a call of Python code CPython 3.11 does not look for signals
            passed = not behind and frame.f_lasti in points(frame.f_code, ("CALL", "RESUME"))
        else:
            passed = not self.nested or frame.f_lasti in points(frame.f_code, LOOKS)
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
                self.pause()
            else:
                actor.nested()

    def pause(self, lock: Lock | None = None, until: float = FOREVER) -> None:
        """Give the turn back to the controller until it comes again; end the thread when the run is over."""
        actor = cast(Actor, threading.current_thread())
        if not self.over:
            actor.state, actor.lock, actor.until = "blocked" if lock else "ready", lock, until
            self.turn.release()
            actor.turn.acquire()
            actor.state = "ready"
        if self.over:
            raise SystemExit


class Lock:
    """As threading.Lock. A wait for it is one more point at which a call can be stopped or interrupted."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule, self.held = schedule, False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        schedule = self._schedule
        until = schedule.now if not blocking else FOREVER if timeout < 0 else schedule.now + timeout
        if self.held and schedule.now < until:
            schedule.point()
        while self.held:
            if schedule.now >= until:
                return False
            schedule.pause(self, until)
        self.held = True
        return True

    def release(self) -> None:
        self.held = False


class Loop(asyncio.BaseEventLoop):
    """An event loop on a schedule's clock that watches no files: where it would select, its actor blocks."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self._selector, self._idle, self._schedule = self, Lock(schedule), schedule
        self._write_to_self = self._idle.release
        self._idle.acquire()

    def time(self) -> float:
        return self._schedule.now

    def select(self, timeout: float | None) -> list[object]:
        self._idle.acquire(timeout != 0, -1 if timeout is None else timeout)
        return []

    def _process_events(self, events: list[object]) -> None:
        pass


LOOKS = ("CALL", "RESUME", "JUMP_BACKWARD", "FOR_ITER", "BUILD", "LIST", "UNPACK")


@cache
def points(code: CodeType, looks: tuple[str, ...]) -> set[int]:
    """Return the offsets behind bytecodes where CPython may look for signals or collect: never between stores."""
    pairs = pairwise(dis.get_instructions(code))
    return {after.offset for one, after in pairs if one.opname.startswith(looks)}
