# SPDX-License-Identifier: MIT
"""Misuse: values out of every range, everything called twice and at once, dispatchers made and dropped."""

from __future__ import annotations

import array
import asyncio
import atexit
import contextlib
import copy
import ctypes
import decimal
import fractions
import gc
import itertools
import math
import mmap
import os
import pickle
import queue
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tempo
from soak.hostile import LeftOut, case, times
from soak.hostile.checks import (
    LIMIT,
    LONG,
    Census,
    Receiver,
    Worker,
    at_rest,
    balanced,
    dice,
    drained,
    expect,
    wait_until,
)

try:
    import tracemalloc
except ImportError:  # PyPy has none
    TRACED = False
else:
    TRACED = True

# -- Values out of every range -----------------------------------------------------------------------------------------


class Unshowable:
    """Has no repr."""

    def __repr__(self) -> str:
        raise KeyError("no repr")


class OddFloat(float):
    """Cannot be compared."""

    def _refuse(self, _: object) -> bool:
        raise KeyError("no comparison")

    __lt__ = __le__ = __gt__ = __ge__ = _refuse


NO_NUMBERS: list[Any] = [
    "1", b"1", True, False, [], (1,), {}, 1j, float, decimal.Decimal(1), fractions.Fraction(1, 2), object(),
    Unshowable(),
]  # fmt: skip
NEGATIVE: list[Any] = [-1, -0.001, -5e-324, -math.inf, math.nan, -(10**30), -(10**5000)]
TOO_LONG: list[Any] = [math.inf, 1e300, threading.TIMEOUT_MAX * 2, 10**30, 10**5000]
NO_SIZES: list[Any] = [*NO_NUMBERS, 1.0, 1e6, math.nan, math.inf]


class Bad(NamedTuple):
    """A call with one bad argument."""

    name: str
    call: Callable[[tempo.Dispatcher, Any], object]
    types: list[Any]  # values that are of no type it takes
    values: list[Any]  # values out of range


def made(**limits: Any) -> tempo.Dispatcher:
    """A dispatcher with some limits of its own."""
    return tempo.Dispatcher(**{"interval": LONG, "max_buffered_bytes": 100, **limits})


BAD = [
    Bad("interval", lambda _, v: made(interval=v), [*NO_NUMBERS, None], [*NEGATIVE, *TOO_LONG, 0, 0.0, -0.0]),
    Bad("max_buffered_bytes", lambda _, v: made(max_buffered_bytes=v), [*NO_SIZES, None], [0, -1, -(10**5000)]),
    Bad("max_batch_bytes", lambda _, v: made(max_batch_bytes=v), NO_SIZES, [0, -1, -(10**5000)]),
    Bad("timeout", lambda d, v: d.enqueue(b"x", timeout=v), NO_NUMBERS, NEGATIVE),
    Bad("timeout", lambda d, v: d.enqueue(bytearray(1000), timeout=v), NO_NUMBERS, NEGATIVE),
    Bad("timeout", lambda d, v: d.enqueue_many([b"x"], timeout=v), NO_NUMBERS, NEGATIVE),
    Bad("timeout", lambda d, v: d.enqueue_many(iter([b"x"]), timeout=v), NO_NUMBERS, NEGATIVE),
    Bad("timeout", lambda d, v: d.enqueue_many([], timeout=v), NO_NUMBERS, NEGATIVE),
    Bad("timeout", lambda d, v: d.get(v), NO_NUMBERS, NEGATIVE),
    Bad("timeout", lambda d, v: d.flush(v), NO_NUMBERS, NEGATIVE),
    Bad("timeout", lambda d, v: d.shutdown(v), NO_NUMBERS, NEGATIVE),
    Bad("handler", lambda d, v: d.start(v), [None, 1, "f", b"f", [], Unshowable()], []),
    Bad("on_error", lambda d, v: d.start(print, on_error=v), [1, "f", b"f", [], Unshowable()], []),
    Bad("exit_timeout", lambda d, v: d.start(print, exit_timeout=v), [*NO_NUMBERS, None], NEGATIVE),
    Bad(
        "payload",
        lambda d, v: d.enqueue(v),
        [None, 1, "x", "\udc80" * 1000, [b"x"], (), object(), Unshowable(), bytes, memoryview(b"1234")[::2],
         memoryview(b"1234")[::-1], memoryview(array.array("d", [1, 2, 3]))[::2]],
        [],
    ),
]  # fmt: skip


def in_every_state() -> Iterator[tuple[str, tempo.Dispatcher]]:
    """Dispatchers in all states, in none of which anything happens by itself."""
    yield "fresh", made()
    d = made()
    d.enqueue_many([b"open", b"", bytearray(b"batch")])
    yield "open", d
    d = made(max_batch_bytes=3)
    d.enqueue_many([b"abc"] * 5)
    yield "closed", d
    d = made()
    d.enqueue(bytes(100))
    yield "full", d
    d = made()
    d.start(lambda _: None)
    wait_until(lambda: d.stats().waiting_consumers == 1)
    yield "pushed", d
    d = made()
    yield "shutting down", leaving(d, [b"left"])
    d = made()
    d.shutdown()
    yield "shut down", d
    d = made()
    d.enqueue(b"back")
    d.stop()
    yield "stopped", d


def leaving(d: tempo.Dispatcher, payloads: list[bytes]) -> tempo.Dispatcher:
    """Bring a dispatcher into the middle of a shutdown for which nobody waits, with these payloads to go."""
    d.enqueue(b"!")
    d.flush(0)
    body = iter(d)
    next(body)
    d.enqueue_many(payloads)
    d.shutdown()  # in a loop's body it does not wait
    del body
    expect(d.stats().state == "shutting_down")
    return d


def over(d: tempo.Dispatcher) -> None:
    """End a dispatcher, and see that it is at rest."""
    d.stop()
    thread = d._state.thread
    if thread is not None:
        thread.join(LIMIT)
        expect(not thread.is_alive(), "the handler's thread is left")
    at_rest(d)


