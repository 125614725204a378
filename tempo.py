# SPDX-License-Identifier: MIT
"""Batch high-volume events in bounded memory, inside the process.

    import tempo

    d = tempo.Dispatcher(interval=0.25, max_batch_bytes=32 * tempo.KiB, max_buffered_bytes=4 * tempo.MiB)
    d.enqueue(b"first event")          # never blocks; QueueFull when it does not fit
    d.enqueue(b"second", timeout=1.0)  # backpressure: waits up to 1 s for room
    for batch in d:                    # any number of consumer threads
        sock.sendall(batch.data)       # every payload of the batch, contiguous

What it guarantees: payloads leave in the order in which they were accepted, each exactly once; the buffer never holds
more than `max_buffered_bytes` and never refuses what fits; `enqueue`, `enqueue_many` and `stats` may be called from
signal handlers, finalizers, logging handlers, batch handlers and forked children, and never deadlock there.

What it is not: a broker, a queue between machines, a store. What is refused stays in the caller's hands.

One file, standard library only, CPython 3.9 and later, PyPy: copy it into a project. All methods are thread-safe.
It is a port to Python of the Go package github.com/ef2k/tempo.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import threading
import time
import weakref
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice, repeat, takewhile
from operator import countOf, eq, sub
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import Final

    from typing_extensions import Buffer

    _Handler = Callable[["Batch"], object]
    _OnError = Callable[[BaseException, "Batch"], object]

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Closed",
    "Dispatcher",
    "DrainTimeout",
    "Error",
    "GiB",
    "KiB",
    "MiB",
    "PayloadTooLarge",
    "QueueFull",
    "ShuttingDown",
    "Stats",
    "Stopped",
]

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB

_FOREVER: Final = float("inf")
_NO_WAIT: Final = 0.0  # the default timeout; the fast path knows it by identity
_CREDIT_FLOOR: Final = 64 * KiB  # buffers below this get no credit: every admission is counted under the lock
_CREDIT_ITEMS: Final = 1024  # payloads accepted unseen at most; each costs about 42 bytes until it is packed
_CHUNK: Final = 512  # payloads that enqueue_many admits at a time
_RUN_ITEMS: Final = 512  # payloads a run holds before the next one is begun
_RUN_BYTES: Final = 32 * KiB  # bytes a run holds before the next one is begun
_PIECE: Final = 256  # payloads stored in a run at a time
_PACK_BELOW: Final = 512  # bytes; smaller payloads are packed ahead, because an object each costs too much
_PACK_BYTES: Final = 128 * KiB  # the largest run that is packed: for a moment it is there twice
_SPAN: Final = 1 << 31  # bytes after which runs count from a new origin, so that ends fit 32 bits
_PATIENCE: Final = 0.01  # seconds the first waiting producer trusts a consumer to come back

_RUNNING: Final = "running"
_SHUTTING_DOWN: Final = "shutting_down"
_STOPPED: Final = "stopped"

_T = TypeVar("_T")

# Theory of operation
# ===================
#
# Flow.  producer -> inbox -> runs -> Batch -> consumer.  `enqueue` appends to the inbox, a plain list.  Whoever holds
# the lock counts the inbox: moves what it accepted into runs (lists of payloads; packed into one bytes object when
# full) and sums the sizes.  A consumer joins the front of the runs into a Batch.  All of it is in a _State; a fork
# replaces the _State whole, so a call that the fork cut short goes on in the old one and harms nobody.
#
# Truth.  inbox[0] is a tuple (items, nbytes, charge, granted, entry): everything counted since the beginning, and up
# to which index the inbox is accepted unseen.  Header and payloads are one list, changed by single C-level list
# operations (append, slice assignment), so whoever reads `inbox[:]`, at any bytecode of any other call, sees exactly
# what is accepted.  What has left is one tuple too, s.taken.  All else (runs, open batch, wake-ups, credit, phase after
# the drain) follows from these and is derived by _settle_locked at the end of each locked section; each step can be
# done again, so what an exception (a KeyboardInterrupt, say) cuts short is made good by the next.
#
#   I1  0 <= buffered_bytes <= max_buffered_bytes, where buffered_bytes = charge - taken.charge + the accepted part of
#       the inbox: payloads at an index < granted, and entries whose `accepted` is True.
#   I2  Runs hold the payloads [taken.items, items) in order.  A commit stores in the runs first and changes the header
#       last; what a commit that was cut short left in the runs beyond `items` is cut off by the next count.
#   I3  gate is 0 or header.granted.  Credit is given only as granted = 1 + room // small, so granted - 1 payloads of at
#       most `small` bytes fit whatever happens.  While there is credit nothing leaves the inbox but pending payloads.
#   I4  s.open is where the open batch starts; what is before it is in closed batches.  Credit is only given while the
#       open batch has a payload: the first payload after a pause takes the lock, notes the time, and tells a waiting
#       consumer, which is the timer.  (A batch that begins within a credit counts its interval from that credit.)
#   I5  While consumers wait, credit stays below what would close the open batch; while producers wait, there is none.
#   I6  accepted == delivered + in_flight + buffered + discarded, items and bytes.
#
# Enqueue without the lock.  (1) size <= small and len(inbox) < gate; (2) append; (3) len(inbox) <= gate: accepted.
# A thread stopped between (1) and (2) may append when the credit is long withdrawn.  (3) finds out: it reads the length
# first and the gate second.  The payload's index is below that length and can only have become less, so if the gate is
# at least that length now, the index is below `granted` now.  Otherwise the payload is pending: not accepted.  Its
# owner takes the lock; if the payload is still in the inbox at an index >= granted, it was not accepted, and the owner
# takes it out and goes the exact way.  (Two threads that enqueue the very same object may swap outcomes.)
# What must be atomic: list.append, len(list), list slices read and assigned, attribute loads and stores: under the GIL,
# and sequentially consistent in a build without it.
#
# Nested calls.  The lock is an RLock; `s.owner` names the thread inside a locked section.  A signal handler or
# finalizer that interrupts its own thread there must not touch what is half done.  It only appends an entry to the
# inbox, and decides by walking header and inbox in order: that is exact (I1), and calls nested deeper come to the same
# result.  The holder's commit is a compare-and-set on the inbox's length (assignment to inbox[::-1] fails if it has
# grown), so a decision never rests on a room that a nested call has taken.  An entry takes as many places as its size
# could need, and keeps them when it is refused, so that a credit computed before it came is still safe.
#
# Waiting.  Producers in s.producers, first come first served: whoever makes room accepts their payloads for them.  With
# a large buffer that is done when it has drained to half, so that threads are woken seldom; until then the first of
# them looks for itself after _PATIENCE (armed).  Consumers in s.consumers: the first is the timer (armed), and is woken
# when the open batch gets its first payload, or a batch can be taken.  Coroutines do not count as first, because their
# loop may be stuck: they are timers beside it.  flush and shutdown wait in s.drainers.
# Each waits on a lock of its own, used as a binary semaphore: it keeps a wake-up that comes early.  A
# threading.Condition loses one that comes from a signal handler in its own thread, between its test and its wait; and
# an exception that comes in its wait can leave the lock released twice.  No wait holds the lock.
# A call from inside tempo (handler, iterable, signal) never waits: its own thread could be the one that makes room.
#
# States.  running -> shutting_down -> stopped, or running -> stopped; never back.


class Error(Exception):
    """Base of tempo's errors. From `enqueue_many`, `.accepted` says how many payloads were taken before it."""

    accepted: int = 0


class QueueFull(Error, queue.Full):
    """There is no room for the payload now. It was not accepted and is still the caller's.

    Attributes: `needed`, `buffered_bytes`, `max_buffered_bytes`, all in bytes as charged (an empty payload counts 1).
    """

    def __init__(self, needed: int, buffered_bytes: int, max_buffered_bytes: int) -> None:
        super().__init__(needed, buffered_bytes, max_buffered_bytes)
        self.needed = needed
        self.buffered_bytes = buffered_bytes
        self.max_buffered_bytes = max_buffered_bytes

    def __str__(self) -> str:
        return f"no room for {self.needed} bytes: {self.buffered_bytes} of {self.max_buffered_bytes} bytes are buffered"


class PayloadTooLarge(Error, ValueError):
    """The payload is larger than `max_buffered_bytes`: it will never fit. Not a `QueueFull`."""


class Closed(Error, RuntimeError):
    """The dispatcher takes no more work. Base of `ShuttingDown` and `Stopped`."""


class ShuttingDown(Closed):
    """`shutdown` was called and what was accepted is being drained."""


