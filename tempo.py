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
from functools import partial
from io import BytesIO
from itertools import accumulate, chain, islice, repeat, takewhile
from operator import countOf
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
_NO_WAIT: Final = 0.0  # the default timeout; enqueue knows it by identity
_CREDIT_ITEMS: Final = 1024  # payloads accepted unseen at most; each costs about 42 bytes until it is counted
_SMALL: Final = 512  # bytes: the largest payload that credit covers, until payloads have been seen
_SAMPLE: Final = 256  # payloads of a batch whose largest says what credit covers next,
_RARE: Final = 8  # if it is no more than so many times their mean
_CHUNK: Final = 512  # payloads that enqueue_many admits at a time
_RUN_ITEMS: Final = 1024  # payloads a run holds before the next one is begun
_RUN_BYTES: Final = 64 * KiB  # bytes a run holds before the next one is begun
_LEAST_ITEMS: Final = 256  # payloads, or
_LEAST_BYTES: Final = 8 * KiB  # bytes, from which a run ends with a batch; it costs 300 bytes itself
_JOIN_BELOW: Final = 512  # bytes: smaller payloads are joined as they are counted; larger ones when a batch is taken
_STRIDE: Final = 64  # payloads among which the end of a batch is looked for
_UINT: Final = 1 << 32  # the first size that four bytes do not hold
_PACE_ITEMS: Final = 64  # payloads over which their pace is measured
_REST_FLOOR: Final = 64 * KiB  # producers do not rest where the buffer is smaller
_FORK_PATIENCE: Final = 1.0  # seconds for which a fork in a wait for the lock waits for it
_PATIENCE: Final = 0.01  # seconds for which resting producers trust that consumers come
# From CPython 3.14 on, an interrupt may come between the getting of a lock and its `with`, which then keeps it: there
# `with` calls __enter__ as any function, and signals are looked for after a call.
_WITH_LEAKS: Final = sys.implementation.name == "cpython" and sys.version_info >= (3, 14)

_RUNNING: Final = "running"
_SHUTTING_DOWN: Final = "shutting_down"
_STOPPED: Final = "stopped"

_T = TypeVar("_T")

# Theory of operation
#
# Flow.  producer -> inbox -> runs -> Batch -> consumer.  `enqueue` appends to the inbox, a plain list.  Whoever holds
# the lock counts the inbox: moves what it accepted into runs, small payloads joined into larger pieces, with a cut
# where a batch ends.  A consumer joins the front of the runs into a Batch.  All of it is in a _State; a fork replaces
# the _State whole, so a call that the fork cut short goes on in the old one and harms nobody.
#
# Truth.  inbox[0] is the header, a tuple: items, nbytes and charge of all that was counted since the beginning;
# granted, the index below which the inbox is accepted unseen; the entries that were accepted with it; and where the
# open batch starts (number, byte, time).  Header and payloads are one list, changed by single C-level operations, so
# whoever reads `inbox[:]`, at any bytecode of any other call, sees what is accepted.  What has left is one tuple too,
# s.taken.  All else follows from these: _settle_locked derives it at the end of a locked section, and can do so again,
# so what an exception (a KeyboardInterrupt, say) cuts short is made good by the next section.
#
#   I1  0 <= buffered_bytes <= max_buffered_bytes, where buffered_bytes = charge - taken.charge + the accepted part of
#       the inbox: payloads at an index < granted and of at most s.small bytes, and entries whose `accepted` is True.
#   I2  Runs hold the payloads [taken.items, items) in order.  What changes them stores first and changes the header
#       last; what was stored and not confirmed (s.storing) is trimmed by the next count.
#   I3  s.places is 0 or granted, and then s.covers is s.small, with (granted - 1) * small bytes of room: whatever
#       comes, it fits.  Credit is only given with a place for all that is pending.  While there is credit, nothing
#       leaves the inbox but pending payloads, and s.small does not change.
#   I4  A batch ends at a cut; all before header.first is in closed batches.  Credit is only given while the open batch
#       has a payload: the first one after a pause takes the lock, notes the time, and tells a waiting consumer.
#   I5  While a consumer waits and is not woken yet, credit ends before the open batch is full, because the consumer
#       must be told.  Else it may go on behind it, for _unseen seconds at the pace of late; a batch that begins so
#       counts its interval from the credit.  While a producer waits for room, there is none.
#   I6  accepted == delivered + in_flight + buffered + discarded, items and bytes.
#
# Enqueue without the lock.  (1) append; (2) len(inbox) <= s.places; (3) size <= s.covers: accepted.  A thread may be
# stopped between any two of these, and the credit be withdrawn, or given anew, meanwhile.  If (2) held, the payload
# came within a credit.  At (3) that is still the last one given, or withdrawn since and the payload counted with it if
# it is small enough; or later ones came: then it has been counted, or has a place in each of them (I3), its index being
# no greater than at (2).  So it is accepted if it is no larger than what (3) reads, whichever credit that belongs to.
# If it is not covered, the payload is pending; its owner takes the lock, counts, and looks: if it has left the inbox,
# it was counted, and so accepted; if credit is renewed and covers it, it is accepted; else the owner takes it out
# (after a count, when nothing is granted: or a pending one could move into a place that is) and goes the exact way.
# What it cannot take out (interrupted again, no stack) is an orphan; the next count, when nothing is granted, does it.
# What must be atomic: list.append, len(list), del list[i], list slices read and assigned, attribute loads and stores:
# under the GIL, and in a build without it, where each takes the list's own lock and is sequentially consistent.
#
# Nested calls.  The lock is an RLock, one for all dispatchers: a finalizer in a section of one may call another.
# `s.owner` names the thread inside a locked section.  A signal handler or finalizer that interrupts its own thread
# there must not touch what is half done.  It puts None for its payload, appends an entry instead, and decides by
# walking header and inbox in order: exact (I1), and deeper calls decide alike.  The holder commits, gives credit and
# takes empty places back by compare-and-set on the inbox's length (assignment to inbox[::-1] fails if it has grown), so
# none of it rests on what a nested call has changed.  An entry takes as many places as its size could need, and keeps
# them when it is refused: what other threads append behind it, under the credit that it withdrew or one that was about
# to be given, finds no place granted that the room does not suffice for.
#
# Waiting.  Each waits on a lock of its own, a binary semaphore: it keeps a wake-up that comes early.  (A Condition
# loses one that a signal handler sends from its own thread between test and wait.)  No wait holds the dispatcher's
# lock.  Producers without room queue in s.producers; whoever makes room accepts their payloads for them, first come
# first served.  Then they rest, in s.resting: under a GIL all of them awake would only keep the consumer from running.
# Each turn's worth of bytes taken rouses the first.  A producer that renews its credit rests too when the buffer is
# half full and a consumer is about.  One resting producer, the sentinel, looks every _PATIENCE that turns come, else it
# rouses all.  Consumers wait in s.consumers: the first thread, and coroutines before it, are timers for the open batch.
# flush and shutdown wait in s.drainers.  A call from inside tempo never waits: its thread may be the one to make room.
#
# States.  running -> shutting_down -> stopped, or running -> stopped; never back.  A fork by a signal handler in a wait
# for the lock gets the lock first, or the child could not free it.  At exit, daemon threads that stand still lose it.


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

    __slots__ = ("_data", "_ends", "_sizes")
    _data: bytes
    _sizes: array[int]  # of each payload; 4 bytes a payload
    _ends: array[int] | None  # where each payload ends, once an index asked for it

    def __init__(self, data: bytes, sizes: array[int]) -> None:
        set_slot = object.__setattr__
        set_slot(self, "_data", data)
        set_slot(self, "_sizes", sizes)
        set_slot(self, "_ends", None)

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
        return len(self._sizes)

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> list[memoryview]: ...
    def __getitem__(self, index: int | slice) -> memoryview | list[memoryview]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self._sizes)))]
        i = range(len(self._sizes))[index]  # negative indices, IndexError
        ends = self._ends
        if ends is None:  # two threads may come here: both compute the same
            ends = array("Q" if len(self._data) >= _UINT else "I", accumulate(self._sizes))
            object.__setattr__(self, "_ends", ends)
        return memoryview(self._data)[(ends[i - 1] if i else 0) : ends[i]]

    def __iter__(self) -> Iterator[memoryview]:
        ends = list(accumulate(self._sizes))
        return map(memoryview(self._data).__getitem__, map(slice, chain((0,), ends), ends))

    def tolist(self) -> list[bytes]:
        """Return the payloads as a list of bytes objects, copied at C speed; the list is the caller's."""
        return list(map(BytesIO(self._data).read, self._sizes))

    def __reduce__(self) -> tuple[object, ...]:
        return Batch, (self._data, self._sizes)

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
    """Consecutive payloads, small ones joined as they are counted. Guarded by the lock."""

    __slots__ = ("begin", "cuts", "parts", "sizes", "start")

    def __init__(self, start: int, begin: int, typecode: str) -> None:
        self.start = start  # number of its first payload
        self.begin = begin  # byte at which that starts; both from the beginning of all
        self.sizes = array(typecode)  # of each payload
        self.parts: list[bytes] = []  # the payloads back to back, in one or more pieces
        self.cuts: array[int] | None = None  # where batches end, in payloads from the run's start

    def cut(self, number: int) -> None:
        """Note that a batch ends before payload `number`."""
        if self.cuts is None:
            self.cuts = array("H")  # a run holds less than _RUN_ITEMS + 2 * _CREDIT_ITEMS payloads
        self.cuts.append(number - self.start)

    def join(self) -> bytes:
        """Make one piece of all, and return it."""
        if len(self.parts) > 1:
            self.parts = [b"".join(self.parts)]
        return self.parts[0]