@case(limit=120)
def bad_values(scale: float) -> int:
    """Every argument of every method, in every state: the error names argument and value, and nothing has changed."""
    tried = 0
    for state, d in itertools.islice(in_every_state(), times(8, max(scale, 0.3))):
        for bad in BAD:
            for kind, value in [*((TypeError, v) for v in bad.types), *((ValueError, v) for v in bad.values)]:
                before, push = d.stats(), d._push
                try:
                    shown = repr(value)[:30]
                except Exception:  # none, or more digits than are allowed
                    shown = type(value).__name__
                what = f"{bad.name} {type(value).__name__} {shown} {state}"
                try:
                    bad.call(d, value)
                except (TypeError, ValueError) as error:
                    expect(isinstance(error, kind) and not isinstance(error, tempo.Error), what, error)
                    text = str(error)
                    expect(text.startswith(bad.name) and shown in text and len(text) < 200, what, text)
                    expect(getattr(error, "accepted", 0) == 0, what)
                else:
                    expect(False, "no error", what)
                expect(d.stats() == before and d._push is push, what, before, d.stats())
                expect(len(d._state.inbox) == 1, "left in the inbox", what)
                tried += 1
            before = d.stats()
            try:
                bad.call(d, OddFloat(1))
            except (KeyError, TypeError):  # its own error, or no number was wanted
                expect(d.stats() == before and len(d._state.inbox) == 1, bad.name, state)
            else:
                expect(False, "no error", bad.name, state)
        over(d)
    return tried


class Raw(ctypes.Structure):
    """Something with a buffer."""

    _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_double))


def bytes_of(payload: Any) -> bytes:
    """What a payload's buffer holds."""
    with memoryview(payload) as view:
        return view.tobytes()


@case(limit=120)
def payloads_of_every_kind(scale: float) -> int:
    """Whatever has a contiguous buffer is taken by value, in one call and in many; among bad ones, up to the first."""

    def pages() -> mmap.mmap:
        memory = mmap.mmap(-1, 5000)
        memory[:5] = b"pages"
        return memory

    class Bytes(bytes):
        def __len__(self) -> int:
            return 3

        def __eq__(self, _: object) -> bool:
            raise KeyError

        __hash__ = bytes.__hash__

    kinds: list[Callable[[], Any]] = [
        lambda: b"",
        lambda: b"bytes",
        lambda: Bytes(b"a subclass"),
        lambda: bytearray(b"mutable"),
        lambda: memoryview(b"view"),
        lambda: memoryview(bytearray(b"a longer view"))[2:7],
        lambda: memoryview(bytes(range(24))).cast("d", (1, 3)),
        lambda: array.array("d", [1.5, -2]),
        lambda: (ctypes.c_int * 3)(1, 2, 3),
        lambda: ctypes.c_long(7),
        lambda: Raw(1, 2.0),
        lambda: pickle.PickleBuffer(bytearray(b"pickled")),
        pages,
    ]
    bad = [None, 1, "text", memoryview(b"1234")[::2], [b"x"]]
    n = times(300, scale)
    rng = dice("payloads_of_every_kind")
    for _ in range(n):
        d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=1 << 20, max_batch_bytes=rng.choice([None, 20, 5000]))
        want: list[bytes] = []
        for _ in range(rng.randrange(1, 40)):
            payloads = [rng.choice(kinds)() for _ in range(rng.randrange(1, 6))]
            values = [bytes_of(payload) for payload in payloads]
            if rng.random() < 0.5:
                for payload in payloads:
                    d.enqueue(payload)
            else:
                at = rng.randrange(2 * len(payloads))
                if at < len(payloads):
                    payloads.insert(at, rng.choice(bad))
                    values = values[:at]
                given: Any = rng.choice([list(payloads), tuple(payloads), iter(payloads)])
                try:
                    accepted = d.enqueue_many(given)
                except TypeError as error:
                    accepted = error.accepted  # type: ignore[attr-defined]
                    expect(at < len(payloads))
                expect(accepted == len(values), accepted, len(values))
                if hasattr(given, "__next__"):
                    expect(len(list(given)) == len(payloads) - min(at + 1, len(payloads)), "read too far")
            want += values
            for payload in payloads:
                with contextlib.suppress(TypeError), memoryview(payload) as view:
                    if not view.readonly and view.c_contiguous:
                        with view.cast("B") as flat:
                            flat[:] = bytes(len(flat))  # what comes after the call is no matter
            if isinstance(payloads[0], bytearray):
                payloads[0].append(1)  # nobody holds a view of it
        got = [item for batch in drained(d) for item in batch.tolist()]
        expect(got == want, got, want)
        expect(d.stats()[:2] == (len(want), sum(len(item) or 1 for item in want)))
        at_rest(d)
    return n


@case(limit=120)
def batches_misused(scale: float) -> int:
    """A batch is a sequence that nothing can change: bad indices and assignments raise, copies are equal."""
    d = made()
    items = [b"one", b"", b"three", b"x" * 50]
    n = times(1000, scale)
    for _ in range(n):
        d.enqueue_many(items)
        d.flush(0)
        batch = d.get(0)

        def bad(kind: type[Exception], work: Callable[..., object], *args: Any) -> None:
            try:
                work(*args)
            except kind:
                return
            expect(False, "no error", kind, work, args)

        for index in (4, -5, 1 << 40, -(10**30)):
            bad(IndexError, batch.__getitem__, index)
        for thing in (None, "0", 1.0, b"0", ()):
            bad(TypeError, batch.__getitem__, thing)
        for name in ("data", "nbytes", "_data", "_sizes", "_ends", "other", "__class__"):
            bad(AttributeError, setattr, batch, name, 1)
            bad(AttributeError, delattr, batch, name)
        bad(TypeError, lambda b=batch: b.__setitem__(0, b"x") if hasattr(b, "__setitem__") else 1 + b)
        for view in (batch.data, batch[0], next(iter(batch)), *batch[1:3]):
            bad(TypeError, view.__setitem__, slice(None), bytes(len(view)))
        batch.data.release()  # a view of its own
        for _ in range(2):
            for other in (batch, pickle.loads(pickle.dumps(batch)), copy.copy(batch), copy.deepcopy(batch)):
                expect(other.tolist() == items and [bytes(view) for view in other] == items, other.tolist())
                expect([bytes(view) for view in other[::-1]] == items[::-1] and other[10**30 :] == [])
                expect(bytes(other.data) == b"".join(items) and other.nbytes == 58 and len(other) == 4)
    at_rest(d)
    return n