class Stopped(Closed):
    """The dispatcher is stopped: nothing will come out of it any more."""


class DrainTimeout(Error, TimeoutError):
    """`shutdown` ran out of time. `.undelivered` are the batches that no consumer received, now the caller's."""

    def __init__(self, undelivered: list[Batch]) -> None:
        super().__init__(undelivered)
        self.undelivered = undelivered

    def __str__(self) -> str:
        return f"not drained in time: {len(self.undelivered)} batches undelivered"


class Batch(Sequence[memoryview]):
    """Payloads that leave together, in order: a read-only sequence of memoryviews over one contiguous buffer.

    Immutable; owns its bytes and is valid for ever, also after the dispatcher is gone. A slice is a list of views.

    >>> d = Dispatcher(interval=60, max_buffered_bytes=KiB)
    >>> d.enqueue_many([b"one", b"two", b"three"])
    3
    >>> d.flush(timeout=0)
    False
    >>> batch = d.get()
    >>> len(batch), batch.nbytes, bytes(batch.data), bytes(batch[-1])
    (3, 11, b'onetwothree', b'three')
    >>> batch.tolist()
    [b'one', b'two', b'three']
    """

    __slots__ = ("_base", "_data", "_ends")
    _data: bytes
    _ends: array[int]  # where each payload ends, counted from _base; 4 bytes a payload
    _base: int

    def __init__(self, data: bytes, ends: array[int], base: int) -> None:
        set_slot = object.__setattr__
        set_slot(self, "_data", data)
        set_slot(self, "_ends", ends)
        set_slot(self, "_base", base)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Batch is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Batch is immutable: cannot delete {name!r}")

    @property
    def data(self) -> memoryview:
        """All payloads back to back: one read-only contiguous memoryview of `nbytes` bytes, no copy."""
        return memoryview(self._data)

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads together."""
        return len(self._data)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> list[memoryview]: ...
    def __getitem__(self, index: int | slice) -> memoryview | list[memoryview]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self._ends)))]
        i = range(len(self._ends))[index]  # negative indices, IndexError
        base = self._base
        return memoryview(self._data)[(self._ends[i - 1] - base if i else 0) : self._ends[i] - base]

    def _slices(self) -> Iterator[slice]:
        """Where each payload is in `data`, at C speed."""
        ends: Sequence[int] = self._ends
        if self._base:
            ends = list(map(sub, ends, repeat(self._base)))
        return map(slice, chain((0,), ends), ends)

    def __iter__(self) -> Iterator[memoryview]:
        return map(memoryview(self._data).__getitem__, self._slices())

    def tolist(self) -> list[bytes]:
        """Return the payloads as a list of bytes objects, copied at C speed; the list is the caller's."""
        return list(map(self._data.__getitem__, self._slices()))

    def __reduce__(self) -> tuple[object, ...]:
        return Batch, (self._data, self._ends, self._base)

    def __repr__(self) -> str:
        return f"<tempo.Batch {len(self)} payloads, {self.nbytes} bytes>"


class Stats(NamedTuple):
    """A consistent snapshot, in payloads and bytes as charged (an empty payload counts 1 byte).

    Always `accepted == delivered + in_flight + buffered + discarded`, and the same for the bytes.
    """

    accepted: int
    accepted_bytes: int
    delivered: int  # received by a consumer; in push mode: the handler has returned, or raised
    delivered_bytes: int
    in_flight: int  # with the handler now
    in_flight_bytes: int
    buffered: int
    buffered_bytes: int
    discarded: int  # handed back by stop, or in DrainTimeout.undelivered
    discarded_bytes: int
    rejected: int  # refused with one of tempo's errors
    rejected_bytes: int
    failed: int  # of the delivered: the handler raised
    failed_bytes: int
    batches: int  # taken by consumers
    peak_buffered_bytes: int
    waiting_producers: int
    waiting_consumers: int
    state: str  # "running", "shutting_down" or "stopped"


class _Taken(NamedTuple):
    """What left the buffer, one tuple so that it changes at once (I6)."""

    items: int = 0
    nbytes: int = 0
    charge: int = 0
    flight_items: int = 0
    flight_charge: int = 0
    discarded_items: int = 0
    discarded_charge: int = 0
    failed_items: int = 0
    failed_charge: int = 0
    batches: int = 0


class _Run:
    """Consecutive payloads: a list of them while it grows, one bytes object once packed. Guarded by the lock."""

    __slots__ = ("base", "body", "cuts", "ends", "offset", "origin", "start")

    def __init__(self, start: int, origin: int, base: int, typecode: str) -> None:
        self.start = start  # number of its first payload
        self.origin = origin  # byte from which base and ends are counted
        self.base = base  # where its first payload starts
        self.ends = array(typecode)  # where each payload ends
        self.body: list[bytes] | bytes = []
        self.offset = 0  # where a packed body starts (later than base if some of the run was taken before)
        self.cuts: array[int] | None = None  # where flush closed a batch, in payloads from the run's start

    def end(self) -> int:
        """Byte at which the run ends, from the beginning of all."""
        return self.origin + (self.ends[-1] if self.ends else self.base)

    def parts(self, first: int, stop: int) -> Iterable[bytes | memoryview]:
        """Payloads first to stop (numbers within the run), as what `bytes.join` takes."""
        body = self.body
        if isinstance(body, list):
            return body[first:stop]
        begin = (self.ends[first - 1] if first else self.base) - self.offset
        end = self.ends[stop - 1] - self.offset
        return (body,) if begin == 0 and end == len(body) else (memoryview(body)[begin:end],)


class _Entry:
    """A payload whose fate is decided by its place in the inbox: a nested call's, or a waiting producer's."""

    __slots__ = ("accepted", "charge", "data")

    def __init__(self, data: bytes, charge: int) -> None:
        self.data = data  # dropped when the fate is decided and the payload elsewhere
        self.charge = charge
        self.accepted: bool | None = None


class _Parker:
    """One waiting thread. `wake` may come early, or twice: it is kept, once. All but park under the lock."""

    __slots__ = ("_ready", "armed", "entry", "target", "woken")
    sure = True  # it runs when it is woken

    def __init__(self, lock: Any) -> None:
        lock.acquire()
        self._ready = lock
        self.woken = False
        self.armed = False  # a consumer: has a timer for the open batch; a producer: looks for room by itself
        self.entry: _Entry | None = None  # of a waiting producer
        self.target: float = _FOREVER  # of flush: the number of payloads that are to be delivered

    def park(self, pause: float, remaining: float) -> bool:
        """Wait for `wake`, at most the lesser of two times; without the dispatcher's lock. True: nothing remains."""
        pause = min(pause, remaining)
        woken = self._ready.acquire(True, max(0.0, pause) if pause < threading.TIMEOUT_MAX else -1)
        return not woken and pause == remaining

    def wake(self) -> None:
        if not self.woken:
            with contextlib.suppress(RuntimeError):  # released already, by a wake that an exception cut short
                self._ready.release()
            self.woken = True

    def reset(self) -> None:
        if self.woken:
            self.woken = False
            self._ready.acquire(False)


