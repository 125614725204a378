# SPDX-License-Identifier: MIT
"""Real threads that run one at a time, stop at a given bytecode of tempo's, and block where nobody else would.

The dispatcher gets locks and a clock from here, in place of `threading`'s and `time.monotonic`: so it is known at once
that a thread is blocked and by what, time passes only when there is nothing else to do, and each run can be repeated.
All else is tempo's own code in threads of its own.
"""

from __future__ import annotations

import contextlib
import dis
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType, ModuleType
from typing import Any

FOREVER = float("inf")
PATIENCE = 30.0
"""Seconds for which a thread may run, in real time, before it is taken to loop for ever."""

# Those that only move what no other thread can see. To stop before one of them is to stop before the next that is none.
_PRIVATE = (
    "CACHE", "COPY", "DUP", "EXTENDED_ARG", "IS_OP", "JUMP", "LOAD_CONST", "LOAD_FAST", "LOAD_GLOBAL", "LOAD_SMALL_INT",
    "NOP", "NOT_TAKEN", "POP_", "PRECALL", "PUSH_", "RESUME", "ROT_", "STORE_FAST", "SWAP", "TO_BOOL", "UNARY_NOT",
)  # fmt: skip


class Abandoned(BaseException):
    """Ends a thread whose run is over."""


class Stuck(Exception):
    """A thread neither ended nor blocked."""