# -- Sizes beyond measure ----------------------------------------------------------------------------------------------


def available() -> int:
    """Bytes of memory that can be had, as far as this machine tells."""
    free = 1 << 62
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        found = dict(line.split(":") for line in lines)
        free = int(found["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(ImportError):
        import resource  # noqa: PLC0415 - not on Windows

        for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            soft = resource.getrlimit(limit)[0]
            if soft != resource.RLIM_INFINITY:
                free = min(free, soft // 2)
    return free


def reserved(size: int) -> mmap.mmap:
    """An address range of zeros that takes no memory until somebody copies it."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        raise LeftOut("memory cannot be reserved here")
    lazily = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | lazily)
    except (OSError, OverflowError, ValueError) as error:
        raise LeftOut(f"{size} bytes of addresses cannot be reserved: {error}") from None


def resident() -> int:
    """Bytes of memory that this process has, or 0 where nothing tells."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as line:
        return int(line.read().split()[1]) * mmap.PAGESIZE
    return 0


@case(limit=300)
def payloads_of_gibibytes(scale: float) -> int:
    """Payloads of 2 GiB to more than 4, alone in their batches: none is copied that need not be, none is cut."""
    if sys.maxsize < 1 << 33:
        raise LeftOut("this interpreter has no such objects")
    sizes = [(1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, 5 << 30]
    if available() < 6 << 30:
        raise LeftOut("this machine has less than 6 GiB to spare")
    before = resident()
    tried = 0
    for size in sizes[: times(len(sizes), max(scale, 0.5))]:
        payload = bytes(size)  # of zeros that the system has not made yet
        if resident() - before > 1 << 30:
            raise LeftOut("this interpreter cannot have zeros without having memory")
        for batch_bytes in (None, 1000, size + 10):
            d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=size + 3, max_batch_bytes=batch_bytes)
            d.enqueue(payload)
            try:
                d.enqueue(b"more")
            except tempo.QueueFull as error:
                expect((error.needed, error.buffered_bytes) == (4, size), error)
            else:
                expect(False, "it did not fit")
            expect(balanced(d).buffered_bytes == size == d.stats().peak_buffered_bytes)
            (batch,) = d.stop() if batch_bytes is None else drained(d)
            expect(batch.data.obj is payload and batch[0].obj is payload and batch[-1].nbytes == batch.nbytes == size)
            expect(at_rest(d)[:2] == (1, size))
            tried += 1
        d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=size - 1)
        too_large(d, payload)
        tried += 1
        del batch, payload
    expect(not before or resident() - before < 1 << 30, "copied", resident() - before)
    return tried


def too_large(d: tempo.Dispatcher, payload: Any) -> None:
    """See that a payload is refused as too large, by every call."""
    calls: list[Callable[[], object]] = [
        lambda: d.enqueue(payload),
        lambda: d.enqueue(payload, timeout=None),
        lambda: d.enqueue_many([payload]),
        lambda: d.enqueue_many(iter([payload]), timeout=LIMIT),
    ]
    size = memoryview(payload).nbytes
    for call in calls:
        refused = d.stats()[10:12]
        try:
            call()
        except tempo.PayloadTooLarge as error:
            expect(getattr(error, "accepted", 0) == 0 and str(d._max_buffered) in str(error), error)
        else:
            expect(False, "not too large")
        expect(d.stats()[10:12] == (refused[0] + 1, refused[1] + size), refused, d.stats())
        expect(len(d._state.inbox) == 1, "left in the inbox")


@case(limit=120)
def too_large_to_copy(scale: float) -> int:
    """A mutable payload that can never fit is refused without a copy, whatever its size; and one beyond all memory."""
    if sys.maxsize < 1 << 40:
        raise LeftOut("this interpreter has no such objects")
    n = times(20, scale)
    memory = reserved(1 << 40)
    before = resident()
    for i in range(n):
        d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=1 << (10 + i))
        for payload in (memory, memoryview(memory), memoryview(memory)[: (1 << 31) + 1]):
            too_large(d, payload)
        over(d)
        d.stop()
        try:
            d.enqueue(memoryview(memory))
        except tempo.Stopped:
            pass
        else:
            expect(False, "it is stopped")
    expect(not before or resident() - before < 1 << 28, "copied", resident() - before)
    del payload
    memory.close()  # nobody holds a view of it
    return n * 12


@case(limit=300)
def mutable_payloads_of_gibibytes(scale: float) -> int:
    """Mutable payloads of 2 GiB and over are copied; two that make a batch of over 4 GiB end where they should."""
    if sys.maxsize < 1 << 33:
        raise LeftOut("this interpreter has no such objects")
    half = int(2 * (1 << 30) * min(1.0, scale)) + 1
    if available() < 8 * half + (2 << 30):
        raise LeftOut(f"this machine has less than {8 * half + (2 << 30)} bytes to spare")
    memory = reserved(half)
    d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=1 << 40)
    for mark in (b"first", b"second"):
        memory[-len(mark) :] = mark
        d.enqueue(memoryview(memory))
    memory[-6:] = b"change"
    d.enqueue(b"third")
    (batch,) = drained(d)
    del d
    expect([len(view) for view in batch] == [half, half, 5])
    expect(bytes(batch[0][-5:]) == b"first" and bytes(batch[1][-6:]) == b"second" and bytes(batch[2]) == b"third")
    expect(batch[-2].nbytes == half and batch.nbytes == 2 * half + 5)
    memory.close()
    return 2


