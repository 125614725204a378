# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the tempo.py authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
# documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
# rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
# persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright notice
# and this permission notice shall be included in all copies or substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
# WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
# COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
# OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
#
# tempo.py 0.2.0, one file of the tempo.py project. To upgrade a copy, replace this file; nothing else belongs to it.
"""Batch high-volume events in bounded memory, inside the process.

    import tempo

    d = tempo.Dispatcher(interval=0.25, max_batch_bytes=32 * tempo.KiB, max_buffered_bytes=4 * tempo.MiB)
    d.enqueue(b"first event")          # never blocks; QueueFull: it does not fit
    d.enqueue(b"second", timeout=1.0)  # backpressure: waits up to 1 s for room
    await d.aenqueue(b"third")         # a coroutine waits for room; its event loop goes on
    for batch in d:                    # any number of consumer threads; ends after shutdown()
        sock.sendall(batch.data)       # every payload of the batch, contiguous

Guarantees: payloads leave in the order of acceptance, each exactly once. The buffer never holds more than
`max_buffered_bytes` and never refuses what fits. All methods are thread-safe; `enqueue`, `enqueue_many` and `stats`
never deadlock in signal handlers, finalizers, logging handlers, batch handlers and forked children.

Not a broker, a queue between machines or a store: a refused payload remains with the caller. A port of the Go package
github.com/ef2k/tempo to CPython 3.10 and later, and PyPy; standard library only.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import queue
import sys
import threading
import time
import warnings
import weakref
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from io import BytesIO
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast, overload

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self
else:
    Buffer = Self = Any  # so that typing.get_type_hints() finds them

__version__ = "0.2.0"
__all__ = [
    "Batch", "Closed", "Dispatcher", "DrainTimeout", "Error", "GiB", "KiB", "MiB", "PayloadTooLarge", "QueueFull",
    "ShuttingDown", "Stats", "Stopped",
]  # fmt: skip

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB

_T = TypeVar("_T")
_Method = TypeVar("_Method", bound=Callable[..., Any])
_Handler = Callable[["Batch"], object]
_OnError = Callable[[BaseException, "Batch"], object]
_Commit = tuple["_Run", int, int, Sequence[bytes], list[int], list[int], int, int]

_FOREVER: Final = float("inf")
_NO_LIMIT: Final = sys.maxsize
_NO_WAIT: Final = 0.0  # the default timeout, known by identity
_LOOK_UP: Final = 1.0  # seconds (see Waiting)
_EXIT_TIMEOUT: Final = 5.0  # seconds
_CREDIT_ITEMS: Final = 1024  # most payloads that one run accepts without the lock
_CREDIT_BYTES: Final = 64 * KiB  # plus 1/8 of the buffer: most bytes of credit
_SMALL: Final = 512  # bytes: what credit covers at first; smaller payloads are joined
_SAMPLE: Final = 64  # payloads over which the pace is measured, and of a batch; credit covers the largest next,
_RARE: Final = 8  # if at most so many times their mean
_LOOSE: Final = 256  # small payloads joined at a time
_KEPT: Final = 16  # what is gone is removed when above 1/_KEPT of what is held
_CHUNK: Final = 512  # payloads that enqueue_many() admits at a time
_FEW: Final = 128  # most payloads that it appends without the lock,
_FEW_BYTES: Final = 16 * KiB  # and bytes: the copies of more cost more than the lock
_REFUSALS: Final = 256  # refusals noted before one takes the lock

# Interrupts may keep `with` from releasing: on 3.10 as an exception enters its handler, from 3.14 on before the block.
_WITH_LEAKS: Final = not (3, 11) <= sys.version_info < (3, 14)

_RUNNING: Final = "running"
_SHUTTING_DOWN: Final = "shutting_down"
_STOPPED: Final = "stopped"

# Fixed at import. The partial hides it from tools that freeze time by replacing time.monotonic everywhere.
_monotonic: Callable[[], float] = functools.partial(time.monotonic)

# Theory of operation
# Flow: producer -> _Run -> _Buffer -> Batch -> consumer. `enqueue` appends to the current run without the lock. A
# section (a method that holds the lock, then settles) seals the run, counts it and notes where batches end; a consumer
# takes the front as a Batch. _Buffer knows neither threads nor clocks; the Dispatcher has lock, waiters and life cycle.
#
# Truth. Accepted: the totals in buffer.run, its accepted part, and buffer.admitted. Gone: buffer.taken. Each changes by
# one store, or by stores between which no signal comes (CPython looks for signals after calls and backward jumps; PyPy
# anywhere: there a nested call may exceed the bound, an interrupt miscount). All else is derived after it, and may be
# derived again: what an exception cuts short, `_Buffer.repair` and `Dispatcher._settle` make good, in the same section
# or in the next one.
#   I1  0 <= buffered <= max_buffered_bytes, where buffered = accepted - gone, in bytes as charged.
#   I2  buffer.pieces, sizes and batches hold payloads [origin.items, run.items) in order, once `repair` has moved there
#       what a commit notes in run.before.
#   I3  An open run has room for `places` payloads of `covers` bytes, whatever happens. The store that makes it current
#       opens it; it is sealed once and never reopened.
#   I4  Credit (an open run) is given while the open batch has a payload: its first one takes the lock, sets the time
#       and calls consumers. While a consumer waits, credit ends before the batch. Otherwise it may go on for as many
#       payloads as come in interval / 8 at the recent pace; a batch that begins so counts its interval from when credit
#       was given: never after its first payload, more than interval / 8 before it only if payloads slow down while no
#       consumer looks. While a payload waits for room or was refused, no credit is given and the open batch is due.
#   I5  accepted == delivered + in_flight + buffered + discarded, payloads and bytes.
#
# Without the lock. A producer reads run.covers, appends, and reads run.places; the section that seals stores places =
# 0, then reads run[:granted]. A producer that sees places >= len(run) appended before that, and is counted. Any other
# takes the lock and looks for its payload in that run, from which what was counted is removed: if it is not there, it
# was accepted; otherwise it is taken out (or the same object, if others enqueued it too) and goes the exact way. What
# an interrupted producer leaves behind the seal goes with the run. enqueue_many appends copies of a short list at once;
# the seal may part them: the last are late.
# list.append, list +=, reading and deleting slices, and stores to the run's slots must be atomic and seen in order: by
# the GIL, or by the list's lock, for the run is the list (CPython 3.13: listobject.c, PyMember_SetOne).
#
# Nested calls. A finalizer or signal handler may call tempo in a section of its thread; `_busy` and the lock show it.
# Such calls never wait and never touch what is half done. `enqueue` appends to the open run, or closes it, so that what
# follows stays behind, and appends to `admitted` if there is room; each payload of the run then counts `covers` bytes.
# flush and shutdown are noted in `_asked`. The section settles until nothing is left. One lock serves all dispatchers:
# a finalizer in a section of one may call another while a third thread does the reverse. It is an RLock: a signal
# handler may come right after the acquire.
#
# Waiting. A waiter has a Condition over the lock, or a future of an event loop. It stands in a line until it is woken,
# or until the end of the section that ends its call. Whoever makes room accepts the payloads of producers in `_line`,
# first come first served; their threads then rest, since under a GIL all of them awake would keep the consumer from
# running. No thread waits longer than _LOOK_UP: between its last look and the wait, a wake-up from its signal handler
# is lost, and a signal is not handled before the wait ends.
#
# States. running -> shutting_down -> stopped, or running -> stopped; never back. The run is sealed before the phase
# changes, and no credit is given after it.


class Error(Exception):
    """Base of tempo's errors. `.accepted`: how many payloads `enqueue_many` accepted before it."""

    accepted: int = 0


class QueueFull(Error, queue.Full):
    """There is no room now for `needed` bytes: `buffered_bytes` of `max_buffered_bytes` are in use."""

    # An __init__ that sets these would make a refusal dearer.
    needed = property(lambda self: int(self.args[0]))
    buffered_bytes = property(lambda self: int(self.args[1]))
    max_buffered_bytes = property(lambda self: int(self.args[2]))

    def __str__(self) -> str:
        return f"no room for {self.needed} bytes: {self.buffered_bytes} of {self.max_buffered_bytes} bytes are buffered"