def _closed() -> threading.Lock:
    """A binary semaphore that nobody has signalled yet: the quickest there is."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Actor:
    """A thread that makes one call at a time, as far as it is told to go."""

    def __init__(self) -> None:
        self.go = _closed()
        self.work: Callable[[], object] | None = None
        self.schedule: Schedule | None = None
        self.state = "idle"  # or "ready", "stopped" (at a bytecode), "blocked"
        self.lock: Lock | None = None  # by which it is blocked
        self.until = FOREVER  # when it goes on all the same
        self.error: BaseException | None = None
        self.left = 0  # bytecodes until it is to stop; 0: it does not
        self.steps = 0  # bytecodes passed while it counted them
        self.counts = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            self.go.acquire()
            work, schedule = self.work, self.schedule
            if work is None or schedule is None:
                return
            try:
                if self.counts:
                    # Before settrace: 3.12 looks only then whether anybody wants bytecodes.
                    sys._getframe().f_trace_opcodes = True
                    sys.settrace(schedule.trace)
                work()
            except BaseException as error:
                self.error = error
            finally:
                sys.settrace(None)
                del work
                self.state = "idle"
                schedule.turn.release()
                del schedule


_idle: list[Actor] = []  # actors of runs that are over, for later ones


def dismiss() -> None:
    """End the threads that are kept for later runs."""
    while _idle:
        actor = _idle.pop()
        actor.go.release()
        actor.thread.join(PATIENCE)


class Schedule:
    """Who runs when: one run's actors, locks and clock."""

    def __init__(self, module: ModuleType, private: bool = True) -> None:
        """module: tempo, or a copy. private: also stop before bytecodes of which other threads see nothing."""
        self.now = 1000.0
        self.turn = _closed()  # the controller's
        self.actors: list[Actor] = []
        self.over = False
        self._globals = module.__dict__
        self._private = private
        self._by_thread: dict[int, Actor] = {}
        self._made: list[Callable[[], RLock]] = []  # what tempo keeps locks by

    # -- What the dispatcher gets ------------------------------------------------------------------------------------

    def clock(self) -> float:
        return self.now

    def adopt(self, dispatcher: Any) -> None:
        """Give the dispatcher this schedule's clock and locks."""
        dispatcher._clock = self.clock
        dispatcher._new_lock = lambda: Lock(self)
        dispatcher._new_rlock = lambda: RLock(self)
        self._made.append(dispatcher._new_rlock)
        dispatcher._renew()

    # -- Actors ------------------------------------------------------------------------------------------------------

    def actor(self, work: Callable[[], object], counts: bool = False) -> Actor:
        """Make an actor for a call, which does not begin yet. counts: it can be stopped at a bytecode."""
        actor = _idle.pop() if _idle else Actor()
        actor.work, actor.schedule, actor.state, actor.error = work, self, "ready", None
        actor.lock, actor.until, actor.left, actor.steps, actor.counts = None, FOREVER, 0, 0, counts
        self.actors.append(actor)
        assert actor.thread.ident is not None
        self._by_thread[actor.thread.ident] = actor
        return actor

    def run(self, actor: Actor, steps: int = 0) -> str:
        """Let an actor go on until it ends, blocks, or has passed so many bytecodes (0: no limit); return its state."""
        if actor.state != "idle":
            actor.left = steps
            actor.go.release()
            if not self.turn.acquire(timeout=PATIENCE):
                raise Stuck(f"runs for {PATIENCE} s")
        return actor.state

    def ready(self, actor: Actor) -> bool:
        """Whether an actor can go on now."""
        return actor.state in ("ready", "stopped") or (actor.state == "blocked" and self.now >= actor.until)

    def settle(self, time_passes: bool = True) -> None:
        """Let all actors go on until none can; time passes when there is a deadline to wait for."""
        for _ in range(10_000):
            actor = next(filter(self.ready, self.actors), None)
            if actor is not None:
                self.run(actor)
                continue
            until = min((actor.until for actor in self.actors if actor.state == "blocked"), default=FOREVER)
            if until == FOREVER or not time_passes:
                return
            self.now = until
        raise Stuck("goes on for ever")

    def close(self) -> None:
        """End what is left of the actors."""
        self.over = True
        for actor in self.actors:
            for _ in range(100):
                if actor.state == "idle":
                    actor.work = actor.schedule = None
                    _idle.append(actor)
                    break
                with contextlib.suppress(Stuck):
                    self.run(actor)
        self.actors.clear()
        for made in self._made:  # nobody else makes locks by it again
            self._globals["_LOCKS"].pop((made, RLock), None)

    # -- In an actor's thread ----------------------------------------------------------------------------------------

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_globals is not self._globals:
            return None
        frame.f_trace = self._local  # before the next line: 3.13 looks only then whether there is one
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._local

    def _local(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            if not self._private and not _visible(frame.f_code)[frame.f_lasti]:
                return self._local
            actor = self._by_thread[threading.get_ident()]
            actor.steps += 1
            if actor.left:
                actor.left -= 1
                if not actor.left:
                    self._pause(actor, "stopped")
        return self._local

    def _pause(self, actor: Actor, state: str) -> None:
        """Give the turn back to the controller, until it comes again."""
        actor.state = state
        self.turn.release()
        actor.go.acquire()
        actor.state = "ready"
        if self.over:
            raise Abandoned

    def block(self, lock: Lock, until: float) -> None:
        """Wait in this actor for a lock that another has."""
        actor = self._by_thread.get(threading.get_ident())
        if actor is None:
            raise Stuck("the controller itself would block")
        if self.over:
            raise Abandoned
        actor.lock, actor.until = lock, until
        self._pause(actor, "blocked")
        actor.lock, actor.until = None, FOREVER

    def released(self, lock: Lock) -> None:
        """Those who wait for the lock can try again."""
        for actor in self.actors:
            if actor.lock is lock and actor.state == "blocked":
                actor.state = "ready"


class Lock:
    """As threading.Lock."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        until = FOREVER if timeout < 0 else self._schedule.now + timeout
        while self._held:
            if not blocking or self._schedule.now >= until:
                return False
            self._schedule.block(self, until)
        self._held = True
        return True

    def release(self) -> None:
        if not self._held:
            raise RuntimeError("release unlocked lock")
        self._held = False
        self._schedule.released(self)


class RLock(Lock):
    """As threading.RLock."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self._owner = 0
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = threading.get_ident()
        if self._owner != me:
            if not super().acquire(blocking, timeout):
                return False
            self._owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        if self._owner != threading.get_ident():
            raise RuntimeError("cannot release un-acquired lock")
        self._depth -= 1
        if not self._depth:
            self._owner = 0
            super().release()

    def _recursion_count(self) -> int:
        return self._depth if self._owner == threading.get_ident() else 0

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


_seen: dict[CodeType, list[bool]] = {}


def _visible(code: CodeType) -> list[bool]:
    """By offset in the code: whether the instruction does anything that other threads may see, or see to."""
    if code not in _seen:
        flags = [True] * len(code.co_code)
        for instruction in dis.get_instructions(code):
            flags[instruction.offset] = not instruction.opname.startswith(_PRIVATE)
        _seen[code] = flags
    return _seen[code]