@case(limit=120)
def limits_of_tebibytes(scale: float) -> int:
    """Buffers and batches of 1 TiB and of more than any machine has: no memory is taken, and all goes on as usual."""
    rng = dice("limits_of_tebibytes")
    huge = [1 << 40, 1 << 63, (1 << 64) + 1, 10**400]
    n = times(40, scale)
    for i in range(n):
        census = Census()
        sender, receiver = census.sender(), census.receiver()
        gc.collect()
        tracing = TRACED and i % 4 == 0
        if tracing:
            tracemalloc.start()
        d = tempo.Dispatcher(
            interval=rng.choice([LONG, 0.0005]),
            max_buffered_bytes=huge[i % 4],
            max_batch_bytes=rng.choice([None, 1 << 40, 1 << 63, 10**400, 5000]),
        )
        d.enqueue(b"")
        d.flush(0)
        expect(d.get(0).tolist() == [b""])
        if tracing:
            expect(tracemalloc.get_traced_memory()[1] < 100_000, tracemalloc.get_traced_memory())
            tracemalloc.stop()
        for _ in range(3):
            sender.try_many(d, [rng.randrange(300) for _ in range(2000)], timeout=rng.choice([0, None]))
            for _ in range(2000):
                sender.try_one(d, rng.randrange(300))
            d._check()
            repr(d)
            receiver.take_all(drained(d))
        d.start(receiver.take, exit_timeout=10**400)
        sender.try_many(d, [rng.randrange(300) for _ in range(2000)])
        expect(d.flush(10**400))
        d.shutdown(10**400)
        s = at_rest(d)
        expect(s.rejected == 0 and s.delivered == len(sender.accepted) + 1 == 14_001, s)
        expect(receiver.payloads == sender.accepted)
    return n


# -- Made and dropped --------------------------------------------------------------------------------------------------


class Trace(NamedTuple):
    """What dispatchers could leave behind in a process."""

    threads: int
    descriptors: int
    callbacks: int  # of atexit
    hooks: tuple[int, ...]  # references to what is registered at fork and at exit
    dispatchers: int  # that tempo knows of
    locks: int


def trace() -> Trace:
    """What there is now; after a collection of garbage."""
    for _ in range(4):  # more than one is for PyPy
        gc.collect()
    folder = "/proc/self/fd"
    return Trace(
        threads=threading.active_count(),
        descriptors=len(os.listdir(folder)) if os.path.isdir(folder) else 0,
        callbacks=getattr(atexit, "_ncallbacks", int)(),
        hooks=tuple(getattr(sys, "getrefcount", id)(hook) for hook in (tempo._after_fork_in_child, tempo._at_exit)),
        dispatchers=len(tempo._DISPATCHERS),
        locks=len(tempo._LOCKS),
    )


def nothing_stays(n: int, use: Callable[[int], weakref.ref[tempo.Dispatcher]]) -> int:
    """Make, use and drop n dispatchers: nothing stays of them; return n."""
    kinds = 64  # rounds in which everything that is made once is made
    for i in range(2 * kinds):
        use(i)
    before, objects = trace(), len(gc.get_objects())
    if TRACED:
        tracemalloc.start()
        for i in range(kinds):
            use(i)
        gc.collect()
    traced = tracemalloc.get_traced_memory()[0] if TRACED else 0
    left = [ref for ref in map(use, range(n)) if ref() is not None]
    after = trace()
    expect(not [ref for ref in left if ref() is not None], "dispatchers are kept alive")
    expect(after == before, before, after)
    del left
    gc.collect()
    if TRACED:
        grown = tracemalloc.get_traced_memory()[0] - traced
        tracemalloc.stop()
        expect(grown < 100_000, "memory", grown)
    grown = len(gc.get_objects()) - objects
    expect(grown < 100, "objects", grown)
    return n


@case(limit=300)
def dropped_in_pull_mode(scale: float) -> int:
    """10,000 dispatchers made, used in some way, and dropped in any state: no reference, thread or hook is left."""

    def refused(d: tempo.Dispatcher) -> None:
        for payload in (bytes(200), "text", bytes(60), bytes(60)):
            with contextlib.suppress(tempo.Error, TypeError):
                d.enqueue(payload)  # type: ignore[arg-type]

    def looped(d: tempo.Dispatcher) -> None:
        d.enqueue_many([b"a"] * 20)
        d.flush(0)
        body = iter(d)
        next(body)
        d.flush()  # in a loop's body neither of these waits
        d.shutdown()

    def in_time(d: tempo.Dispatcher) -> None:
        d.enqueue(bytes(100))
        for call in (lambda: d.get(0.0001), lambda: d.enqueue(b"x", timeout=0.0001), lambda: d.shutdown(0.0001)):
            with contextlib.suppress(tempo.Error, queue.Empty):
                call()

    uses: list[Callable[[tempo.Dispatcher], object]] = [
        lambda _: None,
        lambda d: d.enqueue(b"left in it"),
        lambda d: d.enqueue_many(iter([b"x"] * 60)) and d.flush(0),
        lambda d: d.enqueue_many([b""] * 100) and drained(d),
        refused,
        looped,
        in_time,
        lambda d: d.stop(),
        lambda d: d.shutdown(),
        lambda d: leaving(d, [b"left"]),
        lambda d: d.__enter__() and repr(d),
        lambda d: d.__aiter__(),
    ]

    def use(i: int) -> weakref.ref[tempo.Dispatcher]:
        with contextlib.suppress(ValueError):
            made(interval=-1)
        d = made(max_batch_bytes=(None, 5)[i % 2])
        uses[i % len(uses)](d)
        return weakref.ref(d)

    return nothing_stays(times(10_000, scale), use)