class PayloadTooLarge(Error, ValueError):
    """The payload exceeds `max_buffered_bytes`: it will never fit. Not a `QueueFull`."""


class Closed(Error, RuntimeError):
    """The dispatcher takes no more work."""


class ShuttingDown(Closed):
    """`shutdown` was called; what was accepted is being drained."""


class Stopped(Closed):
    """The dispatcher is stopped: no batch will come out of it."""


class DrainTimeout(Error, TimeoutError):
    """`shutdown` ran out of time. The `undelivered` batches are the caller's; the handler has `in_flight` payloads."""

    def __init__(self, undelivered: list[Batch], in_flight: int = 0) -> None:
        super().__init__(undelivered)  # two would be an errno and its text to OSError
        self.undelivered = undelivered
        self.in_flight = in_flight

    def __str__(self) -> str:
        n, nbytes = sum(map(len, self.undelivered)), sum(batch.nbytes for batch in self.undelivered)
        text = f"not drained in time: {len(self.undelivered)} batches ({n} payloads, {nbytes} bytes) undelivered"
        return f"{text}, {self.in_flight} payloads still with the handler" if self.in_flight else text


class Batch(Sequence[memoryview]):
    """Payloads that leave together, in order: a read-only sequence of memoryviews over one contiguous buffer.

    Immutable and picklable. Owns its bytes and is valid for ever; a view keeps the bytes of the whole batch alive.

    >>> d = Dispatcher(interval=60, max_buffered_bytes=KiB, max_batch_items=3)
    >>> d.enqueue_many([b"one", b"two", b"three"])
    3
    >>> batch = d.get()
    >>> len(batch), batch.nbytes, bytes(batch.data), bytes(batch[-1]), batch.tolist()
    (3, 11, b'onetwothree', b'three', [b'one', b'two', b'three'])
    """

    __slots__ = ("_data", "_ends", "_sizes")
    _data: bytes
    _sizes: array[int]  # of each payload
    _ends: array[int] | None  # where each payload ends, once an index was used

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
        """All payloads back to back: a read-only contiguous memoryview of `nbytes` bytes, no copy."""
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
        """Return a view of a payload, O(1) from the second call on; for a slice a list of views."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self._sizes)))]
        i = range(len(self._sizes))[index]  # negative indices, IndexError
        ends = self._ends
        if ends is None:  # two threads may compute the same
            ends = array("Q", accumulate(self._sizes))
            object.__setattr__(self, "_ends", ends)
        return memoryview(self._data)[(ends[i - 1] if i else 0) : ends[i]]

    def __iter__(self) -> Iterator[memoryview]:
        ends = list(accumulate(self._sizes))
        return map(memoryview(self._data).__getitem__, map(slice, chain((0,), ends), ends))

    def tolist(self) -> list[bytes]:
        """Return a list of the payloads as bytes objects, copied at C speed."""
        return list(map(BytesIO(self._data).read, self._sizes))

    def __reduce__(self) -> tuple[object, ...]:
        return Batch, (self._data, self._sizes)

    def __repr__(self) -> str:
        return f"<tempo.Batch {len(self)} payloads, {self.nbytes} bytes>"


class Stats(NamedTuple):
    """A consistent snapshot: always `accepted == delivered + in_flight + buffered + discarded`, payloads and bytes."""

    accepted: int
    accepted_bytes: int  # here and below as charged: an empty payload counts 1 byte
    delivered: int  # to a consumer; in push mode: the handler returned or raised
    delivered_bytes: int
    in_flight: int  # with the handler now
    in_flight_bytes: int
    buffered: int
    buffered_bytes: int
    discarded: int  # returned by stop, or in DrainTimeout.undelivered
    discarded_bytes: int
    rejected: int  # refused with an error of tempo's
    rejected_bytes: int
    failed: int  # of the delivered: the handler raised
    failed_bytes: int
    batches: int  # taken by consumers
    peak_buffered_bytes: int
    waiting_producers: int
    waiting_consumers: int
    state: str  # "running", "shutting_down" or "stopped"


class _Push(NamedTuple):
    handler: _Handler
    on_error: _OnError | None
    exit_timeout: float


def _charge(sizes: list[int]) -> int:
    return sum(sizes) + (0 if all(sizes) else sizes.count(0))


class _Taken(NamedTuple):
    """What has left the buffer (see Truth)."""

    items: int = 0
    charge: int = 0
    batches: int = 0  # the discarded ones too
    pieces: int = 0  # of `_Buffer.pieces`
    offset: int = 0  # and bytes of the next piece
    discarded: tuple[int, int, int] = (0, 0, 0)  # payloads, bytes, batches
    failed: tuple[int, int] = (0, 0)  # the handler raised
    flight: tuple[float, int, int] = (_FOREVER, 0, 0)  # in the handler: first payload's number; payloads, bytes
    batch: Batch | None = None  # and the batch


class _Run(list[bytes]):
    """Payloads that producers append without the lock (I3), and totals of what was accepted before."""

    __slots__ = ("base", "before", "charge", "covers", "due", "first", "granted", "items", "opened", "places")

    def __init__(self, items: int, charge: int, first: int, base: int, due: float, before: _Commit | None) -> None:
        self.items = items  # accepted before this run: payloads
        self.charge = charge  # and bytes
        self.first = first  # number of the open batch's first payload; == items: empty
        self.base = base  # bytes accepted before the open batch
        self.due = due  # when the open batch is due; _FOREVER: empty
        # For `repair`, of the commit that created this run: the run before; how many entries were counted at the front
        # of that and of buffer.admitted; these payloads, their sizes, the lengths of closed batches; where to put them.
        self.before = before
        # Credit: the first `places` payloads, of at most `covers` bytes each, are accepted.
        self.places = 0  # 0: sealed
        self.granted = 0  # as places, and stays
        self.covers = -1
        self.opened = 0.0  # when the credit was given

    def withdraw(self, sent: list[bytes]) -> bool:
        """Lock held. Take out of both what came too late, the last of `sent`; what stays was counted, so accepted."""
        for i in range(len(self) - 1, -1, -1):  # from the end: an object may be enqueued twice
            if sent and self[i] is sent[-1]:
                del self[i], sent[-1]  # no signal comes between these, so that it may be run again
        return not sent


class _Buffer:
    """Admission, counting, packing and taking. Lock held in all methods."""

    def __init__(self, interval: float, max_buffered: int, max_batch: int, max_items: int) -> None:
        # Fixed after init.
        self.interval = interval
        self.max_buffered = max_buffered
        self.max_batch = max_batch
        self.max_items = max_items
        self.most = max(_SMALL, min(max_batch, max_buffered) // 16)  # largest payload that credit covers
        # Guarded by the lock.
        self.taken = _Taken()
        # I2: payloads back to back (pieces before `joined` stay as is), their sizes, the lengths of closed batches.
        self.pieces: list[bytes] = []
        self.sizes = array("H")
        self.batches = array("I")
        self.joined = self.origin = self.taken  # the end of joined pieces; what was removed at the front
        self.covers = _SMALL  # bytes: of the next credit
        self.pressed = False  # a payload was refused room since a batch was taken
        self.undelivered: tuple[Any, ...] = ()  # discarded, not returned: last batch, tuple before
        self.peak = 0
        self.pace = (0, 0.0, 0.0)  # payloads and time where it began; the last pace
        # Touched without the lock (see Theory).
        self.run = _Run(0, 0, 0, 0, _FOREVER, None)
        self.admitted: deque[tuple[Sequence[bytes], list[int], int]] = deque()  # not counted; sizes, charge
        self.pending = 0  # bytes of these
        self.spare = _NO_LIMIT  # room left, while a payload waits or was refused

    def held(self) -> int:
        """Bytes that are counted and not taken."""
        return self.run.charge - self.taken.charge

    def accepted(self) -> tuple[int, int]:
        """Payloads and bytes accepted so far, counted or not."""
        run = self.run
        counted = run.before[2] if run.before is not None else 0  # and not removed yet
        new = list(chain(run[: run.granted], *[payloads for payloads, _, _ in [*self.admitted][counted:]]))
        return run.items + len(new), run.charge + _charge(list(map(len, new)))

    def due(self) -> float:
        """When the front batch may be taken: -inf when it is closed, inf when there is none."""
        return -_FOREVER if self.taken.items < self.run.first else self.run.due

    def seal(self, now: float) -> None:
        """Withdraw the credit; count what was accepted with it, then what else was admitted."""
        if self.run.before is not None:
            self.repair()
        run = self.run
        run.places = 0  # first: who sees another value appended before the slice
        if run.granted:
            new = run[: run.granted]
            sizes = list(map(len, new))
            self._commit(new, sizes, _charge(sizes), run.opened if new else now, len(new), 0)
        while self.admitted:
            self._commit(*self.admitted[0], now, 0, 1)

    def accept(self, new: Sequence[bytes], by: _Waiter) -> bool:
        """Accept payloads if all fit (I1), for the next seal to count. Exact after a seal; see Nested calls."""
        run, sizes = self.run, list(map(len, new))
        charge, total = _charge(sizes), by.accepted + len(new)
        entry = [(new, sizes, charge)]
        run.places = 0  # what follows stays behind these payloads
        run.granted = granted = min(run.granted, len(run))
        # From here no signal comes (see Truth): a nested call accepts before this, or after.
        held = run.charge - self.taken.charge + granted * run.covers + self.pending
        if held + charge > self.max_buffered:
            return False
        self.admitted += entry
        self.pending += charge
        by.accepted = total
        # To here.
        if len(sizes) == 1 and self.covers < charge <= self.most:
            self.covers = charge  # so that large ones of a first batch come without the lock
        return True

    def grant(self, now: float, told: bool) -> None:
        """Open a new run, if the open batch has a payload (I3, I4). told: no consumer waits."""
        run = self.run
        n = run.items - run.first
        if run.granted or not n:
            return
        covers = self.covers
        places = min((run.base + self.max_batch - run.charge - 1) // covers, self.max_items - n - 1)
        if told and places < _CREDIT_ITEMS:
            places = max(places, int(self._pace(now) * self.interval / 8))
        room = min(self.max_buffered // 8 + _CREDIT_BYTES, self.max_buffered - self.held())
        places = min(places, _CREDIT_ITEMS, room // covers)
        if places > 0:
            after = _Run(run.items, run.charge, run.first, run.base, run.due, None)
            after.places = after.granted = places
            after.covers, after.opened = covers, now
            if not self.admitted:  # nested payloads go first; no signal comes between this
                self.run = after  # and this

    def _pace(self, now: float) -> float:
        """The recent pace, in payloads a second."""
        items, since, pace = self.pace
        n, seconds = self.run.items - items, now - since
        if n >= _SAMPLE or seconds > self.interval / 8:
            pace = n / max(seconds, 1e-9) if n >= _SAMPLE else 0.0
            self.pace = (self.run.items, now, pace)
        return pace

    def _commit(
        self, new: Sequence[bytes], sizes: list[int], charge: int, now: float, counted: int, admitted: int
    ) -> None:
        """Count payloads; close the batches that end among them (I2)."""
        if new:
            self._join()
        run = self.run
        batches: list[int] = []
        items, total = run.items + len(sizes), run.charge + charge
        first, base, due = run.first, run.base, run.due if run.first < run.items else now + self.interval
        if total - base >= self.max_batch or items - first >= self.max_items:
            totals = list(accumulate(sizes if all(sizes) else [size or 1 for size in sizes], initial=run.charge))
            while total - base >= self.max_batch or items - first >= self.max_items:
                end = run.items + bisect_right(totals, base + self.max_batch) - 1  # the last that fits
                end = min(max(first + 1, end), first + self.max_items)
                batches.append(end - first)
                first, base, due = end, totals[end - run.items], now + self.interval
        before = (run, counted, admitted, new, sizes, batches, len(self.pieces), len(self.batches))
        after = _Run(items, total, first, base, due if first < items else _FOREVER, before)
        self.run = after  # no signal comes between these
        self.pending -= charge if admitted else 0
        self.repair()

    def _join(self) -> None:
        """Join the last pieces if they are many and small: an object for each is too much."""
        run, pieces, first = self.run, self.pieces, self.origin.pieces
        n = run.items - self.joined.items
        if n > _LOOSE:
            small = run.charge - self.joined.charge < _SMALL * n
            at = max(self.joined.pieces, self.taken.pieces) - first
            while at < len(pieces):
                some = pieces[at : at + _LOOSE]
                parts = [b"".join(some)] if small else some
                end, to = at + len(some), at + len(parts)
                mark = _Taken(run.items - len(pieces) + end, run.charge, pieces=first + to)
                pieces[at:end], self.joined = parts, mark  # no signal comes between these
                at = to

    def repair(self) -> None:
        """Finish the last commit and the last take; may be run again."""
        run, taken, origin = self.run, self.taken, self.origin
        if run.before is not None:
            before, counted, admitted, new, sizes, batches, at, n = run.before
            added = run.charge - before.charge
            if added >> 8 * self.sizes.itemsize:
                self.sizes = array("Q" if added >> 32 else "I", self.sizes)
            self.pieces[at:] = new
            del self.sizes[before.items - origin.items :]
            self.sizes.fromlist(sizes)
            del self.batches[n:]
            self.batches.fromlist(batches)
            self.peak = max(self.peak, self.held())
            del before[:counted]  # once: no signal comes between this
            if admitted:
                del self.admitted[0]
            run.before = None  # and this
        if taken.charge - origin.charge > (run.charge - taken.charge) // _KEPT:  # not each time: what is behind moves
            rest = _Taken(*taken[:5])
            del self.pieces[: taken.pieces - origin.pieces], self.sizes[: taken.items - origin.items]
            del self.batches[: taken.batches - origin.batches]
            self.origin = rest  # no signal comes between these

    def cut(self) -> None:
        """After a seal: close the open batch, if it has a payload."""
        run = self.run
        if run.first < run.items:
            before: _Commit = (run, 0, 0, (), [], [run.items - run.first], len(self.pieces), len(self.batches))
            self.run = _Run(run.items, run.charge, run.items, run.charge, _FOREVER, before)
            self.repair()

    def take(self, fate: str = "delivered") -> Batch:
        """Take the front batch (I5); if it is open, after a seal. fate: "delivered", "in_flight" or "discarded"."""
        if self.run.before is not None:  # two interrupts in a row
            self.repair()
        taken = self.taken
        if taken.items == self.run.first:
            self.cut()
        n = self.batches[taken.batches - self.origin.batches]
        end = taken.items + n
        origin, joined = self.origin, self.joined
        sizes = self.sizes[taken.items - origin.items : end - origin.items]
        at = taken.pieces - origin.pieces
        whole, rest = joined.pieces + end - joined.items - taken.pieces, 0
        if end < joined.items:
            some = self.pieces[at : min(at + n, joined.pieces - origin.pieces)]
            ends, stop = list(accumulate(map(len, some))), taken.offset + sum(sizes)
            whole = bisect_right(ends, stop)
            rest = stop - ends[whole - 1] if whole else stop
        parts: list[Any] = self.pieces[at : at + whole]
        if rest:
            parts.append(memoryview(self.pieces[at + whole])[:rest])
        if taken.offset:
            parts[0] = memoryview(parts[0])[taken.offset :]
        batch = Batch(b"".join(parts), sizes)  # first: without memory for it, nothing is taken
        charge = batch.nbytes + (0 if all(sizes) else sizes.count(0))
        discarded, undelivered, flight, own = taken.discarded, self.undelivered, taken.flight, taken.batch
        if fate == "in_flight":
            flight, own = (taken.items, n, charge), batch
        if fate == "discarded":
            discarded = (discarded[0] + n, discarded[1] + charge, discarded[2] + 1)
            undelivered = (batch, undelivered)
        run = self.run
        if run.granted:  # and not sealed, for the batch was closed already
            credit = _charge(list(map(len, run[: run.granted])))
            self.peak = max(self.peak, run.charge - taken.charge + credit)
        gone = (end, taken.charge + charge, taken.batches + 1, taken.pieces + whole, rest)
        self.taken, self.undelivered = _Taken(*gone, discarded, taken.failed, flight, own), undelivered
        self.pressed = False
        self.repair()
        sizes = sizes[-_SAMPLE:]
        largest = max(sizes)
        if largest > self.covers or n >= _SAMPLE:
            self.covers = max(1, min(largest, max(self.most, _RARE * sum(sizes) // len(sizes))))
        return batch

    def land(self, failed: bool) -> None:
        """The handler has returned from its batch, or raised."""
        taken = self.taken
        _, n, charge = taken.flight
        lost = (taken.failed[0] + n, taken.failed[1] + charge) if failed else taken.failed
        self.taken = taken._replace(failed=lost, flight=(_FOREVER, 0, 0), batch=None)


class _Waiter:
    """A blocked thread, with a Condition over the lock, or a coroutine. Lock held in all methods.

    A coroutine is woken through its event loop. Keeps neither loop nor task alive.
    """

    line: deque[_Waiter] | None = None  # where it stands, or stood
    woken = True  # it need not wait
    until = _FOREVER  # a consumer: when it looks again
    data = b""  # a producer: its payload,
    accepted = 0  # and how many of its payloads were accepted
    target = -1  # flush and shutdown: payloads to be delivered
    future: weakref.ref[Any] | None = None  # a coroutine: what it waits for
    _condition: threading.Condition | None = None

    def wake(self) -> None:
        """Wake it. The caller takes it out of its line, or the next section wakes it again."""
        if self._condition is not None:
            self._condition.notify()
        elif self.future is not None and (future := self.future()) is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                future.get_loop().call_soon_threadsafe(future.cancel)  # so that it is done
        self.woken = True

    def wait(self, mutex: _Mutex, seconds: float) -> None:
        """Wait for wake() with the lock released; the lock is held when this returns or raises."""
        condition = self._condition = self._condition or threading.Condition(mutex.lock)
        try:
            if not self.woken:
                condition.wait(seconds)
        except BaseException:
            if not mutex.held():  # interrupted after wait() released it
                mutex.lock.acquire()
            raise


class _Mutex:
    """The lock of all dispatchers of a process; held: by this thread."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self._condition = threading.Condition(lock)
        self.owner = 0  # identity of the thread that had it last; asked first, since held() is slow

    def held(self) -> bool:
        try:
            self._condition.notify(0)
        except RuntimeError:
            return False
        return True