class _Entry:
    """A payload whose fate is decided by its place in the inbox: a nested call's, or a waiting producer's."""

    __slots__ = ("accepted", "charge", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data  # dropped when the fate is decided and the payload elsewhere
        self.charge = len(data) or 1
        self.accepted: bool | None = None


_NO_ENTRY: Final = _Entry(b"")
_RESTING: Final = _Entry(b"")
_RESTING.accepted = True


class _Parker:
    """One waiting thread. `wake` may come early, or twice: it is kept, once. All but park under the lock."""

    __slots__ = ("_ready", "armed", "entry", "hasty", "roused", "target", "woken")
    sure = True  # it runs when it is woken

    def __init__(self, lock: Any) -> None:
        lock.acquire()
        self._ready = lock
        self.woken = False
        self.armed = False  # a consumer: has a timer for the open batch
        self.hasty = False  # a producer: does not rest
        self.roused = False  # a producer: it need not ask why it was woken
        self.entry = _NO_ENTRY  # of a waiting producer
        # Of flush: the number of payloads that are to be delivered; of the sentinel: taken.charge when it looked last.
        self.target: float = _FOREVER

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
            # An object of its own, or who removes what was posted could take a later one for it.
            self._outbox.append(lambda: self._post())  # noqa: PLW0108
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
        "inbox", "places", "covers", "owner", "phase", "outbox", "orphans", "leavers", "left", "mixed", "flush_asked",
        "shutdown_asked", "refused", "heights", "lock", "calm", "runs", "storing", "taken", "small", "granted_at",
        "pace", "flight_first", "flight", "rejected", "peak", "producers", "resting", "turn", "sentinel", "away",
        "consumers", "drainers", "announced", "halted", "undelivered", "thread",
    )  # fmt: skip

    def __init__(self, rlock: Any) -> None:
        # Touched without the lock; why that is safe is told in Theory.
        self.inbox: list[Any] = [(0, 0, 0, 1, (), 0, 0, 0.0)]
        self.places = 0  # the length up to which the inbox is accepted unseen; set under the lock
        self.covers = 0  # bytes: the size up to which a payload is
        self.owner = 0  # identity of the thread in a locked section; only that thread compares equal
        self.phase = _RUNNING  # changed under the lock
        self.outbox: deque[Callable[[], object]] = deque()  # wake-ups of coroutines, made after the lock is released
        self.orphans: list[bytes] = []  # late payloads that their owners could not take out: the next count does
        self.leavers: deque[_Parker] = deque()  # no longer waiting; it needs no memory for one more
        # What nested calls leave to the lock's holder, which is their own thread.
        self.left = False  # anything
        self.mixed = False  # entries in the inbox
        self.flush_asked = self.shutdown_asked = False
        self.refused: list[int] = []  # charges
        self.heights: list[int] = []  # of the buffer, when an entry was accepted

        # Guarded by the lock.
        self.lock = rlock
        self.calm = False  # the section has changed nothing that anybody waits for, and has given credit
        self.runs: deque[_Run] = deque()
        self.storing = False  # the runs may hold more than the header says (I2)
        self.taken = _Taken()
        self.small = _SMALL  # the largest payload that credit covers
        self.granted_at = 0.0  # when credit was given last
        # Payloads and time from which it is measured; as measured last, per second.
        self.pace: tuple[int, float, float] = (0, 0.0, 0.0)
        self.flight_first = -1  # number of the first payload that the handler has, or -1
        self.flight: Batch | None = None  # taken for the handler, which has not got it yet
        self.rejected: tuple[int, int] = (0, 0)  # payloads, charge
        self.peak = 0
        self.producers: deque[_Parker] = deque()
        self.resting: deque[_Parker] = deque()  # producers whose payload was accepted, and that wait for their turn
        self.turn = 0  # taken.charge up to which turns were given
        self.away = False  # no consumer came for a while
        self.sentinel: _Parker | None = None  # the resting producer that watches whether turns come
        self.consumers: deque[_Parker] = deque()
        self.drainers: deque[_Parker] = deque()
        self.announced = _RUNNING  # the phase that everybody waiting was woken for
        self.halted = False  # stopped before it was drained
        # What stop is to return, in a list for one caller to claim it: number of the first payload, batch.
        self.undelivered: list[list[tuple[int, Batch]]] = []
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
                batch, delay = d._poll(s, parker, False)
                if s is not d._state:  # forked, by a signal handler: the batch is the parent's
                    continue
                if batch is not None:
                    parker = None  # it has left the queue with the batch
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
        except BaseException:  # cancelled: the loop is left, though the iterator may live on
            self.thread = 0
            raise
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
        "__weakref__", "_ahead", "_clock", "_ident", "_interval", "_local", "_max_batch", "_max_buffered",
        "_most_small", "_new_lock", "_new_rlock", "_new_thread", "_push", "_state", "_turn", "_unseen",
    )  # fmt: skip

    def __init__(self, *, interval: float, max_buffered_bytes: int, max_batch_bytes: int | None = None) -> None:
        # Fixed after init. Primitives are looked up here and not at import, so that monkey-patching comes in time; and
        # again at the first call in a forked child, which may have been patched since (see _first_ident).
        self._interval = _seconds("interval", interval)
        if not 0 < self._interval <= threading.TIMEOUT_MAX:
            raise ValueError(
                f"interval must be > 0 and at most {threading.TIMEOUT_MAX} seconds, not {_show(interval, False)}"
            )
        self._max_buffered = _byte_limit("max_buffered_bytes", max_buffered_bytes)
        self._max_batch = None if max_batch_bytes is None else _byte_limit("max_batch_bytes", max_batch_bytes)
        # Room for how many bytes rouses a resting producer: enough to be worth a switch of threads. 0: none rests.
        self._turn = max_buffered_bytes >> 4 if max_buffered_bytes >= _REST_FLOOR else 0
        # How large payloads are at most that credit covers where they are rare, and how many bytes of those that are
        # joined it is good for at most: when they are counted, they are there twice for a moment.
        limit = min(self._max_batch or max_buffered_bytes, max_buffered_bytes)
        self._most_small = max(_SMALL, limit >> 6)
        self._ahead = (max_buffered_bytes >> 3) + 64 * KiB
        # For how long, at the pace of payloads, a credit may go on behind the end of the open batch: the next one
        # begins unseen then, and counts its interval from the credit.
        self._unseen = self._interval / 8
        self._clock = time.monotonic
        self._push: tuple[_Handler, _OnError | None, float] | None = None  # set once, under the lock
        self._ident = threading.get_ident
        self._local = threading.local()
        self._resolve()
        self._renew()
        _DISPATCHERS.add(self)

    def _resolve(self) -> None:
        """Look up what makes locks and threads, now. What threads have noted in _local stays, if it is still of use."""
        self._new_lock, self._new_rlock, self._new_thread = threading.Lock, threading.RLock, threading.Thread
        if type(self._local) is not threading.local:
            self._local = threading.local()

    def _renew(self) -> None:
        """Begin anew, with nothing accepted; also in a forked child, by its only thread."""
        self._state = _State(self._shared_lock())

    def _shared_lock(self) -> Any:
        """The lock of all dispatchers. gevent changes what RLock makes, not the function: so the type counts too."""
        lock = self._new_rlock()
        return _LOCKS.setdefault((self._new_rlock, type(lock)), lock)

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
        if timeout is None or timeout is _NO_WAIT or _fine(timeout):
            if type(payload) is bytes:
                s = self._state
                inbox = s.inbox
                try:
                    inbox.append(payload)
                    if len(inbox) <= s.places and len(payload) <= s.covers:  # read in this order (see Theory)
                        return
                    late = [payload]
                except BaseException as exc:  # an interrupt after the append; or no memory, or no stack, for it
                    if not isinstance(exc, RecursionError):
                        self._abandon(s, [payload], None if isinstance(exc, MemoryError) else exc)
                    raise
                try:
                    self._enqueue(s, late, timeout)
                except BaseException as exc:
                    try:
                        accepted = self._abandon(s, late, exc)
                    except RecursionError:  # no stack is left for that
                        s.orphans.extend(late)
                        raise
                    if not (accepted and isinstance(exc, (MemoryError, RecursionError))):  # else it came after that
                        raise
            else:
                self.enqueue(self._own(payload), timeout=timeout)

    def enqueue_many(self, payloads: Iterable[Buffer], *, timeout: float | None = _NO_WAIT) -> int:
        """Accept payloads in order, as `enqueue` would, at a fraction of the cost; return how many.

        One deadline for all. Lists and tuples are admitted 512 at a time; other iterables, and subclasses of these, are
        read one by one, so that nothing is taken out of them that is not offered. No lock is held while they run.

        Raises:
            What `enqueue` raises, and what the iterable raises; the exception's `.accepted` says how many of the
            payloads were accepted before, so that the caller can route the rest.
        """
        accepted = [0]  # a list, so that a locked section can say so before an exception ends it
        try:
            deadline = self._deadline(_timeout(timeout))
            if type(payloads) is list or type(payloads) is tuple:  # a subclass has code of its own, slices of its own
                for i in range(0, len(payloads), _CHUNK):
                    chunk = payloads[i : i + _CHUNK]
                    done = 0
                    ready = countOf(map(type, chunk), bytes) == len(chunk)
                    while done < len(chunk):
                        if ready:
                            done += self._enqueue_chunk(chunk[done:] if done else chunk, deadline, accepted)
                        if done < len(chunk):  # it does not fit, or is to be copied
                            count = accepted[0] + 1  # first: it may need memory
                            self._put(self._own(chunk[done]), deadline)
                            accepted[0] = count
                            done += 1
            else:
                for payload in payloads:
                    data = self._own(payload)
                    del payload  # before CPython 3.13, _reentered makes a frame keep what its locals were
                    count = accepted[0] + 1
                    self._put(data, deadline)
                    accepted[0] = count
        except BaseException as exc:
            with contextlib.suppress(Exception):  # foreign exceptions may have slots
                exc.accepted = accepted[0] + (getattr(exc, "_accepted_by", None) is self)  # type: ignore[attr-defined]
            raise
        return accepted[0]

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
            raise TypeError(f"handler must be callable, not {_show(handler, False)}")
        if on_error is not None and not callable(on_error):
            raise TypeError(f"on_error must be callable or None, not {_show(on_error, False)}")
        push = (handler, on_error, _seconds("exit_timeout", exit_timeout))
        self._spawn(self._state, push)

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
        if not self._wait_delivered(s, _FOREVER, deadline) and self._locked(s, self._give_up_locked):
            raise _claim(s, DrainTimeout)
        thread = s.thread
        if thread is not None and thread.is_alive():
            thread.join()  # its last batch is delivered: it only has to return

    def stop(self) -> list[Batch]:
        """Stop at once; return the batches that no consumer received, which are now the caller's.

        Blocked producers and consumers are released, and a `shutdown` under way raises Stopped. The first call returns
        the batches, later ones an empty list. A batch that the handler has is not among them.

        Raises:
            RuntimeError: called by a signal handler or finalizer that interrupted tempo; nothing changed.
        """
        s = self._state
        self._locked(s, self._stop_locked)
        return _claim(s, list)

    def stats(self) -> Stats:
        """Return a consistent snapshot. May be called from anywhere."""
        s = self._state
        return self._snapshot(s) if self._nested(s) else self._locked(s, self._stats_locked)

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
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
        if sys.is_finalizing():  # daemon threads never run again, nor give back a lock that they hold or wait for
            with contextlib.suppress(AttributeError):  # a patched one may have other names
                if not s.lock._is_owned():
                    s.lock._at_fork_reinit()
        lock = s.lock
        depth = lock._recursion_count() if _WITH_LEAKS else 0
        try:
            with lock:
                try:
                    s.owner = me
                    s.calm = False
                    return work(s, *args)
                finally:
                    try:
                        self._disown_locked(s, me)
                    except MemoryError:  # perhaps for a moment: to do it again makes it good
                        self._disown_locked(s, me)
                    except RecursionError:  # the caller has used up the stack; but the work is done
                        _with_more_stack(s, self._disown_locked, s, me)
                    except BaseException:  # KeyboardInterrupt: what is left undone would wake nobody
                        self._disown_locked(s, me)
                        raise
                    finally:
                        s.owner = 0
        finally:
            if _WITH_LEAKS:
                while lock._recursion_count() > depth:
                    lock.release()
            if s.outbox:
                try:
                    self._post(s)
                except BaseException:
                    self._post(s)
                    raise

    def _post(self, s: _State) -> None:
        """Without the lock: make the wake-ups of coroutines. Twice does no harm."""
        while s.outbox:
            with contextlib.suppress(IndexError, ValueError):  # another thread posts too
                post = s.outbox[0]
                post()
                s.outbox.remove(post)

    def _disown_locked(self, s: _State, me: int) -> None:
        """Lock held. Settle, also what nested calls left; a call nested after `owner = 0` settles by itself."""
        while True:
            s.owner = me
            if s.left or not s.calm:
                s.left = s.calm = False
                self._settle_locked(s)
            s.owner = 0
            if not s.left:
                return

    def _settle_locked(self, s: _State) -> None:
        """Lock held. Derive everything from header, taken and phase; wake whom it concerns; give credit."""
        while s.leavers:
            self._leave_locked(s, s.leavers[0])
            s.leavers.popleft()
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
        if self._unsettled(s):
            self._count_locked(s)
        if s.heights:
            n = len(s.heights)
            s.peak = max(s.peak, *s.heights[:n])
            del s.heights[:n]
        if s.producers and s.phase is _RUNNING:
            self._serve_locked(s)
        if s.resting:
            self._give_turns_locked(s)
        else:
            s.turn = s.taken.charge
        if s.phase is not _RUNNING:
            if s.phase is _SHUTTING_DOWN and s.taken.items == s.inbox[0][0] and s.flight_first < 0:
                s.phase = _STOPPED
            if s.announced is not s.phase:
                self._rouse_locked(s, len(s.resting))
                for parker in chain(s.producers, s.consumers, s.drainers):
                    parker.wake()
                s.announced = s.phase
        for parker in s.drainers:
            if self._delivered(s, parker.target):
                parker.wake()
        if s.consumers:
            self._signal_locked(s)
        self._grant_locked(s)

    def _unsettled(self, s: _State) -> bool:
        """Lock held. Whether there is something to count, or an exception may have left something."""
        header = s.inbox[0]
        return header[3] > 1 or s.mixed or s.storing or bool(header[4]) or bool(s.orphans)

    def _leave(self, s: _State, parker: _Parker | None) -> None:
        """Wait no longer. Callers repeat it when an exception ends it: a parker left behind would get wake-ups."""
        if parker is None or s is not self._state:
            return
        try:
            if not self._nested(s):  # else a coroutine that is collected in a locked section
                self._locked(s, self._leave_locked, parker)
                return
        except MemoryError:  # the next section sees to it
            pass
        s.leavers.append(parker)
        s.left = True

    def _leave_locked(self, s: _State, parker: _Parker) -> None:
        """Lock held. Take parker out of its queue; settling passes on what it was told."""
        for waiting in (s.producers, s.resting, s.consumers, s.drainers):
            if parker in waiting:
                waiting.remove(parker)
        if s.sentinel is parker:
            s.sentinel = None

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
        if sys.is_finalizing():  # only this thread still runs: nobody would end its wait
            return True
        frame: FrameType | None = sys._getframe(1)
        own = True  # still in the frames of this call
        while frame is not None:
            if frame.f_globals is not _GLOBALS:
                own = False
            elif frame.f_code is _HANDLE_CODE:  # the handler may be a method of this module
                own = False
                if frame.f_locals.get("self") is self:
                    return True
            elif not own and (frame.f_code is _LOCKED_CODE or frame.f_locals.get("self") is self):
                return True
            frame = frame.f_back
        return False

    def _deadline(self, timeout: float) -> float:
        return self._clock() + timeout if timeout else 0.0

    # -- Admission ---------------------------------------------------------------------------------------------------

    def _own(self, payload: Any) -> bytes:
        """The payload as exact bytes: itself, or a copy. Runs foreign code (`__buffer__`), so without a lock."""
        if type(payload) is bytes:
            return payload
        try:
            view = memoryview(payload)
        except TypeError:
            raise TypeError(f"payload must be a bytes-like object, not {_show(payload)}") from None
        with view:
            if not view.c_contiguous:
                raise TypeError(f"payload must be C-contiguous, not {_show(payload)}")
            if view.nbytes > self._max_buffered:  # there may be no memory for a copy
                raise self._never(view.nbytes)
            return view.tobytes()

    def _never(self, charge: int) -> Error:
        """Count a refused payload that will never fit, and return why."""
        s = self._state
        if not self._nested(s):
            return self._locked(s, self._refusal_locked, charge)
        s.refused.append(charge)
        s.left = True
        return self._refusal(s, charge, 0)

    def _put(self, data: bytes, deadline: float) -> None:
        """As enqueue, with a deadline (0: do not wait)."""
        self.enqueue(data, timeout=max(0.0, deadline - self._clock()) if deadline else _NO_WAIT)

    def _enqueue(self, s: _State, late: list[bytes], timeout: float | None) -> None:
        """Enqueue by the exact way.

        late: a payload that was appended to s.inbox, perhaps after the credit was withdrawn; empty while its fate is
        that of an entry, or it is refused.
        """
        if s is not self._state:
            late.clear()  # forked by a signal handler: the parent has the payload
        elif self._nested(s):
            data = late[0]
            self._withdraw_nested(s, late)
            self._admit_nested(s, data)
        elif timeout is not None and not timeout:
            self._locked(s, self._late_locked, late, None)
        else:
            self._wait_for_room(s, late, timeout)
        if s.thread is None and self._push is not None:
            self._respawn(s)

    def _abandon(self, s: _State, late: list[bytes], exc: BaseException | None) -> bool:
        """Take out what an interrupted call has appended; tell exc, and return, whether it was accepted before."""
        if late and s is self._state:
            try:
                nested = self._nested(s)
                try:
                    found = self._withdraw_nested(s, late) if nested else self._locked(s, self._abandon_locked, late)
                except RecursionError:
                    if nested:
                        raise
                    found = _with_more_stack(s, self._locked, s, self._abandon_locked, late)
            except BaseException:  # interrupted again: the next count takes it out
                s.orphans.extend(late)
                late.clear()
                raise
            if not found and exc is not None:
                _note_accepted(exc, self)
                return True
        return False

    def _late_locked(self, s: _State, late: list[bytes], waiting: list[_Parker] | None) -> float | None:
        """Lock held. See whether a late payload was accepted; else go on as _admit_locked."""
        data = late[0]
        self._count_locked(s)
        if len(data) <= s.small and not s.producers:
            self._grant_locked(s)
            if len(s.inbox) <= s.places:  # it was counted, or the new credit covers all that is pending
                s.calm = True
                return self._rest_locked(s, waiting)
            self._count_locked(s)
        if not self._withdraw_locked(s, late):
            return None
        if s.small < len(data) <= self._most_small:
            s.small = len(data)
        pause = self._admit_locked(s, data, waiting)
        if pause is None:
            try:  # noqa: SIM105 - suppress needs memory itself
                late.append(data)  # so that _abandon sees that it was counted
            except MemoryError:
                pass
        return pause

    def _rest_locked(self, s: _State, waiting: list[_Parker] | None) -> float | None:
        """Lock held. Let this producer, its payload accepted, rest when the buffer is half full and consumers come."""
        if (
            waiting is None
            or not self._turn
            or s.away
            or 2 * self._held(s) < self._max_buffered
            or self._hasty()
            or self._inside()
        ):
            return None
        try:
            parker = _Parker(self._new_lock())
        except (MemoryError, RuntimeError):  # no lock can be had: the payload is accepted all the same
            return None
        parker.entry = _RESTING
        waiting.append(parker)
        s.resting.append(parker)
        if s.sentinel is not None:
            return _FOREVER
        s.sentinel = parker
        parker.target = s.taken.charge
        return _PATIENCE

    def _hasty(self) -> bool:
        """Whether this thread does not rest: an interrupt would end that, and the payload is accepted already."""
        return self._ident() == threading.main_thread().ident

    def _withdraw_locked(self, s: _State, late: list[bytes]) -> bool:
        """Lock held, after a count. Take a late payload out of the inbox; False: it was counted, and so accepted."""
        place = _place(s.inbox, late[0])
        if place:
            del s.inbox[place]
            del late[:]  # no call in between: an interrupt comes there, and another thread's may be the same object
        return place > 0

    def _withdraw_nested(self, s: _State, late: list[bytes]) -> bool:
        """As _withdraw_locked, in a nested call: the place is kept, or a pending payload could move into the credit."""
        place = _place(s.inbox, late[0])
        if place:
            s.mixed = s.left = True
            s.inbox[place] = None
            del late[:]
        return place > 0

    def _abandon_locked(self, s: _State, late: list[bytes]) -> bool:
        """Lock held. As _withdraw_locked."""
        self._count_locked(s)
        return self._withdraw_locked(s, late)

    def _admit_locked(self, s: _State, data: bytes, waiting: list[_Parker] | None) -> float | None:
        """Lock held. Accept a payload (None), queue for room for it (how long to wait), or raise.

        waiting: None, or where to put the parker that stands in the queue.
        """
        charge = len(data) or 1
        if s.phase is not _RUNNING or charge > self._max_buffered:
            raise self._refusal_locked(s, charge)
        if waiting is None or not s.producers or self._reentered():
            if self._commit_locked(s, (data,), (len(data),), len(data), charge):
                return None
            if waiting is None or self._reentered():
                raise self._refusal_locked(s, charge)
        parker = _Parker(self._new_lock())
        parker.hasty = self._hasty()
        parker.entry = _Entry(data)
        waiting.append(parker)
        s.producers.append(parker)
        return _FOREVER

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

    def _wait_for_room(self, s: _State, late: list[bytes], timeout: float | None) -> None:
        """Enqueue a late payload; stand in the queue until it is accepted, and raise when it is not."""
        waiting: list[_Parker] = []
        try:
            pause = self._locked(s, self._late_locked, late, waiting)
            if pause is None:
                return
            deadline = self._clock() + _timeout(timeout)
            parker = waiting[0]
            while pause is not None:
                # Forked in the section, by a signal handler, it is in a queue that nobody looks at.
                over = s is self._state and parker.park(pause, deadline - self._clock())
                if parker.roused:
                    return
                if s is not self._state:  # forked by a signal handler: the child's queue is another
                    if not parker.entry.accepted:
                        self._put(parker.entry.data, deadline)
                    return
                pause = self._locked(s, self._queue_locked, parker, over)
        except BaseException:
            while waiting:  # once; a for would need memory
                parker = waiting.pop()
                try:
                    self._leave(s, parker)
                except BaseException:
                    self._leave(s, parker)
                    raise
                finally:  # no longer in the queue: whether it was accepted is certain now
                    if parker.entry.accepted:
                        _note_accepted(sys.exc_info()[1], self)  # that of the second interrupt, if there was one
            raise

    def _queue_locked(self, s: _State, parker: _Parker, over: bool) -> float | None:
        """Lock held. None: the parker's payload was accepted; else how long to wait on. Raises when it is refused."""
        self._count_locked(s)
        parker.reset()
        entry = parker.entry
        if over and s.phase is _RUNNING and not entry.accepted:
            self._accept_locked(s, (entry,))
        if entry.accepted and parker is s.sentinel and not over:
            if parker.target != _FOREVER:
                s.away = parker.target == s.taken.charge
                self._rouse_locked(s, len(s.resting) if s.away else 1)
            if not parker.roused:
                parker.target = s.taken.charge
                return _PATIENCE
        if entry.accepted:
            self._leave_locked(s, parker)
            return None
        if over or s.phase is not _RUNNING:
            self._leave_locked(s, parker)  # at once, or whoever makes room next would accept what is refused here
            raise self._refusal_locked(s, entry.charge)
        return _FOREVER

    def _accept_locked(self, s: _State, entries: Sequence[_Entry]) -> bool:
        """Lock held. Accept waiting producers' payloads if they fit, all or none."""
        new = [entry.data for entry in entries]
        sizes = list(map(len, new))
        if self._commit_locked(s, new, sizes, sum(sizes), sum(entry.charge for entry in entries), entries):
            for entry in entries:
                entry.accepted = True  # it was by the commit: the next count says so too
                entry.data = b""
            return True
        return False

    def _commit_locked(
        self,
        s: _State,
        new: Sequence[bytes],
        sizes: Sequence[int],
        size: int,
        charge: int,
        entries: Sequence[_Entry] = (),
    ) -> bool:
        """Lock held, after a count. Accept payloads if all fit (I1): store first, then change the header (I2)."""
        inbox = s.inbox
        while True:
            if self._unsettled(s):
                self._count_locked(s)
            header = inbox[0]
            if header[2] - s.taken.charge + charge > self._max_buffered:
                return False
            pending = inbox[:0:-1]
            if s.mixed:  # a nested call came in since: count it first
                continue
            header = self._store_locked(s, header, new, sizes, size, charge, entries, self._clock())
            try:
                inbox[::-1] = [*pending, header]  # fails if the inbox has grown: then the room may be gone
            except ValueError:
                continue
            try:  # noqa: SIM105 - suppress needs memory itself
                self._stored_locked(s)
            except MemoryError:  # they are accepted; the next count does it again (I2)
                pass
            return True

    def _enqueue_chunk(self, chunk: Sequence[bytes], deadline: float, accepted: list[int]) -> int:
        """Accept as many payloads of a chunk as fit now, in order; return how many, and add them to accepted[0]."""
        s = self._state
        if self._nested(s):
            return 0
        n = self._locked(s, self._enqueue_chunk_locked, chunk, list(map(len, chunk)), deadline > 0, accepted)
        if n and s.thread is None and self._push is not None:
            self._respawn(s)
        return n

    def _enqueue_chunk_locked(
        self, s: _State, chunk: Sequence[bytes], sizes: list[int], wait: bool, accepted: list[int]
    ) -> int:
        """Lock held. As _enqueue_chunk."""
        self._count_locked(s)
        if s.phase is not _RUNNING or (wait and s.producers):
            return 0
        count = accepted[0] + len(chunk)
        while not self._commit_locked(s, chunk, sizes, (size := sum(sizes)), size + sizes.count(0)):
            charges = list(accumulate(size or 1 for size in sizes))
            n = bisect_right(charges, self._max_buffered - self._held(s))
            if not n:
                return 0
            chunk, sizes = chunk[:n], sizes[:n]
            count = accepted[0] + n
        accepted[0] = count  # made before: it may need memory
        return len(chunk)

    def _admit_nested(self, s: _State, data: bytes) -> None:
        """Accept or refuse a payload in a call that interrupted this thread in a locked section.

        Appends an entry, and decides by its place (see Theory). Touches nothing else that the section uses.
        """
        entry = _Entry(data)
        charge = entry.charge
        buffered = 0
        if charge <= self._max_buffered:
            s.places = 0
            s.mixed = s.left = True
            s.inbox.extend([entry, *repeat(None, min((charge - 1) // s.small, _CREDIT_ITEMS))])
            s.left = True  # again, for a section that ended with a deeper call in between
            buffered = self._accepted_before(s, entry)[1] - s.taken.charge
            entry.accepted = s.phase is _RUNNING and buffered + charge <= self._max_buffered
            if entry.accepted:
                s.heights.append(buffered + charge)
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
        items, _, charge, granted = snapshot[0][:4]
        small = s.small
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
            elif item is not None and i < granted and len(item) <= small:
                items += 1
                charge += len(item) or 1
        return items, charge

    # -- Counting and packing ----------------------------------------------------------------------------------------

    def _grant_locked(self, s: _State) -> None:
        """Lock held. Give as much credit as is safe (I3), if a payload need not be told to anybody (I4, I5)."""
        small = s.small
        if s.producers or s.phase is not _RUNNING or (s.thread is None and self._push is not None):
            return
        items, nbytes, charge, _, _, first, begin, born = s.inbox[0]
        if first == items:
            return
        places = min((self._max_buffered - charge + s.taken.charge) // small, self._ahead // min(small, _JOIN_BELOW))
        now = self._clock()
        if self._max_batch is not None:
            near = (begin + self._max_batch - nbytes - 1) // small  # up to the end of the open batch
            if near < places:
                unseen = 0 if _expectant(s) else int(self._pace_locked(s, items, now) * self._unseen)
                places = min(places, max(near, unseen))
        if places > 0:
            places = min(places, _CREDIT_ITEMS)
            s.granted_at = now
            header = (items, nbytes, charge, 1 + places, (), first, begin, born)
            inbox = s.inbox
            while True:
                pending = inbox[:0:-1]
                if s.mixed or len(pending) > places:  # a nested call decides by what it sees; each is covered, or none
                    return
                with contextlib.suppress(ValueError):  # the inbox has grown: look again
                    inbox[::-1] = [*pending, header]
                    break
            s.covers = small  # before the places: who sees these sees at least that credit's size
            s.places = 1 + places

    def _pace_locked(self, s: _State, items: int, now: float) -> float:
        """Lock held. Payloads per second, of late."""
        n, seconds = items - s.pace[0], now - s.pace[1]
        if n >= _PACE_ITEMS or seconds > self._unseen:
            s.pace = (items, now, n / max(seconds, 1e-9) if n >= _PACE_ITEMS else 0.0)
        return s.pace[2]

    def _count_locked(self, s: _State) -> None:
        """Lock held. Withdraw the credit, and move what the inbox accepted into the runs."""
        s.places = 0
        inbox = s.inbox
        # From here on every place granted is taken; a nested call that comes after the look at s.mixed appends behind.
        header = self._narrow_locked(s) if len(inbox) < inbox[0][3] else inbox[0]
        for entry in header[4]:
            entry.accepted = True  # the commit that put it here was its acceptance
        if s.storing:
            self._trim_locked(s, header[0], header[5])
        if s.mixed:
            self._sort_locked(s)
        elif header[3] > 1:
            n = header[3]
            new = inbox[1:n]
            sizes = list(map(len, new))
            nbytes = sum(sizes)
            charge = nbytes if all(new) else nbytes + sizes.count(0)
            if max(sizes) > s.small:
                self._sort_locked(s)  # one of them is pending, not covered by the credit
            else:
                header = self._store_locked(s, header, new, sizes, nbytes, charge, (), s.granted_at)
                inbox[:n] = [header]
                self._stored_locked(s)
        while s.orphans:
            self._withdraw_locked(s, s.orphans[:1])
            del s.orphans[0]

    def _narrow_locked(self, s: _State) -> Any:
        """Lock held. Take back the places that are still empty: nested calls must not take what comes for accepted."""
        inbox = s.inbox
        while True:
            pending = inbox[:0:-1]
            header = inbox[0]
            if len(pending) + 1 >= header[3]:
                return header
            header = (*header[:3], len(pending) + 1, *header[4:])
            with contextlib.suppress(ValueError):  # the inbox has grown: look again
                inbox[::-1] = [*pending, header]
                return header

    def _stored_locked(self, s: _State) -> None:
        """Lock held. The header says so now; nothing has been taken since."""
        s.peak = max(s.peak, self._held(s))
        s.storing = False

    def _sort_locked(self, s: _State) -> None:
        """Lock held. Count an inbox that may hold nested calls' entries, or payloads larger than the credit covers."""
        s.mixed = False  # before the inbox is read: a nested call that comes later sets it again
        try:
            snapshot = s.inbox[:]
            header = snapshot[0]
            granted, small = header[3], s.small
            new: list[bytes] = []
            rest: list[bytes] = []  # pending
            for i in range(1, len(snapshot)):
                item = snapshot[i]
                if isinstance(item, _Entry):
                    if item.accepted:
                        new.append(item.data)
                elif item is not None:
                    (new if i < granted and len(item) <= small else rest).append(item)
            sizes = list(map(len, new))
            nbytes = sum(sizes)
            charge = nbytes + sizes.count(0)
            when = s.granted_at if granted > 1 else self._clock()
            header = self._store_locked(s, header, new, sizes, nbytes, charge, (), when)
            s.inbox[: len(snapshot)] = [header, *rest]
            self._stored_locked(s)
        except BaseException:
            s.mixed = True
            raise

    def _store_locked(
        self,
        s: _State,
        header: Any,
        new: Sequence[bytes],
        sizes: Sequence[int],
        size: int,
        charge: int,
        entries: Sequence[_Entry],
        when: float,
    ) -> Any:
        """Lock held. Append payloads to the runs, and cuts where batches end; return the header that says so.

        size, charge: theirs, together; when: the time at which a batch begins that one of them begins.
        """
        items, nbytes, total, _, _, first, begin, born = header
        s.storing = True
        begins = first == items
        if self._max_batch is None or nbytes + size - begin < self._max_batch:
            if new:
                self._append_locked(s, items, nbytes, new, sizes, size, begins)
        else:
            cuts, first, begin = _split(self._max_batch, items, nbytes, first, begin, sizes)
            a, at = 0, nbytes
            for number, byte in [*cuts, (items + len(new), nbytes + size)]:
                b = number - items
                if b > a:
                    self._append_locked(s, items + a, at, new[a:b], sizes[a:b], byte - at, begins)
                    a, at = b, byte
                begins = True
                if number <= first:
                    s.runs[-1].cut(number)
        if begins:
            born = when
        return (items + len(new), nbytes + size, total + charge, 1, entries, first, begin, born)

    def _append_locked(
        self, s: _State, items: int, nbytes: int, new: Sequence[bytes], sizes: Sequence[int], size: int, begins: bool
    ) -> None:
        """Lock held. Append payloads of one batch to the runs, behind `items` payloads of `nbytes` bytes.

        size: theirs, together; begins: they begin the batch.
        """
        small = size < _JOIN_BELOW * len(new)
        if small and size > 2 * _RUN_BYTES:  # large blocks of memory cost more than they save
            half = len(new) // 2
            part = sum(sizes[:half])
            self._append_locked(s, items, nbytes, new[:half], sizes[:half], part, begins)
            self._append_locked(s, items + half, nbytes + part, new[half:], sizes[half:], size - part, False)
            return
        run = s.runs[-1] if s.runs else None
        if (
            run is None
            or len(run.sizes) >= (_LEAST_ITEMS if begins else _RUN_ITEMS)
            or nbytes - run.begin >= (_LEAST_BYTES if begins else _RUN_BYTES)
            or size >= _UINT
        ):
            if run is not None and nbytes - run.begin < _JOIN_BELOW * len(run.parts):
                run.join()
            run = _Run(items, nbytes, "I" if size < _UINT else "Q")
            s.runs.append(run)
        if small and len(new) > 1:
            run.parts.append(b"".join(new))
        else:
            run.parts += new
        run.sizes.extend(array(run.sizes.typecode, sizes))

    def _trim_locked(self, s: _State, items: int, first: int) -> None:
        """Lock held. Cut off what a commit that did not happen left in the runs (I2)."""
        while s.runs and s.runs[-1].start >= items:
            s.runs.pop()
        if s.runs:
            run = s.runs[-1]
            n = items - run.start
            if n < len(run.sizes) or len(run.parts) > 1:
                run.parts = [run.join()[: sum(run.sizes[:n])]]
                del run.sizes[n:]
            while run.cuts and run.start + run.cuts[-1] > first:
                run.cuts.pop()
        self._stored_locked(s)

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
                    if push:  # or a greenlet that the fork copied: the child has a handler of its own
                        raise Stopped("forked")
                    s, parker = self._state, None
                batch, delay = self._poll(s, parker, push)
                if batch is not None and s is self._state:  # else forked, by a signal handler: it is the parent's
                    parker = None  # it has left the queue with the batch
                    return batch
                if over:
                    raise queue.Empty
                if parker is None:
                    parker = _Parker(self._new_lock())
                elif s is self._state:  # else forked in the section: nobody would wake it
                    over = parker.park(delay, deadline - self._clock())
        finally:
            try:
                self._leave(s, parker)
            except BaseException:
                self._leave(s, parker)
                raise

    def _poll(self, s: _State, parker: _Parker | None, push: bool) -> tuple[Batch | None, float]:
        """As _poll_locked; a batch that was taken is returned also when memory was lacking after that."""
        held: list[Batch | None] = [None]
        try:
            return self._locked(s, self._poll_locked, parker, push, held)
        except MemoryError:
            if held[0] is None:
                raise
            self._leave(s, parker)
            return held[0], 0.0  # only others were not told

    def _poll_locked(
        self, s: _State, parker: _Parker | None, push: bool, held: list[Batch | None]
    ) -> tuple[Batch | None, float]:
        """Lock held. Take a batch if one is due; else stand in the queue, and say how long to wait (the timer)."""
        self._count_locked(s)
        batch = self._take_locked(s, push, held)
        if batch is None and s.producers and s.phase is _RUNNING:  # nothing else will make room
            self._serve_locked(s)
            batch = self._take_locked(s, push, held)
        if batch is not None:
            if parker is not None:
                self._leave_locked(s, parker)
            return batch, 0.0
        if s.phase is not _RUNNING:
            raise Stopped("the dispatcher is stopped")
        self._rouse_locked(s, 1)  # there is less than a batch: whoever is at work could do with help
        delay = _FOREVER
        if parker is not None:
            parker.reset()
            if parker not in s.consumers:
                s.consumers.append(parker)
            items, _, _, _, _, first, _, born = s.inbox[0]
            parker.armed = first < items and parker in _timers(s)
            if parker.armed:
                delay = max(0.0, born + self._interval - self._clock())
        return None, delay

    def _take_locked(
        self,
        s: _State,
        push: bool,
        held: list[Batch | None] | None = None,
        discard: list[tuple[int, Batch]] | None = None,
    ) -> Batch | None:
        """Lock held, after a count. Build the front batch if it is closed or due, and release its bytes.

        held: where to put it as well, for a caller that an exception keeps from getting it.
        """
        items, _, _, _, _, first, _, born = s.inbox[0]
        t = s.taken
        if t.items == first:
            if first == items or (s.phase is _RUNNING and self._clock() < born + self._interval):
                return None
            self._close_batch_locked(s)
        batch = self._build_locked(s, _first_cut(s.runs, t.items))
        n, nbytes = len(batch), batch.nbytes
        charge = nbytes
        if self._held(s) != s.inbox[0][1] - t.nbytes:  # there are empty payloads
            charge += batch._sizes.count(0)
        after = t.items + n
        taken = (after, t.nbytes + nbytes, t.charge + charge)
        if push:
            now = _Taken(*taken, n, charge, *t[5:9], t.batches + 1)
            s.flight = batch
            s.flight_first = t.items
        elif discard is not None:
            now = _Taken(*taken, *t[3:5], t.discarded_items + n, t.discarded_charge + charge, *t[7:])
            discard.append((t.items, batch))
        else:
            now = _Taken(*taken, *t[3:9], t.batches + 1)
        s.taken = now  # from the discard or flight on, nothing could fail
        if held is not None:
            held[0] = batch
        while s.runs and s.runs[0].start + len(s.runs[0].sizes) <= after:
            s.runs.popleft()
        s.away = False
        sizes = batch._sizes[-_SAMPLE:]
        s.small = min(max(sizes) or 1, max(self._most_small, _RARE * sum(sizes) // len(sizes)))
        return batch

    def _build_locked(self, s: _State, stop: int) -> Batch:
        """Lock held. The batch from the front up to payload `stop`."""
        t = s.taken
        parts: list[bytes | memoryview] = []
        sizes: array[int] | None = None
        for run in s.runs:
            if run.start >= stop:
                break
            a, b = max(0, t.items - run.start), min(len(run.sizes), stop - run.start)
            if a >= b:  # taken before, and not yet dropped
                continue
            more = run.sizes[a:b]
            if b - a == len(run.sizes):
                parts += run.parts
            else:
                offset = max(0, t.nbytes - run.begin)
                parts.append(memoryview(run.join())[offset : offset + sum(more)])
            if sizes is None:
                sizes = more
            elif sizes.typecode == more.typecode:
                sizes += more
            else:
                sizes = array("Q", chain(sizes, more))
        assert sizes is not None, "I2"
        data = parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)
        return Batch(data, sizes)

    def _serve_locked(self, s: _State) -> None:
        """Lock held. Accept payloads of waiting producers that fit, first come first served; they rest then."""
        while s.producers:
            parker = s.producers[0]
            if parker.entry.accepted:
                if parker.hasty or not self._turn:
                    parker.roused = True
                    parker.wake()
                elif not s.resting or s.resting[-1] is not parker:  # else an exception came before it left the queue
                    s.resting.append(parker)
                s.producers.popleft()
                continue
            charges = accumulate((parker.entry.charge for parker in s.producers), initial=self._held(s))
            n = sum(1 for _ in takewhile(self._max_buffered.__ge__, charges)) - 1
            if not n or not self._accept_locked(s, [parker.entry for parker in islice(s.producers, n)]):
                return

    def _give_turns_locked(self, s: _State) -> None:
        """Lock held. Rouse a resting producer for every turn's worth of room that consumers have made."""
        turns = (s.taken.charge - s.turn) // self._turn
        if turns:
            s.turn += turns * self._turn
            self._rouse_locked(s, turns)
        while s.resting and s.resting[0].roused:  # an exception came before it left the queue
            self._rouse_locked(s, 1)
        if s.resting and s.sentinel is None:
            s.resting[-1].wake()
            s.sentinel = s.resting[-1]

    def _rouse_locked(self, s: _State, n: int) -> None:
        """Lock held. Let the first n resting producers go on."""
        while n > 0 and s.resting:
            parker = s.resting[0]
            parker.roused = True
            parker.wake()
            if parker is s.sentinel:
                s.sentinel = None
            s.resting.popleft()
            n -= 1

    def _signal_locked(self, s: _State) -> None:
        """Lock held. Wake a consumer if it has something to do: a batch to take, or a timer to set."""
        if s.taken.items < s.inbox[0][0]:
            due = s.taken.items < s.inbox[0][5]
            for parker in _timers(s):
                if due or not parker.armed:
                    parker.wake()

    # -- Push --------------------------------------------------------------------------------------------------------

    def _spawn(self, s: _State, push: tuple[_Handler, _OnError | None, float] | None = None) -> None:
        """Start the handler's thread; push: for the first time."""
        self._ident()  # first: it may look up anew what makes threads
        thread = self._new_thread(target=self._consume, name=f"tempo-{id(self):x}", daemon=True)
        try:
            if self._locked(s, self._adopt_locked, thread, push):
                thread.start()
        except BaseException:
            if not thread.is_alive():  # else it has started, and the exception is another's
                self._locked(s, self._disinherit_locked, thread, push)
            raise

    def _respawn(self, s: _State) -> None:
        """In a forked child, at its first enqueue: the handler's thread again. The payload is accepted either way."""
        with contextlib.suppress(RuntimeError):  # no thread can be started: the next enqueue tries, or the exit drains
            self._spawn(s)

    def _adopt_locked(
        self, s: _State, thread: threading.Thread, push: tuple[_Handler, _OnError | None, float] | None
    ) -> bool:
        """Lock held. Make thread the handler's; False: there is one."""
        if push is not None:
            if s.phase is not _RUNNING:
                raise self._refusal(s, 0, 0)
            if self._push is not None:
                raise RuntimeError("start was called before")
            self._push = push
        if s.thread is not None:
            return False
        s.thread = thread
        return True

    def _disinherit_locked(
        self, s: _State, thread: threading.Thread, push: tuple[_Handler, _OnError | None, float] | None
    ) -> None:
        """Lock held. Undo _adopt_locked, as far as it came."""
        if push is not None and self._push is push:
            self._push = None
        if s.thread is thread:
            s.thread = None

    def _consume(self, until: float | None = None) -> None:
        """Call the handler for each batch until the dispatcher stops (or until a time, at exit)."""
        s, push = self._state, self._push
        if push is None or (until is None and s.thread is not threading.current_thread()):
            return  # start has raised, and been undone
        handler, on_error, _ = push
        while s is self._state:  # else the handler has forked, and this is the child
            if until is not None and self._clock() >= until:
                return
            try:
                held = [self._next(_FOREVER if until is None else until, True)]
            except (Stopped, queue.Empty):
                return
            except Exception as exc:  # MemoryError: the thread must go on
                flight = s.flight if s.taken.flight_items else None
                if flight is None:  # the batch is still there
                    self._pause(exc)
                    continue
                held = [flight]  # taken; only others were not told
                del flight
            s.flight = None
            failed = self._handle(handler, on_error, held)
            while s is self._state:
                try:
                    self._locked(s, self._landed_locked, failed)
                    break
                except Exception as exc:  # MemoryError
                    self._pause(exc)

    def _handle(self, handler: _Handler, on_error: _OnError | None, held: list[Batch]) -> bool:
        """Call the handler with the batch that is held; return whether it raised.

        Only this frame has the batch in a local: before CPython 3.13, _reentered makes a frame keep what its locals
        were, and that of _consume would keep the batch while it waits for the next one.
        """
        batch = held.pop()
        try:
            handler(batch)
        except BaseException as exc:  # SystemExit too: a handler never ends the thread
            self._report(exc, batch, on_error)
            return True
        return False

    def _pause(self, exc: Exception) -> None:
        """Tell of an exception that should pass, and wait a little."""
        self._report(exc, None, None)
        time.sleep(min(self._interval, 1.0))

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
        self._count_locked(s)
        self._close_batch_locked(s)
        items: int = s.inbox[0][0]
        return items

    def _close_batch_locked(self, s: _State) -> None:
        """Lock held, after a count. Close the open batch, if there is one: the cut first, then the header (I4)."""
        items, nbytes, charge, granted, entries, first, _, born = s.inbox[0]
        if first < items:
            s.storing = True
            s.runs[-1].cut(items)
            s.inbox[0] = (items, nbytes, charge, granted, entries, items, nbytes, born)
            s.storing = False

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
                elif s is self._state:  # else forked in the section: nobody would wake it
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
        self._count_locked(s)
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
        self._count_locked(s)  # first: with the credit gone, a nested call goes by the phase
        if s.phase is _RUNNING:
            s.phase = _SHUTTING_DOWN
        return s.phase is _STOPPED

    def _give_up_locked(self, s: _State) -> bool:
        """Lock held. shutdown was not told that all is delivered: stop, unless it is; return whether."""
        if s.halted:
            raise Stopped("stopped while it was shutting down")
        if s.phase is _STOPPED:
            return False
        self._stop_locked(s)
        return True

    def _stop_locked(self, s: _State) -> None:
        """Lock held. Stop, and take out what was not delivered; made to be called again when an exception ended it."""
        self._count_locked(s)  # first: with the credit gone, a nested call goes by the phase
        if s.phase is not _STOPPED:
            s.phase = _STOPPED
            s.halted = True
        self._count_locked(s)  # again: a nested call may have come before it saw the phase
        try:
            batches = s.undelivered[0]
        except IndexError:  # none yet, or just claimed, without the lock: then nothing is left to take
            batches = []
            s.undelivered.append(batches)
        while batches and batches[-1][0] >= s.taken.items:
            batches.pop()
        while self._take_locked(s, False, discard=batches) is not None:
            pass

    # -- Looking at it -----------------------------------------------------------------------------------------------

    def _stats_locked(self, s: _State) -> Stats:
        """Lock held. As stats."""
        self._count_locked(s)
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
            peak_buffered_bytes=max(s.peak, charge - t.charge, *list(s.heights)),
            waiting_producers=len(s.producers),
            waiting_consumers=len(s.consumers),
            state=s.phase,
        )

    def _check(self) -> None:
        """Assert every invariant; for tests."""
        self._locked(self._state, self._check_locked)

    def _check_locked(self, s: _State) -> None:
        """Lock held. As _check."""
        items, nbytes, charge, granted, _, first, begin, _ = s.inbox[0]
        t = s.taken
        if s.places:
            assert (s.places, s.covers) == (granted, s.small), "I3"
            covered = (granted - 1) * s.small
            assert covered <= self._max_buffered - charge + t.charge, "I3"
            if _expectant(s) and self._max_batch is not None:
                assert covered < self._max_batch - nbytes + begin, "I5"
            assert first < items, "I4"
            assert not s.producers and s.phase is _RUNNING, "I5"
        self._count_locked(s)
        items, nbytes, charge, _, _, first, begin, _ = s.inbox[0]
        assert 0 <= charge - t.charge <= s.peak <= self._max_buffered, "I1"
        at, byte, stops = (s.runs[0].start, s.runs[0].begin, [first]) if s.runs else (items, nbytes, [first])
        assert at <= t.items, "I2"
        for run in s.runs:
            assert (run.start, run.begin) == (at, byte), "I2"
            at += len(run.sizes)
            byte += sum(run.sizes)
            assert sum(map(len, run.parts)) == sum(run.sizes), "I2"
            stops += [run.start + cut for cut in run.cuts or ()]
        assert (at, byte) == (items, nbytes), "I2"
        assert t.items <= first <= items and t.nbytes <= begin <= nbytes, "I4"
        assert max(stops) <= items and (t.items == first or first in stops[1:]), "I4"
        if self._max_batch is not None and first < items:
            assert nbytes - begin < self._max_batch, "I4"
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


def _expectant(s: _State) -> bool:
    """Whether a waiting consumer must be told when a batch closes: it has not been woken already."""
    return any(not parker.woken for parker in _timers(s))


def _claim(s: _State, into: Callable[[list[Batch]], _T]) -> _T:
    """Without the lock, when the section that took them has ended: the batches that stop returns, to one caller."""
    try:
        batches = s.undelivered[0]
        mine = into([batch for _, batch in batches])  # first: without memory for it they stay for the next caller
        if s.undelivered.pop() is batches:
            return mine
    except IndexError:
        pass
    return into([])  # another has them


def _first_cut(runs: Iterable[_Run], front: int) -> int:
    """Number of the payload before which the first batch behind `front` ends."""
    for run in runs:
        if run.cuts is not None:
            k = bisect_right(run.cuts, front - run.start)
            if k < len(run.cuts):
                return run.start + run.cuts[k]
    raise AssertionError("I4: a closed batch has an end")  # pragma: no cover


def _split(
    limit: int, items: int, nbytes: int, first: int, begin: int, sizes: Sequence[int]
) -> tuple[list[tuple[int, int]], int, int]:
    """Where batches end when payloads of these sizes are added to `items` of `nbytes`.

    The open batch starts at payload `first`, byte `begin`. Returns the numbers of the payloads before which batches
    end, each with its byte, and where the open batch starts then. Looks closer only where a batch ends.
    """
    cuts: list[tuple[int, int]] = []
    for k in range(0, len(sizes), _STRIDE):
        piece = sizes[k : k + _STRIDE]
        end = nbytes + sum(piece)
        if end - begin >= limit:
            ends = list(accumulate(piece, initial=nbytes))
            j = 1
            while (j := bisect_left(ends, begin + limit, j)) < len(ends):
                if ends[j] != begin + limit and first != items + k + j - 1:
                    j -= 1  # neither full to the byte, nor too large and alone: it ends before this one
                first, begin = items + k + j, ends[j]
                cuts.append((first, begin))
                j += 1
        nbytes = end
    return cuts, first, begin


def _place(inbox: list[Any], data: bytes) -> int:
    """Where a pending payload is; 0: nowhere. From behind: what a nested call appended, the section has not seen."""
    for i in range(len(inbox) - 1, 0, -1):
        if inbox[i] is data:
            return i
    return 0


def _with_more_stack(s: _State, work: Callable[..., _T], *args: Any) -> _T:
    """Call work(*args) for a caller who has used up the stack. The limit is everybody's: one thread at a time."""
    with s.lock:
        limit = sys.getrecursionlimit()
        _one_frame()  # or the limit could not be put back: it is not set below the frames there are
        sys.setrecursionlimit(limit + 100)
        try:
            return work(*args)
        finally:
            sys.setrecursionlimit(limit)


def _one_frame() -> None:
    """Raise RecursionError when the stack has no room for one more."""


def _note_accepted(exc: Any, dispatcher: Dispatcher) -> None:
    """Tell enqueue_many that the payload was accepted, though the call ended by an exception."""
    with contextlib.suppress(Exception):  # foreign exceptions may have slots
        exc._accepted_by = dispatcher


def _show(value: object, kind: bool = True) -> str:
    """A value for an error message, cut to a line's length; kind: with the name of its type."""
    try:
        text = f"{type(value).__name__}: {value!r}" if kind else repr(value)
    except Exception:  # a repr may do anything, and that of an int refuses more than 4,300 digits
        return type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {_show(value)}")
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0 seconds, not {_show(value, False)}")
    return float(value) if value <= threading.TIMEOUT_MAX else _FOREVER


def _fine(timeout: Any) -> bool:
    """Whether a timeout is one; raise when it is not."""
    return (type(timeout) is float and timeout >= 0) or _timeout(timeout) >= 0


def _timeout(value: Any) -> float:
    return _FOREVER if value is None else _seconds("timeout", value)


def _byte_limit(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {_show(value)}")
    if value <= 0:
        raise ValueError(f"{name} must be > 0 bytes, not {_show(value, False)}")
    return value


# One hook each for fork and exit; the set keeps no dispatcher alive.
_GLOBALS = globals()
_LOCKED_CODE = Dispatcher._locked.__code__
_HANDLE_CODE = Dispatcher._handle.__code__
_DISPATCHERS: weakref.WeakSet[Dispatcher] = weakref.WeakSet()
# The lock of all dispatchers, by what made it, and its type: either may be monkey-patched meanwhile.
_LOCKS: dict[Any, Any] = {}
# By thread: of each fork under way, one in another's hooks last, the locks that it has taken.
_FORKS: dict[int, list[list[Any]]] = {}


def _dispatchers() -> list[Dispatcher]:
    while True:
        try:
            return list(_DISPATCHERS)
        except RuntimeError:  # another thread made one meanwhile
            continue


def _first_ident(reference: weakref.ref[Dispatcher]) -> int:
    """As a dispatcher's _ident, at its first call in a forked child: what was monkey-patched since is looked up anew.

    gunicorn's gevent workers are patched after the fork. There a lock made by what was known before would stop all
    greenlets, among them the one that is to release it.
    """
    d = reference()
    if d is not None:
        s = d._state
        d._resolve()
        s.lock = d._shared_lock()
        if s is d._state:  # else a signal handler has forked: the child's next call looks again
            d._ident = threading.get_ident
    return threading.get_ident()


def _before_fork() -> None:
    """Where a signal handler forks in a wait for the lock, get it first: that wait must end in the child too.

    There RLock cannot be freed of a thread that has just got it and not yet the GIL: it says that nobody holds it.
    """
    taken = []
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _LOCKED_CODE:
        frame = frame.f_back
    if frame is not None and not sys.is_finalizing():
        for lock in list(_LOCKS.values()):
            if lock.acquire(True, _FORK_PATIENCE):  # its holder may wait for what another hook has taken
                taken.append(lock)
    _FORKS.setdefault(threading.get_ident(), []).append(taken)


def _after_fork() -> None:
    """Give back what _before_fork has taken."""
    me = threading.get_ident()
    forks = _FORKS.get(me)
    if forks:
        for lock in forks.pop():
            lock.release()
        if not forks:
            del _FORKS[me]


def _after_fork_in_child() -> None:
    """Give every dispatcher a fresh, empty state; what was accepted is the parent's."""
    _after_fork()
    for lock in list(_LOCKS.values()):  # a signal handler may have forked in a wait for one whose holder is not here
        with contextlib.suppress(AttributeError):  # a patched one may have other names
            if not lock._is_owned():
                try:
                    lock._release_save()
                except RuntimeError:  # nobody holds it; or, from 3.14 on, none but its holder can release it so
                    lock._at_fork_reinit()
    _LOCKS.clear()
    for d in _dispatchers():
        old = d._state
        d._renew()
        d._ident = partial(_first_ident, weakref.ref(d))
        old.places = 0
        for parker in chain(old.producers, old.resting, old.consumers, old.drainers):
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
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