class _AsyncParker(_Parker):
    """One waiting coroutine, woken through its event loop, after the lock is released."""

    __slots__ = ("_loop", "_outbox", "future")
    sure = False  # the loop may be closed, stopped or busy

    def __init__(self, lock: Any, loop: Any, outbox: deque[Callable[[], object]]) -> None:
        super().__init__(lock)
        self._loop = loop
        self._outbox = outbox
        self.future = loop.create_future()

    def wake(self) -> None:
        if not self.woken:
            self._outbox.append(self._post)
            self.woken = True

    def reset(self) -> None:
        self.woken = False
        self.future = self._loop.create_future()

    def _post(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the next settling finds out
            self._loop.call_soon_threadsafe(self.fire)

    def fire(self) -> None:
        if not self.future.done():
            self.future.set_result(None)

    def dead(self) -> bool:
        return bool(self._loop.is_closed())


class _State:
    """Everything that a fork replaces."""

    __slots__ = (  # noqa: RUF023 - in the order of __init__
        "inbox", "gate", "owner", "phase", "outbox", "left", "mixed", "flush_asked", "shutdown_asked", "leavers",
        "refused", "lock", "runs", "storing", "taken", "open", "born", "granted_at", "unseen", "flight_first",
        "rejected", "peak", "producers", "consumers", "drainers", "announced", "halted", "undelivered", "thread",
    )  # fmt: skip

    def __init__(self, rlock: Any) -> None:
        # Touched without the lock; why that is safe is told in Theory.
        self.inbox: list[Any] = [(0, 0, 0, 1, None)]
        self.gate = 0  # an inbox shorter than this takes small payloads without the lock; set under it
        self.owner = 0  # identity of the thread in a locked section; only that thread compares equal
        self.phase = _RUNNING  # changed under the lock
        self.outbox: deque[Callable[[], object]] = deque()  # wake-ups of coroutines, made after the lock is released
        # What nested calls leave to the lock's holder, which is their own thread.
        self.left = False  # anything
        self.mixed = False  # entries in the inbox
        self.flush_asked = self.shutdown_asked = False
        self.leavers: list[_Parker] = []  # no longer waiting
        self.refused: list[int] = []  # charges

        # Guarded by the lock.
        self.lock = rlock
        self.runs: deque[_Run] = deque()
        self.storing = False  # the runs may hold more than the header says (I2)
        self.taken = _Taken()
        self.open = (0, 0)  # first payload of the open batch, and the byte at which it starts
        self.born = (-1, 0.0)  # first payload of the open batch once it is there, and when it was accepted
        self.granted_at = 0.0  # when the credit was given
        self.unseen = False  # the last commit was of payloads accepted under credit
        self.flight_first = -1  # number of the first payload that the handler has, or -1
        self.rejected = (0, 0)  # payloads, charge
        self.peak = 0
        self.producers: deque[_Parker] = deque()
        self.consumers: deque[_Parker] = deque()
        self.drainers: deque[_Parker] = deque()
        self.announced = _RUNNING  # the phase that everybody waiting was woken for
        self.halted = False  # stopped before it was drained
        self.undelivered: list[tuple[int, Batch]] = []  # what stop is to return: number of the first payload, batch
        self.thread: threading.Thread | None = None


class _Batches(Iterator[Batch]):
    """Iterator over a dispatcher's batches; knows which thread is in its loop's body."""

    __slots__ = ("__weakref__", "_dispatcher", "thread")

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.thread = 0  # identity of the thread in the loop's body

    def __next__(self) -> Batch:
        d = self._dispatcher
        self.thread = 0
        try:
            batch = d.get()
        except Stopped:
            raise StopIteration from None
        d._enter_body(self)
        return batch


class _AsyncBatches:
    """Asynchronous iterator over a dispatcher's batches."""

    __slots__ = ("__weakref__", "_dispatcher", "thread")

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.thread = 0  # identity of the event loop's thread, until the iterator ends

    def __aiter__(self) -> _AsyncBatches:
        return self

    async def __anext__(self) -> Batch:
        import asyncio  # noqa: PLC0415 - tempo must be light to import, and a caller has it loaded already

        d = self._dispatcher
        loop = asyncio.get_running_loop()
        d._enter_body(self)
        parker: _AsyncParker | None = None
        s = d._state
        try:
            while True:
                if parker is None or s is not d._state:
                    s = d._state
                    parker = _AsyncParker(d._new_lock(), loop, s.outbox)
                # From a batch being taken to its being returned there is no await, so a cancellation loses none.
                batch, delay = d._locked(s, d._poll_locked, parker, False)
                if batch is not None:
                    return batch
                timer = None if delay == _FOREVER else loop.call_later(delay, parker.fire)
                try:
                    await parker.future
                finally:
                    if timer is not None:
                        timer.cancel()
        except Stopped:
            self.thread = 0
            raise StopAsyncIteration from None
        finally:
            try:
                d._leave(s, parker)
            except BaseException:
                d._leave(s, parker)
                raise


class Dispatcher:
    """Batches payloads from any number of producers for any number of consumers, in bounded memory.

    Args:
        interval: seconds after which a batch closes, counted from its first payload; > 0, finite.
        max_buffered_bytes: how much may be accepted and not yet received by a consumer; an empty payload counts 1 byte.
        max_batch_bytes: a batch closes when it holds so much, or before the payload that would take it over; a larger
            payload goes alone. None: batches close by interval, `flush` and `shutdown` only.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, or out of range.

    >>> with Dispatcher(interval=0.01, max_buffered_bytes=64 * KiB) as d:
    ...     d.start(lambda batch: print(batch.tolist()))
    ...     d.enqueue(b"a")
    ...     d.enqueue(b"b")
    [b'a', b'b']
    """

    __slots__ = (
        "__weakref__", "_clock", "_ident", "_interval", "_lazy", "_local", "_max_batch", "_max_buffered", "_new_lock",
        "_new_rlock", "_new_thread", "_places", "_push", "_small", "_state",
    )  # fmt: skip

    def __init__(
        self, *, interval: float, max_buffered_bytes: int, max_batch_bytes: int | None = None
    ) -> None:
        # Fixed after init. Primitives are looked up here and not at import, so that monkey-patching comes in time.
        self._interval = _seconds("interval", interval)
        if not 0 < self._interval <= threading.TIMEOUT_MAX:
            raise ValueError(f"interval must be > 0 and at most {threading.TIMEOUT_MAX} seconds, not {interval!r}")
        self._max_buffered = _byte_limit("max_buffered_bytes", max_buffered_bytes)
        self._max_batch = None if max_batch_bytes is None else _byte_limit("max_batch_bytes", max_batch_bytes)
        # The largest payload that credit covers: the smaller, the more payloads a credit is good for.
        self._lazy = max_buffered_bytes >= _CREDIT_FLOOR
        self._small = min(max(512, max_buffered_bytes >> 11), 64 * KiB) if self._lazy else 0
        # How many payloads a credit is good for at most: counting them, they are there twice for a moment.
        self._places = min(_CREDIT_ITEMS, ((max_buffered_bytes >> 3) + 64 * KiB) // _PACK_BELOW)
        self._clock = time.monotonic
        self._ident = threading.get_ident
        self._new_lock = threading.Lock
        self._new_thread = threading.Thread
        self._local = threading.local()
        self._new_rlock = threading.RLock
        self._push: tuple[_Handler, _OnError | None, float] | None = None  # set once, under the lock
        self._state = _State(self._new_rlock())  # replaced in a forked child, by its only thread
        _DISPATCHERS.add(self)

    # -- Producers ---------------------------------------------------------------------------------------------------

    def enqueue(self, payload: Buffer, *, timeout: float | None = _NO_WAIT) -> None:
        """Accept one payload: any C-contiguous bytes-like object; a mutable one is copied before this returns.

        Blocks at most `timeout` seconds for room, first come first served; None: for ever. By default, and when called
        from inside tempo (a batch handler, a signal handler that interrupted tempo), it never blocks.

        Raises:
            QueueFull: no room in time. PayloadTooLarge: it can never fit. ShuttingDown, Stopped: no more work is taken.
            TypeError, ValueError: not bytes-like or not contiguous; a bad timeout.
            Nothing was accepted when it raises.
        """
        s = self._state
        inbox = s.inbox
        late = False
        if (
            (timeout is None or timeout is _NO_WAIT or _timeout(timeout) >= 0)
            and type(payload) is bytes
            and 0 < len(payload) <= self._small
            and len(inbox) < s.gate
        ):
            inbox.append(payload)
            if len(inbox) <= s.gate:  # in this order (I3)
                return
            late = True
        self._enqueue(s, payload, timeout, late)

    def enqueue_many(self, payloads: Iterable[Buffer], *, timeout: float | None = _NO_WAIT) -> int:
        """Accept payloads in order, as `enqueue` would, at a fraction of the cost; return how many.

        One deadline for all. Lists and tuples are admitted 512 at a time; other iterables are read one by one, so that
        nothing is taken out of them that is not offered. No lock is held while an iterable runs.

        Raises:
            What `enqueue` raises, and what the iterable raises; the exception's `.accepted` says how many of the
            payloads were accepted before, so that the caller can route the rest.
        """
        accepted = 0
        try:
            deadline = self._deadline(_timeout(timeout))
            if isinstance(payloads, (list, tuple)):
                for i in range(0, len(payloads), _CHUNK):
                    chunk = payloads[i : i + _CHUNK]
                    done = 0
                    ready = countOf(map(type, chunk), bytes) == len(chunk)
                    while done < len(chunk):
                        if ready:
                            n = self._enqueue_chunk(chunk[done:] if done else chunk, deadline)
                            done += n
                            accepted += n
                        if done < len(chunk):  # it does not fit, or is to be copied
                            accepted += self._admit(_own(chunk[done]), deadline)
                            done += 1
            else:
                for payload in payloads:
                    accepted += self._admit(_own(payload), deadline)
        except BaseException as exc:
            with contextlib.suppress(Exception):  # foreign exceptions may have slots
                exc.accepted = accepted + (getattr(exc, "_accepted_by", None) is self)  # type: ignore[attr-defined]
            raise
        return accepted

    # -- Consumers ---------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """Return a blocking iterator over batches; each batch goes to exactly one consumer.

        It ends when everything is drained after `shutdown`, or at once after `stop`. Also `for batch in dispatcher`.
        """
        return _Batches(self)

    __iter__ = batches

    def __aiter__(self) -> _AsyncBatches:
        """Return an asynchronous iterator over batches, for asyncio: no thread, no polling; cancelling loses none.

        `flush` and `shutdown` never block a thread while such an iterator is in use in it: they would block its loop.
        """
        return _AsyncBatches(self)

    def get(self, timeout: float | None = None) -> Batch:
        """Return the next batch; wait for it at most `timeout` seconds (None: for ever). The batch is the caller's.

        Raises:
            queue.Empty: none was due in time; also when called by a signal handler that interrupted tempo.
            Stopped: there will never be another. TypeError, ValueError: a bad timeout.
        """
        return self._next(self._deadline(_timeout(timeout)), False)

    def start(self, handler: _Handler, *, on_error: _OnError | None = None, exit_timeout: float = 5.0) -> None:
        """Call `handler(batch)` for each batch, on one daemon thread.

        When the handler raises, the batch counts as failed, `on_error(exc, batch)` is called (or by default
        `threading.excepthook`), and the next batch follows. At interpreter exit what was accepted is drained, for at
        most `exit_timeout` seconds.

        Raises:
            RuntimeError: started before; Closed (also a RuntimeError): no longer running; no thread can be started.
            TypeError, ValueError: a bad argument.
        """
        if not callable(handler):
            raise TypeError(f"handler must be callable, not {handler!r}")
        if on_error is not None and not callable(on_error):
            raise TypeError(f"on_error must be callable or None, not {on_error!r}")
        push = (handler, on_error, _seconds("exit_timeout", exit_timeout))
        self._locked(self._state, self._start_locked, push)
        try:
            self._spawn()
        except BaseException:
            self._push = None
            raise

    # -- Life cycle --------------------------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """Close the open batch and wait until everything accepted before this call is delivered.

        Blocks at most `timeout` seconds (None: for ever). From the handler or a consumer's loop body it never blocks.
        Returns False when time ran out or the dispatcher was stopped. Raises TypeError, ValueError: a bad timeout.
        """
        deadline = self._deadline(_timeout(timeout))
        s = self._state
        if self._nested(s):
            s.flush_asked = s.left = True
            return False
        target = self._locked(s, self._cut_locked)
        return self._wait_delivered(s, target, 0.0 if self._inside() else deadline)

    def shutdown(self, timeout: float | None = None) -> None:
        """Refuse new work, release blocked producers, and wait until everything accepted is delivered.

        Blocks at most `timeout` seconds (None: for ever). May be called again, and by several threads at once: all wait
        for the same drain. From the handler, or the loop body of a consumer (in this thread, and the iterator is still
        alive), it never waits for itself: the drain goes on when the handler returns or the loop comes back.

        Raises:
            DrainTimeout: out of time; the dispatcher is stopped, and `.undelivered` are the batches nobody received
                (a batch that the handler has is not among them). Stopped: `stop` was called meanwhile.
            TypeError, ValueError: a bad timeout.
        """
        deadline = self._deadline(_timeout(timeout))
        s = self._state
        if self._nested(s):
            s.shutdown_asked = s.left = True
            return
        if self._locked(s, self._close_locked) or self._inside():
            return
        if not self._wait_delivered(s, _FOREVER, deadline):
            self._locked(s, self._give_up_locked)
        thread = s.thread
        if thread is not None and thread.ident is not None:
            thread.join()  # its last batch is delivered: it only has to return

    def stop(self) -> list[Batch]:
        """Stop at once; return the batches that no consumer received, which are now the caller's.

        Blocked producers and consumers are released, and a `shutdown` under way raises Stopped. The first call returns
        the batches, later ones an empty list. A batch that the handler has is not among them.

        Raises:
            RuntimeError: called by a signal handler or finalizer that interrupted tempo; nothing changed.
        """
        return self._locked(self._state, self._stop_locked)

    def stats(self) -> Stats:
        """Return a consistent snapshot. May be called from anywhere."""
        s = self._state
        return self._snapshot(s) if self._nested(s) else self._locked(s, self._stats_locked)

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        t = self.stats()
        fill = f"{t.buffered} buffered, {t.buffered_bytes} of {self._max_buffered} bytes"
        return f"<tempo.Dispatcher {t.state} {fill}>"

    # -- The lock ----------------------------------------------------------------------------------------------------

    def _locked(self, s: _State, work: Callable[..., _T], *args: Any) -> _T:
        """Run work(s, *args) with the lock held, and settle; raise RuntimeError in a call nested in such work."""
        me = self._ident()
        if s.owner == me and self._nested(s):
            raise RuntimeError("called by a signal handler or finalizer that interrupted tempo")
        try:
            with s.lock:
                try:
                    s.owner = me
                    return work(s, *args)
                finally:
                    try:
                        self._disown_locked(s, me)
                    except BaseException:  # KeyboardInterrupt, MemoryError: what is left undone would wake nobody
                        self._disown_locked(s, me)
                        raise
                    finally:
                        s.owner = 0
        finally:
            while s.outbox:
                with contextlib.suppress(IndexError):  # another thread posts too
                    s.outbox.popleft()()

    def _disown_locked(self, s: _State, me: int) -> None:
        """Lock held. Settle, also what nested calls left; a call nested after `owner = 0` settles by itself."""
        while True:
            s.owner = me
            s.left = False
            self._settle_locked(s)
            s.owner = 0
            if not s.left:
                return

    def _settle_locked(self, s: _State) -> None:
        """Lock held. Derive everything from header, taken and phase; wake whom it concerns; give credit."""
        while s.leavers:
            self._leave_locked(s, s.leavers[-1])
            s.leavers.pop()
        if s.refused:
            n = len(s.refused)
            s.rejected = (s.rejected[0] + n, s.rejected[1] + sum(s.refused[:n]))
            del s.refused[:n]
        if s.shutdown_asked:
            self._close_locked(s)
            s.shutdown_asked = False
        if s.flush_asked:
            self._cut_locked(s)
            s.flush_asked = False
        self._refresh_locked(s)
        if s.producers and s.phase is _RUNNING:
            self._serve_locked(s, False)
            self._refresh_locked(s)
        if s.phase is _SHUTTING_DOWN and s.taken.items == s.inbox[0][0] and s.flight_first < 0:
            s.phase = _STOPPED
        if s.announced is not s.phase:
            for parker in chain(s.producers, s.consumers, s.drainers):
                parker.wake()
            s.announced = s.phase
        for parker in s.drainers:
            if self._delivered(s, parker.target):
                parker.wake()
        self._signal_locked(s)
        self._grant_locked(s)

    def _leave(self, s: _State, parker: _Parker | None) -> None:
        """Wait no longer. Callers repeat it when an exception ends it: a parker left behind would get wake-ups."""
        if parker is None or s is not self._state:
            return
        if self._nested(s):  # a coroutine that is collected in a locked section
            s.leavers.append(parker)
            s.left = True
        else:
            self._locked(s, self._leave_locked, parker)

    def _leave_locked(self, s: _State, parker: _Parker) -> None:
        """Lock held. Take parker out of its queue; settling passes on what it was told."""
        for waiting in (s.producers, s.consumers, s.drainers):
            if parker in waiting:
                waiting.remove(parker)

    def _nested(self, s: _State) -> bool:
        """Whether this call interrupted its own thread in a locked section."""
        if s.owner != self._ident():
            return False
        frame: FrameType | None = sys._getframe(2)  # not that of a section that is only being entered
        while frame is not None:
            if frame.f_code is _LOCKED_CODE and frame.f_locals.get("s") is s:
                return True
            frame = frame.f_back
        return False

    def _inside(self) -> bool:
        """Whether this thread is in this dispatcher's code already, or in the body of a loop over its batches."""
        me = self._ident()
        return any(body.thread == me for body in getattr(self._local, "bodies", ())) or self._reentered()

    def _enter_body(self, body: _Batches | _AsyncBatches) -> None:
        """Note that this thread goes into the body of a loop."""
        body.thread = self._ident()
        if not hasattr(self._local, "bodies"):
            self._local.bodies = weakref.WeakSet()
        self._local.bodies.add(body)

    def _reentered(self) -> bool:
        """Whether this call was made from inside this dispatcher, or in a locked section of any.

        A handler, an iterable, a signal handler: to wait there could be to wait for oneself.
        """
        frame: FrameType | None = sys._getframe(1)
        own = True  # still in the frames of this call
        while frame is not None:
            if frame.f_globals is not _GLOBALS:
                own = False
            elif not own and (frame.f_code is _LOCKED_CODE or frame.f_locals.get("self") is self):
                return True
            frame = frame.f_back
        return False

    def _deadline(self, timeout: float) -> float:
        return self._clock() + timeout if timeout else 0.0

    # -- Admission ---------------------------------------------------------------------------------------------------

    def _enqueue(self, s: _State, payload: Any, timeout: float | None, late: bool) -> None:
        """Enqueue by the exact way; late: payload was appended to s.inbox, perhaps after the credit was withdrawn."""
        if late:
            if s is not self._state:
                return  # forked by a signal handler: the parent has the payload
            if self._nested(s):
                accepted = self._withdraw_locked(s, payload)
            else:
                accepted = self._locked(s, self._withdraw_locked, payload)
            if accepted:
                return
        self._admit(_own(payload), self._deadline(_timeout(timeout)))

    def _withdraw_locked(self, s: _State, payload: bytes) -> bool:
        """Lock held. Return whether payload, appended by this thread, was accepted; if not, take it out again."""
        inbox = s.inbox
        for i in range(inbox[0][3], len(inbox)):  # the pending ones (I3); a nested call adds behind them only
            if inbox[i] is payload:
                del inbox[i]
                return False
        return True

    def _admit(self, data: bytes, deadline: float) -> int:
        """Accept one payload exactly, waiting for room until deadline (0: not at all); return 1."""
        s = self._state
        charge = len(data) or 1
        if self._nested(s):
            self._admit_nested(s, data, charge)
            return 1
        wait = deadline > 0
        if not self._locked(s, self._enqueue_locked, data, charge, wait):
            if self._reentered():
                self._locked(s, self._enqueue_locked, data, charge, False)
            else:
                self._wait_for_room(s, _Entry(data, charge), deadline)
        if s.thread is None and self._push is not None:
            self._respawn()
        return 1

    def _enqueue_locked(self, s: _State, data: bytes, charge: int, wait: bool) -> bool:
        """Lock held. Accept a payload, or refuse it by raising; False: it may wait for room."""
        if s.phase is not _RUNNING or charge > self._max_buffered:
            raise self._refusal_locked(s, charge)
        if not (wait and s.producers) and self._commit_locked(s, (data,), charge, not data, None):
            return True
        if not wait:
            raise self._refusal_locked(s, charge)
        return False

    def _refusal_locked(self, s: _State, charge: int) -> Error:
        """Lock held. Count a refused payload, and return why."""
        s.rejected = (s.rejected[0] + 1, s.rejected[1] + charge)
        return self._refusal(s, charge, self._held(s))

    def _refusal(self, s: _State, charge: int, buffered: int) -> Error:
        if s.phase is _SHUTTING_DOWN:
            return ShuttingDown("the dispatcher is shutting down")
        if s.phase is _STOPPED:
            return Stopped("the dispatcher is stopped")
        if charge > self._max_buffered:
            return PayloadTooLarge(f"payload of {charge} bytes exceeds max_buffered_bytes={self._max_buffered}")
        return QueueFull(charge, buffered, self._max_buffered)

    def _held(self, s: _State) -> int:
        """Charge that is counted and not taken: what is buffered, but for what is in the inbox."""
        held: int = s.inbox[0][2] - s.taken.charge
        return held

    def _wait_for_room(self, s: _State, entry: _Entry, deadline: float) -> None:
        """Stand in the queue until the payload is accepted; raise when it is not."""
        parker = _Parker(self._new_lock())
        parker.entry = entry
        try:
            over = False
            while True:
                pause = self._locked(s, self._queue_locked, parker, entry, over)
                if pause is None:
                    return
                over = parker.park(pause, deadline - self._clock())
                if s is not self._state:  # forked by a signal handler: the child's queue is another
                    self._admit(entry.data, deadline)
                    return
        except BaseException as exc:
            if entry.accepted:  # and then a signal ended the wait: enqueue_many counts it
                with contextlib.suppress(Exception):
                    exc._accepted_by = self  # type: ignore[attr-defined]
            raise
        finally:
            try:
                self._leave(s, parker)
            except BaseException:
                self._leave(s, parker)
                raise

    def _queue_locked(self, s: _State, parker: _Parker, entry: _Entry, over: bool) -> float | None:
        """Lock held. None: entry was accepted; else how long to wait on. Raises when it is refused."""
        self._count_locked(s)
        parker.reset()
        if s.phase is _RUNNING and not entry.accepted:
            if parker.armed:
                self._serve_locked(s, True)
            if not entry.accepted and (over or not s.producers):
                self._accept_locked(s, entry)
        if entry.accepted:
            return None
        if over or s.phase is not _RUNNING:
            self._leave_locked(s, parker)  # at once, or whoever makes room next would accept what is refused here
            raise self._refusal_locked(s, entry.charge)
        if parker not in s.producers:
            s.producers.append(parker)
        parker.armed = s.producers[0] is parker and self._held(s) + entry.charge <= self._max_buffered
        return _PATIENCE if parker.armed else _FOREVER

    def _accept_locked(self, s: _State, entry: _Entry) -> bool:
        """Lock held. Accept a waiting producer's payload if it fits."""
        if self._commit_locked(s, (entry.data,), entry.charge, not entry.data, entry):
            entry.accepted = True  # it was by the commit: the next count says so too
            entry.data = b""
            return True
        return False

    def _commit_locked(
        self, s: _State, new: Sequence[bytes], charge: int, empties: int, entry: _Entry | None
    ) -> bool:
        """Lock held. Accept payloads if all of them fit (I1): store first, then change the header (I2)."""
        inbox = s.inbox
        while True:
            self._count_locked(s)
            pending = inbox[:0:-1]
            if s.mixed:  # a nested call came in since: count it first
                continue
            items, nbytes, total, _, _ = inbox[0]
            if total - s.taken.charge + charge > self._max_buffered:
                return False
            s.storing = True
            self._store_locked(s, items, nbytes, new)
            header = (items + len(new), nbytes + charge - empties, total + charge, 1, entry)
            s.unseen = False
            try:
                inbox[::-1] = [*pending, header]  # fails if the inbox has grown: then the room may be gone
            except ValueError:
                continue
            s.storing = False
            return True

    def _enqueue_chunk(self, chunk: Sequence[bytes], deadline: float) -> int:
        """Accept as many payloads of a chunk as fit now, in order; return how many."""
        s = self._state
        if self._nested(s):
            return 0
        n = self._locked(s, self._enqueue_chunk_locked, chunk, deadline > 0)
        if n and s.thread is None and self._push is not None:
            self._respawn()
        return n

    def _enqueue_chunk_locked(self, s: _State, chunk: Sequence[bytes], wait: bool) -> int:
        """Lock held. As _enqueue_chunk."""
        if s.phase is not _RUNNING or (wait and s.producers):
            return 0
        sizes = list(map(len, chunk))
        empties = sizes.count(0)
        charge = sum(sizes) + empties
        while not self._commit_locked(s, chunk, charge, empties, None):
            charges = list(accumulate(size or 1 for size in sizes))
            n = bisect_right(charges, self._max_buffered - self._held(s))
            if not n:
                return 0
            chunk, sizes = chunk[:n], sizes[:n]
            charge, empties = charges[n - 1], sizes.count(0)
        return len(chunk)

    def _admit_nested(self, s: _State, data: bytes, charge: int) -> None:
        """Accept or refuse a payload in a call that interrupted this thread in a locked section.

        Appends an entry, and decides by its place (see Theory). Touches nothing else that the section uses.
        """
        buffered = 0
        if charge <= self._max_buffered:
            entry = _Entry(data, charge)
            s.gate = 0
            s.mixed = s.left = True
            s.inbox.extend([entry, *repeat(None, (charge - 1) // self._small if self._small else 0)])
            s.left = True  # again, for a section that ended with a deeper call in between
            buffered = self._accepted_before(s, entry)[1] - s.taken.charge
            entry.accepted = s.phase is _RUNNING and buffered + charge <= self._max_buffered
            if entry.accepted:
                return
            entry.data = b""
        s.refused.append(charge)
        s.left = True
        raise self._refusal(s, charge, buffered)

    def _accepted_before(self, s: _State, entry: _Entry | None) -> tuple[int, int]:
        """Number and charge of the payloads accepted before entry's place (None: of all), from the beginning.

        For the lock's holder, or a call nested in it: nobody else changes the header.
        """
        snapshot = s.inbox[:]
        items, _, charge, granted, _ = snapshot[0]
        limit = self._max_buffered + s.taken.charge
        for i in range(1, len(snapshot)):
            item = snapshot[i]
            if isinstance(item, _Entry):
                if item is entry:
                    break
                # Undecided: that of a call which this one interrupted, and which will decide as is done here.
                undecided = item.accepted is None and entry is not None and s.phase is _RUNNING
                if item.accepted or (undecided and charge + item.charge <= limit):
                    items += 1
                    charge += item.charge
            elif item is not None and i < granted:
                items += 1
                charge += len(item)
        return items, charge

    # -- Counting and packing ----------------------------------------------------------------------------------------

    def _grant_locked(self, s: _State) -> None:
        """Lock held. Give as much credit as is safe (I3), if a payload need not be told to anybody (I4, I5)."""
        if not self._small or s.producers or s.phase is not _RUNNING or (self._push is not None and s.thread is None):
            return
        items, nbytes, charge, _, _ = s.inbox[0]
        first, begin = s.open
        if first == items:
            return
        places = min((self._max_buffered - charge + s.taken.charge) // self._small, self._places)
        if s.consumers and self._max_batch is not None:
            places = min(places, (self._max_batch - nbytes + begin - 1) // self._small)
        if places > 0:
            s.granted_at = self._clock()
            s.inbox[0] = (items, nbytes, charge, 1 + places, None)
            s.gate = 1 + places

    def _refresh_locked(self, s: _State) -> None:
        """Lock held. Count, and see which batches have closed."""
        self._count_locked(s)
        self._advance_locked(s)

    def _count_locked(self, s: _State) -> None:
        """Lock held. Withdraw the credit, and move what the inbox accepted into the runs."""
        s.gate = 0
        inbox = s.inbox
        n = len(inbox)
        items, nbytes, charge, granted, entry = inbox[0]
        if entry is not None:
            entry.accepted = True  # the commit that put it here was its acceptance
        if s.storing:
            self._trim_locked(s, items)
            s.storing = False
        if s.mixed or n > granted:
            self._sort_locked(s)
        elif n > 1:
            new = inbox[1:n]
            s.storing = s.unseen = True
            end = self._store_locked(s, items, nbytes, new)
            inbox[:n] = [(items + len(new), end, charge + end - nbytes, 1, None)]
            s.storing = False
        elif granted > 1:  # what a thread stopped in enqueue appends from here on is pending
            inbox[0] = (items, nbytes, charge, 1, None)

    def _sort_locked(self, s: _State) -> None:
        """Lock held. Count an inbox that may hold nested calls' entries, or pending payloads, which stay."""
        s.mixed = False  # before the inbox is read: a nested call that comes later sets it again
        try:
            snapshot = s.inbox[:]
            items, nbytes, charge, granted, _ = snapshot[0]
            new: list[bytes] = []
            rest: list[bytes] = []  # pending
            for i in range(1, len(snapshot)):
                item = snapshot[i]
                if isinstance(item, _Entry):
                    if item.accepted:
                        new.append(item.data)
                elif item is not None:
                    (new if i < granted else rest).append(item)
            s.storing = True
            end = self._store_locked(s, items, nbytes, new)
            total = charge + end - nbytes + new.count(b"")
            s.inbox[: len(snapshot)] = [(items + len(new), end, total, 1, None), *rest]
            s.storing = False
        except BaseException:
            s.mixed = True
            raise

    def _store_locked(self, s: _State, items: int, nbytes: int, new: Sequence[bytes]) -> int:
        """Lock held. Append payloads to the runs, behind the first `items`; return the byte at which they end."""
        step = _PIECE
        if len(new) > 1 and self._max_buffered >= _SPAN and max(map(len, new)) > MiB:
            step = 1  # or a piece might not fit 32 bits
        for i in range(0, len(new), step):
            piece = new if len(new) <= step else new[i : i + step]
            run = s.runs[-1] if s.runs else None
            if (
                run is None
                or len(run.ends) >= _RUN_ITEMS
                or nbytes - run.origin - run.base >= _RUN_BYTES
                or len(piece[0]) >= _SPAN
            ):
                run = self._new_run_locked(s, items, nbytes, len(piece[0]))
            ends = accumulate(map(len, piece), initial=nbytes - run.origin)
            next(ends)
            run.ends.extend(ends)
            run.body += piece  # type: ignore[operator]
            items += len(piece)
            nbytes = run.end()
        return nbytes

    def _new_run_locked(self, s: _State, items: int, nbytes: int, size: int) -> _Run:
        """Lock held. Begin a run; pack the one before, if an object for each of its payloads costs too much."""
        origin = nbytes
        if s.runs:
            last = s.runs[-1]
            length = nbytes - last.origin - last.base
            if isinstance(last.body, list) and length < _PACK_BELOW * len(last.ends) and length <= _PACK_BYTES:
                taken = max(0, s.taken.items - last.start)
                body = b"".join(last.body[taken:])
                last.offset = last.ends[taken - 1] if taken else last.base
                last.body = body
            if nbytes - last.origin < _SPAN and size < _SPAN:
                origin = last.origin
        run = _Run(items, origin, nbytes - origin, "I" if size < _SPAN else "Q")
        s.runs.append(run)
        return run

    def _trim_locked(self, s: _State, items: int) -> None:
        """Lock held. Cut off what a commit that did not happen left in the runs (I2)."""
        while s.runs and s.runs[-1].start >= items:
            s.runs.pop()
        if s.runs:
            run = s.runs[-1]
            del run.ends[items - run.start :]
            if isinstance(run.body, list):
                del run.body[items - run.start :]
            else:  # packed, and a new run was begun behind it
                assert len(run.ends) == items - run.start, "I2"

    def _advance_locked(self, s: _State) -> None:
        """Lock held. After a count: see how far batches have closed, and when the open one began."""
        items, nbytes, _, _, _ = s.inbox[0]
        s.peak = max(s.peak, self._held(s))
        first, begin = s.open
        if self._max_batch is not None and nbytes - begin >= self._max_batch:
            while nbytes - begin >= self._max_batch:
                first, begin = self._boundary_locked(s, first, begin)
            if s.unseen and first < items:
                s.born = (first, s.granted_at)  # at the earliest
            s.open = (first, begin)
        if first < items and s.born[0] != first:
            s.born = (first, self._clock())

    def _boundary_locked(self, s: _State, first: int, begin: int) -> tuple[int, int]:
        """Lock held. Where the batch ends that starts at payload `first`, byte `begin`, and has reached the limit."""
        assert self._max_batch is not None
        target = begin + self._max_batch
        for run in _from(s.runs, first):
            k = bisect_left(run.ends, target - run.origin, max(0, first - run.start))
            if k < len(run.ends):
                end = run.origin + run.ends[k]
                if end == target or run.start + k == first:  # full to the byte, or too large and alone
                    return run.start + k + 1, end
                return run.start + k, run.origin + (run.ends[k - 1] if k else run.base)
        raise AssertionError("the batch has not reached the limit")  # pragma: no cover - callers have seen that it has

    # -- Delivery ----------------------------------------------------------------------------------------------------

    def _next(self, deadline: float, push: bool) -> Batch:
        """Wait for a batch, and take it."""
        parker: _Parker | None = None
        s = self._state
        if self._nested(s):
            raise queue.Empty
        over = self._clock() >= deadline
        try:
            while True:
                if s is not self._state:  # forked by a signal handler: the child's queue is another
                    s, parker = self._state, None
                batch, delay = self._locked(s, self._poll_locked, parker, push)
                if batch is not None:
                    parker = None  # it has left the queue with the batch
                    return batch
                if over:
                    raise queue.Empty
                if parker is None:
                    parker = _Parker(self._new_lock())
                else:
                    over = parker.park(delay, deadline - self._clock())
        finally:
            try:
                self._leave(s, parker)
            except BaseException:
                self._leave(s, parker)
                raise

    def _poll_locked(self, s: _State, parker: _Parker | None, push: bool) -> tuple[Batch | None, float]:
        """Lock held. Take a batch if one is due; else stand in the queue, and say how long to wait (the timer)."""
        self._refresh_locked(s)
        batch = self._take_locked(s, push)
        if batch is None and s.producers and s.phase is _RUNNING:  # nothing else will make room
            self._serve_locked(s, True)
            self._refresh_locked(s)
            batch = self._take_locked(s, push)
        if batch is not None:
            if parker is not None:
                self._leave_locked(s, parker)
            return batch, 0.0
        if s.phase is not _RUNNING:
            raise Stopped("the dispatcher is stopped")
        delay = _FOREVER
        if parker is not None:
            parker.reset()
            if parker not in s.consumers:
                s.consumers.append(parker)
            parker.armed = s.open[0] < s.inbox[0][0] and parker in _timers(s)
            if parker.armed:
                delay = max(0.0, s.born[1] + self._interval - self._clock())
        return None, delay

    def _take_locked(self, s: _State, push: bool, discard: bool = False) -> Batch | None:
        """Lock held, after a refresh. Build the front batch if it is closed or due, and release its bytes."""
        items = s.inbox[0][0]
        t = s.taken
        stop, end = s.open
        if t.items < stop:
            if self._max_batch is not None and end - t.nbytes >= self._max_batch:
                stop, end = self._boundary_locked(s, t.items, t.nbytes)
            stop = _first_cut(s.runs, t.items, stop)
        elif t.items == items or (s.phase is _RUNNING and self._clock() < s.born[1] + self._interval):
            return None
        else:
            stop = items
        batch, empties = self._build_locked(s, stop)
        n, size = len(batch), batch.nbytes
        after = t._replace(
            items=stop,
            nbytes=t.nbytes + size,
            charge=t.charge + size + empties,
            flight_items=n if push else t.flight_items,
            flight_charge=size + empties if push else t.flight_charge,
            discarded_items=t.discarded_items + n if discard else t.discarded_items,
            discarded_charge=t.discarded_charge + size + empties if discard else t.discarded_charge,
            batches=t.batches if discard else t.batches + 1,
        )
        if push:
            s.flight_first = t.items
        if discard:
            s.undelivered.append((t.items, batch))
        if s.open[0] < stop:
            s.open = (stop, after.nbytes)
        s.taken = after
        while s.runs and s.runs[0].start + len(s.runs[0].ends) <= stop:
            s.runs.popleft()
        if s.runs:
            run = s.runs[0]
            if run.start < stop and isinstance(run.body, list):
                run.body[: stop - run.start] = repeat(b"", stop - run.start)
        return batch

    def _build_locked(self, s: _State, stop: int) -> tuple[Batch, int]:
        """Lock held. The batch from the front up to payload `stop`, and how many of its payloads are empty."""
        front = s.taken.items
        parts: list[bytes | memoryview] = []
        ends: array[int] | None = None
        base = origin = 0
        for run in s.runs:
            if run.start >= stop:
                break
            first, last = max(0, front - run.start), min(len(run.ends), stop - run.start)
            if first >= last:  # taken before, and not yet dropped
                continue
            parts += run.parts(first, last)
            more = run.ends[first:last]
            if ends is None:
                ends, origin = more, run.origin
                base = run.ends[first - 1] if first else run.base
            elif run.origin == origin and more.typecode == ends.typecode:
                ends += more
            else:
                ends = array("Q", chain(ends, (end + run.origin - origin for end in more)))
        assert ends is not None, "I2"
        data = parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)
        assert ends[-1] - base == len(data), "I2"
        empties = 0
        if self._held(s) != s.inbox[0][1] - s.taken.nbytes:  # there are empty payloads
            empties = sum(map(eq, ends, chain((base,), ends)))
        return Batch(data, ends, base), empties

    def _serve_locked(self, s: _State, now: bool) -> None:
        """Lock held. Accept payloads of waiting producers that fit, first come first served: now, or once it pays."""
        while s.producers:
            parker = s.producers[0]
            entry = parker.entry
            assert entry is not None
            if not entry.accepted:
                held = self._held(s)
                if held + entry.charge > self._max_buffered:
                    return
                if not now and self._lazy and 2 * held > self._max_buffered:
                    if not parker.armed:
                        parker.wake()  # to look for itself after _PATIENCE
                    return
                now = True
                if not self._accept_locked(s, entry):
                    return
            parker.wake()
            s.producers.popleft()

    def _signal_locked(self, s: _State) -> None:
        """Lock held. Wake a consumer if it has something to do: a batch to take, or a timer to set."""
        if s.consumers and s.taken.items < s.inbox[0][0]:
            due = s.taken.items < s.open[0]
            for parker in _timers(s):
                if due or not parker.armed:
                    parker.wake()

    # -- Push --------------------------------------------------------------------------------------------------------

    def _start_locked(self, s: _State, push: tuple[_Handler, _OnError | None, float]) -> None:
        """Lock held. Note the handler."""
        if s.phase is not _RUNNING:
            raise self._refusal(s, 0, 0)
        if self._push is not None:
            raise RuntimeError("start was called before")
        self._push = push

    def _spawn(self) -> None:
        """Start the handler's thread, unless there is one."""
        s = self._state
        thread = self._new_thread(target=self._consume, name=f"tempo-{id(self):x}", daemon=True)
        if self._locked(s, self._adopt_locked, thread):
            try:
                thread.start()
            except BaseException:
                s.thread = None
                raise

    def _respawn(self) -> None:
        """In a forked child, at its first enqueue: the handler's thread again. The payload is accepted either way."""
        with contextlib.suppress(RuntimeError):  # no thread can be started: the next enqueue tries, or the exit drains
            self._spawn()

    def _adopt_locked(self, s: _State, thread: threading.Thread) -> bool:
        """Lock held. Make thread the handler's, if there is none."""
        if s.thread is not None:
            return False
        s.thread = thread
        return True

    def _consume(self, until: float = _FOREVER) -> None:
        """Call the handler for each batch until the dispatcher stops (or until a time, at exit)."""
        assert self._push is not None
        handler, on_error, _ = self._push
        s = self._state
        while s is self._state:  # else the handler has forked, and this is the child
            try:
                batch = self._next(until, True)
            except (Stopped, queue.Empty):
                return
            except Exception as exc:  # MemoryError: the batch is still there; the thread must be, too
                self._report(exc, None, None)
                _Parker(self._new_lock()).park(self._interval, _FOREVER)
                continue
            failed = False
            try:
                handler(batch)
            except BaseException as exc:  # SystemExit too: a handler never ends the thread
                failed = True
                self._report(exc, batch, on_error)
            del batch  # or it would be held while waiting for the next
            if s is self._state:
                self._locked(s, self._landed_locked, failed)

    def _report(self, exc: BaseException, batch: Batch | None, on_error: _OnError | None) -> None:
        """Tell of an exception, and of one in on_error, without raising."""
        try:
            if on_error is None or batch is None:
                thread = threading.current_thread()
                threading.excepthook(threading.ExceptHookArgs((type(exc), exc, exc.__traceback__, thread)))
            else:
                on_error(exc, batch)
        except BaseException as again:
            if on_error is not None:
                self._report(again, None, None)

    def _landed_locked(self, s: _State, failed: bool) -> None:
        """Lock held. The handler has returned."""
        t = s.taken
        s.flight_first = -1
        s.taken = t._replace(
            flight_items=0,
            flight_charge=0,
            failed_items=t.failed_items + t.flight_items if failed else t.failed_items,
            failed_charge=t.failed_charge + t.flight_charge if failed else t.failed_charge,
        )

    # -- Flush, shutdown, stop ---------------------------------------------------------------------------------------

    def _cut_locked(self, s: _State) -> int:
        """Lock held. Close the open batch; return the number of payloads accepted."""
        self._refresh_locked(s)
        items: int
        items, nbytes, _, _, _ = s.inbox[0]
        if s.open[0] < items:
            run = s.runs[-1]
            if run.cuts is None:
                run.cuts = array("H")  # a run holds less than _RUN_ITEMS + _PIECE payloads
            run.cuts.append(items - run.start)
            s.open = (items, nbytes)
        return items

    def _wait_delivered(self, s: _State, target: float, deadline: float) -> bool:
        """Wait until the first `target` payloads are delivered; False: out of time, or stopped before."""
        parker: _Parker | None = None
        over = self._clock() >= deadline
        try:
            while s is self._state:
                done = self._locked(s, self._delivered_locked, target, parker)
                if done is not None:
                    return done
                if over:
                    return False
                if parker is None:
                    parker = _Parker(self._new_lock())
                    parker.target = target
                else:
                    over = parker.park(_FOREVER, deadline - self._clock())
            return True  # forked by a signal handler: what was accepted is the parent's
        finally:
            try:
                self._leave(s, parker)
            except BaseException:
                self._leave(s, parker)
                raise

    def _delivered_locked(self, s: _State, target: float, parker: _Parker | None) -> bool | None:
        """Lock held. Whether it came to a delivery of all, or to an end without; None: parker waits for either."""
        self._refresh_locked(s)
        if self._delivered(s, target):
            return True
        if s.phase is _STOPPED:
            return target == _FOREVER and not s.halted
        if parker is not None:
            parker.reset()
            if parker not in s.drainers:
                s.drainers.append(parker)
        return None

    def _delivered(self, s: _State, target: float) -> bool:
        t = s.taken
        return t.items >= target and not 0 <= s.flight_first < target and not t.discarded_items

    def _close_locked(self, s: _State) -> bool:
        """Lock held. Take no more work; return whether there is nothing to wait for."""
        if s.phase is _RUNNING:
            s.phase = _SHUTTING_DOWN
        self._refresh_locked(s)
        return s.phase is _STOPPED

    def _give_up_locked(self, s: _State) -> None:
        """Lock held. shutdown was not told that all is delivered: stop, unless somebody has."""
        if s.halted:
            raise Stopped("stopped while it was shutting down")
        if s.phase is not _STOPPED:
            raise DrainTimeout(self._stop_locked(s))

    def _stop_locked(self, s: _State) -> list[Batch]:
        """Lock held. Stop, and take out what was not delivered; made to be called again when an exception ended it."""
        if s.phase is not _STOPPED:
            s.phase = _STOPPED
            s.halted = True
        self._refresh_locked(s)
        while s.undelivered and s.undelivered[-1][0] >= s.taken.items:
            s.undelivered.pop()
        while self._take_locked(s, False, discard=True) is not None:
            pass
        batches = [batch for _, batch in s.undelivered]
        s.undelivered = []
        return batches

    # -- Looking at it -----------------------------------------------------------------------------------------------

    def _stats_locked(self, s: _State) -> Stats:
        """Lock held. As stats."""
        self._refresh_locked(s)
        return self._snapshot(s)

    def _snapshot(self, s: _State) -> Stats:
        """Lock held, by this call or by the one that it interrupted."""
        t = s.taken
        items, charge = self._accepted_before(s, None)
        refused = list(s.refused)
        return Stats(
            accepted=items,
            accepted_bytes=charge,
            delivered=t.items - t.flight_items - t.discarded_items,
            delivered_bytes=t.charge - t.flight_charge - t.discarded_charge,
            in_flight=t.flight_items,
            in_flight_bytes=t.flight_charge,
            buffered=items - t.items,
            buffered_bytes=charge - t.charge,
            discarded=t.discarded_items,
            discarded_bytes=t.discarded_charge,
            rejected=s.rejected[0] + len(refused),
            rejected_bytes=s.rejected[1] + sum(refused),
            failed=t.failed_items,
            failed_bytes=t.failed_charge,
            batches=t.batches,
            peak_buffered_bytes=max(s.peak, charge - t.charge),
            waiting_producers=len(s.producers),
            waiting_consumers=len(s.consumers),
            state=s.phase,
        )

    def _check(self) -> None:
        """Assert every invariant; for tests."""
        self._locked(self._state, self._check_locked)

    def _check_locked(self, s: _State) -> None:
        """Lock held. As _check."""
        items, nbytes, charge, granted, _ = s.inbox[0]
        t = s.taken
        assert s.gate in (0, granted), "I3"
        if s.gate:
            assert (granted - 1) * self._small <= self._max_buffered - charge + t.charge, "I3"
            assert s.open[0] < items, "I4"
            assert not s.producers and s.phase is _RUNNING, "I5"
        self._refresh_locked(s)
        items, nbytes, charge, granted, _ = s.inbox[0]
        assert 0 <= charge - t.charge <= s.peak <= self._max_buffered, "I1"
        stored = list(chain.from_iterable(range(run.start, run.start + len(run.ends)) for run in s.runs))
        assert stored == list(range(stored[0] if stored else items, items)), "I2"
        assert not stored or stored[0] <= t.items, "I2"
        at = None
        for run in s.runs:
            ends = [run.origin + end for end in run.ends]
            assert at in (None, run.origin + run.base) and ends == sorted(ends), "I2"
            at = run.end()
            first = max(0, t.items - run.start)
            payloads = b"".join(run.parts(first, len(ends)))
            assert len(payloads) == at - (ends[first - 1] if first else run.origin + run.base), "I2"
        assert at is None or at == nbytes, "I2"
        assert t.items <= s.open[0] <= items and t.nbytes <= s.open[1] <= nbytes, "I4"
        if self._max_batch is not None and s.open[0] < items:
            assert nbytes - s.open[1] < self._max_batch, "I4"
        snapshot = self._snapshot(s)
        for suffix in ("", "_bytes"):
            parts = [getattr(snapshot, name + suffix) for name in ("delivered", "in_flight", "buffered", "discarded")]
            assert min(parts) >= 0 and getattr(snapshot, "accepted" + suffix) == sum(parts), "I6"


def _timers(s: _State) -> list[_Parker]:
    """The waiting consumers that see to the front batch: the first thread, and the coroutines before it."""
    found = []
    for parker in list(s.consumers):
        if isinstance(parker, _AsyncParker) and parker.dead():
            s.consumers.remove(parker)
            continue
        found.append(parker)
        if parker.sure:
            break
    return found


def _first_cut(runs: Iterable[_Run], front: int, stop: int) -> int:
    """Number of the payload at which flush cut first behind `front`, or `stop`."""
    for run in runs:
        if run.start >= stop:
            break
        if run.cuts is not None:
            k = bisect_right(run.cuts, front - run.start)
            if k < len(run.cuts):
                return min(stop, run.start + run.cuts[k])
    return stop


def _from(runs: deque[_Run], first: int) -> Iterable[_Run]:
    """The runs from the one that holds payload `first`, found from the nearer end."""
    if not runs or runs[0].start + len(runs[0].ends) > first:
        return runs
    newer = sum(1 for _ in takewhile(lambda run: run.start > first, reversed(runs)))
    return islice(runs, len(runs) - 1 - newer, None)


def _show(value: object) -> str:
    """A value for an error message, cut to a line's length."""
    try:
        text = f"{type(value).__name__}: {value!r}"
    except Exception:  # a repr may do anything
        return type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _own(payload: Any) -> bytes:
    """The payload as an exact bytes object: itself, or a copy. Runs foreign code (`__buffer__`), so without a lock."""
    if type(payload) is bytes:
        return payload
    try:
        view = memoryview(payload)
    except TypeError:
        raise TypeError(f"payload must be a bytes-like object, not {_show(payload)}") from None
    with view:
        if not view.c_contiguous:
            raise TypeError(f"payload must be C-contiguous, not {_show(payload)}")
        return view.tobytes()


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {_show(value)}")
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0 seconds, not {value!r}")
    return float(value) if value <= threading.TIMEOUT_MAX else _FOREVER


def _timeout(value: Any) -> float:
    return _FOREVER if value is None else _seconds("timeout", value)


def _byte_limit(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {_show(value)}")
    if value <= 0:
        raise ValueError(f"{name} must be > 0 bytes, not {value!r}")
    return value


# One hook each for fork and exit; the set keeps no dispatcher alive.
_GLOBALS = globals()
_LOCKED_CODE = Dispatcher._locked.__code__
_DISPATCHERS: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


def _dispatchers() -> list[Dispatcher]:
    while True:
        try:
            return list(_DISPATCHERS)
        except RuntimeError:  # another thread made one meanwhile
            continue


def _after_fork_in_child() -> None:
    """Give every dispatcher a fresh, empty state; what was accepted is the parent's."""
    for d in _dispatchers():
        old, d._state = d._state, _State(d._new_rlock())
        old.gate = 0
        for parker in chain(old.producers, old.consumers, old.drainers):
            parker.woken = False  # another thread may have been about to wake it
            parker.wake()  # this thread's, if a signal handler forked in its wait


def _at_exit() -> None:
    """Drain what was started, each for its exit_timeout at most, all at the same time."""
    begin = time.monotonic()
    started = [(d, d._push[2]) for d in _dispatchers() if d._push is not None]
    for d, _ in started:
        d._locked(d._state, d._close_locked)
    for d, limit in started:
        until = begin + limit
        if d._state.thread is None:  # a forked child could not start it
            d._consume(until)
        with contextlib.suppress(DrainTimeout, Stopped):
            d.shutdown(max(0.0, until - time.monotonic()))


if hasattr(os, "register_at_fork"):  # pragma: no branch - not on Windows
    os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