@case(limit=300)
def dropped_in_push_mode(scale: float) -> int:
    """10,000 dispatchers started, shut down or stopped, and dropped: neither a thread nor a reference is left."""

    def use(i: int) -> weakref.ref[tempo.Dispatcher]:
        d = made(interval=0.001 if i % 3 else LONG)
        got: list[bytes] = []
        d.start(lambda batch: got.extend(batch.tolist()))
        if i % 2:
            d.enqueue(b"x")
        if i % 5:
            d.shutdown(LIMIT)
            expect(got == [b"x"][: i % 2])
        else:
            d.stop()
            d._state.thread.join(LIMIT)  # type: ignore[union-attr]
        with contextlib.suppress(tempo.Stopped):
            d.start(print)
        return weakref.ref(d)

    return nothing_stays(times(10_000, scale), use)


@case(limit=300)
def dropped_by_who_waits(scale: float) -> int:
    """Dispatchers dropped once their waiting coroutines are cancelled and their waiting threads are told to stop."""

    async def wait(d: tempo.Dispatcher) -> None:
        async for _ in d:
            pass

    async def cancelled(d: tempo.Dispatcher, n: int) -> None:
        tasks = [asyncio.ensure_future(wait(d)) for _ in range(n)]
        while d.stats().waiting_consumers < n:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def use(i: int) -> weakref.ref[tempo.Dispatcher]:
        d = made()
        if i % 16:
            loop.run_until_complete(cancelled(d, i % 3 + 1))
            return weakref.ref(d)

        def until_stopped(call: Callable[..., object], *args: Any, **kwargs: Any) -> None:
            with contextlib.suppress(tempo.Stopped):
                call(*args, **kwargs)

        d.enqueue(bytes(100))
        waiting = [
            Worker(until_stopped, d.get),
            Worker(until_stopped, d.enqueue, b"x", timeout=None),
            Worker(until_stopped, d.flush, LIMIT),
            Worker(until_stopped, list, d),
        ]
        waiting.append(Worker(until_stopped, d.shutdown, LIMIT))
        d.stop()
        for worker in waiting:
            worker.result()
        return weakref.ref(d)

    loop = asyncio.new_event_loop()
    try:
        return nothing_stays(times(5_000, scale), use)
    finally:
        loop.close()


# -- Everything twice, in every order, and at once ---------------------------------------------------------------------
#
# What is possible is computed: a model of a dispatcher whose calls are made of steps, each of them one locked section
# of tempo's, and all orders of the steps of several callers, of the handler's thread and of whoever opens the handler's
# gate. A run's outcome is what each call returned or raised, what was handled and handed back, and the final stats.


class Model(NamedTuple):
    """A dispatcher with an interval that never ends."""

    room: int  # max_buffered_bytes
    phase: str = "running"
    halted: bool = False
    closed: tuple[tuple[bytes, ...], ...] = ()  # batches
    open: tuple[bytes, ...] = ()
    flight: tuple[bytes, ...] = ()
    flight_first: int = -1
    handled: tuple[bytes, ...] = ()
    accepted: int = 0
    taken: int = 0
    discarded: int = 0
    rejected: int = 0
    batches: int = 0
    undelivered: tuple[bytes, ...] | None = None
    pushed: bool = False  # start was called
    alive: bool = False  # the handler's thread runs
    gate: bool = True  # the handler may return

    def buffered(self) -> tuple[bytes, ...]:
        """All payloads that nobody has."""
        return (*itertools.chain(*self.closed), *self.open)

    def fits(self, payload: bytes) -> bool:
        """Whether there is room."""
        return sum(map(len, self.buffered())) + len(payload) <= self.room

    def add(self, payload: bytes) -> Model:
        """With a payload accepted."""
        return self._replace(open=(*self.open, payload), accepted=self.accepted + 1)

    def cut(self) -> Model:
        """With the open batch closed."""
        return self._replace(closed=(*self.closed, self.open), open=()) if self.open else self

    def halt(self) -> Model:
        """Stopped, and what is buffered to be handed back."""
        back = self.buffered()
        return self._replace(
            phase="stopped",
            halted=self.halted or self.phase != "stopped",
            closed=(),
            open=(),
            taken=self.taken + len(back),
            discarded=self.discarded + len(back),
            undelivered=(self.undelivered or ()) + back,
        )

    def delivered(self, target: float) -> bool:
        """Whether so many payloads are."""
        return self.taken >= target and not 0 <= self.flight_first < target and not self.discarded

    def settled(self) -> Model:
        """At the end of a section."""
        if self.phase == "shutting_down" and not self.buffered() and not self.flight:
            return self._replace(phase="stopped")
        return self

    def front(self) -> tuple[Model, tuple[bytes, ...]]:
        """The front batch taken, if there is one that is due."""
        m = self.cut() if self.phase != "running" and not self.closed else self
        if not m.closed:
            return m, ()
        batch = m.closed[0]
        return m._replace(closed=m.closed[1:], taken=m.taken + len(batch), batches=m.batches + 1), batch

    def refusal(self, payload: bytes) -> str | None:
        """Why a payload is refused now."""
        if self.phase != "running":
            return "ShuttingDown" if self.phase == "shutting_down" else "Stopped"
        return None if self.fits(payload) else "QueueFull"

    def facts(self) -> tuple[Any, ...]:
        """As facts_of, of the real one's stats."""
        delivered = self.taken - self.discarded - len(self.flight)
        counts = (self.accepted, delivered, len(self.flight), len(self.buffered()), self.discarded, self.rejected)
        return (*counts, self.batches, self.phase)


def facts_of(s: tempo.Stats) -> tuple[Any, ...]:
    """What is compared of stats."""
    return (s.accepted, s.delivered, s.in_flight, s.buffered, s.discarded, s.rejected, s.batches, s.state)


At = Any  # where a call stands: None at its beginning, else what it noted
Step = tuple[Model, At, Any]  # what a step leaves: the model, where the call stands then, its outcome if it is over
GOES_ON = object()


