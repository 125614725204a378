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
from itertools import accumulate, chain, islice, repeat
from operator import countOf, eq, sub
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, TypeVar, overload

if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import Final

    from typing_extensions import Buffer

    _Timeout = Optional[float]
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

_NO_WAIT: Final = 0.0  # the default timeout; the fast path knows it by identity
_CREDIT_FLOOR: Final = 64 * KiB  # buffers below this get no credit: every admission is counted under the lock
_RUN_ITEMS: Final = 512  # payloads a run holds before the next one is begun
_RUN_BYTES: Final = 64 * KiB  # bytes a run holds before the next one is begun
_PIECE: Final = 256  # payloads stored in a run at a time
_PACK_BELOW: Final = 512  # bytes; smaller payloads are packed ahead, because an object each costs too much
_SPAN: Final = 1 << 31  # bytes after which runs count from a new origin, so that ends fit 32 bits
_PATIENCE: Final = 0.01  # seconds the first waiting producer trusts a consumer to come back
_RECHECK: Final = 0.5  # seconds after which a wait for the drain sees whether a signal handler has forked
_CREDIT_ITEMS: Final = 1024  # payloads accepted unseen at most; each costs about 42 bytes until it is packed
_CHUNK: Final = 512  # payloads that enqueue_many admits at a time
_FOREVER: Final = float("inf")

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
# Header.  inbox[0] is a tuple (items, nbytes, charge, granted, entry): everything counted since the beginning, and up
# to which index the inbox is accepted unseen.  Header and payloads are one list, changed by single C-level list
# operations (append, slice assignment), so whoever reads `inbox[:]`, at any bytecode of any other call, sees exactly
# what is accepted:
#
#   I1  0 <= buffered_bytes <= max_buffered_bytes, where buffered_bytes = charge - taken.charge + the accepted part of
#       the inbox: payloads at an index < granted, and entries whose `accepted` is True.
#   I2  Runs hold the payloads [taken.items, items) in order.  A commit stores in the runs first and changes the header
#       last; what a commit that was cut short left in the runs beyond `items` is cut off by the next count.
#   I3  gate is 0 or header.granted.  Credit is given only as granted = 1 + room // small, so granted - 1 payloads of at
#       most `small` bytes fit whatever happens.  Nobody but the lock's holder takes items out of the inbox, so an
#       index in it only ever decreases.
#   I4  s.open is where the open batch starts, s.born when its first payload was accepted at the earliest; what is
#       before s.open is in closed batches.  Credit is only given while the open batch has a payload: the first payload
#       of a batch takes the lock, notes the time, and tells a waiting consumer, which is the timer.
#   I5  While consumers wait, credit stays below what would close the open batch; while producers wait, there is none.
#   I6  accepted == delivered + in_flight + buffered + discarded, items and bytes; s.taken is one tuple, stored at once.
#
# Enqueue without the lock.  (1) size <= small and len(inbox) < gate; (2) append; (3) len(inbox) <= gate: accepted.
# A thread stopped between (1) and (2) may append when the credit is long withdrawn.  (3) finds out: it reads the length
# first and the gate second, and by I3 the payload's index is below that length, so if the gate is at least that length
# now, the index is below `granted` now.  Otherwise the payload is pending: not accepted, and nobody but its owner
# touches it.  The owner takes the lock; a payload of its that is still in the inbox at an index >= granted was not
# accepted: it takes it out and goes the exact way.  (Two threads that enqueue the very same object may swap outcomes.)
# What must be atomic: list.append, len(list), list slices read and assigned, attribute loads and stores: under the GIL,
# and sequentially consistent in a build without it.
#
# Nested calls.  The lock is an RLock; `s.owner` names the thread inside a locked section.  A signal handler or
# finalizer that interrupts its own thread there must not touch what is half done.  It only appends an entry to the
# inbox, and decides by walking header and inbox in order: that is exact (I1), and calls nested deeper come to the same
# result.  The holder's commit is a compare-and-set on the inbox's length (assignment to inbox[::-1] fails if it has
# grown), so a decision never rests on a room that a nested call has taken.  An entry takes as many places as its size
# could need, so that a credit computed before it came is still safe.  The holder counts it on its way out (`s.left`).
#
# Waiting.  Producers in s.producers, first come first served: whoever makes room accepts their payloads for them.  With
# a large buffer that is done when it has drained to half, so that threads are woken seldom; until then the first of
# them looks for itself every _PATIENCE.  Consumers in s.consumers: the first is the timer (armed), and is woken when
# the open batch gets its first payload, or a batch can be taken; who takes one and leaves more behind wakes the next.
# Each waits on a lock of its own used as a binary semaphore, because a threading.Condition loses a wake-up that comes
# from its own thread, a signal handler's, between its test and its wait.  flush and shutdown, which no nested call
# completes, wait on the Condition s.drained; whoever delivers or stops notifies it.
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
    _data: memoryview
    _ends: array[int]  # where each payload ends, counted from _base; 4 bytes a payload
    _base: int

    def __init__(self, data: bytes, ends: array[int], base: int) -> None:
        set_slot = object.__setattr__
        set_slot(self, "_data", memoryview(data))
        set_slot(self, "_ends", ends)
        set_slot(self, "_base", base)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Batch is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Batch is immutable: cannot delete {name!r}")

    @property
    def data(self) -> memoryview:
        """All payloads back to back: one read-only contiguous memoryview of `nbytes` bytes, no copy."""
        return self._data

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads together."""
        return self._data.nbytes

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
        return self._data[(self._ends[i - 1] - base if i else 0) : self._ends[i] - base]

    def _slices(self) -> Iterator[slice]:
        """Where each payload is in `data`, at C speed."""
        ends: Sequence[int] = self._ends
        if self._base:
            ends = list(map(sub, ends, repeat(self._base)))
        return map(slice, chain((0,), ends), ends)

    def __iter__(self) -> Iterator[memoryview]:
        return map(self._data.__getitem__, self._slices())

    def tolist(self) -> list[bytes]:
        """Return the payloads as a list of bytes objects, copied at C speed; the list is the caller's."""
        data: bytes = self._data.obj  # type: ignore[assignment]
        return list(map(data.__getitem__, self._slices()))

    def __reduce__(self) -> tuple[object, ...]:
        return Batch, (bytes(self._data), self._ends, self._base)

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

    __slots__ = ("base", "body", "ends", "offset", "origin", "start")

    def __init__(self, start: int, origin: int, base: int, typecode: str) -> None:
        self.start = start  # number of its first payload
        self.origin = origin  # byte from which base and ends are counted
        self.base = base  # where its first payload starts
        self.ends = array(typecode)  # where each payload ends
        self.body: list[bytes] | bytes = []
        self.offset = 0  # where a packed body starts (later than base if some of the run was taken before)

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


