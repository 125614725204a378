# SPDX-License-Identifier: MIT
"""What a call costs on one thread: tempo beside what people use in its place, and beside the least that is possible.

Each subject times a loop and returns seconds per payload, after it has seen that the work was done. What belongs to the
work of a call is inside the clock: for tempo also counting payloads, packing them and closing batches.
"""

from __future__ import annotations

import argparse
import os
import queue
from collections.abc import Callable
from itertools import islice
from time import perf_counter
from typing import Any

import tempo
from soak import settings
from soak.load import Load
from soak.units import KIB, MIB

SIZE = 163
"""Bytes: the mean of the telemetry mix."""
CHUNK = 512
LARGE = 10 * KIB
PAYLOADS = [b"%08d" % i + bytes(SIZE - 8) for i in range(CHUNK)] * 8
"""512 distinct ones, 100 KiB, eight times: as warm in the processor's caches as payloads that were just made."""

Subject = Callable[[], float]


class Appender:
    """The least that a method can do."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[bytes] = []

    def put(self, item: bytes) -> None:
        """Append."""
        self.items.append(item)


class KeywordAppender(Appender):
    """The same, with the signature of ``enqueue``."""

    __slots__ = ()

    def enqueue(self, payload: bytes, *, timeout: float | None = 0.0) -> None:
        """Append."""
        self.items.append(payload)


def _put_loop(put: Callable[[bytes], object]) -> float:
    started = perf_counter()
    for payload in PAYLOADS:
        put(payload)
    return (perf_counter() - started) / len(PAYLOADS)


def append() -> float:
    """A method that only appends to a list."""
    appender = Appender()
    seconds = _put_loop(appender.put)
    assert appender.items == PAYLOADS
    return seconds


def append_keyword() -> float:
    """A method that only appends, with a keyword argument that has a default."""
    appender = KeywordAppender()
    seconds = _put_loop(appender.enqueue)
    assert appender.items == PAYLOADS
    return seconds


def queue_put() -> float:
    """``queue.Queue.put``, unbounded."""
    target: queue.Queue[bytes] = queue.Queue()
    seconds = _put_loop(target.put)
    assert target.qsize() == len(PAYLOADS)
    return seconds


def simple_queue_put() -> float:
    """``queue.SimpleQueue.put``."""
    target: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    seconds = _put_loop(target.put)
    assert target.qsize() == len(PAYLOADS)
    return seconds


def _take(dispatcher: tempo.Dispatcher, batches: list[memoryview]) -> None:
    try:
        while True:
            batches.append(dispatcher.get(timeout=0).data)
    except queue.Empty:
        pass


class Enqueue:
    """``enqueue``, 4,096 calls: payloads are counted and packed, and two batches closed; they are taken afterwards."""

    def __init__(self) -> None:
        self.dispatcher = self.make()
        self.received = self.sent = 0

    @staticmethod
    def make() -> tempo.Dispatcher:
        """A roomy dispatcher whose batches close by size."""
        return tempo.Dispatcher(interval=60, max_batch_bytes=320 * KIB, max_buffered_bytes=2 * MIB)

    def put(self) -> None:
        """Enqueue all payloads."""
        enqueue = self.dispatcher.enqueue
        for payload in PAYLOADS:
            enqueue(payload)

    def __call__(self) -> float:
        batches: list[memoryview] = []
        started = perf_counter()
        self.put()
        seconds = perf_counter() - started
        _take(self.dispatcher, batches)
        self.sent += len(PAYLOADS)
        self.received += sum(data.nbytes for data in batches)
        stats = self.dispatcher.stats()
        assert stats.accepted == self.sent
        assert self.received + stats.buffered_bytes == self.sent * SIZE
        return seconds / len(PAYLOADS)


class EnqueueMany(Enqueue):
    """``enqueue_many`` of lists of 512, else the same."""

    chunks = tuple(PAYLOADS[i : i + CHUNK] for i in range(0, len(PAYLOADS), CHUNK))

    def put(self) -> None:
        """Enqueue all payloads, 512 at a time."""
        for chunk in self.chunks:
            self.dispatcher.enqueue_many(chunk)


class Way:
    """512 payloads enqueued, then taken as one packed batch, over and over."""

    def __init__(self) -> None:
        self.dispatcher = tempo.Dispatcher(interval=60, max_batch_bytes=CHUNK * SIZE, max_buffered_bytes=2 * MIB)

    def __call__(self) -> float:
        enqueue, get = self.dispatcher.enqueue, self.dispatcher.get
        last = memoryview(b"")
        started = perf_counter()
        for first in range(0, len(PAYLOADS), CHUNK):
            for payload in PAYLOADS[first : first + CHUNK]:
                enqueue(payload)
            last = get().data
        seconds = perf_counter() - started
        assert last == b"".join(PAYLOADS[-CHUNK:])
        assert self.dispatcher.stats().buffered == 0
        return seconds / len(PAYLOADS)


class OneThread:
    """Events of a load made, enqueued, and taken in batches in which probes are looked for; without probes: neither."""

    def __init__(self, probes: bool) -> None:
        self._load = Load(settings.config_from(argparse.Namespace(producers=1), 1.0), probes=probes)
        self._source = self._load.source(0)
        self._dispatcher = Enqueue.make()

    def __call__(self) -> float:
        dispatcher, taken = self._dispatcher, self._load.taken[0]
        started = perf_counter()
        for payload in islice(self._source, len(PAYLOADS)):
            dispatcher.enqueue(payload, timeout=None)
        dispatcher.flush(timeout=0)
        while dispatcher.stats().buffered:
            self._load.note(taken, dispatcher.get())
        seconds = perf_counter() - started
        assert taken.events == dispatcher.stats().accepted
        assert taken.probes == self._load.sent[0].probes
        return seconds / len(PAYLOADS)


def _queue_way(target: Any) -> float:
    put, get = target.put, target.get
    last = b""
    started = perf_counter()
    for first in range(0, len(PAYLOADS), CHUNK):
        for payload in PAYLOADS[first : first + CHUNK]:
            put(payload)
        last = b"".join([get() for _ in range(CHUNK)])
    seconds = perf_counter() - started
    assert last == b"".join(PAYLOADS[-CHUNK:])
    return seconds / len(PAYLOADS)


def simple_queue_way() -> float:
    """The same with ``queue.SimpleQueue``: put, get, join."""
    return _queue_way(queue.SimpleQueue())


def queue_way() -> float:
    """The same with ``queue.Queue``."""
    return _queue_way(queue.Queue())


class Large:
    """10 KiB payloads, all distinct, 5 MiB of them in turn."""

    def __init__(self) -> None:
        self.payloads = [os.urandom(LARGE) for _ in range(5 * MIB // LARGE)]
        self.dispatcher = tempo.Dispatcher(interval=60, max_batch_bytes=5 * MIB, max_buffered_bytes=16 * MIB)

    def tempo(self) -> float:
        """Enqueued, and taken as one batch."""
        enqueue = self.dispatcher.enqueue
        started = perf_counter()
        for payload in self.payloads:
            enqueue(payload)
        data = self.dispatcher.get().data
        seconds = perf_counter() - started
        assert data.nbytes == 5 * MIB
        assert data[-LARGE:] == self.payloads[-1]
        return seconds / len(self.payloads)

    def join(self) -> float:
        """``bytes.join`` of the same."""
        started = perf_counter()
        data = b"".join(self.payloads)
        seconds = perf_counter() - started
        assert len(data) == 5 * MIB
        return seconds / len(self.payloads)


def subjects() -> dict[str, Subject]:
    """All of them, by the name that results have."""
    large = Large()
    return {
        "enqueue": Enqueue(),
        "enqueue_many": EnqueueMany(),
        "append": append,
        "append_keyword": append_keyword,
        "queue_put": queue_put,
        "simple_queue_put": simple_queue_put,
        "way": Way(),
        "simple_queue_way": simple_queue_way,
        "queue_way": queue_way,
        "large": large.tempo,
        "join": large.join,
    }