def _enqueue(m: Model, at: At, payload: bytes) -> Step | None:
    refusal = m.refusal(payload)
    if refusal is None:
        return m.add(payload), None, "accepted"
    return m._replace(rejected=m.rejected + 1), None, refusal


def _enqueue_many(m: Model, at: At, payloads: tuple[bytes, ...]) -> Step | None:
    done, alone = at or (0, False)
    if alone:  # what does not fit with the others is tried by itself
        m, _, outcome = _enqueue(m, None, payloads[done])  # type: ignore[misc]
        if outcome != "accepted":
            return m, None, (outcome, done)
        done += 1
    else:
        while done < len(payloads) and m.refusal(payloads[done]) is None:
            m = m.add(payloads[done])
            done += 1
    return (m, None, done) if done == len(payloads) else (m, (done, not alone), GOES_ON)


def _get(m: Model, at: At) -> Step | None:
    m, batch = m.front()
    return m, None, batch or ("Empty" if m.phase == "running" else "Stopped")


def _flush(m: Model, at: At, waits: bool) -> Step | None:
    if at is None:
        return m.cut(), m.accepted, GOES_ON
    if m.delivered(at):
        return m, None, True
    return None if waits and m.phase != "stopped" else (m, None, False)


def _shutdown(m: Model, at: At, waits: bool) -> Step | None:
    if at is None:
        if m.phase == "stopped":
            return m, None, None
        return m._replace(phase="shutting_down"), "waits", GOES_ON
    if at == "waits":
        if m.phase != "stopped":
            return None if waits else (m, "gives up", GOES_ON)
        return (m, "gives up", GOES_ON) if m.halted else (m, None, None)
    if at == "gives up":
        if m.halted:
            return m, None, "Stopped"
        return (m, None, None) if m.phase == "stopped" else (m.halt(), "claims", GOES_ON)
    return m._replace(undelivered=None), None, ("DrainTimeout", m.undelivered or ())


def _stop(m: Model, at: At) -> Step | None:
    if at is None:
        return m.halt(), "claims", GOES_ON
    return m._replace(undelivered=None), None, m.undelivered or ()


def _start(m: Model, at: At) -> Step | None:
    if at is None:
        if m.phase != "running":
            return m, None, "ShuttingDown" if m.phase == "shutting_down" else "Stopped"
        return (m, None, "RuntimeError") if m.pushed else (m._replace(pushed=True), "adopted", GOES_ON)
    return m._replace(alive=True), None, None


def _stats(m: Model, at: At) -> Step | None:
    return m, None, m.facts()


def _handle(m: Model, at: At) -> Step | None:
    """The handler's thread: it ends, or handles a batch and goes on."""
    if not m.alive:
        return None
    if at == "handles":
        return m._replace(handled=m.handled + m.flight), "waits", GOES_ON
    if at == "waits":
        return (m._replace(flight=(), flight_first=-1), None, GOES_ON) if m.gate else None
    first = m.taken
    m, batch = m.front()
    if batch:
        return m._replace(flight=batch, flight_first=first), "handles", GOES_ON
    return None if m.phase == "running" else (m._replace(alive=False), None, None)


def _open_gate(m: Model, at: At) -> Step | None:
    return m._replace(gate=True), None, None


class Call(NamedTuple):
    """A call in the model, and in the world."""

    name: str
    step: Callable[..., Step | None]
    real: Callable[..., Any]
    args: tuple[Any, ...] = ()


def real(d: tempo.Dispatcher, call: Call) -> Any:
    """Make a call; return its outcome as the model has it."""
    try:
        return call.real(d, *call.args)
    except tempo.DrainTimeout as error:
        return "DrainTimeout", payloads_of(error.undelivered)
    except (tempo.Error, queue.Empty, RuntimeError) as error:
        name = type(error).__name__
        return (name, error.accepted) if call.step is _enqueue_many else name  # type: ignore[union-attr]


def payloads_of(batches: list[tempo.Batch]) -> tuple[bytes, ...]:
    """All payloads of batches."""
    return tuple(item for batch in batches for item in batch.tolist())


def _accept(d: tempo.Dispatcher, payload: bytes) -> str:
    d.enqueue(payload)
    return "accepted"


STOP = Call("stop", _stop, lambda d: payloads_of(d.stop()))


def calls(caller: int, place: int, waits: bool) -> list[Call]:
    """All calls that one caller can make, with payloads of its own; waits: those that wait too."""
    one, two, three = (bytes([byte + 8 * caller + place]) for byte in b"Aa0")
    found = [
        Call("enqueue", _enqueue, _accept, (one * 2,)),
        Call("enqueue_many", _enqueue_many, lambda d, items: d.enqueue_many(list(items)), ((two * 2, three),)),
        Call("get", _get, lambda d: tuple(d.get(0).tolist())),
        Call("flush", _flush, lambda d, _: d.flush(0), (False,)),
        Call("shutdown", _shutdown, lambda d, _: d.shutdown(0), (False,)),
        Call("start", _start, lambda d: d.start(d_handler(d))),
        Call("stats", _stats, lambda d: facts_of(balanced(d))),
        STOP,
    ]
    if waits:
        found += [
            Call("flush and wait", _flush, lambda d, _: d.flush(LIMIT), (True,)),
            Call("shutdown and wait", _shutdown, lambda d, _: d.shutdown(LIMIT), (True,)),
        ]
    return found