class _Parker:
    """One waiting thread. `wake` may come early, or twice: it is kept, once."""

    __slots__ = ("_ready", "armed", "woken")

    def __init__(self, lock: Any) -> None:
        lock.acquire()
        self._ready = lock
        self.woken = False  # guarded by the dispatcher's lock, as is armed
        self.armed = False  # a consumer: has a timer for the open batch; a producer: looks for itself

    def park(self, timeout: float) -> None:
        """Wait for `wake`, at most timeout seconds; without the dispatcher's lock."""
        self._ready.acquire(True, timeout if timeout < threading.TIMEOUT_MAX else -1)

    def wake(self) -> None:
        if not self.woken:
            self.woken = True
            self._ready.release()

    def reset(self) -> None:
        if self.woken:
            self._ready.acquire(False)
            self.woken = False


class _Entry(_Parker):
    """A payload whose fate is decided by its place in the inbox: a nested call's, or a waiting producer's."""

    __slots__ = ("accepted", "charge", "data")

    def __init__(self, data: bytes, charge: int, lock: Any) -> None:
        super().__init__(lock)
        self.data = data
        self.charge = charge
        self.accepted: bool | None = None


class _AsyncParker(_Parker):
    """One waiting coroutine, woken through its event loop, after the lock is released."""

    __slots__ = ("_loop", "_outbox", "future")

    def __init__(self, lock: Any, loop: Any, outbox: deque[Callable[[], object]]) -> None:
        super().__init__(lock)
        self._loop = loop
        self._outbox = outbox
        self.future = loop.create_future()

    def wake(self) -> None:
        if not self.woken:
            self.woken = True
            self._outbox.append(self._post)

    def reset(self) -> None:
        self.woken = False
        self.future = self._loop.create_future()

    def _post(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its tasks are gone with it
            self._loop.call_soon_threadsafe(self.fire)

    def fire(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class _State:
    """Everything that a fork replaces."""

    __slots__ = (  # noqa: RUF023 - in the order of __init__
        "inbox", "gate", "owner", "mixed", "left", "requests", "nested_rejects", "outbox", "phase",
        "lock", "drained", "runs", "storing", "taken", "open", "born", "granted_at", "cuts", "flight_first", "rejected",
        "peak", "producers", "consumers", "owed", "halted", "thread",
    )  # fmt: skip

    def __init__(self, rlock: Any, condition: Any) -> None:
        # Touched without the lock; why that is safe is told in Theory.
        self.inbox: list[Any] = [(0, 0, 0, 1, None)]
        self.gate = 0  # an inbox shorter than this takes small payloads without the lock; set under it
        self.owner = 0  # identity of the thread in a locked section; only that thread compares equal
        self.mixed = False  # the inbox may hold entries
        self.left = False  # a nested call left something to the lock's holder
        self.requests: set[str] = set()  # what nested calls asked for: "flush", "shutdown"
        self.nested_rejects: list[int] = []  # charges refused to nested calls
        self.outbox: deque[Callable[[], object]] = deque()  # wake-ups of coroutines, made after the lock is released
        self.phase = _RUNNING  # changed under the lock

        # Guarded by the lock.
        self.lock = rlock
        self.drained = condition  # flush and shutdown wait here; who delivers, discards or stops notifies
        self.runs: deque[_Run] = deque()
        self.storing = False  # the runs may hold more than the header says (I2)
        self.taken = _Taken()
        self.open = (0, 0)  # first payload of the open batch, and the byte at which it starts
        self.born = 0.0  # when the open batch's first payload was accepted, at the earliest
        self.granted_at = 0.0  # when the credit was given
        self.cuts: deque[int] = deque()  # payload numbers at which flush closed a batch
        self.flight_first = -1  # number of the first payload that the handler has, or -1
        self.rejected = (0, 0)
        self.peak = 0
        self.producers: deque[_Entry] = deque()
        self.consumers: deque[_Parker] = deque()
        self.owed = False  # there may be room that waiting producers were not told of
        self.halted = False  # stopped before it was drained
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
        self.thread = d._ident()
        d._local.body = weakref.ref(self)
        return batch


class _AsyncBatches:
    """Asynchronous iterator over a dispatcher's batches."""

    __slots__ = ("_dispatcher",)

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def __aiter__(self) -> _AsyncBatches:
        return self

    async def __anext__(self) -> Batch:
        import asyncio  # noqa: PLC0415 - tempo must be light to import, and a caller has it loaded already

        d = self._dispatcher
        loop = asyncio.get_running_loop()
        parker: _AsyncParker | None = None
        s = d._state
        try:
            while True:
                s = d._state
                if parker is None or parker._outbox is not s.outbox:
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
            raise StopAsyncIteration from None
        finally:
            if parker is not None and s is d._state:
                d._locked(s, d._leave_locked, parker)


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
        "_new_state", "_new_thread", "_push", "_small", "_state",
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
        self._clock = time.monotonic
        self._ident = threading.get_ident
        self._new_lock = threading.Lock
        self._new_thread = threading.Thread
        self._local = threading.local()
        rlock, condition = threading.RLock, threading.Condition

        def new_state() -> _State:
            lock = rlock()
            return _State(lock, condition(lock))

        self._new_state = new_state

        self._push: tuple[_Handler, _OnError | None, float] | None = None  # set once, under the lock
        self._state = new_state()  # replaced in a forked child, by its only thread
        _DISPATCHERS.add(self)

    # -- Producers ---------------------------------------------------------------------------------------------------

    def enqueue(self, payload: Buffer, *, timeout: _Timeout = _NO_WAIT) -> None:
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
            (timeout is None or timeout is _NO_WAIT)
            and type(payload) is bytes
            and 0 < len(payload) <= self._small
            and len(inbox) < s.gate
        ):
            inbox.append(payload)
            if len(inbox) <= s.gate:  # in this order (I3)
                return
            late = True
        self._enqueue(s, payload, timeout, late)

    def enqueue_many(self, payloads: Iterable[Buffer], *, timeout: _Timeout = _NO_WAIT) -> int:
        """Accept payloads in order, as `enqueue` would, at a fraction of the cost; return how many.

        One deadline for all. The iterable is read 512 payloads at a time, without a lock held.

        Raises:
            What `enqueue` raises, and what the iterable raises; the exception's `.accepted` says how many of the
            payloads were accepted before, so that the caller can route the rest.
        """
        accepted = 0
        try:
            deadline = self._deadline(_timeout(timeout))
            source = iter(payloads)
            error: BaseException | None = None
            while error is None:
                chunk: list[Any] = []
                try:
                    chunk.extend(islice(source, _CHUNK))
                except BaseException as exc:  # what came before it is kept, and offered before it is raised
                    error = exc
                if not chunk:
                    break
                if countOf(map(type, chunk), bytes) != len(chunk):
                    for i, payload in enumerate(chunk):
                        try:
                            chunk[i] = _own(payload)
                        except BaseException as exc:
                            error = exc
                            del chunk[i:]
                            break
                done = 0
                while done < len(chunk):
                    n = self._enqueue_chunk(chunk[done:] if done else chunk, deadline)
                    done += n
                    accepted += n
                    if done < len(chunk):  # no room for this one: wait for it, or be refused, as any other
                        self._admit(chunk[done], deadline)
                        done += 1
                        accepted += 1
            if error is not None:
                raise error
        except BaseException as exc:
            with contextlib.suppress(Exception):  # foreign exceptions may have slots
                exc.accepted = accepted  # type: ignore[attr-defined]
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
        """Return an asynchronous iterator over batches, for asyncio: no thread, no polling; cancelling loses none."""
        return _AsyncBatches(self)

    def get(self, timeout: _Timeout = None) -> Batch:
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

    def flush(self, timeout: _Timeout = None) -> bool:
        """Close the open batch and wait until everything accepted before this call is delivered.

        Blocks at most `timeout` seconds (None: for ever). From the handler or a consumer's loop body it never blocks.
        Returns False when time ran out or the dispatcher was stopped. Raises TypeError, ValueError: a bad timeout.
        """
        deadline = self._deadline(_timeout(timeout))
        s = self._state
        if s.owner == self._ident():
            self._ask(s, "flush")
            return False
        target = self._locked(s, self._cut_locked)
        if self._inside():
            deadline = 0.0
        return self._locked(s, self._await_locked, target, deadline)

    def shutdown(self, timeout: _Timeout = None) -> None:
        """Refuse new work, release blocked producers, and wait until everything accepted is delivered.

        Blocks at most `timeout` seconds (None: for ever). May be called again, and by several threads at once: all wait
        for the same drain. From the handler, or the loop body of a consumer, it does not wait for itself: the drain
        goes on when the handler returns or the loop comes back.

        Raises:
            DrainTimeout: out of time; the dispatcher is stopped, and `.undelivered` are the batches nobody received
                (a batch that the handler has is not among them). Stopped: `stop` was called meanwhile.
            TypeError, ValueError: a bad timeout.
        """
        deadline = self._deadline(_timeout(timeout))
        s = self._state
        if s.owner == self._ident():
            self._ask(s, "shutdown")
            return
        if self._locked(s, self._close_locked) or self._inside():
            return
        self._locked(s, self._drain_locked, deadline)
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
        if s.owner == self._ident():
            return self._snapshot(s)
        return self._locked(s, self._stats_locked)

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
        """Run work(s, *args) with the lock held; raise RuntimeError in a call nested in such work."""
        me = self._ident()
        try:
            with s.lock:  # entered and left at C level: no exception can come between
                if s.owner == me:
                    raise RuntimeError("called by a signal handler or finalizer that interrupted tempo")
                s.owner = me
                try:
                    return work(s, *args)
                finally:
                    self._disown_locked(s, me)
        finally:
            while s.outbox:
                with contextlib.suppress(IndexError):  # another thread posts too
                    s.outbox.popleft()()

    def _disown_locked(self, s: _State, me: int) -> None:
        """Lock held. Give credit, then do what nested calls left; a call nested after `owner = 0` does its own."""
        while True:
            self._grant_locked(s)
            s.owner = 0
            if not s.left:
                return
            s.owner = me
            s.left = False
            self._count_locked(s)
            while s.requests:
                (self._cut_locked if s.requests.pop() == "flush" else self._close_locked)(s)
            self._signal_locked(s)

    def _ask(self, s: _State, what: str) -> None:
        """Nested: leave a request to the thread that was interrupted, which is this one."""
        s.requests.add(what)
        s.left = True

    def _inside(self) -> bool:
        """Whether this thread is in this dispatcher's code already, or in the body of a loop over its batches."""
        body = getattr(self._local, "body", None)
        if body is not None:
            batches = body()
            if batches is not None and batches.thread == self._ident():
                return True
        return self._reentered()

    def _reentered(self) -> bool:
        """Whether this call was made from inside this dispatcher's code: by a handler, an iterable, a signal."""
        frame: FrameType | None = sys._getframe(1)
        own = True  # still in the frames of this call
        while frame is not None:
            if frame.f_globals is not _GLOBALS:
                own = False
            elif not own and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        return False

    def _deadline(self, timeout: float) -> float:
        return self._clock() + timeout if timeout else 0.0

    # -- Admission ---------------------------------------------------------------------------------------------------

    def _enqueue(self, s: _State, payload: Any, timeout: _Timeout, late: bool) -> None:
        """Enqueue by the exact way; late: payload was appended to s.inbox, perhaps after the credit was withdrawn."""
        if late:
            nested = s.owner == self._ident()
            if s is not self._state:
                return  # forked by a signal handler: the parent has the payload
            if self._withdraw_locked(s, payload) if nested else self._locked(s, self._withdraw_locked, payload):
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

    def _admit(self, data: bytes, deadline: float) -> None:
        """Accept one payload exactly, waiting for room until deadline (0: not at all)."""
        s = self._state
        charge = len(data) or 1
        if s.owner == self._ident():
            self._admit_nested(s, data, charge)
            return
        if not self._locked(s, self._enqueue_locked, data, charge, None, deadline > 0):
            if self._reentered():  # never wait: this thread could be the one that makes room
                self._locked(s, self._enqueue_locked, data, charge, None, False)
            else:
                self._wait_for_room(s, _Entry(data, charge, self._new_lock()), deadline)
        if self._push is not None and s.thread is None:
            self._respawn()

    def _enqueue_locked(self, s: _State, data: bytes, charge: int, entry: _Entry | None, wait: bool) -> bool:
        """Lock held. Accept a payload, or raise why not; False: it has to wait, and entry stands in the queue."""
        if s.phase is not _RUNNING:
            raise self._refusal_locked(s, charge)
        if not (wait and s.producers) and self._admit_locked(s, data, charge, None):
            self._signal_locked(s)
            return True
        if not wait or charge > self._max_buffered:
            raise self._refusal_locked(s, charge)
        if entry is not None:
            s.producers.append(entry)
        return False

    def _refusal_locked(self, s: _State, charge: int) -> Error:
        """Lock held. Count a refused payload, and return why."""
        s.rejected = (s.rejected[0] + 1, s.rejected[1] + charge)
        return self._refusal(s, charge, s.inbox[0][2] - s.taken.charge)

    def _refusal(self, s: _State, charge: int, buffered: int) -> Error:
        if s.phase is _SHUTTING_DOWN:
            return ShuttingDown("the dispatcher is shutting down")
        if s.phase is _STOPPED:
            return Stopped("the dispatcher is stopped")
        if charge > self._max_buffered:
            return PayloadTooLarge(f"payload of {charge} bytes exceeds max_buffered_bytes={self._max_buffered}")
        return QueueFull(charge, buffered, self._max_buffered)

    def _wait_for_room(self, s: _State, entry: _Entry, deadline: float) -> None:
        """Stand in the queue until the payload is accepted; raise when it is not."""
        try:
            if self._locked(s, self._enqueue_locked, entry.data, entry.charge, entry, True):
                return
            pause: float | None = _FOREVER
            while pause is not None:
                entry.park(min(pause, max(0.0, deadline - self._clock())))
                if s is not self._state:  # forked by a signal handler: the child's queue is another
                    return self._admit(entry.data, deadline)
                pause = self._locked(s, self._recheck_locked, entry, self._clock() >= deadline)
        except BaseException:
            if s is self._state:
                self._locked(s, self._leave_producers_locked, entry)
            raise

    def _recheck_locked(self, s: _State, entry: _Entry, over: bool) -> float | None:
        """Lock held. None: entry was accepted; else how long to wait on. Raises when it is refused."""
        self._count_locked(s)
        entry.reset()
        if not entry.accepted and s.phase is _RUNNING:
            if s.owed and s.producers[0] is entry:
                if not entry.armed:
                    entry.armed = True
                    if not over:
                        return _PATIENCE
                self._serve_locked(s)
                self._signal_locked(s)
            elif over and self._admit_locked(s, entry.data, entry.charge, entry):
                entry.accepted = True
                s.producers.remove(entry)
                self._signal_locked(s)
        if entry.accepted:
            return None
        if over or s.phase is not _RUNNING:
            raise self._refusal_locked(s, entry.charge)
        entry.armed = False
        return _FOREVER

    def _leave_producers_locked(self, s: _State, entry: _Entry) -> None:
        """Lock held. Entry waits no longer; what is behind it may fit where it did not."""
        with contextlib.suppress(ValueError):
            s.producers.remove(entry)
        if s.phase is _RUNNING:
            self._serve_locked(s)
            self._signal_locked(s)

    def _admit_locked(self, s: _State, data: bytes, charge: int, entry: _Entry | None) -> bool:
        """Lock held. Accept one payload if it fits, exactly (I1); entry is whose it is, if somebody waits for it."""
        return self._commit_locked(s, (data,), charge, charge == 1 and not data, entry)

    def _commit_locked(
        self, s: _State, new: Sequence[bytes], charge: int, empties: int, entry: _Entry | None
    ) -> bool:
        """Lock held. Accept payloads if all of them fit: store first, then change the header (I2)."""
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
            self._store_locked(s, items, nbytes, new, empties)
            header = (items + len(new), nbytes + charge - empties, total + charge, 1, entry)
            try:
                inbox[::-1] = [*pending, header]  # fails if the inbox has grown: then the room may be gone
            except ValueError:
                continue
            s.storing = False
            self._advance_locked(s, items, None)
            return True

    def _enqueue_chunk(self, chunk: list[bytes], deadline: float) -> int:
        """Accept as many payloads of a chunk as fit now, in order; return how many."""
        s = self._state
        if s.owner == self._ident():
            return 0
        n = self._locked(s, self._enqueue_chunk_locked, chunk, deadline > 0)
        if n and self._push is not None and s.thread is None:
            self._respawn()
        return n

    def _enqueue_chunk_locked(self, s: _State, chunk: list[bytes], wait: bool) -> int:
        """Lock held. As _enqueue_chunk."""
        if s.phase is not _RUNNING or (wait and s.producers):
            return 0
        sizes = list(map(len, chunk))
        empties = sizes.count(0)
        charge = sum(sizes) + empties
        while not self._commit_locked(s, chunk, charge, empties, None):
            charges = list(accumulate(size or 1 for size in sizes))
            n = bisect_right(charges, self._max_buffered - s.inbox[0][2] + s.taken.charge)
            if not n:
                return 0
            chunk, sizes = chunk[:n], sizes[:n]
            charge, empties = charges[n - 1], sizes.count(0)
        self._signal_locked(s)
        return len(chunk)

    def _admit_nested(self, s: _State, data: bytes, charge: int) -> None:
        """Accept or refuse a payload in a call that interrupted this thread in a locked section.

        Appends an entry, and decides by its place (see Theory). Touches nothing else that the section uses.
        """
        if charge <= self._max_buffered:
            entry = _Entry(data, charge, self._new_lock())
            places = [entry, *repeat(None, (charge - 1) // self._small if self._small else 0)]
            s.gate = 0
            s.mixed = True
            s.inbox.extend(places)
            s.left = True
            buffered = self._accepted_before(s, entry)[1] - s.taken.charge
            if s.phase is _RUNNING and buffered + charge <= self._max_buffered:
                entry.accepted = True
                return
            i = next(i for i, item in enumerate(s.inbox) if item is entry)
            del s.inbox[i : i + len(places)]
        else:
            buffered = 0
        s.nested_rejects.append(charge)
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
                undecided = item.accepted is None and entry is not None
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
        if s.gate or not self._small or s.phase is not _RUNNING or s.producers:
            return
        items, nbytes, charge, _, entry = s.inbox[0]
        first, begin = s.open
        if first == items:
            return
        places = min((self._max_buffered - charge + s.taken.charge) // self._small, _CREDIT_ITEMS)
        if s.consumers and self._max_batch is not None:
            places = min(places, (self._max_batch - nbytes + begin - 1) // self._small)
        if places < 1:
            return
        if entry is not None:
            entry.accepted = True
        s.granted_at = self._clock()
        s.inbox[0] = (items, nbytes, charge, 1 + places, None)
        s.gate = 1 + places

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
        if n == 1 and not s.mixed:
            return
        empties = 0
        rest: list[bytes] = []  # pending
        if s.mixed or n > granted:
            s.mixed = False
            snapshot = inbox[:]
            n = len(snapshot)
            new = []
            for i in range(1, n):
                item = snapshot[i]
                if isinstance(item, _Entry):
                    if item.accepted:
                        new.append(item.data)
                elif item is not None:
                    (new if i < granted else rest).append(item)
            empties = new.count(b"")
        else:
            new = inbox[1:n]
        s.storing = True
        end = self._store_locked(s, items, nbytes, new, empties)
        inbox[:n] = [(items + len(new), end, charge + end - nbytes + empties, 1, None), *rest]
        s.storing = False
        self._advance_locked(s, items, s.granted_at)

    def _store_locked(self, s: _State, items: int, nbytes: int, new: Sequence[bytes], empties: int) -> int:
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
                or run.end() - run.origin - run.base >= _RUN_BYTES
                or len(piece[0]) >= _SPAN
                or not isinstance(run.body, list)
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
            if isinstance(last.body, list) and nbytes - last.origin - last.base < _PACK_BELOW * len(last.ends):
                taken = max(0, s.taken.items - last.start)
                body = b"".join(last.body[taken:])
                last.offset = last.ends[taken - 1] if taken else last.base
                last.body = body
            if nbytes - last.origin < _SPAN:
                origin = last.origin
        if size >= _SPAN:
            origin = nbytes
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

    def _advance_locked(self, s: _State, before: int, born: float | None) -> None:
        """Lock held. See how far batches have closed, after payloads were accepted behind the first `before`."""
        items, nbytes, charge, _, _ = s.inbox[0]
        s.peak = max(s.peak, charge - s.taken.charge)
        first, begin = s.open
        if first == before and items > before:
            s.born = self._clock()
        limit = self._max_batch
        if limit is None or nbytes - begin < limit:
            return
        while nbytes - begin >= limit:
            first, begin = self._boundary_locked(s, first, begin)
        s.born = self._clock() if born is None else born
        s.open = (first, begin)

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
        raise AssertionError("the batch has not reached the limit")

    # -- Delivery ----------------------------------------------------------------------------------------------------

    def _next(self, deadline: float, push: bool) -> Batch:
        """Wait for a batch, and take it."""
        parker: _Parker | None = None
        s = self._state
        if s.owner == self._ident():
            raise queue.Empty
        try:
            while True:
                over = self._clock() >= deadline
                if s is not self._state:  # forked by a signal handler: the child's queue is another
                    s, parker = self._state, None
                batch, delay = self._locked(s, self._poll_locked, parker, push)
                if batch is not None:
                    return batch
                if over:
                    raise queue.Empty
                if parker is None:
                    parker = _Parker(self._new_lock())
                else:
                    parker.park(min(delay, max(0.0, deadline - self._clock())))
        finally:
            if parker is not None and s is self._state:
                self._locked(s, self._leave_locked, parker)

    def _poll_locked(self, s: _State, parker: _Parker | None, push: bool) -> tuple[Batch | None, float]:
        """Lock held. Take a batch if one is due; else stand in the queue, and say how long to wait (the timer)."""
        self._count_locked(s)
        batch = self._take_locked(s, push)
        if batch is None and s.owed:
            self._serve_locked(s)
            batch = self._take_locked(s, push)
        if batch is not None:
            if not push:
                self._finish_locked(s)
            self._offer_locked(s)
            return batch, 0.0
        if s.phase is not _RUNNING:
            raise Stopped("the dispatcher is stopped")
        delay = _FOREVER
        if parker is not None:
            parker.reset()
            if parker not in s.consumers:
                s.consumers.append(parker)
            parker.armed = s.consumers[0] is parker and s.open[0] < s.inbox[0][0]
            if parker.armed:
                delay = max(0.0, s.born + self._interval - self._clock())
        return None, delay

    def _take_locked(self, s: _State, push: bool, discard: bool = False) -> Batch | None:
        """Lock held. Build the front batch if it is closed or due, and release its bytes."""
        items, _nbytes, _, _, _ = s.inbox[0]
        t = s.taken
        stop, end = s.open
        if t.items < stop:
            if self._max_batch is not None and end - t.nbytes >= self._max_batch:
                stop, end = self._boundary_locked(s, t.items, t.nbytes)
            while s.cuts and s.cuts[0] <= t.items:
                s.cuts.popleft()
            if s.cuts and s.cuts[0] < stop:
                stop = s.cuts[0]
        elif t.items == items or (s.phase is _RUNNING and self._clock() < s.born + self._interval):
            return None
        else:
            stop = items
        batch, empties = self._build_locked(s, stop)
        n, size = len(batch), batch.nbytes
        t = t._replace(
            items=t.items + n,
            nbytes=t.nbytes + size,
            charge=t.charge + size + empties,
            flight_items=n if push else t.flight_items,
            flight_charge=size + empties if push else t.flight_charge,
            discarded_items=t.discarded_items + n if discard else t.discarded_items,
            discarded_charge=t.discarded_charge + size + empties if discard else t.discarded_charge,
            batches=t.batches if discard else t.batches + 1,
        )
        if push:
            s.flight_first = stop - n
        if s.open[0] < stop:
            s.open = (t.items, t.nbytes)
        s.taken = t
        self._drop_locked(s)
        return batch

    def _build_locked(self, s: _State, stop: int) -> tuple[Batch, int]:
        """Lock held. The batch from the front up to payload `stop`, and how many of its payloads are empty."""
        front = s.taken.items
        parts: list[bytes | memoryview] = []
        spans: list[tuple[_Run, int, int]] = []
        for run in s.runs:
            if run.start >= stop:
                break
            first, last = max(0, front - run.start), min(len(run.ends), stop - run.start)
            parts += run.parts(first, last)
            spans.append((run, first, last))
        data = parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)
        run, first, last = spans[0]
        base = run.ends[first - 1] if first else run.base
        ends = run.ends[first:last]
        for more, first, last in spans[1:]:
            if more.origin == run.origin:
                ends += more.ends[first:last]
            else:
                shift = more.origin - run.origin
                ends = array("Q", chain(ends, (end + shift for end in more.ends[first:last])))
        size = len(data)
        empties = 0
        if s.inbox[0][2] - s.inbox[0][1] != s.taken.charge - s.taken.nbytes:  # there are empty payloads
            empties = sum(map(eq, ends, chain((base,), ends)))
        assert ends[-1] - base == size
        return Batch(data, ends, base), empties

    def _drop_locked(self, s: _State) -> None:
        """Lock held. Let go of what was taken."""
        front = s.taken.items
        while s.runs and s.runs[0].start + len(s.runs[0].ends) <= front:
            s.runs.popleft()
        if s.runs:
            run = s.runs[0]
            if run.start < front and isinstance(run.body, list):
                run.body[: front - run.start] = repeat(b"", front - run.start)

    def _offer_locked(self, s: _State) -> None:
        """Lock held. After a batch was taken: serve waiting producers, now or when more has drained; wake the next."""
        if s.producers and s.phase is _RUNNING:
            if self._lazy and 2 * (s.inbox[0][2] - s.taken.charge) > self._max_buffered:
                s.owed = True
                if not s.producers[0].armed:
                    s.producers[0].wake()
            else:
                self._serve_locked(s)
        self._signal_locked(s)

    def _serve_locked(self, s: _State) -> None:
        """Lock held. Accept the payloads of waiting producers, first come first served, while they fit."""
        s.owed = False
        while s.producers:
            entry = s.producers[0]
            if not entry.accepted and not self._admit_locked(s, entry.data, entry.charge, entry):
                break
            entry.accepted = True
            s.producers.popleft()
            entry.wake()

    def _signal_locked(self, s: _State) -> None:
        """Lock held. Wake a consumer if it has something to do: a batch to take, or a timer to set."""
        if s.consumers and s.taken.items < s.inbox[0][0]:
            first = s.consumers[0]
            if s.taken.items < s.open[0] or not first.armed or s.phase is not _RUNNING:
                first.wake()

    def _leave_locked(self, s: _State, parker: _Parker) -> None:
        """Lock held. A consumer waits no longer; what it was told goes to the next."""
        with contextlib.suppress(ValueError):
            s.consumers.remove(parker)
        self._count_locked(s)
        self._signal_locked(s)

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
            failed = False
            try:
                handler(batch)
            except BaseException as exc:  # SystemExit too: a handler never ends the thread
                failed = True
                self._report(exc, batch, on_error)
            del batch  # or it would be held while waiting for the next
            if s is self._state:
                self._locked(s, self._landed_locked, failed)

    def _report(self, exc: BaseException, batch: Batch, on_error: _OnError | None) -> None:
        """Tell of a handler's exception, and of one in on_error, without raising."""
        thread = threading.current_thread()
        try:
            if on_error is not None:
                on_error(exc, batch)
            else:
                threading.excepthook(threading.ExceptHookArgs((type(exc), exc, exc.__traceback__, thread)))
        except BaseException as again:
            with contextlib.suppress(BaseException):
                args = threading.ExceptHookArgs((type(again), again, again.__traceback__, thread))
                threading.excepthook(args)

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
        s.drained.notify_all()
        self._finish_locked(s)

    # -- Flush, shutdown, stop ---------------------------------------------------------------------------------------

    def _cut_locked(self, s: _State) -> int:
        """Lock held. Close the open batch; return the number of payloads accepted."""
        self._count_locked(s)
        items: int
        items, nbytes, _, _, _ = s.inbox[0]
        if s.open[0] < items:
            s.cuts.append(items)
            s.open = (items, nbytes)
            self._signal_locked(s)
        return items

    def _await_locked(self, s: _State, target: int, deadline: float) -> bool:
        """Lock held. Wait until the first `target` payloads are delivered; False: out of time, or stopped."""
        me = s.owner
        discarded = s.taken.discarded_items
        while s is self._state:
            if s.taken.discarded_items != discarded:
                return False
            if s.taken.items >= target and not 0 <= s.flight_first < target:
                return True
            remaining = deadline - self._clock()
            if remaining <= 0 or s.phase is _STOPPED:
                return False
            self._disown_locked(s, me)
            s.drained.wait(min(remaining, _RECHECK))
            s.owner = me
        return True  # forked by a signal handler: what was accepted is the parent's

    def _close_locked(self, s: _State) -> bool:
        """Lock held. Take no more work; return whether there is nothing to wait for."""
        if s.phase is _RUNNING:
            s.phase = _SHUTTING_DOWN
            self._cut_locked(s)
            self._release_all_locked(s)
            self._finish_locked(s)
        return s.phase is _STOPPED

    def _release_all_locked(self, s: _State) -> None:
        """Lock held. The phase has changed: whoever waits looks at it."""
        for parker in chain(s.producers, s.consumers):
            parker.wake()
        s.drained.notify_all()

    def _finish_locked(self, s: _State) -> None:
        """Lock held. After a delivery: tell who waits for it, and stop if that was the last."""
        s.drained.notify_all()
        if s.phase is _SHUTTING_DOWN:
            self._count_locked(s)  # a nested call may have come before the phase changed
            if s.taken.items == s.inbox[0][0] and s.flight_first < 0:
                s.phase = _STOPPED
                self._release_all_locked(s)

    def _drain_locked(self, s: _State, deadline: float) -> None:
        """Lock held. Wait until everything is delivered, and the dispatcher stopped."""
        me = s.owner
        while s.phase is _SHUTTING_DOWN and s is self._state:
            remaining = deadline - self._clock()
            if remaining <= 0:
                raise DrainTimeout(self._stop_locked(s))
            self._disown_locked(s, me)
            s.drained.wait(min(remaining, _RECHECK))
            s.owner = me
        if s.halted:
            raise Stopped("stopped while it was shutting down")

    def _stop_locked(self, s: _State) -> list[Batch]:
        """Lock held. Stop, and take out what was not delivered."""
        if s.phase is _STOPPED:
            return []
        s.phase = _STOPPED
        s.halted = True
        self._cut_locked(s)
        undelivered = []
        while True:
            batch = self._take_locked(s, False, discard=True)
            if batch is None:
                break
            undelivered.append(batch)
        self._release_all_locked(s)
        return undelivered

    # -- Looking at it -----------------------------------------------------------------------------------------------

    def _stats_locked(self, s: _State) -> Stats:
        """Lock held. As stats."""
        self._count_locked(s)
        while s.nested_rejects:
            charge = s.nested_rejects[-1]
            s.rejected = (s.rejected[0] + 1, s.rejected[1] + charge)
            s.nested_rejects.pop()
        return self._snapshot(s)

    def _snapshot(self, s: _State) -> Stats:
        """Lock held, by this call or by the one that it interrupted."""
        t = s.taken
        items, charge = self._accepted_before(s, None)
        refused = list(s.nested_rejects)
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
        self._count_locked(s)
        items, nbytes, charge, granted, _ = s.inbox[0]
        assert 0 <= charge - t.charge <= self._max_buffered, "I1"
        assert charge - t.charge <= s.peak <= self._max_buffered, "I1"
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


def _from(runs: deque[_Run], first: int) -> Iterable[_Run]:
    """The runs from the one that holds payload `first`, found from the nearer end."""
    if not runs or runs[0].start + len(runs[0].ends) > first:
        return runs
    found: list[_Run] = []
    for run in reversed(runs):
        found.append(run)
        if run.start <= first:
            break
    return reversed(found)


def _show(value: object) -> str:
    """A value for an error message, cut to a line's length."""
    text = f"{type(value).__name__}: {value!r}"
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
    return min(value, _FOREVER)


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
_DISPATCHERS: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Give every dispatcher a fresh, empty state; what was accepted is the parent's."""
    for d in list(_DISPATCHERS):
        old, d._state = d._state, d._new_state()
        old.gate = 0
        for parker in chain(old.producers, old.consumers):  # this thread's, if a signal handler forked in its wait
            parker.wake()


def _at_exit() -> None:
    """Drain what was started, each for its exit_timeout at most, all at the same time."""
    begin = time.monotonic()
    started = [(d, d._push[2]) for d in list(_DISPATCHERS) if d._push is not None]
    for d, _ in started:
        d._locked(d._state, d._close_locked)
    for d, limit in started:
        until = begin + limit
        thread = d._state.thread
        if thread is None:  # a forked child could not start it
            d._consume(until)
        with contextlib.suppress(DrainTimeout, Stopped):
            d.shutdown(max(0.0, until - time.monotonic()))


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