def _section(work: _Method) -> _Method:
    """Run a method of Dispatcher with the lock held, and settle. RuntimeError: the call is nested."""

    def section(self: Dispatcher, *args: Any) -> Any:
        mutex = self._mutex
        if mutex is None or _getpid() != _pid or _exiting:
            mutex = self._find_mutex()
        if self._nested():
            raise RuntimeError("called by a signal handler or finalizer that interrupted tempo")
        before = _WITH_LEAKS and mutex.held()
        try:
            with mutex.lock:
                mutex.owner = self._busy = threading.get_ident()
                try:
                    self._now = _monotonic()
                    return work(self, *args)
                finally:
                    try:
                        self._settle()
                    except BaseException:
                        self._settle()
                        raise
        except BaseException:
            if _WITH_LEAKS and not before and mutex.held():
                mutex.lock.release()  # pragma: no cover - not on 3.11 to 3.13
            raise

    return cast(_Method, section)


class _Batches(Iterator[Batch], AsyncIterator[Batch]):
    """Iterator over batches, for threads and coroutines; knows which of them is in the loop."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._user: weakref.ref[Any] | None = None  # a thread or task
        dispatcher._loops.append(weakref.ref(self, dispatcher._loops.remove))

    def __next__(self) -> Batch:
        self._user = weakref.ref(threading.current_thread())
        try:
            return self._dispatcher.get()
        except BaseException as exc:
            self._user = None
            if isinstance(exc, Stopped):
                raise StopIteration from None
            raise

    async def __anext__(self) -> Batch:
        self._user = weakref.ref(_asyncio("current_task") or self)
        try:
            return await self._dispatcher._await(_FOREVER, self._dispatcher._take, "delivered")
        except BaseException as exc:
            self._user = None
            if isinstance(exc, Stopped):
                raise StopAsyncIteration from None
            raise

    def inside(self) -> bool:
        user = (reference := self._user) and reference()  # read once: the loop may end meanwhile
        return user is not None and (user is threading.current_thread() or user is _asyncio("current_task"))


class Dispatcher:
    """Batches payloads from any number of producers for any number of consumers, in bounded memory.

    A batch closes `interval` seconds (> 0, finite) after its first payload or slightly earlier, at `max_batch_bytes` or
    `max_batch_items` (None: no limit; a larger payload goes alone), when a payload lacks room, by `flush` and
    `shutdown`. `max_buffered_bytes` limits what is accepted and not yet received; an empty payload counts 1 byte.

    Every `timeout` is a number of seconds >= 0, or None: for ever. A bad argument is a TypeError or a ValueError.
    Called by its handler, or by a signal handler or finalizer that interrupted tempo, no method waits.

    >>> with Dispatcher(interval=0.25, max_buffered_bytes=64 * KiB) as d:
    ...     d.start(lambda batch: print(batch.tolist()))
    ...     n = d.enqueue_many([b"a", b"b"])
    [b'a', b'b']
    """

    def __init__(
        self,
        *,
        interval: float,
        max_buffered_bytes: int,
        max_batch_bytes: int | None = None,
        max_batch_items: int | None = None,
    ) -> None:
        # Fixed after init.
        seconds = _seconds("interval", interval)
        if not 0 < seconds <= threading.TIMEOUT_MAX:
            raise ValueError(f"interval must be > 0 and at most {threading.TIMEOUT_MAX} seconds, not {_show(interval)}")
        self._max_buffered = _limit("max_buffered_bytes", max_buffered_bytes)
        max_batch = _NO_LIMIT if max_batch_bytes is None else _limit("max_batch_bytes", max_batch_bytes)
        max_items = _NO_LIMIT if max_batch_items is None else _limit("max_batch_items", max_batch_items, "payloads")
        self._new_buffer = functools.partial(_Buffer, seconds, self._max_buffered, max_batch, max_items)
        self._push: _Push | None = None  # set once, under the lock
        self._loops: list[weakref.ref[_Batches]] = []  # each removed when the iterator ends
        self._reset()
        _DISPATCHERS.append(weakref.ref(self, _DISPATCHERS.remove))

    def _reset(self) -> None:
        """Begin empty, in a forked child too."""
        # Guarded by the lock.
        self._buffer = self._new_buffer()
        self._phase = _RUNNING
        self._halted = False  # stopped before it was drained
        self._now = 0.0  # when the section began, or its last wait ended
        self._line: deque[_Waiter] = deque()  # producers without room
        self._resting: deque[_Waiter] = deque()  # whose payload was accepted, until their turn
        self._turn = 0  # bytes taken when turns were last given
        self._consumers: deque[_Waiter] = deque()
        self._drainers: deque[_Waiter] = deque()  # flush and shutdown
        self._gone: list[_Waiter] = []  # no longer waiting, perhaps in line
        self._rejected = (0, 0)  # payloads, bytes
        self._thread: threading.Thread | None = None  # the handler's
        # Touched without the lock (see Theory).
        self._mutex: _Mutex | None = None  # found at the first call: by then a forked child may be patched
        self._busy = 0  # identity of the thread in a section; only that thread compares equal
        self._left = False  # a nested call has left work for the section
        self._asked: list[str] = []  # by nested calls: "flush", "shutdown"
        self._refused: list[int] = []  # charges, not yet in _rejected

    def enqueue(self, payload: Buffer, timeout: float | None = _NO_WAIT) -> None:
        """Accept one payload: any C-contiguous bytes-like object; a mutable one is copied before this returns.

        Waits for room at most `timeout`, first come first served; by default not at all. A call that interrupted tempo
        may be refused early, by an eighth of the buffer and 64 KiB at most. Raises, with nothing accepted, QueueFull:
        no room in time; PayloadTooLarge: it never fits; ShuttingDown, Stopped: no more work is taken.
        """
        if timeout is not _NO_WAIT and timeout is not None:
            timeout = _seconds("timeout", timeout)
        run = self._buffer.run
        if type(payload) is bytes and len(payload) <= run.covers:
            run.append(payload)
            if len(run) <= run.places:  # read after the append (see Theory)
                return
            self._enqueue(payload, _deadline(timeout), run, _Waiter())
        elif timeout == 0 and type(payload) is bytes and (spare := self._buffer.spare) < (charge := len(payload) or 1):
            raise self._refusal(charge, self._max_buffered - spare)
        else:
            self._enqueue(self._own(payload), _deadline(timeout), None, _Waiter())

    def enqueue_many(self, payloads: Iterable[Buffer], timeout: float | None = _NO_WAIT) -> int:
        """Accept payloads in order, as `enqueue`, long lists at less cost; return how many. One deadline for all.

        Lists and tuples are admitted at most 512 at a time. Other iterables, subclasses too, are read one by one,
        without the lock: nothing is taken out of them that is not offered. What `enqueue` or the iterable raises has
        `.accepted`, the number of payloads accepted before.
        """
        many, one = _Waiter(), _Waiter()  # they count, also in an interrupted section
        run = self._buffer.run
        sent: list[bytes] = []  # appended to `run`, not yet in many.accepted
        try:
            deadline = _deadline(timeout)
            chunks: Iterable[Sequence[Any]] = ([payload] for payload in payloads)
            if type(payloads) is list or type(payloads) is tuple:  # no subclass: foreign code
                chunks = (payloads[i : i + _CHUNK] for i in range(0, len(payloads), _CHUNK))
            for chunk in chunks:
                rest, run = chunk, self._buffer.run
                ready = list(map(type, rest)).count(bytes) == len(rest) and not self._nested()
                sizes = list(map(len, rest)) if ready and len(rest) <= _FEW else []
                few = 0 < len(sizes) <= run.places - len(run) and sum(sizes) <= _FEW_BYTES
                if few and min(sizes) > 1 and max(sizes) <= run.covers:
                    # Copies: a call that withdrew the same object would leave a gap. One byte cannot be copied.
                    run += (copies := list(map(BytesIO(b"".join(rest)).read, sizes)))
                    sent = copies  # no signal comes between these
                    if len(run) > run.places:  # read after the append (see Theory)
                        self._withdraw(run, sent)
                    rest, total = rest[len(sent) :], many.accepted + len(sent)
                    many.accepted, sent, copies = total, [], []  # nor between these
                while rest:
                    n = self._enqueue_chunk(rest, deadline > 0, many) if ready else 0
                    self._ensure_thread()
                    if not n:  # no room, a line, or to be copied: what `enqueue` would do
                        self._enqueue(self._own(rest[0]), deadline, None, one)
                        many.accepted, one = many.accepted + 1, _Waiter()
                    rest = rest[n or 1 :]
        except BaseException as exc:
            if sent:
                self._withdraw(run, sent)
                many.accepted += len(sent)
            with contextlib.suppress(Exception):  # foreign exceptions may have slots
                exc.accepted = many.accepted + one.accepted  # type: ignore[attr-defined]
            raise
        return many.accepted

    async def aenqueue(self, payload: Buffer, timeout: float | None = None) -> None:
        """As `enqueue`, and in the same line; waits by default, without blocking the event loop.

        Cancelled before its payload was accepted, it leaves nothing behind.
        """
        if timeout is not None:
            timeout = _seconds("timeout", timeout)
        run, late = self._buffer.run, None  # late: where it may have been appended too late
        if type(payload) is bytes and len(payload) <= run.covers:
            run.append(payload)
            if len(run) <= run.places:
                return
            late = run
        await self._await(_deadline(timeout) if self._patient() else 0.0, self._put, self._own(payload), late)
        self._ensure_thread()

    def batches(self) -> Iterator[Batch]:
        """Return a blocking iterator, as `iter(d)`: each batch to one consumer. Ends after the drain or at `stop`."""
        return _Batches(self)

    __iter__ = batches

    def __aiter__(self) -> AsyncIterator[Batch]:
        """As `batches`, for asyncio: no thread, no polling; cancelling loses no batch."""
        return _Batches(self)

    def get(self, timeout: float | None = None) -> Batch:
        """Return the next batch, now the caller's; wait for it at most `timeout`.

        Raises queue.Empty: none was due in time, or the call interrupted tempo; Stopped: no batch will come.
        """
        deadline = _deadline(timeout)
        if self._nested():
            raise queue.Empty
        return self._block(_Waiter(), deadline if self._patient() else 0.0, self._take, "delivered")

    def start(
        self, handler: _Handler, *, on_error: _OnError | None = None, exit_timeout: float = _EXIT_TIMEOUT
    ) -> None:
        """Call `handler(batch)` for each batch, on one daemon thread named after the handler.

        When it raises or returns an awaitable, the batch has failed: `on_error(exc, batch)` is called, by default
        `threading.excepthook`, and the next batch follows. Interpreter exit drains for at most `exit_timeout` seconds;
        each undelivered batch then goes to `on_error(DrainTimeout, batch)`, or one line on stderr reports them all.
        The dispatcher lives until `shutdown` or `stop`. A coroutine function is a TypeError. Raises RuntimeError:
        started before, or no thread can be started; Closed: no longer running.
        """
        import inspect  # noqa: PLC0415 - slow to import

        if not callable(handler):
            raise TypeError(f"handler must be callable, not {_show(handler)}")
        if inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__):
            raise TypeError(f"handler must not be a coroutine function, which nothing awaits: {_show(handler)}")
        if on_error is not None and not callable(on_error):
            raise TypeError(f"on_error must be callable or None, not {_show(on_error)}")
        self._start(_Push(handler, on_error, _seconds("exit_timeout", exit_timeout)))

    def flush(self, timeout: float | None = None) -> bool:
        """Close the open batch and wait until everything accepted before this call is delivered.

        Waits at most `timeout`, and not inside `for batch in d`. Returns False when not all was delivered in time, or
        the dispatcher was stopped. Raises RuntimeError: it would block this thread's event loop for ever, see `aflush`;
        in a forked child, the handler's thread cannot be started.
        """
        return self._finish("flush", timeout, "await aflush()")[1]

    async def aflush(self, timeout: float | None = None) -> bool:
        """As `flush`, without blocking the event loop."""
        return await self._await(self._plan(timeout), self._drain, "flush")

    def shutdown(self, timeout: float | None = None) -> None:
        """Refuse new work, release blocked producers, and wait until everything accepted is delivered.

        Waits at most `timeout`; all callers wait for the same drain. In the handler, or inside `for batch in d` (in
        this thread, and the iterator is alive), it returns at once; the drain goes on when the handler returns or the
        loop comes back. Raises DrainTimeout: out of time, the dispatcher is stopped; Stopped: `stop` was called
        meanwhile, or another `shutdown` ran out of time; RuntimeError: as for `flush`, see `ashutdown`.
        """
        deadline, done = self._finish("shutdown", timeout, "await ashutdown(), async with")
        if not done and deadline >= 0:
            self._end(giving_up=True)
        elif deadline > 0 and not self._halted and (thread := self._thread) is not None and thread.is_alive():
            thread.join(_remaining(deadline))  # all is delivered: it only has to return

    async def ashutdown(self, timeout: float | None = None) -> None:
        """As `shutdown`, without blocking the event loop."""
        deadline = self._plan(timeout)
        if not await self._await(deadline, self._drain, "shutdown") and deadline >= 0:
            self._end(giving_up=True)

    def stop(self) -> list[Batch]:
        """Stop at once; return the batches that no consumer received, now the caller's; later calls return none.

        Releases blocked producers and consumers; a `shutdown` under way raises Stopped. The handler keeps its batch.
        Raises RuntimeError: the call interrupted tempo; nothing has changed.
        """
        return self._end()

    def stats(self) -> Stats:
        """Return a consistent snapshot. May be called from anywhere."""
        return self._snapshot() if self._nested() else self._stats()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Shut down; after an exception, wait at most `exit_timeout` (5 s) for the drain."""
        with self._reporting(kind is not None) as timeout:
            self.shutdown(timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        """As `__exit__`, without blocking the event loop."""
        with self._reporting(kind is not None) as timeout:
            await self.ashutdown(timeout)

    def __reduce__(self) -> str:
        raise TypeError("a tempo.Dispatcher cannot be copied or pickled")

    def __repr__(self) -> str:
        t = self.stats()
        fill = f"{t.buffered} buffered, {t.buffered_bytes} of {self._max_buffered} bytes"
        return f"<tempo.Dispatcher {t.state} {fill}>"

    # -- Sections ----------------------------------------------------------------------------------------------------

    def _find_mutex(self) -> _Mutex:
        """Find the lock: at the first call, in a forked child, at exit."""
        if _getpid() != _pid:
            with _FORKS.setdefault(_getpid(), threading.RLock()):
                if _getpid() != _pid:
                    _after_fork(keep=True)
            self._ensure_thread()
        mutex = self._mutex
        if mutex is None:
            lock = threading.RLock()  # a monkey-patched one is of another type
            mutex = self._mutex = _MUTEXES.setdefault(type(lock), _Mutex(lock))
        if sys.is_finalizing():  # a daemon thread that holds the lock never runs again
            if not mutex.lock.acquire(False):
                raise Stopped("the interpreter is exiting")
            mutex.lock.release()
        return mutex

    def _nested(self) -> bool:
        """Whether this call interrupted a section of its own thread. On 3.10 an interrupt may leave _busy as it was."""
        return self._busy == threading.get_ident() and self._mutex is not None and self._mutex.held()

    def _patient(self) -> bool:
        """Whether the caller may wait: it is not the handler, nor called from a section or a wait, and others run."""
        me, thread, mutex = threading.get_ident(), self._thread, self._mutex or self._find_mutex()
        inside = me in _WAITS or (thread and thread.ident == me) or (mutex.owner == me and mutex.held())
        return not (inside or (_exiting and sys.is_finalizing()))

    def _plan(self, timeout: float | None) -> float:
        """Return the deadline of flush or shutdown; -1.0: it may not wait, also if inside `for batch in d`."""
        deadline = _deadline(timeout)
        if not self._patient() or any(loop.inside() for loop in _alive(self._loops)):
            return -1.0
        self._ensure_thread(must=True)  # or a forked child would wait for nobody
        return deadline

    def _settle(self) -> None:
        """Lock held. Derive all that follows from what was accepted, taken and asked for. May be run again."""
        buffer, me = self._buffer, self._busy
        while True:
            self._left = False
            while self._asked:
                self._close(self._asked[0])
                del self._asked[:1]
            while self._gone:
                gone = self._gone[0]
                while gone.line is not None and gone in gone.line:
                    gone.line.remove(gone)
                del self._gone[:1]
            if buffer.admitted or buffer.run.before is not None:
                buffer.seal(self._now)
            if self._refused:
                n = len(self._refused)
                self._rejected = (self._rejected[0] + n, self._rejected[1] + sum(self._refused[:n]))
                del self._refused[:n]
            if self._line:
                self._serve()
            if self._phase is _SHUTTING_DOWN and not buffer.held() and buffer.taken.batch is None:
                self._phase = _STOPPED
            if self._drainers or self._resting or self._consumers:
                self._call()
            if self._phase is not _RUNNING or not (self._line or buffer.pressed):
                buffer.spare = _NO_LIMIT
                # A forked child without its handler's thread gets no credit, so that each enqueue() tries to start it.
                if self._phase is _RUNNING and (self._push is None or self._thread is not None):
                    buffer.grant(self._now, not self._consumers)
            else:
                buffer.spare = self._max_buffered - buffer.held()
            self._busy = 0  # from here on a call that comes in between is a section by itself
            if not self._left:
                return
            self._busy = me

    @_section
    def _block(self, waiter: _Waiter, deadline: float, step: Callable[..., _T | None], *args: Any) -> _T:
        """Run step(waiter, over, *args) until it has a result; wait after each None. A coroutine gets the None."""
        mutex, me, leaves = self._mutex or self._find_mutex(), threading.get_ident(), True
        try:
            while (result := step(waiter, self._now >= deadline, *args)) is None and waiter.future is None:
                self._settle()
                try:
                    _WAITS[me] = True
                    # Never for long: a wake-up that this thread's own signal handler sends may be lost.
                    waiter.wait(mutex, min(deadline - self._now, waiter.until - self._now, _LOOK_UP))
                finally:
                    mutex.owner = self._busy = me
                    _WAITS.pop(me, None)
                self._now = _monotonic()
            leaves = result is not None
            return result  # type: ignore[return-value]
        finally:
            if leaves and waiter.line is not None:  # at once, or its payload may still be accepted for it
                self._gone.append(waiter)

    async def _await(self, deadline: float, step: Callable[..., _T | None], *args: Any) -> _T:
        """As _block, for a coroutine: between taking a batch and returning it there is no await."""
        import asyncio  # noqa: PLC0415 - slow to import, and a caller has it loaded already

        waiter = _Waiter()
        try:
            while True:
                future = asyncio.get_running_loop().create_future()
                waiter.future = weakref.ref(future)
                result = self._block(waiter, deadline, step, *args)
                if result is not None:
                    return result
                await asyncio.wait((future,), timeout=_remaining(min(deadline, waiter.until)))
        finally:
            if waiter.line is not None:
                self._gone.append(waiter)
                self._left = True
                if not self._nested():  # else it was collected in a section
                    self._stats()

    def _stand(self, waiter: _Waiter, line: deque[_Waiter]) -> None:
        """Lock held. Stand in line, unless it does already."""
        if waiter.woken:
            waiter.line = line
            waiter.woken = False
            line.append(waiter)

    def _call(self) -> None:
        """Lock held. Wake drainers, consumers that would sleep too long, and resting producers by turns."""
        due, taken, stopped = self._due(), self._buffer.taken.charge, self._phase is _STOPPED
        _wake(self._drainers, [waiter for waiter in self._drainers if stopped or self._delivered(waiter.target)])
        turns = (taken - self._turn) // max(1, self._max_buffered // 8)  # one for each eighth of the buffer taken
        if self._consumers or self._phase is not _RUNNING:
            turns = len(self._resting)
        if turns:
            _wake(self._resting, list(self._resting)[:turns])
            self._turn = taken
        idle = [waiter for waiter in self._consumers if stopped or due <= self._now or due < waiter.until]
        _wake(self._consumers, idle)

    def _due(self) -> float:
        """Lock held. When the front batch may be taken: at once in the drain, or if a payload lacks room (I4)."""
        due = self._buffer.due()
        hurried = self._phase is not _RUNNING or self._line or self._buffer.pressed
        return -_FOREVER if due < _FOREVER and hurried else due

    def _enqueue(self, data: bytes, deadline: float, run: _Run | None, waiter: _Waiter) -> None:
        """Enqueue the exact way. run: where the payload was appended to, perhaps too late."""
        if self._nested():
            buffer, charge = self._buffer, len(data) or 1
            self._left = True
            open_for_it = self._phase is _RUNNING and charge <= self._max_buffered
            if (run is None or run.withdraw([data])) and not (open_for_it and buffer.accept((data,), waiter)):
                buffer.pressed |= open_for_it
                raise self._refusal(charge)
            return
        self._block(waiter, deadline if deadline and self._patient() else 0.0, self._put, data, run)
        self._ensure_thread()

    def _put(self, waiter: _Waiter, over: bool, data: bytes, run: _Run | None) -> bool | None:
        """Lock held. Accept, refuse or have wait (None) a payload, which may have been appended to run too late."""
        buffer = self._buffer
        buffer.seal(self._now)
        if waiter.accepted or (run is not None and waiter.line is None and not run.withdraw([data])):
            return True
        charge = len(data) or 1
        if self._phase is not _RUNNING or charge > self._max_buffered:
            raise self._refusal(charge)
        if (over or not self._line) and buffer.accept((data,), waiter):
            return True
        if over:
            buffer.pressed = True
            raise self._refusal(charge)
        if waiter.line is None:
            waiter.data = data
            if not self._line and not self._resting:
                self._turn = buffer.taken.charge
            self._stand(waiter, self._line)
        return None

    @_section
    def _withdraw(self, run: _Run, sent: list[bytes]) -> None:
        """Take out of both what came too late (see _Run)."""
        self._buffer.seal(self._now)  # so that what is in the run is late (I3)
        run.withdraw(sent)

    @_section
    def _enqueue_chunk(self, chunk: Sequence[bytes], waits: bool, waiter: _Waiter) -> int:
        """Accept as many payloads of a chunk as fit now, in order; return how many."""
        buffer = self._buffer
        buffer.seal(self._now)
        if self._phase is not _RUNNING or (waits and self._line):
            return 0
        n = len(chunk)
        while n and not buffer.accept(chunk[:n], waiter):
            charges = list(accumulate(len(payload) or 1 for payload in chunk[: n - 1]))
            n = bisect_right(charges, self._max_buffered - buffer.held())
        return n

    def _serve(self) -> None:
        """Lock held. Accept waiting producers' payloads that fit, first come first served; threads rest then."""
        buffer, line, running = self._buffer, self._line, self._phase is _RUNNING
        while line:
            waiter = line[0]
            late = running and not waiter.accepted
            if late and not buffer.accept((waiter.data,), waiter):
                return
            buffer.seal(self._now)
            if waiter.future is None and running:
                waiter.line = self._resting
                self._resting.append(waiter)
            else:
                waiter.wake()
            line.popleft()

    def _own(self, payload: Any) -> bytes:
        """Return the payload as exact bytes: itself, or a copy. Runs foreign code, so without the lock."""
        if type(payload) is bytes:
            return payload
        needed = "a bytes-like object"
        with contextlib.suppress(TypeError), memoryview(payload) as view:
            needed = "C-contiguous"
            if view.c_contiguous:
                if view.nbytes > self._max_buffered:  # there may be no memory for a copy
                    raise self._refusal(view.nbytes)
                return view.tobytes()
        raise TypeError(f"payload must be {needed}, not {type(payload).__name__}")

    def _refusal(self, charge: int, held: int = -1) -> Error:
        """Note a refused payload, for a section to count, and return why. held: buffered bytes, if the caller knows."""
        self._refused.append(charge)
        if len(self._refused) >= _REFUSALS and not self._nested():
            self._stats()
        if (phase := self._phase) is not _RUNNING:
            return (Stopped if phase is _STOPPED else ShuttingDown)(f"the dispatcher is {phase.replace('_', ' ')}")
        if charge > self._max_buffered:
            return PayloadTooLarge(f"payload of {charge} bytes exceeds max_buffered_bytes={self._max_buffered}")
        return QueueFull(charge, self._buffer.held() if held < 0 else held, self._max_buffered)

    def _take(self, waiter: _Waiter, over: bool, fate: str, failed: list[bool | None] | None = None) -> Batch | None:
        """Lock held. Take a due batch, or stand in line (None). failed[0]: whether the handler raised."""
        buffer = self._buffer
        if failed is not None:
            if self._thread is not threading.current_thread():
                raise Stopped("the handler has another thread")  # in a child, or when the start was interrupted
            if failed[0] is not None:
                buffer.land(failed[0])
                failed[0] = None
            if buffer.taken.batch is not None:
                return buffer.taken.batch  # an error kept it from the handler
        if buffer.due() != -_FOREVER:
            buffer.seal(self._now)
        due = self._due()
        if due > self._now:
            if self._phase is _STOPPED:
                raise Stopped("the dispatcher is stopped")
            if over:
                raise queue.Empty
            waiter.until = due
            self._stand(waiter, self._consumers)
            return None
        return buffer.take(fate)

    def _close(self, what: str, instead: str = "") -> None:
        """Lock held. Close the open batch, for "shutdown" the dispatcher. instead: what would not block a loop."""
        buffer = self._buffer
        buffer.seal(self._now)  # first: with the credit gone, a nested call goes by the phase
        if instead and self._push is None and not self._delivered(buffer.run.items) and _asyncio("get_running_loop"):
            raise RuntimeError(f"this would block the event loop of this thread: use {instead} or a timeout")
        buffer.cut()
        if what == "shutdown" and self._phase is _RUNNING:
            self._phase = _SHUTTING_DOWN
            buffer.seal(self._now)  # once more, as in `_halt`

    def _finish(self, what: str, timeout: float | None, instead: str) -> tuple[float, bool]:
        """Flush or shut down; return the deadline, and whether all is delivered. instead: as in `_close`."""
        deadline = self._plan(timeout)
        if self._nested():  # the section does what cannot be done now
            self._asked.append(what)
            self._left = True
            return -1.0, False
        instead = instead if deadline == _FOREVER else ""
        return deadline, self._block(_Waiter(), deadline, self._drain, what, instead)

    def _drain(self, waiter: _Waiter, over: bool, what: str, instead: str = "") -> bool | None:
        """Lock held. Whether all that was accepted at the first look is delivered; None: wait."""
        buffer = self._buffer
        if waiter.target < 0:
            if what == "shutdown" and self._phase is _STOPPED:
                return True
            self._close(what, instead)
            waiter.target = buffer.run.items
        if self._delivered(waiter.target):
            return True
        if over or self._phase is _STOPPED:
            return False
        self._stand(waiter, self._drainers)
        return None

    def _delivered(self, target: int) -> bool:
        """Lock held. Whether so many payloads are delivered. In a child that was forked meanwhile there are fewer."""
        taken, target = self._buffer.taken, min(target, self._buffer.run.items)
        return taken.items >= target <= taken.flight[0] and not taken.discarded[0]

    def _end(self, giving_up: bool = False) -> list[Batch]:
        """Stop at once; return what was discarded, to one caller. giving_up: raise DrainTimeout, unless drained."""
        batches, mine = [], [()]
        try:
            self._halt(giving_up, mine)
            undelivered: tuple[Any, ...] = mine[0]
            while undelivered:
                batch, undelivered = undelivered
                batches.append(batch)
            batches.reverse()
            if not (giving_up and self._halted):
                return batches
            error = DrainTimeout(batches, self._buffer.taken.flight[1])
        except BaseException:  # an interrupt: they are the next caller's
            self._buffer.undelivered = mine[0] or self._buffer.undelivered
            raise
        raise error

    @_section
    def _halt(self, giving_up: bool, mine: list[tuple[Any, ...]]) -> None:
        """Stop, discard what was not delivered, and move it to mine; may be called again if an exception ended it."""
        if giving_up and self._halted:
            raise Stopped("stopped while it was shutting down")
        buffer = self._buffer
        buffer.seal(self._now)  # first: with the credit gone, a nested call goes by the phase
        if self._phase is not _STOPPED:
            self._halted = True
            self._phase = _STOPPED
        buffer.seal(self._now)  # again: a nested call may have come before it saw the phase
        while buffer.held():
            buffer.take("discarded")
        mine[0], buffer.undelivered = buffer.undelivered, ()  # between stores no signal is looked for

    @_section
    def _stats(self) -> Stats:
        self._buffer.seal(self._now)
        return self._snapshot()

    def _snapshot(self) -> Stats:
        """Lock held, by this call or by the section that it interrupted."""
        buffer = self._buffer
        items, charge = buffer.accepted()
        t = buffer.taken
        _, flight_items, flight_charge = t.flight
        refused = list(self._refused)
        return Stats(
            *(items, charge),
            *(t.items - flight_items - t.discarded[0], t.charge - flight_charge - t.discarded[1]),
            *(flight_items, flight_charge),
            *(items - t.items, charge - t.charge),
            *t.discarded[:2],
            *(self._rejected[0] + len(refused), self._rejected[1] + sum(refused)),
            *t.failed,
            *(t.batches - t.discarded[2], max(buffer.peak, charge - t.charge)),
            *(len(self._line), len(self._consumers)),
            self._phase,
        )

    # -- Push mode ---------------------------------------------------------------------------------------------------

    def _start(self, push: _Push) -> None:
        """Start the handler's thread, without the lock: Thread.start() waits, and takes other locks."""
        name = getattr(push.handler, "__qualname__", type(push.handler).__qualname__)
        first, me, thread = self._push is None, threading.get_ident(), None
        waits = me in _WAITS  # already, if this interrupted a wait
        try:
            _WAITS[me] = True  # a signal handler may not wait for a thread that this one is about to start
            thread = threading.Thread(target=self._consume, args=(push,), name=f"tempo-{name}", daemon=True)
            self._adopt(thread, push)
            if self._thread is thread:
                thread.start()
        except BaseException as exc:
            # RuntimeError: too many threads, or a sub-interpreter that may have none.
            if self._disown(thread, first) and isinstance(exc, RuntimeError):
                raise RuntimeError(f"no thread can be started ({exc}): use pull mode, `for batch in d`") from exc
            raise
        finally:
            if not waits:
                _WAITS.pop(me, None)

    @_section
    def _adopt(self, thread: threading.Thread, push: _Push) -> None:
        """Make thread the handler's, unless there is one."""
        if self._push is not push:
            if self._phase is not _RUNNING:
                raise (Stopped if self._phase is _STOPPED else ShuttingDown)("start was called too late")
            if self._push is not None:
                raise RuntimeError("start was called before")
        if self._thread is None:
            self._push, self._thread = push, thread

    @_section
    def _disown(self, thread: threading.Thread | None, first: bool) -> bool:
        """Forget a thread that was not started, and withdraw the credit, so that the next enqueue() tries again."""
        self._buffer.seal(self._now)
        if self._thread is not thread or (thread is not None and thread.is_alive()):
            return False  # the exception came before, or after the start
        self._thread, self._push = None, None if first else self._push
        return True

    def _ensure_thread(self, must: bool = False) -> None:
        """In a forked child: start the handler's thread. must: raise if it cannot be, and something is accepted."""
        if self._thread is None and self._push is not None and not _exiting and not self._nested():
            try:
                self._start(self._push)
            except RuntimeError:  # what was accepted stays: the exit drains
                if must and self._buffer.accepted()[0]:
                    raise

    def _consume(self, push: _Push, until: float = _FOREVER) -> None:
        """Call the handler for each batch until the dispatcher stops, or a time, or another thread does."""
        failed: list[bool | None] = [None]
        while _monotonic() < until:
            try:
                batch = self._block(_Waiter(), until, self._take, "in_flight", failed)
            except (Stopped, queue.Empty):
                return
            except Exception as exc:  # no memory, perhaps for a lock; no room on the stack
                self._report(exc, None)
                time.sleep(0.1)
                continue
            failed[0] = self._handle(push.handler, batch)
            del batch  # it may not be kept while the next one is waited for

    def _handle(self, handler: _Handler, batch: Batch) -> bool:
        """Call the handler; return whether it failed."""
        try:
            result = handler(batch)
            if result is not None and isinstance(result, Awaitable):
                getattr(result, "close", bool)()  # or a coroutine would warn that nothing awaited it
                raise TypeError(f"the handler returned an awaitable, which nothing awaits: {type(result).__name__}")
        except BaseException as exc:  # SystemExit too: a handler never ends the thread
            self._report(exc, batch)
            return True
        return False

    def _report(self, exc: BaseException, batch: Batch | None) -> None:
        """Report an exception, and one in on_error, without raising."""
        on_error = self._push.on_error if self._push is not None and batch is not None else None
        try:
            if on_error is not None:
                on_error(exc, batch)  # type: ignore[arg-type]
            elif isinstance(exc, SystemExit):  # threading.excepthook ignores it
                sys.excepthook(type(exc), exc, exc.__traceback__)
            else:
                thread = threading.current_thread()
                threading.excepthook(threading.ExceptHookArgs((type(exc), exc, exc.__traceback__, thread)))
        except BaseException as again:
            if on_error is not None:
                self._report(again, None)

    @contextlib.contextmanager
    def _reporting(self, quiet: bool = True) -> Iterator[float | None]:
        """Give a shutdown its timeout; where it must not raise (quiet), report what it leaves undelivered."""
        exit_timeout = self._push.exit_timeout if self._push is not None else _EXIT_TIMEOUT
        try:
            yield exit_timeout if quiet else None
        except DrainTimeout as exc:
            if self._push is not None and self._push.on_error is not None:
                for batch in exc.undelivered:
                    self._report(exc, batch)
            elif sys.stderr is not None:
                with contextlib.suppress(OSError, ValueError):
                    print(f"tempo: {exc}", file=sys.stderr)
        except Stopped:
            if not quiet:
                raise


def _wake(line: deque[_Waiter], waiters: list[_Waiter]) -> None:
    """Wake some of those in line."""
    for waiter in waiters:
        waiter.wake()
        line.remove(waiter)


def _asyncio(function: str) -> Any:
    """Call asyncio.current_task or get_running_loop; None where no event loop runs in this thread."""
    call = getattr(sys.modules.get("asyncio"), function, None)
    try:
        return call and call()
    except RuntimeError:
        return None


def _show(value: object, kind: bool = False) -> str:
    """A value for an error message, cut to a line's length; kind: with its type."""
    try:
        text = f"{type(value).__name__}: {value!r}" if kind else repr(value)
    except Exception:  # a repr may do anything, and that of an int refuses more than 4,300 digits
        return type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {_show(value, True)}")
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0 seconds, not {_show(value)}")
    return float(value) if value <= threading.TIMEOUT_MAX else _FOREVER


def _deadline(timeout: Any) -> float:
    """When a timeout is over; 0.0: at once."""
    seconds = _FOREVER if timeout is None else _seconds("timeout", timeout)
    return _monotonic() + seconds if seconds else 0.0


def _remaining(deadline: float) -> float | None:
    """The timeout that is left until a deadline."""
    return None if deadline == _FOREVER else max(0.0, deadline - _monotonic())


def _limit(name: str, value: Any, unit: str = "bytes") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {_show(value, True)}")
    if value <= 0:
        raise ValueError(f"{name} must be > 0 {unit}, not {_show(value)}")
    return value


# One hook each for fork and exit; the list keeps no dispatcher alive.
_DISPATCHERS: list[weakref.ref[Dispatcher]] = []
_MUTEXES: dict[type, _Mutex] = {}  # by the type of lock
_WAITS: dict[int, bool] = {}  # by identity, the threads that wait or start a handler's
_FORKS: dict[int, Any] = {}  # by process id: threads of a child may notice a fork without hooks at the same time
_getpid = os.getpid
_pid = _getpid()
_exiting = False  # from the exit hook on


def _alive(references: list[weakref.ref[_T]]) -> list[_T]:
    return [one for reference in list(references) if (one := reference()) is not None]


def _after_fork(keep: bool = False) -> None:
    """In a forked child: make every dispatcher empty, but keep what the child appended if no hook ran at the fork."""
    global _pid  # noqa: PLW0603
    _WAITS.clear()
    for mutex in list(_MUTEXES.values()):
        if not mutex.held():  # else it is this thread's, which has forked in a section
            if hasattr(mutex.lock, "_at_fork_reinit"):  # not another lock: who forked in a wait comes back to this one
                mutex.lock._at_fork_reinit()
            else:
                mutex.__init__(threading.RLock())  # type: ignore[misc]
    for d in _alive(_DISPATCHERS):
        run = d._buffer.run
        run.places = 0
        d._reset()
        if keep and run.granted:
            new = run[: run.granted]
            d._buffer.accept(new, _Waiter())
            del run[: len(new)]
    _pid = _getpid()


def _at_exit() -> None:
    """Drain what was started, each for its exit_timeout at most, all at the same time."""
    global _exiting  # noqa: PLW0603
    _exiting = True
    begin = _monotonic()
    pulled = [d for d in _alive(_DISPATCHERS) if d._push is None]
    started = [(d, d._push, begin + d._push.exit_timeout) for d in _alive(_DISPATCHERS) if d._push is not None]
    for d, _, _ in started:
        d._asked.append("shutdown")
        d._stats()
    for d, push, until in started:
        if d._thread is None:  # a forked child that could not start it, or had no reason to
            d._thread = threading.current_thread()
            d._consume(push, until)
            d._thread = None
        with d._reporting():
            d.shutdown(max(0.0, until - _monotonic()))
    for d in pulled:
        if n := d.stats().buffered:
            warnings.warn(f"{d!r} still holds {n} payloads at exit", ResourceWarning, source=d, stacklevel=1)


if hasattr(os, "register_at_fork"):  # pragma: no branch - not on Windows
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