class Handler:
    """Keeps what it is given, and returns when its gate is open."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, batch: tempo.Batch) -> None:
        self.got += batch.tolist()
        self.gate.wait(LIMIT)


HANDLERS: weakref.WeakKeyDictionary[tempo.Dispatcher, Handler] = weakref.WeakKeyDictionary()


def d_handler(d: tempo.Dispatcher) -> Handler:
    """The handler of a dispatcher."""
    return HANDLERS.setdefault(d, Handler())


SCENES = ("empty", "open", "closed", "full", "pushed", "handling", "shutting down", "shut down", "stopped")


def scene(name: str) -> tuple[tempo.Dispatcher, Model]:
    """A dispatcher in some state, and its model."""
    room = 4 if name == "full" else 8
    d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=room, max_batch_bytes=None)
    m = Model(room)
    handler = d_handler(d)
    if name in ("open", "closed", "full", "handling"):
        for payload in (b"?!", b"!?"):
            d.enqueue(payload)
            m = m.add(payload)
    if name in ("closed", "handling"):
        d.flush(0)
        m = m.cut()
    if name in ("pushed", "handling"):
        if name == "handling":
            handler.gate.clear()
            m = m._replace(gate=False)
        d.start(handler)
        m = m._replace(pushed=True, alive=True)
        wait_until(lambda: d.stats().waiting_consumers if name == "pushed" else handler.got)
    if name == "handling":
        m, batch = m.front()
        m = m._replace(flight=batch, flight_first=0, handled=batch)
    if name == "shutting down":
        leaving(d, [b"?!", b"!?"])
        m = m._replace(phase="shutting_down", accepted=1, taken=1, batches=1).add(b"?!").add(b"!?")
    if name == "shut down":
        d.shutdown()
        m = m._replace(phase="stopped")
    if name == "stopped":
        d.stop()
        m = m.halt()._replace(undelivered=None)
    expect(facts_of(d.stats()) == m.facts(), name, d.stats(), m.facts())
    return d, m


def ended(d: tempo.Dispatcher) -> tuple[bytes, ...]:
    """End a scene: open its gate, stop, and wait for the handler's thread; return what was handed back."""
    d_handler(d).gate.set()
    back = payloads_of(d.stop())
    thread = d._state.thread
    if thread is not None:
        thread.join(LIMIT)
        expect(not thread.is_alive(), "the handler's thread is left")
    return back


def model_of(name: str) -> Model:
    """The model of a scene, without the scene."""
    d, m = scene(name)
    ended(d)
    return m


def possible(m: Model, callers: list[list[Call]]) -> set[tuple[Any, ...]]:
    """All outcomes of callers who make their calls one after the other, all at the same time; stop is called last."""
    scripts = [*callers, [Call("handle", _handle, print)], [] if m.gate else [Call("open", _open_gate, print)]]
    last = len(callers)
    found: set[tuple[Any, ...]] = set()
    handling: At = "waits" if m.flight else None
    begin = (m, tuple((0, handling if i == last else None, ()) for i in range(len(scripts))), None, ())
    seen: set[Any] = {begin}
    todo: list[Any] = [begin]
    while todo:
        model, places, ending, back = todo.pop()
        after = []
        for i, (n, at, outcomes) in enumerate(places):
            if n < len(scripts[i]):
                call = scripts[i][n]
                step = call.step(model, at, *call.args)
                if step is not None:
                    new, then, outcome = step
                    place = (n, then, outcomes) if outcome is GOES_ON else (n + 1, None, (*outcomes, outcome))
                    after.append((new.settled(), (*places[:i], place, *places[i + 1 :]), ending, back))
        if all(n == len(script) for (n, _, _), script in zip(places[:last], callers)):
            if ending != "over":
                new, then, outcome = _stop(model, ending)  # type: ignore[misc]
                after.append((new.settled(), places, *((then, back) if outcome is GOES_ON else ("over", outcome))))
            elif not model.alive and model.gate:
                found.add((*(outcomes for _, _, outcomes in places[:last]), model.handled, back, model.facts()))
        for state in after:
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return found


class Callers:
    """Threads that each make some calls, all released at once, again and again."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._gate = threading.Barrier(count + 1)
        self._arrived: list[int] = []
        self._work: Callable[[int], object] | None = None
        self._share = 0.0
        self._errors: list[BaseException] = []
        self._threads = [Worker(self._run, i) for i in range(count)]

    def _run(self, i: int) -> None:
        while True:
            self._gate.wait(LIMIT)
            if self._work is None:
                return
            self._arrived.append(i)
            while len(self._arrived) < self.count:  # the gate lets them go one by one
                pass
            if self._share:
                sys.settrace(self._nudge)
            try:
                self._work(i)
            except BaseException as exc:
                self._errors.append(exc)
            sys.settrace(None)
            self._gate.wait(LIMIT)

    def _nudge(self, frame: Any, *_: object) -> Any:
        """A tracer that lets other threads go on at any line of tempo's."""
        if frame.f_globals is not vars(tempo):
            return None
        if random.random() < self._share:
            time.sleep(0)
        return self._nudge

    def all(self, work: Callable[[int], object], meanwhile: Callable[[], object], share: float) -> None:
        """Let each thread do its work; share: of the lines of tempo's at which it lets the others go on."""
        self._arrived.clear()
        self._work, self._share = work, share
        self._gate.wait(LIMIT)
        meanwhile()
        self._gate.wait(LIMIT)
        for error in self._errors:
            raise error

    def end(self) -> None:
        """End the threads."""
        self._work = None
        self._gate.wait(LIMIT)
        for thread in self._threads:
            thread.result()


@contextlib.contextmanager
def restless(count: int) -> Iterator[Callers]:
    """So many callers, in an interpreter that switches threads as often as it can."""
    crew = Callers(count)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield crew
    finally:
        sys.setswitchinterval(switch)
    crew.end()


def at_once(crew: Callers, name: str, scripts: list[list[Call]], share: float = 0.0) -> tuple[Any, ...]:
    """Make all these calls at once; return the outcome."""
    d, _ = scene(name)
    handler = d_handler(d)
    outcomes: list[tuple[Any, ...]] = [()] * len(scripts)

    def work(i: int) -> None:
        outcomes[i] = tuple([real(d, call) for call in scripts[i]])

    crew.all(work, handler.gate.set, share)
    back = ended(d)
    return (*outcomes, tuple(handler.got), back, facts_of(at_rest(d)))


