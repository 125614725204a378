# SPDX-License-Identifier: MIT
# ruff: noqa: B023 - functions that are made in a loop are called in the same turn of it
"""The specification of tempo.py: a section for each row of its contract, then one for each behaviour.

A test's name starts with its subject, so that `pytest -k flush` selects what is about flush. Nothing sleeps to wait: a
test waits for a state that `stats()` shows, or for an event, with a limit.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import copy
import doctest
import functools
import gc
import inspect
import itertools
import os
import pickle
import queue
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import typing
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as play

import tempo

ROOT = Path(tempo.__file__).resolve().parent
LONG = 3600.0  # seconds: an interval that does not end within a test
CPYTHON = sys.implementation.name == "cpython"
LIMIT = float(os.environ.get("TEST_LIMIT", "30"))  # seconds that a test waits for something that must come
INF, NAN = float("inf"), float("nan")
SMALL = 100  # bytes: a buffer in which every payload is counted under the lock
LARGE = 64 * tempo.KiB  # bytes: a buffer in which small payloads are accepted without it

each = pytest.mark.parametrize
LIMITS = each("limit", [SMALL, LARGE])
PRODUCERS = each("how", ["enqueue", "enqueue_many", "aenqueue"])
CONSUMERS = each("way", ["get", "batches", "async for"])
FLUSHES = each("how", ["flush", "aflush"])
SHUTDOWNS = each("how", ["shutdown", "ashutdown"])
ENDS = each("end", ["shutdown", "ashutdown", "stop"])


# Helpers


class inside:  # noqa: N801 - a namespace
    """All that the tests touch of tempo's inside."""

    @staticmethod
    def buffer(d: tempo.Dispatcher) -> tempo._Buffer:
        return d._buffer

    @classmethod
    def check(cls, dispatcher: tempo.Dispatcher) -> None:
        """Assert the invariants of tempo's theory of operation, by the numbers they have there."""
        balanced(dispatcher)  # I5, in a section, which makes good what an exception has left
        buffer, mutex = dispatcher._buffer, dispatcher._mutex
        assert mutex
        with mutex.lock:
            cls.check_buffer(buffer, told=not dispatcher._consumers)
            assert not buffer.run.places or not (dispatcher._line or buffer.pressed), "I4"

    @staticmethod
    def check_buffer(buffer: tempo._Buffer, told: bool = True) -> None:
        """The same of a buffer alone. told: no consumer waits that nobody has called, so credit may cross batches."""
        run, taken = buffer.run, buffer.taken
        held, opened, pending = run.charge - taken.charge, run.charge - run.base, run.items - run.first
        assert 0 <= held <= buffer.peak <= buffer.max_buffered, "I1"

        # All that was counted and not removed is there, cut into batches; what is taken ends where one of these does.
        assert run.before is None
        origin, ends = buffer.origin, list(itertools.accumulate(buffer.batches, initial=buffer.origin.items))
        assert origin.items <= taken.items <= run.first <= run.items == origin.items + len(buffer.sizes), "I2"
        assert all(buffer.batches) and ends[taken.batches - origin.batches] == taken.items, "I2"
        assert origin.charge + sum(max(1, size) for size in buffer.sizes) == run.charge, "I2"
        assert sum(map(len, buffer.pieces)) == origin.offset + sum(buffer.sizes), "I2"
        gone = buffer.pieces[: taken.pieces - origin.pieces], buffer.sizes[: taken.items - origin.items]
        assert sum(map(len, gone[0])) + taken.offset == origin.offset + sum(gone[1]), "I2"

        # The open batch begins where another ends, is below its limit, and is due only if it has a payload.
        assert run.first == ends[-1], "I4"
        assert (run.due == INF) == (not pending), "I4"
        assert not pending or opened < (buffer.max_batch or INF), "I4"
        if run.places:
            covered = run.places * run.covers
            assert covered <= buffer.max_buffered // 8 + 64 * tempo.KiB, "I4"
            assert run.places == run.granted and pending and held + covered <= buffer.max_buffered, "I3"
            assert told or opened + covered < (buffer.max_batch or INF), "I4"
            assert told or pending + run.places < (buffer.max_items or INF), "I4"

    @staticmethod
    def set_clock(clock: Callable[[], float] = tempo._monotonic) -> None:
        """Let tempo read another clock, or its own again."""
        tempo._monotonic = clock

    @staticmethod
    def locked(d: tempo.Dispatcher) -> bool:
        """Whether another thread has tempo's lock just now."""
        free = not d._mutex or d._mutex.lock.acquire(blocking=False)
        d._mutex.lock.release() if d._mutex and free else None
        return not free

    @staticmethod
    def mine() -> bool:
        """Whether this thread has it."""
        return any(mutex.held() for mutex in tempo._MUTEXES.values())

    @classmethod
    def in_section(cls, do: Callable[[], object]) -> None:
        """Do something in the middle of each thread's next section, as a signal handler or a finalizer may."""
        done: set[int] = set()

        def clock() -> float:
            if cls.mine() and threading.get_ident() not in done:  # a section begins with a look at the clock
                done.add(threading.get_ident())
                do()
            return time.monotonic()

        cls.set_clock(clock)

    @staticmethod
    def before_the_append(do: Callable[[], object]) -> None:
        """Do something once a list is found to fit into the credit, before it is appended there without the lock."""

        def smallest(*sizes: Any) -> Any:
            vars(tempo).pop("min", None)
            do()
            return min(*sizes)

        vars(tempo)["min"] = smallest

    @staticmethod
    def after_a_look_at_a_loop(patch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
        """Do something each time that a call has read who is in a loop over batches."""
        user = property(lambda loop: (vars(loop)["_user"], do())[0], lambda loop, new: vars(loop).update(_user=new))
        patch.setattr(tempo._Batches, "_user", user, raising=False)

    @staticmethod
    def resting(d: tempo.Dispatcher) -> list[bytes]:
        """The accepted payloads whose producers wait for their turn to return."""
        return [waiter.data for waiter in d._resting]

    @staticmethod
    def look_up(seconds: float = tempo._LOOK_UP) -> None:
        """How soon a thread that waits looks without a wake-up, which it needs only where signal handlers run."""
        vars(tempo).update(_LOOK_UP=seconds)

    @staticmethod
    def waits(thread: threading.Thread) -> bool:
        """Whether this thread waits in tempo."""
        return thread.ident in tempo._WAITS


class Worker(threading.Thread):
    """A daemon thread, started at once; `result` joins it, and returns or raises what its work did."""

    def __init__(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(daemon=True)
        self.work = functools.partial(work, *args, **kwargs)
        self.outcome: Future[Any] = Future()
        self.start()

    def run(self) -> None:
        try:
            self.outcome.set_result(self.work())
        except BaseException as exc:
            self.outcome.set_exception(exc)

    def result(self) -> Any:
        self.join(LIMIT)
        assert not self.is_alive(), f"{self.work} is stuck"
        return self.outcome.result()


class Clock:
    """A clock that moves when it is told to."""

    now, looks = 1000.0, 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now


class Gate:
    """A handler, or anything that is called, that stays there until it is told to go on."""

    def __init__(self) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.entered.set()
        assert self.go_on.wait(LIMIT)


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    inside.set_clock(clock)
    return clock


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Have threads switch often; give tempo its own clock back, and fail a test that leaves a thread behind."""
    before, interval = set(threading.enumerate()), sys.getswitchinterval()
    inside.look_up(LONG)  # so that a wake-up which does not come is seen
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)
    inside.set_clock()
    inside.look_up()
    wait_until(lambda: set(threading.enumerate()) <= before)


def make(**kwargs: Any) -> tempo.Dispatcher:
    """A dispatcher with roomy defaults."""
    return tempo.Dispatcher(**{"interval": LONG, "max_buffered_bytes": tempo.MiB, **kwargs})


def holding(*items: bytes, **kwargs: Any) -> tempo.Dispatcher:
    """A dispatcher that has accepted these payloads."""
    d = make(**kwargs)
    for item in items:
        d.enqueue(item)
    return d


def started(d: tempo.Dispatcher, **kwargs: Any) -> list[bytes]:
    """Start a handler; return the list of what it will have received."""
    received: list[bytes] = []
    d.start(lambda batch: received.extend(batch.tolist()), **kwargs)
    return received


def raised(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call raises, or None."""
    try:
        work(*args, **kwargs)
    except BaseException as exc:
        return exc
    return None


def full(limit: int) -> tempo.Dispatcher:
    """A dispatcher filled to the last byte with one payload, which is a closed batch."""
    return holding(b"x" * limit, max_buffered_bytes=limit, max_batch_bytes=1)


def lists(batches: Iterable[tempo.Batch]) -> list[list[bytes]]:
    return [batch.tolist() for batch in batches]


def payloads(batches: Iterable[tempo.Batch]) -> list[bytes]:
    return list(itertools.chain(*lists(batches)))


def charge(payload: bytes) -> int:
    return max(1, len(payload))


def numbered(number: int, size: int) -> bytes:
    """A payload that shows its number, if its size allows."""
    return (b"%d" % number).rjust(size, b".")[:size]


def wait_until(condition: Callable[[], object]) -> None:
    """Return when condition() is true; fail when that takes longer than LIMIT."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.0005)


def run_async(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in an event loop made for it, for at most LIMIT."""
    return asyncio.run(asyncio.wait_for(work, LIMIT))


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop turn until condition() is true."""
    while not condition():
        await asyncio.sleep(0)


async def next_batch(d: tempo.Dispatcher) -> tempo.Batch:
    return await anext(aiter(d))


def call(d: tempo.Dispatcher, how: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method; a coroutine runs in an event loop made for it."""
    result = getattr(d, how)(*args, **kwargs)
    return run_async(result) if inspect.iscoroutine(result) else result


def send(d: tempo.Dispatcher, how: str, payload: Any, *args: Any, **kwargs: Any) -> Any:
    """Hand one payload over, in one of the ways of PRODUCERS."""
    return call(d, how, [payload] if how == "enqueue_many" else payload, *args, **kwargs)


def take(d: tempo.Dispatcher, way: str) -> Any:
    """Receive one batch, in one of the ways of CONSUMERS."""
    if way == "async for":
        return run_async(next_batch(d))
    if way == "batches" and not CPYTHON:  # the iterator lives until it is collected; its thread is in a loop so long
        return Worker(next, d.batches()).result()
    return d.get() if way == "get" else next(d.batches())


def consume(d: tempo.Dispatcher, way: str) -> list[bytes]:
    """All payloads until the dispatcher ends, in one of the ways of CONSUMERS."""
    taken: list[bytes] = []
    with contextlib.suppress(tempo.Stopped, StopIteration, StopAsyncIteration):
        while True:
            taken += take(d, way).tolist()
    return taken


def begun(d: tempo.Dispatcher, field: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Worker:
    """A thread whose call has begun: a field of the stats shows it."""
    before = getattr(d.stats(), field)
    worker = Worker(work, *args, **kwargs)
    wait_until(lambda: getattr(d.stats(), field) != before or not worker.is_alive())
    return worker


def waiter(d: tempo.Dispatcher, payload: bytes, timeout: float | None = None, how: str = "enqueue") -> Worker:
    """A thread that waits for room, and stands in the line already."""
    return begun(d, "waiting_producers", send, d, how, payload, timeout=timeout)


def taker(d: tempo.Dispatcher, way: str = "get") -> Worker:
    """A thread that waits for a batch."""
    return begun(d, "waiting_consumers", take, d, way)


def closing(d: tempo.Dispatcher, how: str = "shutdown", *args: object) -> Worker:
    """A thread in a shutdown that has begun."""
    worker = Worker(call, d, how, *args)
    wait_until(lambda: d.stats().state != "running")
    return worker


def not_due(d: tempo.Dispatcher) -> bool:
    """Whether there is no batch to get."""
    return type(raised(d.get, timeout=0)) is queue.Empty


def drained(d: tempo.Dispatcher) -> list[tempo.Batch]:
    """Everything that is buffered, the open batch too, without waiting."""
    d.flush(0)
    batches = []
    with contextlib.suppress(queue.Empty, tempo.Stopped):
        while True:
            batches.append(d.get(timeout=0))
    return batches


def refusal(work: Callable[..., Any], *args: Any, **kwargs: Any) -> type[BaseException] | None:
    """With which of tempo's errors a call was refused; None: it was not."""
    error = raised(work, *args, **kwargs)
    if error is not None and not isinstance(error, tempo.Error):
        raise error
    return type(error) if error else None


def balanced(d: tempo.Dispatcher) -> tempo.Stats:
    """The stats, after a look at what always holds."""
    s = d.stats()
    assert s.accepted == s.delivered + s.in_flight + s.buffered + s.discarded
    assert s.accepted_bytes == s.delivered_bytes + s.in_flight_bytes + s.buffered_bytes + s.discarded_bytes
    assert min(s[:-1]) >= 0 and s.failed <= s.delivered and s.buffered_bytes <= s.peak_buffered_bytes
    return s


def works(d: tempo.Dispatcher) -> list[bytes]:
    """Take all that is there, see a payload through from another thread; return what was there."""
    there = payloads(drained(d))
    Worker(d.enqueue, b"another").result()
    assert lists(drained(d)) == [[b"another"]]
    s = balanced(d)
    assert (s.waiting_producers, s.waiting_consumers) == (0, 0)
    inside.check(d)
    return there


PRELUDE = """
import contextlib, ctypes, gc, os, signal, sys, tempo, threading, time, traceback, warnings
def make(**kwargs):
    return tempo.Dispatcher(**{"interval": 60, "max_buffered_bytes": 1 << 20, **kwargs})
def say(*what):
    os.write(1, (" ".join(map(str, what)) + "\\n").encode())
def in_child(work, fork=getattr(os, "fork", None)):
    # Run work in a forked child; return its exit status. A child that hangs is killed by its alarm.
    if fork is not getattr(os, "fork", None):
        time.sleep(0.2)  # CPython: such a child waits for ever for a thread that just then asks for the GIL
    pid = fork()
    if pid == 0:
        signal.alarm(20)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]
"""


def program(source: str, *options: str, prelude: str = PRELUDE, told: str = "", code: int = 0) -> list[str]:
    """Run a program; check its exit code and what it writes to stderr; return the lines that it prints."""
    if "fork" in source and not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    # From 3.12 on, fork in a process with threads warns. That is what is tested here.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", *options, "-c", prelude + textwrap.dedent(source)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert re.fullmatch(told, done.stderr, re.DOTALL), done.stderr
    assert done.returncode == code
    return done.stdout.splitlines()


class Steps:
    """Calls something, and does another thing at the n-th place of a module where the interpreter looks for signals.

    That is as a function begins, and after a C function was called. There a KeyboardInterrupt or a nested call may
    come, or another thread goes on. The other thread may also do so where a function returns or raises.
    """

    def __init__(self, n: int, *modules: ModuleType, events: Sequence[str] = ("call", "c_return")) -> None:
        self.n, self.count, self.names, self.events = n, 0, [vars(module) for module in modules], events
        self.do: Callable[[], object] = print

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        generator = frame.f_code.co_flags & inspect.CO_GENERATOR  # what is raised as one is closed is lost
        if event in self.events and any(frame.f_globals is names for names in self.names) and not generator:
            self.count += 1
            if self.count == self.n:
                sys.setprofile(None)
                self.do()

    def run(self, do: Callable[[], object], work: Callable[..., Any], *args: Any) -> Any:
        self.do = do
        sys.setprofile(self)
        try:
            return work(*args)
        finally:
            sys.setprofile(None)


def each_step(*also: ModuleType, **kwargs: Any) -> Iterator[Steps]:
    """Yield what does something at a call's first step, then what does it at the second, and so on to the last."""
    for n in itertools.count(1):
        steps = Steps(n, tempo, *also, **kwargs)
        yield steps
        if steps.count < n:
            assert n > 1, "nothing was called"
            return


# Dispatcher(*, interval, max_buffered_bytes, max_batch_bytes=None, max_batch_items=None)


def shown(value: object) -> str:
    """A value in a test's name."""
    return value.__name__ if isinstance(value, type) else str(value)[:20]


def names(error: BaseException, name: str, value: object) -> bool:
    """Whether an error's message holds an argument's name and its value."""
    return name in str(error) and repr(value)[:20] in str(error)


BAD_TIMES: list[Any] = [("1", TypeError), (b"1", TypeError), (True, TypeError), ([1], TypeError), (1j, TypeError)]
BAD_TIMES += [(value, ValueError) for value in (-1.0, -0.001, -INF, NAN)]
BAD_LIMITS: list[Any] = [("1", TypeError), (True, TypeError), (1.0, TypeError), (NAN, TypeError), ([], TypeError)]
BAD_LIMITS += [(value, ValueError) for value in (0, -1)]


@each(
    ("name", "value", "kind"),
    [("interval", *bad) for bad in [*BAD_TIMES, (None, TypeError)]]
    + [("interval", value, ValueError) for value in (0, 0.0, INF, threading.TIMEOUT_MAX * 2, 10**400)]
    + [("max_buffered_bytes", *bad) for bad in [*BAD_LIMITS, (None, TypeError)]]
    + [(name, *bad) for bad in BAD_LIMITS for name in ("max_batch_bytes", "max_batch_items")],
    ids=shown,
)
def test_dispatcher_refuses_a_bad_argument_by_name(name: str, value: Any, kind: type[Exception]) -> None:
    error = raised(make, **{name: value})
    assert type(error) is kind and names(error, name, value)


@each(
    ("work", "message"),
    [
        (lambda: make(interval=0), f"interval must be > 0 and at most {threading.TIMEOUT_MAX} seconds, not 0"),
        (lambda: make(interval=-1), "interval must be >= 0 seconds, not -1"),
        (lambda: make(interval=type("Odd", (), {"__repr__": None})()), "interval must be a number of seconds, not Odd"),
        (lambda: make(max_buffered_bytes=0), "max_buffered_bytes must be > 0 bytes, not 0"),
        (lambda: make(max_batch_items=-1), "max_batch_items must be > 0 payloads, not -1"),
        (lambda: make(max_batch_bytes=1.0), "max_batch_bytes must be an int, not float: 1.0"),
        (lambda: make().start(1), "handler must be callable, not 1"),  # type: ignore[arg-type]
        (lambda: make().get("x" * 73), f"timeout must be a number of seconds, not str: '{'x' * 73}'"),  # type: ignore[arg-type]
        (lambda: make().get("x" * 74), f"timeout must be a number of seconds, not str: '{'x' * 71}..."),  # type: ignore[arg-type]
        (lambda: tempo.Dispatcher(interval=1), ".*max_buffered_bytes.*"),  # type: ignore[call-arg]
        (lambda: tempo.Dispatcher(1.0, 100), ".*positional.*"),  # type: ignore[call-arg]
    ],
)  # fmt: skip
def test_dispatcher_says_what_is_wrong(work: Callable[[], object], message: str) -> None:
    error = raised(work)
    assert isinstance(error, (TypeError, ValueError))
    assert str(error) == message or re.fullmatch(message, str(error))


def test_dispatcher_shows_its_state_and_its_fill_and_cannot_be_copied_or_pickled() -> None:
    d = holding(b"abc", b"", max_buffered_bytes=12345, interval=threading.TIMEOUT_MAX)
    assert repr(d) == "<tempo.Dispatcher running 2 buffered, 4 of 12345 bytes>"
    d.stop()
    assert repr(d) == "<tempo.Dispatcher stopped 0 buffered, 0 of 12345 bytes>"
    for make_other in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="Dispatcher"):
            make_other(d)


PAYLOADS = [("enqueue", [b"p"]), ("enqueue_many", [[b"p"]]), ("aenqueue", [b"p"])]
TIMEOUTS = each(("how", "args"), PAYLOADS + [(how, []) for how in ("get", "flush", "aflush", "shutdown", "ashutdown")])


@each(("value", "kind"), BAD_TIMES, ids=shown)
@TIMEOUTS
def test_timeout_that_is_no_time_is_refused_and_changes_nothing(how: str, args: Any, value: Any, kind: Any) -> None:
    d = make()
    for _ in range(2):  # the second time enqueue() is at the door of its way without the lock
        d.enqueue(b"a")
        before = d.stats()
        error = raised(call, d, how, *args, timeout=value)
        assert type(error) is kind and names(error, "timeout", value)
        assert d.stats() == before
    assert not_due(d)  # nothing was closed either


@each("timeout", [0, 0.0, 1, 1.5, INF, 10**400, None, 1e308, 5e-324], ids=shown)
@TIMEOUTS
def test_timeout_is_any_number_of_seconds_from_zero_by_name_or_by_position(how: str, args: Any, timeout: Any) -> None:
    d = make(max_batch_bytes=1)
    d.enqueue_many([b"p"] * 2 if how == "get" else [])
    call(d, how, *args, timeout)
    if "shutdown" not in how:
        call(d, how, *args, timeout=timeout)
    assert len(payloads(d.stop())) == (2 if "enqueue" in how else 0)


# enqueue(payload, timeout=0.0)

# Says nothing of itself that is true.
Subclass: Any = type("Subclass", (bytes,), {"__len__": lambda _: 1000, "__bytes__": lambda _: b"other"})
GOOD: list[tuple[Any, bytes]] = [
    (b"abc", b"abc"), (b"", b""), (bytearray(b"abc"), b"abc"), (bytearray(), b""), (Subclass(b"abc"), b"abc"),
    (memoryview(b"abc"), b"abc"), (memoryview(bytearray(b"xabcx"))[1:4], b"abc"),
    (memoryview(b"abcdef").cast("B", (2, 3)), b"abcdef"), (array.array("b", b"abc"), b"abc"),
    (memoryview(array.array("i", [1, 2])), array.array("i", [1, 2]).tobytes()),
]  # fmt: skip
BAD: list[Any] = ["secret", "", 3, True, None, 1.5, [b"secret"], object(), memoryview(b"secret")[::2]]


@each(("payload", "expected"), GOOD, ids=lambda value: type(value).__name__)
@LIMITS
def test_enqueue_takes_contiguous_objects_and_copies_mutable_ones(limit: int, payload: Any, expected: bytes) -> None:
    payload = bytearray(payload) if isinstance(payload, bytearray) else payload
    d = holding(payload, payload, max_buffered_bytes=limit)
    d.enqueue(payload, timeout=None)
    d.enqueue_many([b"-", payload])
    run_async(d.aenqueue(payload))
    if isinstance(payload, bytearray):
        payload[:] = b"changed, and resized: nothing holds on to it"
    assert balanced(d).buffered_bytes == 5 * charge(expected) + 1
    (batch,) = d.stop()
    assert batch.tolist() == [expected] * 3 + [b"-"] + [expected] * 2
    assert all(type(item) is bytes for item in batch.tolist())


@each("value", BAD, ids=lambda value: type(value).__name__)
@LIMITS
@PRODUCERS
def test_enqueue_refuses_what_is_not_bytes_like_by_its_type(how: str, limit: int, value: Any) -> None:
    d = make(max_buffered_bytes=limit)
    what = "C-contiguous" if isinstance(value, memoryview) else "a bytes-like object"
    for timeout in (0.0, 1.0, None):  # from the second on it is at the door of the way without the lock
        before = d.stats()
        error = raised(send, d, how, value, timeout=timeout)
        assert type(error) is TypeError and str(error) == f"payload must be {what}, not {type(value).__name__}"
        assert d.stats() == before
        d.enqueue(b"a")


@each("timeout", [0, 0.001])
@LIMITS
@PRODUCERS
def test_enqueue_refused_tells_what_was_needed_and_leaves_nothing_behind(how: str, limit: int, timeout: float) -> None:
    d = holding(b"x" * (limit - 2), max_buffered_bytes=limit)
    before = d.stats()
    error = raised(send, d, how, b"abc", timeout=timeout)
    for same in (error, pickle.loads(pickle.dumps(error)), raised(d.enqueue, b"abc")):
        assert (type(same), same.accepted) == (tempo.QueueFull, 0)
        assert (same.needed, same.buffered_bytes, same.max_buffered_bytes) == (3, limit - 2, limit)
        assert all(str(number) in str(same) for number in (3, limit - 2, limit))
    assert balanced(d) == before._replace(rejected=2, rejected_bytes=6)
    d.enqueue(b"ab")
    assert raised(d.enqueue, b"").needed == raised(d.enqueue, b"", timeout).needed == 1


@each("kind", [bytes, bytearray, memoryview, lambda data: array.array("B", data)], ids=shown)
@each("timeout", [0, None])
@PRODUCERS
def test_enqueue_refuses_what_never_fits_at_once_even_where_others_wait(how: str, timeout: Any, kind: Any) -> None:
    d = full(SMALL)
    blocked = waiter(d, bytes(SMALL))
    with pytest.raises(tempo.PayloadTooLarge, match=rf"{SMALL + 1}.*{SMALL}|{SMALL}.*{SMALL + 1}"):
        send(d, how, kind(bytes(SMALL + 1)), timeout=timeout)

    s = d.stats()
    assert (s.rejected, s.rejected_bytes, s.waiting_producers) == (1, SMALL + 1, 1)
    d.get()
    blocked.result()
    assert refusal(send, d, how, kind(bytes(SMALL)), timeout=0) is tempo.QueueFull
    d.get()
    assert refusal(send, d, how, kind(bytes(SMALL)), timeout=0) is None


@LIMITS
def test_enqueue_serves_threads_and_coroutines_first_come_first_served(limit: int) -> None:
    d = full(limit)
    ways = [(how, timeout) for how in ("enqueue", "aenqueue", "enqueue_many") for timeout in (None, INF, LIMIT)]
    sent = [b"%d" % i * ((limit - 4) // 8) for i in range(9)]
    blocked = [waiter(d, payload, timeout, how) for (how, timeout), payload in zip(ways, sent, strict=True)]
    assert (d.stats().accepted, d.stats().waiting_producers) == (1, 9)
    d.get()  # whoever makes room accepts for them
    assert (d.stats().accepted, d.stats().waiting_producers) == (9, 1)  # eight of them fit
    d.enqueue(b"a")  # a call that does not wait is not refused while it fits
    assert payloads(d.get() for _ in range(10)) == [*sent[:8], b"a", sent[8]]
    for worker in blocked:
        worker.result()


# enqueue_many(payloads, timeout=0.0)


@each("at", [0, 1, 511, 512, 600])
@each("error", [TypeError, ZeroDivisionError, KeyboardInterrupt, tempo.PayloadTooLarge])
def test_enqueue_many_that_raises_says_how_many_it_took(error: Any, at: int) -> None:
    def source() -> Iterator[Any]:
        yield from taken
        yield from bad.get(error, ())
        raise error

    d = make()
    taken = [b"%d" % i for i in range(at)]
    bad: dict[Any, Any] = {TypeError: ["secret"], tempo.PayloadTooLarge: [bytes(tempo.MiB + 1)]}
    caught = raised(d.enqueue_many, source())
    assert type(caught) is error and caught.accepted == at
    assert d.stats().rejected == (error is tempo.PayloadTooLarge)
    assert payloads(d.stop()) == taken
    for value in (3, None, "text", b"bytes", bytearray(b"bytes")):  # not many, but one, or none
        none = raised(make().enqueue_many, value)
        assert type(none) is TypeError and vars(none) == {"accepted": 0}


@ENDS
@LIMITS
def test_enqueue_many_waits_as_often_as_it_must_and_is_released_by_the_end(limit: int, end: str) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=limit // 2)
    sent = [numbered(i, limit // 4) for i in range(40)]
    producer = Worker(d.enqueue_many, sent, timeout=None)
    received: list[bytes] = []
    while len(received) < 20:
        received += d.get(timeout=LIMIT).tolist()
    wait_until(lambda: d.stats().waiting_producers)
    closer = closing(d, end)
    assert d.stats().waiting_producers == 0  # nobody has to look by himself
    error = raised(producer.result)
    received += payloads(closer.result() if end == "stop" else d)
    closer.result()
    assert isinstance(error, tempo.Closed) and received == sent[: error.accepted] and len(received) == 24


def test_enqueue_many_has_one_deadline_for_all(clock: Clock) -> None:
    d = make(max_buffered_bytes=1)
    producer = Worker(d.enqueue_many, [b"1", b"2", b"3", b"4", b"5"], timeout=1.0)
    for accepted in (1, 2, 3):
        wait_until(lambda: (d.stats().accepted, d.stats().waiting_producers) == (accepted, 1))
        clock.now += 0.45
        if accepted < 3:
            d.get(timeout=0)
    assert raised(producer.result).accepted == 3
    late = (vars(clock).update(now=clock.now + i) or b"late" for i in range(3))
    assert make().enqueue_many(late, timeout=1.0) == 3


@each("limit", [4000, LARGE])
def test_enqueue_many_runs_an_iterable_that_calls_tempo(limit: int) -> None:
    def source() -> Iterator[bytes]:
        for i in range(600):
            d.enqueue(b"n")
            assert i % 100 or d.enqueue_many([b"m", b"m"], timeout=None) == 2
            left.extend(d.stop() if i == 500 else [])
            yield b"%d" % i

    d = make(max_buffered_bytes=limit)
    left: list[tempo.Batch] = []
    assert refusal(d.enqueue_many, source()) is tempo.Stopped
    came = Counter(payloads(left))
    assert (came.pop(b"n"), came.pop(b"m"), list(came)) == (501, 12, [b"%d" % i for i in range(500)])


# await aenqueue(payload, timeout=None)


@LIMITS
def test_aenqueue_waits_without_a_thread_and_cancelled_leaves_nothing_behind(limit: int) -> None:
    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        tasks = [asyncio.ensure_future(d.aenqueue(payload, LONG)) for payload in (b"h" * 20, b"second", b"t" * 20)]
        await until(lambda: d.stats().waiting_producers == 3)
        assert threading.active_count() == before
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        await tasks[1]  # the head was in its way
        s = balanced(d)
        assert (s.accepted, s.buffered_bytes, s.rejected, s.waiting_producers) == (2, limit - 4, 0, 1)
        d.get()  # makes room for the last
        tasks[2].cancel()
        await asyncio.gather(tasks[2], return_exceptions=True)
        assert all(timer.cancelled() for timer in loop._scheduled if timer.when() > loop.time() + LIMIT)

    d, before = holding(b"x" * (limit - 10), max_buffered_bytes=limit), threading.active_count()
    run_async(main())
    assert (balanced(d).accepted, d.stats().rejected, d.stats().waiting_producers) == (3, 0, 0)
    assert payloads(d.stop()) == [b"t" * 20]


@contextlib.contextmanager
def parked(d: tempo.Dispatcher, work: Coroutine[Any, Any, Any], closed: bool) -> Iterator[list[Any]]:
    """A task that waits in tempo, in a loop that was stopped or closed; gives both."""
    loop = asyncio.new_event_loop()
    task: Any = loop.create_task(work)
    for _ in range(2):
        loop.run_until_complete(asyncio.sleep(0))
    both = [loop, task]
    if closed:
        task._log_destroy_pending = False  # it is left behind on purpose
        loop.close()
        del loop, task, work
    yield both
    d.stop()
    if not closed:
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()


# batches(), iter(d), get(timeout=None), async for


@CONSUMERS
def test_consumer_gets_the_batch_that_is_there_or_comes_and_is_the_timer_so_that_no_thread_is_needed(way: str) -> None:
    before = threading.enumerate()
    d = holding(b"ab", b"c", interval=0.01, max_batch_bytes=2)
    assert [take(d, way).tolist(), take(d, way).tolist(), d.flush()] == [[b"ab"], [b"c"], True]
    assert threading.enumerate() == before
    for payload in (b"cd", b"x", b""):
        waiting = taker(d, way)
        d.enqueue(payload)
        assert waiting.result().tolist() == [payload]
    assert d.stats().waiting_consumers == 0
    d = make(max_batch_bytes=1024)
    waiting = taker(d, way)
    d.enqueue(bytes(512))
    wait_until(lambda: d.stats().waiting_consumers)  # it times the batch now
    d.enqueue(bytes(512))
    assert len(waiting.result()) == 2


@CONSUMERS
@ENDS
def test_consumer_ends_after_the_drain_or_at_once_after_stop_though_it_waits(way: str, end: str) -> None:
    d = holding(b"aa", b"bb", b"c", max_batch_bytes=2)
    assert take(d, way).tolist() == [b"aa"]
    closer = closing(d, end)
    seen = consume(d, way)
    assert seen + payloads(closer.result() or []) == [b"bb", b"c"]
    assert len(seen) == (0 if end == "stop" else 2)

    d = make()
    waiting = taker(d, way)
    assert call(d, end) in (None, [])
    with pytest.raises({"get": tempo.Stopped, "batches": StopIteration, "async for": StopAsyncIteration}[way]):
        waiting.result()
    assert refusal(d.get, timeout=0) is tempo.Stopped
    assert payloads(d) == consume(d, way) == []


def test_task_cancelled_while_it_waits_loses_nothing_and_passes_its_batch_on() -> None:
    async def main() -> None:
        tasks = [asyncio.ensure_future(next_batch(d)) for _ in range(3)]
        await until(lambda: d.stats().waiting_consumers == 3)
        tasks[1].cancel()
        d.enqueue(b"x")  # wakes the first, which does not come to it
        tasks[0].cancel()
        assert (await tasks[2]).tolist() == [b"x"]
        d.enqueue(b"y")
        flushes = [asyncio.ensure_future(d.aflush()) for _ in range(2)]
        await asyncio.sleep(0)
        flushes[0].cancel()
        assert d.get(timeout=0).tolist() == [b"y"]
        assert await flushes[1] is True
        assert all(task.cancelled() for task in (tasks[0], tasks[1], flushes[0]))

    d = make(max_batch_bytes=1)
    run_async(main())
    assert works(d) == []


def test_task_in_wait_for_loses_no_batch_at_a_timeout() -> None:
    async def main() -> list[bytes]:
        taken: list[bytes] = []
        for i, payload in enumerate(sent):
            asyncio.get_running_loop().call_later(i * 0.0005, d.enqueue, payload)  # timeouts and batches have to cross
        while len(taken) < len(sent):
            with contextlib.suppress(asyncio.TimeoutError):
                taken += (await asyncio.wait_for(next_batch(d), 0.0007)).tolist()
        return taken

    d = make(max_batch_bytes=1)
    sent = [b"%05d" % i for i in range(300)]
    assert run_async(main()) == sent
    assert works(d) == []


@each("what", ["batch", "interval", "room"])
@each("early", [True, False], ids=["others wait before", "others come later"])
@each("closed", [True, False], ids=["closed", "stopped"])
def test_task_in_a_loop_that_no_longer_runs_holds_up_nobody(what: str, closed: bool, early: bool) -> None:
    d = full(SMALL) if what == "room" else make(interval=0.05, max_batch_bytes=1 if what == "batch" else None)
    with parked(d, d.aenqueue(b"parked") if what == "room" else next_batch(d), closed):
        assert d.stats().waiting_producers + d.stats().waiting_consumers == 1
        other = functools.partial(waiter, d, b"y" * (SMALL - 6)) if what == "room" else functools.partial(taker, d)
        first = other() if early else None
        d.get() if what == "room" else d.enqueue(b"x")
        batch = (first or other()).result()
        assert batch.tolist() == [b"x"] if batch else payloads(d.stop())[-1] == b"y" * (SMALL - 6)


@each("how", ["aenqueue", "async for", "aflush", "ashutdown"])
def test_task_and_loop_that_are_gone_are_not_kept_alive(how: str) -> None:
    d = make() if how == "async for" else full(SMALL)
    work = d.aenqueue(b"y") if how == "aenqueue" else next_batch(d) if how == "async for" else getattr(d, how)()
    with parked(d, work, True) as both:
        seen = weakref.ref(both[0])
        del work, both[:]
        inside.in_section(gc.collect)
        wait_until(lambda: (d.stats(), gc.collect(), seen())[2] is None)


# start(handler, *, on_error=None, exit_timeout=5.0)


async def a_coroutine_function(batch: tempo.Batch) -> None:
    raise AssertionError


NOT_HANDLERS = [None, 3, "print", a_coroutine_function, functools.partial(a_coroutine_function)]


@each(
    ("arguments", "name", "kind"),
    [({"handler": value}, "handler", TypeError) for value in NOT_HANDLERS]
    + [({"handler": print, "on_error": value}, "on_error", TypeError) for value in (3, "print", False)]
    + [({"handler": print, "exit_timeout": value}, "exit_timeout", kind) for value, kind in BAD_TIMES],
    ids=shown,
)
def test_start_refuses_a_bad_argument_and_a_second_call(arguments: Any, name: str, kind: Any) -> None:
    d = holding(b"a")
    before, threads = d.stats(), threading.active_count()
    error = raised(d.start, **arguments)
    assert type(error) is kind and names(error, name, arguments[name])
    assert (d.stats(), threading.active_count()) == (before, threads)
    received = started(d)
    with pytest.raises(RuntimeError, match="start was called before"):
        d.start(print)
    d.shutdown()
    assert received == [b"a"]


def test_start_calls_the_handler_on_one_daemon_thread_named_after_it() -> None:
    def my_handler(batch: tempo.Batch) -> int:
        threads.append(threading.current_thread())
        return len(batch)  # which nobody looks at

    threads: list[threading.Thread] = []
    with make(max_batch_bytes=1) as d:
        d.start(my_handler)
        d.enqueue_many([b"a", b"b", b"c"])
    assert threads == [threads[0]] * 3 and d.stats().failed == 0
    assert threads[0].daemon and threads[0].name == f"tempo-{my_handler.__qualname__}"


@each("error", [ValueError("bad"), SystemExit("bad"), KeyboardInterrupt("bad"), MemoryError("bad")], ids=repr)
@each("where", ["on_error", "excepthook", "on_error that raises", "excepthook that raises"])
def test_handler_that_raises_fails_its_batch_is_reported_and_goes_on(error: Any, where: str, capsys: Any) -> None:
    errors: list[tuple[BaseException, list[bytes]]] = []

    def handler(batch: tempo.Batch) -> None:
        if batch.tolist() == [b"bad"]:
            raise error

    def on_error(exc: BaseException, batch: tempo.Batch) -> None:
        errors.append((exc, batch.tolist()))
        if where == "on_error that raises":
            raise RuntimeError("raised by on_error")

    def hook(args: threading.ExceptHookArgs) -> None:
        assert where != "excepthook that raises"
        threading.__excepthook__(args)

    with pytest.MonkeyPatch.context() as patch, make(max_batch_bytes=1) as d:
        patch.setattr(threading, "excepthook", hook)
        d.start(handler, on_error=on_error if "on_error" in where else None)
        d.enqueue_many([b"bad", b"good"])
        d.shutdown(LIMIT)
    s = balanced(d)
    assert (s.failed, s.failed_bytes, s.delivered, s.in_flight) == (1, 3, 2, 0)
    assert errors == ([(error, [b"bad"])] if "on_error" in where else [])
    told = capsys.readouterr().err
    assert where != "excepthook" or told.count(f"{type(error).__name__}: bad") == 1
    assert where != "on_error that raises" or told.count("RuntimeError: raised by on_error") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@each(("owner", "name"), [(tempo, "_Waiter"), (tempo, "Batch"), (threading.Condition, "notify")], ids=shown)
def test_handler_and_get_lose_nothing_by_a_memory_error(owner: Any, name: str, monkeypatch: Any) -> None:
    def short_of_memory(*args: Any) -> Any:
        if name == "notify" and len(args) > 1:
            return notify(*args)
        monkeypatch.undo()  # once
        raise MemoryError

    def handler(batch: tempo.Batch) -> None:
        taken.extend(batch.tolist())
        monkeypatch.setattr(owner, name, short_of_memory)

    d, taken, notify = full(SMALL), list[bytes](), threading.Condition.notify
    blocked = waiter(d, b"second")
    if name == "Batch":
        monkeypatch.setattr(owner, name, short_of_memory)
        with pytest.raises(MemoryError):
            d.get(timeout=0)
        inside.check(d)
    monkeypatch.setattr(owner, name, short_of_memory)
    d.start(handler)
    blocked.result()
    wait_until(lambda: d.stats().delivered == 2)
    monkeypatch.undo()
    d.shutdown(LIMIT)
    assert (taken, balanced(d).failed) == ([b"x" * SMALL, b"second"], 0)


@each("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()], ids=repr)
@each("at", ["__init__", "start", "late start", "after start"])
def test_start_that_fails_changes_nothing(at: str, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(thread: threading.Thread, *_: object, **__: object) -> None:
        start(thread) if at == "after start" else late.append(thread)
        raise error

    def looks_dead(thread: threading.Thread) -> bool:  # and comes to life just then
        start(thread)
        thread.join(0.1)
        return False

    received, late = list[bytes](), list[threading.Thread]()
    start, handler = threading.Thread.start, lambda batch: received.extend(batch.tolist())
    pull_mode = "pull mode" if at != "after start" and type(error) is RuntimeError else None
    d = holding(b"a")
    monkeypatch.setattr(threading.Thread, at.rsplit(maxsplit=1)[-1], fails)
    monkeypatch.setattr(threading.Thread, "is_alive", looks_dead) if at == "late start" else None
    for _ in range(2):
        with pytest.raises((type(error), RuntimeError), match=pull_mode):
            d.start(handler)
    monkeypatch.undo()
    d.start(handler) if at != "after start" else None  # that one has started
    for thread in late if at != "__init__" else []:
        start(thread) if at == "start" else None  # as an interrupted start() may leave it: it does nothing
        thread.join(LIMIT)
        assert not thread.is_alive()
    monkeypatch.setattr(threading.Thread, "__init__", fails)
    with pytest.raises((type(error), RuntimeError)):
        d.start(print)
    monkeypatch.undo()
    d.shutdown(LIMIT)
    assert received == [b"a"]


@each("result", [a_coroutine_function, type("Awaitable", (), {"__init__": print, "__await__": iter})], ids=shown)
def test_handler_that_returns_an_awaitable_has_failed(result: Callable[[Any], object]) -> None:
    errors: list[str] = []
    with make(max_batch_bytes=1) as d:
        d.start(lambda batch: result(batch), on_error=lambda exc, _: errors.append(repr(exc)))  # noqa: PLW0108
        d.enqueue_many([b"aa", b"b"])
    gc.collect()  # nothing warns that nobody awaited it
    assert [error[:10] for error in errors] == ["TypeError("] * 2 and "await" in errors[0]
    assert (d.stats().failed, d.stats().failed_bytes, d.stats().delivered) == (2, 3, 2)


@each(
    ("work", "outcome", "delivered"),
    [
        (lambda d: d.enqueue(b"3rd", timeout=None), None, 3),
        (lambda d: refusal(d.enqueue, bytes(99), timeout=None), tempo.QueueFull, 2),
        (lambda d: d.shutdown(), None, 2),
        (lambda d: d.shutdown(timeout=5), None, 2),
        (lambda d: d.flush(), False, 2),
        (lambda d: (d.stats().in_flight, d.stats().buffered), (1, 1), 2),
        (lambda d: payloads(d.stop()), [b"2nd"], 1),
    ],
    ids=["enqueue", "enqueue without room", "shutdown", "shutdown in time", "flush", "stats", "stop"],
)
def test_handler_may_call_what_it_likes_and_never_waits_for_itself(work: Any, outcome: Any, delivered: int) -> None:
    outcomes: list[Any] = []
    d = make(max_batch_bytes=1, max_buffered_bytes=100)
    d.start(lambda _: outcomes.append(work(d) if not outcomes else None))
    d.enqueue_many([b"1st", b"2nd"])
    wait_until(lambda: outcomes)
    d.shutdown(timeout=LIMIT)
    wait_until(lambda: d.stats().in_flight == 0)
    s = balanced(d)
    assert outcomes[0] == outcome
    assert (s.state, s.delivered, s.accepted, s.failed) == ("stopped", delivered, max(2, delivered), 0)


# flush(timeout=None), await aflush(timeout=None)


@FLUSHES
@each("state", ["running", "shutting down"])
def test_flush_waits_for_what_was_accepted_before_it_and_not_for_more(how: str, state: str) -> None:
    d = holding(b"a", b"b")
    closer = closing(d) if state != "running" else None
    flush = Worker(call, d, how)
    assert d.get(timeout=LIMIT).tolist() == [b"a", b"b"]  # there is none before the flush has begun
    if closer:
        closer.result()
    else:
        d.enqueue(b"after")
    assert flush.result() is True
    assert call(d, how, 0) is (closer is not None) and call(make(), how) is True


@each("how", ["flush", "aflush", "shutdown", "ashutdown"])
def test_flush_and_shutdown_wait_until_the_handler_has_returned(how: str) -> None:
    gate = Gate()
    with make() as d:
        d.start(gate)
        d.enqueue(b"x")
        wait_until(lambda: inside.buffer(d).run.places)  # credit: the next one takes no lock
        waiting = Worker(call, d, how)
        assert gate.entered.wait(LIMIT)
        assert call(d, "flush", timeout=0.01) is False
        gate.go_on.set()
        assert waiting.result() in (True, None)
        assert (d.stats().delivered, d.stats().in_flight) == (1, 0)


def test_flush_is_true_though_a_consumers_loop_ends_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    d = make()
    consumer = Worker(list, d)
    wait_until(lambda: inside.waits(consumer))
    inside.after_a_look_at_a_loop(monkeypatch, lambda: (d.stop(), consumer.result()))
    assert d.flush() is True


def test_flush_does_not_wait_for_the_batch_that_the_handler_has_next() -> None:
    first, second = Gate(), Gate()
    handlers = iter([first, second])
    with make(max_batch_bytes=1) as d:
        d.start(lambda _: next(handlers)())
        d.enqueue(b"a")
        assert first.entered.wait(LIMIT)
        flush = Worker(d.flush)
        wait_until(lambda: inside.waits(flush))
        d.enqueue(b"b")
        first.go_on.set()
        assert second.entered.wait(LIMIT) and flush.result() is True
        second.go_on.set()


@FLUSHES
def test_flush_is_false_and_shutdown_raises_when_stop_hands_their_work_back(how: str) -> None:
    for n in range(20):
        d = holding(b"x")
        flush = Worker(call, d, how)
        end = f"__{how.replace('flush', 'exit')}__" if n % 2 else how.replace("flush", "shutdown")
        closer = closing(d, end, *[None] * (n % 2))
        assert payloads(d.stop()) == [b"x"]
        assert flush.result() is call(d, how) is False
        assert refusal(closer.result) is tempo.Stopped


# shutdown(timeout=None), await ashutdown(timeout=None)


@SHUTDOWNS
@LIMITS
def test_shutdown_drains_what_was_accepted_and_is_idempotent(limit: int, how: str) -> None:
    d = holding(b"a", b"b", b"c", max_buffered_bytes=limit, max_batch_bytes=2)
    closers = [closing(d, how) for _ in range(3)]
    assert d.stats().state == "shutting_down"
    assert all(closer.is_alive() for closer in closers)
    assert lists(d) == [[b"a", b"b"], [b"c"]]
    assert [closer.result() for closer in closers] == [None] * 3
    assert d.stats().state == "stopped"
    assert call(d, how, timeout=0) is call(d, how) is None
    assert refusal(d.start, print) is tempo.Stopped


@SHUTDOWNS
@each("mode", ["pull", "push"])
@each("timeout", [0, 0.01])
def test_shutdown_out_of_time_hands_back_what_is_left_and_says_how_much(how: str, mode: str, timeout: float) -> None:
    gate = Gate()
    d = make(max_batch_items=2)
    d.start(gate) if mode == "push" else None
    d.enqueue_many([b"aaa", b"b", b"c", b"d", b"e"][mode == "pull" :])
    assert mode == "pull" or gate.entered.wait(LIMIT)
    waiting = closing(d, how)
    says = {"pull": "2 batches.*4 payloads", "push": r"2 batches.*3 payloads.*\b2 payloads.*handler"}
    error = raised(call, d, how, timeout=timeout)
    for same in (error, pickle.loads(pickle.dumps(error))):
        assert type(same) is tempo.DrainTimeout and re.search(says[mode], str(same))
        assert lists(same.undelivered) == ([[b"b", b"c"], [b"d", b"e"]] if mode == "pull" else [[b"c", b"d"], [b"e"]])
        assert same.in_flight == (0 if mode == "pull" else 2)
    s = balanced(d)
    assert (s.state, s.in_flight, s.discarded) == ("stopped", *((0, 4) if mode == "pull" else (2, 3)))
    assert refusal(waiting.result) in (tempo.Stopped, tempo.DrainTimeout)
    assert d.stop() == []
    gate.go_on.set()
    wait_until(lambda: d.stats().in_flight == 0)


@each("nested", [False, True], ids=["one loop", "two"])
@each("asynchronous", [False, True], ids=["for", "async for"])
def test_shutdown_and_flush_in_the_body_of_a_loop_do_not_wait_for_themselves(asynchronous: bool, nested: bool) -> None:
    d = holding(b"a", b"b", b"c", b"d", max_batch_bytes=1)
    seen: list[bytes] = []

    def in_a_thread() -> None:
        idle = iter(d)
        for batch in d:
            seen.extend(batch.tolist() + payloads(itertools.islice(d, nested)))
            assert d.flush() is (len(seen) == 4)
            d.shutdown()  # the inner loop is over, the outer is not
        assert list(idle) == []

    async def in_a_task() -> None:
        async for batch in d:
            seen.extend(batch.tolist())
            await asyncio.sleep(0)  # the other task is in its body now
            assert await d.aflush() is (len(seen) == 4)
            await d.ashutdown()

    async def main() -> None:
        await asyncio.gather(*(in_a_task() for _ in range(1 + nested)))

    Worker(run_async, main()).result() if asynchronous else Worker(in_a_thread).result()
    assert sorted(seen) == [b"a", b"b", b"c", b"d"]
    assert d.stats().state == "stopped"


@each(("how", "instead"), [("shutdown", "ashutdown"), ("flush", "aflush"), ("__exit__", "ashutdown")])  # or `with`
def test_shutdown_that_would_block_its_own_event_loop_for_ever_is_refused(how: str, instead: str) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match=rf"{instead}\(\)") as caught:
            getattr(d, how)(None)
        assert how == "flush" or "async with" in str(caught.value)
        assert d.flush(0) is False  # with a timeout it may block
        with make() as push:  # a thread of tempo's drains it
            assert push.flush() is True
            push.start(lambda _: None)
            push.enqueue(b"x")
            assert push.flush() is True

    d = holding(b"x")
    run_async(main())
    assert d.stats().state == "running"
    assert works(d) == [b"x"]


# stop()


def test_stop_by_two_threads_at_once_hands_back_to_one_of_them() -> None:
    for steps in each_step():
        d, gate = holding(b"a", b"b", max_batch_bytes=1), Gate()
        worker = Worker(steps.run, gate, d.stop)
        wait_until(lambda: gate.entered.is_set() or not worker.is_alive())
        mine = [] if inside.locked(d) else d.stop()
        gate.go_on.set()
        assert sorted([payloads(mine), payloads(worker.result())]) == [[], [b"a", b"b"]]


# stats()


@LIMITS
def test_stats_balance_at_each_stage(limit: int) -> None:
    def now() -> tuple[object, ...]:
        """Accepted, delivered, in flight, buffered and discarded: payloads and bytes each."""
        return balanced(d)[:10]

    gate, nested = Gate(), list[object]()
    assert make().stats() == tempo.Stats(*(0,) * 18, "running")
    d = holding(b"abc", b"", max_buffered_bytes=limit)  # the second without the lock, if it is large
    inside.in_section(lambda: nested.append(now()))
    assert [now(), *nested] == [(2, 4, 0, 0, 0, 0, 2, 4, 0, 0)] * 2
    inside.set_clock()
    d = holding(b"", b"abc", b"bad", b"left", b"back", max_buffered_bytes=limit, max_batch_bytes=4)
    assert now() == (5, 15, 0, 0, 0, 0, 5, 15, 0, 0)
    assert d.get().tolist() == [b"", b"abc"]
    assert now() == (5, 15, 2, 4, 0, 0, 3, 11, 0, 0)
    d.start(gate)
    assert gate.entered.wait(LIMIT)
    assert now() == (5, 15, 2, 4, 1, 3, 2, 8, 0, 0)  # its bytes are released
    assert payloads(d.stop()) == [b"left", b"back"]
    assert now() == (5, 15, 2, 4, 1, 3, 0, 0, 2, 8)
    gate.go_on.set()
    wait_until(lambda: d.stats().in_flight == 0)
    assert now() == (5, 15, 3, 7, 0, 0, 0, 0, 2, 8) and d.stats().batches == 2
    d = holding(*[bytes(100)] * 150, max_batch_bytes=1000)
    assert (d.get().nbytes, d.stats().peak_buffered_bytes) == (1000, 15_000)  # with what was accepted without the lock


# with Dispatcher(...) as d, async with


def test_with_is_a_shutdown_and_returns_the_dispatchers_own_type() -> None:
    Events: Any = type("Events", (tempo.Dispatcher,), {})  # noqa: N806

    async def main() -> None:
        async with Events(interval=LONG, max_buffered_bytes=100) as d:
            assert type(d) is Events
            task = asyncio.ensure_future(next_batch(d))  # of this loop: it goes on
            d.enqueue(b"a")
        assert ((await task).tolist(), d.stats().state) == ([b"a"], "stopped")

    run_async(main())
    with Events(interval=LONG, max_buffered_bytes=100) as d:
        assert type(d) is Events
        received = started(d)
        d.enqueue(b"a")
    assert (received, d.stats().state) == ([b"a"], "stopped")


@each("ended", ["in time", "by stop"])
@each(("mode", "way"), [("pull", "with"), ("push", "with"), ("push", "async with")])
def test_with_left_by_an_exception_waits_exit_timeout_at_most(mode: str, way: str, ended: str, clock: Clock) -> None:
    gate = Gate()
    d = make(max_batch_bytes=1)
    d.start(gate, exit_timeout=0.5) if mode == "push" else None

    async def leave() -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(d) if way == "with" else await stack.enter_async_context(d)
            d.enqueue_many([b"in the handler", b"x"])
            raise KeyError

    leaver = Worker(run_async, leave())
    wait_until(lambda: d.stats().state == "shutting_down" and (mode == "pull" or gate.entered.is_set()))
    assert leaver.is_alive()
    if ended == "by stop":
        d.stop()
    clock.now += 5.0
    with pytest.raises(KeyError):
        leaver.result()
    assert (d.stats().state, balanced(d).discarded) == ("stopped", 2 if mode == "pull" else 1)
    gate.go_on.set()


# Batch

SHAPES: dict[str, tuple[list[bytes], int | None]] = {
    "one": ([b"only"], None),
    "empty": ([b""] * 700, None),
    "few": ([b"one", b"", b"three"], None),
    "packed": ([b"%d" % i * (i % 5) for i in range(4000)], None),
    "cut": ([b"%d" % i * (i % 5) for i in range(4000)], 997),
    "large": ([bytes([i % 256]) * 1000 for i in range(500)], None),
    "long runs": ([numbered(i, 500) for i in range(1500)], None),
    "mixed": ([b"%d" % i * (i * 37 % 200) for i in range(1500)], 5003),
}


def shape(name: str) -> tuple[list[bytes], list[tempo.Batch]]:
    """Payloads, and the batches that they came in, for every way in which tempo stores and cuts them."""
    sent, limit = SHAPES[name]
    d = make(max_batch_bytes=limit)
    batches = []
    for i in range(0, len(sent), 600):
        for payload in sent[i : i + 300]:
            d.enqueue(payload)
        d.enqueue_many(sent[i + 300 : i + 600])
        if limit and limit < 1000:
            batches.append(d.get(timeout=0))
    return sent, batches + drained(d)  # the dispatcher goes with this function


@each("name", SHAPES)
def test_batch_is_an_immutable_sequence_of_read_only_views_in_order(name: str) -> None:
    sent, batches = shape(name)
    gc.collect()  # a batch is valid after the dispatcher is gone
    assert payloads(batches) == sent
    for batch in batches:
        items: list[Any] = batch.tolist()
        n = len(items)
        assert isinstance(batch, Sequence) and items[0] in batch and b"absent" not in batch
        assert [bytes(view) for view in batch] == [bytes(batch[i]) for i in range(n)] == items
        assert [bytes(view) for view in reversed(batch)] == items[::-1]
        assert b"".join(items) == bytes(batch.data)
        assert (len(batch), batch.nbytes) == (n, len(batch.data))
        assert repr(batch) == f"<tempo.Batch {n} payloads, {batch.nbytes} bytes>"
        assert (batch[-1], batch[-n]) == (items[-1], items[0])
        assert (batch.index(items[0]), batch.count(items[0])) == (0, items.count(items[0]))
        bad: list[Any] = [n, -n - 1, 10**20, "0"]
        assert [type(raised(lambda: batch[index])) for index in bad] == [IndexError] * 3 + [TypeError]
        for cut in (slice(1, 3), slice(None, None, -1), slice(-2, None), slice(5, 2), slice(None, None, 7)):
            assert type(batch[cut]) is list
            assert [bytes(view) for view in batch[cut]] == items[cut]
        for view in (batch.data, batch[0], batch[-1], next(iter(batch)), batch[:1][0]):
            assert type(view) is memoryview and view.readonly and view.c_contiguous
            assert (view.ndim, view.format, view.itemsize) == (1, "B", 1)
        for attribute in ("data", "nbytes", "new", "tolist", *type(batch).__slots__):
            errors = [raised(setattr, batch, attribute, None), raised(delattr, batch, attribute)]
            assert [type(error) for error in errors] == [AttributeError] * 2
        again = [pickle.loads(pickle.dumps(batch, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
        for other in [*again, copy.copy(batch), copy.deepcopy(batch)]:
            assert type(other) is tempo.Batch
            assert (other.tolist(), other.data, other.data.readonly) == (items, batch.data, True)


def test_batch_may_be_larger_than_4_gib() -> None:
    try:
        huge = bytes(1 << 32)  # its pages are never touched
    except (MemoryError, OverflowError):
        pytest.skip("there is no room for one here")
    d = holding(huge, max_buffered_bytes=1 << 33, max_batch_bytes=1)
    batch = d.get(timeout=0)
    assert (batch.nbytes, len(batch), len(batch[0])) == (1 << 32, 1, 1 << 32)


# Errors and constants


def test_errors_and_names_of_the_module_are_the_contracts() -> None:
    errors: dict[str, tuple[type, ...]] = {
        "Error": (Exception,), "QueueFull": (tempo.Error, queue.Full), "PayloadTooLarge": (tempo.Error, ValueError),
        "Closed": (tempo.Error, RuntimeError), "ShuttingDown": (tempo.Closed,), "Stopped": (tempo.Closed,),
        "DrainTimeout": (tempo.Error, TimeoutError),
    }  # fmt: skip
    assert {name: getattr(tempo, name).__bases__ for name in errors} == errors
    assert str(tempo.DrainTimeout([])) == "not drained in time: 0 batches (0 payloads, 0 bytes) undelivered"
    assert inspect.signature(tempo.Dispatcher.start).parameters["exit_timeout"].default == 5.0
    assert sorted(tempo.__all__) == sorted([*errors, "Batch", "Dispatcher", "Stats", "GiB", "KiB", "MiB"])
    assert (tempo.KiB, tempo.MiB, tempo.GiB) == (1 << 10, 1 << 20, 1 << 30)
    assert re.fullmatch(r"\d+\.\d+\.\d+", tempo.__version__)


# Behaviour: order, when a batch closes, and who is woken


@each(
    ("kwargs", "sent", "closed", "left"),
    [
        ({"max_batch_bytes": 6}, [b"abc", b"def"], [2], []),
        ({"max_batch_bytes": 5}, [b"abc", b"d", b"ef"], [2], [1]),
        ({"max_batch_bytes": 4}, [b"a", b"12345", b"b", b"c"], [1, 1], [2]),
        ({"max_batch_bytes": 2}, [b"", b"", b"a", b"", b"b"], [2, 2], [1]),
        ({"max_batch_bytes": 100}, [b""] * 1000, [100] * 10, []),
        ({"max_batch_items": 3}, [b"a", b"", b"ccc", b"d"], [3], [1]),
        ({"max_batch_items": 500}, [b"x"] * 1201, [500, 500], [201]),
        ({"max_batch_items": 7}, [b"a", *[b""] * 299] * 7 + [b"b"], [7] * 300, [1]),
        ({"max_batch_items": 3, "max_batch_bytes": 4}, [b"aa", b"b", b"cc", b"d", b"e", b"f"], [2, 3], [1]),
    ],
)
@each("many", [False, True], ids=["enqueue", "enqueue_many"])
def test_batch_closes_at_its_limits(many: bool, kwargs: Any, sent: Any, closed: list[int], left: list[int]) -> None:
    d = make(**kwargs) if many else holding(*sent, **kwargs)
    d.enqueue_many(sent if many else [])
    came = [d.get(timeout=0) for _ in closed]
    assert not_due(d)
    came += d.stop()
    assert ([len(batch) for batch in came], payloads(came)) == (closed + left, sent)


@LIMITS
def test_interval_counts_from_a_batchs_first_payload_and_closes_it(limit: int, clock: Clock) -> None:
    d = holding(b"a", max_buffered_bytes=limit, interval=5.0, max_batch_bytes=4)
    clock.now += 3.0
    d.enqueue(b"b")
    clock.now += 1.75
    assert not_due(d)
    clock.now += 0.25
    assert d.get(timeout=0).tolist() == [b"a", b"b"]
    clock.now += 100.0
    d.enqueue_many([b"c", b"d"])
    clock.now += 4.0
    d.enqueue(b"efg")  # closes what is open, and begins a batch
    clock.now += 4.75
    assert d.get(timeout=0).tolist() == [b"c", b"d"]
    assert not_due(d)
    clock.now += 0.25
    d.enqueue_many([b"h", b"new"])  # a batch that is due fills up to its limit while no consumer asks
    assert d.get(timeout=0).tolist() == [b"efg", b"h"]
    assert not_due(d)


@each(("interval", "pace", "missing"), [(8.0, 0.001, 1.0), (80.0, 1.5, 0.0), (0.5, 0.00025, 0.0625), (0.5, 0.0, 0.0)])
def test_interval_is_at_most_an_eighth_shorter(interval: float, pace: float, missing: float, clock: Clock) -> None:
    d = make(max_batch_bytes=1000, interval=interval)
    for _ in range(345):
        d.enqueue(bytes(100))
        clock.now += pace
    assert [d.get(timeout=0).nbytes for _ in range(34)] == [1000] * 34
    clock.now += interval - 5 * pace - missing - 0.001
    assert not_due(d)
    clock.now += missing + 0.002
    assert d.get(timeout=0).nbytes == 500


def test_clock_that_is_replaced_after_the_import_stops_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    d = holding(b"a", b"b", b"c", interval=0.01)
    with monkeypatch.context() as frozen:
        frozen.setattr(time, "monotonic", lambda: 0.0)
        assert d.get(timeout=LIMIT).tolist() == [b"a", b"b", b"c"]


@PRODUCERS
@CONSUMERS
@each("batch_limit", [None, 900])
def test_full_buffer_is_due_where_a_payload_waits_or_was_refused(how: str, way: str, batch_limit: int | None) -> None:
    d = make(max_buffered_bytes=1000, max_batch_bytes=batch_limit)  # the interval never ends
    for early in (True, False):
        consumer = taker(d, way) if early else None
        d.enqueue_many([bytes(350), bytes(351)])
        assert refusal(send, d, how, bytes(352), timeout=0) is tempo.QueueFull
        assert (consumer or taker(d, way)).result().tolist() == [bytes(350), bytes(351)]
        d.enqueue(b"not due")
        assert not_due(d)
        assert payloads(drained(d)) == [b"not due"]

    consumer = Worker(consume, d, way)
    for i in range(20):
        send(d, how, numbered(i, 350), timeout=LIMIT)
    d.shutdown()
    assert consumer.result() == [numbered(i, 350) for i in range(20)]
    assert d.stats().rejected == 2


def test_enqueue_that_waited_returns_at_once_where_a_consumer_is_idle() -> None:
    d = holding(bytes(100), max_buffered_bytes=1000)
    d.flush(0)
    d.enqueue(bytes(900))
    blocked = waiter(d, b"r" * 100)
    d.get(timeout=0)  # less than an eighth of the buffer: its payload is accepted, but it has to rest
    assert inside.resting(d) == [b"r" * 100]
    idle = taker(d)
    blocked.result()
    d.stop()
    assert refusal(idle.result) is tempo.Stopped


def test_waiting_threads_look_up_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(condition: threading.Condition, timeout: float | None = None) -> bool:
        times.append(timeout)
        return wait(condition, timeout)

    inside.look_up()
    times: list[Any] = []
    empty, open_, no_room, soon = make(), holding(b"not due"), full(SMALL), holding(b"due", interval=0.2)
    wait = threading.Condition.wait
    monkeypatch.setattr(threading.Condition, "wait", noted)
    assert take(soon, "get").tolist() == [b"due"] and max(times) <= 0.2
    times.clear()
    waiting = [taker(empty), taker(empty), taker(open_), taker(open_), waiter(no_room, b"y")]
    time.sleep(1.1)  # the one real wait: that nothing happens has no event
    for d in (empty, open_, no_room):
        d.stop()
    assert [refusal(worker.result) for worker in waiting] == [tempo.Stopped] * 5
    looks = [timeout for timeout in times if timeout is not None]  # the start of a thread waits without one
    assert set(looks) == {1.0} and len(looks) <= 8 * len(waiting)


@each(
    ("kwargs", "sizes", "pace", "every", "most"),
    [({}, [100], 0.0, 3000, 8), ({"max_buffered_bytes": 300_000}, [100], 0.0, 3000, 38),
     ({"max_batch_bytes": 1000, "interval": 0.5}, [100], 0.00025, 3000, 62), ({}, [65536], 0.0, 15, 800),
     ({"max_batch_items": 20, "interval": 8.0}, [100], 0.001, 3000, 16), ({}, [10], 0.0, 1000, 5),
     ({"max_buffered_bytes": LARGE}, [5000], 0.0, 12, 261), ({}, [100] * 9 + [700], 0.0, 50, 61),
     ({"max_buffered_bytes": 16 * tempo.MiB}, [2000], 0.0, 3000, 3), ({"max_batch_items": 600}, [100], 0.1, 3000, 8)],
)  # fmt: skip
def test_enqueue_locks_seldom(kwargs: Any, sizes: Any, pace: float, every: int, most: int, clock: Clock) -> None:
    d, looks = make(**kwargs), 0
    for i in range(3000):
        looks -= clock.looks
        d.enqueue(bytes(sizes[i % len(sizes)]))
        looks += clock.looks  # a section looks once
        clock.now += pace
        drained(d) if i % every == every - 1 else None
    assert looks <= most


# Behaviour: memory is truly bounded


@pytest.fixture
def heap() -> Iterator[Callable[[], tuple[int, int]]]:
    """Trace allocations during a test; tells how many bytes are allocated since it began, now and at the most."""
    tracemalloc: Any = pytest.importorskip("tracemalloc")  # PyPy has none
    tracemalloc.start()
    yield lambda: (gc.collect(), tracemalloc.get_traced_memory())[1]
    tracemalloc.stop()


@each(
    ("size", "limit", "batch_limit"),
    [(0, 64, None), (2, 64, None), (0, 64, 64), (64, 1024, None), (64, 128, 64), (64, 64, "flush"), (163, 1024, 32768),
     (511, 400, None), (1000, 1024, None), (1000, 1024, 64), (10240, 1024, 32768)],
)  # fmt: skip
def test_memory_stays_within_the_bound_and_none_is_kept(size: int, limit: int, batch_limit: Any, heap: Any) -> None:
    limit *= tempo.KiB
    d = make(max_buffered_bytes=limit, max_batch_bytes=None if batch_limit == "flush" else batch_limit)
    bound = (limit * 5 // 4 if size >= 64 else limit * 8) + 256 * tempo.KiB
    most = 0
    for kept in (limit // 2, limit // 2, limit // 2, 0):
        left = (limit - d.stats().buffered_bytes) // max(1, size)
        while left:  # payloads that only the dispatcher holds; tiny ones by the dozen, for speed
            some = min(left, 24 if size < 64 else 1)
            left -= some
            d.enqueue_many([bytes(size)] * some) if some > 1 else d.enqueue(bytes(size))
            d.flush(0) if batch_limit == "flush" else None
        assert heap()[1] <= bound + most
        assert refusal(d.enqueue, bytes(max(1, size))) is tempo.QueueFull
        d.flush(0)
        while d.stats().buffered_bytes > kept:
            batch = d.get(timeout=0)
            most = max(most, 2 * batch.nbytes + 5 * len(batch))  # what it needs while it is made
            del batch  # at once
    assert heap()[1] <= bound + most
    d.enqueue(bytes(limit))
    assert d.stop()[0].nbytes == limit  # which keeps nothing of it
    assert heap()[0] < min(64 * tempo.KiB, limit)


def test_memory_is_not_spent_on_a_small_batch_before_a_large_one(heap: Callable[[], tuple[int, int]]) -> None:
    limit = 2 * tempo.MiB
    d = holding(b"small", max_buffered_bytes=limit)
    d.flush(timeout=0)
    for _ in range(20_000):
        d.enqueue(bytes(100))
    before = heap()[0]
    assert d.get(timeout=0).tolist() == [b"small"]
    assert heap()[1] - before < limit // 4
    d.start(lambda _: None)
    assert d.flush(LIMIT)
    wait_until(lambda: heap()[0] < limit // 4)  # the handler's thread keeps no batch while it waits
    d.shutdown(LIMIT)


@each("limit", [1000, tempo.MiB])
def test_memory_is_not_spent_on_refusals(limit: int, heap: Any) -> None:
    d = make(max_buffered_bytes=limit)
    assert refusal(d.enqueue_many, (bytearray(limit // 8) for _ in range(600))) is tempo.QueueFull
    assert heap()[1] <= 1.5 * limit + 256 * tempo.KiB  # the generator's own, and the one refused
    too_large = bytearray(limit + 1)
    assert refusal(d.enqueue, too_large) is tempo.PayloadTooLarge
    assert heap()[1] < 2.5 * limit + 256 * tempo.KiB  # it was not copied
    for count in (300, 1000):
        before = heap()[0]
        for payload, error in [(bytes(300), tempo.QueueFull), (too_large, tempo.PayloadTooLarge)]:
            assert all(refusal(d.enqueue, payload) is error for _ in range(count))
    assert heap()[0] - before < 8 * tempo.KiB
    assert d.stats().rejected == 2 + 2 * 1300


# Behaviour: nothing accepted is lost, duplicated or reordered


def produce(d: tempo.Dispatcher, number: int, sizes: list[int]) -> tuple[list[bytes], int]:
    """Enqueue payloads, the way that the producer's number says; return those accepted, and how many calls raised."""
    ways = [("enqueue", 0.0), ("enqueue", 0.01), ("enqueue", None), ("enqueue_many", 0.01), ("enqueue_many", None)]
    how, timeout = [*ways, ("aenqueue", 0.01), ("aenqueue", None)][number % 7]
    rng = random.Random(number)
    items = [(b"%c%03d" % (number, i)).ljust(size, b".")[:size] for i, size in enumerate(rng.choices(sizes, k=120))]
    accepted: list[bytes] = []
    raised = 0
    while items:
        n = rng.randrange(1, 60) if how == "enqueue_many" else 1
        some, items = items[:n], items[n:]
        try:
            call(d, how, some if how == "enqueue_many" else some[0], timeout=timeout)
            accepted += some
        except (tempo.QueueFull, tempo.PayloadTooLarge) as exc:
            raised += 1
            accepted += some[: exc.accepted]
    return accepted, raised


SMALL_LOAD = (2000, 500, None, [0, 4, 5, 64, 163, 499, 501, 1999, 2001])
LARGE_LOAD = (256 * tempo.KiB, 32 * tempo.KiB, 100, [0, 4, 5, 64, 163, 163, 163, 600, 3000, 32769])


@each("load", [SMALL_LOAD, LARGE_LOAD], ids=["small", "large"])
@each("ways", [["batches"], ["handler"], ["batches", "get", "async for", "async for"]], ids=len)
def test_census_each_accepted_payload_comes_once(load: Any, ways: list[str]) -> None:
    limit, batch_limit, items, sizes = load
    d = make(interval=0.002, max_buffered_bytes=limit, max_batch_bytes=batch_limit, max_batch_items=items)
    received = [started(d)] if ways == ["handler"] else []
    takers = [Worker(consume, d, way) for way in ways if way != "handler"]
    producers = [Worker(produce, d, number, sizes) for number in range(14)]
    accepted = [producer.result() for producer in producers]
    d.shutdown(timeout=LIMIT)
    received += [taker.result() for taker in takers]

    sent = Counter(item for some, _ in accepted for item in some)
    assert Counter(itertools.chain(*received)) == sent
    for number, part in itertools.product(range(14), received):
        own = [item[1:4] for item in part if len(item) > 3 and item[0] == number]
        assert own == sorted(own)
    wait_until(lambda: d.stats().waiting_consumers == 0)  # the handler's thread is told of the end, and then leaves
    s = balanced(d)
    assert s.delivered == s.accepted == sum(sent.values())
    assert s.delivered_bytes == sum(charge(item) * n for item, n in sent.items())
    assert (s.rejected, s.waiting_producers) == (sum(raised for _, raised in accepted), 0)
    assert s.peak_buffered_bytes <= limit
    inside.check(d)


# Behaviour: every public call against plain lists

TINY = st.integers(1, 1000)
ROOMY = st.integers(64 * tempo.KiB, 256 * tempo.KiB)
ITEMS = st.none() | st.integers(1, 700)
BUFFERS = st.tuples(TINY, st.none() | TINY, ITEMS) | st.tuples(ROOMY, st.none() | ROOMY | st.integers(1, 9000), ITEMS)
SIZES = st.integers(0, 5000) | st.integers(0, 520) | st.integers(0, 9)
COUNTS = st.integers(1, 200) | st.integers(1, 5)
WAYS = st.sampled_from(["get", "batches", "async for"])
INSTANT = st.sampled_from([0, 1e-14])  # seconds: both are over at once, on a clock that stands still


class Lists(RuleBasedStateMachine):
    """What is buffered, as plain lists."""

    @initialize(limits=BUFFERS)
    def begin(self, limits: tuple[int, int | None, int | None]) -> None:
        self.limit, self.batch_limit, self.most = limits
        kwargs = {"max_buffered_bytes": self.limit, "max_batch_bytes": self.batch_limit, "max_batch_items": self.most}
        self.d = make(interval=1.0, **kwargs)
        self.buffer = inside.buffer(self.d)
        self.closed: list[list[bytes]] = []
        self.open: list[bytes] = []
        self.filled = self.used = 0  # what the open batch, and all of them, are charged
        self.number = self.total = 0  # payloads offered, and accepted

    def payload(self, size: int) -> bytes:
        self.number += 1
        return numbered(self.number, size)

    def fits(self, *items: bytes) -> bool:
        return self.used + sum(map(charge, items)) <= self.limit

    def cut(self) -> None:
        self.closed += [self.open] if self.open else []
        self.open = []
        self.filled = 0

    def accept(self, item: bytes) -> None:
        if self.filled + charge(item) > (self.batch_limit or INF):
            self.cut()
        self.open.append(item)
        self.filled += charge(item)
        self.used += charge(item)
        self.total += 1
        if self.filled >= (self.batch_limit or INF) or len(self.open) == self.most:
            self.cut()

    def pop(self) -> list[bytes]:
        self.used -= sum(map(charge, self.closed[0]))
        return self.closed.pop(0)


class Model(Lists):
    """A dispatcher and its plain lists, on a clock that the rules move.

    Under large limits a batch may begin within a credit, and so close early: there due-ness is one-sided.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        inside.set_clock(self.clock)
        self.line: list[tuple[bytes, Worker]] = []  # who waits for room
        self.others: list[Worker] = []  # whose payloads were accepted, or that shut down
        self.born = 0.0  # when the open batch began
        self.refused = False  # a payload was refused while this batch was open: it may be due
        self.state = "running"
        self.peak = self.batches = 0
        self.counts: Counter[str] = Counter()

    def count(self, name: str, items: list[bytes]) -> None:
        self.counts[name] += len(items)
        self.counts[name + "_bytes"] += sum(map(charge, items))

    def cut(self) -> None:
        super().cut()
        self.refused = False

    def accept(self, item: bytes) -> None:
        before = self.open
        super().accept(item)
        self.born = self.born if self.open is before and len(before) > 1 else self.clock.now
        self.count("accepted", [item])
        self.peak = max(self.peak, self.used)

    def offer(self, item: bytes) -> type[BaseException] | None:
        """Accept a payload, or say which error refuses it."""
        if self.state == "running" and self.fits(item):
            self.accept(item)
            return None
        self.count("rejected", [item])
        if self.state != "running":
            return tempo.Stopped if self.state == "stopped" else tempo.ShuttingDown
        if charge(item) > self.limit:
            return tempo.PayloadTooLarge
        self.refused = True
        return tempo.QueueFull

    def serve(self) -> None:
        """Accept for those who wait, once there is room."""
        while self.line and self.fits(self.line[0][0]):
            item, waiting = self.line.pop(0)
            self.accept(item)
            self.others.append(waiting)  # it returns when it is its turn

    def due(self) -> bool:
        return bool(self.closed or (self.open and self.clock.now >= self.born + 1.0))

    def take(self, batch: tempo.Batch) -> None:
        if not self.closed:
            assert self.limit > 1000 or self.due() or self.refused or self.line
            self.cut()
        expected = self.pop()
        assert batch.tolist() == expected
        self.batches += 1
        self.count("delivered", expected)
        self.serve()
        if self.state == "shutting_down" and not self.closed:
            self.state = "stopped"

    def end(self, error: type[BaseException]) -> None:
        self.cut()
        self.state = "shutting_down" if error is tempo.ShuttingDown and self.closed else "stopped"
        for item, waiting in self.line:
            assert issubclass(refusal(waiting.result) or int, error)
            self.count("rejected", [item])
        self.line = []

    @rule(size=SIZES, count=COUNTS, how=st.sampled_from(["enqueue", "aenqueue"]), timeout=INSTANT)
    def enqueue(self, size: int, count: int, how: str, timeout: float) -> None:
        for _ in range(count if how == "enqueue" else 1):
            item = self.payload(size if self.limit > 1000 else size // 10)
            error = self.offer(item)
            assert refusal(send, self.d, how, item, timeout) is error

    @rule(run=st.lists(SIZES, max_size=12), timeout=INSTANT, kind=st.sampled_from([list, iter]))
    def enqueue_many(self, run: list[int], timeout: float, kind: Any) -> None:
        items = [self.payload(size) for size in run]
        source, taken, error = kind(items), 0, None
        while taken < len(items) and not (error := self.offer(items[taken])):
            taken += 1
        caught = raised(lambda: self.d.enqueue_many(source, timeout) == taken or 1 / 0)
        assert (type(caught), caught.accepted) == (error, taken) if error else caught is None
        assert kind is list or list(source) == items[taken + 1 :]  # nothing was taken out that was not offered

    @precondition(lambda self: self.state == "running" and len(self.line) < 3)
    @rule(size=st.integers(0, 1000), how=st.sampled_from(["enqueue", "enqueue_many", "aenqueue"]))
    def wait_for_room(self, size: int, how: str) -> None:
        item = self.payload(max(size, 0 if self.line else self.limit - self.used + 1))
        if charge(item) <= self.limit:
            self.line.append((item, waiter(self.d, item, how=how)))

    @rule(way=WAYS)
    def consume(self, way: str) -> None:
        waits = way != "get" and (self.due() or self.state == "stopped")
        try:
            batch = take(self.d, way) if waits else self.d.get(timeout=0)
        except queue.Empty:
            assert self.state == "running" and not self.due() and not (self.open and self.line)
        except (tempo.Stopped, StopIteration, StopAsyncIteration):
            assert self.state == "stopped"
        else:
            self.take(batch)

    @precondition(lambda self: self.state == "running" and not (self.line or self.closed or self.open))
    @rule(size=SIZES, way=WAYS)
    def wait_for_a_batch(self, size: int, way: str) -> None:
        item = self.payload(min(size, self.limit))
        waiting = taker(self.d, way)
        self.accept(item)
        self.d.enqueue(item)
        self.d.flush(0)
        self.cut()
        self.take(waiting.result())

    @rule(how=st.sampled_from(["flush", "aflush"]))
    def flush(self, how: str) -> None:
        self.cut()
        assert call(self.d, how, 0) is (not self.closed) or self.state == "stopped"

    @rule(quarters=st.integers(1, 6), way=st.none() | WAYS)
    def advance_the_clock(self, quarters: int, way: str | None) -> None:
        self.clock.now += quarters / 4
        self.consume(way) if way else None

    @precondition(lambda self: self.number > 20 and self.state == "running")
    @rule(how=st.sampled_from(["shutdown", "ashutdown"]))
    def shutdown(self, how: str) -> None:
        self.others.append(closing(self.d, how))
        self.end(tempo.ShuttingDown)

    @precondition(lambda self: self.number > 40)
    @rule(how=st.sampled_from(["shutdown", "ashutdown", "stop"]))
    def stop(self, how: str) -> None:
        try:
            left = call(self.d, how, *[0] * (how != "stop"))
        except tempo.DrainTimeout as exc:
            left = exc.undelivered
        self.end(tempo.Stopped if how == "stop" else tempo.Closed)  # who waited may look after it has given up
        assert lists(left or []) == self.closed
        while self.closed:
            self.count("discarded", self.pop())

    @precondition(lambda self: self.number > 20 and self.state == "running")
    @rule()
    def start_and_drain(self) -> None:
        came = started(self.d)
        wait_until(lambda: not self.d.stats().waiting_producers)
        self.d.shutdown(LIMIT)
        for item, waiting in self.line:
            assert waiting.result() in (None, 1)
            self.accept(item)
        self.cut()
        assert came == list(itertools.chain(*self.closed))
        self.count("delivered", came)
        self.closed, self.line, self.used = [], [], 0
        self.batches, self.peak = self.d.stats().batches, self.d.stats().peak_buffered_bytes
        self.state = "stopped"

    @invariant()
    def stats_are_the_models(self) -> None:
        if self.number % 2:  # a look puts in order what the next call should find as it is
            return
        inside.check(self.d)
        s = balanced(self.d)._asdict()
        for name in ("accepted", "delivered", "discarded", "rejected"):
            assert (s[name], s[name + "_bytes"]) == (self.counts[name], self.counts[name + "_bytes"]), name
        assert (s["buffered"], s["buffered_bytes"]) == (sum(map(len, [*self.closed, self.open])), self.used)
        assert (s["peak_buffered_bytes"], s["batches"], s["state"]) == (self.peak, self.batches, self.state)
        assert (s["waiting_producers"], s["waiting_consumers"]) == (len(self.line), 0)

    def teardown(self) -> None:
        if hasattr(self, "d"):
            self.number = 0
            self.stats_are_the_models()
            self.d.stop()
            assert {refusal(worker.result) for worker in self.others} <= {None, tempo.Stopped, tempo.DrainTimeout}


class BufferModel(Lists):
    """The buffer alone: no threads, no clock, no dispatcher."""

    now = 0.0

    @rule(size=SIZES, count=st.integers(1, 100), told=st.booleans(), late=st.booleans())
    def append(self, size: int, count: int, told: bool, late: bool) -> None:
        """As enqueue does without the lock, while there is credit; late: it is stopped there, and sealed meanwhile."""
        for _ in range(count):
            if not self.buffer.run.places:
                self.admit([1])  # there is credit only while a batch is open
                self.buffer.grant(self.now, told)
                inside.check_buffer(self.buffer, told)
            item, run = self.payload(size), self.buffer.run
            if len(item) <= run.covers:
                places = 0 if late else run.places
                self.buffer.seal(self.now) if late else None
                run.append(item)
                if len(run) <= places:
                    self.accept(item)
                else:
                    run.append(b"of another thread")
                    self.buffer.seal(self.now)
                    assert run.withdraw([item])
                    assert not run.withdraw([item])

    @rule(sizes=st.lists(SIZES, min_size=1, max_size=20))
    def admit(self, sizes: list[int]) -> None:
        items = [self.payload(size) for size in sizes]
        fits = self.fits(*items)
        self.buffer.seal(self.now)
        assert self.buffer.accept(items, tempo._Waiter()) is fits
        self.buffer.seal(self.now)
        for item in items if fits else []:
            self.accept(item)

    @rule(size=SIZES)
    def admit_in_a_section(self, size: int) -> None:
        item = self.payload(size)
        if self.buffer.accept((item,), tempo._Waiter()):
            assert self.fits(item)
            self.accept(item)

    @rule()
    def close(self) -> None:
        self.buffer.seal(self.now)
        self.buffer.cut()
        self.cut()

    @rule(fate=st.sampled_from(["delivered", "in_flight", "discarded"]), failed=st.booleans())
    def take(self, fate: str, failed: bool) -> None:
        self.buffer.seal(self.now)
        assert (self.buffer.due() == -INF) is bool(self.closed)
        if self.closed:
            assert self.buffer.take(fate).tolist() == self.pop()
            self.buffer.land(failed) if fate == "in_flight" else None

    @rule()
    def wait(self) -> None:
        self.now += 0.3

    @invariant()
    def it_holds_what_the_lists_hold(self) -> None:
        inside.check_buffer(self.buffer)
        assert self.buffer.accepted()[0] == self.total


@each("model", [Model, BufferModel])
def test_dispatcher_and_its_buffer_do_what_plain_lists_do(model: Any) -> None:
    often = settings(deadline=None, max_examples=50, stateful_step_count=30, suppress_health_check=list(HealthCheck))
    play(model, settings=often)


# Behaviour: it never deadlocks: calls that interrupt a call


OUTER: dict[str, Callable[[tempo.Dispatcher], Any]] = {
    "enqueue": lambda d: d.enqueue(b"o"),
    "enqueue_many": lambda d: d.enqueue_many([b"o"] * 2),
    "get": lambda d: [d.get(timeout=0)],
    "flush": lambda d: d.flush(0),
    "stats": lambda d: d.stats(),
    "stop": lambda d: d.stop(),
    "shutdown": lambda d: getattr(raised(d.shutdown, 0), "undelivered", []),
}
ENDING = ("stop", "shutdown")
INSIDE: dict[str, tuple[Callable[[tempo.Dispatcher], Any], Any]] = {  # nested calls, and what they return or raise
    "enqueue": (lambda d: d.enqueue(b"n" * 40, timeout=None), None),
    "enqueue without room": (lambda d: d.enqueue(b"n" * 41, timeout=None), tempo.QueueFull),
    "enqueue too large": (lambda d: d.enqueue(bytes(1025)), tempo.PayloadTooLarge),
    "enqueue_many": (lambda d: d.enqueue_many([b"n" * 20, bytearray(b"n" * 20)], timeout=None), 2),
    "aenqueue": (lambda d: run_async(d.aenqueue(b"n" * 40)), RuntimeError),
    "get": (lambda d: d.get(), queue.Empty),
    "start": (lambda d: d.start(print), RuntimeError),
    "flush": (lambda d: d.flush(), False),
    "shutdown": (lambda d: [call(d, "flush"), call(d, "shutdown")], [False, None]),
    "stop": (lambda d: d.stop(), RuntimeError),
    "stats": (lambda d: (d.stats().accepted, d.stats().rejected, d.stats().state), (2, 0, "running")),
}


@each("nested", INSIDE)
@each("sizes", [(30, 30), (472, 512)], ids=["without credit", "with credit, used up"])
def test_nested_call_in_a_section_never_waits(nested: str, sizes: tuple[int, int]) -> None:
    work, outcome = INSIDE[nested]
    d = holding(*map(bytes, sizes), max_buffered_bytes=sum(sizes) + 40)
    outcomes: list[Any] = []

    def interrupting() -> None:
        try:
            outcomes.append(work(d))
        except Exception as exc:
            outcomes.append(type(exc))

    inside.in_section(interrupting)
    d.stats()
    assert outcomes == [outcome]
    assert d.stats().state == ("shutting_down" if nested == "shutdown" else "running")
    due = nested in ("flush", "shutdown", "enqueue without room")  # the section has closed the batch
    assert d.get(timeout=0) if due else not_due(d)
    assert b"".join(payloads(d.stop())).count(b"n") == (40 if nested in ("enqueue", "enqueue_many") else 0)


@each("outer", OUTER)
@each("limit", [5010, tempo.MiB])
def test_nested_calls_at_each_step_keep_their_order_the_bound_and_the_census(outer: str, limit: int) -> None:
    big, little = b"B" * 5000, b"l"  # the big one cannot be accepted without the lock, the little ones may be equal
    for steps in each_step():

        def nested() -> None:
            offered = [(big, None), (little, None), (big, 0), *[(little, 0)] * 5]
            accepted.extend(p for p, timeout in offered if refusal(d.enqueue, p, timeout) is None)
            balanced(d)

        d = holding(b"a", b"b", b"c", max_buffered_bytes=limit, max_batch_bytes=6000)
        d.flush(0)
        d.enqueue(b"d")
        accepted: list[bytes] = []
        came: list[bytes] = []
        with contextlib.suppress(tempo.Error):
            result = steps.run(nested, OUTER[outer], d)
            came += payloads(result) if outer in ("get", *ENDING) else []
        inside.check(d)
        assert balanced(d).peak_buffered_bytes <= limit and (outer not in ENDING or not d.stats().buffered)
        assert limit == 5010 or outer in ENDING or steps.count < steps.n or len(accepted) == 8  # there is much room
        came += payloads(drained(d))
        assert [item for item in came if item in (big, little)] == accepted
        assert [item for item in came if item in (b"a", b"b", b"c", b"d")] == [b"a", b"b", b"c", b"d"]
        assert d.stats().accepted == len(came)


@each("outer", ["enqueue", "enqueue_many", "get", "flush"])
def test_nested_stats_at_each_step_count_each_payload_once(outer: str) -> None:
    for steps in each_step():
        d, done, seen = holding(b"", b"b", b"c", max_batch_items=2), list[int](), list[tuple[int, tempo.Stats]]()
        inside.in_section(lambda: done.append(d.enqueue_many([b"in the same section"])))
        steps.run(lambda: seen.append((3 + len(done), balanced(d))), OUTER[outer], d)
        last = d.stats()
        assert all(least <= s.accepted <= last.accepted and s[1] <= last[1] for least, s in seen)
        inside.set_clock()


@each("outer", ["enqueue", "stats", "flush"])
def test_nested_enqueue_at_each_step_reaches_a_task_that_waits(outer: str) -> None:
    for steps in each_step():

        async def main() -> None:
            task = asyncio.ensure_future(next_batch(d))
            await asyncio.sleep(0)
            steps.run(lambda: d.enqueue(b"nested"), OUTER[outer], d)
            task.cancel() if steps.count < steps.n else await task  # though nobody makes another call

        d = make(max_batch_bytes=1)
        run_async(main())


def test_nested_enqueue_accepts_what_just_fits() -> None:
    d = make(max_buffered_bytes=10)
    inside.in_section(functools.partial(d.enqueue, bytes(10)))
    assert (d.stats().accepted, payloads(d.stop())) == (1, [bytes(10)])


def test_nested_enqueue_comes_before_what_another_thread_enqueues_after_it() -> None:
    def nested() -> None:
        inside.set_clock()
        d.enqueue(bytes(1000))  # more than credit covers
        others.append(Worker(d.enqueue, b"later"))
        wait_until(lambda: b"later" in inside.buffer(d).run)  # it waits for the lock

    d, others = holding(b"first"), list[Worker]()
    inside.in_section(nested)
    d.stats()
    others[0].result()
    assert payloads(d.stop()) == [b"first", bytes(1000), b"later"]


def test_nested_calls_of_two_dispatchers_in_each_others_sections_do_not_deadlock() -> None:
    both = threading.Barrier(2)

    def nested() -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # one lock for all: they never meet here
        for d in pair:
            d.enqueue(b"nested")
            assert d.stats().accepted
        assert type(raised(make().get)) is queue.Empty  # it does not wait, though this dispatcher was never called

    pair = make(), make()
    inside.in_section(nested)
    for worker in [Worker(d.stats) for d in pair]:
        worker.result()
    inside.set_clock()
    assert [payloads(d.stop()) for d in pair] == [[b"nested"] * 2] * 2


@contextlib.contextmanager
def signal_in_a_wait(handler: Callable[[], object]) -> Iterator[None]:
    """Interrupt the main thread by a signal once it waits in tempo."""
    if not hasattr(signal, "pthread_kill"):
        pytest.skip("there are no signals to threads here")

    def send_one() -> None:
        wait_until(lambda: inside.waits(main))
        signal.pthread_kill(main.ident or 0, signal.SIGINT)

    inside.look_up()  # Python handles a signal that came just before the wait at the next look
    main, before = threading.main_thread(), signal.signal(signal.SIGINT, lambda *_: handler())
    worker = Worker(send_one)
    try:
        yield
    finally:
        worker.result()
        signal.signal(signal.SIGINT, before)


def test_enqueue_many_interrupted_behind_the_acceptance_of_the_one_that_waited_has_counted_it() -> None:
    def handler() -> None:
        d.get(timeout=0)  # makes room: what waits is accepted, and its thread rests
        raise KeyboardInterrupt

    d = holding(*[bytes(100)] * 16, max_buffered_bytes=1600, max_batch_bytes=100)
    with pytest.raises(KeyboardInterrupt) as caught, signal_in_a_wait(handler):
        d.enqueue_many([bytes(100)] * 3, timeout=None)
    assert (caught.value.accepted, d.stats().accepted) == (1, 17)  # type: ignore[attr-defined]


@each("nested", ["enqueue", "enqueue elsewhere", "shutdown", "flush", "stop"])
def test_nested_call_from_a_signal_does_not_wait_for_the_wait_that_it_interrupts(nested: str) -> None:
    d = make(max_buffered_bytes=100, max_batch_bytes=1)
    other = full(60) if nested == "enqueue elsewhere" else d
    outcomes: list[Any] = []

    def handler() -> None:
        if nested.startswith("enqueue"):
            outcomes.extend(refusal(where.enqueue, bytes(60), timeout=None) for where in (d, other))
        else:
            with make() as elsewhere:
                elsewhere.start(print)
            d.enqueue(b"x")
            getattr(d, nested)()
            d.shutdown()

    with signal_in_a_wait(handler), contextlib.suppress(tempo.Stopped):
        outcomes.append(d.get(timeout=LIMIT).tolist())
    enqueued = nested.startswith("enqueue")
    assert outcomes == ([None, tempo.QueueFull, [bytes(60)]] if enqueued else [[b"x"]] if nested != "stop" else [])
    assert d.stats().state == ("running" if enqueued else "stopped")


# Behaviour: interrupts


interrupt = functools.partial(signal.default_int_handler, 0, None)


@each(
    ("content", "how", "args"),
    [([bytes(100)], "enqueue", (b"interrupted", None)), ([bytes(100)], "enqueue_many", ([b"interrupted"], None)),
     ([], "get", ()), ([b"open"], "get", ()), ([b"flushed"], "flush", ()), ([b"drained"], "shutdown", ()),
     ([], "__next__", ())],
)  # fmt: skip
def test_interrupt_of_a_wait_leaves_nothing_behind(content: list[bytes], how: str, args: Any) -> None:
    d = holding(*content, max_buffered_bytes=100)
    iterator = iter(d)
    with pytest.raises(KeyboardInterrupt), signal_in_a_wait(interrupt):
        getattr(iterator if how == "__next__" else d, how)(*args)
    if how == "__next__":  # the loop is left, though the iterator is alive
        d.enqueue(b"x")
        assert type(raised(d.shutdown, 0)) is tempo.DrainTimeout
    elif how == "shutdown":
        assert (d.stats().state, payloads(d), d.stats().state) == ("shutting_down", content, "stopped")
    else:
        assert works(d) == content


@each("wait", ["enqueue", "get", "flush"])
def test_interrupt_anywhere_in_a_wait_that_times_out_leaves_nothing_behind(wait: str) -> None:
    for steps in each_step(threading):
        d = holding(bytes(99), max_buffered_bytes=100)
        arguments = (b"no room",) if wait == "enqueue" else ()
        with contextlib.suppress(KeyboardInterrupt, queue.Full, queue.Empty):
            steps.run(interrupt, getattr(d, wait), *arguments, 5e-3)
        came = payloads([*drained(d), *drained(d)])
        assert came in ([bytes(99)], [bytes(99), b"no room"])  # the interrupted call may have been accepted
        assert works(d) == []


@LIMITS
@each("outer", OUTER)
def test_interrupt_anywhere_in_a_call_loses_and_repeats_nothing(outer: str, limit: int) -> None:
    sent = [b"a" * 30, b"b" * 10, b"c" * 9, b"d" * (limit - 49)]
    for steps in each_step():
        d = holding(*sent, max_buffered_bytes=limit, max_batch_bytes=limit // 2)
        blocked = [waiter(d, payload) for payload in (b"w1", b"w2")]
        came: list[bytes] = []
        lost = False  # a batch on its way out
        try:
            result = steps.run(interrupt, OUTER[outer], d)
            came += payloads(result) if outer in ("get", *ENDING) else []
        except (KeyboardInterrupt, tempo.QueueFull):
            lost = outer in ("get", "stop")
        assert not inside.mine()
        came += payloads(d.stop() if outer in ENDING else drained(d))
        accepted = [*sent, *(b"w%d" % i for i, worker in enumerate(blocked, 1) if refusal(worker.result) is None)]
        came += payloads(drained(d))
        inside.check(d)
        s = balanced(d)
        assert (s.buffered, s.waiting_producers) == (0, 0)
        extra, missing = Counter(came) - Counter(accepted), Counter(accepted) - Counter(came)
        assert set(extra) <= {b"o"} and extra[b"o"] <= 2  # the interrupted call may have been accepted
        assert s.accepted == len(came) + sum(missing.values()) and (lost or not missing)


def test_interrupts_of_a_seal_and_of_what_makes_it_good_leave_the_batch_to_the_next_take() -> None:
    buffer = inside.buffer(make(max_batch_items=2))
    assert buffer.accept([b"a", b"b"], tempo._Waiter())
    vars(buffer).update(repair=interrupt)
    assert type(raised(buffer.seal, 0.0)) is KeyboardInterrupt
    vars(buffer).pop("repair")
    assert buffer.take().tolist() == [b"a", b"b"]
    inside.check_buffer(buffer)


@each(("how", "n"), [("enqueue", 1), ("enqueue_many", 5)])
@each("way", ["get", "async for"])
def test_interrupt_anywhere_in_an_enqueue_leaves_all_or_none_and_owes_no_wake_up(how: str, n: int, way: str) -> None:
    sent = [bytes([i]) * 20_000 for i in range(n)]
    for steps in each_step():
        d = holding(bytes(20_000), bytes(20_000), b"a", max_batch_items=2)
        d.get()
        waiting = taker(d, way)
        with contextlib.suppress(KeyboardInterrupt):
            steps.run(interrupt, getattr(d, how), sent if n > 1 else sent[0])
        if inside.buffer(d).accepted()[0] == 3:  # no call, which would make good what is missing
            d.flush(0)
            d.enqueue_many([b"e", b"f"])
        came = lists([waiting.result(), *drained(d)])
        assert came in ([[b"a", sent[0]], sent[1:3], sent[3:]][:n], [[b"a"], [b"e", b"f"]])
        inside.check(d)


# Behaviour: a thread stopped anywhere, while others go on


@LIMITS
@each("ends", [False, True], ids=["others enqueue the same", "others stop"])
def test_enqueue_stopped_at_each_step_is_accepted_once_or_refused(ends: bool, limit: int) -> None:
    same = b"the very same object"
    for steps in each_step():
        d = holding(b"first", max_buffered_bytes=limit)
        came: list[bytes] = []
        others = 0
        gate = Gate()
        worker = Worker(steps.run, gate, d.enqueue, same)
        wait_until(lambda: gate.entered.is_set() or not worker.is_alive())
        if ends and not inside.locked(d):
            came += payloads(d.stop())
        elif not inside.locked(d):
            others = 2
            d.enqueue(same)
            came += payloads(drained(d))
            d.enqueue(same)
        gate.go_on.set()
        refused = refusal(worker.result)
        came += payloads(drained(d))
        assert refused in ((None, tempo.Stopped) if ends else (None,))
        assert came == [b"first", *[same] * (others + (refused is None))]
        assert balanced(d).accepted == len(came)
        inside.check(d)


@each("others", [0, 1, 2, 3])
def test_enqueue_many_stopped_at_each_step_is_accepted_once_and_in_order(others: int) -> None:
    sent = [b"one", b"two"]
    for steps in each_step():
        d = holding(b"first", max_batch_items=5)  # three more come without the lock
        gate = Gate()
        worker = Worker(steps.run, gate, d.enqueue_many, sent)
        wait_until(lambda: gate.entered.is_set() or not worker.is_alive())
        offered = [sent[1]] * (0 if inside.locked(d) else others)  # the very same object
        for payload in offered:
            d.enqueue(payload)
        gate.go_on.set()
        assert worker.result() == 2
        came = payloads(drained(d))
        assert sorted(came) == sorted([b"first", *sent, *offered]) and sent[1] in came[came.index(sent[0]) :]
        inside.check(d)


@each("sent", [[b"one", b"two"], [*map(str.encode, "12")]], ids=["payloads", "bytes"])
def test_enqueue_many_that_comes_too_late_loses_nothing_to_an_enqueue_of_the_same_object(sent: list[bytes]) -> None:
    for mine, other in ((mine, Steps(n, tempo)) for mine in each_step() for n in (3, 4)):
        d, gates = holding(b"first"), (Gate(), Gate())
        single = Worker(other.run, gates[0], d.enqueue, sent[1])
        wait_until(gates[0].entered.is_set)
        assert list(inside.buffer(d).run) == sent[1:]  # appended, and not looked at, or not decided
        inside.before_the_append(d.stats)  # which seals
        many = Worker(mine.run, gates[1], d.enqueue_many, sent)
        wait_until(lambda: gates[1].entered.is_set() or not many.is_alive())
        gates[0].go_on.set()
        single.join(0.0 if inside.locked(d) else LIMIT)
        gates[1].go_on.set()
        assert (many.result(), single.result()) == (2, None)
        vars(tempo).pop("min", None)
        assert payloads(drained(d)) in ([b"first", sent[1], *sent], [b"first", *sent, sent[1]])
        inside.check(d)


@each("others", [0, 1, 2, 3])
def test_enqueue_many_interrupted_at_any_step_tells_how_many_were_accepted(others: int) -> None:
    for steps in each_step():
        d = holding(b"first", max_batch_items=5)  # three more come without the lock
        inside.before_the_append(functools.partial(d.enqueue_many, [b"other"] * others))
        error = raised(steps.run, interrupt, d.enqueue_many, [b"same"] * 2)
        vars(tempo).pop("min", None)
        came = payloads(drained(d))
        inside.check(d)
        assert came.count(b"same") == (getattr(error, "accepted", 0) if error else 2)


def test_enqueue_many_without_memory_for_its_append_has_accepted_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    d = holding(b"first")
    monkeypatch.setattr(tempo._Run, "__iadd__", fails, raising=False)
    with pytest.raises(MemoryError) as error:
        d.enqueue_many([b"bb", b"cc"])
    assert (error.value.accepted, payloads(drained(d))) == (0, [b"first"])  # type: ignore[attr-defined]


def test_enqueue_many_that_comes_too_late_is_looked_at_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(*args: Any) -> bool:
        locked.append(inside.mine())
        return withdraw(*args)

    d, locked, withdraw = holding(b"first"), list[bool](), tempo._Run.withdraw
    monkeypatch.setattr(tempo._Run, "withdraw", noted)
    inside.before_the_append(d.stats)  # which seals
    d.enqueue_many([b"one", b"two"])
    assert (locked, payloads(drained(d))) == ([True], [b"first", b"one", b"two"])


def test_enqueue_many_takes_a_list_that_gets_shorter_meanwhile() -> None:
    d, few = make(), [b"few"] * (tempo._CHUNK + 1)
    inside.in_section(few.pop)
    assert d.enqueue_many(few) == len(few) == tempo._CHUNK


@pytest.mark.skipif(not CPYTHON, reason="counts references")
def test_enqueue_many_that_waits_keeps_no_payload_that_was_taken() -> None:
    d, payload = holding(b"first", max_buffered_bytes=1000), bytes(100)
    source = iter([payload, bytes(900), bytes(1000)])
    before = sys.getrefcount(payload)
    worker = begun(d, "waiting_producers", d.enqueue_many, source, timeout=None)
    assert d.get().tolist() == [b"first", payload]
    assert (sys.getrefcount(payload), worker.is_alive()) == (before, True)
    assert (d.get().nbytes, worker.result(), payloads(drained(d))) == (900, 3, [bytes(1000)])


def test_enqueue_many_takes_no_lock_where_enqueue_takes_none(clock: Clock) -> None:
    d = holding(b"a")
    before = clock.looks
    large = [bytes(512)] * 32
    assert d.enqueue_many([b"bb", b"cc"]) + d.enqueue_many(iter([b"dd"])) + d.enqueue_many(large) == 35
    assert clock.looks == before
    d.enqueue_many([b"ee", *large])  # to copy more would cost more than the lock
    assert clock.looks > before
    assert payloads(d.stop()) == [b"a", b"bb", b"cc", b"dd", *large, b"ee", *large]


def test_shutdown_by_a_signal_at_any_step_of_a_loop_over_batches_does_not_wait_for_itself() -> None:
    for steps in each_step():
        d = holding(b"a", b"b", max_batch_bytes=1)
        batches = d.batches()
        worker = Worker(lambda: [next(batches), steps.run(d.shutdown, next, batches)])
        assert payloads(worker.result()) == [b"a", b"b"]


def test_aenqueue_takes_no_lock_where_enqueue_takes_none(clock: Clock) -> None:
    d = holding(b"a")
    before = clock.looks
    run_async(d.aenqueue(b"b"))
    assert (clock.looks, payloads(d.stop())) == (before, [b"a", b"b"])


def test_aenqueue_out_of_time_is_refused_for_good_wherever_its_thread_stands() -> None:
    for steps in each_step(events=("call", "c_return", "return")):
        d, gate = full(10), Gate()
        worker = Worker(steps.run, gate, run_async, d.aenqueue(b"late", timeout=1e-3))
        wait_until(lambda: gate.entered.is_set() or not worker.is_alive())
        taken = [] if inside.locked(d) else [d.get(timeout=0)]  # now there is room
        gate.go_on.set()
        refused = refusal(worker.result)
        late = payloads([*taken, *drained(d)])[1:]
        assert (late, refused) in [([], tempo.QueueFull), ([b"late"], None)]
        assert balanced(d).waiting_producers == 0


def test_flush_is_not_true_before_the_handler_has_returned_wherever_its_thread_stands() -> None:
    for steps in each_step():
        d = holding(b"a", max_batch_bytes=1)
        gate = steps.do = Gate()
        threading.setprofile(steps)
        done = started(d)
        threading.setprofile(typing.cast(Any, None))
        wait_until(lambda: done or gate.entered.is_set())
        assert inside.locked(d) or not d.flush(0) or done == [b"a"]
        count = 0 if done else steps.count  # after that it only waits
        gate.go_on.set()
        assert d.flush(LIMIT) and done == [b"a"]
        d.shutdown(LIMIT)
        steps.count = count


def test_refusal_by_a_full_buffer_takes_no_lock() -> None:
    def refused() -> None:
        assert Worker(refusal, d.enqueue, large).result() is tempo.QueueFull
        for timeout in (1.0, *[0.0] * 1000):  # which it counts now and then, when it may
            assert refusal(d.enqueue, large, timeout) is tempo.QueueFull
        d.enqueue(bytes(40))  # fits
        assert raised(d.enqueue, b"").needed == 1

    large, d = bytes(41), holding(bytes(60), max_buffered_bytes=100, max_batch_bytes=1)
    assert refusal(d.enqueue, large) is tempo.QueueFull
    inside.in_section(refused)
    assert (d.stats().rejected, d.stats().rejected_bytes) == (1004, 1003 * 41 + 1)


# Behaviour: fork

FORKS = each("fork", ["os.fork", "ctypes.PyDLL(None).fork"][: 1 + CPYTHON])  # the second runs no hooks


@FORKS
@each(("stopped", "lock"), [(False, "threading.RLock"), (True, "threading.RLock"), (False, "Lock")])
def test_fork_gives_the_child_an_empty_dispatcher_and_a_lock_of_its_own(fork: str, stopped: bool, lock: str) -> None:
    sent = [b"p", b"by credit"][: 1 + (fork == "os.fork")]
    lines = program(f"""
        class Lock(threading._PyRLock):
            _at_fork_reinit = property()  # a library's lock may have none
        def clock():
            if threading.current_thread() is holder:
                held.set()
                go_on.wait()
            return time.monotonic()
        def child():
            sent = [b"c%d" % i for i in range(3000)]
            for payload in sent:
                d.enqueue(payload)  # nothing is lost that came before a fork without hooks was noticed
            s = d.stats()
            say(s.accepted, s.buffered, s.peak_buffered_bytes == sum(map(len, sent)), s.state)
            d.flush(timeout=0)
            say(d.get(timeout=0).tolist() == sent)
            d.shutdown()
            say(d.stats().state)
        threading.RLock = {lock}
        d, held, go_on = make(), threading.Event(), threading.Event()
        d.enqueue_many([b"a", b"b"])
        d.stop() if {stopped} else d.flush(0)
        for payload in [] if {stopped} else {sent}:
            d.enqueue(payload)  # a batch is open, and credit out
        tempo._monotonic = clock
        holder = threading.Thread(target=d.stats)
        holder.start()
        held.wait()
        say(in_child(child, {fork}))
        go_on.set()
        holder.join()
        say(d.stats().state, [batch.tolist() for batch in d.stop()])
    """)
    rest = "stopped []" if stopped else f"running {[[b'a', b'b'], sent]}"
    assert lines == ["3000 3000 True running", "True", "stopped", "0", rest]


@FORKS
@each("work", ['enqueue(b"child")', 'enqueue_many([b"child"])'])
def test_fork_brings_the_handlers_thread_back_at_the_childs_first_enqueue(fork: str, work: str) -> None:
    lines = program(f"""
        d = make()
        def handler(batch):
            for item in batch.tolist():
                say(item, threading.current_thread() is not threading.main_thread())
        d.start(handler)
        d.enqueue(b"parent")
        d.flush()
        d.enqueue(b"open")  # and credit is out: without hooks the child's first one may go unnoticed
        def init(*args, **kwargs):
            threading.Thread.__init__ = real
            d.enqueue(b"meanwhile")  # as another thread does, which is as early
            real(*args, **kwargs)
        def child():
            global real
            real, threading.Thread.__init__ = threading.Thread.__init__, init
            d.{work}
            say(d.flush(timeout=10))
            d.shutdown(timeout=10)
        say(in_child(child, {fork}))
        d.enqueue(b"parent again")
        d.shutdown()
    """)
    assert sorted(lines[1:3]) == ["b'child' True", "b'meanwhile' True"]
    assert lines[:1] + lines[3:] == ["b'parent' True", "True", "0", "b'open' True", "b'parent again' True"]


def test_fork_in_the_handler_ends_the_childs_copy_of_its_thread() -> None:
    lines = program("""
        def handler(batch):
            say(batch.tolist())
            if batch[0] == b"parent":
                me.append(threading.current_thread())
                statuses.append(os.waitpid(pid, 0)[1] if (pid := os.fork()) else signal.alarm(20))
                d.enqueue(b"child") if pid == 0 else None
            else:
                while me[0].is_alive():
                    time.sleep(0.001)
                os._exit(7 if d.flush() is False else 8)  # it is known as the handler's thread
        me, statuses = [], []
        d = make(max_batch_bytes=1)
        d.start(handler)
        d.enqueue(b"parent")
        d.shutdown()
        say([os.WEXITSTATUS(status) for status in statuses])
    """)
    assert lines[:2] == ["[b'parent']", "[b'child']"]
    # From 3.14 on, the child may end with the thread that forked.
    assert lines[2] == "[7]" or (sys.version_info >= (3, 14) and lines[2] == "[0]")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@each("outer", [*OUTER, "wait in get", "wait in flush"])
def test_fork_by_a_signal_handler_in_a_call_leaves_the_child_working_when_it_returns_there(outer: str) -> None:
    pid = -1

    def fork() -> None:
        nonlocal pid
        pid = os.fork() if pid < 0 else pid  # once, though the child calls from a second thread
        signal.alarm(0 if pid else 20)
        d.enqueue(b"c") if outer == "wait in get" else None
        d.get(timeout=0) if outer == "wait in flush" and pid else None  # the child has nothing to flush

    d = make(max_batch_bytes=1) if outer == "wait in get" else holding(b"a", b"b", max_batch_items=2)
    try:
        if "wait" in outer:
            with signal_in_a_wait(fork):
                assert d.flush() if outer == "wait in flush" else d.get(timeout=LIMIT).tolist() == [b"c"]
                os._exit(0) if not pid else None
        else:
            inside.in_section(fork)
            with contextlib.suppress(queue.Empty):
                OUTER[outer](d)
        if not pid and outer not in ENDING:
            d.enqueue(b"child")
            assert b"child" in payloads(drained(d))
            assert Worker(d.stats).result().state == "running"
    finally:
        if not pid:
            os._exit(sys.exc_info()[0] is not None)
    assert os.waitpid(pid, 0)[1] == 0


def test_fork_hooks_keep_no_dispatcher_alive() -> None:
    with make() as done:
        done.start(print)
    seen = [weakref.ref(holding(b"x")), weakref.ref(done)]
    del done
    gc.collect()
    assert [reference() for reference in seen] == [None, None]


# Behaviour: the interpreter's exit

STARTED = """
for _ in range(2):
    d = make()
    d.start(lambda batch: say(batch.tolist()))
    d.enqueue_many([b"a", b"b"])
del d
gc.collect()  # what was started lives until its shutdown
threading.Thread.start = None
"""
HANGS = """
d = make(max_batch_bytes=1)
d.start(lambda batch: time.sleep(60), {})
d.enqueue_many([b"in flight", b"1234", b"56"])
while not d.stats().in_flight:
    time.sleep(0.001)
"""
OTHER = """
e = make()
e.start(lambda batch: say(batch.tolist()), exit_timeout=20)
e.enqueue(b"x")
"""
LATE = """
with contextlib.suppress(tempo.DrainTimeout):
    d.shutdown(0.1)
"""
ON_ERROR = "exit_timeout=0.1, on_error=lambda exc, batch: say(type(exc).__name__, batch.tolist())"
PULLED = """
warnings.simplefilter("{}", ResourceWarning)
empty, d = make(), make()
d.enqueue_many([b"nobody", b"comes"])
threading.Thread(target=empty.get, daemon=True).start()
"""
THREADLESS = """
d = make()
d.start(lambda batch: [say("x") for _ in batch], exit_timeout={})
pid = os.fork()
if pid:
    say(os.waitpid(pid, 0)[1])
else:
    signal.alarm(20)
    def start(self):
        raise RuntimeError("can't start new thread")
    real, threading.Thread.start = threading.Thread.start, start
    d.enqueue_many([b"x"] * {}) if {} else None
    try:
        assert not d.stats().accepted or d.shutdown(), "it cannot be drained here"
    except RuntimeError:
        pass
"""
FLUSHED = """
    threading.Thread.start = real
    os._exit(not d.flush(timeout=10))
"""
TRIED_AGAIN = """
    threading.Thread.start = real
    d.enqueue(b"x")
    os._exit(threading.active_count() == 1)
"""
FINALIZERS = """
class Finalizer:
    def __init__(self, call):
        self.call, self.me = call, self  # a cycle, which the interpreter's last collection finds
    def __del__(self):
        say(self.call())
gc.disable()
d = make(max_buffered_bytes=5)
d.enqueue(b"12345")
for call in (lambda: d.enqueue(b"6", timeout=None), lambda: d.flush(), lambda: d.shutdown()):
    Finalizer(call)
"""
BOTH, FOREVER = ["[b'a', b'b']"] * 2, "float('inf')"
EXITS: dict[str, tuple[str, list[str], str, int]] = {  # a program, what it prints, what stderr says, exit code
    "drains and starts no thread": (STARTED, BOTH, "", 0),
    "drains after sys.exit": (STARTED + "sys.exit(3)", BOTH, "", 3),
    "drains after an error": (STARTED + "raise ValueError('mine')", BOTH, "Traceback.*ValueError: mine\n", 1),
    "drains after SIGTERM": (STARTED + "signal.signal(15, lambda *_: sys.exit(4)); signal.raise_signal(15)", BOTH, "", 4),  # noqa: E501
    "tells in one line what is undelivered, and drains the others": (
        HANGS.format("exit_timeout=0.1") + OTHER, ["[b'x']"], r"[^\n]*\b2 payloads[^\n]*\b6 bytes[^\n]*\n", 0,
    ),
    "tells nobody where there is no stderr": (HANGS.format("exit_timeout=0.1") + "sys.stderr = None", [], "", 0),
    "hands to on_error what is undelivered, batch by batch": (
        HANGS.format(ON_ERROR), ["DrainTimeout [b'1234']", "DrainTimeout [b'56']"], "", 0,
    ),
    "waits for nobody after a shutdown out of time": (HANGS.format(f"exit_timeout={FOREVER}") + LATE, [], "", 0),
    "in pull mode holds nobody up": (PULLED.format("ignore"), [], "", 0),
    "in pull mode warns of what is left": (PULLED.format("always"), [], r"[^\n]*ResourceWarning:[^\n]*\b2 payl.*", 0),
    "drains in a child without threads": (THREADLESS.format(FOREVER, 30, 1), [*["x"] * 30, "0"], "", 0),
    "need not drain what a flush could": (THREADLESS.format(0, 30, 1) + FLUSHED, [*["x"] * 30, "0"], "", 0),
    "finds a thread that a later enqueue starts": (THREADLESS.format(0, 1, 1) + TRIED_AGAIN, ["0"], "", 0),
    "ends a child that had nothing to do": (THREADLESS.format(FOREVER, 30, 0), ["0"], "", 0),
    "tells what a child without threads has left": (THREADLESS.format(0, 30, 1), ["0"], r"[^\n]*\b30 payl[^\n]*\n", 0),
    "runs finalizers that never wait": (FINALIZERS, ["False", "None"], ".*QueueFull.*", 0),
}  # fmt: skip


@each("case", EXITS)
def test_exit(case: str) -> None:
    source, lines, told, code = EXITS[case]
    if source is FINALIZERS and sys.implementation.name != "cpython":
        pytest.skip("finalizers run at exit on CPython alone")
    printed = program(source, told=told, code=code)
    assert (sorted(printed) if source is FINALIZERS else printed) == lines  # finalizers come in no order


def test_exit_waits_for_no_thread_that_has_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Any] = []
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    inside.in_section(lambda: outcomes.append(Worker(refusal, make().stats).result()))
    make().stats()
    assert outcomes == [tempo.Stopped]


# Vendoring: one file of pure standard library


def test_vendored_under_another_name_it_works_alone_and_has_its_licence_with_it(tmp_path: Path) -> None:
    text = (ROOT / "tempo.py").read_text(encoding="utf-8")
    licence = text[: text.index('"""')]
    for part in ("SPDX-License-Identifier: MIT", "Copyright", "Permission is hereby granted", tempo.__version__):
        assert part in licence
    (tmp_path / "my_events.py").write_text(text, encoding="utf-8")
    source = f"""
        import sys
        before = set(sys.modules)
        sys.path[:0] = [{str(tmp_path)!r}]
        import my_events
        brought = {{name.partition(".")[0] for name in set(sys.modules) - before}} - {{"my_events"}}
        heavy = {{"asyncio", "logging", "dataclasses", "inspect"}} & brought
        with my_events.Dispatcher(interval=60, max_buffered_bytes=1024) as d:
            d.start(lambda batch: print(batch.tolist()))
            d.enqueue(b"x")
        print(sorted(brought - sys.stdlib_module_names), sorted(heavy))
    """
    assert program(source, "-I", "-S", prelude="") == ["[b'x']", "[] []"]


def test_vendored_examples_and_type_hints_can_be_evaluated() -> None:
    outcome = doctest.testmod(tempo)
    assert outcome.attempted > 0 and outcome.failed == 0
    for owner in (tempo.Dispatcher, tempo.Batch):
        for name, value in vars(owner).items():
            if inspect.isfunction(value) and not re.match("_[^_]|__init__", name):
                typing.get_type_hints(value)