@case(limit=300)
def calls_one_after_another(scale: float) -> int:
    """Every sequence of three calls in every state (start after stop, everything twice, ...) does what it should."""
    rng = dice("calls_one_after_another")
    crew = Callers(1)
    tried = 0
    for name in SCENES:
        waits = name in ("pushed", "handling")
        for script in itertools.product(*(calls(0, place, waits) for place in range(3))):
            if rng.random() < scale:
                wanted = possible(model_of(name), [list(script)])
                outcome = at_once(crew, name, [list(script)])
                expect(outcome in wanted, name, [call.name for call in script], outcome, wanted)
                tried += 1
    crew.end()
    return tried


def outcome_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returned, or the name of what it raised."""
    try:
        return call(*args, **kwargs)
    except (tempo.Error, queue.Empty) as error:
        return type(error).__name__


@case(limit=120)
def everybody_is_released(scale: float) -> int:
    """stop and shutdown, also while others call them, let everybody go who waits in any way, with the right answer."""
    rng = dice("everybody_is_released")
    n = times(250, scale)
    for i in range(n):
        ends = [rng.choice(["stop", "shutdown"]) for _ in range(rng.randrange(1, 4))]
        full = i % 2 == 0
        d = made()
        closers: list[Worker] = []
        if full:
            d.enqueue(bytes(100))
            waiting = [Worker(outcome_of, d.enqueue, b"x", timeout=None) for _ in range(rng.randrange(1, 6))]
            wait_until(lambda d=d, w=waiting: d.stats().waiting_producers == len(w))  # type: ignore[misc]
            flushers = [Worker(outcome_of, d.flush) for _ in range(rng.randrange(3))]
            wait_until(lambda d=d, f=flushers: len(d._state.drainers) == len(f))  # type: ignore[misc]
            if rng.random() < 0.5:
                closers = [Worker(outcome_of, d.shutdown) for _ in range(rng.randrange(1, 3))]
                wait_until(lambda d=d: d.stats().state == "shutting_down")  # type: ignore[misc]
            back = d.stop()
            expect([batch.nbytes for batch in back] == [100])
            refusals = {"Stopped", "ShuttingDown"} if closers else {"Stopped"}
            expect({worker.result() for worker in waiting} <= refusals)
            expect({worker.result() for worker in flushers} <= {False})
            outcomes = [worker.result() for worker in closers]
            expect(not closers or "Stopped" in outcomes, outcomes)
            expect(set(outcomes) <= {"Stopped", None}, outcomes)  # None: called when it was stopped already
            over(d)
            continue
        waiting = [Worker(outcome_of, *rng.choice([(d.get,), (list, d)])) for _ in range(rng.randrange(1, 6))]
        wait_until(lambda d=d, w=waiting: d.stats().waiting_consumers == len(w))  # type: ignore[misc]
        closers = [Worker(outcome_of, getattr(d, end)) for end in ends]
        expect(all(worker.result() in ("Stopped", []) for worker in waiting))
        for end, worker in zip(ends, closers):
            expect(worker.result() in ([],) if end == "stop" else worker.result() in (None, "Stopped"), ends)
        over(d)
    return n


@case(limit=120)
def iterators_shared(scale: float) -> int:
    """One iterator in the hands of several threads, and of several tasks: each batch comes out once, and all end."""
    rng = dice("iterators_shared")
    n = times(60, scale)
    for _ in range(n):
        census = Census()
        sender = census.sender()
        d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=2000, max_batch_bytes=rng.choice([None, 50]))
        shared, shared_by_tasks = iter(d), d.__aiter__()
        threads = [Worker(census.receiver().take_all, shared) for _ in range(3)]

        async def take(receiver: Receiver, batches: Any = shared_by_tasks) -> None:
            async for batch in batches:
                receiver.take(batch)

        async def main(census: Census = census, take: Any = take) -> None:
            await asyncio.gather(*(take(census.receiver()) for _ in range(3)))

        loop = Worker(lambda main=main: asyncio.run(main()))
        for _ in range(300):
            sender.try_one(d, rng.randrange(40), timeout=LIMIT)
        d.shutdown(LIMIT)
        for worker in (*threads, loop):
            worker.result()
        census.verify(d)
        expect(next(shared, None) is None)
    return n


def interleaved(crew: Callers, where: str, scripts: list[list[Call]], rounds: int) -> int:
    """Make the same calls at once again and again: every outcome must be possible. Return how often."""
    wanted = possible(model_of(where), scripts)
    for n in range(rounds):
        outcome = at_once(crew, where, scripts, (0, 0.01, 0.05, 0.2)[n % 4])
        names = [[call.name for call in script] for script in scripts]
        expect(outcome in wanted, where, names, outcome, sorted(wanted, key=repr)[:20])
    return rounds


@case(limit=300)
def pairs_of_calls_at_once(scale: float) -> int:
    """Every two calls from two threads at once, in every state: what came of it is what some order brings about."""
    tried = 0
    with restless(2) as crew:
        for where in SCENES:
            waits = where in ("pushed", "handling")
            for n, first in enumerate(calls(0, 0, waits)):
                for second in calls(1, 0, waits)[n:]:
                    tried += interleaved(crew, where, [[first], [second]], times(24, scale))
    return tried


@case(limit=300)
def several_calls_at_once(scale: float) -> int:
    """Two threads that make two calls each, and three that make one each, at once: as above."""
    rng = dice("several_calls_at_once")
    tried = 0
    for callers, length in ((2, 2), (3, 1)):
        with restless(callers) as crew:
            for _ in range(times(250, scale)):
                where = rng.choice(SCENES)
                waits = where in ("pushed", "handling")
                scripts = [[rng.choice(calls(i, place, waits)) for place in range(length)] for i in range(callers)]
                tried += interleaved(crew, where, scripts, 12)
    return tried
