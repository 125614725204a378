# SPDX-License-Identifier: MIT
"""Tests of tempo.py, grouped by property: contract, capacity, order, waiting, consumers, life cycle, re-entrance, fork
and exit, memory, census, model, vendoring, documentation, spool, recipes, harness.

Nothing here sleeps to wait: a test waits for a state that `stats()` shows, or for an event, with a limit.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import copy
import ctypes
import doctest
import gc
import gzip
import http.client
import http.server
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import pickle
import queue
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import weakref
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tempo
from soak import __main__ as soak_main
from soak import baseline as soak_baseline
from soak import bench as soak_bench
from soak import census as soak_census
from soak import charts as soak_charts
from soak import environment as soak_environment
from soak import handover as soak_handover
from soak import heap as soak_heap
from soak import instructions as soak_instructions
from soak import interrupts as soak_interrupts
from soak import micro as soak_micro
from soak import mutants as soak_mutants
from soak import overhead as soak_overhead
from soak import payloads as soak_payloads
from soak import pi as soak_pi
from soak import progress as soak_progress
from soak import record as soak_record
from soak import report as soak_report
from soak import rows as soak_rows
from soak import run as soak_run
from soak import settings as soak_settings
from soak import sinks as soak_sinks
from soak import spool as soak_spool
from soak import stress as soak_stress
from soak import tune as soak_tune
from soak import units, verdict
from soak import worker as soak_worker
from soak.calibration import calibrate
from soak.config import Config
from soak.debian import SetupError
from soak.drive import drive
from soak.hostile import CASES as HOSTILE
from soak.hostile import Case
from soak.hostile import command as soak_hostile
from soak.hostile.checks import LIMIT, LONG, Cycle, Worker, wait_until
from soak.hostile.worlds import with_little_stack
from soak.interleave import command as soak_interleave
from soak.interleave import schedule as soak_schedule
from soak.interleave import twins as soak_twins
from soak.interleave import walk as soak_walk
from soak.load import Latencies, Load
from soak.sinks import command as soak_sinks_command
from soak.sinks import file as soak_file
from soak.sinks import readback as soak_readback
from soak.sinks import receiver as soak_receiver
from soak.sinks import servers as soak_servers
from soak.spool import Spool, SpoolError, SpoolFull

try:
    import tracemalloc
except ImportError:  # PyPy has none
    tracemalloc = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent
CPYTHON = sys.implementation.name == "cpython"

walkable = pytest.mark.skipif(
    not CPYTHON or sys.version_info[:2] == (3, 12),
    reason="threads stopped at bytecodes crash CPython 3.12, are no PyPy's",
)


def make(**kwargs: Any) -> tempo.Dispatcher:
    """A dispatcher with roomy defaults."""
    return tempo.Dispatcher(**{"interval": LONG, "max_buffered_bytes": tempo.MiB, **kwargs})


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def with_clock(**kwargs: Any) -> tuple[tempo.Dispatcher, Clock]:
    """A dispatcher on a clock of its own."""
    clock = Clock()
    with mock.patch("time.monotonic", clock):
        return make(**kwargs), clock


def payloads(batches: Any) -> list[bytes]:
    """All payloads of some batches, in order."""
    return [payload for batch in batches for payload in batch.tolist()]


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_not_ignored() -> Iterator[None]:
    """As they are in what a script starts in the background; processes that tests start inherit it."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Fail a test that leaves a thread behind."""
    before = set(threading.enumerate())
    yield
    wait_until(lambda: not [t for t in threading.enumerate() if t not in before])


SMALL = 100  # bytes: a buffer in which every payload is counted under the lock
LARGE = 64 * tempo.KiB  # bytes: the smallest buffer in which small payloads are accepted without the lock
LIMITS = pytest.mark.parametrize("limit", [SMALL, LARGE, tempo.MiB])


def full(limit: int, **kwargs: Any) -> tempo.Dispatcher:
    """A dispatcher filled to the last byte with one payload, which is a closed batch."""
    d = make(max_buffered_bytes=limit, max_batch_bytes=1, **kwargs)
    d.enqueue(b"x" * limit)
    return d


def waiter(d: tempo.Dispatcher, payload: bytes, timeout: float | None = None) -> Worker:
    """A thread that waits for room, and stands in the queue already."""
    waiting = d.stats().waiting_producers
    worker = Worker(d.enqueue, payload, timeout=timeout)
    wait_until(lambda: d.stats().waiting_producers > waiting)
    return worker


def closing(d: tempo.Dispatcher) -> Worker:
    """A thread in shutdown() that has begun."""
    worker = Worker(d.shutdown)
    wait_until(lambda: d.stats().state != "running")
    return worker


def conserved(d: tempo.Dispatcher) -> tempo.Stats:
    """The stats, after a look at what always holds."""
    s = d.stats()
    assert s.accepted == s.delivered + s.in_flight + s.buffered + s.discarded
    assert s.accepted_bytes == s.delivered_bytes + s.in_flight_bytes + s.buffered_bytes + s.discarded_bytes
    assert min(s[:-1]) >= 0
    assert s.failed <= s.delivered
    assert s.failed_bytes <= s.delivered_bytes
    assert s.buffered_bytes <= s.peak_buffered_bytes
    return s


def unchanged(before: tempo.Stats, after: tempo.Stats) -> bool:
    """Whether nothing changed but the count of refusals."""
    return before._replace(rejected=0, rejected_bytes=0) == after._replace(rejected=0, rejected_bytes=0)


# The Go original's contract, point by point


def test_a_dispatcher_without_a_batch_limit_is_valid() -> None:
    d = tempo.Dispatcher(interval=1, max_buffered_bytes=100)

    assert d.stats().state == "running"


def test_a_batch_limit_above_the_buffer_limit_is_valid() -> None:
    d = tempo.Dispatcher(interval=0.5, max_buffered_bytes=100, max_batch_bytes=1000)
    d.enqueue(b"a")

    assert payloads(d.stop()) == [b"a"]


@LIMITS
def test_a_batch_closes_when_its_bytes_reach_the_limit(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=6)

    d.enqueue(b"abc")
    with pytest.raises(queue.Empty):
        d.get(timeout=0)
    d.enqueue(b"def")

    assert d.get(timeout=0).tolist() == [b"abc", b"def"]


@LIMITS
def test_a_batch_closes_when_its_first_payload_has_waited_the_interval(limit: int) -> None:
    d, clock = with_clock(max_buffered_bytes=limit, interval=5.0)
    d.enqueue(b"a")
    clock.now += 3.0
    d.enqueue(b"b")
    clock.now += 1.5
    with pytest.raises(queue.Empty):
        d.get(timeout=0)

    clock.now += 0.5

    assert d.get(timeout=0).tolist() == [b"a", b"b"]


@LIMITS
def test_the_interval_counts_anew_for_the_next_batch(limit: int) -> None:
    d, clock = with_clock(max_buffered_bytes=limit, interval=5.0, max_batch_bytes=2)
    d.enqueue(b"a")
    clock.now += 4.0
    d.enqueue_many([b"b", b"c"])

    assert d.get(timeout=0).tolist() == [b"a", b"b"]
    clock.now += 4.5
    with pytest.raises(queue.Empty):
        d.get(timeout=0)
    clock.now += 0.5
    assert d.get(timeout=0).tolist() == [b"c"]


@LIMITS
def test_a_waiting_consumer_is_the_timer(limit: int) -> None:
    d = make(max_buffered_bytes=limit, interval=0.005)
    consumer = Worker(d.get)
    wait_until(lambda: d.stats().waiting_consumers)

    d.enqueue(b"a")

    assert consumer.result().tolist()[0] == b"a"


@LIMITS
def test_payloads_leave_in_the_order_in_which_they_were_accepted(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=7)
    sent = [b"%d" % i for i in range(50)]

    for payload in sent:
        d.enqueue(payload)

    assert payloads(d.stop()) == sent


@LIMITS
def test_a_payload_above_the_batch_limit_goes_alone(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=4)

    for payload in (b"a", b"12345", b"b", b"c"):
        d.enqueue(payload)

    assert d.get(timeout=0).tolist() == [b"a"]
    assert d.get(timeout=0).tolist() == [b"12345"]
    assert [batch.tolist() for batch in d.stop()] == [[b"b", b"c"]]


@LIMITS
def test_a_batch_closes_before_a_payload_that_would_take_it_over_the_limit(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=5)

    for payload in (b"abc", b"d", b"ef"):
        d.enqueue(payload)

    assert d.get(timeout=0).tolist() == [b"abc", b"d"]
    with pytest.raises(queue.Empty):
        d.get(timeout=0)
    assert [batch.tolist() for batch in d.stop()] == [[b"ef"]]


@LIMITS
def test_no_batch_of_several_payloads_exceeds_the_limit(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=10)

    d.enqueue_many([b"x" * (i % 13) for i in range(15)])

    assert all(batch.nbytes <= 10 or len(batch) == 1 for batch in d.stop())


def test_empty_payloads_do_not_fill_a_batch() -> None:
    d = make(max_batch_bytes=2)

    d.enqueue_many([b"", b"", b"", b"a", b"", b"b", b""])

    assert d.get(timeout=0).tolist() == [b"", b"", b"", b"a", b"", b"b"]
    assert payloads(d.stop()) == [b""]


@LIMITS
def test_mutable_payloads_are_copied(limit: int) -> None:
    d = make(max_buffered_bytes=limit)
    first, second, third = bytearray(b"first"), bytearray(b"second"), bytearray(b"third")

    d.enqueue(first)
    with memoryview(second) as view:
        d.enqueue(view)
    d.enqueue_many([third])
    for sent in (first, second, third):
        sent[:] = b"changed, and resized: nothing holds on to it"

    assert payloads(d.stop()) == [b"first", b"second", b"third"]


@LIMITS
def test_the_queue_is_full_at_the_exact_byte_and_open_again_after_the_drain(limit: int) -> None:
    d = full(limit)

    with pytest.raises(tempo.QueueFull):
        d.enqueue(b"y")
    assert d.get(timeout=0).nbytes == limit
    d.enqueue(b"y")

    assert payloads(d.stop()) == [b"y"]


@LIMITS
def test_a_payload_that_would_fit_later_is_refused_now(limit: int) -> None:
    d = make(max_buffered_bytes=limit)
    d.enqueue(b"x" * (limit - 3))

    with pytest.raises(tempo.QueueFull):
        d.enqueue(b"1234")
    d.enqueue(b"123")

    assert d.stats().buffered_bytes == limit


@LIMITS
def test_a_payload_above_the_whole_buffer_is_too_large(limit: int) -> None:
    d = make(max_buffered_bytes=limit)

    with pytest.raises(tempo.PayloadTooLarge):
        d.enqueue(b"x" * (limit + 1))

    assert d.stats().accepted == 0


@LIMITS
def test_shutdown_drains_what_was_accepted(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=2)
    d.enqueue_many([b"a", b"b", b"c"])

    closer = closing(d)
    received = [batch.tolist() for batch in d]

    closer.result()
    assert received == [[b"a", b"b"], [b"c"]]
    assert d.stats().state == "stopped"


def test_shutdown_of_an_empty_dispatcher_returns_at_once() -> None:
    d = make()

    d.shutdown(timeout=0)

    assert d.stats().state == "stopped"


@LIMITS
def test_shutdown_that_runs_out_of_time_hands_back_what_is_left(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=2)
    d.enqueue_many([b"a", b"b", b"c"])

    with pytest.raises(tempo.DrainTimeout) as caught:
        d.shutdown(timeout=0.01)

    assert isinstance(caught.value, TimeoutError)
    assert [batch.tolist() for batch in caught.value.undelivered] == [[b"a", b"b"], [b"c"]]
    assert d.stats().state == "stopped"
    assert d.stop() == []
    with pytest.raises(tempo.Stopped):
        d.get()


def test_shutdown_twice_is_one_shutdown() -> None:
    d = make()

    d.shutdown()
    d.shutdown()
    d.shutdown(timeout=0)

    assert d.stats().state == "stopped"


def test_concurrent_shutdowns_wait_for_the_same_drain() -> None:
    d = make()
    d.enqueue(b"a")

    closers = [Worker(d.shutdown) for _ in range(4)]
    wait_until(lambda: d.stats().state == "shutting_down")
    assert all(closer.is_alive() for closer in closers)
    received = payloads(d)

    assert [closer.result() for closer in closers] == [None] * 4
    assert received == [b"a"]


def test_leaving_the_with_block_is_shutdown() -> None:
    received: list[bytes] = []

    with make() as d:
        d.start(lambda batch: received.extend(batch.tolist()))
        d.enqueue(b"a")

    assert received == [b"a"]
    assert d.stats().state == "stopped"


@LIMITS
def test_stop_hands_back_what_was_not_delivered(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=2)
    d.enqueue_many([b"a", b"b", b"c", b"d", b"e"])
    d.get()

    left = d.stop()

    assert [batch.tolist() for batch in left] == [[b"c", b"d"], [b"e"]]
    assert d.stop() == []
    with pytest.raises(tempo.Stopped):
        d.get()
    assert list(d) == []


def test_stop_during_a_shutdown_ends_it_with_stopped() -> None:
    d = make()
    d.enqueue(b"a")
    closer = closing(d)

    left = d.stop()

    with pytest.raises(tempo.Stopped):
        closer.result()
    assert payloads(left) == [b"a"]


def test_concurrent_stops_hand_back_each_payload_once() -> None:
    d = make(max_batch_bytes=2)
    sent = [b"%d" % i for i in range(100)]
    d.enqueue_many(sent)

    stops = [Worker(d.stop) for _ in range(4)]

    assert sorted(payload for stop in stops for payload in payloads(stop.result())) == sorted(sent)


@LIMITS
def test_during_a_shutdown_new_work_is_refused_with_shutting_down(limit: int) -> None:
    d = make(max_buffered_bytes=limit)
    d.enqueue(b"a")
    closer = closing(d)

    with pytest.raises(tempo.ShuttingDown):
        d.enqueue(b"b")
    with pytest.raises(tempo.ShuttingDown):
        d.enqueue(b"b", timeout=None)
    with pytest.raises(tempo.ShuttingDown):
        d.enqueue_many([b"b"])

    assert payloads(d) == [b"a"]
    closer.result()


@pytest.mark.parametrize("end", ["shutdown", "stop"])
@LIMITS
def test_after_the_end_new_work_is_refused_with_stopped(limit: int, end: str) -> None:
    d = make(max_buffered_bytes=limit)
    d.enqueue(b"a")
    d.enqueue(b"b")
    d.flush(0)
    d.get()

    getattr(d, end)()

    with pytest.raises(tempo.Stopped):
        d.enqueue(b"c")
    with pytest.raises(tempo.Stopped):
        d.enqueue(b"c", timeout=None)
    with pytest.raises(tempo.Stopped):
        d.enqueue_many([b"c"])
    with pytest.raises(tempo.Closed):
        d.start(print)
    assert d.stats().accepted == 2


def test_the_errors_stand_where_the_contract_puts_them() -> None:
    assert issubclass(tempo.QueueFull, tempo.Error) and issubclass(tempo.QueueFull, queue.Full)
    assert issubclass(tempo.PayloadTooLarge, tempo.Error) and issubclass(tempo.PayloadTooLarge, ValueError)
    assert not issubclass(tempo.PayloadTooLarge, queue.Full)
    assert issubclass(tempo.Closed, tempo.Error) and issubclass(tempo.Closed, RuntimeError)
    assert issubclass(tempo.ShuttingDown, tempo.Closed) and issubclass(tempo.Stopped, tempo.Closed)
    assert issubclass(tempo.DrainTimeout, tempo.Error) and issubclass(tempo.DrainTimeout, TimeoutError)
    assert (tempo.KiB, tempo.MiB, tempo.GiB) == (1 << 10, 1 << 20, 1 << 30)
    assert all(hasattr(tempo, name) for name in tempo.__all__)


# Capacity


@pytest.mark.parametrize("size", [0, 1, 3, 512, 513])
@pytest.mark.parametrize("limit", [SMALL, LARGE])
def test_the_buffer_takes_exactly_as_many_payloads_as_fit(limit: int, size: int) -> None:
    d = make(max_buffered_bytes=limit)
    payload = b"x" * size
    room = limit // max(1, size)

    for _ in range(room):
        d.enqueue(payload)

    with pytest.raises(tempo.QueueFull if size <= limit else tempo.PayloadTooLarge):
        d.enqueue(payload)
    s = conserved(d)
    assert (s.buffered, s.buffered_bytes) == (room, room * max(1, size))
    assert payloads(d.stop()) == [payload] * room


@LIMITS
def test_what_is_left_of_the_buffer_is_still_given(limit: int) -> None:
    d = make(max_buffered_bytes=limit)
    for _ in range(limit // 7):
        d.enqueue(b"1234567")

    for _ in range(limit % 7):
        d.enqueue(b"")

    assert d.stats().buffered_bytes == limit
    for payload in (b"", b"x", b"1234567"):
        with pytest.raises(tempo.QueueFull):
            d.enqueue(payload)


@LIMITS
def test_random_sizes_are_accepted_exactly_while_they_fit(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=limit // 3)
    buffered, sent, received = 0, [], []
    size = 1

    for step in range(1500):
        size = size * 7919 % 10007
        payload = b"%d" % step + b"." * (size % (limit // 9))
        if buffered + len(payload) <= limit:
            d.enqueue(payload)
            sent.append(payload)
            buffered += len(payload)
        else:
            with pytest.raises(tempo.QueueFull):
                d.enqueue(payload)
            batch = d.get(timeout=0)
            received += batch.tolist()
            buffered -= batch.nbytes
    received += payloads(d.stop())

    assert received == sent


@LIMITS
def test_a_refused_payload_leaves_nothing_behind(limit: int) -> None:
    d = make(max_buffered_bytes=limit)
    d.enqueue(b"a")
    d.enqueue(b"b")
    before = d.stats()

    with pytest.raises(tempo.QueueFull):
        d.enqueue(b"x" * (limit - 1))
    with pytest.raises(tempo.QueueFull):
        d.enqueue(b"x" * (limit - 1), timeout=0.001)
    with pytest.raises(tempo.PayloadTooLarge):
        d.enqueue(b"x" * (limit + 1))
    after = d.stats()

    assert unchanged(before, after)
    assert (after.rejected, after.rejected_bytes) == (3, 3 * limit - 1)
    assert payloads(d.stop()) == [b"a", b"b"]


@pytest.mark.parametrize("timeout", [0, 0.001])
@LIMITS
def test_queue_full_tells_what_was_needed_and_what_was_there(limit: int, timeout: float) -> None:
    d = make(max_buffered_bytes=limit)
    d.enqueue(b"x" * (limit - 2))

    with pytest.raises(queue.Full) as caught:
        d.enqueue(b"abc", timeout=timeout)

    error = caught.value
    assert isinstance(error, tempo.QueueFull)
    assert (error.needed, error.buffered_bytes, error.max_buffered_bytes) == (3, limit - 2, limit)
    for number in (3, limit - 2, limit):
        assert str(number) in str(error)


def test_queue_full_counts_an_empty_payload_as_one_byte() -> None:
    d = full(SMALL)

    with pytest.raises(tempo.QueueFull) as caught:
        d.enqueue(b"")

    assert caught.value.needed == 1


def test_the_errors_survive_pickling() -> None:
    d = full(SMALL)
    with pytest.raises(tempo.QueueFull) as caught:
        d.enqueue(b"abc")
    with pytest.raises(tempo.DrainTimeout) as late:
        d.shutdown(timeout=0)

    again = pickle.loads(pickle.dumps(caught.value))
    late_again = pickle.loads(pickle.dumps(late.value))

    assert (type(again), str(again), again.needed) == (tempo.QueueFull, str(caught.value), 3)
    assert payloads(late_again.undelivered) == [b"x" * SMALL]


@LIMITS
def test_too_large_is_raised_at_once_even_by_a_call_that_would_wait_for_ever(limit: int) -> None:
    d = make(max_buffered_bytes=limit)

    with pytest.raises(tempo.PayloadTooLarge) as caught:
        d.enqueue(b"x" * (limit + 1), timeout=None)

    assert isinstance(caught.value, ValueError)
    assert not isinstance(caught.value, queue.Full)
    assert str(limit) in str(caught.value) and str(limit + 1) in str(caught.value)


def test_a_payload_as_large_as_the_buffer_fits() -> None:
    d = make(max_buffered_bytes=1)

    d.enqueue(b"x")

    assert payloads(d.stop()) == [b"x"]


def test_a_payload_as_large_as_a_full_buffer_may_fit_later() -> None:
    d = full(SMALL)

    assert refusal(d.enqueue, bytes(SMALL)) is tempo.QueueFull
    assert refusal(d.enqueue, bytes(SMALL + 1)) is tempo.PayloadTooLarge


@pytest.mark.parametrize(
    "make_view", [bytearray, memoryview, lambda data: array("B", data)], ids=["bytearray", "memoryview", "array"]
)
def test_a_payload_that_would_have_to_be_copied_and_never_fits_is_refused_and_counted(make_view: Any) -> None:
    d = make(max_buffered_bytes=SMALL)

    assert refusal(d.enqueue, make_view(bytes(SMALL + 1))) is tempo.PayloadTooLarge
    with pytest.raises(tempo.PayloadTooLarge) as caught:
        d.enqueue_many([make_view(b"first"), make_view(bytes(SMALL + 2))])

    assert caught.value.accepted == 1
    stats = d.stats()
    assert (stats.rejected, stats.rejected_bytes) == (2, 2 * SMALL + 3)
    assert payloads(d.stop()) == [b"first"]


def test_enqueue_many_accepts_as_many_empty_payloads_as_there_are_bytes() -> None:
    d = make(max_buffered_bytes=SMALL)

    with pytest.raises(tempo.QueueFull) as caught:
        d.enqueue_many([b""] * (SMALL + 50))

    assert caught.value.accepted == SMALL


def test_a_payload_that_comes_at_the_commit_of_another_keeps_neither_out() -> None:
    d = make(max_buffered_bytes=SMALL)
    others: list[Worker] = []

    class Growing(list):  # type: ignore[type-arg]
        def __setitem__(self, key: Any, value: Any) -> None:
            if not others:
                others.append(pending(d, b"b"))
            super().__setitem__(key, value)

    d._state.inbox = Growing(d._state.inbox)
    d.enqueue(b"a")

    assert others[0].result() is None
    assert payloads(d.stop()) == [b"a", b"b"]


def test_each_payload_of_a_call_may_wait_for_what_is_left_of_its_time() -> None:
    d, clock = with_clock()
    timeouts = []

    def enqueue(self: tempo.Dispatcher, data: bytes, timeout: float) -> None:
        timeouts.append(timeout)

    with mock.patch.object(tempo.Dispatcher, "enqueue", enqueue):
        for deadline in (clock.now + 0.25, clock.now, clock.now - 5.0, 0.0):
            d._put(b"x", deadline)

    assert timeouts == [0.25, 0.0, 0.0, 0.0]


# Bad input

NAN = float("nan")
INF = float("inf")
BAD_SECONDS = [
    ("1", TypeError),
    (b"1", TypeError),
    (True, TypeError),
    (False, TypeError),
    ([1], TypeError),
    (1j, TypeError),
    (-1, ValueError),
    (-0.001, ValueError),
    (-INF, ValueError),
    (NAN, ValueError),
]
BAD_LIMITS = [
    ("1", TypeError),
    (True, TypeError),
    (False, TypeError),
    (1.0, TypeError),
    (NAN, TypeError),
    ([], TypeError),
    (0, ValueError),
    (-1, ValueError),
]


class BrokenRepr:
    def __repr__(self) -> str:
        raise ZeroDivisionError


BAD_PAYLOADS = ["text", "", 3, 0, True, None, 1.5, [b"a"], object(), memoryview(b"abcdef")[::2], BrokenRepr()]


def short(value: object) -> str:
    """A value in a test's name."""
    return value.__name__ if isinstance(value, type) else str(value)[:20]


def message_names(error: BaseException, name: str, value: object) -> bool:
    """Whether an error's message holds an argument's name and its value, if that can be shown."""
    with contextlib.suppress(ZeroDivisionError):
        if repr(value)[:20] not in str(error):
            return False
    return name in str(error)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("interval", value, kind) for value, kind in [*BAD_SECONDS, (None, TypeError), (0, ValueError), (0.0, ValueError)]]
    + [("interval", value, ValueError) for value in (INF, threading.TIMEOUT_MAX * 2, 10**400)]
    + [("max_buffered_bytes", value, kind) for value, kind in [*BAD_LIMITS, (None, TypeError)]]
    + [("max_batch_bytes", value, kind) for value, kind in BAD_LIMITS],
    ids=short,
)
def test_a_dispatcher_refuses_a_bad_argument_by_name(name: str, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        make(**{name: value})

    assert type(caught.value) is kind
    assert message_names(caught.value, name, value)


def test_a_dispatcher_takes_keyword_arguments_only() -> None:
    anything: Any = tempo.Dispatcher

    with pytest.raises(TypeError):
        anything(1.0, 100)
    with pytest.raises(TypeError, match="interval"):
        anything(max_buffered_bytes=100)
    with pytest.raises(TypeError, match="max_buffered_bytes"):
        anything(interval=1.0)


def test_the_longest_interval_is_valid() -> None:
    d = make(interval=threading.TIMEOUT_MAX)
    d.enqueue(b"a")

    with pytest.raises(queue.Empty):
        d.get(timeout=0.001)


@pytest.mark.parametrize("value", BAD_PAYLOADS, ids=lambda value: type(value).__name__)
@LIMITS
def test_enqueue_refuses_what_is_not_bytes_like_and_changes_nothing(limit: int, value: Any) -> None:
    d = make(max_buffered_bytes=limit)

    for _ in range(2):  # the second is at the door of the lock-free way
        before = d.stats()
        for timeout in (0.0, 0, 1.0, None):
            with pytest.raises(TypeError) as caught:
                d.enqueue(value, timeout=timeout)
            assert message_names(caught.value, "payload", value)
        with pytest.raises(TypeError) as many:
            d.enqueue_many([value])
        assert message_names(many.value, "payload", value)
        assert d.stats() == before
        d.enqueue(b"a")

    assert payloads(d.stop()) == [b"a", b"a"]


@pytest.mark.parametrize(("value", "kind"), BAD_SECONDS, ids=repr)
@LIMITS
def test_enqueue_refuses_a_bad_timeout_and_changes_nothing(limit: int, value: Any, kind: type[Exception]) -> None:
    d = make(max_buffered_bytes=limit)

    for _ in range(3):  # on the large ones all but the first are at the door of the lock-free way
        before = d.stats()
        for call in (lambda: d.enqueue(b"refused", timeout=value), lambda: d.enqueue_many([b"no"], timeout=value)):
            with pytest.raises(kind) as caught:
                call()
            assert type(caught.value) is kind
            assert message_names(caught.value, "timeout", value)
        assert d.stats() == before
        d.enqueue(b"a")

    assert payloads(d.stop()) == [b"a", b"a", b"a"]


@pytest.mark.parametrize("timeout", [0, 0.0, 1, 1.5, INF, 10**400, None, 1e308, 5e-324], ids=short)
@LIMITS
def test_every_number_of_seconds_from_zero_up_is_a_timeout(limit: int, timeout: Any) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=1)

    d.enqueue(b"a", timeout=timeout)
    d.enqueue(b"b", timeout=timeout)
    assert d.enqueue_many([b"c"], timeout=timeout) == 1

    assert [d.get(timeout=timeout).tolist() for _ in range(3)] == [[b"a"], [b"b"], [b"c"]]
    assert d.flush(timeout=timeout)
    d.shutdown(timeout=timeout)


def test_a_timeout_above_what_a_lock_takes_waits_for_room() -> None:
    d = full(SMALL)
    blocked = [waiter(d, b"a", timeout) for timeout in (INF, 10**400, threading.TIMEOUT_MAX * 10)]

    d.get()

    assert [worker.result() for worker in blocked] == [None] * 3


@pytest.mark.parametrize("value", [3, None, 1.5])
def test_enqueue_many_refuses_what_is_not_iterable_and_changes_nothing(value: Any) -> None:
    d = make()
    d.enqueue(b"a")
    before = d.stats()

    with pytest.raises(TypeError) as caught:
        d.enqueue_many(value)

    assert getattr(caught.value, "accepted", None) == 0
    assert d.stats() == before


@pytest.mark.parametrize("value", ["text", b"bytes", bytearray(b"bytes")])
def test_enqueue_many_does_not_take_one_payload_for_many(value: Any) -> None:
    d = make()

    with pytest.raises(TypeError, match="payload"):
        d.enqueue_many(value)

    assert d.stats().accepted == 0


@pytest.mark.parametrize(("value", "kind"), BAD_SECONDS, ids=repr)
@pytest.mark.parametrize("name", ["get", "flush", "shutdown"])
def test_get_flush_and_shutdown_refuse_a_bad_timeout_and_change_nothing(
    name: str, value: Any, kind: type[Exception]
) -> None:
    d = make()
    d.enqueue(b"a")
    before = d.stats()

    with pytest.raises(kind) as caught:
        getattr(d, name)(timeout=value)

    assert type(caught.value) is kind
    assert message_names(caught.value, "timeout", value)
    assert d.stats() == before
    with pytest.raises(queue.Empty):  # nothing was closed either
        d.get(timeout=0)


@pytest.mark.parametrize(
    ("arguments", "name", "kind"),
    [({"handler": value}, "handler", TypeError) for value in (None, 3, "print")]
    + [({"handler": print, "on_error": value}, "on_error", TypeError) for value in (3, "print", False)]
    + [({"handler": print, "exit_timeout": value}, "exit_timeout", kind) for value, kind in BAD_SECONDS],
    ids=repr,
)
def test_start_refuses_a_bad_argument_and_can_still_be_called(
    arguments: dict[str, Any], name: str, kind: type[Exception]
) -> None:
    d = make()
    d.enqueue(b"a")
    before, threads = d.stats(), threading.active_count()
    received: list[bytes] = []

    with pytest.raises(kind) as caught:
        d.start(**arguments)

    assert type(caught.value) is kind
    assert message_names(caught.value, name, arguments[name])
    assert d.stats() == before
    assert threading.active_count() == threads
    d.start(lambda batch: received.extend(batch.tolist()))
    d.shutdown()
    assert received == [b"a"]


def test_a_second_start_is_a_runtime_error_and_the_first_goes_on() -> None:
    received: list[bytes] = []
    with make() as d:
        d.start(lambda batch: received.extend(batch.tolist()))

        with pytest.raises(RuntimeError):
            d.start(print)

        d.enqueue(b"a")
    assert received == [b"a"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(interval=0), f"interval must be > 0 and at most {threading.TIMEOUT_MAX} seconds, not 0"),
        (lambda: make(interval=-1), "interval must be >= 0 seconds, not -1"),
        (lambda: make(max_buffered_bytes=0), "max_buffered_bytes must be > 0 bytes, not 0"),
        (lambda: make().start(1), "handler must be callable, not 1"),  # type: ignore[arg-type]
        (lambda: make().start(print, on_error=2), "on_error must be callable or None, not 2"),  # type: ignore[arg-type]
    ],
)
def test_what_is_refused_is_told_by_its_value(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()

    assert str(caught.value) == message


# Payload types


class Subclass(bytes):
    """Says nothing of itself that is true."""

    def __len__(self) -> int:
        return 1000

    def __bytes__(self) -> bytes:
        return b"other"

    def __iter__(self) -> Any:
        raise ZeroDivisionError


PAYLOADS = [
    (b"abc", b"abc"),
    (bytearray(b"abc"), b"abc"),
    (memoryview(b"abc"), b"abc"),
    (memoryview(bytearray(b"xabcx"))[1:4], b"abc"),
    (memoryview(b"abcdef").cast("B", (2, 3)), b"abcdef"),
    (array("d", [1.0, 2.0]), array("d", [1.0, 2.0]).tobytes()),
    (array("I"), b""),
    (memoryview(array("i", [1, 2, 3])), array("i", [1, 2, 3]).tobytes()),
    (Subclass(b"abc"), b"abc"),
    (b"", b""),
    (bytearray(), b""),
]


@pytest.mark.parametrize(("payload", "expected"), PAYLOADS, ids=lambda value: type(value).__name__)
@LIMITS
def test_every_contiguous_bytes_like_object_is_a_payload(limit: int, payload: Any, expected: bytes) -> None:
    d = make(max_buffered_bytes=limit)

    d.enqueue(payload)
    d.enqueue(payload)
    d.enqueue(payload, timeout=None)
    d.enqueue_many([b"-", payload, payload])

    s = conserved(d)
    assert s.buffered_bytes == 5 * max(1, len(expected)) + 1
    (batch,) = d.stop()
    assert batch.tolist() == [expected] * 3 + [b"-"] + [expected] * 2
    assert all(type(item) is bytes for item in batch.tolist())
    assert bytes(batch.data) == expected * 3 + b"-" + expected * 2


@pytest.mark.skipif(sys.version_info < (3, 12), reason="PEP 688")
def test_a_python_object_with_a_buffer_is_a_payload() -> None:
    class Record:
        def __buffer__(self, flags: int) -> memoryview:
            return memoryview(b"record")

    class Broken:
        def __buffer__(self, flags: int) -> memoryview:
            raise ZeroDivisionError

    d = make()
    record: Any = Record()
    broken: Any = Broken()

    for _ in range(2):
        d.enqueue(record)
        with pytest.raises(ZeroDivisionError):
            d.enqueue(broken)
    d.enqueue_many([record])

    assert payloads(d.stop()) == [b"record"] * 3


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_a_payload_that_is_no_bytes_may_be_as_large_as_the_buffer(kind: Any) -> None:
    d = make(max_buffered_bytes=SMALL)
    d.enqueue(kind(bytes(SMALL)))

    assert payloads(d.stop()) == [bytes(SMALL)]


# Producers that wait for room


@pytest.mark.parametrize("timeout", [None, LIMIT, int(LIMIT)])
@LIMITS
def test_enqueue_waits_until_a_batch_is_taken(limit: int, timeout: float | None) -> None:
    d = full(limit)
    blocked = waiter(d, b"y", timeout)
    assert d.stats().accepted == 1

    d.get()

    assert blocked.result() is None
    assert payloads(d.stop()) == [b"y"]


@LIMITS
def test_waiting_producers_are_served_first_come_first_served(limit: int) -> None:
    d = full(limit)
    blocked = [waiter(d, b"%d" % i) for i in range(8)]

    d.get()

    for worker in blocked:
        worker.result()
    assert payloads(d.stop()) == [b"%d" % i for i in range(8)]


@LIMITS
def test_of_waiting_producers_only_those_that_fit_are_served(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=1)
    d.enqueue(b"x" * (limit // 2))
    d.enqueue(b"y" * (limit // 2))
    first, second = waiter(d, b"1" * (limit // 2)), waiter(d, b"2" * (limit // 2))

    d.get()
    first.result()
    s = conserved(d)
    assert (s.waiting_producers, s.buffered_bytes) == (1, limit)

    d.get()
    second.result()
    assert [bytes(batch[0][:1]) for batch in d.stop()] == [b"1", b"2"]


@LIMITS
def test_enqueue_gives_up_with_queue_full_when_time_is_over(limit: int) -> None:
    d = full(limit)
    before = d.stats()

    with pytest.raises(tempo.QueueFull) as caught:
        d.enqueue(b"y", timeout=0.01)

    after = d.stats()
    assert (caught.value.needed, caught.value.buffered_bytes) == (1, limit)
    assert unchanged(before, after)
    assert (after.rejected, after.rejected_bytes, after.waiting_producers) == (1, 1, 0)
    assert payloads(d.stop()) == [b"x" * limit]


@LIMITS
def test_shutdown_releases_waiting_producers(limit: int) -> None:
    d = full(limit)
    blocked = [waiter(d, b"y", timeout) for timeout in (None, LIMIT, INF)]

    closer = closing(d)

    for worker in blocked:
        with pytest.raises(tempo.ShuttingDown):
            worker.result()
    assert conserved(d).rejected == 3
    assert payloads(d) == [b"x" * limit]
    closer.result()


@LIMITS
def test_stop_releases_waiting_producers(limit: int) -> None:
    d = full(limit)
    blocked = [waiter(d, b"y", timeout) for timeout in (None, LIMIT, INF)]

    left = d.stop()

    for worker in blocked:
        with pytest.raises(tempo.Stopped):
            worker.result()
    assert payloads(left) == [b"x" * limit]


@LIMITS
def test_a_waiting_producer_that_fits_at_its_deadline_is_accepted(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=limit)
    d.enqueue(b"x" * (limit - 10))
    head = waiter(d, b"h" * 20)

    d.enqueue(b"fits", timeout=0.01)

    assert not d.stats().rejected
    assert payloads(d.stop()) == [b"x" * (limit - 10), b"fits"]
    with pytest.raises(tempo.Stopped):
        head.result()


@LIMITS
def test_a_waiter_behind_a_head_that_does_not_fit_is_served_when_the_head_gives_up(limit: int) -> None:
    d = make(max_buffered_bytes=limit)
    d.enqueue(b"x" * (limit - 10))
    head = Worker(d.enqueue, b"h" * 20, timeout=0.2)
    wait_until(lambda: d.stats().waiting_producers or not head.is_alive())

    second = Worker(d.enqueue, b"second", timeout=None)

    with pytest.raises(tempo.QueueFull):
        head.result()
    assert second.result() is None
    assert payloads(d.stop()) == [b"x" * (limit - 10), b"second"]


@LIMITS
def test_a_call_that_does_not_wait_is_never_refused_while_it_fits(limit: int) -> None:
    d = make(max_buffered_bytes=limit)
    d.enqueue(b"x" * (limit - 10))
    head = waiter(d, b"h" * 20)

    d.enqueue(b"1234567890")

    with pytest.raises(tempo.QueueFull):
        d.enqueue(b"")
    assert payloads(d.stop()) == [b"x" * (limit - 10), b"1234567890"]
    with pytest.raises(tempo.Stopped):
        head.result()


@LIMITS
def test_a_waiting_producer_is_served_though_only_a_little_was_taken(limit: int) -> None:
    size = limit // 20
    d = make(max_buffered_bytes=limit, max_batch_bytes=size)
    while d.stats().buffered_bytes + size <= limit:
        d.enqueue(b"x" * size)
    blocked = [waiter(d, b"%d" % i * size) for i in range(2)]

    d.get()
    blocked[0].result()
    assert d.stats().waiting_producers == 1
    d.get()
    blocked[1].result()

    assert [bytes(batch.data) for batch in d.stop()][-2:] == [b"0" * size, b"1" * size]


@LIMITS
def test_many_waiting_producers_and_a_slow_consumer_lose_nothing(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=limit // 4)
    size = limit // 8

    def produce(name: bytes) -> None:
        for i in range(20):
            d.enqueue((name + b"%02d" % i).ljust(size, b"."), timeout=None)

    producers = [Worker(produce, name) for name in (b"a", b"b", b"c", b"d")]
    consumer = Worker(lambda: payloads(d))
    for producer in producers:
        producer.result()
    d.shutdown()
    received = consumer.result()

    assert conserved(d).peak_buffered_bytes <= limit
    for name in (b"a", b"b", b"c", b"d"):
        assert [p[:3] for p in received if p[:1] == name] == [name + b"%02d" % i for i in range(20)]


# Producers that rest: their payload is accepted, and they wait for their turn


def forever() -> Any:
    """No resting producer goes on because time passes."""
    return mock.patch.object(tempo, "_PATIENCE", LONG)


def resting(d: tempo.Dispatcher, n: int) -> None:
    """Wait until n producers rest."""
    wait_until(lambda: len(d._state.resting) == n)


def half_full(**kwargs: Any) -> tempo.Dispatcher:
    """A dispatcher of 1 MiB, a little more than half full, in batches of 64 KiB."""
    d = make(max_batch_bytes=64 * tempo.KiB, **kwargs)
    for _ in range(9):
        d.enqueue(bytes(64 * tempo.KiB))
    return d


def send(d: tempo.Dispatcher, name: bytes, count: int, timeout: float | None = None) -> None:
    for i in range(count):
        d.enqueue(b"%s%05d" % (name, i), timeout=timeout)


def test_who_makes_room_accepts_what_waits_at_once_and_the_producers_return_without_help() -> None:
    d = full(tempo.MiB)
    blocked = [waiter(d, b"%d" % i) for i in range(9)]

    d.get()
    stats = d.stats()

    assert (stats.accepted, stats.waiting_producers) == (10, 0)
    for worker in blocked:
        worker.result()
    assert payloads(d.stop()) == [b"%d" % i for i in range(9)]


def test_a_producer_rests_when_the_buffer_is_half_full_and_goes_on_when_it_is_emptied() -> None:
    with forever():
        d = half_full()
        producer = Worker(send, d, b"", 5000)
        resting(d, 1)
        before = d.stats()
        while d.stats().buffered_bytes > tempo.MiB // 8:
            d.get(timeout=0)
        producer.result()

    assert before.accepted < 5000
    assert before.waiting_producers == 0
    assert [item for item in payloads(drained(d)) if len(item) < 99] == [b"%05d" % i for i in range(5000)]


def test_resting_producers_go_on_in_turn() -> None:
    order: list[bytes] = []

    def rest_once(name: bytes) -> None:
        while name not in rested:
            d.enqueue(name, timeout=None)
        order.append(name)

    rested: set[bytes] = set()
    with forever():
        d = half_full()
        producers = []
        for name in (b"a", b"b", b"c"):
            producers.append(Worker(rest_once, name))
            resting(d, len(producers))
            rested.add(name)
        for left, producer in zip((2, 1, 0), producers):
            d.get(timeout=0)  # one batch is one turn's worth
            d.stats()  # a section in which no turn comes
            assert len(d._state.resting) == left
            producer.result()

    assert order == [b"a", b"b", b"c"]
    d._check()


def test_what_the_handler_has_does_not_keep_a_flush_that_is_of_before() -> None:
    gate = threading.Event()
    d = make()
    d.start(lambda batch: bytes(batch[0]) == b"before" or gate.wait(LIMIT))
    d.enqueue(b"before")
    assert d.flush(LIMIT)
    d.enqueue(b"after")
    d.flush(0)
    wait_until(lambda: d.stats().in_flight == 1)

    assert d._delivered(d._state, 1)
    assert not d._delivered(d._state, 2)
    gate.set()
    d.shutdown(LIMIT)


def test_nobody_rests_long_when_no_consumer_comes() -> None:
    d = half_full()

    Worker(send, d, b"", 20_000).result()

    assert d._state.away
    assert not d._state.resting
    d._check()
    assert len(payloads(drained(d))) == 20_009
    assert not d._state.away


@pytest.mark.parametrize("end", ["stop", "shutdown"])
def test_the_end_of_the_dispatcher_is_the_end_of_a_rest(end: str) -> None:
    with forever():
        d = half_full()
        producers = [Worker(refusal, send, d, name, 9999) for name in (b"a", b"b")]
        resting(d, 2)
        closer = Worker(getattr(d, end))
        refused = {producer.result() for producer in producers}
        rest = payloads(d)
        left = closer.result()

    assert refused <= {tempo.Stopped, tempo.ShuttingDown}
    assert len(rest) + len(payloads(left or [])) == d.stats().accepted


def test_a_rest_ends_at_the_deadline_of_its_call_and_the_payload_is_accepted() -> None:
    with forever():
        d = half_full()
        producer = Worker(send, d, b"", 1500, 0.02)
        producer.result()

    assert len(payloads(drained(d))) == 1509
    assert d.stats().rejected == 0


def test_the_main_thread_does_not_rest_because_an_interrupt_would_end_that() -> None:
    with forever():
        d = half_full()
        send(d, b"", 20_000)

    assert len(payloads(drained(d))) == 20_009


def test_a_consumer_does_not_rest_in_the_body_of_its_loop() -> None:
    sent = 0

    def consume() -> None:
        nonlocal sent
        for _ in d:
            send(d, b"", 5000)
            sent += 5000
            if sent == 20_000:
                return

    with forever():
        d = half_full()
        Worker(consume).result()

    assert d.stats().accepted == 20_009
    assert not d._state.resting


def test_when_the_sentinel_goes_another_takes_its_place() -> None:
    d = half_full()
    with forever():
        first = Worker(send, d, b"a", 9999, 0.05)  # its rests end, one after the other
        wait_until(lambda: d._state.sentinel)
        second = Worker(send, d, b"b", 9999)
        first.result()
        resting(d, 1)
        assert d._state.sentinel is d._state.resting[0]
        while second.is_alive():
            with contextlib.suppress(queue.Empty):
                d.get(timeout=0)
        second.result()
    d._check()


def test_a_resting_producer_that_is_interrupted_is_told_that_its_payload_was_accepted() -> None:
    parked = threading.Event()

    def park(self: object, pause: float, remaining: float) -> bool:
        parked.set()
        raise KeyboardInterrupt

    d = half_full()
    accepted = d.stats().accepted

    def many() -> int:
        with pytest.raises(KeyboardInterrupt) as caught:
            d.enqueue_many((b"%05d" % i for i in range(9999)), timeout=None)
        taken: int = caught.value.accepted  # type: ignore[attr-defined]
        return taken

    with mock.patch.object(tempo._Parker, "park", park):
        taken = Worker(many).result()

    assert parked.is_set()
    assert taken == d.stats().accepted - accepted
    assert not d._state.resting
    assert d._state.sentinel is None
    d._check()


@pytest.mark.parametrize("consumers", [1, 3])
def test_many_producers_that_rest_and_wait_lose_nothing_and_none_starves(consumers: int) -> None:
    d = make(interval=0.01, max_batch_bytes=16 * tempo.KiB, max_buffered_bytes=128 * tempo.KiB)
    producers = [Worker(send, d, b"%02d" % name, 3000) for name in range(16)]
    takers = [Worker(lambda: payloads(d)) for _ in range(consumers)]
    for producer in producers:
        producer.result()
    d.shutdown()
    received = [taker.result() for taker in takers]

    came = Counter(item for items in received for item in items)
    assert came == Counter(b"%02d%05d" % (name, i) for name in range(16) for i in range(3000))
    if consumers == 1:
        for name in range(16):
            assert [item for item in received[0] if item[:2] == b"%02d" % name] == [
                b"%02d%05d" % (name, i) for i in range(3000)
            ]
    assert conserved(d).rejected == 0
    d._check()


def test_a_producer_that_would_not_wait_does_not_rest() -> None:
    d = half_full()
    with forever():
        Worker(send, d, b"", 3000, 0.0).result()

    assert not d._state.resting
    d.stop()


def test_all_who_rest_go_on_when_no_consumer_came_and_rest_no_more() -> None:
    with forever():
        d = half_full()
        producers = []
        for i in range(3):
            producers.append(Worker(send, d, b"%d" % i, 2000, LONG))
            resting(d, i + 1)

        d._locked(d._state, d._queue_locked, d._state.sentinel, False)  # as it does when its patience is over

        assert d._state.away
        for producer in producers:
            producer.result()
    assert not d._state.resting
    d.stop()


@pytest.mark.parametrize(("held", "rests"), [(512, True), (511, False)])
def test_producers_rest_from_half_full_on(held: int, rests: bool) -> None:
    d = make(max_batch_bytes=64 * tempo.KiB)
    d.enqueue(bytes(held * tempo.KiB))
    waiting: list[tempo._Parker] = []

    Worker(d._locked, d._state, d._rest_locked, waiting).result()

    assert bool(waiting) is rests
    d.stop()


def test_the_sentinel_lets_one_more_producer_go_on_when_a_consumer_came() -> None:
    with forever():
        d = half_full()
        producers = []
        for i in range(4):
            producers.append(Worker(send, d, b"%d" % i, 2000, LONG))
            resting(d, i + 1)
        sentinel = d._state.sentinel
        assert sentinel is not None
        sentinel.target = -1  # bytes taken as it looked last
        d._state.resting.rotate(-1)  # it is not the first
        left = set(d._state.resting)

        def section(s: Any) -> None:
            d._queue_locked(s, sentinel, False)
            left.difference_update(s.resting)

        d._locked(d._state, section)

        assert len(left) == 1
        d.stop()
        for producer in producers:
            with contextlib.suppress(tempo.Stopped):
                producer.result()


# Credit: payloads accepted unseen


@pytest.mark.parametrize("size", [0, 1, 100, 512, 5000])
@pytest.mark.parametrize("limit", [300, 5000, LARGE, 4 * tempo.MiB])
@pytest.mark.parametrize("max_batch_bytes", [64, 32 * tempo.KiB, None])
def test_batches_that_begin_and_end_unseen_are_cut_where_they_should_be(
    size: int, limit: int, max_batch_bytes: int | None
) -> None:
    rng = random.Random(size)
    d = make(max_buffered_bytes=limit, max_batch_bytes=max_batch_bytes)
    sent: list[bytes] = []
    batches: list[tempo.Batch] = []
    item = b""
    while len(sent) < 6000:
        if refusal(d.enqueue, item) is None:
            sent.append(item)
            item = (b"%05d" % len(sent)).ljust(size, b".")[: rng.randrange(size + 1)]
            continue
        room = d.stats().buffered_bytes
        with contextlib.suppress(queue.Empty):
            while True:
                batches.append(d.get(timeout=0))
        if d.stats().buffered_bytes == room:
            break  # nothing has closed, so nothing makes room
    d._check()
    batches += d.stop()

    assert len(sent) == 6000 or limit < 6000 * max(1, size)
    assert [batch.tolist() for batch in batches] == greedy(sent, max_batch_bytes)


def test_the_credit_follows_the_size_of_the_payloads() -> None:
    d = make(max_buffered_bytes=4 * tempo.MiB, max_batch_bytes=tempo.MiB)
    small = d._state.small
    for _ in range(100):
        d.enqueue(bytes(10_000))
    grown = d._state.small
    while d.stats().buffered < 2000:
        d.enqueue(bytes(100))
    d.flush(0)
    for _ in range(3):
        with contextlib.suppress(queue.Empty):
            d.get(timeout=0)

    assert (small, grown, d._state.small) == (512, 10_000, 100)
    d._check()


@pytest.mark.parametrize(("size", "fits"), [(3000, True), (tempo.MiB - 2000, False)])
def test_a_payload_larger_than_the_credit_covers_is_not_counted_by_another(size: int, fits: bool) -> None:
    d = make()
    d.enqueue(bytes(1001))
    d.enqueue(b"unseen" * 200)
    inbox = eager(d)
    inbox.after = lambda: Worker(d.flush, 0).result()

    outcome = refusal(d.enqueue, b"L" * size)

    batches = [[len(item) for item in batch.tolist()] for batch in d.stop()]
    assert outcome is (None if fits else tempo.QueueFull)
    assert batches == [[1001, 1200], *[[size]] * fits]


@LIMITS
def test_a_batch_that_begins_late_has_its_whole_interval(limit: int) -> None:
    d, clock = with_clock(max_buffered_bytes=max(limit, 2000), max_batch_bytes=1000, interval=1.0)
    d.enqueue(bytes(600))
    clock.now += 0.9
    d.enqueue(bytes(500))
    clock.now += 0.2

    assert len(d.get(timeout=0).data) == 600
    with pytest.raises(queue.Empty):
        d.get(timeout=0)
    clock.now += 0.8
    assert len(d.get(timeout=0).data) == 500


def test_at_a_pace_a_batch_may_begin_unseen_and_counts_from_the_credit() -> None:
    d, clock = with_clock(max_batch_bytes=10_000, interval=8.0)
    for _ in range(800):
        d.enqueue(bytes(100))
        clock.now += 0.001
    while d.stats().buffered_bytes >= 10_000:
        assert d.get(timeout=0).nbytes == 10_000
    d.enqueue(bytes(100))
    clock.now += 6.5
    with pytest.raises(queue.Empty):
        d.get(timeout=0)  # an eighth of the interval is the most that is missing
    clock.now += 1.5

    assert d.get(timeout=0).nbytes == 100


def test_the_peak_counts_what_a_nested_call_adds_before_a_batch_leaves() -> None:
    d = make(max_buffered_bytes=1000, max_batch_bytes=500)
    d.enqueue(bytes(500))
    did: list[int] = []

    def once(d: tempo.Dispatcher) -> None:
        if not did:
            did.append(1)
            d.enqueue(bytes(400))
            assert d.stats().peak_buffered_bytes == 900

    with after_each_count(once):
        d.get()

    assert d.stats().peak_buffered_bytes == 900


@pytest.mark.parametrize("end", ["shutdown", "stop"])
def test_a_nested_call_that_sees_the_end_is_not_accepted(end: str) -> None:
    seen: list[tuple[str, type[BaseException] | None]] = []

    def look(d: tempo.Dispatcher) -> None:
        if len(seen) < 20:  # each call has the section settle once more
            state = d.stats().state
            seen.append((state, refusal(d.enqueue, b"n")))

    d = make()
    d.enqueue(b"a")
    with after_each_count(look), contextlib.suppress(tempo.DrainTimeout):
        Worker(getattr(d, end), *([0] if end == "shutdown" else [])).result()

    assert all((outcome is None) == (state == "running") for state, outcome in seen)
    assert {state for state, _ in seen} > {"running"}


def test_an_interrupt_before_the_lock_takes_the_payload_out_again_in_a_nested_call_too() -> None:
    d = make()

    def section(s: Any) -> None:
        interrupted = mock.patch.object(tempo.Dispatcher, "_enqueue", side_effect=KeyboardInterrupt)
        with interrupted, pytest.raises(KeyboardInterrupt):
            d.enqueue(b"interrupted")

    d._locked(d._state, section)
    section(None)

    assert payloads(d.stop()) == []


def test_a_payload_as_large_as_the_credit_covers_is_accepted_unseen() -> None:
    d = make()
    d.enqueue(bytes(512))

    d.enqueue(bytes(512))

    assert d._state.covers == 512
    assert len(d._state.inbox) == 2  # the header, and the payload that nobody has counted yet
    d._check()


def test_at_a_slow_pace_each_batch_has_its_whole_interval() -> None:
    d, clock = with_clock(max_batch_bytes=1000, interval=8.0)
    for _ in range(205):
        d.enqueue(bytes(100))
        clock.now += 0.1
    clock.now += 6.5
    for _ in range(20):
        assert d.get(timeout=0).nbytes == 1000

    with pytest.raises(queue.Empty):
        d.get(timeout=0)  # its first payload came 7 s ago
    clock.now += 1.0

    assert d.get(timeout=0).nbytes == 500


def test_payloads_that_come_as_the_credit_is_withdrawn_are_accepted_as_far_as_it_went() -> None:
    d = make()
    d.enqueue(b"a")
    places = d._state.places

    class Growing(list):  # type: ignore[type-arg]
        def __setitem__(self, key: Any, value: Any) -> None:
            while grows and len(self) < places:
                self.append(b"b")  # as producers that had looked at s.places before it was withdrawn
            grows.clear()
            super().__setitem__(key, value)

    grows = [True]
    assert places > 2
    d._state.inbox = Growing(d._state.inbox)
    d._locked(d._state, d._count_locked)

    assert conserved(d).accepted == places
    assert payloads(d.stop()) == [b"a", *[b"b"] * (places - 1)]


def test_credit_covers_the_largest_payload_that_it_may() -> None:
    d = make()
    most = d._most_small
    assert most > d._state.small

    d.enqueue(bytes(most))

    assert d._state.small == most


@pytest.mark.parametrize("size", [511, 512, 513])
def test_credit_behind_a_nested_payload_goes_as_far_as_there_is_room(size: int) -> None:
    d = make(max_buffered_bytes=LARGE)
    d.enqueue_many([bytes(512)] * (LARGE // 512 - 3))
    d._locked(d._state, lambda s: None)
    assert d._state.places == 1 + 3  # credit for all that there is room for

    def section(s: Any) -> None:
        d.enqueue(bytes(size))
        while len(s.inbox) < 1 + 3:
            s.inbox.append(bytes(512))  # of producers that had seen the places before

    d._locked(d._state, section)

    if size <= 512:
        assert d.stats().buffered_bytes == LARGE - 512 + size
    assert d.stats().buffered_bytes <= LARGE
    d._check()


# Many payloads in one call


@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 3000])
def test_enqueue_many_accepts_all_in_order_and_says_how_many(count: int) -> None:
    d = make(max_batch_bytes=1000)
    sent = [b"%d" % i * (i % 4) for i in range(count)]

    assert d.enqueue_many(sent) == count
    assert d.enqueue_many(iter(sent)) == count
    assert d.enqueue_many(payload for payload in sent) == count

    assert payloads(d.stop()) == sent * 3


@pytest.mark.parametrize("limit", [100, LARGE])
def test_enqueue_many_stops_at_the_first_that_does_not_fit(limit: int) -> None:
    d = make(max_buffered_bytes=limit)
    size = limit // 4
    sent = [b"%d" % i * size for i in range(6)]

    with pytest.raises(tempo.QueueFull) as caught:
        d.enqueue_many(sent)

    assert caught.value.accepted == 4
    assert (caught.value.needed, caught.value.buffered_bytes) == (size, limit)
    s = conserved(d)
    assert (s.rejected, s.rejected_bytes) == (1, size)
    assert payloads(d.stop()) == sent[:4]


@pytest.mark.parametrize("limit", [700, 1300, LARGE])
def test_enqueue_many_fills_the_buffer_to_the_exact_byte(limit: int) -> None:
    d = make(max_buffered_bytes=limit)

    with pytest.raises(tempo.QueueFull) as caught:
        d.enqueue_many(b"" if i % 2 else b"x" for i in range(limit + 1))

    assert caught.value.accepted == limit
    assert conserved(d).buffered_bytes == limit


def test_enqueue_many_does_not_take_what_comes_after_one_that_does_not_fit() -> None:
    d = make(max_buffered_bytes=10)

    with pytest.raises(tempo.QueueFull) as caught:
        d.enqueue_many([b"12345678", b"123", b"1"])

    assert caught.value.accepted == 1
    assert payloads(d.stop()) == [b"12345678"]


@LIMITS
def test_enqueue_many_stops_at_a_payload_that_is_too_large(limit: int) -> None:
    d = make(max_buffered_bytes=limit)

    with pytest.raises(tempo.PayloadTooLarge) as caught:
        d.enqueue_many([b"a", b"b", b"x" * (limit + 1), b"c"], timeout=None)

    assert caught.value.accepted == 2
    assert d.stats().rejected == 1
    assert payloads(d.stop()) == [b"a", b"b"]


@pytest.mark.parametrize("at", [0, 1, 511, 512, 600])
def test_enqueue_many_keeps_what_came_before_a_bad_payload(at: int) -> None:
    d = make()
    sent: list[Any] = [b"%d" % i for i in range(1000)]
    sent[at] = "text"

    with pytest.raises(TypeError) as caught:
        d.enqueue_many(sent)

    assert getattr(caught.value, "accepted", None) == at
    assert d.stats().rejected == 0
    assert payloads(d.stop()) == sent[:at]


@pytest.mark.parametrize("at", [0, 1, 511, 512, 600])
def test_enqueue_many_keeps_what_an_iterable_gave_before_it_raised(at: int) -> None:
    def source() -> Iterator[bytes]:
        for i in range(at):
            yield b"%d" % i
        raise ZeroDivisionError

    d = make()

    with pytest.raises(ZeroDivisionError) as caught:
        d.enqueue_many(source())

    assert getattr(caught.value, "accepted", None) == at
    assert payloads(d.stop()) == [b"%d" % i for i in range(at)]


def test_enqueue_many_raises_what_comes_first_in_order() -> None:
    d = make(max_buffered_bytes=3)
    sent: Any = [b"aa", b"bb", 3]

    with pytest.raises(tempo.QueueFull) as caught:
        d.enqueue_many(sent)

    assert caught.value.accepted == 1


def test_enqueue_many_passes_an_error_on_that_takes_no_attributes() -> None:
    class Slotted(Exception):
        def __setattr__(self, name: str, value: object) -> None:
            raise ZeroDivisionError

    def source() -> Iterator[bytes]:
        yield b"a"
        raise Slotted

    d = make()

    with pytest.raises(Slotted):
        d.enqueue_many(source())

    assert payloads(d.stop()) == [b"a"]


@LIMITS
def test_enqueue_many_waits_for_room_as_often_as_it_must(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=limit // 2)
    sent = [(b"%02d" % i).ljust(limit // 4, b".") for i in range(40)]
    producer = Worker(d.enqueue_many, sent, timeout=None)

    received: list[bytes] = []
    while len(received) < len(sent):
        received += d.get(timeout=LIMIT).tolist()

    assert producer.result() == 40
    assert received == sent


@LIMITS
def test_a_shutdown_midway_tells_enqueue_many_what_was_taken(limit: int) -> None:
    d = make(max_buffered_bytes=limit)
    producer = Worker(d.enqueue_many, [b"x" * (limit // 2)] * 3, timeout=None)
    wait_until(lambda: d.stats().waiting_producers)

    closer = closing(d)

    with pytest.raises(tempo.ShuttingDown) as caught:
        producer.result()
    assert caught.value.accepted == 2
    assert len(payloads(d)) == 2
    closer.result()


def test_a_stop_from_the_iterable_tells_enqueue_many_what_was_taken() -> None:
    left: list[tempo.Batch] = []

    def source() -> Iterator[bytes]:
        for i in range(2000):
            if i == 1200:
                left.extend(d.stop())
            yield b"%d" % i

    d = make()

    with pytest.raises(tempo.Stopped) as caught:
        d.enqueue_many(source())

    assert payloads(left) == [b"%d" % i for i in range(caught.value.accepted)]


@LIMITS
def test_enqueue_many_gives_up_at_the_deadline_with_what_was_taken(limit: int) -> None:
    d = make(max_buffered_bytes=limit)

    with pytest.raises(tempo.QueueFull) as caught:
        d.enqueue_many([b"x" * (limit // 2)] * 3, timeout=0.01)

    assert caught.value.accepted == 2
    assert conserved(d).waiting_producers == 0


def test_enqueue_many_has_one_deadline_for_all() -> None:
    d, clock = with_clock(max_buffered_bytes=1, max_batch_bytes=1)
    producer = Worker(d.enqueue_many, [b"1", b"2", b"3", b"4", b"5"], timeout=1.0)

    def blocked(accepted: int) -> bool:
        s = d.stats()
        return s.accepted == accepted and s.waiting_producers == 1

    wait_until(lambda: blocked(1))
    clock.now += 0.45
    d.get(timeout=0)
    wait_until(lambda: blocked(2))
    clock.now += 0.45
    d.get(timeout=0)
    wait_until(lambda: blocked(3))
    clock.now += 0.45

    with pytest.raises(tempo.QueueFull) as caught:
        producer.result()
    assert caught.value.accepted == 3


@pytest.mark.parametrize("limit", [4000, LARGE, tempo.MiB])
def test_the_iterable_of_enqueue_many_may_enqueue(limit: int) -> None:
    def source() -> Iterator[bytes]:
        for i in range(600):
            d.enqueue(b"n")
            if i % 100 == 0:
                assert d.enqueue_many([b"m", b"m"], timeout=None) == 2
                assert conserved(d).state == "running"
            yield b"%d" % i

    d = make(max_buffered_bytes=limit)

    assert d.enqueue_many(source()) == 600

    received = payloads(d.stop())
    assert [p for p in received if p not in (b"n", b"m")] == [b"%d" % i for i in range(600)]
    assert (received.count(b"n"), received.count(b"m")) == (600, 12)


def test_a_keyboard_interrupt_in_the_iterable_comes_out_at_once() -> None:
    raised = threading.Event()

    def source() -> Iterator[bytes]:
        yield b"aa"
        yield b"bb"
        raised.set()
        raise KeyboardInterrupt

    d = full(2)
    producer = Worker(d.enqueue_many, source(), timeout=None)

    while not raised.is_set():  # it may wait for room until then, and no longer
        with contextlib.suppress(queue.Empty):
            d.get(timeout=0.001)
    with pytest.raises(KeyboardInterrupt) as caught:
        producer.result()

    assert getattr(caught.value, "accepted", None) == d.stats().accepted - 1


def test_enqueue_many_takes_nothing_out_of_an_iterator_that_it_does_not_offer() -> None:
    d = make(max_buffered_bytes=4)
    source = iter([b"%d" % i for i in range(10)])

    with pytest.raises(tempo.QueueFull) as caught:
        d.enqueue_many(source)

    assert caught.value.accepted == 4
    assert next(source) == b"5"


def test_enqueue_many_admits_a_list_512_at_a_time() -> None:
    d = make()
    real = tempo.Dispatcher._enqueue_chunk
    admitted = []

    def watched(self: tempo.Dispatcher, chunk: Sequence[bytes], *args: Any) -> int:
        admitted.append(len(chunk))
        return real(self, chunk, *args)

    with mock.patch.object(tempo.Dispatcher, "_enqueue_chunk", watched):
        assert d.enqueue_many([b"x"] * 1200) == 1200

    assert admitted == [512, 512, 176]


@contextlib.contextmanager
def chunks_admitted() -> Iterator[list[int]]:
    """How many payloads each locked section of enqueue_many admits."""
    real = tempo.Dispatcher._enqueue_chunk
    admitted: list[int] = []

    def watched(self: tempo.Dispatcher, *args: Any) -> int:
        admitted.append(real(self, *args))
        return admitted[-1]

    with mock.patch.object(tempo.Dispatcher, "_enqueue_chunk", watched):
        yield admitted


def test_enqueue_many_that_would_not_wait_goes_past_those_who_do_in_one_section() -> None:
    d = make(max_buffered_bytes=SMALL)
    d.enqueue(bytes(60))
    producer = waiter(d, bytes(50))
    with chunks_admitted() as admitted:
        d.enqueue_many([b"0123456789"] * 2)

    assert admitted == [2]
    d.stop()
    with pytest.raises(tempo.Stopped):
        producer.result()


def test_enqueue_many_admits_what_fits_in_one_section() -> None:
    d = make(max_buffered_bytes=SMALL)
    with chunks_admitted() as admitted, pytest.raises(tempo.QueueFull):
        d.enqueue_many([b""] * (SMALL - 10) + [b"12345"] * 5)

    assert admitted[0] == SMALL - 10 + 2


# Batch


def shape(name: str) -> tuple[list[bytes], list[tempo.Batch]]:
    """Payloads, and the batches that they came in, for every way in which tempo stores and cuts them."""
    small = [b"%d" % i * (i % 5) for i in range(4000)]
    sent = {
        "one": [b"only"],
        "empty": [b""] * 700,
        "few": [b"one", b"", b"three"],
        "packed": small,
        "cut": small,
        "partly taken": small,
        "objects": [bytes([i % 256]) * 1000 for i in range(500)],
        "mixed": [b"%d" % i * (i * 37 % 200) for i in range(1500)],
    }[name]
    d = make(max_batch_bytes={"cut": 997, "partly taken": 701, "mixed": 5003}.get(name))
    batches = []
    for i in range(0, len(sent), 600):
        for payload in sent[i : i + 300]:
            d.enqueue(payload)
        d.enqueue_many(sent[i + 300 : i + 600])
        if name == "partly taken":
            batches.append(d.get(timeout=0))
    d.flush(0)
    while d.stats().buffered:
        batches.append(d.get(timeout=0))
    return sent, batches


SHAPES = pytest.mark.parametrize("name", ["one", "empty", "few", "packed", "cut", "partly taken", "objects", "mixed"])


def batch_of(*items: bytes) -> tempo.Batch:
    d = make()
    d.enqueue_many(items)
    (batch,) = d.stop()
    return batch


@SHAPES
def test_batches_hold_the_payloads_in_order_each_way_they_are_read(name: str) -> None:
    sent, batches = shape(name)

    assert payloads(batches) == sent
    for batch in batches:
        items = batch.tolist()
        assert [bytes(view) for view in batch] == items
        assert [bytes(batch[i]) for i in range(len(batch))] == items
        assert [bytes(view) for view in batch[:]] == items
        assert b"".join(items) == bytes(batch.data)
        assert batch.nbytes == len(batch.data) == sum(map(len, items))
        assert len(batch) == len(items) > 0


@SHAPES
def test_a_batch_is_a_sequence(name: str) -> None:
    for batch in shape(name)[1][:3]:
        items = batch.tolist()
        n = len(items)
        assert isinstance(batch, Sequence)
        assert batch[-1] == items[-1]
        assert batch[-n] == items[0]
        assert [bytes(view) for view in reversed(batch)] == items[::-1]
        for index in (n, -n - 1, 10**20):
            with pytest.raises(IndexError):
                batch[index]
        for cut in (slice(1, 3), slice(None, None, -1), slice(-2, None), slice(5, 2), slice(None, None, 7)):
            views = batch[cut]
            assert type(views) is list
            assert all(type(view) is memoryview for view in views)
            assert [bytes(view) for view in views] == items[cut]


def test_a_batch_finds_its_payloads() -> None:
    batch = batch_of(b"a", b"x", b"", b"x")
    absent: Any = b"y"
    present: Any = b"x"

    assert present in batch
    assert absent not in batch
    assert batch.index(present) == 1
    assert batch.count(present) == 2


def test_a_batch_refuses_an_index_that_is_no_index() -> None:
    batch: Any = batch_of(b"a")

    for index in ("0", 0.0, None):
        with pytest.raises(TypeError):
            batch[index]


@SHAPES
def test_the_views_of_a_batch_are_read_only_bytes(name: str) -> None:
    for batch in shape(name)[1][:3]:
        for view in (batch.data, batch[0], batch[-1], next(iter(batch)), batch[:1][0]):
            assert type(view) is memoryview
            assert view.readonly
            assert view.c_contiguous
            assert (view.ndim, view.format, view.itemsize) == (1, "B", 1)
        if batch.nbytes:
            with pytest.raises(TypeError):
                batch.data[0] = 1


def test_a_batch_is_immutable() -> None:
    batch: Any = batch_of(b"a", b"b")

    for name in ("data", "nbytes", "new", "tolist", *type(batch).__slots__):
        with pytest.raises(AttributeError):
            setattr(batch, name, None)
        with pytest.raises(AttributeError):
            delattr(batch, name)
    with pytest.raises(TypeError):
        batch[0] = b"c"
    with pytest.raises(TypeError):
        del batch[0]

    assert batch.tolist() == [b"a", b"b"]


def test_the_list_of_a_batch_is_the_callers() -> None:
    batch = batch_of(b"a", b"b")

    batch.tolist().clear()

    assert batch.tolist() == [b"a", b"b"]


def test_releasing_a_view_does_not_harm_the_batch() -> None:
    batch = batch_of(b"one", b"two")

    with batch.data as view:
        assert bytes(view) == b"onetwo"
    with batch[0] as view:
        assert bytes(view) == b"one"
    for view in batch:
        view.release()

    assert batch.nbytes == 6
    assert bytes(batch.data) == b"onetwo"
    assert [bytes(view) for view in batch] == batch.tolist() == [b"one", b"two"]


def test_a_batch_of_one_payload_survives_the_release_of_its_view() -> None:
    batch = batch_of(b"only")

    with batch.data, batch[0]:
        pass

    assert batch.tolist() == [b"only"]
    assert bytes(batch.data) == bytes(batch[0]) == b"only"


@SHAPES
def test_a_batch_is_valid_after_the_dispatcher_is_gone(name: str) -> None:
    sent, batches = shape(name)  # the dispatcher was a local variable there

    gc.collect()

    assert payloads(batches) == sent


def test_a_batch_does_not_change_while_the_dispatcher_goes_on() -> None:
    d = make(max_batch_bytes=700)
    d.enqueue_many([b"%04d" % i for i in range(1000)])
    first = d.get()
    before = first.tolist()

    d.enqueue_many([b"-" * 4] * 2000)
    later = payloads(d.stop())

    assert first.tolist() == before == [b"%04d" % i for i in range(175)]
    assert later[:2] == [b"0175", b"0176"]


@SHAPES
def test_a_batch_can_be_pickled_and_copied(name: str) -> None:
    for batch in shape(name)[1][:3]:
        again = [pickle.loads(pickle.dumps(batch, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
        for other in [*again, copy.copy(batch), copy.deepcopy(batch)]:
            assert type(other) is tempo.Batch
            assert other.tolist() == batch.tolist()
            assert other.data == batch.data
            assert other.data.readonly


def test_a_batch_shows_its_size() -> None:
    assert repr(batch_of(b"one", b"", b"three")) == "<tempo.Batch 3 payloads, 8 bytes>"


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("max_batch_bytes", [None, 300, 5000])
@pytest.mark.parametrize("limit", [12_000, tempo.MiB])
def test_batches_are_right_where_sizes_take_eight_bytes(limit: int, max_batch_bytes: int | None, many: bool) -> None:
    giant = b"g" * 2500
    sent = [b"", giant, b"", b"", giant, b"a", b"", b"x" * 999, b"y" * 1000, b"z" * 1001, b""]
    sent += [b"%d" % i for i in range(60)] + [b"", giant]
    with mock.patch.object(tempo, "_UINT", 1000):  # as if four bytes did not hold it
        d = make(max_buffered_bytes=limit, max_batch_bytes=max_batch_bytes)
        received = []

        for _ in range(6):
            if many:
                d.enqueue_many(sent)
            else:
                for payload in sent:
                    d.enqueue(payload)
            d._check()
            if limit < tempo.MiB:
                d.flush(0)
                while d.stats().buffered:
                    received += d.get(timeout=0).tolist()
        for batch in d.stop():
            assert b"".join(batch.tolist()) == bytes(batch.data)
            received += [bytes(view) for view in batch]

    assert received == sent * 6


def test_four_bytes_hold_each_size_below_the_first_that_takes_eight() -> None:
    array("I", [tempo._UINT - 1])
    with pytest.raises(OverflowError):
        array("I", [tempo._UINT])


@pytest.mark.parametrize(("size", "typecode"), [(999, "I"), (1000, "Q")])
def test_the_ends_of_payloads_take_eight_bytes_where_four_do_not_hold_them(size: int, typecode: str) -> None:
    with mock.patch.object(tempo, "_UINT", 1000):
        batch = batch_of(b"a", b"x" * (size - 1))

        assert bytes(batch[1]) == b"x" * (size - 1)
    assert batch._ends is not None
    assert batch._ends.typecode == typecode


# Stats


def test_stats_is_a_named_tuple_of_the_contracts_fields() -> None:
    s = make().stats()

    assert isinstance(s, tuple)
    assert set(s._fields) == {
        "accepted", "delivered", "in_flight", "buffered", "discarded", "rejected", "failed",
        "accepted_bytes", "delivered_bytes", "in_flight_bytes", "buffered_bytes", "discarded_bytes", "rejected_bytes",
        "failed_bytes", "batches", "peak_buffered_bytes", "waiting_producers", "waiting_consumers", "state",
    }  # fmt: skip
    assert s[:-1] == (0,) * 18
    assert s.state == "running"


@LIMITS
def test_stats_are_conserved_at_each_stage_of_pull_mode(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=4)

    d.enqueue_many([b"", b"abc", b"d", b"ef", b""])
    s = conserved(d)
    assert (s.accepted, s.accepted_bytes, s.buffered, s.buffered_bytes, s.batches) == (5, 8, 5, 8, 0)

    assert d.get().tolist() == [b"", b"abc", b"d"]
    s = conserved(d)
    assert (s.delivered, s.delivered_bytes, s.buffered, s.buffered_bytes, s.batches) == (3, 5, 2, 3, 1)
    assert s.in_flight == 0

    d.stop()
    s = conserved(d)
    assert (s.accepted, s.discarded, s.discarded_bytes, s.buffered, s.batches) == (5, 2, 3, 0, 1)


@LIMITS
def test_stats_are_conserved_at_each_stage_of_push_mode(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=3)
    entered, leave = threading.Semaphore(0), threading.Semaphore(0)
    errors: list[tuple[str, list[bytes]]] = []

    def handler(batch: tempo.Batch) -> None:
        entered.release()
        assert leave.acquire(timeout=LIMIT)
        if batch.tolist() == [b"bad"]:
            raise ValueError("bad")

    d.start(handler, on_error=lambda exc, batch: errors.append((str(exc), batch.tolist())))
    d.enqueue_many([b"", b"abc", b"bad", b"left"])
    assert entered.acquire(timeout=LIMIT)
    s = conserved(d)
    assert (s.in_flight, s.in_flight_bytes, s.delivered, s.buffered, s.buffered_bytes) == (2, 4, 0, 2, 7)

    leave.release()
    assert entered.acquire(timeout=LIMIT)
    s = conserved(d)
    assert (s.in_flight, s.in_flight_bytes, s.delivered, s.delivered_bytes, s.failed) == (1, 3, 2, 4, 0)

    leave.release()
    assert entered.acquire(timeout=LIMIT)
    s = conserved(d)
    assert (s.failed, s.failed_bytes, s.delivered, s.in_flight, s.batches) == (1, 3, 3, 1, 3)
    assert errors == [("bad", [b"bad"])]

    d.enqueue(b"handed back")
    assert payloads(d.stop()) == [b"handed back"]
    s = conserved(d)
    assert (s.in_flight, s.discarded, s.state) == (1, 1, "stopped")
    leave.release()
    wait_until(lambda: d.stats().in_flight == 0)
    assert conserved(d).delivered == 4


@LIMITS
def test_the_peak_is_the_most_that_was_buffered(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=1)

    for _ in range(3):
        for _ in range(30):
            d.enqueue(b"x")
        while d.stats().buffered:
            d.get()
    d.enqueue(b"x" * 20)

    assert conserved(d).peak_buffered_bytes == 30


@LIMITS
def test_the_peak_counts_what_was_accepted_without_the_lock(limit: int) -> None:
    d = make(max_buffered_bytes=limit)

    for _ in range(40):
        d.enqueue(b"x")
    d.stop()

    assert d.stats().peak_buffered_bytes == 40


@LIMITS
def test_refusals_are_counted_one_a_call_with_tempos_errors_only(limit: int) -> None:
    d = full(limit)
    calls: list[tuple[Any, int]] = [
        (lambda: d.enqueue(b"abc"), 3),
        (lambda: d.enqueue(b""), 1),
        (lambda: d.enqueue(b"x" * (limit + 1)), limit + 1),
        (lambda: d.enqueue(b"ab", timeout=0.001), 2),
        (lambda: d.enqueue_many([b"abcd", b"e", b"f"]), 4),
    ]
    count = total = 0

    for call, charge in calls:
        with pytest.raises(tempo.Error):
            call()
        count, total = count + 1, total + charge
        s = conserved(d)
        assert (s.rejected, s.rejected_bytes) == (count, total)
    d.stop()
    with pytest.raises(tempo.Stopped):
        d.enqueue(b"late")
    with pytest.raises(TypeError):
        d.enqueue_many(3)  # type: ignore[arg-type]

    s = conserved(d)
    assert (s.rejected, s.rejected_bytes) == (count + 1, total + 4)


def test_stats_show_who_waits() -> None:
    d = full(SMALL)
    blocked = [waiter(d, b"y") for _ in range(3)]
    assert conserved(d).waiting_producers == 3
    left = d.stop()
    for worker in blocked:
        with pytest.raises(tempo.Stopped):
            worker.result()
    idle = make()
    consumers = [Worker(idle.get) for _ in range(3)]
    wait_until(lambda: idle.stats().waiting_consumers == 3)
    idle.stop()
    for worker in consumers:
        with pytest.raises(tempo.Stopped):
            worker.result()

    assert len(left) == 1
    assert (d.stats().waiting_producers, idle.stats().waiting_consumers) == (0, 0)


def test_the_state_goes_from_running_over_shutting_down_to_stopped() -> None:
    d = make()
    d.enqueue(b"a")
    states = [d.stats().state]

    closer = closing(d)
    states.append(d.stats().state)
    assert payloads(d) == [b"a"]
    closer.result()
    states.append(d.stats().state)

    assert states == ["running", "shutting_down", "stopped"]


def test_a_dispatcher_shows_its_state_and_its_fill() -> None:
    d = make(max_buffered_bytes=12345)
    d.enqueue(b"abc")
    d.enqueue(b"")

    assert repr(d) == "<tempo.Dispatcher running 2 buffered, 4 of 12345 bytes>"
    d.stop()
    assert repr(d) == "<tempo.Dispatcher stopped 0 buffered, 0 of 12345 bytes>"


@LIMITS
def test_a_flush_cuts_the_open_batch_where_it_stands(limit: int) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=10)

    d.enqueue(b"a")
    d.enqueue(b"b")
    assert not d.flush(0)
    d.enqueue(b"c")
    assert not d.flush(timeout=0)
    assert not d.flush(timeout=0)
    d.enqueue(b"d")

    assert [batch.tolist() for batch in d.stop()] == [[b"a", b"b"], [b"c"], [b"d"]]


# Consumers: get, iteration, and the timer that they are


def run_python(*args: str, cwd: Path | None = None, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run the interpreter in a process of its own, with tempo importable; the caller looks at the outcome."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.parametrize("timeout", [0, 0.01])
def test_get_raises_empty_when_no_batch_is_due_in_time(timeout: float) -> None:
    d = make()
    d.enqueue(b"not due yet")
    with pytest.raises(queue.Empty):
        d.get(timeout=timeout)
    assert d.stats().buffered == 1
    assert d.stats().waiting_consumers == 0


def test_get_raises_stopped_after_the_drain() -> None:
    d = make()
    d.shutdown()
    with pytest.raises(tempo.Stopped):
        d.get()


def test_get_raises_stopped_after_stop() -> None:
    d = make()
    d.enqueue(b"handed back")
    d.stop()
    with pytest.raises(tempo.Stopped):
        d.get(timeout=0)


@pytest.mark.parametrize(("timeout", "error"), [(-1, ValueError), (float("nan"), ValueError), ("1", TypeError)])
def test_get_refuses_a_bad_timeout_and_takes_nothing(timeout: Any, error: type[Exception]) -> None:
    d = make(max_batch_bytes=1)
    d.enqueue(b"x")
    with pytest.raises(error):
        d.get(timeout=timeout)
    assert d.get(timeout=0).tolist() == [b"x"]


def test_the_iterator_ends_after_the_drain() -> None:
    d = make(max_batch_bytes=2)
    consumer = Worker(list, d)
    d.enqueue_many([b"aa", b"bb", b"c"])
    d.shutdown()
    assert payloads(consumer.result()) == [b"aa", b"bb", b"c"]
    assert list(d.batches()) == []


def test_the_iterator_ends_at_once_after_stop() -> None:
    d = make(max_batch_bytes=1)
    d.enqueue_many([b"a", b"b", b"c"])
    seen = []
    for batch in d:
        seen += batch.tolist()
        back = d.stop()
    assert seen == [b"a"]
    assert payloads(back) == [b"b", b"c"]


@pytest.mark.parametrize("consumers", [2, 8])
def test_each_batch_goes_to_exactly_one_of_several_consumers(consumers: int) -> None:
    d = make(interval=0.01, max_batch_bytes=64)
    workers = [Worker(list, d) for _ in range(consumers)]
    sent = [b"%06d" % i for i in range(3000)]
    for payload in sent:
        d.enqueue(payload, timeout=LIMIT)
    d.shutdown(timeout=LIMIT)
    taken = [worker.result() for worker in workers]
    assert sorted(payloads([batch for batches in taken for batch in batches])) == sent
    assert d.stats().batches == sum(map(len, taken))


def test_a_batch_is_due_when_its_first_payload_has_waited_the_interval() -> None:
    d, clock = with_clock(interval=4)
    d.enqueue(b"first")
    clock.now += 3.5
    d.enqueue(b"second")
    with pytest.raises(queue.Empty):
        d.get(timeout=0)
    clock.now += 0.5
    assert d.get(timeout=0).tolist() == [b"first", b"second"]


def test_the_interval_starts_anew_with_each_batch() -> None:
    d, clock = with_clock(interval=4)
    d.enqueue(b"first")
    clock.now += 4
    d.get(timeout=0)
    clock.now += 100
    d.enqueue(b"second")
    clock.now += 3
    with pytest.raises(queue.Empty):
        d.get(timeout=0)
    clock.now += 1
    assert d.get(timeout=0).tolist() == [b"second"]


def test_a_waiting_consumer_gets_the_batch_when_its_interval_is_over() -> None:
    d = make(interval=0.02)
    consumer = Worker(d.get)
    wait_until(lambda: d.stats().waiting_consumers == 1)
    d.enqueue(b"x")
    assert consumer.result().tolist() == [b"x"]


def test_a_batch_that_is_due_keeps_filling_while_no_consumer_asks() -> None:
    d, clock = with_clock(interval=1, max_batch_bytes=100)
    d.enqueue(b"first")
    clock.now += 5
    d.enqueue_many([b"second", b"third"])
    assert d.get(timeout=0).tolist() == [b"first", b"second", b"third"]


def test_a_batch_that_is_due_fills_up_to_the_batch_limit_only() -> None:
    d, clock = with_clock(interval=1, max_batch_bytes=10)
    d.enqueue(b"12345")
    clock.now += 5
    d.enqueue_many([b"67890", b"next"])
    assert d.get(timeout=0).tolist() == [b"12345", b"67890"]
    with pytest.raises(queue.Empty):
        d.get(timeout=0)


def test_payloads_that_come_while_the_handler_is_busy_leave_in_one_batch() -> None:
    entered, go_on = threading.Event(), threading.Event()
    taken = []

    def handler(batch: tempo.Batch) -> None:
        taken.append(batch)
        entered.set()
        assert go_on.wait(LIMIT)

    with make(interval=0.001) as d:
        d.start(handler)
        d.enqueue(b"first")
        assert entered.wait(LIMIT)
        for i in range(50):
            d.enqueue(b"%d" % i)
        go_on.set()
    assert [len(batch) for batch in taken] == [1, 50]


def test_the_timer_passes_to_the_next_consumer_when_the_first_leaves() -> None:
    d = make(interval=1.0)
    first = Worker(d.get, timeout=0.3)
    wait_until(lambda: d.stats().waiting_consumers == 1)
    second = Worker(d.get)
    wait_until(lambda: d.stats().waiting_consumers == 2)
    d.enqueue(b"x")
    with pytest.raises(queue.Empty):
        first.result()
    assert second.result().tolist() == [b"x"]


def test_a_consumer_that_leaves_passes_its_wake_up_on() -> None:
    d = make(max_batch_bytes=1)
    for _ in range(100):
        leaving = Worker(d.get, timeout=0.001)
        staying = Worker(d.get)
        d.enqueue(b"x")
        with contextlib.suppress(queue.Empty):
            leaving.result()
            d.enqueue(b"x")  # the leaving one had the first
        assert staying.result().tolist() == [b"x"]
    assert d.stats().buffered == 0


@pytest.mark.parametrize("limit", [1, None])
def test_several_waiting_consumers_share_several_batches(limit: int | None) -> None:
    d = make(max_batch_bytes=limit, interval=0.01)
    workers = [Worker(d.get, timeout=LIMIT) for _ in range(3)]
    wait_until(lambda: d.stats().waiting_consumers == 3)
    if limit:
        d.enqueue_many([b"a", b"b", b"c"])
    else:
        for left in (2, 1, 0):
            d.enqueue(b"abc"[left : left + 1])
            wait_until(lambda left=left: d.stats().waiting_consumers == left)  # type: ignore[misc]
    assert sorted(payloads(worker.result() for worker in workers)) == [b"a", b"b", b"c"]
    assert d.stats().waiting_consumers == 0


def test_pull_mode_starts_no_thread() -> None:
    before = threading.active_count()
    d = make(interval=0.001)
    d.enqueue(b"a")
    d.get(timeout=LIMIT)
    d.enqueue(b"b")
    d.flush(timeout=0)
    d.get(timeout=LIMIT)
    assert threading.active_count() == before
    d.shutdown()
    assert threading.active_count() == before


def test_of_several_waiting_consumers_the_first_alone_sees_to_the_open_batch() -> None:
    d = make()
    consumers = []
    for n in (1, 2):
        consumers.append(Worker(d.get))
        wait_until(lambda n=n: d.stats().waiting_consumers == n)  # type: ignore[misc]
    first, second = d._state.consumers

    d.enqueue(b"a")

    wait_until(lambda: first.armed and not first.woken)
    assert not (second.armed or second.woken)
    d.stop()
    for consumer in consumers:
        with pytest.raises(tempo.Stopped):
            consumer.result()


def test_a_wait_without_a_limit_is_one_for_the_lock() -> None:
    waits = []

    class Lock:
        def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
            waits.append((blocking, timeout))
            return True

    parker = tempo._Parker(Lock())

    assert not parker.park(float("inf"), float("inf"))
    assert waits[1:] == [(True, -1)]


def test_a_waiting_task_is_woken_once_for_several_batches() -> None:
    async def main() -> list[bytes]:
        loop = asyncio.get_running_loop()
        d = make(max_batch_bytes=1)
        task = asyncio.ensure_future(collect(d))
        while not d.stats().waiting_consumers:
            await asyncio.sleep(0)
        with mock.patch.object(loop, "call_soon_threadsafe", wraps=loop.call_soon_threadsafe) as wake:
            d.enqueue(b"a")
            d.enqueue(b"b")
            assert wake.call_count == 1
        d.shutdown()
        return await task

    assert run_async(main()) == [b"a", b"b"]


# Asyncio: the same without a thread


def run_async(work: Any) -> Any:
    """Run a coroutine in an event loop of its own, for at most LIMIT."""

    async def limited() -> Any:
        return await asyncio.wait_for(work, LIMIT)

    return asyncio.run(limited())


async def collect(d: tempo.Dispatcher) -> list[bytes]:
    """All payloads until the dispatcher ends."""
    taken = []
    async for batch in d:
        taken += batch.tolist()
    return taken


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop turn until condition() is true."""
    while not condition():
        await asyncio.sleep(0)


def test_async_for_delivers_everything_and_ends_after_the_drain() -> None:
    d = make(interval=0.005, max_batch_bytes=100)
    sent = [b"%05d" % i for i in range(2000)]

    def produce() -> None:
        for payload in sent:
            d.enqueue(payload, timeout=LIMIT)
        d.shutdown(timeout=LIMIT)

    producer = Worker(produce)
    assert run_async(collect(d)) == sent
    producer.result()


def test_async_for_ends_at_once_after_stop() -> None:
    d = make()

    async def main() -> list[bytes]:
        task = asyncio.ensure_future(collect(d))
        await until(lambda: d.stats().waiting_consumers)
        d.enqueue(b"handed back")
        assert payloads(d.stop()) == [b"handed back"]
        return await task

    assert run_async(main()) == []


def test_a_task_gets_the_batch_when_its_interval_is_over() -> None:
    d = make(interval=0.01)

    async def main() -> tempo.Batch:
        task = asyncio.ensure_future(d.__aiter__().__anext__())
        await until(lambda: d.stats().waiting_consumers)
        d.enqueue(b"x")
        return await task

    assert run_async(main()).tolist() == [b"x"]


def test_each_batch_goes_to_exactly_one_of_several_tasks() -> None:
    d = make(interval=0.005, max_batch_bytes=32)
    sent = [b"%05d" % i for i in range(2000)]

    def produce() -> None:
        for payload in sent:
            d.enqueue(payload, timeout=LIMIT)
        d.shutdown(timeout=LIMIT)

    async def main() -> list[list[bytes]]:
        return list(await asyncio.gather(*(collect(d) for _ in range(5))))

    producer = Worker(produce)
    taken = run_async(main())
    producer.result()
    assert sorted(payload for part in taken for payload in part) == sent


def test_tasks_and_threads_share_the_work() -> None:
    d = make(interval=0.005, max_batch_bytes=32)
    sent = [b"%05d" % i for i in range(2000)]
    thread = Worker(list, d)

    def produce() -> None:
        d.enqueue_many(sent, timeout=LIMIT)
        d.shutdown(timeout=LIMIT)

    producer = Worker(produce)
    taken = run_async(collect(d))
    producer.result()
    assert sorted(taken + payloads(thread.result())) == sent


def test_a_task_cancelled_while_it_waits_loses_nothing() -> None:
    d = make(max_batch_bytes=1)

    async def main() -> None:
        task = asyncio.ensure_future(collect(d))
        await until(lambda: d.stats().waiting_consumers)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_async(main())
    assert d.stats().waiting_consumers == 0
    d.enqueue(b"x")
    assert d.get(timeout=0).tolist() == [b"x"]


def test_a_task_cancelled_after_it_was_woken_passes_the_batch_on() -> None:
    d = make(max_batch_bytes=1)

    async def main() -> list[bytes]:
        first = asyncio.ensure_future(collect(d))
        await until(lambda: d.stats().waiting_consumers == 1)
        second = asyncio.ensure_future(d.__aiter__().__anext__())
        await until(lambda: d.stats().waiting_consumers == 2)
        d.enqueue(b"x")  # wakes the first, which does not come to it
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return (await second).tolist()

    assert run_async(main()) == [b"x"]


def test_wait_for_timeouts_lose_nothing() -> None:
    d = make(max_batch_bytes=1)
    sent = [b"%05d" % i for i in range(300)]

    def produce() -> None:
        for payload in sent:
            d.enqueue(payload)
            time.sleep(0.0005)  # load, not synchronisation: timeouts and batches have to cross

    async def main() -> list[bytes]:
        taken: list[bytes] = []
        while len(taken) < len(sent):
            with contextlib.suppress(asyncio.TimeoutError):
                taken += (await asyncio.wait_for(d.__aiter__().__anext__(), 0.0007)).tolist()
        return taken

    producer = Worker(produce)
    assert run_async(main()) == sent
    producer.result()
    assert d.stats().buffered == d.stats().waiting_consumers == 0


def test_a_waiting_task_does_not_poll() -> None:
    d = make()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with (
            mock.patch.object(loop, "call_at", wraps=loop.call_at) as timer,
            mock.patch.object(loop, "run_in_executor", wraps=loop.run_in_executor) as executor,
        ):
            task = asyncio.ensure_future(collect(d))
            await until(lambda: d.stats().waiting_consumers)
            with mock.patch.object(tempo.Dispatcher, "_locked", autospec=True) as locked:
                for _ in range(100):
                    await asyncio.sleep(0)
            assert not locked.called
            assert not timer.called
            assert not executor.called
            d.stop()
            await task

    run_async(main())


def test_a_thread_is_in_no_loops_body_when_the_wait_of_its_async_for_was_cancelled() -> None:
    d = make()

    async def cancelled() -> Any:
        iterator = d.__aiter__()
        task = asyncio.ensure_future(iterator.__anext__())
        while not d.stats().waiting_consumers:
            await asyncio.sleep(0)
        assert d._inside()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return iterator

    iterator = run_async(cancelled())
    assert not d._inside(), iterator  # which is alive


@pytest.mark.parametrize("method", ["shutdown", "flush"])
def test_waiting_methods_in_the_body_of_async_for_do_not_block_the_loop(method: str) -> None:
    d = make(max_batch_bytes=1)
    d.enqueue_many([b"a", b"b", b"c"])
    seen = []

    async def main() -> None:
        async for batch in d:
            seen.extend(batch.tolist())
            getattr(d, method)()
            if len(seen) == 3:
                d.shutdown()

    try:
        Worker(asyncio.run, main()).result()
    finally:
        d.stop()
    assert seen == [b"a", b"b", b"c"]


def test_shutdown_in_the_body_of_async_for_does_not_block_other_tasks_after_an_await() -> None:
    d = make(max_batch_bytes=1)
    d.enqueue_many([b"a", b"b", b"c", b"d"])

    async def consume() -> list[bytes]:
        taken = []
        async for batch in d:
            taken += batch.tolist()
            await asyncio.sleep(0)  # the other task is in its body now
            d.shutdown()
        return taken

    async def main() -> list[list[bytes]]:
        return list(await asyncio.gather(consume(), consume()))

    try:
        taken = Worker(asyncio.run, main()).result()
    finally:
        d.stop()
    assert sorted(payload for part in taken for payload in part) == [b"a", b"b", b"c", b"d"]


@pytest.mark.parametrize("limit", [1, None])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "stopped"])
@pytest.mark.parametrize("early", [True, False], ids=["get-first", "enqueue-first"])
def test_a_task_in_a_loop_that_no_longer_runs_does_not_starve_a_thread(
    limit: int | None, closed: bool, early: bool
) -> None:
    d = make(interval=0.05, max_batch_bytes=limit)
    loop = asyncio.new_event_loop()
    parked: Any = loop.create_task(collect(d))
    loop.run_until_complete(until(lambda: d.stats().waiting_consumers == 1))
    if closed:
        parked._log_destroy_pending = False  # it is left behind on purpose
        loop.close()
    try:
        if early:
            consumer = Worker(d.get)
            wait_until(lambda: d.stats().waiting_consumers == 2)
        d.enqueue(b"x")
        if not early:
            consumer = Worker(d.get)
        assert consumer.result().tolist() == [b"x"]
    finally:
        d.stop()
        if not closed:
            loop.run_until_complete(parked)
            loop.close()


# Push: start and the handler


def test_the_handler_is_called_on_one_daemon_thread() -> None:
    threads = []
    with make(max_batch_bytes=1) as d:
        d.start(lambda batch: threads.append(threading.current_thread()))
        d.enqueue_many([b"a", b"b", b"c"])
    assert len(threads) == 3
    assert len(set(threads)) == 1
    assert threads[0].daemon
    assert threads[0] is not threading.current_thread()


def test_the_handler_gets_everything_in_order() -> None:
    taken: list[bytes] = []
    sent = [b"%05d" % i for i in range(3000)]
    with make(interval=0.005, max_batch_bytes=200) as d:
        d.start(lambda batch: taken.extend(batch.tolist()))
        for payload in sent:
            d.enqueue(payload, timeout=LIMIT)
    assert taken == sent


class Gate:
    """A handler that stays in its first batches until it is told to go on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.taken: list[bytes] = []

    def __call__(self, batch: tempo.Batch) -> None:
        self.taken += batch.tolist()
        self.entered.set()
        assert self.go_on.wait(LIMIT)


def test_a_batch_is_in_flight_while_the_handler_has_it() -> None:
    gate = Gate()
    with make(max_batch_bytes=1) as d:
        d.start(gate)
        d.enqueue(b"abc")
        assert gate.entered.wait(LIMIT)
        during = d.stats()
        gate.go_on.set()
    after = d.stats()
    assert (during.in_flight, during.in_flight_bytes, during.delivered, during.buffered) == (1, 3, 0, 0)
    assert (after.in_flight, after.in_flight_bytes, after.delivered, after.delivered_bytes) == (0, 0, 1, 3)


def test_the_bytes_are_released_when_the_handler_receives_the_batch() -> None:
    gate = Gate()
    with make(max_batch_bytes=1, max_buffered_bytes=10) as d:
        d.start(gate)
        d.enqueue(b"0123456789")
        assert gate.entered.wait(LIMIT)
        d.enqueue(b"0123456789")
        with pytest.raises(tempo.QueueFull):
            d.enqueue(b"x")
        gate.go_on.set()
    assert gate.taken == [b"0123456789"] * 2


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_a_handler_that_raises_fails_its_batch_and_goes_on(error: BaseException) -> None:
    seen: list[bytes] = []
    errors: list[tuple[BaseException, list[bytes]]] = []

    def handler(batch: tempo.Batch) -> None:
        seen.extend(batch.tolist())
        if batch.tolist() == [b"bad"]:
            raise error

    with make(max_batch_bytes=1) as d:
        d.start(handler, on_error=lambda exc, batch: errors.append((exc, batch.tolist())))
        d.enqueue_many([b"bad", b"good"])
    assert seen == [b"bad", b"good"]
    assert errors == [(error, [b"bad"])]
    stats = d.stats()
    assert (stats.failed, stats.failed_bytes, stats.delivered, stats.in_flight) == (1, 3, 2, 0)


def test_by_default_a_raising_handler_is_reported_to_threading_excepthook() -> None:
    error = ValueError("bad")

    def handler(batch: tempo.Batch) -> None:
        raise error

    with mock.patch("threading.excepthook") as hook, make(max_batch_bytes=1) as d:
        d.start(handler)
        d.enqueue(b"x")
    (args,) = hook.call_args.args
    assert (args.exc_type, args.exc_value, args.exc_traceback) == (ValueError, error, error.__traceback__)
    assert isinstance(args.thread, threading.Thread)


def test_an_on_error_that_raises_does_not_end_the_thread() -> None:
    seen: list[bytes] = []
    again = RuntimeError("on_error itself")

    def handler(batch: tempo.Batch) -> None:
        seen.extend(batch.tolist())
        raise ValueError

    def on_error(exc: BaseException, batch: tempo.Batch) -> None:
        raise again

    with mock.patch("threading.excepthook") as hook, make(max_batch_bytes=1) as d:
        d.start(handler, on_error=on_error)
        d.enqueue_many([b"a", b"b"])
    assert seen == [b"a", b"b"]
    assert [call.args[0].exc_value for call in hook.call_args_list] == [again, again]
    assert d.stats().failed == 2


def test_an_excepthook_that_raises_does_not_end_the_thread() -> None:
    def handler(batch: tempo.Batch) -> None:
        raise ValueError

    with mock.patch("threading.excepthook", side_effect=RuntimeError), make(max_batch_bytes=1) as d:
        d.start(handler)
        d.enqueue_many([b"a", b"b"])
    assert d.stats().failed == 2


def test_a_second_start_raises_and_changes_nothing() -> None:
    seen: list[bytes] = []
    with make() as d:
        d.start(lambda batch: seen.extend(batch.tolist()))
        with pytest.raises(RuntimeError):
            d.start(lambda batch: None)
        d.enqueue(b"x")
    assert seen == [b"x"]


@pytest.mark.parametrize("end", ["shutdown", "stop"])
def test_start_on_a_closed_dispatcher_raises_closed(end: str) -> None:
    d = make()
    getattr(d, end)()
    before = threading.active_count()
    with pytest.raises(tempo.Closed):
        d.start(lambda batch: None)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("handler", "kwargs", "error"),
    [
        (None, {}, TypeError),
        (print, {"on_error": 1}, TypeError),
        (print, {"exit_timeout": "1"}, TypeError),
        (print, {"exit_timeout": -1}, ValueError),
    ],
)
def test_start_refuses_bad_arguments_and_can_be_called_again(
    handler: Any, kwargs: dict[str, Any], error: type[Exception]
) -> None:
    with make() as d:
        with pytest.raises(error):
            d.start(handler, **kwargs)
        d.start(lambda batch: None)


def handled(d: tempo.Dispatcher, work: Callable[[], Any]) -> Any:
    """What work() returns or raises when the handler calls it, at the first batch."""
    outcomes: list[Any] = []

    def handler(batch: tempo.Batch) -> None:
        if not outcomes:
            try:
                outcomes.append(work())
            except BaseException as exc:
                outcomes.append(exc)

    d.start(handler)
    d.enqueue_many([b"1st", b"2nd"])
    try:
        wait_until(lambda: outcomes)
    finally:
        if not outcomes:
            d.stop()
    return outcomes[0]


def test_the_handler_may_enqueue() -> None:
    with make(max_batch_bytes=1) as d:
        assert handled(d, lambda: d.enqueue(b"more")) is None
    assert d.stats().delivered == 3


@pytest.mark.parametrize("timeout", [0, LONG, None])
def test_enqueue_from_the_handler_never_waits(timeout: float | None) -> None:
    with make(max_batch_bytes=1, max_buffered_bytes=6) as d:

        def fill() -> None:
            d.enqueue(b"123", timeout=timeout)
            d.enqueue(b"x", timeout=timeout)

        error = handled(d, fill)
    assert isinstance(error, tempo.QueueFull)
    assert d.stats().delivered == 3


def test_enqueue_many_from_the_handler_never_waits() -> None:
    with make(max_batch_bytes=1, max_buffered_bytes=6) as d:
        error = handled(d, lambda: d.enqueue_many([b"123", b"x", b"y"], timeout=None))
    assert isinstance(error, tempo.QueueFull)
    assert error.accepted == 1


def test_shutdown_from_the_handler_does_not_wait_and_the_rest_is_drained() -> None:
    d = make(max_batch_bytes=1)
    assert handled(d, d.shutdown) is None
    d.shutdown(timeout=LIMIT)
    assert (d.stats().state, d.stats().delivered) == ("stopped", 2)


def test_flush_from_the_handler_does_not_wait() -> None:
    with make(max_batch_bytes=1) as d:
        assert handled(d, d.flush) is False


def test_stop_from_the_handler_returns_what_it_did_not_get() -> None:
    d = make(max_batch_bytes=1)
    assert payloads(handled(d, d.stop)) == [b"2nd"]
    wait_until(lambda: d.stats().delivered)
    assert (d.stats().state, d.stats().delivered, d.stats().discarded) == ("stopped", 1, 1)


def test_stats_from_the_handler_shows_its_batch_in_flight() -> None:
    with make(max_batch_bytes=1) as d:
        stats = handled(d, d.stats)
    assert (stats.in_flight, stats.buffered) == (1, 1)


def test_the_exit_waits_for_a_handler_5_seconds_unless_told_otherwise() -> None:
    starts: list[tuple[Callable[[tempo.Dispatcher], None], float]] = [
        (lambda d: d.start(lambda batch: None), 5.0),
        (lambda d: d.start(lambda batch: None, exit_timeout=1), 1.0),
    ]
    for start, expected in starts:
        with make() as d:
            start(d)
            assert d._push is not None
            assert d._push[2] == expected


def test_a_handlers_thread_goes_on_when_there_was_no_memory_to_take_a_batch() -> None:
    d = make(interval=0.001)
    came: list[bytes] = []
    with around("_next", before=out_of_memory), mock.patch.object(threading, "excepthook") as told:
        d.start(lambda batch: came.extend(batch.tolist()))
        d.enqueue(b"a")
        assert d.flush(LIMIT)

    assert came == [b"a"]
    assert [call.args[0].exc_type for call in told.call_args_list] == [MemoryError]
    d.shutdown(LIMIT)


def test_a_handler_gets_the_batch_that_was_taken_as_memory_ran_out() -> None:
    d = make()
    d.enqueue(b"a")
    d.flush(timeout=0)
    came: list[bytes] = []
    with around("_next", after=out_of_memory):
        d.start(lambda batch: came.extend(batch.tolist()))
        assert d.flush(LIMIT)

    assert came == [b"a"]
    d.shutdown(LIMIT)
    assert conserved(d).batches == 1


def test_batches_are_not_begun_when_the_time_at_exit_is_over() -> None:
    d = make()
    d._push = (lambda batch: None, None, 5.0)  # as in a child that could not start the thread
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("at exit")):
        d.enqueue(b"a")

    d._consume(d._clock() - 1.0)

    assert conserved(d).buffered == 1
    d._push = None
    assert payloads(d.stop()) == [b"a"]


def test_at_exit_a_started_dispatcher_is_drained_and_stopped() -> None:
    d = make()
    came: list[bytes] = []
    d.start(lambda batch: came.extend(batch.tolist()))
    d.enqueue(b"a")
    with mock.patch.object(tempo, "_DISPATCHERS", [d]):
        tempo._at_exit()

    assert came == [b"a"]
    assert d.stats().state == "stopped"


# Flush


def test_flush_of_an_empty_dispatcher_is_true_at_once() -> None:
    assert make().flush() is True


def test_flush_returns_true_when_everything_is_delivered() -> None:
    d = make()
    d.enqueue_many([b"a", b"b"])
    flush = Worker(d.flush)
    assert d.get(timeout=LIMIT).tolist() == [b"a", b"b"]
    assert flush.result() is True


def test_flush_does_not_wait_for_what_came_after_it() -> None:
    d = make()
    d.enqueue(b"before")
    flush = Worker(d.flush)
    d.get(timeout=LIMIT)
    d.enqueue(b"after")
    assert flush.result() is True
    assert d.stats().buffered == 1


@pytest.mark.parametrize("timeout", [0, 0.01])
def test_flush_returns_false_when_time_runs_out(timeout: float) -> None:
    d = make()
    d.enqueue(b"x")
    assert d.flush(timeout=timeout) is False
    assert d.get(timeout=0).tolist() == [b"x"]


def test_flush_cuts_hard() -> None:
    d = make()
    d.enqueue(b"before")
    d.flush(timeout=0)
    d.enqueue(b"after")
    d.flush(timeout=0)
    d.enqueue(b"later")
    assert d.get(timeout=0).tolist() == [b"before"]
    assert d.get(timeout=0).tolist() == [b"after"]
    with pytest.raises(queue.Empty):
        d.get(timeout=0)


def test_flush_waits_until_the_handler_has_returned() -> None:
    gate = Gate()
    with make() as d:
        d.start(gate)
        d.enqueue(b"x")
        flush = Worker(d.flush)
        assert gate.entered.wait(LIMIT)
        assert d.flush(timeout=0.01) is False
        assert flush.is_alive()
        gate.go_on.set()
        assert flush.result() is True
        assert d.stats().delivered == 1


def test_flush_in_a_loops_body_returns_at_once() -> None:
    d = make(max_batch_bytes=1)
    d.enqueue_many([b"a", b"b"])
    answers = []

    def consume() -> None:
        for _ in d:
            answers.append(d.flush())
            if len(answers) == 2:
                d.shutdown()

    try:
        Worker(consume).result()
    finally:
        d.stop()
    assert answers == [False, True]


def test_flush_works_while_shutting_down() -> None:
    d = make(max_batch_bytes=1)
    d.enqueue_many([b"a", b"b"])
    shutdown = Worker(d.shutdown)
    wait_until(lambda: d.stats().state == "shutting_down")
    assert d.flush(timeout=0) is False
    flush = Worker(d.flush)
    assert len(list(d)) == 2
    assert flush.result() is True
    shutdown.result()


def test_flush_returns_false_when_stop_hands_its_work_back() -> None:
    for _ in range(30):
        d = make()
        d.enqueue(b"x")
        flush = Worker(d.flush)
        assert payloads(d.stop()) == [b"x"]
        assert flush.result() is False


def test_flush_after_stop_is_false_when_work_was_handed_back() -> None:
    d = make()
    d.enqueue(b"x")
    d.stop()
    assert d.flush() is False


def test_flush_refuses_a_bad_timeout() -> None:
    d = make()
    d.enqueue(b"x")
    with pytest.raises(ValueError, match="timeout"):
        d.flush(timeout=-1)
    with pytest.raises(queue.Empty):
        d.get(timeout=0)  # nothing was closed


# Shutdown


def test_shutdown_is_idempotent() -> None:
    d = make()
    d.shutdown()
    d.shutdown()
    d.shutdown(timeout=0)
    assert d.stats().state == "stopped"


def test_shutdowns_of_several_threads_wait_for_the_same_drain() -> None:
    d = make()
    d.enqueue(b"x")
    workers = [Worker(d.shutdown) for _ in range(4)]
    wait_until(lambda: d.stats().state == "shutting_down")
    assert all(worker.is_alive() for worker in workers)
    assert d.get(timeout=LIMIT).tolist() == [b"x"]
    for worker in workers:
        worker.result()
    assert d.stats().state == "stopped"


def test_shutdown_refuses_new_work_while_it_drains_and_after() -> None:
    d = make()
    d.enqueue(b"x")
    shutdown = Worker(d.shutdown)
    wait_until(lambda: d.stats().state == "shutting_down")
    with pytest.raises(tempo.ShuttingDown):
        d.enqueue(b"y")
    d.get(timeout=LIMIT)
    shutdown.result()
    with pytest.raises(tempo.Stopped):
        d.enqueue(b"y")
    assert (d.stats().accepted, d.stats().rejected) == (1, 2)


def test_shutdown_releases_blocked_producers_with_its_error() -> None:
    d = make(max_buffered_bytes=4)
    d.enqueue(b"1234")
    producers = [Worker(d.enqueue, b"x", timeout=None) for _ in range(3)]
    wait_until(lambda: d.stats().waiting_producers == 3)
    shutdown = Worker(d.shutdown)
    for producer in producers:
        with pytest.raises(tempo.ShuttingDown):
            producer.result()
    assert payloads(d) == [b"1234"]
    shutdown.result()


def test_shutdown_releases_waiting_consumers() -> None:
    d = make()
    getting = Worker(d.get)
    iterating = Worker(list, d)
    wait_until(lambda: d.stats().waiting_consumers == 2)
    d.shutdown()
    with pytest.raises(tempo.Stopped):
        getting.result()
    assert iterating.result() == []


def test_shutdown_in_a_loops_body_does_not_wait_for_itself() -> None:
    d = make(max_batch_bytes=1)
    d.enqueue_many([b"a", b"b", b"c"])
    seen = []

    def consume() -> None:
        for batch in d:
            seen.extend(batch.tolist())
            d.shutdown()

    try:
        Worker(consume).result()
    finally:
        d.stop()
    assert seen == [b"a", b"b", b"c"]
    assert d.stats().state == "stopped"


def test_shutdown_in_a_loop_within_a_loop_does_not_wait_for_itself() -> None:
    d = make(max_batch_bytes=1)
    d.enqueue_many([b"a", b"b", b"c", b"d"])
    seen = []

    def consume() -> None:
        for outer in d:
            seen.extend(outer.tolist())
            for inner in d:
                seen.extend(inner.tolist())
                break
            d.shutdown()  # the inner loop is over, the outer is not

    try:
        Worker(consume).result()
    finally:
        d.stop()
    assert seen == [b"a", b"b", b"c", b"d"]


def test_shutdown_in_the_loop_over_another_dispatcher_waits_as_usual() -> None:
    d, other = make(), make(max_batch_bytes=1)
    other.enqueue(b"x")
    d.enqueue(b"y")
    for _ in other:
        with pytest.raises(tempo.DrainTimeout):
            d.shutdown(timeout=0)
        other.shutdown()


def test_shutdown_after_a_loop_that_was_left_waits_again() -> None:
    d = make(max_batch_bytes=1)
    d.enqueue_many([b"a", b"b"])
    for _ in d:
        break
    gc.collect()  # for interpreters that do not count references
    with pytest.raises(tempo.DrainTimeout):
        d.shutdown(timeout=0)


def test_a_handler_that_hangs_is_a_drain_timeout_with_what_was_buffered() -> None:
    gate = Gate()
    d = make(max_batch_bytes=1)
    d.start(gate)
    d.enqueue_many([b"a", b"b", b"c"])
    assert gate.entered.wait(LIMIT)
    with pytest.raises(tempo.DrainTimeout) as caught:
        d.shutdown(timeout=0.01)
    during = d.stats()
    gate.go_on.set()
    assert payloads(caught.value.undelivered) == [b"b", b"c"]
    assert (during.state, during.in_flight, during.discarded, during.discarded_bytes) == ("stopped", 1, 2, 2)
    wait_until(lambda: d.stats().delivered == 1)
    assert gate.taken == [b"a"]


@pytest.mark.parametrize("timeout", [0, 0.02])
def test_shutdown_keeps_its_timeout(timeout: float) -> None:
    d = make()
    d.enqueue_many([b"a", b"b"])
    with pytest.raises(tempo.DrainTimeout) as caught:
        d.shutdown(timeout=timeout)
    assert payloads(caught.value.undelivered) == [b"a", b"b"]
    assert isinstance(caught.value, TimeoutError)
    assert d.stats().state == "stopped"
    assert d.stop() == []


def test_shutdown_refuses_a_bad_timeout_and_goes_on_running() -> None:
    d = make()
    with pytest.raises(ValueError, match="timeout"):
        d.shutdown(timeout=-1)
    with pytest.raises(TypeError, match="timeout"):
        d.shutdown(timeout="1")  # type: ignore[arg-type]
    assert d.stats().state == "running"


def test_shutdown_waits_for_the_handler_to_return() -> None:
    gate = Gate()
    d = make(max_batch_bytes=1)
    d.start(gate)
    d.enqueue(b"x")
    assert gate.entered.wait(LIMIT)
    shutdown = Worker(d.shutdown)
    wait_until(lambda: d.stats().state == "shutting_down")
    assert shutdown.is_alive()
    gate.go_on.set()
    shutdown.result()
    assert (d.stats().delivered, d.stats().in_flight) == (1, 0)


def test_stop_during_a_shutdown_raises_stopped_there() -> None:
    d = make()
    d.enqueue(b"x")
    workers = [Worker(d.shutdown) for _ in range(2)]
    wait_until(lambda: d.stats().state == "shutting_down")
    assert payloads(d.stop()) == [b"x"]
    stopped = 0
    for worker in workers:
        try:
            worker.result()
        except tempo.Stopped:
            stopped += 1
    assert stopped >= 1  # the other may have come when it was stopped already


def test_leaving_the_with_block_is_a_shutdown() -> None:
    taken: list[bytes] = []
    with make() as d:
        d.start(lambda batch: taken.extend(batch.tolist()))
        d.enqueue_many([b"a", b"b"])
    assert taken == [b"a", b"b"]
    assert d.stats().state == "stopped"


def test_an_error_leaves_the_with_block_after_the_drain() -> None:
    taken: list[bytes] = []
    with pytest.raises(KeyError), make() as d:
        d.start(lambda batch: taken.extend(batch.tolist()))
        d.enqueue(b"x")
        raise KeyError
    assert taken == [b"x"]


# Stop


def test_stop_returns_what_was_not_delivered_once() -> None:
    d = make(max_batch_bytes=4)
    d.enqueue_many([b"aa", b"bb", b"cc", b"dd", b"e"])
    d.get(timeout=0)
    back = d.stop()
    assert payloads(back) == [b"cc", b"dd", b"e"]
    assert d.stop() == []
    stats = d.stats()
    assert (stats.accepted, stats.delivered, stats.discarded, stats.buffered) == (5, 2, 3, 0)
    assert (stats.discarded_bytes, stats.buffered_bytes, stats.state) == (5, 0, "stopped")


def test_stop_counts_empty_payloads_as_one_byte() -> None:
    d = make()
    d.enqueue_many([b"", b"", b"abc"])
    d.stop()
    assert (d.stats().discarded, d.stats().discarded_bytes) == (3, 5)


def test_stop_releases_blocked_producers_and_consumers() -> None:
    full, empty = make(max_buffered_bytes=1), make()
    full.enqueue(b"x")
    producers = [Worker(full.enqueue, b"y", timeout=None), Worker(full.enqueue_many, [b"y"], timeout=None)]
    consumers = [Worker(empty.get), Worker(next, iter(empty))]
    wait_until(lambda: full.stats().waiting_producers == 2 and empty.stats().waiting_consumers == 2)
    assert payloads(full.stop()) == [b"x"]
    assert empty.stop() == []
    for producer in producers:
        with pytest.raises(tempo.Stopped):
            producer.result()
    with pytest.raises(tempo.Stopped):
        consumers[0].result()
    with pytest.raises(StopIteration):
        consumers[1].result()


def test_one_of_several_stops_at_once_gets_everything() -> None:
    for _ in range(20):
        d = make(max_batch_bytes=1)
        d.enqueue_many([b"a", b"b", b"c"])
        workers = [Worker(d.stop) for _ in range(4)]
        results = [worker.result() for worker in workers]
        assert sorted(map(len, results)) == [0, 0, 0, 3]


def test_nothing_vanishes_when_stop_comes_while_all_are_busy() -> None:
    for _ in range(10):
        d = make(interval=0.001, max_batch_bytes=64, max_buffered_bytes=4096)

        def produce(name: bytes, d: tempo.Dispatcher = d) -> list[bytes]:
            accepted: list[bytes] = []
            with contextlib.suppress(tempo.Stopped):
                while True:
                    payload = b"%s%d" % (name, len(accepted))
                    d.enqueue(payload, timeout=None)
                    accepted.append(payload)
            return accepted

        producers = [Worker(produce, name) for name in (b"a", b"b", b"c")]
        consumers = [Worker(list, d) for _ in range(2)]
        wait_until(lambda d=d: d.stats().delivered > 500)  # type: ignore[misc]
        back = d.stop()
        accepted = [payload for producer in producers for payload in producer.result()]
        delivered = [payload for consumer in consumers for payload in payloads(consumer.result())]
        stats = d.stats()
        assert sorted(accepted) == sorted(delivered + payloads(back))
        counts = (stats.accepted, stats.delivered, stats.discarded, stats.buffered)
        assert counts == (len(accepted), len(delivered), len(payloads(back)), 0)


def test_stop_lets_the_handler_finish_its_batch() -> None:
    gate = Gate()
    d = make(max_batch_bytes=1)
    d.start(gate)
    d.enqueue_many([b"a", b"b"])
    assert gate.entered.wait(LIMIT)
    assert payloads(d.stop()) == [b"b"]
    gate.go_on.set()
    wait_until(lambda: d.stats().delivered == 1)
    assert gate.taken == [b"a"]
    assert d.stats().in_flight == 0


# Fork: the child has a fresh dispatcher, the parent keeps its own

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

FORK = """
import os, signal, sys, threading, time, traceback
import tempo

def until(condition):
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.001)

def in_child(work):
    # Run work in a forked child; return its exit status. A child that hangs is killed by its alarm.
    pid = os.fork()
    if pid == 0:
        signal.alarm(15)
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    return os.waitpid(pid, 0)[1]

"""


def forking(source: str) -> list[str]:
    """Run a program that forks, in a process of its own; return the lines that it and its children print."""
    # From 3.12 on, fork in a process with threads warns. That is what is tested here.
    done = run_python("-W", "ignore::DeprecationWarning", "-c", FORK + textwrap.dedent(source))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@needs_fork
def test_a_child_gets_an_empty_running_dispatcher_and_the_parent_keeps_its_own() -> None:
    lines = forking("""
        d = tempo.Dispatcher(interval=60, max_buffered_bytes=1024, max_batch_bytes=64)
        d.enqueue_many([b"a", b"b"])
        def child():
            stats = d.stats()
            print(stats.accepted, stats.buffered, stats.peak_buffered_bytes, stats.state)
            d.enqueue(b"c")
            d.flush(timeout=0)
            print(d.get(timeout=0).tolist())
            d.shutdown()
            print(d.stats().state)
        print(in_child(child))
        print(d.stats().state)
        d.flush(timeout=0)
        print(d.get(timeout=0).tolist())
    """)
    assert lines == ["0 0 0 running", "[b'c']", "stopped", "0", "running", "[b'a', b'b']"]


@needs_fork
def test_a_child_of_a_stopped_dispatcher_has_a_running_one() -> None:
    lines = forking("""
        d = tempo.Dispatcher(interval=60, max_buffered_bytes=1024)
        d.stop()
        print(in_child(lambda: d.enqueue(b"x")), d.stats().state)
    """)
    assert lines == ["0 stopped"]


@needs_fork
def test_children_are_free_of_the_locks_that_other_threads_hold() -> None:
    lines = forking("""
        d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=256 * 1024, max_batch_bytes=4096)
        over = threading.Event()
        def produce():
            while not over.is_set():
                d.enqueue(b"x" * 100, timeout=None)
        def look():
            while not over.is_set():
                d.stats()
        def consume():
            for batch in d:
                pass
        threads = [threading.Thread(target=work) for work in (produce, produce, look, consume, consume)]
        for thread in threads:
            thread.start()
        def child():
            stats = d.stats()
            assert (stats.accepted, stats.buffered, stats.waiting_producers, stats.waiting_consumers) == (0, 0, 0, 0)
            d.enqueue_many([b"child"] * 10)
            d.flush(timeout=0)
            assert d.get(timeout=0).tolist() == [b"child"] * 10
            d.shutdown()
        print({in_child(child) for _ in range(25)})
        over.set()
        for thread in threads[:3]:
            thread.join()
        d.shutdown()
        for thread in threads[3:]:
            thread.join()
        stats = d.stats()
        print(stats.accepted == stats.delivered)
    """)
    assert lines == ["{0}", "True"]


@needs_fork
def test_a_child_is_free_of_a_lock_that_another_thread_holds_for_certain() -> None:
    lines = forking("""
        d = tempo.Dispatcher(interval=60, max_buffered_bytes=1024)
        held, over = threading.Event(), threading.Event()
        def hold(state):
            held.set()
            over.wait(30)
        holder = threading.Thread(target=lambda: d._locked(d._state, hold))
        holder.start()
        held.wait(15)
        def child():
            d.enqueue(b"x")
            print(d.stats().buffered)
        print(in_child(child))
        over.set()
        holder.join()
        print(d.stats().buffered)
    """)
    assert lines == ["1", "0", "0"]


@needs_fork
def test_the_handlers_thread_comes_back_at_the_childs_first_enqueue() -> None:
    lines = forking("""
        d = tempo.Dispatcher(interval=60, max_buffered_bytes=1024, max_batch_bytes=1)
        d.start(lambda batch: print(batch.tolist(), threading.current_thread() is not threading.main_thread()))
        d.enqueue(b"parent")
        d.flush()
        sys.stdout.flush()
        def child():
            print(threading.active_count())
            d.stats()
            print(threading.active_count())
            d.enqueue(b"child")
            print(d.flush(timeout=10))
            d.shutdown(timeout=10)
        print(in_child(child))
        d.enqueue(b"parent again")
        d.shutdown()
    """)
    assert lines == ["[b'parent'] True", "1", "1", "[b'child'] True", "True", "0", "[b'parent again'] True"]


@needs_fork
def test_the_handlers_thread_comes_back_at_the_childs_first_enqueue_many() -> None:
    lines = forking("""
        d = tempo.Dispatcher(interval=60, max_buffered_bytes=1024, max_batch_bytes=2)
        d.start(lambda batch: print(batch.tolist()))
        def child():
            d.enqueue_many([b"a", b"b"])
            d.shutdown(timeout=10)
        print(in_child(child))
    """)
    assert lines == ["[b'a', b'b']", "0"]


@needs_fork
def test_a_fork_inside_the_handler_leaves_both_sides_working() -> None:
    lines = forking("""
        d = tempo.Dispatcher(interval=0.005, max_buffered_bytes=1024)
        done = threading.Event()
        def handler(batch):
            if batch.tolist() != [b"first"]:
                print(batch.tolist(), flush=True)
                done.set()
                return
            def child():
                assert d.stats().accepted == d.stats().in_flight == 0
                d.enqueue(b"child")
                assert done.wait(10)
            print(in_child(child))
        d.start(handler)
        d.enqueue(b"first")
        assert d.flush(timeout=15)
        d.enqueue(b"parent")
        d.shutdown(timeout=10)
        print(d.stats().delivered)
    """)
    assert lines == ["[b'child']", "0", "[b'parent']", "2"]


SIGNALLED = """
calls = []
pids = []

def on_signal(*_):
    if calls:
        return
    calls.append(1)
    pid = os.fork()
    if pid == 0:
        signal.alarm(15)
        in_the_child()
    pids.append(pid)

signal.signal(signal.SIGUSR1, on_signal)

def send():
    until(lambda: d.stats().waiting_consumers + d.stats().waiting_producers)
    while not pids:  # a signal that comes just before the wait begins is only seen at the next
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        time.sleep(0.01)
    in_the_parent()

threading.Thread(target=send, daemon=True).start()
"""


@needs_fork
@pytest.mark.parametrize("timeout", ["None", "12"])
def test_a_fork_by_a_signal_handler_that_interrupted_get_leaves_both_sides_waiting(timeout: str) -> None:
    lines = forking(f"""
d = tempo.Dispatcher(interval=60, max_buffered_bytes=1024, max_batch_bytes=1)
in_the_child = lambda: d.enqueue(b"child")
in_the_parent = lambda: d.enqueue(b"parent")
{SIGNALLED}
batch = d.get(timeout={timeout})
if pids == [0]:
    print(batch.tolist(), d.stats().delivered, flush=True)
    os._exit(0)
print(os.waitpid(pids[0], 0)[1], batch.tolist(), d.stats().delivered)
""")
    assert lines == ["[b'child'] 1", "0 [b'parent'] 1"]


@needs_fork
@pytest.mark.parametrize("timeout", ["None", "12"])
def test_a_fork_by_a_signal_handler_that_interrupted_enqueue_is_accepted_on_both_sides(timeout: str) -> None:
    lines = forking(f"""
d = tempo.Dispatcher(interval=60, max_buffered_bytes=1, max_batch_bytes=1)
d.enqueue(b"1")
in_the_child = lambda: None
in_the_parent = lambda: d.get(timeout=10)
{SIGNALLED}
d.enqueue(b"2", timeout={timeout})
stats = d.stats()
if pids == [0]:
    print(stats.accepted, stats.buffered, d.get(timeout=0).tolist(), flush=True)
    os._exit(0)
print(os.waitpid(pids[0], 0)[1], stats.accepted, stats.buffered, d.get(timeout=0).tolist())
""")
    assert lines == ["1 1 [b'2']", "0 2 1 [b'2']"]


def test_the_hooks_keep_no_dispatcher_alive() -> None:
    d = make()
    d.enqueue(b"x")
    seen = weakref.ref(d)
    del d
    gc.collect()
    assert seen() is None


def test_the_hooks_keep_no_dispatcher_alive_that_was_started() -> None:
    d = make()
    d.start(lambda batch: None)
    d.shutdown()
    seen = weakref.ref(d)
    del d
    gc.collect()
    assert seen() is None


@needs_fork
@pytest.mark.skipif(not CPYTHON, reason="frees a lock that another thread holds, which PyPy does not survive")
def test_a_fork_in_a_wait_for_a_lock_that_another_thread_has_just_got_leaves_the_child_going() -> None:
    lines = forking(
        """
        d = tempo.Dispatcher(interval=60, max_buffered_bytes=1024)
        held = threading.Event()
        pids = []

        def hold(s):
            held.set()
            threading.Event().wait()

        def handler(*_):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            sys.setswitchinterval(100)
            try:
                d._state.lock._release_save()  # as the holder does at the end of its section
            except RuntimeError:  # from 3.14 on
                print("only its holder can release it", flush=True)
                os._exit(0)
            end = time.monotonic() + 0.3
            while time.monotonic() < end:  # the other thread gets the lock, and waits for the GIL
                pass
            pids.append(os.fork())
            sys.setswitchinterval(0.005)
            if pids == [0]:
                signal.alarm(15)

        threading.Thread(target=d._locked, args=(d._state, hold), daemon=True).start()
        held.wait()
        threading.Thread(target=d.stats, daemon=True).start()
        time.sleep(0.1)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        state = d.stats().state
        if pids == [0]:
            print("child", state, flush=True)
            os._exit(0)
        print("parent", state, os.waitpid(pids[0], 0)[1], flush=True)
        os._exit(0)
        """
    )
    if lines == ["only its holder can release it"]:
        pytest.skip(lines[0])
    assert sorted(lines) == ["child running", "parent running 0"]


def fork_in_reset(d: tempo.Dispatcher) -> Any:
    """A fork once, in the locked section in which a parker is put into its queue."""
    real = tempo._Parker.reset
    calls: list[tempo._Parker] = []

    def reset(self: tempo._Parker) -> None:
        calls.append(self)
        if len(calls) == 1:
            fork_here(d)
        real(self)

    return mock.patch.object(tempo._Parker, "reset", reset)


def test_a_producer_that_is_queued_as_a_signal_handler_forks_goes_on_in_the_child() -> None:
    d = make(max_buffered_bytes=5)
    d.enqueue(b"12345")

    def new_lock() -> Any:  # for the parker, with the lock held
        d._new_lock = threading.Lock
        fork_here(d)
        return threading.Lock()

    d._new_lock = new_lock  # type: ignore[assignment]
    Worker(d.enqueue, b"child", timeout=None).result()
    assert payloads(d.stop()) == [b"child"]


needs_c_rlock = pytest.mark.skipif(not getattr(threading, "_CRLock", None), reason="threading has one kind of RLock")


@contextlib.contextmanager
def patched_threading(rlock: bool = True) -> Iterator[dict[str, list[Any]]]:
    """Other primitives in threading, as monkey-patching puts there; yields what was made with each.

    rlock: False for gevent's way: threading.RLock stays the function that it was, and makes another lock.
    """
    made: dict[str, list[Any]] = {}

    def other(name: str) -> Any:
        real = getattr(threading, name)

        def make_one(*args: Any, **kwargs: Any) -> Any:
            made.setdefault(name, []).append(real(*args, **kwargs))
            return made[name][-1]

        return make_one

    with contextlib.ExitStack() as stack:
        for name in ("Lock", "RLock", "Thread", "local", "get_ident") if rlock else ("Lock", "local", "get_ident"):
            stack.enter_context(mock.patch.object(threading, name, other(name)))
        if not rlock:
            stack.enter_context(mock.patch.object(threading, "_CRLock", None))
        yield made


@pytest.mark.parametrize("rlock", [True, pytest.param(False, marks=needs_c_rlock)])
def test_a_child_that_is_patched_after_the_fork_uses_the_patched_primitives(rlock: bool) -> None:
    d = make()
    came: list[tempo.Batch] = []
    d.start(came.append)
    fork_here(d)
    with patched_threading(rlock) as made:
        d.enqueue(b"child")
        assert d.flush(LIMIT)
        d.shutdown(LIMIT)
        assert type(d._state.lock) is type(threading.RLock())
        assert make()._state.lock is d._state.lock
        assert d._state.thread in made.get("Thread", [d._state.thread])
    assert payloads(came) == [b"child"]
    assert d._local in made["local"]
    assert made["get_ident"]
    assert made["Lock"]


@needs_c_rlock
def test_dispatchers_of_before_and_after_a_patching_have_locks_of_their_own() -> None:
    before = make()
    with patched_threading(rlock=False):
        after = make()
        assert type(after._state.lock) is type(threading.RLock())
    assert after._state.lock is not before._state.lock


def test_dispatchers_of_a_child_that_is_patched_after_the_fork_have_one_lock() -> None:
    dispatchers = [make(), make()]
    for d in dispatchers:
        fork_here(d)
    with patched_threading():
        for d in dispatchers:
            d.stats()
        third = make()
    assert dispatchers[0]._state.lock is dispatchers[1]._state.lock is third._state.lock


def test_a_child_that_was_forked_after_the_patching_looks_further_back_than_its_fork() -> None:
    d = make()
    fork_here(d)
    with patched_threading():
        fork_here(d)  # of the child, in which nothing was called yet
        d.stats()
        assert d._new_lock is threading.Lock
        assert d._new_thread is threading.Thread


def test_a_thread_that_is_started_by_a_childs_first_call_is_a_patched_one() -> None:
    d = make()
    fork_here(d)
    with patched_threading() as made:
        d.start(lambda batch: None)
        assert d._state.thread in made["Thread"]
        d.shutdown(LIMIT)


def test_a_childs_first_call_that_fails_leaves_the_looking_up_to_the_next() -> None:
    d = make()
    fork_here(d)
    with patched_threading():
        no_memory = mock.patch.object(tempo.Dispatcher, "_shared_lock", side_effect=MemoryError)
        with no_memory, pytest.raises(MemoryError):
            d.stats()
        d.stats()
        assert d._state.lock is make()._state.lock


def test_a_childs_first_call_in_which_a_signal_handler_forks_leaves_the_looking_up_to_the_grandchilds() -> None:
    d = make()
    fork_here(d)
    real = tempo.Dispatcher._shared_lock

    def forking_first(self: tempo.Dispatcher) -> Any:
        forked.stop()
        fork_here(d)
        return real(self)

    with patched_threading():
        forked = mock.patch.object(tempo.Dispatcher, "_shared_lock", forking_first)
        forked.start()
        d._ident()
        assert isinstance(d._ident, partial)
        d.stats()
        assert d._ident is threading.get_ident
        assert d._state.lock is make()._state.lock


def test_a_child_that_is_not_patched_keeps_its_primitives() -> None:
    d = make()
    fork_here(d)
    lock, local = d._state.lock, d._local
    d.enqueue(b"child")
    with patched_threading() as made:  # too late: they are in use
        assert d.stats().accepted == 1
        d.enqueue(b"another")
    assert (d._state.lock, d._local, made) == (lock, local, {})
    assert d._ident is threading.get_ident


def test_a_child_keeps_no_dispatcher_alive_that_it_has_not_called() -> None:
    d = make()
    fork_here(d)
    seen, ident = weakref.ref(d), d._ident
    del d
    gc.collect()
    assert seen() is None
    assert ident() == threading.get_ident()


def test_a_consumer_that_is_queued_as_a_signal_handler_forks_waits_in_the_child() -> None:
    d = make(max_batch_bytes=5)
    with fork_in_reset(d):
        consumer = Worker(d.get)
        wait_until(lambda: d.stats().waiting_consumers)
        d.enqueue(b"child")
        assert consumer.result().tolist() == [b"child"]


def test_a_flush_that_is_queued_as_a_signal_handler_forks_returns_in_the_child() -> None:
    d = make()
    d.enqueue(b"parent")
    with fork_in_reset(d):
        assert Worker(d.flush).result() is True
    assert d.stats().accepted == 0


# Exit of the interpreter

EXIT = """
import os, signal, sys, threading
import tempo

d = tempo.Dispatcher(interval=60, max_buffered_bytes=1024)
d.start(lambda batch: os.write(1, repr(batch.tolist()).encode()))
d.enqueue_many([b"a", b"b"])
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); signal.raise_signal(signal.SIGTERM)", 0),
    ],
    ids=["end", "sys.exit", "SIGTERM"],
)
def test_at_exit_what_was_accepted_is_drained(ending: str, code: int) -> None:
    done = run_python("-c", f"{EXIT}\n{ending}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "[b'a', b'b']", "")


def test_at_exit_by_an_unhandled_error_what_was_accepted_is_drained() -> None:
    done = run_python("-c", f"{EXIT}\nraise ValueError('mine')")
    assert (done.returncode, done.stdout) == (1, "[b'a', b'b']")
    assert done.stderr.splitlines()[-1] == "ValueError: mine"
    assert done.stderr.count("Traceback") == 1


def test_at_exit_a_handler_that_hangs_is_given_up_after_exit_timeout() -> None:
    done = run_python(
        "-c",
        """
import threading, tempo
d = tempo.Dispatcher(interval=60, max_buffered_bytes=1024, max_batch_bytes=1)
entered = threading.Event()
d.start(lambda batch: (entered.set(), threading.Event().wait()), exit_timeout=0.1)
d.enqueue_many([b"a", b"b"])
entered.wait()
""",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_at_exit_a_dispatcher_in_pull_mode_holds_nobody_up() -> None:
    done = run_python(
        "-c",
        """
import threading, tempo
d = tempo.Dispatcher(interval=60, max_buffered_bytes=1024)
d.enqueue(b"nobody comes for it")
empty = tempo.Dispatcher(interval=60, max_buffered_bytes=1024)
threading.Thread(target=empty.get, daemon=True).start()
""",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_at_exit_all_started_dispatchers_are_drained() -> None:
    done = run_python(
        "-c",
        EXIT
        + """
e = tempo.Dispatcher(interval=60, max_buffered_bytes=1024)
e.start(lambda batch: os.write(1, repr(batch.tolist()).encode()))
e.enqueue(b"c")
""",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout in ("[b'a', b'b'][b'c']", "[b'c'][b'a', b'b']")


def test_at_exit_one_handler_that_hangs_takes_nothing_from_the_others() -> None:
    done = run_python(
        "-c",
        """
import os, threading, tempo
hanging = tempo.Dispatcher(interval=60, max_buffered_bytes=1024)
hanging.start(lambda batch: threading.Event().wait(), exit_timeout=0.3)
hanging.enqueue(b"x")
good = tempo.Dispatcher(interval=60, max_buffered_bytes=1024)
good.start(lambda batch: os.write(1, b"good"), exit_timeout=20)
good.enqueue(b"y")
""",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "good", "")


# Exit: finalizers when daemon threads are frozen, children that cannot start a thread

FROZEN = """
import gc, os, threading
import tempo

class Finalizer:
    def __init__(self, call):
        self.call = call
        self.me = self  # a cycle, which the interpreter's last collection finds

    def __del__(self):
        try:
            os.write(1, repr(self.call()).encode() + b"\\n")
        except Exception as exc:
            os.write(1, type(exc).__name__.encode() + b"\\n")

gc.disable()
d = tempo.Dispatcher(interval=60, max_buffered_bytes=5)
d.enqueue(b"12345")
"""


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="finalizers run at exit on CPython alone")
def test_a_finalizer_at_exit_goes_on_where_a_daemon_thread_was_frozen_with_the_lock() -> None:
    done = run_python(
        "-c",
        FROZEN
        + """
held = threading.Event()
def hold(s):
    held.set()
    threading.Event().wait()

threading.Thread(target=d._locked, args=(d._state, hold), daemon=True).start()
held.wait()
threading.Thread(target=d.stats, daemon=True).start()
Finalizer(lambda: d.stats().buffered)
Finalizer(lambda: d.enqueue(b"6"))
""",
    )
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, ["1", "QueueFull"], "")


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="finalizers run at exit on CPython alone")
def test_a_finalizer_at_exit_never_waits() -> None:
    done = run_python(
        "-c",
        FROZEN
        + """
Finalizer(lambda: d.enqueue(b"6", timeout=None))
Finalizer(lambda: d.flush())
Finalizer(lambda: d.shutdown())
""",
    )
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, ["QueueFull", "False", "None"], "")


NO_THREAD = """
def no_thread(self):
    raise RuntimeError("can't start new thread")
"""


@needs_fork
def test_at_exit_a_child_without_the_handlers_thread_drains_without_a_limit() -> None:
    lines = forking(
        NO_THREAD
        + """
d = tempo.Dispatcher(interval=60, max_buffered_bytes=1024)
d.start(lambda batch: os.write(1, repr(batch.tolist()).encode() + b"\\n"), exit_timeout=float("inf"))
pid = os.fork()
if pid == 0:
    signal.alarm(15)
    threading.Thread.start = no_thread
    d.enqueue(b"child")
else:
    os.write(1, b"%d\\n" % os.waitpid(pid, 0)[1])
"""
    )
    assert lines == ["[b'child']", "0"]


@needs_fork
def test_at_exit_a_child_without_the_handlers_thread_drains_until_exit_timeout() -> None:
    lines = forking(
        NO_THREAD
        + """
d = tempo.Dispatcher(interval=60, max_buffered_bytes=1024, max_batch_bytes=1)
d.start(lambda batch: (os.write(1, b"x\\n"), time.sleep(0.05)), exit_timeout=0.1)
pid = os.fork()
if pid == 0:
    threading.Thread.start = no_thread
    d.enqueue_many([b"x"] * 200)
else:
    os.waitpid(pid, 0)
"""
    )
    assert 0 < len(lines) < 200


# Idle: nobody is woken


def switches(native_id: int) -> int:
    """How often a thread of this process has gone to sleep of its own accord."""
    status = Path(f"/proc/self/task/{native_id}/status").read_text()
    found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE)
    assert found
    return int(found.group(1))


def assert_asleep(native_id: int) -> None:
    """Assert that a thread is not woken. The one place with a real wait: that nothing happens has no event."""
    before = -1
    while before != switches(native_id):  # until it has come to rest
        before = switches(native_id)
        time.sleep(0.05)
    time.sleep(0.3)
    assert switches(native_id) == before


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("content", [False, True], ids=["empty", "not-due"])
def test_a_waiting_consumer_is_not_woken_while_nothing_happens(content: bool) -> None:
    d = make()
    consumers = [Worker(list, d) for _ in range(2)]
    wait_until(lambda: d.stats().waiting_consumers == 2)
    if content:
        d.enqueue(b"x")
    for consumer in consumers:
        assert consumer.native_id is not None
        assert_asleep(consumer.native_id)
    d.stop()
    for consumer in consumers:
        assert consumer.result() == []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_the_handlers_thread_is_not_woken_while_nothing_happens() -> None:
    threads: list[int] = []
    with make(interval=0.001) as d:
        d.start(lambda batch: threads.append(threading.get_native_id()))
        d.enqueue(b"x")
        assert d.flush(timeout=LIMIT)
        assert_asleep(threads[0])


# Vendoring: one file, the standard library alone


def test_a_copy_under_another_name_works_alone_and_brings_in_the_standard_library_only(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tempo.py", tmp_path / "my_events.py")
    program = f"""
import sys
before = set(sys.modules)
sys.path[:0] = [{str(tmp_path)!r}]
import my_events
brought = {{name.partition(".")[0] for name in set(sys.modules) - before}} - {{"my_events"}}
foreign = brought - getattr(sys, "stdlib_module_names", brought)  # known from 3.10 on
heavy = {{"asyncio", "logging", "dataclasses", "inspect"}} & brought
with my_events.Dispatcher(interval=60, max_buffered_bytes=1024) as d:
    d.start(lambda batch: print(batch.tolist()))
    d.enqueue(b"x")
print(sorted(foreign), sorted(heavy))
"""
    done = run_python("-I", "-S", "-c", program, cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[b'x']\n[] []\n")


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names came with 3.10")
def test_every_import_is_of_the_standard_library() -> None:
    tree = ast.parse((ROOT / "tempo.py").read_text(encoding="utf-8"))
    names: set[str] = set()
    for statement in tree.body:  # imports for type checkers stand under `if TYPE_CHECKING`
        if isinstance(statement, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0
            names.add(str(statement.module).partition(".")[0])
    assert names
    assert names <= sys.stdlib_module_names


# Documentation: its examples run

EXAMPLES = {
    f"{document}:{text.count(chr(10), 0, block.start()) + 1}": block[1]
    for document in ("README.md", "soak/README.md")
    for text in [(ROOT / document).read_text(encoding="utf-8")]
    for block in re.finditer(r"(?ms)^```python\n(.*?)^```", text)
}
"""By where they stand."""


def skip_what_is_not_installed(source: str) -> None:
    """Skip the test when the source imports a package that is not there."""
    for statement in ast.parse(source).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            module = statement.module if isinstance(statement, ast.ImportFrom) else statement.names[0].name
            name = str(module).partition(".")[0]
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize(
    "module",
    [
        *(tempo, units, soak_bench, soak_charts, soak_report, soak_instructions, soak_mutants, soak_overhead),
        *(soak_record, soak_spool, soak_tune),
    ],
    ids=lambda module: module.__name__,
)
def test_the_doctests_run(module: Any) -> None:
    outcome = doctest.testmod(module)
    assert outcome.failed == 0
    assert outcome.attempted > 0


def test_both_readmes_have_examples() -> None:
    assert {place.partition(":")[0] for place in EXAMPLES} == {"README.md", "soak/README.md"}


@pytest.mark.parametrize("place", EXAMPLES)
def test_the_readmes_example_runs(place: str, tmp_path: Path) -> None:
    skip_what_is_not_installed(EXAMPLES[place])
    done = run_python("-c", EXAMPLES[place], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_example_is_skipped_when_a_package_is_missing() -> None:
    with pytest.raises(pytest.skip.Exception, match="no_such_package is not installed"):
        skip_what_is_not_installed("import tempo\nfrom no_such_package.part import name\n")


# The spool: what finds no room, or is not delivered, waits in a file


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with Spool(tmp_path / "spool", max_bytes=tempo.MiB) as spool:
        yield spool


def in_file(path: Path) -> list[bytes]:
    """What the spool's file holds, in order."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [data for (data,) in db.execute("SELECT data FROM records ORDER BY id")]


def due(d: tempo.Dispatcher) -> tempo.Batch:
    """All that is buffered, as a consumer receives it."""
    d.flush(0)
    return d.get(timeout=0)


def test_a_record_leaves_the_spool_when_it_is_reported_and_not_before(spool: Spool, tmp_path: Path) -> None:
    d = make()
    spool.put([b"a", b"b", b"c"])
    assert spool.replay(d) == 3
    assert in_file(tmp_path / "spool") == [b"a", b"b", b"c"]  # accepted
    batch = due(d)
    assert batch.tolist() == [b"a", b"b", b"c"]
    assert in_file(tmp_path / "spool") == [b"a", b"b", b"c"]  # received
    assert spool.replay(d) == 0  # not again, while it may be under way
    assert spool.done(batch[:2]) == 2
    assert in_file(tmp_path / "spool") == [b"c"]
    assert (len(spool), spool.nbytes) == (1, 1 + soak_spool.RECORD_OVERHEAD)
    assert spool.done(batch) == 1
    assert (len(spool), spool.nbytes, in_file(tmp_path / "spool")) == (0, 0, [])


def test_what_is_kept_stays_at_its_place_and_what_is_new_goes_behind(spool: Spool) -> None:
    d = make()
    spool.put([b"1", b"2", b"3"])
    d.enqueue(b"direct")
    spool.replay(d)
    assert spool.keep([due(d)]) == 1
    spool.put([b"4"])
    assert spool.replay(d) == 5
    assert due(d).tolist() == [b"1", b"2", b"3", b"direct", b"4"]


def test_what_stop_returns_and_what_a_drain_leaves_can_be_kept(spool: Spool) -> None:
    stopped, late = make(), make()
    stopped.enqueue_many([b"1", b"2"])
    spool.keep(stopped.stop())
    late.enqueue_many([b"3", b"4"])
    with pytest.raises(tempo.DrainTimeout) as caught:
        late.shutdown(timeout=0)
    spool.keep(caught.value.undelivered)
    d = make()
    spool.replay(d)
    assert due(d).tolist() == [b"1", b"2", b"3", b"4"]
    assert len(spool) == 4


def test_replay_gives_what_there_is_room_for_in_order(spool: Spool) -> None:
    d = make(max_buffered_bytes=5)
    spool.put([b"%02d" % i for i in range(5)])
    given = []
    while len(spool):
        assert spool.replay(d) == min(2, len(spool))
        batch = due(d)
        spool.done(batch)
        given += batch.tolist()
    assert given == [b"%02d" % i for i in range(5)]


def test_no_more_than_a_bound_is_in_flight_but_one_record_always(spool: Spool) -> None:
    d = make(max_buffered_bytes=10 * tempo.MiB)
    half = soak_spool.IN_FLIGHT_BYTES // 2 - soak_spool.RECORD_OVERHEAD
    spool.put([bytes(half), bytes(half), b"third", bytes(3 * half)])
    assert spool.replay(d) == 2
    assert spool.replay(d) == 0
    spool.done(due(d))
    assert spool.replay(d) == 1  # the next is too large beside it
    spool.done(due(d))
    assert spool.replay(d) == 1
    spool.done(due(d))
    assert len(spool) == 0


def test_replay_waits_for_room_until_all_is_given(spool: Spool) -> None:
    records = [b"%03d" % i for i in range(200)]
    spool.put(records)
    came: list[bytes] = []

    def handler(batch: tempo.Batch) -> None:
        came.extend(batch.tolist())
        spool.done(batch)

    with make(interval=0.001, max_buffered_bytes=30) as d:
        d.start(handler)
        assert spool.replay(d, timeout=LIMIT) == 200
    assert came == records
    assert len(spool) == 0


def test_replay_returns_when_something_is_kept(spool: Spool) -> None:
    spool.put([b"%03d" % i for i in range(200)])

    def handler(batch: tempo.Batch) -> None:
        raise OSError("the sink is away")

    with make(interval=0.001, max_buffered_bytes=30) as d:
        d.start(handler, on_error=lambda exc, batch: spool.keep([batch]))
        replay = Worker(spool.replay, d, timeout=None)
        assert 0 < replay.result() < 200
    assert len(spool) == 200


@pytest.mark.parametrize("closed", [False, True])
def test_only_what_the_dispatcher_refuses_goes_to_the_spool(spool: Spool, tmp_path: Path, closed: bool) -> None:
    d = make(max_buffered_bytes=5)
    if closed:
        d.stop()
    records: list[Any] = [b"ab", bytearray(b"cd"), memoryview(b"ef"), b"gh"]
    assert spool.enqueue_many(d, iter(records)) == (0 if closed else 2)
    assert spool.enqueue(d, b"ij") is False
    assert spool.enqueue(d, b"k") is not closed
    refused = [b"ef", b"gh", b"ij"]
    assert in_file(tmp_path / "spool") == ([b"ab", b"cd", *refused, b"k"] if closed else refused)
    assert d.stats().buffered == (0 if closed else 3)


def test_a_payload_that_never_fits_is_not_spooled_and_one_in_the_spool_stays(spool: Spool) -> None:
    d = make(max_buffered_bytes=5)
    with pytest.raises(tempo.PayloadTooLarge):
        spool.enqueue(d, b"123456")
    spool.put([b"12", b"123456"])
    with pytest.raises(tempo.PayloadTooLarge):
        spool.replay(d)
    assert len(spool) == 2
    assert spool.done(due(d)) == 1  # the one before it was given
    d.shutdown()
    with pytest.raises(tempo.Stopped):
        spool.replay(d)
    assert len(spool) == 1


def test_a_full_spool_takes_all_of_a_call_or_nothing(tmp_path: Path) -> None:
    one = 4 + soak_spool.RECORD_OVERHEAD
    with Spool(tmp_path / "spool", max_bytes=3 * one) as spool:
        spool.put([b"0000"])
        with pytest.raises(SpoolFull, match=f"no room for {3 * one} bytes: {one} of {3 * one} bytes are taken") as full:
            spool.put([b"1111", b"2222", b"3333"])
        assert full.value.rest == [b"1111", b"2222", b"3333"]
        assert in_file(tmp_path / "spool") == [b"0000"]
        spool.put([b"1111", b"2222"])
        d = make(max_buffered_bytes=8)
        with pytest.raises(SpoolFull) as full:
            spool.enqueue_many(d, [b"aaaa", b"bbbb", b"cccc"])
        assert (full.value.accepted, full.value.rest) == (2, [b"cccc"])
        assert (len(spool), spool.nbytes) == (3, 3 * one)
    assert in_file(tmp_path / "spool") == [b"0000", b"1111", b"2222"]


def test_a_full_spool_does_not_forget_what_came_from_it(tmp_path: Path) -> None:
    d = make()
    with Spool(tmp_path / "spool", max_bytes=2 * (1 + soak_spool.RECORD_OVERHEAD)) as spool:
        spool.put([b"1", b"2"])
        spool.replay(d)
        d.enqueue(b"3")
        with pytest.raises(SpoolFull) as full:
            spool.keep([due(d)])
        assert full.value.rest == [b"3"]
        assert spool.replay(d) == 2
        assert spool.done(due(d)) == 2


def test_a_full_disk_is_an_error_that_changes_nothing(spool: Spool, tmp_path: Path) -> None:
    spool.put([b"first"])
    (pages,) = spool._db.execute("PRAGMA page_count").fetchone()
    spool._db.execute(f"PRAGMA max_page_count={pages}")  # so that SQLite meets the same as on a full disk
    with pytest.raises(SpoolFull, match="full") as full:
        spool.put([b"second", bytes(100_000), b"third"])
    assert full.value.rest == [b"second", bytes(100_000), b"third"]
    assert (len(spool), in_file(tmp_path / "spool")) == (1, [b"first"])
    d = make()
    spool.replay(d)
    d.enqueue(bytes(100_000))
    with pytest.raises(SpoolFull) as full:
        spool.keep([due(d)])
    assert full.value.rest == [bytes(100_000)]
    spool.put([b"fits"])
    assert in_file(tmp_path / "spool") == [b"first", b"fits"]


class FailingAt:
    """A database connection on which one statement fails."""

    def __init__(self, db: Any, statement: str, error: BaseException) -> None:
        self._db, self._statement, self._error = db, statement, error

    def execute(self, statement: str, *args: Any) -> Any:
        if statement.startswith(self._statement):
            raise self._error
        return self._db.execute(statement, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), KeyboardInterrupt()], ids=repr)
def test_a_change_that_does_not_come_to_its_end_changes_nothing(
    spool: Spool, tmp_path: Path, error: BaseException
) -> None:
    d = make()
    db = spool._db
    spool.put([b"a"])
    spool.replay(d)
    expected: Any = SpoolError if isinstance(error, sqlite3.Error) else type(error)
    for statement in ("BEGIN", "COMMIT"):
        with mock.patch.object(spool, "_db", FailingAt(db, statement, error)):
            with pytest.raises(expected) as caught:
                spool.put([b"b"])
            if isinstance(caught.value, SpoolError):
                assert caught.value.rest == [b"b"]
            assert not db.in_transaction
        assert (len(spool), in_file(tmp_path / "spool")) == (1, [b"a"])
    batch = due(d)
    with mock.patch.object(spool, "_db", FailingAt(db, "COMMIT", error)), pytest.raises(expected):
        spool.done(batch)
    assert (len(spool), spool.nbytes, in_file(tmp_path / "spool")) == (1, 1 + soak_spool.RECORD_OVERHEAD, [b"a"])
    assert spool.replay(d) == 1  # what could not be deleted comes again
    assert spool.done(due(d)) == 1


@pytest.mark.parametrize(
    ("path", "arguments", "error", "message"),
    [
        (7, {}, TypeError, "path must be a str or os.PathLike, not int: 7"),
        ("", {}, ValueError, "path must name a file, not ''"),
        ("a\0b", {}, ValueError, r"path must name a file, not 'a\x00b'"),
        ("spool", {"max_bytes": 0}, ValueError, "max_bytes must be > 0, not 0"),
        ("spool", {"max_bytes": True}, TypeError, "max_bytes must be an int, not bool: True"),
        ("spool", {"max_bytes": "1MiB"}, TypeError, "max_bytes must be an int, not str: '1MiB'"),
        ("spool", {"synchronous": "OFF"}, ValueError, "synchronous must be 'NORMAL' or 'FULL', not 'OFF'"),
    ],
)
def test_a_bad_argument_of_the_spool_is_named(
    tmp_path: Path, path: Any, arguments: Any, error: Any, message: str
) -> None:
    with pytest.raises(error) as caught:
        Spool(tmp_path / path if path == "spool" else path, **{"max_bytes": 1000, **arguments})
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.put(b"abc"), TypeError, "records must be an iterable of bytes-like objects, not bytes: b'abc'"),
        (lambda s: s.put(None), TypeError, "records must be an iterable of bytes-like objects, not NoneType: None"),
        (lambda s: s.put([b"a", "b"]), TypeError, "records[1] must be a bytes-like object, not str: 'b'"),
        (lambda s: s.done(["b"]), TypeError, "records[0] must be a bytes-like object, not str: 'b'"),
        (lambda s: s.enqueue_many(make(), [b"a", 1]), TypeError, "payloads[1] must be a bytes-like object, not int: 1"),
        (lambda s: s.keep([b"a"]), TypeError, "batches[0] must be a tempo.Batch, not bytes: b'a'"),
        (lambda s: s.keep(None), TypeError, "batches must be an iterable of tempo.Batch, not NoneType: None"),
        (lambda s: s.replay(make(), timeout="1"), TypeError, "timeout must be a number of seconds, not str: '1'"),
        (lambda s: s.replay(make(), timeout=-1), ValueError, "timeout must be >= 0 seconds, not -1"),
        (lambda s: s.replay(make(), timeout=math.nan), ValueError, "timeout must be >= 0 seconds, not nan"),
    ],
)
def test_a_bad_argument_of_a_spools_method_is_named(spool: Spool, call: Any, error: Any, message: str) -> None:
    spool.put([b"there"])
    with pytest.raises(error) as caught:
        call(spool)
    assert str(caught.value) == message
    assert len(spool) == 1


def test_one_spool_at_a_time_has_the_file(spool: Spool, tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="in use by another Spool"):
        Spool(tmp_path / "spool", max_bytes=1000)
    spool.put([b"left"])
    spool.close()
    spool.close()
    with pytest.raises(SpoolError, match="is closed") as caught:
        spool.put([b"late"])
    assert caught.value.rest == [b"late"]
    assert "not open" in repr(spool)
    with Spool(tmp_path / "spool", max_bytes=1) as again:  # a lower limit takes nothing away
        assert (len(again), again.nbytes) == (1, 4 + soak_spool.RECORD_OVERHEAD)
        with pytest.raises(SpoolFull):
            again.put([b""])


def test_a_file_that_is_no_spool_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some notes of mine\n" * 100, encoding="utf-8")
    with contextlib.closing(sqlite3.connect(tmp_path / "database")) as db:
        db.execute("CREATE TABLE records (mine)")
    for name in ("text", "database"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(SpoolError, match=f"cannot open .*{name}: .*database"):
            Spool(tmp_path / name, max_bytes=1000)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(SpoolError, match="cannot open"):
        Spool(tmp_path / "no" / "such" / "folder", max_bytes=1000)


@pytest.mark.parametrize(("synchronous", "number"), [("NORMAL", 1), ("FULL", 2)])
def test_the_spool_is_as_synchronous_as_asked(tmp_path: Path, synchronous: str, number: int) -> None:
    with Spool(tmp_path / "spool", max_bytes=1000, synchronous=synchronous) as spool:
        assert spool._db.execute("PRAGMA synchronous").fetchone() == (number,)
        assert spool._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_call_that_interrupts_the_spool_is_refused(spool: Spool) -> None:
    refused: list[SpoolError] = []

    def nested() -> int:
        try:
            if len(refused) < 9:
                spool.put([b"nested"])
        except SpoolError as exc:
            refused.append(exc)
        return 0

    spool._db.set_progress_handler(nested, 1)  # SQLite calls it in the midst of a statement
    spool.put([b"outer"])
    spool._db.set_progress_handler(None, 1)
    assert len(spool) == 1
    assert refused
    assert all(exc.rest == [b"nested"] for exc in refused)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_by_the_spool_and_its_exit_does_no_harm(tmp_path: Path) -> None:
    program = """
import os, sys
from soak.spool import Spool, SpoolError

spool = Spool("spool", max_bytes=10_000)
spool.put([b"before"])
pid = os.fork()
if pid == 0:
    for call in (lambda: spool.put([b"child"]), lambda: len(spool)):
        try:
            call()
        except SpoolError as exc:
            print("let a child open its own" in str(exc), exc.rest)
    spool.close()
    del spool  # SQLite closes what it has
    sys.exit()
print(os.waitpid(pid, 0)[1], flush=True)
spool.put([b"after"])
os._exit(0)  # as a kill: nothing is closed
"""
    done = run_python("-c", program, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True [b'child']\nTrue []\n0\n", "")
    with Spool(tmp_path / "spool", max_bytes=10_000) as spool:
        assert len(spool) == 2
    assert in_file(tmp_path / "spool") == [b"before", b"after"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["put", "replay", "enqueue", "done", "done", "keep", "forget"]).flatmap(
            lambda verb: st.tuples(st.just(verb), st.sampled_from([b"", b"a", b"b"]))
        ),
        max_size=60,
    )
)
def test_equal_records_keep_their_number(steps: list[tuple[str, bytes]]) -> None:
    """Whichever of equal records is reported or kept: what comes out once more is what came in, to the very number."""
    with tempfile.TemporaryDirectory() as folder, Spool(Path(folder, "spool"), max_bytes=tempo.MiB) as spool:
        d = make(max_buffered_bytes=3, max_batch_bytes=1)  # so that equal records can be in different batches
        expected: Counter[bytes] = Counter()
        came: Counter[bytes] = Counter()
        for verb, record in steps:
            if verb == "put":
                expected[record] += spool.put([record])
            elif verb == "enqueue":
                spool.enqueue(d, record)
                expected[record] += 1
            elif verb == "replay":
                spool.replay(d)
            elif d.stats().buffered:
                batch = due(d)
                if verb == "done":
                    assert spool.done(batch) <= len(batch)  # a row for each record at most: a kill now loses none
                    came.update(batch.tolist())
                elif verb == "keep":
                    spool.keep([batch])
                else:  # returned to the dispatcher, as if it had never been received
                    d.enqueue_many(batch)
        while len(spool) or d.stats().buffered:
            spool.replay(d)
            batch = due(d)
            spool.done(batch)
            came.update(batch.tolist())
        assert came == expected


def test_producers_a_failing_handler_and_a_replay_share_a_spool(spool: Spool) -> None:
    came: Counter[bytes] = Counter()
    dice = random.Random(0)

    def handler(batch: tempo.Batch) -> None:
        if dice.random() < 0.3:
            raise OSError("not sent")
        came.update(batch.tolist())
        spool.done(batch)

    def produce(name: int) -> None:
        for i in range(0, 300, 3):
            records = [b"%d-%03d" % (name, i + k) for k in range(3)]
            spool.enqueue(d, records[0])
            spool.enqueue_many(d, records[1:])

    d = make(interval=0.001, max_batch_bytes=50, max_buffered_bytes=100)
    d.start(handler, on_error=lambda exc, batch: spool.keep([batch]))
    producers = [Worker(produce, name) for name in range(4)]

    def replay() -> None:
        while any(producer.is_alive() for producer in producers) or len(spool) or d.stats().delivered < 1200:
            spool.replay(d, timeout=0.05)
            d.flush(LIMIT)

    replayer = Worker(replay)
    for worker in (*producers, replayer):
        worker.result()
    d.shutdown(LIMIT)
    assert came == {b"%d-%03d" % (name, i): 1 for name in range(4) for i in range(300)}
    assert d.stats().failed > 0


KILLED = """
import os, random, signal, sys, threading, time, traceback
import tempo
from soak.spool import Spool, SpoolFull

KILLS = 50
seed = int(sys.argv[1])
me = os.getpid()
logs = [os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for name in ("taken", "delivered")]

def write(log, records):
    # A kill may cut it short: so each begins on a line of its own, and a name that was cut is known by its length.
    text = b"\\n" + b"\\n".join(records) + b"\\n"
    if os.write(log, text) != len(text):
        os._exit(1)

def open_all(number):
    dice = random.Random(seed * 1000 + number)
    spool = Spool("spool", max_bytes=20_000)
    d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=400, max_batch_bytes=150)

    def handler(batch):
        fate = dice.random()
        if fate < 0.1:
            raise OSError("not sent")
        write(logs[1], batch.tolist())
        if fate < 0.2:
            raise OSError("sent, and the answer lost")
        spool.done(batch)

    def on_error(exc, batch):
        try:
            spool.keep([batch])
            write(logs[0], batch.tolist())
        except SpoolFull:
            pass  # what the file has not taken is promised to nobody

    d.start(handler, on_error=on_error)
    return dice, spool, d

def live(number, ready):
    dice, spool, d = open_all(number)

    def produce(which):
        n = 0
        while True:
            records = [b"%04d-%d-%06d" % (number, which, n + i) for i in range(which * 10 + 1)]
            n += len(records)
            try:
                accepted = spool.enqueue_many(d, records) if which else int(spool.enqueue(d, records[0]))
            except SpoolFull:
                time.sleep(0.001)
            else:
                if accepted < len(records):
                    write(logs[0], records[accepted:])

    for which in range(2):
        threading.Thread(target=produce, args=(which,), daemon=True).start()
    os.write(ready, b"r")
    while os.getppid() == me:
        spool.replay(d, timeout=dice.choice([0.0, 0.002, 0.02]))

dice = random.Random(seed)
for number in range(KILLS):
    ended, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            live(number, ready)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(ready)
    assert os.read(ended, 1) == b"r", number
    os.close(ended)
    time.sleep(dice.uniform(0.0, 0.15))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (number, status)

_, spool, d = open_all(KILLS)
left = len(spool)
end = time.monotonic() + 60.0
while len(spool) and time.monotonic() < end:
    spool.replay(d, timeout=1.0)
    d.flush(1.0)
d.shutdown(10.0)
print(left, len(spool))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_nothing_that_the_spool_has_taken_is_lost_by_fifty_kills(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    done = run_python("-c", KILLED, str(seed), cwd=tmp_path, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    at_last_run, at_its_end = map(int, done.stdout.split())
    length = len(b"0000-0-000000")
    taken, delivered = (
        Counter(line for line in (tmp_path / name).read_bytes().split(b"\n") if len(line) == length)
        for name in ("taken", "delivered")
    )
    assert len({name[:4] for name in taken}) > 25  # runs in which the file took something
    assert len(taken) > 1000
    assert taken.keys() - delivered.keys() == set()
    assert at_last_run > 0
    assert at_its_end == 0


# Recipes: what comes out of those in the READMEs


def recipe(heading: str, **instead: str) -> str:
    """The block under a heading in one of the READMEs, with some of its text replaced: each key stands for a place."""
    (source,) = (
        block[1]
        for document in ("README.md", "soak/README.md")
        for section in re.split(r"(?m)^### ", (ROOT / document).read_text(encoding="utf-8"))
        if section.startswith(f"{heading}\n")
        for block in re.finditer(r"(?ms)^```python\n(.*?)^```", section)
    )
    skip_what_is_not_installed(source)
    for place, text in instead.items():
        old = RECIPE_PLACES[place]
        assert source.count(old) == 1, f"the recipe has changed: {old}"
        source = source.replace(old, text)
    return source


RECIPE_PLACES = {
    "send": "    print(batch.tolist())\n",
    "interval": "interval=0.25",
    "limit": "max_buffered_bytes=4 * tempo.MiB",
    "delay": "delay = 0.1\n",
    "limit_of_delay": "delay < 5:",
    "flush": "d.flush(10)\n",
    "enqueue": 'd.enqueue(b"event")',
    "spool_enqueue": 'spool.enqueue(d, b"event")',
    "shutdown": "d.shutdown(timeout=5.0)",
    "run": "asyncio.run(main())",
    "broker": '"test.mock.num.brokers": 1,',
    "log_level": '"log_level": 4,',
    "wait": "producer.flush(10.0)",
}


def printed_batches(text: str) -> list[list[bytes]]:
    """The batches that a recipe printed. Two threads or processes may have done so on one line."""
    lines = text.replace("][b", "]\n[b").splitlines()
    return [ast.literal_eval(line) for line in lines if line.startswith("[b")]


def printed(text: str) -> list[bytes]:
    """Their payloads."""
    return [payload for batch in printed_batches(text) for payload in batch]


def run_recipe(source: str, tmp_path: Path) -> str:
    """Run a recipe that ends well; return what it printed."""
    done = run_python("-c", source, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_recipe_logging_ships_each_record_as_it_was_when_it_was_logged(tmp_path: Path) -> None:
    source = recipe("logging", interval="interval=3600")
    source += """
log = logging.getLogger("app")
changing = [1]
log.error("%s", changing)
changing.append(2)
threads = [threading.Thread(target=log.error, args=("from thread %d", i)) for i in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    came = printed(run_recipe(source, tmp_path))
    assert came[:2] == [b"disk 93 % full", b"[1]"]
    assert sorted(came[2:]) == [b"from thread %d" % i for i in range(8)]


def test_recipe_logging_drops_and_counts_what_finds_no_room_and_what_comes_after_the_end(tmp_path: Path) -> None:
    source = recipe("logging", limit="max_buffered_bytes=20", interval="interval=3600")
    source += """
for i in range(3):
    logging.getLogger("app").error("%03d", i)
handler.close()
logging.getLogger("app").error("too late")
print(handler.dispatcher.stats().rejected)
"""
    assert run_recipe(source, tmp_path) == "[b'disk 93 % full', b'000', b'001']\n2\n"


def test_recipe_logging_tells_of_a_record_that_cannot_be_formatted_and_goes_on(tmp_path: Path) -> None:
    source = recipe("logging")
    source += 'logging.getLogger("app").error("%d", "no number")\nlogging.getLogger("app").error("on")\n'
    done = run_python("-c", source, cwd=tmp_path)
    assert (done.returncode, printed(done.stdout)) == (0, [b"disk 93 % full", b"on"])
    assert "--- Logging error ---" in done.stderr
    assert "no number" in done.stderr


def test_recipe_logging_ends_when_sending_logs_too(tmp_path: Path) -> None:
    # logging.shutdown holds the handler's lock while close() waits for this.
    noisy = "    print(batch.tolist())\n    logging.getLogger('app').error('sent %d', len(batch))\n"
    source = recipe("logging", send=noisy, interval="interval=3600") + "logging.shutdown()\nprint('down')\n"
    assert run_recipe(source, tmp_path) == "[b'disk 93 % full']\ndown\n"


def test_recipe_logging_says_what_it_could_not_send(tmp_path: Path) -> None:
    stuck = "    entered.set()\n    threading.Event().wait()\n"
    source = recipe("logging", send=stuck, interval="interval=0.001")
    source = source.replace("timeout=5.0", "timeout=0.01")
    source = "import threading\nentered = threading.Event()\n" + source
    source += """
entered.wait()
logging.getLogger("app").error("one")
logging.getLogger("app").error("two")
logging.shutdown()
"""
    done = run_python("-c", source, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "2 log records lost\n")


@contextlib.contextmanager
def served(source: str, folder: Path, *command: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run `python -m COMMAND` as a server of module:app, on a socket that takes connections already; yield its port."""
    (folder / "module.py").write_text(source, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = subprocess.Popen(
            [sys.executable, "-m", *(part.format(fd=listener.fileno()) for part in command), "module:app"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            # gunicorn 27 has a control socket in the user's folder.
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder)},
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
        port = listener.getsockname()[1]
    # Closed here, so that who connects when the server has ended is refused.
    try:
        yield server, port
    finally:
        if server.returncode is None:
            os.killpg(server.pid, signal.SIGKILL)  # its workers too: they hold the pipes
            print(*server.communicate(), sep="\n")  # for the test that has failed


def ask(port: int, method: str, path: str, body: bytes | None = None) -> int:
    """Send one request; return the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    with contextlib.closing(connection):
        connection.request(method, path, body)
        return connection.getresponse().status


def ended(server: subprocess.Popen[str], ending: signal.Signals) -> tuple[list[bytes], str]:
    """End a server; return what it delivered, and told."""
    server.send_signal(ending)
    out, err = server.communicate(timeout=LIMIT)
    assert "Traceback" not in err, err
    return printed(out), err


UVICORN = ("uvicorn", "--fd", "{fd}", "--no-access-log")


@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT], ids=lambda ending: str(ending.name))
def test_recipe_starlette_drains_when_uvicorn_ends(tmp_path: Path, ending: signal.Signals, framework: str) -> None:
    source = recipe("Starlette, FastAPI", interval="interval=3600")
    skip_what_is_not_installed(f"import uvicorn\nimport {framework}")
    if framework == "fastapi":
        source, found = re.subn(r"(?m)^app = Starlette.*$", "app = FastAPI(lifespan=lifespan)", source)
        assert found == 1
        source = f'from fastapi import FastAPI\n{source}\napp.post("/track")(track)\n'
    with served(source, tmp_path, *UVICORN) as (server, port):
        for i in range(20):
            assert ask(port, "POST", "/track", b"event %d" % i) == 202
        came, told = ended(server, ending)
    assert came == [b"event %d" % i for i in range(20)]
    assert "Application shutdown complete" in told


def test_recipe_starlette_answers_503_when_there_is_no_room(tmp_path: Path) -> None:
    source = recipe("Starlette, FastAPI", interval="interval=3600", limit="max_buffered_bytes=10")
    skip_what_is_not_installed("import uvicorn")
    with served(source, tmp_path, *UVICORN) as (server, port):
        statuses = [ask(port, "POST", "/track", body) for body in (b"12345", b"67890", b"x")]
        came, _ = ended(server, signal.SIGTERM)
    assert (statuses, came) == ([202, 202, 503], [b"12345", b"67890"])


@pytest.mark.parametrize(
    ("worker", "preload"),
    [("sync", True), ("sync", False), ("gthread", True), ("gthread", False), ("gevent", True), ("gevent", False)],
)
def test_recipe_gunicorn_drains_each_worker(tmp_path: Path, worker: str, preload: bool) -> None:
    source = recipe("gunicorn", interval="interval=3600")
    skip_what_is_not_installed("import gunicorn" + ("\nimport gevent" if worker == "gevent" else ""))
    # A worker that is told to end while it is still being set up may not hear it.
    hook = "import os\ndef post_worker_init(worker):\n    open(f'{os.getpid()}.ready', 'w').close()\n"
    (tmp_path / "gunicorn.conf.py").write_text(hook, encoding="utf-8")
    command = ("gunicorn", "--bind", "fd://{fd}", "--workers", "2", "--worker-class", worker, "--threads", "2")
    with served(source, tmp_path, *command, *(["--preload"] if preload else [])) as (server, port):
        for i in range(20):
            assert ask(port, "GET", f"/event-{i:02d}") == 202
        wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
        came, _ = ended(server, signal.SIGTERM)
    assert server.returncode == 0
    assert sorted(came) == [b"/event-%02d" % i for i in range(20)]


def test_recipe_asyncio_waits_for_room_and_the_loop_goes_on(tmp_path: Path) -> None:
    # The consumer runs in the same loop: a put that blocked it would never find room.
    check = """
async def check():
    d = tempo.Dispatcher(interval=0.01, max_buffered_bytes=30)
    came = []

    async def produce(name):
        for i in range(20):
            await put(d, b"%d-%02d" % (name, i))

    async def consume():
        async for batch in d:
            came.extend(batch.tolist())

    consumer = asyncio.create_task(consume())
    await asyncio.gather(*(produce(name) for name in range(5)))
    await asyncio.to_thread(d.shutdown, 5.0)
    await consumer
    print(d.stats().rejected > 0, all([x for x in came if x[:1] == b"%d" % name] == [
        b"%d-%02d" % (name, i) for i in range(20)] for name in range(5)), len(came))

    d = tempo.Dispatcher(interval=0.01, max_buffered_bytes=30)
    d.enqueue(bytes(30))
    try:
        await put(d, b"no room", timeout=0.01)
    except tempo.QueueFull:
        print([len(batch) for batch in d.stop()])

asyncio.run(check())
"""
    assert run_recipe(recipe("asyncio: a coroutine waits for room", run=check), tmp_path) == "True True 100\n[1]\n"
    came = printed(run_recipe(recipe("asyncio: a coroutine waits for room"), tmp_path))
    assert sorted(came) == [b"event %03d" % i for i in range(500)]


def test_recipe_several_consumers_share_the_work_and_one_error_ends_none(tmp_path: Path) -> None:
    source = recipe("Several consumers")
    batches = printed_batches(run_recipe(source, tmp_path))
    numbers = [[int(payload.split()[1]) for payload in batch] for batch in batches]
    assert all(batch == list(range(batch[0], batch[0] + len(batch))) for batch in numbers)
    assert sorted(number for batch in numbers for number in batch) == list(range(1000))
    # Each consumer meets errors: if they ended by them, nobody would be left to drain. One has its batch when shutdown
    # has returned, and is waited for.
    sending = """while b"event 999" in batch.tolist() and d.stats().state != "stopped":
        pass
    raise OSError("away")"""
    assert source.count("print(batch.tolist(), flush=True)") == 1
    source = source.replace("print(batch.tolist(), flush=True)", sending)
    source += "assert not any(consumer.is_alive() for consumer in consumers)\n"
    source += "print([exc.args for exc, _ in failed[:1]], sum(len(batch) for _, batch in failed))\n"
    assert run_recipe(source, tmp_path) == "[('away',)] 1000\n"


ATTEMPTS = """
import threading

attempts = []

def attempt(batch):
    attempts.append((threading.current_thread(), batch.tolist()))
    if len(attempts) <= FAILING:
        raise ERROR("away")
"""


def attempted(failing: int, error: str) -> str:
    """What a recipe needs to send as often as is told before it succeeds."""
    return ATTEMPTS.replace("FAILING", str(failing)).replace("ERROR", error)


@pytest.mark.parametrize(
    ("failing", "error", "attempts", "given_up"),
    [
        (3, "OSError", ["event"] * 4 + ["next"], []),
        (1, "ValueError", ["event", "next"], ["ValueError: event"]),
        (99, "OSError", ["event"] * 6 + ["next"] * 6, ["OSError: event", "OSError: next"]),
    ],
    ids=["until_it_succeeds", "not_what_cannot_be_mended", "not_for_ever"],
)
def test_recipe_retries_in_order(
    tmp_path: Path, failing: int, error: str, attempts: list[str], given_up: list[str]
) -> None:
    source = recipe(
        "Retries with backoff",
        send="    attempt(batch)\n",
        delay="delay = 0.0005\n",
        limit_of_delay="delay < 0.01:",
        enqueue='d.enqueue(b"event")\nd.flush(10)\nd.enqueue(b"next")',
    )
    source = attempted(failing, error) + source
    source += """
print([payload.decode() for _, payloads in attempts for payload in payloads])
print([f"{type(exc).__name__}: {bytes(batch.data).decode()}" for exc, batch in given_up])
print(len({thread for thread, _ in attempts}), threading.main_thread() in {thread for thread, _ in attempts})
"""
    assert run_recipe(source, tmp_path) == f"{attempts}\n{given_up}\n1 False\n"


def test_recipe_retries_end_when_the_program_does(tmp_path: Path) -> None:
    source = recipe(
        "Retries with backoff",
        send="    failed.set()\n    raise OSError('away')\n",
        delay="delay = 3600.0\n",
        limit_of_delay="True:",
        flush="failed.wait()\n",
    )
    source = f"import threading\nfailed = threading.Event()\n{source}print([len(batch) for _, batch in given_up])\n"
    assert run_recipe(source, tmp_path) == "[1]\n"


def test_recipe_kafka_returns_when_the_broker_has_all(tmp_path: Path) -> None:
    source = recipe("Kafka", log_level='"log_level": 4, "queue.buffering.max.messages": 10,')  # fewer than the events
    source += """
(broker,) = producer.list_topics(timeout=10).brokers.values()
consumer = confluent_kafka.Consumer({
    "bootstrap.servers": f"{broker.host}:{broker.port}", "group.id": "check", "auto.offset.reset": "earliest",
})
consumer.assign([
    confluent_kafka.TopicPartition("events", partition, confluent_kafka.OFFSET_BEGINNING)
    for partition in producer.list_topics("events", timeout=10).topics["events"].partitions
])
came = []
while len(came) < 100:
    message = consumer.poll(20.0)
    assert message is not None and message.error() is None, message and message.error()
    came.append(message.value())
consumer.close()
print(sorted(came) == sorted(b"event %d" % i for i in range(100)), d.stats().failed)
"""
    assert run_recipe(source, tmp_path) == "True 0\n"


def test_recipe_kafka_raises_when_the_broker_has_not_all(tmp_path: Path) -> None:
    source = recipe("Kafka", broker="", log_level='"log_level": 0,', wait="producer.flush(0.01)")
    for old, new in (("ignored.invalid:9092", "127.0.0.1:9"), ("d.start(send)", "d.start(send, on_error=tell)")):
        source = source.replace(old, new)
    source = "def tell(exc, batch):\n    print(exc, len(batch))\n\n" + source
    source += "import os, sys\nsys.stdout.flush()\nos._exit(0)  # else librdkafka goes on trying\n"
    assert run_recipe(source, tmp_path) == "Kafka has not all of 100 events: out of time 100\n"


def test_recipe_fallback_keeps_what_failed_for_the_next_run(tmp_path: Path) -> None:
    heading = "A durable fallback"
    run_recipe(attempted(99, "OSError") + recipe(heading, send="    attempt(batch)\n"), tmp_path)
    assert in_file(tmp_path / "events.spool") == [b"event"]
    more = 'spool.enqueue(d, b"more")'
    assert printed(run_recipe(recipe(heading, spool_enqueue=more), tmp_path)) == [b"event", b"more"]
    assert in_file(tmp_path / "events.spool") == []


def test_recipe_fallback_takes_what_finds_no_room_and_what_a_drain_leaves(tmp_path: Path) -> None:
    source = recipe(
        "A durable fallback",
        send="    entered.set()\n    threading.Event().wait()\n",
        interval="interval=0.001",
        limit="max_buffered_bytes=4",
        spool_enqueue='spool.enqueue(d, b"lost")\nentered.wait()\n'
        'print([spool.enqueue(d, record) for record in (b"1", b"2", b"3456", b"7")])\n',
        shutdown="d.shutdown(timeout=0.01)",
    )
    source = "import threading\nentered = threading.Event()\n" + source
    assert run_recipe(source, tmp_path) == "[True, True, False, True]\n"
    assert in_file(tmp_path / "events.spool") == [b"3456", b"1", b"2", b"7"]


# The harness: python3 -m soak


def soak(tmp_path: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run `python3 -m soak run` with a few threads; return the process and its result."""
    path = tmp_path / "result.json"
    common = ("--producers", "4", "--out", str(tmp_path / "out"), "--json", str(path), "--baseline", "none")
    done = run_python("-m", "soak", "run", *common, *options, cwd=ROOT)
    return done, json.loads(path.read_text(encoding="utf-8"))


def test_a_soak_of_a_second_loses_nothing(tmp_path: Path) -> None:
    done, result = soak(tmp_path, "--duration", "1s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["lost"] == result["duplicated"] == result["rejected"] == 0
    assert result["accepted"] == result["delivered"] > 0
    assert result["verdict"]["correctness"]["status"] == "pass"
    assert {
        *("delivered_per_second", "batches", "peak_heap_bytes", "peak_rss_bytes", "drain_seconds", "shutdown_seconds"),
        *("latency_seconds", "calibration", "config", "environment"),
    } <= set(result)
    assert set(result["verdict"]) == {"correctness", "throughput", "memory", "drain", "overall"}


def test_a_soak_that_drops_what_is_refused_loses_nothing_of_what_was_accepted(tmp_path: Path) -> None:
    done, result = soak(tmp_path, "--duration", "0.3s", "--on-full", "raise", "--max-buffered-bytes", "64KiB")
    assert result["lost"] == result["duplicated"] == 0, done.stdout + done.stderr
    assert result["accepted"] == result["delivered"] > 0
    assert result["verdict"]["correctness"]["status"] == "pass"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--duration", "soon"),
        ("--duration", "-5s"),
        ("--producers", "0"),
        ("--consumers", "two"),
        ("--payload", "heavy"),
        ("--interval", "0s"),
        ("--max-batch-bytes", "320kilo"),
        ("--max-buffered-bytes", "1.5"),
        ("--consumer-delay", "10"),
        ("--on-full", "drop"),
        ("--bulk", "1.5"),
        ("--sink", "nowhere"),
        ("--out", ""),
        ("--json", ""),
        ("--baseline", "nobody's"),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(option: str, value: str) -> None:
    done = run_python("-m", "soak", "run", option, value, cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument {option}: " in line
    assert value in line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rounds", "0"),
        ("--duration", "soon"),
        ("--groups", "micro,nothing"),
        ("--compare", "nobody's"),
        ("--record", "a/b"),
    ],
)
def test_a_bad_option_of_the_benchmark_is_one_line_that_names_it(option: str, value: str) -> None:
    done = run_python("-m", "soak", "bench", option, value, cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument {option}: " in line
    assert value.partition(",")[2] or value in line


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("run", "--settings", "nowhere.json"),
        ("run", "--display", "hologram"),
        ("tune", "--probe", "soon"),
        ("tune", "--payload", "heavy"),
        ("stress", "--each", "0"),
        ("stress", "--limit", "0"),
        ("baseline", "--runs", "0"),
        ("baseline", "--name", "auto"),
    ],
)
def test_a_bad_option_of_another_command_is_one_line_that_names_it(command: str, option: str, value: str) -> None:
    done = run_python("-m", "soak", command, option, value, cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument {option}: " in line
    assert value in line


@pytest.mark.parametrize(
    "command",
    ["run", "tune", "stress", "baseline", "report", "pi", "bench", "overhead", "hostile", "interleave", "mutants"],
)
def test_each_command_of_soak_has_help_with_an_example(command: str) -> None:
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stdout(io.StringIO()) as out:
        soak_main.main([command, "--help"])
    assert caught.value.code == 0
    assert f"python3 -m soak {command}" in " ".join(out.getvalue().split("example", 1)[1].split())


def test_a_soak_stress_delivers_each_payload_of_each_producer(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run_python(
        *("-m", "soak", "stress", "--producers", "8", "--each", "301", "--bulk", "4"),
        *("--out", str(tmp_path), "--json", str(path)),
        cwd=ROOT,
    )
    result = json.loads(path.read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["accepted"] == result["delivered"] == result["wanted"] == 8 * 301
    assert result["verdict"]["overall"]["status"] == "pass"


def test_a_soak_result_that_cannot_be_written_goes_to_stdout(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = ("--producers", "2", "--each", "5", "--out", str(tmp_path / "file"))
    done = run_python("-m", "soak", "stress", *options, cwd=ROOT)

    assert done.returncode == 1
    assert json.loads(done.stdout)["delivered"] == 10
    assert "the result goes to stdout" in done.stderr
    assert "Traceback" not in done.stderr


FULL = """
import resource, sys
from soak.__main__ import entry
from soak.config import Config

Config.pass_seconds = lambda *_: 0.1
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # the header has room, and the result has not
sys.exit(entry())
"""


def test_a_soak_goes_on_when_the_disk_is_full_and_says_so_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    options = ("--duration", "0.5s", "--producers", "2", "--display", "none", "--out", str(tmp_path))
    done = run_python("-c", FULL, "run", *options, "--baseline", "none", cwd=ROOT)

    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert result["delivered"] == result["accepted"] > 0
    assert not result["interrupted"]
    assert result["load_seconds"] > 0.4
    (samples,) = tmp_path.iterdir()  # and no part of a result
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("soak: ")]
    assert line.startswith(f"soak: cannot write {str(samples)!r}: ")
    assert line.endswith("; the result goes to stdout")
    assert "Traceback" not in done.stderr
    assert json.loads(samples.read_text(encoding="utf-8").splitlines()[0])["type"] == "header"


def test_a_line_that_stderr_has_no_room_for_does_not_end_a_soak(tmp_path: Path) -> None:
    options = ("--producers", "2", "--each", "5", "--out", str(tmp_path), "--json", str(tmp_path / "result.json"))
    with open("/dev/full", "w", encoding="utf-8") as full_disk:
        done = subprocess.run(
            [sys.executable, "-m", "soak", "stress", *options], cwd=ROOT, stderr=full_disk, timeout=60, check=False
        )
    assert done.returncode == 0
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["delivered"] == 10


def test_a_soak_whose_summary_cannot_be_written_says_so_in_one_line(tmp_path: Path) -> None:
    options = ("--producers", "2", "--each", "5", "--out", str(tmp_path))
    with open("/dev/full", "w", encoding="utf-8") as full_disk:
        done = subprocess.run(
            [sys.executable, "-m", "soak", "stress", *options],
            cwd=ROOT,
            stdout=full_disk,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == ["soak: cannot write to stdout: No space left on device"]


BOARD = {"machine": "a board", "cores": 4, "interpreter": "CPython 3.11", "memory_bytes": 1 << 30, "commit": None}
BOARD.update(python="3.11.2", build="main")


def found_by_tune(*_: Any) -> soak_tune.Found:
    config = soak_settings.config_from(argparse.Namespace(), 1.0)
    return soak_tune.Found(config, soak_tune.Edge(1024, None), 1000.0, 1.0, [])


def ran_well() -> dict[str, Any]:
    figures = {"ratio": 0.5, "peak_heap_bytes": 9, "drain_seconds": 0.1, "delivered_per_second": 1.0, "calibration": 2}
    verdicts = {"overall": {"status": "pass", "note": ""}}
    config = soak_settings.config_from(argparse.Namespace(), 1.0)
    return {**figures, "verdict": verdicts, "interrupted": False, "config": config.as_json()}


# Each command, in front of the path that it is given; what does its work; and a word of its results.
WRITERS: dict[str, tuple[list[str], Callable[[], Any], str]] = {
    "run": (
        ["run", "--duration", "50ms", "--producers", "2", "--display", "none", "--baseline", "none", "--json"],
        lambda: mock.patch.object(Config, "pass_seconds", return_value=0.05),
        '"delivered": ',
    ),
    "tune": (
        ["tune", "--payload", "64", "--out"],
        lambda: mock.patch.object(soak_tune, "tune", found_by_tune),
        "CALIBRATED",
    ),
    "stress": (["stress", "--producers", "2", "--each", "5", "--json"], contextlib.nullcontext, '"delivered": 10'),
    "baseline": (
        ["baseline", "--runs", "1", "--name", "board", "--out"],
        lambda: mock.patch.object(soak_run, "run", return_value=ran_well()),
        '"ratio": 0.5',
    ),
    "overhead": (
        ["overhead", "--rounds", "1", "--duration", "10ms", "--producers", "2", "--json"],
        contextlib.nullcontext,
        "unwatched",
    ),
    "bench": (
        ["bench", "--rounds", "1", "--groups", "micro", "--json"],
        lambda: mock.patch.multiple(soak_bench, _work=lambda *_, **__: {}, _suite=NoRoom),
        "row ",
    ),
    "report": (["report", "--html"], lambda: mock.patch.dict(sys.modules, WITHOUT_MATPLOTLIB), "PASS: well"),
    "hostile": (["hostile", "--json"], lambda: mock.patch.object(soak_hostile, "cases", return_value=[]), "family"),
    "interleave": (
        ["interleave", "--twins", "no", "--json"],
        lambda: mock.patch.object(soak_interleave, "each", return_value=[]),
        "0 runs in",
    ),
    "mutants": (
        ["mutants", "--json"],
        lambda: mock.patch.multiple(
            soak_mutants,
            importlib=mock.Mock(),
            mutants=lambda _: [],
            read_list=lambda _: {},
            Trial=mock.Mock(return_value=mock.Mock(unwritten=False, **{"run.return_value": {}})),
        ),
        "killed: ",
    ),
    "sinks": (
        ["sinks", "--only", "null", "--duration", "100ms", "--producers", "2", "--json"],
        lambda: mock.patch.object(soak_sinks_command, "ROUNDS", 1),
        '"rows": [',
    ),
    "instructions": (
        ["instructions", "--record", "yes"],
        lambda: mock.patch.multiple(
            soak_instructions, count=lambda: {"enqueue": 1000.0}, shutil=mock.Mock(**{"which.return_value": "valgrind"})
        ),
        "1,000 instructions a payload",
    ),
}


class NoRoom:
    """In place of pyperf's suite: writes a line where it is told to."""

    def __init__(self, *_: Any) -> None:
        pass

    def dump(self, path: str, replace: bool) -> None:
        Path(path).write_text("a suite", encoding="utf-8")


@pytest.mark.parametrize("place", ["a file for a folder", "a full disk"])
@pytest.mark.parametrize("command", WRITERS)
def test_a_command_of_soak_whose_file_cannot_be_written_says_so_and_tells_what_it_found(
    command: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "bench":
        pytest.importorskip("pyperf")
    argv, at_work, word = WRITERS[command]
    result = write_run(tmp_path)
    path = Path("/dev/full")
    if place == "a file for a folder":
        path = result / "deeper"
    elif argv[-1] == "--out":
        # The file's name in the folder is the command's affair.
        folder = tmp_path / "full"
        folder.mkdir()
        for name in ("settings.json", "board.json"):
            (folder / name).symlink_to(path)
        path = folder
    if command in ("run", "stress"):
        argv = [argv[0], "--out", str(tmp_path), *argv[1:]]
    if command == "report":
        argv = [argv[0], "--run", str(result), "--png", str(tmp_path / "made.png"), *argv[1:]]
    if command == "instructions":  # it reads the file first, and a full disk has no end
        if place == "a full disk":
            (tmp_path / "figures.json.part").symlink_to(path)
            path = tmp_path / "figures.json"
        monkeypatch.setattr(soak_instructions, "FILE", path)
    else:
        argv = [*argv, str(path)]
    with at_work():
        assert soak_main.main(argv) == 1

    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if "cannot write" in line]
    assert line.startswith("soak: ")
    assert str(path) in line
    assert ("No space left on device" if place == "a full disk" else "directory") in line or "exists" in line
    assert word in told.out


def test_soak_settings_that_cannot_be_written_leave_those_of_before_whole(tmp_path: Path) -> None:
    soak_settings.write(tmp_path, {"producers": "7"}, BOARD, True, "today")
    with mock.patch.object(Path, "write_bytes", side_effect=OSError), pytest.raises(OSError):
        soak_settings.write(tmp_path, {"producers": "8"}, BOARD, True, "today")
    assert soak_settings.read(tmp_path / "settings.json", BOARD)[0] == {"producers": "7"}


def test_the_mutants_go_on_when_what_they_found_cannot_be_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    options = argparse.Namespace(workers=1, stages=1, resume="yes")
    with mock.patch.object(soak_mutants, "STATE", tmp_path / "file" / "state"):
        trial = soak_mutants.Trial(tmp_path, options, {})
        trial._write_state({"function": "f"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"soak: cannot write {str(tmp_path / 'file' / 'state')!r}: ")
    assert trial.unwritten


def test_soak_pi_without_a_place_for_its_packages_says_so_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with (
        mock.patch.object(soak_pi, "CACHE", tmp_path / "file" / "pi"),
        mock.patch.object(shutil, "which", return_value="/a/tool"),
    ):
        assert soak_main.main(["pi"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"soak: cannot write {str(tmp_path / 'file' / 'pi')!r}: Not a directory; nothing can be emulated"


# Ctrl-C at a terminal

INTERRUPTED = """
import os, sys, time

os.close(os.open(os.ttyname(0), os.O_RDWR))  # the first of a session is the one that its keys are for

import tempo
from soak import census, heap, interrupts, run, tune
from soak.__main__ import entry
from soak.config import Config

LONG = 600.0
phase = sys.argv.pop(1)
Config.pass_seconds = lambda *_: 0.1
flush = tempo.Dispatcher.flush

def say(words):
    print(words, file=sys.stderr, flush=True)

def announce(module, name):
    work = getattr(module, name)
    def announced(config, seconds, *rest, **more):
        global phase
        if name == phase:
            phase, seconds = "", LONG
            say(f"now: {name}")
        return work(config, seconds, *rest, **more)
    setattr(module, name, announced)

def slow_flush(self, timeout=None):
    global phase
    if phase.startswith("flush"):
        wanted, phase = int(phase[5:]), ""
        for number in range(wanted):
            say(f"now: flush{number}")
            while interrupts._seen <= number:
                time.sleep(0.01)
    return flush(self, timeout)

if phase == "load" or phase.startswith("flush"):  # those before are not what this is about
    before, phase = phase, ""
    take = census.take
    def last_before(*arguments, **more):
        global phase
        try:
            return take(*arguments, **more)
        finally:
            phase = before
    census.take = last_before

announce(run, "calibrate")
announce(heap, "measure")
announce(census, "take")
announce(tune, "drive")
tempo.Dispatcher.flush = slow_flush
sys.exit(entry())
"""


class OnTerminal:
    """A process on a pseudo-terminal of its own. A context manager, which ends the process."""

    def __init__(self, *args: str) -> None:
        self.text = ""
        self._end = time.monotonic() + LIMIT
        self._master, slave = os.openpty()
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "TERM": "xterm"}
        self._process = subprocess.Popen(
            [sys.executable, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=env,
            start_new_session=True,
        )
        os.close(slave)

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(LIMIT)
        os.close(self._master)

    def _read(self) -> bool:
        """Read what comes next; False at the end."""
        assert select.select([self._master], [], [], max(0.0, self._end - time.monotonic()))[0], self.text
        try:
            some = os.read(self._master, 1 << 16)
        except OSError:  # Linux: nobody is left at the other side
            some = b""
        self.text += some.decode(errors="replace")
        return bool(some)

    def read_until(self, words: str) -> None:
        """Wait until the words are on the terminal."""
        while words not in self.text:
            assert self._read(), self.text

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.write(self._master, b"\x03")

    def send_signal(self, number: int) -> None:
        """Send it a signal, which no key is for."""
        self._process.send_signal(number)

    def exit_code(self) -> int:
        """Wait for the end."""
        while self._read():
            pass
        return self._process.wait(LIMIT)


try:
    import rich  # noqa: F401
except ImportError:
    LIVE = "no live display"
else:
    LIVE = "time left"


def assert_restored(text: str) -> None:
    """Nothing went wrong on a terminal, and its cursor is shown again."""
    assert "Traceback" not in text
    assert text.rfind("\x1b[?25h") >= text.rfind("\x1b[?25l")


@pytest.mark.parametrize("phase", ["calibrate", "measure", "take", "load", "flush1"])
def test_ctrl_c_in_each_part_of_a_soak_ends_the_load_and_keeps_the_result(phase: str, tmp_path: Path) -> None:
    options = ("--producers", "2", "--out", str(tmp_path), "--baseline", "none", "--settings", "none")
    duration = ("--duration", "10m" if phase != "flush1" else "100ms")
    with OnTerminal("-c", INTERRUPTED, phase, "run", *options, *duration) as terminal:
        terminal.read_until({"load": LIVE, "flush1": "now: flush0"}.get(phase, f"now: {phase}"))
        terminal.interrupt()
        assert terminal.exit_code() == 0, terminal.text
    assert "(interrupted: the load lasted " in terminal.text
    assert "\x1b[?25l" in terminal.text or LIVE != "time left"
    assert_restored(terminal.text)
    result = json.loads((tmp_path / "latest.json").read_text(encoding="utf-8"))
    assert result["interrupted"]
    assert result["accepted"] == result["delivered"] > 0
    assert result["drain_seconds"] is not None


def test_sigterm_in_a_soak_is_as_ctrl_c(tmp_path: Path) -> None:
    options = ("--producers", "2", "--out", str(tmp_path), "--baseline", "none", "--settings", "none")
    with OnTerminal("-c", INTERRUPTED, "load", "run", *options, "--duration", "10m") as terminal:
        terminal.read_until(LIVE)
        terminal.send_signal(signal.SIGTERM)
        assert terminal.exit_code() == 0, terminal.text
    assert_restored(terminal.text)
    result = json.loads((tmp_path / "latest.json").read_text(encoding="utf-8"))
    assert result["interrupted"]
    assert result["accepted"] == result["delivered"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_not_kept_from_whoever_looks_after_it(number: signal.Signals) -> None:
    came: list[int] = []
    before = signal.signal(number, lambda *_: came.append(1))
    try:
        with soak_interrupts.kept():
            signal.raise_signal(number)
            assert not soak_interrupts.take()
    finally:
        signal.signal(number, before)
    assert came == [1]


def test_afterwards_interrupts_are_as_they_were_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with soak_interrupts.kept():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert soak_interrupts.take()
        assert not soak_interrupts.take()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_interrupt_before_a_soak_leaves_it_the_time_to_show_that_events_flow() -> None:
    config = soak_settings.config_from(argparse.Namespace(producers=2), 600.0)
    load = Load(config)
    with soak_interrupts.kept():
        signal.raise_signal(signal.SIGINT)
        outcome = drive(config, 600.0, load)
    assert outcome.interrupted
    assert outcome.stats is not None
    assert outcome.stats.delivered == sum(load.accepted) > 0


@walkable
def test_an_interrupt_anywhere_in_a_wait_leaves_its_event_usable() -> None:
    # Event.wait() itself does not survive one between the getting of its lock and its `with`: it keeps the lock.
    codes = {function.__code__ for function in (threading.Event.wait, threading.Condition.__enter__)}
    position, reached = 0, True
    while reached:
        position, seen = position + 1, 0
        event = threading.Event()

        def step(frame: Any, kind: str, _: object, position: int = position) -> Any:
            nonlocal seen
            if frame.f_code not in codes:
                return None
            frame.f_trace_opcodes = True
            if kind == "opcode":
                seen += 1
                if seen == position:
                    signal.raise_signal(signal.SIGINT)
            return step

        with soak_interrupts.kept():
            before = sys.gettrace()
            sys.settrace(step)
            try:
                soak_interrupts.wait(event, 0.001)
                interrupted = soak_interrupts.take()
            except KeyboardInterrupt:
                interrupted = True
            finally:
                sys.settrace(before)
        reached = seen >= position
        assert interrupted == reached
        assert event._cond.acquire(False), position  # type: ignore[attr-defined]
        event._cond.release()  # type: ignore[attr-defined]
    assert position > 10


@pytest.mark.parametrize("work", ["calibrate", "drive"])
def test_a_second_interrupt_in_a_later_wait_is_not_taken_for_the_first(work: str) -> None:
    config = soak_settings.config_from(argparse.Namespace(producers=2), 600.0)
    load = Load(config)

    def interrupted() -> bool:
        return drive(config, 600.0, load).interrupted if work == "drive" else calibrate(config, 600.0).interrupted

    with soak_interrupts.kept():
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        second = mock.patch.object(threading.Event, "wait", lambda *_: signal.raise_signal(signal.SIGINT))
        real = soak_interrupts.wait

        def wait(event: threading.Event, seconds: float) -> bool:
            with second:
                return real(event, seconds)

        with mock.patch.object(soak_interrupts, "wait", wait), pytest.raises(KeyboardInterrupt) as caught:
            interrupted()
    assert not isinstance(caught.value, soak_interrupts.Interrupted)


def test_an_interrupt_whose_wake_up_is_lost_ends_a_wait_all_the_same() -> None:
    # As one that comes between the last look for signals and the system's wait, which then has nothing to wait for.
    event = threading.Event()
    real, waits = event.wait, []

    def wait(timeout: float | None = None) -> bool:
        assert timeout is not None
        assert timeout <= soak_interrupts.GLANCE
        waits.append(timeout)
        if len(waits) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(0)

    with mock.patch.object(event, "wait", wait), soak_interrupts.kept(), pytest.raises(soak_interrupts.Interrupted):
        soak_interrupts.wait(event, 600.0)
    assert len(waits) == 2


def test_a_second_ctrl_c_ends_a_soak_without_a_result(tmp_path: Path) -> None:
    options = ("--producers", "2", "--out", str(tmp_path), "--duration", "100ms", "--settings", "none")
    with OnTerminal("-c", INTERRUPTED, "flush2", "run", *options) as terminal:
        for number in range(2):
            terminal.read_until(f"now: flush{number}")
            terminal.interrupt()
        assert terminal.exit_code() == 130, terminal.text
    assert terminal.text.splitlines()[-1].endswith("soak: interrupted again: there is no result")
    assert_restored(terminal.text)


@pytest.mark.parametrize(
    ("argv", "phase", "words", "code", "last"),
    [
        (["tune"], "", "payload size", 130, "soak: interrupted"),
        (["tune", "--payload", "64"], "drive", "now: drive", 130, "soak: interrupted: there are no settings"),
        (
            ["baseline", "--producers", "2"],
            "calibrate",
            "now: calibrate",
            130,
            "soak: interrupted: nothing is recorded",
        ),
        (["stress", "--each", "1000000"], "", "stress: 256 producers", 0, "written       "),
    ],
    ids=["tune asking", "tune", "baseline", "stress"],
)
def test_ctrl_c_in_other_commands_of_soak_is_told_in_a_line(
    argv: list[str], phase: str, words: str, code: int, last: str, tmp_path: Path
) -> None:
    with OnTerminal("-c", INTERRUPTED, phase, *argv, "--out", str(tmp_path)) as terminal:
        terminal.read_until(words)
        terminal.interrupt()
        assert terminal.exit_code() == code, terminal.text
    assert last in terminal.text.splitlines()[-1]
    assert_restored(terminal.text)
    if code:
        assert list(tmp_path.iterdir()) == []
    else:
        (path,) = tmp_path.iterdir()
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["interrupted"]
        assert result["accepted"] == result["delivered"] < result["wanted"]


@walkable
def test_ctrl_c_ends_the_processes_of_soak_interleave_without_a_word() -> None:
    options = ("interleave", "--depth", "1", "--twins", "no", "--workers", "1")
    with OnTerminal("-c", INTERRUPTED, "", *options) as terminal:
        terminal.read_until(" runs in ")  # it has begun
        terminal.interrupt()
        assert terminal.exit_code() == 130, terminal.text
    assert terminal.text.splitlines()[-1].endswith("soak: interrupted")
    assert "Traceback" not in terminal.text


EMULATED = """#!{python}
import signal, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    print("now: emulated", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(0.5)  # longer than subprocess.run() would wait until it kills
    print("ended well", flush=True)
    raise SystemExit(7) from None
"""

ON_PI = """
import os, sys
from pathlib import Path

os.close(os.open(os.ttyname(0), os.O_RDWR))

from soak import pi
from soak.__main__ import entry

emulator = Path(sys.argv.pop(1))
pi.provide = lambda: (emulator, emulator.parent)
pi.interpreter = lambda root: emulator
sys.exit(entry())
"""


@pytest.mark.parametrize("key", [True, False], ids=["Ctrl-C", "SIGTERM"])
def test_ctrl_c_lets_a_soak_that_is_emulated_end_in_its_own_way(key: bool, tmp_path: Path) -> None:
    emulator = tmp_path / "emulator"
    emulator.write_text(EMULATED.format(python=sys.executable), encoding="utf-8")
    emulator.chmod(0o755)
    with OnTerminal("-c", ON_PI, str(emulator), "pi", "run") as terminal:
        terminal.read_until("now: emulated")
        if key:
            terminal.interrupt()
        else:
            terminal.send_signal(signal.SIGTERM)
        assert terminal.exit_code() == 7, terminal.text
    assert "ended well" in terminal.text
    assert "Traceback" not in terminal.text


def test_a_soak_stress_that_is_not_done_in_time_fails() -> None:
    options = argparse.Namespace(producers=2)
    config = soak_settings.config_from(options, 1.0)
    counted, outcome = soak_census.take(config, 5.0, each=10, every=0.001)
    assert soak_stress.judge(config, counted, outcome, 20).status == "pass"
    late = soak_stress.judge(config, counted, outcome, 21)
    assert (late.status, late.note.partition(";")[0]) == ("fail", "not done within 1.00 s: 20 of 21 payloads sent")
    outcome.interrupted = True
    assert soak_stress.judge(config, counted, outcome, 21).status == "warn"


def test_what_soak_tune_finds_is_what_a_run_uses_unless_an_option_says_else(tmp_path: Path) -> None:
    done = run_python("-m", "soak", "tune", "--probe", "10ms", "--payload", "64", "--out", str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("CALIBRATED: ", "PROVISIONAL: "))
    tuned = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))["settings"]
    assert tuned["payload"] == "64"
    assert done.stdout.endswith(f"settings.json: a run with --out {tmp_path} uses them from now on\n")
    parser = soak_main.parser()
    options = parser.parse_args(["run", "--out", str(tmp_path), "--producers", "3"])
    config, note = soak_run.configure(options, soak_environment.describe())
    assert (config.payload, config.producers) == (64, 3)
    assert config.max_buffered_bytes == int(tuned["max_buffered_bytes"])
    assert config.max_batch_bytes == (None if tuned["max_batch_bytes"] == "none" else int(tuned["max_batch_bytes"]))
    assert str(tmp_path / "settings.json") in note
    options = parser.parse_args(["run", "--out", str(tmp_path), "--settings", "none"])
    assert soak_run.configure(options, {})[0].payload == "telemetry"


def test_soak_pi_does_not_take_the_memory_of_the_host_for_its_own() -> None:
    assert soak_environment.describe()["memory_bytes"]
    with mock.patch.dict(os.environ, {soak_environment.EMULATED: "a board"}):
        place = soak_environment.describe()
    assert (place["machine"], place["memory_bytes"]) == ("a board", None)


def test_a_soak_does_not_use_the_settings_of_another_machine(tmp_path: Path) -> None:
    place = {"machine": "a board", "cores": 4, "interpreter": "CPython 3.11"}
    path = soak_settings.write(tmp_path, {"producers": "7"}, place, True, "today")
    assert soak_settings.read(path, place)[0] == {"producers": "7"}
    found, note = soak_settings.read(path, {**place, "cores": 2})
    assert found == {}
    assert "another cores" in note


@pytest.mark.parametrize("text", ["", "[]", '{"settings": {}}', '{"settings": {"nobody": "1"}, "environment": {}}'])
def test_a_file_that_holds_no_soak_settings_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        soak_settings.read(path, {})


@settings(deadline=None)
@given(memory=st.one_of(st.none(), st.integers(1 << 20, 1 << 50)), size=st.integers(0, 1 << 20))
def test_soak_tune_never_recommends_more_than_an_eighth_of_the_memory(memory: int | None, size: int) -> None:
    config = soak_settings.config_from(argparse.Namespace(payload=size, max_buffered_bytes=1 << 20), 1.0)
    most = soak_tune.largest_buffer(config, memory)
    within = soak_heap.bound(replace(config, producers=32, max_buffered_bytes=most)) <= (memory or 512 << 20) // 8
    assert within or most == 1  # not even one byte: then it recommends nothing


def test_soak_tune_asks_until_the_answer_is_a_payload_size(capsys: Any) -> None:
    answers = iter(["heavy\n", "10KiB\n"])
    assert soak_tune.ask(lambda: next(answers)) == 10 * 1024
    assert "'heavy' is not a size" in capsys.readouterr().err
    assert soak_tune.ask(lambda: "") == "telemetry"
    assert soak_tune.ask(lambda: "heavy") == "telemetry"


def test_a_soak_baseline_is_worse_when_ratio_heap_or_drain_is_beyond_its_spread() -> None:
    known = ("board", 0.5, 0.1)
    assert verdict.judge_throughput(1.0, 0.41, known).status == "pass"
    assert verdict.judge_throughput(1.0, 0.39, known).status == "fail"
    heap = ("board", 1000.0, 100.0)
    assert verdict.judge_memory(1100, 5000, 0, heap).status == "pass"
    assert verdict.judge_memory(1101, 5000, 0, heap).status == "fail"
    assert verdict.judge_memory(1101, 5000, 0).status == "pass"
    drain = ("board", 0.01, 0.05)
    assert verdict.judge_drain(0.06, drain).status == "pass"
    assert verdict.judge_drain(0.07, drain) == verdict.Finding(
        "fail", "drained in 70.0 ms: above the baseline board: 10.0 ms +- 50.0 ms"
    )


def test_a_recorded_soak_baseline_is_found_by_machine_interpreter_and_settings(tmp_path: Path) -> None:
    place = soak_environment.describe()
    config = soak_settings.config_from(argparse.Namespace(producers=2), 0.1)
    result = {
        "ratio": 0.5,
        "peak_heap_bytes": 1000,
        "drain_seconds": 0.001,
        "delivered_per_second": 1.0,
        "calibration": 2.0,
        "config": config.as_json(),
        "interrupted": False,
        "verdict": {"overall": {"status": "pass", "note": ""}},
    }
    with mock.patch.object(soak_run, "run", return_value=result), contextlib.redirect_stdout(io.StringIO()):
        code = soak_main.main(["baseline", "--runs", "2", "--producers", "2", "--out", str(tmp_path)])
    assert code == 0
    choice = soak_baseline.choose("auto", config.as_json(), place, tmp_path)
    assert choice.baseline is not None
    assert choice.baseline.expected("ratio") == (choice.baseline.name, 0.5, 0.025)
    for other in ({**config.as_json(), "producers": 3}, {**config.as_json(), "interval": 1.0}):
        assert soak_baseline.choose("auto", other, place, tmp_path).baseline is None


def test_a_soak_run_that_fails_is_not_recorded(tmp_path: Path, capsys: Any) -> None:
    result = {"interrupted": False, "verdict": {"overall": {"status": "fail", "note": "correctness fail"}}}
    with mock.patch.object(soak_run, "run", return_value=result):
        assert soak_main.main(["baseline", "--runs", "2", "--out", str(tmp_path)]) == 1
    assert "correctness fail: not recorded" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_soak_pi_on_a_raspberry_pi_runs_there(tmp_path: Path, capsys: Any) -> None:
    with mock.patch.object(soak_environment, "machine", return_value="Raspberry Pi 4 Model B Rev 1.4"):
        code = soak_main.main(["pi", "stress", "--producers", "2", "--each", "5", "--out", str(tmp_path)])
    told = capsys.readouterr()
    assert code == 0
    assert "not emulated" in told.err
    assert "10 delivered" in told.out


def test_soak_pi_without_debians_tools_says_so_in_a_line(tmp_path: Path, capsys: Any) -> None:
    with mock.patch.object(soak_pi, "CACHE", tmp_path), mock.patch.object(shutil, "which", return_value=None):
        assert soak_main.main(["pi"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("soak: no apt-get here: ")


def monitored(display: str) -> None:
    """What a run shows of two snapshots."""
    config = soak_settings.config_from(argparse.Namespace(), 1.0)
    with make() as d, soak_progress.open_monitor(display, config, None, 1.0, 1024) as monitor:
        d.enqueue(b"x")
        monitor.sample(0.5, d.stats())
        monitor.sample(1.0, d.stats())
        d.stop()


def test_a_soak_shows_a_live_display_with_rich(capsys: Any) -> None:
    pytest.importorskip("rich")
    monitored("live")
    shown = capsys.readouterr().err
    assert "events/s" in shown
    assert "time left" in shown


@pytest.mark.parametrize(("display", "lines"), [("live", 3), ("plain", 2), ("auto", 2), ("none", 0)])
def test_a_soak_without_rich_shows_plain_lines(display: str, lines: int, capsys: Any) -> None:
    with mock.patch.dict(sys.modules, {"rich.console": None, "rich.progress_bar": None}):
        monitored(display)
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_every_row_of_the_benchmark_is_measured_by_its_group() -> None:
    micro = set(soak_micro.subjects())
    handover = {*soak_handover.subjects(), *soak_handover.PEERS}
    for row in soak_rows.ROWS:
        for name in filter(None, (row.subject, row.control)):
            if row.group in ("micro", "handover"):
                assert name in (micro if row.group == "micro" else handover), row
            elif row.group in ("scaling", *soak_rows.SOAKS):
                stem = re.sub("_(bare|drain|shutdown|slowest)$", "", name)
                assert stem in soak_rows.SOAKS or stem in soak_rows.SCALING, row


def test_the_subjects_of_the_benchmark_do_their_work() -> None:
    for name, measure in {**soak_micro.subjects(), **soak_handover.subjects()}.items():
        assert measure() > 0, name


def test_a_soak_of_the_benchmark_gives_a_value_for_each_of_its_rows() -> None:
    values = soak_worker.soak("soak_32", soak_rows.soak_config(producers=3), 0.1, turns=2)
    assert {name.removeprefix("soak_32") for name in values} == {"", "_bare", "_drain", "_shutdown", "_slowest"}
    assert all(len(found) == 1 and found[0] > 0 for found in values.values())


def test_the_overhead_of_looking_at_a_soak_is_measured_beside_one_that_nobody_looks_at(tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    options = ("--rounds", "1", "--duration", "20ms", "--producers", "2", "--json", str(path))
    done = run_python("-m", "soak", "overhead", *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    ways = json.loads(path.read_text(encoding="utf-8"))["ways"]
    left_out = {"live"} if "rich is not installed" in done.stderr else set()
    assert set(ways) == set(soak_overhead.WAYS) - left_out
    assert all(found["rate"] > 0 and found["cpu_seconds"] > 0 for found in ways.values())
    assert ways["unwatched"]["cost"] == ways["unwatched"]["cost_spread"] == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]][: len(ways)] == list(ways)


@pytest.mark.parametrize(
    ("slowed", "word"), [([0.96] * 4, "MISSED"), ([0.98] * 4, "met"), ([0.94, 0.96, 0.98, 1.0], "TOO NOISY to tell")]
)
def test_the_target_for_looking_at_a_soak_is_missed_when_it_is_slowed_by_more(slowed: list[float], word: str) -> None:
    place = {"machine": "m", "cores": 2, "interpreter": "i", "python": "p", "build": "b", "commit": None}
    # CPU seconds an event; both unwatched loads have 1 on average.
    rounds = [{"unwatched": 0.9, "again": 1.1, "samples": 1.01, "plain": 1 / slow, "census": 10.0} for slow in slowed]
    figures = soak_overhead.evaluate(
        [{way: soak_overhead.Measured(1.0, seconds) for way, seconds in each.items()} for each in rounds]
    )
    assert soak_overhead.table(figures, 8, place)[-2].startswith(f"{word}: ")
    assert soak_overhead.table(figures, 7, place)[-2].startswith("TOO FEW ROUNDS to tell: ")


@pytest.mark.parametrize("size", [None, 35, 10240])
def test_soak_events_without_probes_are_the_same_but_for_the_probes(size: int | None) -> None:
    sent = soak_payloads.Sent(size)
    probed, plain = (list(islice(soak_payloads.events(size, 7, counter), 3000)) for counter in (sent, None))
    identity = slice(*(soak_payloads.identity_start(size) + place for place in (0, soak_payloads.IDENTITY_SIZE)))
    assert [event[identity] for event in probed] == [event[identity] for event in plain]
    assert [i for i, event in enumerate(probed) if soak_payloads.MARK in event] == [63, 191, 447, 959, 1983]
    assert sent.probes == 5
    assert not any(soak_payloads.MARK in event for event in plain)


ROW = soak_rows.Row("a / b", "", "micro", "a", "b", 2.0)
SHARE = soak_rows.Row("a : b", "", "micro", "a", "b", 0.5, least=True, best=False)


def test_a_ratio_is_taken_within_a_round_and_the_median_of_the_rounds_counts() -> None:
    rounds = [{"a": [4.0, 2.0], "b": [1.0, 2.0]}, {"a": [6.0], "b": [2.0]}, {"a": [40.0], "b": [10.0]}]
    assert soak_bench.evaluate(ROW, rounds) == (3.0, 1.0, 6.0, 2.0)
    assert soak_bench.evaluate(SHARE, rounds) == pytest.approx((1 / 3, (0.4 - 0.25) / 2, 6.0, 2.0))
    assert soak_bench.evaluate(ROW, [{"a": [1.0]}]) is None
    assert soak_bench.evaluate(ROW, []) is None


def test_the_comparison_finds_what_is_worse_by_more_than_the_noise() -> None:
    with mock.patch.object(soak_bench, "ROWS", (ROW, SHARE)):
        recorded = {"a / b": (2.0, 0.1), "a : b": (0.5, 0.02), "gone": (1.0, 0.0)}
        same = soak_bench.compare({"a / b": (2.35, 0.1, 0, 0), "a : b": (0.43, 0.02, 0, 0)}, recorded)
        better = soak_bench.compare({"a / b": (1.0, 0.0, 0, 0), "a : b": (0.9, 0.0, 0, 0)}, recorded)
        worse = soak_bench.compare({"a / b": (2.37, 0.1, 0, 0), "a : b": (0.41, 0.02, 0, 0)}, recorded)
    assert same == better == []
    assert [line.split(":")[0].split(" /")[0] for line in worse] == ["a", "a "]


def test_the_table_says_which_target_is_missed() -> None:
    place = {"machine": "m", "cores": 2, "interpreter": "i", "python": "p", "build": "b", "commit": None}
    with mock.patch.object(soak_bench, "ROWS", (ROW, SHARE)):
        text = soak_bench.table({"a / b": (2.5, 0.1, 1e-7, 2e-7), "a : b": (0.6, 0.1, 1e-7, 2e-7)}, place)
    missed, met = text.splitlines()[1:3]
    assert "MISSED" in missed and "100 ns" in missed
    assert " met " in met


def test_without_pyperf_the_benchmark_says_what_to_do() -> None:
    program = "import sys; sys.modules['pyperf'] = None; from soak.__main__ import main; main(['bench'])"
    done = run_python("-c", program, cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "bench needs pyperf" in line


def test_a_peer_that_is_not_installed_is_left_out_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> Any:
        raise ImportError

    with (
        mock.patch.dict(soak_handover.PEERS, {"peer": ("a-package", missing)}, clear=True),
        mock.patch.object(soak_worker, "_in_turns", side_effect=lambda subjects, turns: sorted(subjects)),
    ):
        names: Any = soak_worker.run_handover(1.0)

    assert "peer is left out: a-package is not installed" in capsys.readouterr().err
    assert names == sorted(soak_handover.subjects())


def test_an_interpreter_without_tracemalloc_soaks_without_a_look_at_the_heap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--duration", "0.1s", "--producers", "2", "--out", str(tmp_path), "--baseline", "none"]
    short_passes = mock.patch.object(Config, "pass_seconds", return_value=0.1)
    with short_passes, mock.patch.object(soak_heap, "TRACED", False):
        assert soak_main.main(["run", *options]) == 0
        assert soak_worker.run_heap(0.1) == {}

    out = capsys.readouterr().out
    assert "peak not measured" in out
    assert "warn: not measured: this interpreter has no tracemalloc" in out


def test_a_verdict_of_fail_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--duration", "0.1s", "--producers", "2", "--out", str(tmp_path), "--baseline", "none"]
    short_passes = mock.patch.object(Config, "pass_seconds", return_value=0.1)
    with short_passes, mock.patch.object(verdict, "DRAIN_FAIL", -1.0):
        code = soak_main.main(["run", *options])
    assert code == 1
    assert re.search("FAIL: .*drain fail", capsys.readouterr().out)


def test_the_telemetry_mix_is_163_bytes_on_average() -> None:
    events = soak_payloads.events(None, 7, soak_payloads.Sent(None))
    sizes = [len(event) for event in islice(events, 20 * 256)]
    assert sum(sizes) / len(sizes) == pytest.approx(163, abs=1)
    assert max(sizes) == soak_payloads.LARGEST


@pytest.mark.parametrize("size", [0, 1, 14, 15, 34, 35, 64, 10240])
def test_events_of_one_size_have_that_size(size: int) -> None:
    events = soak_payloads.events(size, 7, soak_payloads.Sent(size))
    assert {len(event) for event in islice(events, 600)} == {size}


@pytest.mark.parametrize(
    ("text", "size"), [("64", 64), ("64B", 64), ("320KiB", 327680), ("1.5MiB", 1572864), ("1GiB", 1 << 30)]
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KiB", "0", "-1", "1.5", "10KB", "1 KiB", "1e3", "nan", "99999999999999GiB"])
def test_bad_sizes_are_refused_with_the_text_in_the_message(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("5m", 300), ("1m30s", 90), ("10ms", 0.01), ("10us", 1e-5), ("1.5h", 5400), ("7ns", 7e-9)]
)
def test_times_are_read_with_their_units(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "0s", "0", "-5s", "5 m", "1e3s", "inf", "999999999999h"])
def test_bad_times_are_refused_with_the_text_in_the_message(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("figures", "status"),
    [
        ({}, "pass"),
        ({"lost": 1}, "fail"),
        ({"duplicated": 1}, "fail"),
        ({"rejected": 1}, "fail"),
        ({"rejected": 1, "on_full": "raise"}, "pass"),
        ({"problems": ["a consumer raised"]}, "fail"),
    ],
)
def test_the_verdict_on_correctness(figures: dict[str, Any], status: str) -> None:
    clean: dict[str, Any] = {"problems": [], "lost": 0, "duplicated": 0, "rejected": 0, "on_full": "block"}
    assert verdict.judge_correctness(**{**clean, **figures}).status == status


def test_the_overall_verdict_is_the_worst_one() -> None:
    good, poor, bad = (verdict.Finding(status, "") for status in ("pass", "warn", "fail"))
    assert verdict.overall({"a": good, "b": good}).status == "pass"
    assert verdict.overall({"a": good, "b": poor}).status == "warn"
    assert verdict.overall({"a": bad, "b": poor}) == verdict.Finding("fail", "a fail, b warn")


PLACE = {"machine": "a machine", "cores": 2, "interpreter": "CPython 3.11", "python": "3.11.2", "commit": "c" * 40}
RESULT = """{
  "schema": 1, "started": "2026-11-24T12:00:00+0000", "interrupted": false, "samples": "samples.jsonl",
  "delivered_per_second": 500000.0, "delivered": 10000000, "lost": 0, "duplicated": 0, "rejected": 0,
  "load_seconds": 20.0, "drain_seconds": 0.0007, "shutdown_seconds": 0.00006, "problems": [],
  "calibration": 1000000.0, "ratio": 0.5, "baseline": null, "peak_heap_bytes": 2700000, "peak_rss_bytes": 45000000,
  "latency_seconds": {"p50": 0.02, "p99": 0.05, "max": 0.1, "samples": 9, "buckets": [[0.0, 5], [0.03, 4]]},
  "heap": {"bound_bytes": 3500000, "allowance_bytes": 300000, "peak_buffered_bytes": 2000000, "seconds": 2},
  "stats": {"peak_buffered_bytes": 2000000},
  "config": {"producers": 32, "consumers": 1, "max_buffered_bytes": 2097152, "on_full": "block"}
}"""


def write_run(folder: Path, samples: Sequence[dict[str, Any]] = (), **changes: Any) -> Path:
    """Write a made-up result of `soak run`, and its samples; return the result's path."""
    result: dict[str, Any] = {**json.loads(RESULT), "environment": PLACE}
    parts = ("correctness", "throughput", "memory", "drain", "overall")
    result["verdict"] = {part: {"status": "pass", "note": "well"} for part in parts}
    lines = [json.dumps(line) for line in ({"type": "header", "started": result["started"]}, *samples)]
    lines.append('{"type": "sam')  # cut off by a kill
    (folder / result["samples"]).write_text("\n".join(lines), encoding="utf-8")
    path = folder / "result.json"
    path.write_text(json.dumps({**result, **changes}), encoding="utf-8")
    return path


def some_samples(number: int) -> list[dict[str, Any]]:
    fill = {"buffered_bytes": 1 << 20, "rejected": 0, "rss_bytes": 45_000_000, "waiting_producers": 3}
    return [{"type": "sample", "elapsed": float(i), "delivered": 500_000 * i, **fill} for i in range(1, number + 1)]


class Page(HTMLParser):
    """Reads a page and raises AssertionError when a tag is not closed in its turn or an id comes twice."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [value for name, value in self.attributes if name == "id"]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "body" in self.open and data.strip():
            self.words.append(data.strip())


def make_report(path: Path, *options: str) -> int:
    return soak_main.main(["report", "--run", str(path), "--out", str(path.parent / "made"), *options])


def read_page(path: Path) -> Page:
    return Page((path.parent / "made" / "report.html").read_text(encoding="utf-8"))


WITHOUT_MATPLOTLIB: dict[str, None] = {"matplotlib": None, "matplotlib.figure": None}


def test_a_report_is_one_page_that_begins_with_the_verdict_and_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_run(tmp_path, some_samples(300))
    with mock.patch.object(soak_charts, "png", return_value=b"picture"):  # it is drawn below
        assert make_report(path) == 0

    page = read_page(path)
    assert page.words[:2] == ["\u2713 PASS", "well"]
    assert page.tags.count("svg") == page.tags.count("figcaption") == 8
    assert "script" not in page.tags
    text = (tmp_path / "made" / "report.html").read_text(encoding="utf-8")
    assert not re.search("https?:|//|@import|<link|<img", text)
    assert all(not value or value.startswith("#") for name, value in page.attributes if name in ("href", "src"))
    assert len(text) < 500 * 1024
    assert "300 points, drawn 2 by 2" in text
    assert (tmp_path / "made" / "report.png").read_bytes() == b"picture"


def test_a_report_escapes_what_the_result_says(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    nasty = "<script>alert('&')</script>\ud800\n$x^2$ \U0001f600"
    verdicts = {name: {"status": nasty, "note": nasty} for name in ("correctness", "overall")}
    path = write_run(
        tmp_path,
        verdict=verdicts,
        environment={**PLACE, "machine": nasty, nasty: nasty},
        problems=[nasty, [[]]],
        baseline=nasty,
        ratio=0.5,
    )
    assert make_report(path) == 0

    page = read_page(path)
    assert "script" not in page.tags
    assert page.words[0] == "\u2717 FAIL"
    assert any("<script>alert('&')</script>" in words for words in page.words)
    assert (tmp_path / "made" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_a_run_that_came_to_nothing_says_so(tmp_path: Path) -> None:
    bad = {"status": "fail", "note": "not drained"}
    figures = ("delivered_per_second", "calibration", "ratio", "lost", "rejected", "peak_heap_bytes", "heap", "stats")
    times = ("latency_seconds", "drain_seconds", "shutdown_seconds", "load_seconds")
    nothing: dict[str, Any] = dict.fromkeys((*figures, *times))
    verdicts = {"overall": bad, "drain": bad}
    path = write_run(tmp_path, interrupted=True, verdict=verdicts, config={}, environment={}, **nothing)
    assert make_report(path) == 0

    page = read_page(path)
    assert page.words[:2] == ["\u2717 FAIL", "not drained (interrupted)"]
    assert page.words.count("not measured") == 8
    assert any("Nothing over time" in words for words in page.words)


def test_figures_of_a_result_that_are_none_are_not_measured(tmp_path: Path) -> None:
    path = write_run(
        tmp_path,
        [{"type": "sample", "elapsed": value, "delivered": value} for value in ("1", None, -1.0, math.nan, 10**400)],
        latency_seconds={"p50": math.inf, "p99": [], "max": "1", "buckets": [[0, 0], [1], 5, ["1", "2"]]},
        heap=[],
        lost="many",
        delivered=True,
    )
    with mock.patch.object(soak_charts, "png", return_value=b""):
        assert make_report(path) == 0
    assert read_page(path).words.count("not measured") == 4


def test_a_report_without_matplotlib_has_no_charts_and_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, some_samples(5))
    with mock.patch.dict(sys.modules, WITHOUT_MATPLOTLIB):
        assert make_report(path) == 0

    (line,) = capsys.readouterr().err.splitlines()
    assert "matplotlib is not installed" in line
    page = read_page(path)
    assert "svg" not in page.tags
    assert "500,000" in page.words
    assert os.listdir(tmp_path / "made") == ["report.html"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--run", "missing.json"], 1, "cannot read 'missing.json': No such file or directory"),
        (["--run", "."], 1, "cannot read '.': Is a directory"),
        (["--run", "other.json"], 1, "'other.json' is no result of `soak run`"),
        (["--run", "list.json"], 1, "'list.json' is no result of `soak run`"),
        (["--run", "later.json"], 1, "'later.json' has schema 2"),
        (["--html", "result.json/report.html"], 1, "cannot write 'result.json/report.html': "),
        (["--png", "result.json/report.png"], 1, "cannot write 'result.json/report.png': "),
        (["--html", "result.json"], 2, "each needs its own"),
        (["--html", "a", "--png", "./a"], 2, "each needs its own"),
        (["--run", ""], 2, "argument --run: '' is not a path"),
        (["--open"], 2, "--open"),
    ],
)
def test_an_error_of_the_report_is_one_line(
    options: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_run(tmp_path)
    (tmp_path / "other.json").write_bytes(b"\xff{")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "later.json").write_text(
        '{"schema": 2, "verdict": {}, "config": {}, "environment": {}}', encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    drawn = mock.patch.multiple(soak_charts, svg=mock.Mock(return_value=""), png=mock.Mock(return_value=b""))
    with drawn, contextlib.suppress(SystemExit) if code == 2 else contextlib.nullcontext():
        assert soak_main.main(["report", "--run", "result.json", "--out", "made", *options]) == code

    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_downsampling_keeps_every_extreme_and_the_mean() -> None:
    points = [(float(second), 1.0) for second in range(86_400)]
    points[777], points[80_000] = (777.0, 9.0), (80_000.0, -3.0)
    drawn = soak_charts.downsample(points)
    assert len(drawn) == 200
    assert (max(point.high for point in drawn), min(point.low for point in drawn)) == (9.0, -3.0)
    assert sum(point.mean for point in drawn) / 200 == pytest.approx(sum(value for _, value in points) / 86_400)
    assert soak_charts.downsample(points[:200])[777 % 200] == (177.0, 1.0, 1.0, 1.0)
    assert soak_charts.downsample([]) == []


def test_the_sample_after_the_end_makes_no_rate_of_its_own() -> None:
    samples = [{"elapsed": 1.0, "delivered": 100.0}, {"elapsed": 2.0, "delivered": 300.0}]
    after = {"elapsed": 2.001, "delivered": 300.1}
    assert soak_report.rates([*samples, after], "delivered") == [(1.0, 100.0), (2.001, pytest.approx(200.1 / 1.001))]


def test_the_latencies_shown_are_those_counted_in_few_buckets() -> None:
    latencies = Latencies()
    times = [0, 1, 63, 64, 127, 128, 5_000_000, 5_000_001, 10**12]
    for nanoseconds in times:
        latencies.add(nanoseconds)
    buckets = latencies.buckets()
    edges = [1e9 * seconds for seconds, _ in buckets]
    assert len(buckets) <= 200
    assert edges == sorted(set(edges))
    for (_, many), low, high in zip(buckets, edges, [*edges[1:], 1e99]):
        assert many == sum(low <= nanoseconds < high for nanoseconds in times)
    assert Latencies().buckets() == []


def test_a_run_names_its_samples_and_a_report_finds_them(tmp_path: Path) -> None:
    options = ["--duration", "0.1s", "--producers", "2", "--out", str(tmp_path), "--baseline", "none"]
    with mock.patch.object(Config, "pass_seconds", return_value=0.1):
        soak_main.main(["run", *options])
    report = soak_report.read(tmp_path / "latest.json")
    assert report.unsampled == ""
    assert report.samples[-1]["delivered"] == report.number("delivered")


QUICK = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
BULKY = settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
BYTE = st.integers(1, 1000)
SMALL_LIMITS = st.tuples(BYTE, st.none() | BYTE)
ROOMY = st.integers(64 * tempo.KiB, 256 * tempo.KiB)
LARGE_LIMITS = st.tuples(ROOMY, st.none() | ROOMY | st.integers(1, 9000))
RUNS_OF_SIZES = st.lists(  # (size, how many in a row, drained afterwards)
    st.tuples(st.integers(0, 5000) | st.integers(0, 520), st.integers(1, 200), st.booleans()), max_size=20
)


def numbered(number: int, size: int) -> bytes:
    """A payload that shows its number, if its size allows."""
    return b"%d" % number if size == len(b"%d" % number) else (b"%d" % number).rjust(size, b".")[: max(0, size)]


def charge_of(payload: bytes) -> int:
    """What a payload counts against max_buffered_bytes."""
    return max(1, len(payload))


def greedy(items: list[bytes], limit: int | None) -> list[list[bytes]]:
    """Batches as the contract closes them, the last one by a flush."""
    batches: list[list[bytes]] = []
    open_batch: list[bytes] = []
    size = 0
    for item in items:
        if limit is not None and open_batch and size + len(item) > limit:
            batches.append(open_batch)
            open_batch, size = [], 0
        open_batch.append(item)
        size += len(item)
        if limit is not None and size >= limit:
            batches.append(open_batch)
            open_batch, size = [], 0
    return [*batches, open_batch] if open_batch else batches


def drained(d: tempo.Dispatcher) -> list[tempo.Batch]:
    """Everything that is buffered, the open batch too, without waiting."""
    d.flush(0)
    batches = []
    with contextlib.suppress(queue.Empty, tempo.Stopped):
        while True:
            batches.append(d.get(timeout=0))
    return batches


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> type[BaseException] | None:
    """With which of tempo's errors a call was refused; None: it was not."""
    try:
        call(*args, **kwargs)
    except tempo.Error as exc:
        return type(exc)
    return None


def assert_balanced(stats: tempo.Stats) -> None:
    """The conservation law, in payloads and in bytes."""
    assert stats.accepted == stats.delivered + stats.in_flight + stats.buffered + stats.discarded
    total = stats.delivered_bytes + stats.in_flight_bytes + stats.buffered_bytes + stats.discarded_bytes
    assert stats.accepted_bytes == total
    assert stats.buffered_bytes <= stats.peak_buffered_bytes


# -- Properties: boundaries, the greedy rule, the bound --


def follow(limits: tuple[int, int | None], sizes: list[int | None]) -> None:
    """Enqueue payloads of these sizes (None: drain), and compare each outcome with the contract's rules."""
    limit, batch_limit = limits
    d = make(max_buffered_bytes=limit, max_batch_bytes=batch_limit)
    held: list[bytes] = []
    peak = 0
    for number, size in enumerate([*sizes, None]):
        if size is None:
            batches = drained(d)
            assert [batch.tolist() for batch in batches] == greedy(held, batch_limit)
            for batch in batches:
                assert bytes(batch.data) == b"".join(batch.tolist())
                assert [bytes(view) for view in batch] == batch.tolist()
                assert batch.nbytes == sum(map(len, batch))
            held = []
            d._check()
            continue
        payload = numbered(number, size)
        used = sum(map(charge_of, held)) if limit < 2000 else None
        refused = refusal(d.enqueue, payload)
        if used is None:  # summing at each would cost too much: the outcome is compared with the dispatcher's own sum
            used = 0 if refused is None else d.stats().buffered_bytes
        fits = used + charge_of(payload) <= limit
        too_large = charge_of(payload) > limit
        if refused is not None or limit < 2000:
            assert refused is (tempo.PayloadTooLarge if too_large else None if fits else tempo.QueueFull)
        if refused is None:
            held.append(payload)
            peak += charge_of(payload)
        elif not too_large:
            assert used == sum(map(charge_of, held))
    stats = d.stats()
    assert stats.peak_buffered_bytes <= limit
    assert (stats.accepted_bytes, stats.buffered) == (peak, 0)
    assert_balanced(stats)


@QUICK
@given(SMALL_LIMITS, st.lists(st.none() | st.integers(0, 300) | st.integers(0, 9), max_size=60))
def test_small_limits_give_greedy_batches_and_an_exact_bound(
    limits: tuple[int, int | None], sizes: list[int | None]
) -> None:
    follow(limits, sizes)


@BULKY
@given(LARGE_LIMITS, RUNS_OF_SIZES)
def test_large_limits_give_greedy_batches_and_an_exact_bound(
    limits: tuple[int, int | None], runs: list[tuple[int, int, bool]]
) -> None:
    sizes: list[int | None] = []
    for size, count, drain in runs:
        sizes += [size] * count
        sizes += [None] * drain
    follow(limits, sizes)


def compare_with_many(limits: tuple[int, int | None], sizes: list[int], lazy: bool) -> None:
    """Enqueue one by one until refused in one dispatcher, as many in another: no difference shows."""
    limit, batch_limit = limits
    items = [numbered(number, size) for number, size in enumerate(sizes)]
    one = make(max_buffered_bytes=limit, max_batch_bytes=batch_limit)
    many = make(max_buffered_bytes=limit, max_batch_bytes=batch_limit)
    taken = 0
    refused = None
    for item in items:
        refused = refusal(one.enqueue, item)
        if refused is not None:
            break
        taken += 1

    try:
        accepted = many.enqueue_many(iter(items) if lazy else items)
        error: type[BaseException] | None = None
    except tempo.Error as exc:
        accepted, error = exc.accepted, type(exc)

    assert (accepted, error) == (taken, refused)
    assert many.stats() == one.stats()
    assert [batch.tolist() for batch in drained(many)] == [batch.tolist() for batch in drained(one)]
    assert many.stats() == one.stats()
    one._check()
    many._check()


@QUICK
@given(SMALL_LIMITS, st.lists(st.integers(0, 300) | st.integers(0, 3), max_size=40), st.booleans())
def test_enqueue_many_is_enqueue_many_times_under_small_limits(
    limits: tuple[int, int | None], sizes: list[int], lazy: bool
) -> None:
    compare_with_many(limits, sizes, lazy)


@BULKY
@given(LARGE_LIMITS, RUNS_OF_SIZES, st.booleans())
def test_enqueue_many_is_enqueue_many_times_under_large_limits(
    limits: tuple[int, int | None], runs: list[tuple[int, int, bool]], lazy: bool
) -> None:
    compare_with_many(limits, [size for size, count, _ in runs for _ in range(count)], lazy)


# -- Model: a dispatcher against plain lists --

INSTANT = 1e-14  # seconds: a timeout that is over at once, on a clock that stands still
INTERVAL = 1.0


class SmallModel(RuleBasedStateMachine):
    """Every public call against plain lists, on a clock that the rules move. Small limits: all is exact."""

    limits = SMALL_LIMITS
    sizes = st.integers(0, 300) | st.integers(0, 9)
    exact = True

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.limit, self.batch_limit = data.draw(self.limits)
        self.d, self.clock = with_clock(
            interval=INTERVAL, max_buffered_bytes=self.limit, max_batch_bytes=self.batch_limit
        )
        self.closed: list[list[bytes]] = []
        self.open: list[bytes] = []
        self.born = 0.0
        self.state = "running"
        self.number = 0
        self.peak = 0
        self.batches = 0
        self.counts: Counter[str] = Counter()

    def payload(self, size: int) -> bytes:
        self.number += 1
        return numbered(self.number, size)

    def buffered(self) -> int:
        return sum(charge_of(item) for batch in [*self.closed, self.open] for item in batch)

    def count(self, name: str, items: list[bytes]) -> None:
        self.counts[name] += len(items)
        self.counts[name + "_bytes"] += sum(map(charge_of, items))

    def cut(self) -> None:
        if self.open:
            self.closed.append(self.open)
            self.open = []

    def offer(self, item: bytes) -> tuple[type[BaseException], ...]:
        """What the model does with a payload: the errors that may refuse it; none: accepted."""
        if self.state != "running":
            self.count("rejected", [item])
            return (tempo.Closed, tempo.PayloadTooLarge)
        if self.buffered() + charge_of(item) > self.limit:
            self.count("rejected", [item])
            return (tempo.PayloadTooLarge if charge_of(item) > self.limit else tempo.QueueFull,)
        if self.batch_limit is not None and sum(map(len, self.open)) + len(item) > self.batch_limit:
            self.cut()
        if not self.open:
            self.born = self.clock.now
        self.open.append(item)
        if self.batch_limit is not None and sum(map(len, self.open)) >= self.batch_limit:
            self.cut()
        self.count("accepted", [item])
        self.peak = max(self.peak, self.buffered())
        return ()

    def due(self) -> bool:
        return bool(self.closed or (self.open and self.clock.now >= self.born + INTERVAL))

    def take(self, batch: tempo.Batch) -> None:
        if not self.closed:
            assert not self.exact or self.due()
            self.cut()
        expected = self.closed.pop(0)
        assert batch.tolist() == expected
        self.batches += 1
        self.count("delivered", expected)
        if self.state == "shutting_down" and not self.closed:
            self.state = "stopped"

    def discard(self, batches: list[tempo.Batch]) -> None:
        self.cut()
        assert [batch.tolist() for batch in batches] == self.closed
        for batch in self.closed:
            self.count("discarded", batch)
        self.closed = []
        self.state = "stopped"

    @rule(size=sizes)
    def enqueue(self, size: int) -> None:
        item = self.payload(size)
        refused = self.offer(item)
        if refused:
            with pytest.raises(refused):
                self.d.enqueue(item)
        else:
            self.d.enqueue(item)

    @rule(size=sizes, count=st.integers(2, 30))
    def enqueue_a_run(self, size: int, count: int) -> None:
        for _ in range(count):
            self.enqueue(size)

    @rule(size=sizes)
    def enqueue_with_a_tiny_timeout(self, size: int) -> None:
        item = bytearray(self.payload(size))
        refused = self.offer(bytes(item))
        if refused:
            with pytest.raises(refused):
                self.d.enqueue(item, timeout=INSTANT)
        else:
            self.d.enqueue(item, timeout=INSTANT)

    @rule(run=st.lists(sizes, max_size=12), timeout=st.sampled_from([0, INSTANT]))
    def enqueue_many(self, run: list[int], timeout: float) -> None:
        items = [self.payload(size) for size in run]
        refused: tuple[type[BaseException], ...] = ()
        taken = 0
        for item in items:
            refused = self.offer(item)
            if refused:
                break
            taken += 1
        if refused:
            with pytest.raises(tempo.Error) as caught:
                self.d.enqueue_many(items, timeout=timeout)
            assert isinstance(caught.value, refused)
            assert caught.value.accepted == taken
        else:
            assert self.d.enqueue_many(items, timeout=timeout) == taken

    @rule()
    def get(self) -> None:
        try:
            batch = self.d.get(timeout=0)
        except queue.Empty:
            assert not self.due()
            assert self.state == "running"
        except tempo.Stopped:
            assert self.state == "stopped"
        else:
            self.take(batch)

    @precondition(lambda self: self.due())
    @rule()
    def iterate(self) -> None:
        for batch in self.d:
            self.take(batch)
            break
        if not CPYTHON:
            gc.collect()  # the iterator is alive until then, and this thread in its loop's body

    @precondition(lambda self: self.state == "stopped")
    @rule()
    def iterate_after_the_end(self) -> None:
        assert list(self.d) == []

    @rule()
    def flush(self) -> None:
        self.cut()
        done = self.d.flush(0)
        assert self.state == "stopped" or done is (not self.closed)

    @rule(quarters=st.integers(1, 6))
    def advance_the_clock(self, quarters: int) -> None:
        self.clock.now += quarters / 4

    @precondition(lambda self: self.number > 20)
    @rule()
    def shutdown(self) -> None:
        self.cut()
        if self.closed:
            with pytest.raises(tempo.DrainTimeout) as caught:
                self.d.shutdown(timeout=0)
            self.discard(caught.value.undelivered)
        else:
            self.d.shutdown(timeout=0)
            self.state = "stopped"

    @precondition(lambda self: self.number > 20 and self.due())
    @rule()
    def shutdown_in_a_loop_body(self) -> None:
        for batch in self.d:
            self.take(batch)
            self.d.shutdown(timeout=0)
            self.cut()
            self.state = "shutting_down" if self.closed else "stopped"
            break
        if not CPYTHON:
            gc.collect()  # until the iterator is collected, this thread is in its loop's body

    @precondition(lambda self: self.number > 40)
    @rule()
    def stop(self) -> None:
        self.discard(self.d.stop())

    @invariant()
    def every_invariant_holds(self) -> None:
        if hasattr(self, "d"):
            self.d._check()

    @invariant()
    def stats_are_the_models(self) -> None:
        if not hasattr(self, "d"):
            return
        stats = self.d.stats()
        seen = {name: getattr(stats, name) for name in stats._fields if name in EXPECTED}
        assert seen == {name: self.counts[name] for name in EXPECTED}
        assert stats.buffered == sum(map(len, self.closed)) + len(self.open)
        assert stats.buffered_bytes == self.buffered() <= self.limit
        assert stats.peak_buffered_bytes == self.peak
        assert stats.batches == self.batches
        assert stats.state == self.state
        assert (stats.waiting_producers, stats.waiting_consumers) == (0, 0)
        assert_balanced(stats)


EXPECTED = {name + suffix for name in ("accepted", "delivered", "discarded", "rejected") for suffix in ("", "_bytes")}


class LargeModel(SmallModel):
    """The same under large limits. A batch that began within a credit may close early, so due-ness is one-sided."""

    limits = LARGE_LIMITS
    exact = False

    @rule(size=st.integers(0, 3000) | st.integers(1, 512), count=st.integers(1, 150))
    def enqueue_larger_ones(self, size: int, count: int) -> None:
        for _ in range(count):
            self.enqueue(size)


MODEL = settings(deadline=None, max_examples=60, stateful_step_count=30, suppress_health_check=list(HealthCheck))


TestSmallModel = SmallModel.TestCase
TestSmallModel.settings = MODEL
TestLargeModel = LargeModel.TestCase
TestLargeModel.settings = settings(MODEL, max_examples=25)


# -- Censuses: each accepted payload once --


class Ledger:
    """What one producer was told."""

    def __init__(self) -> None:
        self.accepted: list[bytes] = []
        self.refused: list[bytes] = []
        self.raised = 0


def produce(d: tempo.Dispatcher, producer: int, count: int, sizes: tuple[int, ...]) -> Ledger:
    """Enqueue `count` payloads, the way that the producer's number says, and note what became of each."""
    rng = random.Random(producer)
    ledger = Ledger()
    items = []
    for i in range(count):
        size = rng.choice(sizes)
        items.append((bytes([producer]) + i.to_bytes(3, "big")).ljust(size, b"x") if size else b"")
    policy = producer % 5
    timeout = (0.0, 0.01, None, 0.01, None)[policy]
    at = 0
    while at < len(items):
        some = items[at : at + (rng.randrange(1, 60) if policy >= 3 else 1)]
        at += len(some)
        try:
            if policy >= 3:
                assert d.enqueue_many(some, timeout=timeout) == len(some)
            else:
                d.enqueue(some[0], timeout=timeout)
            ledger.accepted += some
        except (tempo.QueueFull, tempo.PayloadTooLarge) as exc:
            ledger.raised += 1
            ledger.accepted += some[: exc.accepted]
            ledger.refused += some[exc.accepted :]
    return ledger


def assert_census(d: tempo.Dispatcher, limit: int, ledgers: list[Ledger], received: list[list[bytes]]) -> None:
    """Each accepted payload came once, refused ones never, those of one producer in order, and the sums agree."""
    accepted = [item for ledger in ledgers for item in ledger.accepted]
    refused = {item for ledger in ledgers for item in ledger.refused if item}
    came = [item for items in received for item in items]
    assert Counter(came) == Counter(accepted)
    assert not refused.intersection(came)
    for items in received:
        last: dict[int, int] = {}
        for item in filter(None, items):
            number = int.from_bytes(item[1:4], "big")
            assert number > last.get(item[0], -1)
            last[item[0]] = number
    wait_until(lambda: d.stats().waiting_consumers == 0)  # the handler's thread is told of the end, and then leaves
    stats = d.stats()
    assert_balanced(stats)
    assert stats.delivered == stats.accepted == len(accepted)
    assert stats.delivered_bytes == sum(map(charge_of, accepted))
    assert stats.rejected == sum(ledger.raised for ledger in ledgers)
    assert stats.peak_buffered_bytes <= limit
    assert (stats.waiting_producers, stats.waiting_consumers, stats.state) == (0, 0, "stopped")
    d._check()


SMALL_CENSUS = (2000, 500, (0, 4, 5, 64, 163, 499, 501, 1999, 2001))
LARGE_CENSUS = (256 * tempo.KiB, 32 * tempo.KiB, (0, 4, 5, 64, 163, 163, 163, 600, 3000, 32769))


@pytest.fixture(params=[None, 1e-5], ids=["usual switches", "frequent switches"])
def switching(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the interpreter switch threads as often as it can, in one of two runs."""
    before = sys.getswitchinterval()
    if request.param:
        sys.setswitchinterval(request.param)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize(("limit", "batch_limit", "sizes"), [SMALL_CENSUS, LARGE_CENSUS], ids=["small", "large"])
@pytest.mark.parametrize(("producers", "consumers", "count"), [(8, 1, 500), (16, 4, 200), (32, 2, 120)])
def test_pulling_consumers_receive_each_accepted_payload_once(
    limit: int, batch_limit: int, sizes: tuple[int, ...], producers: int, consumers: int, count: int
) -> None:
    d = make(interval=0.002, max_buffered_bytes=limit, max_batch_bytes=batch_limit)
    consuming = [Worker(lambda: payloads(d)) for _ in range(consumers)]
    producing = [Worker(produce, d, number, count, sizes) for number in range(producers)]

    ledgers = [worker.result() for worker in producing]
    d.shutdown(timeout=LIMIT)

    assert_census(d, limit, ledgers, [worker.result() for worker in consuming])


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize(("limit", "batch_limit", "sizes"), [SMALL_CENSUS, LARGE_CENSUS], ids=["small", "large"])
def test_a_handler_receives_each_accepted_payload_once_and_in_order(
    limit: int, batch_limit: int, sizes: tuple[int, ...]
) -> None:
    d = make(interval=0.002, max_buffered_bytes=limit, max_batch_bytes=batch_limit)
    received: list[bytes] = []
    d.start(lambda batch: received.extend(batch.tolist()))
    producing = [Worker(produce, d, number, 150, sizes) for number in range(16)]

    ledgers = [worker.result() for worker in producing]
    d.shutdown(timeout=LIMIT)

    assert_census(d, limit, ledgers, [received])


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize(("limit", "batch_limit", "sizes"), [SMALL_CENSUS, LARGE_CENSUS], ids=["small", "large"])
@pytest.mark.parametrize("consumers", [1, 3])
def test_coroutines_receive_each_accepted_payload_once(
    limit: int, batch_limit: int, sizes: tuple[int, ...], consumers: int
) -> None:
    d = make(interval=0.002, max_buffered_bytes=limit, max_batch_bytes=batch_limit)

    def finish() -> list[Ledger]:
        ledgers = [worker.result() for worker in producing]
        d.shutdown(timeout=LIMIT)
        return ledgers

    async def consume() -> list[bytes]:
        return [item async for batch in d for item in batch.tolist()]

    async def everything() -> list[list[bytes]]:
        return await asyncio.wait_for(asyncio.gather(*(consume() for _ in range(consumers))), LIMIT)

    producing = [Worker(produce, d, number, 150, sizes) for number in range(12)]
    finishing = Worker(finish)
    received = asyncio.run(everything())

    assert_census(d, limit, finishing.result(), received)


# -- Memory: what tracemalloc sees --


class Heap:
    """What is allocated since it was made, now and at the most."""

    def __init__(self) -> None:
        gc.collect()
        tracemalloc.reset_peak()
        self._base = tracemalloc.get_traced_memory()[0]

    def now(self) -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - self._base

    def peak(self) -> int:
        return tracemalloc.get_traced_memory()[1] - self._base


@pytest.fixture
def tracing() -> Iterator[None]:
    """Trace allocations during a test."""
    if not CPYTHON:
        pytest.skip("tracemalloc is CPython's")
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    yield
    if not was_tracing:
        tracemalloc.stop()


def drop_all(d: tempo.Dispatcher) -> int:
    """Take every batch and let go of it at once; return what the largest needs to be held, twice its bytes."""
    d.flush(0)
    most = 0
    with contextlib.suppress(queue.Empty):
        while True:
            batch = d.get(timeout=0)
            most = max(most, 2 * batch.nbytes + 5 * len(batch))
            del batch
    return most


def fill_up(d: tempo.Dispatcher, limit: int, size: int) -> None:
    """Enqueue payloads that only the dispatcher holds, until no other fits; tiny ones by the dozen, for speed."""
    left = limit // max(1, size)
    while left:
        some = min(left, 24 if size < 64 else 1)
        left -= some
        if some > 1:
            d.enqueue_many([bytes(size)] * some)
        else:
            d.enqueue(bytes(size))


def bound(limit: int, size: int) -> int:
    return (limit * 5 // 4 if size > 1 else limit * 8) + 256 * tempo.KiB


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("batch_limit", [None, 32 * tempo.KiB, 64])
@pytest.mark.parametrize(
    ("size", "limit", "fills"),
    [
        (0, 128 * tempo.KiB, 2),
        (1, 128 * tempo.KiB, 2),
        (64, tempo.MiB, 3),
        (163, tempo.MiB, 3),
        (511, 400 * tempo.KiB, 3),
        (1000, tempo.MiB, 3),
        (10240, tempo.MiB, 3),
    ],
)
def test_memory_stays_within_the_bound_however_often_the_buffer_is_filled(
    size: int, limit: int, fills: int, batch_limit: int | None
) -> None:
    heap = Heap()
    d = make(max_buffered_bytes=limit, max_batch_bytes=batch_limit)
    largest = 0

    for _ in range(fills if batch_limit != 64 else 2):  # as many batches as payloads: that takes its time
        fill_up(d, limit, size)
        assert heap.peak() <= bound(limit, size) + largest
        with pytest.raises(tempo.QueueFull):
            d.enqueue(bytes(max(1, size)))
        largest = max(largest, drop_all(d))

    assert heap.peak() <= bound(limit, size) + largest
    assert heap.now() < 64 * tempo.KiB


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("size", [0, 1])
def test_a_mebibyte_of_the_smallest_payloads_stays_within_the_bound(size: int) -> None:
    heap = Heap()
    d = make()

    fill_up(d, tempo.MiB, size)

    assert heap.peak() <= bound(tempo.MiB, size)
    largest = drop_all(d)
    assert heap.peak() <= bound(tempo.MiB, size) + largest
    assert heap.now() < 64 * tempo.KiB


@pytest.mark.usefixtures("tracing")
def test_a_flush_after_each_payload_costs_no_memory_beyond_the_bound() -> None:
    heap = Heap()
    d = make()

    for _ in range(tempo.MiB // 64):
        d.enqueue(bytes(64))
        d.flush(0)

    assert d.stats().buffered_bytes == tempo.MiB
    assert heap.peak() <= bound(tempo.MiB, 64)
    drop_all(d)
    assert heap.now() < 64 * tempo.KiB


@pytest.mark.usefixtures("tracing")
def test_enqueue_many_does_not_copy_ahead_of_the_room_that_there_is() -> None:
    heap = Heap()
    d = make(max_buffered_bytes=2 * tempo.MiB)

    with pytest.raises(tempo.QueueFull) as caught:
        d.enqueue_many(bytearray(64 * tempo.KiB) for _ in range(600))

    accepted = caught.value.accepted
    del caught
    assert accepted == 32
    assert heap.peak() <= bound(2 * tempo.MiB, 64) + 128 * tempo.KiB  # the generator's own, and the one refused
    drop_all(d)
    assert heap.now() < 64 * tempo.KiB


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("limit", [1000, tempo.MiB])
def test_ten_thousand_refusals_leave_nothing(limit: int) -> None:
    d = make(max_buffered_bytes=limit)
    d.enqueue(bytes(limit))
    assert refusal(d.enqueue, bytes(300)) is tempo.QueueFull
    heap = Heap()

    for _ in range(10_000):
        with contextlib.suppress(tempo.QueueFull):
            d.enqueue(bytes(300))
    with contextlib.suppress(tempo.PayloadTooLarge):
        d.enqueue(bytes(2 * tempo.MiB))

    assert d.stats().rejected == 10_002
    assert heap.now() < 4 * tempo.KiB


@pytest.mark.usefixtures("tracing")
def test_a_waiting_producers_payload_is_let_go_of_with_its_batch() -> None:
    heap = Heap()
    d = make()
    d.enqueue(bytes(tempo.MiB))
    worker = Worker(lambda: d.enqueue(bytes(tempo.MiB), timeout=None))
    wait_until(lambda: d.stats().waiting_producers == 1)

    drop_all(d)
    worker.result()
    assert d.stats().buffered_bytes == tempo.MiB
    drop_all(d)

    assert heap.now() < 64 * tempo.KiB


# -- Re-entrance: a call nested at any bytecode --


def trace_at(position: int, act: Callable[[], object], work: Callable[[], object]) -> int:
    """Run work(), and act() before the position-th bytecode of tempo's that it executes; return how many there were."""
    seen = 0
    tempo_globals = vars(tempo)

    def step(frame: Any, event: str, _: Any) -> Any:
        nonlocal seen
        if frame.f_globals is not tempo_globals:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen += 1
            if seen == position:
                act()  # not traced itself: the interpreter sees to that
        return step

    sys._getframe().f_trace_opcodes = True  # before settrace: 3.12 looks only then whether anybody wants opcodes
    before = sys.gettrace()
    sys.settrace(step)
    try:
        work()
    finally:
        sys.settrace(before)
    return seen


def positions(work: Callable[[], object], samples: int, rng: random.Random) -> range:
    """At which bytecodes of work() to try: every one, or `samples` evenly spread from a random start."""
    total = trace_at(0, lambda: None, work)
    step = max(1, total // samples)
    return range(1 + rng.randrange(step), total + 1, step)


def filled(limit: int, fill: int) -> list[bytes]:
    """Payloads of `fill` bytes together."""
    unit = 10 if limit < 1000 else 400
    sizes = [unit] * (fill // unit) + [fill % unit] * (fill % unit > 0)
    return [(b"%05d" % i).ljust(size, b"f")[:size] for i, size in enumerate(sizes)]


def serial_outcomes(limit: int, used: int, steps: list[int], nested: int) -> set[tuple[int, bool]]:
    """(how many of the outer call's payloads, whether the nested one) are accepted, in each serial order of them."""
    outcomes = set()
    for place in range(len(steps) + 1):
        buffered, outer, refused, accepted = used, 0, False, False
        for i in range(len(steps) + 1):
            if i == place and buffered + nested <= limit:
                accepted = True
                buffered += nested
            if i < len(steps) and not refused:
                if buffered + steps[i] > limit:
                    refused = True
                else:
                    buffered += steps[i]
                    outer += steps[i] > 0
        outcomes.add((outer, accepted))
    return outcomes


class Subject:
    """A dispatcher with content, one call on it, and what the call took and gave."""

    def __init__(self, limit: int, batch_limit: int, fill: int, outer: str) -> None:
        self.limit = limit
        self.batch_limit = batch_limit
        self.d = make(max_buffered_bytes=limit, max_batch_bytes=batch_limit)
        self.before = filled(limit, fill)
        self.d.enqueue_many(self.before)
        self.outer = outer
        self.payload = b"O" * (33 if outer != "enqueue_big" else min(3000, limit // 2))
        self.steps: list[int] = []
        if outer in ("enqueue", "enqueue_big", "enqueue_many"):
            self.steps = [len(self.payload)] * (2 if outer == "enqueue_many" else 1)
        elif outer == "get":
            closed = greedy(self.before, batch_limit)
            if sum(map(len, closed[-1] if closed else [])) < batch_limit:
                closed = closed[:-1]
            self.steps = [-sum(map(len, closed[0]))] if closed else []
        self.accepted: list[bytes] = []
        self.got: list[tempo.Batch] = []
        self.raised = 0

    def call(self) -> None:
        """The outer call."""
        d = self.d
        if self.outer in ("enqueue", "enqueue_big", "enqueue_many"):
            many = self.outer == "enqueue_many"
            try:
                if many:
                    d.enqueue_many([self.payload, self.payload])
                else:
                    d.enqueue(self.payload)
                self.accepted += [self.payload] * (1 + many)
            except tempo.Error as exc:
                self.raised += 1
                self.accepted += [self.payload] * exc.accepted
        elif self.outer == "get":
            with contextlib.suppress(queue.Empty, tempo.Stopped):
                self.got.append(d.get(timeout=0))
        elif self.outer == "flush":
            d.flush(0)
        elif self.outer == "stop":
            self.got += d.stop()
        elif self.outer == "stats":
            assert_balanced(d.stats())
        else:
            try:
                d.shutdown(0)
            except tempo.DrainTimeout as exc:
                self.got += exc.undelivered
            except tempo.Stopped:
                pass

    def everything(self) -> list[list[bytes]]:
        """What came out, and what is left, in batches; ends the dispatcher."""
        self.d._check()
        stats = self.d.stats()
        assert_balanced(stats)
        assert stats.peak_buffered_bytes <= self.limit
        return [batch.tolist() for batch in [*self.got, *self.d.stop()]]


class Nested:
    """A call of enqueue from inside, with a look at the stats before and after."""

    def __init__(self, subject: Subject, payload: bytes) -> None:
        self.subject, self.payload = subject, payload
        self.refused: type[BaseException] | None = None
        self.accepted = False
        self.done = False

    def __call__(self) -> None:
        self.done = True
        self.look()
        self.refused = refusal(self.subject.d.enqueue, self.payload, timeout=5)
        self.accepted = self.refused is None
        self.look()

    def look(self) -> None:
        stats = self.subject.d.stats()
        assert_balanced(stats)
        assert stats.buffered_bytes <= self.subject.limit


OUTER = ("enqueue", "enqueue_big", "enqueue_many", "get", "flush", "stats", "shutdown")
FRAMES = [(100, 30), (128 * tempo.KiB, 9000)]


def orders(before: list[bytes], outer: list[bytes], nested: list[bytes]) -> list[list[bytes]]:
    """Every order in which the payloads may stand."""
    return [before + outer[:i] + nested + outer[i:] for i in range(len(outer) + 1)]


@pytest.mark.skipif(not CPYTHON, reason="needs CPython's opcode tracing")
@pytest.mark.parametrize(("limit", "batch_limit"), FRAMES, ids=["100 bytes", "128 KiB"])
@pytest.mark.parametrize("outer", OUTER)
def test_a_call_nested_at_any_bytecode_is_as_if_made_before_or_after(limit: int, batch_limit: int, outer: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for fill in (0, limit // 2, limit - 1, limit):
        for size in (7, 50, 3000):
            if size > limit:
                continue
            serial = serial_outcomes(limit, fill, Subject(limit, batch_limit, fill, outer).steps, size)
            for position in positions(Subject(limit, batch_limit, fill, outer).call, 14, rng):
                subject = Subject(limit, batch_limit, fill, outer)
                nested = Nested(subject, b"N" * size)
                where = f"{fill=} {size=} {position=} {seed=}"

                begin = time.monotonic()
                if trace_at(position, nested, subject.call) < position:
                    continue  # how many bytecodes there are depends on the depth of the stack

                assert time.monotonic() - begin < 4, f"it waited: {where}"
                if outer == "shutdown":
                    fits = fill + size <= limit
                    assert nested.refused in (
                        None if fits else tempo.QueueFull, tempo.ShuttingDown, tempo.Stopped
                    ), where  # fmt: skip
                else:
                    assert (len(subject.accepted), nested.accepted) in serial, where
                assert subject.d.stats().rejected == subject.raised + (not nested.accepted), where
                batches = subject.everything()
                flat = [item for batch in batches for item in batch]
                mine = [nested.payload] * nested.accepted
                assert flat in orders(subject.before, subject.accepted, mine), where
                if outer not in ("flush", "shutdown"):
                    assert batches == greedy(flat, batch_limit), where


@pytest.mark.skipif(not CPYTHON, reason="needs CPython's opcode tracing")
@pytest.mark.parametrize(("limit", "batch_limit"), FRAMES, ids=["100 bytes", "128 KiB"])
@pytest.mark.parametrize("outer", ["enqueue", "enqueue_big", "enqueue_many", "get", "flush", "shutdown"])
def test_a_call_nested_in_a_nested_call_is_accepted_or_refused_like_any_other(
    limit: int, batch_limit: int, outer: str
) -> None:
    rng = random.Random(7)
    calls = [0]
    act_at = [0]
    act: list[Callable[[], object]] = []

    def clock() -> float:  # what interrupts the outer call must not be a trace function: those are not traced
        calls[0] += 1
        if calls[0] == act_at[0]:
            act[0]()
        return 1000.0

    def subject_on_clock() -> Subject:
        with mock.patch("time.monotonic", clock):
            return Subject(limit, batch_limit, fill, outer)

    for fill in (0, limit // 2, limit - 57, limit - 1):
        for first, second in ((7, 50), (50, 7), (50, 50)):
            act_at[0] = 0
            counted = subject_on_clock()
            calls[0] = 0
            counted.call()
            for interrupted in range(1, calls[0] + 1):
                act_at[0] = 0
                probe = subject_on_clock()
                tried = range(0)

                def count(nested: Nested = Nested(probe, b"N" * first)) -> None:  # noqa: B008 - bound in the loop
                    nonlocal tried
                    tried = positions(nested, 6, rng)

                act[:], calls[0], act_at[0] = [count], 0, interrupted
                probe.call()
                for position in tried:
                    act_at[0] = 0
                    subject = subject_on_clock()
                    inner = Nested(subject, b"M" * second)
                    nested = Nested(subject, b"N" * first)
                    act[:] = [partial(trace_at, position, inner, nested)]
                    calls[0], act_at[0] = 0, interrupted
                    subject.call()
                    act_at[0] = 0

                    if not nested.done or not inner.done:
                        continue
                    stats = subject.d.stats()
                    refused = subject.raised + (not inner.accepted) + (not nested.accepted)
                    assert stats.rejected == refused, (fill, first, second, interrupted, position)
                    if outer != "shutdown":
                        room = limit - stats.peak_buffered_bytes  # a refusal needs a buffer that was full enough
                        assert inner.accepted or room < second
                        assert nested.accepted or room < first
                    came = [item for batch in subject.everything() for item in batch]
                    mine = [inner.payload] * inner.accepted + [nested.payload] * nested.accepted
                    assert Counter(came) == Counter(subject.before + subject.accepted + mine)
                    assert [item for item in came if item[:1] not in b"OMN"] == subject.before


# -- Interrupted anywhere: KeyboardInterrupt at each entry of a function --


def interrupt_at(position: int, work: Callable[[], object]) -> bool:
    """Run work(); raise KeyboardInterrupt at the position-th function entry or first line in tempo; False: too few."""
    seen = 0
    fresh: Any = None
    tempo_globals = vars(tempo)

    def step(frame: Any, event: str, _: Any) -> Any:
        nonlocal seen, fresh
        if frame.f_globals is not tempo_globals:
            return None
        if event == "call" or (event == "line" and frame is fresh):
            fresh = frame if event == "call" else None
            seen += 1
            if seen == position:
                raise KeyboardInterrupt
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return seen >= position


class LeakyRLock:
    """An RLock as CPython 3.14 has it: an interrupt comes, once, when it was got and `with` does not guard it yet."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
        self.leaks = False

    def __enter__(self) -> None:
        self.lock.acquire()
        self.depth += 1
        if self.leaks:
            self.leaks = False
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        self.depth -= 1
        self.lock.release()

    def _recursion_count(self) -> int:
        return self.depth  # asked by its holder alone here


@pytest.mark.parametrize("held", [0, 1, 2])
def test_an_interrupt_between_the_getting_of_the_lock_and_its_with_leaves_it_as_it_was(held: int) -> None:
    d = make()
    d.enqueue(b"first")
    lock = d._state.lock = LeakyRLock()
    with mock.patch.object(tempo, "_WITH_LEAKS", True):
        for _ in range(held):  # by a section of another dispatcher, which this call interrupts
            lock.__enter__()
        lock.leaks = True
        with pytest.raises(KeyboardInterrupt):
            d.stats()
        assert lock.depth == held
        for _ in range(held):
            lock.release()
        assert assert_it_works(d) == [b"first"]
        assert lock.depth == 0


def assert_it_works(d: tempo.Dispatcher) -> list[bytes]:
    """Take all that is there, and see a payload through, in this thread and in another; return what was there."""
    there = payloads(drained(d))

    def once() -> None:
        if d.stats().state == "running":
            d.enqueue(b"another")
            d.flush(0)
            assert d.get(timeout=LIMIT).tolist() == [b"another"]
        else:
            assert refusal(d.enqueue, b"another") in (tempo.ShuttingDown, tempo.Stopped)
            with pytest.raises(tempo.Stopped):
                d.get(timeout=LIMIT)

    once()
    Worker(once).result()
    return there


@pytest.mark.skipif(not CPYTHON, reason="needs CPython's tracing")
@pytest.mark.parametrize(("limit", "batch_limit"), [(2000, 300), (128 * tempo.KiB, 9000), (128 * tempo.KiB, None)])
@pytest.mark.parametrize("outer", [*OUTER, "stop"])
@pytest.mark.parametrize("full", [False, True], ids=["with room", "full"])
def test_an_interrupt_at_any_entry_leaves_a_dispatcher_that_works(
    limit: int, batch_limit: int | None, outer: str, full: bool
) -> None:
    position = 0
    fired = True
    while fired:
        position += 1
        subject = Subject(limit, batch_limit or limit, 0, outer)
        d = subject.d = make(max_buffered_bytes=limit, max_batch_bytes=batch_limit)
        size = 40 if limit < 10_000 else 100
        count = limit // size if full else limit // size // 2
        subject.before = [b"%05d" % i + bytes(size - 5) for i in range(count)]
        for item in subject.before[:10]:
            d.enqueue(item)
        d.flush(0)
        d.enqueue_many(subject.before[10:])

        fired = interrupt_at(position, subject.call)

        where = f"{position=}"
        stats = d.stats()
        assert_balanced(stats)
        assert (stats.waiting_producers, stats.waiting_consumers) == (0, 0), where
        d._check()
        there = assert_it_works(d)
        came = payloads(subject.got) + there
        mine = [item for item in came if item == subject.payload]
        assert len(subject.accepted) <= len(mine) <= 2, where
        rest = [item for item in came if item != subject.payload]
        if outer in ("get", "stop", "shutdown"):  # a batch that the interrupted call had taken is gone with it
            taken = stats.delivered + stats.discarded
            assert rest in (subject.before, subject.before[taken:]), where
            assert taken in (0, min(10, (batch_limit or limit) // size)) or outer != "get", where
        else:
            assert rest == subject.before, where
        stats = d.stats()
        assert_balanced(stats)
        assert (stats.buffered, stats.waiting_producers, stats.waiting_consumers) == (0, 0, 0), where
        d._check()
        d.stop()


# -- Threads stopped at a bytecode --


def halt_at(position: int, work: Callable[[], object], meanwhile: Callable[[], object]) -> None:
    """Run work() in a thread that halts at its position-th bytecode of tempo's, until meanwhile() is over or blocks."""
    reached, go_on = threading.Event(), threading.Event()

    def halt() -> None:
        reached.set()
        assert go_on.wait(LIMIT)

    def halting() -> None:
        try:
            trace_at(position, halt, work)
        finally:
            reached.set()

    first = Worker(halting)
    assert reached.wait(LIMIT)
    second = Worker(meanwhile)
    second.join(0.05)
    go_on.set()
    first.result()
    second.result()


def note_refusal(d: tempo.Dispatcher, item: bytes, outcome: list[type[BaseException] | None]) -> None:
    outcome.append(refusal(d.enqueue, item))


HALTS = [
    # limit, fill: what the halted enqueue meets
    pytest.param(100, 0, id="small and empty"),
    pytest.param(100, 80, id="small and nearly full"),
    pytest.param(128 * tempo.KiB, 0, id="large and empty"),
    pytest.param(128 * tempo.KiB, 40_000, id="large with a credit"),
    pytest.param(128 * tempo.KiB, 128 * tempo.KiB - 40, id="large and nearly full"),
]


@pytest.mark.skipif(not CPYTHON, reason="needs CPython's opcode tracing")
@pytest.mark.parametrize(("limit", "fill"), HALTS)
@pytest.mark.parametrize("other", ["enqueue", "get", "flush", "shutdown", "stop", "stats"])
def test_a_producer_halted_at_any_bytecode_changes_nothing_for_the_others(limit: int, fill: int, other: str) -> None:
    batch_limit = 30 if limit < 1000 else 9000
    rng = random.Random(3)
    shared = b"O" * 33  # the other thread enqueues the very same object

    def subject() -> Subject:
        return Subject(limit, batch_limit, fill, other)

    total = trace_at(0, lambda: None, partial(refusal, subject().d.enqueue, shared))
    samples = total if total < 60 else 5  # the way without the lock at each
    for position in positions(partial(refusal, subject().d.enqueue, shared), samples, rng):
        tried = subject()
        tried.payload = shared
        outcome: list[type[BaseException] | None] = []

        halt_at(position, partial(note_refusal, tried.d, shared, outcome), tried.call)

        accepted = [shared] * (outcome == [None]) + tried.accepted
        stats = tried.d.stats()
        assert stats.accepted == len(tried.before) + len(accepted), position
        assert stats.rejected == tried.raised + (outcome != [None]), position
        if other in ("shutdown", "stop"):
            assert (stats.buffered, stats.state) == (0, "stopped"), position
        came = [item for batch in tried.everything() for item in batch]
        assert Counter(came) == Counter(tried.before + accepted), position
        assert [item for item in came if item is not shared and item != shared] == tried.before, position
        if other not in ("shutdown", "stop", "get"):
            assert min(len(accepted), 1) == (fill + 33 <= limit), position


@pytest.mark.skipif(not CPYTHON, reason="needs CPython's opcode tracing")
@pytest.mark.parametrize("size", [1, 40, 512])
def test_a_producer_halted_in_a_credit_that_is_withdrawn_never_exceeds_the_bound(size: int) -> None:
    limit = 128 * tempo.KiB
    rng = random.Random(5)
    item = b"h" * size

    def fresh() -> tempo.Dispatcher:
        d = make(max_buffered_bytes=limit)
        d.enqueue(b"first")
        return d

    for drain_after in (False, True):
        probe = fresh()
        for position in positions(partial(probe.enqueue, item), 200, rng):
            d = fresh()
            filling: list[bytes] = []
            outcome: list[type[BaseException] | None] = []
            taken: list[bytes] = []

            def fill(d: tempo.Dispatcher, filling: list[bytes], taken: list[bytes], drain_after: bool) -> None:
                while refusal(d.enqueue, b"f" * 400) is None:
                    filling.append(b"f" * 400)
                rest = limit - d.stats().buffered_bytes
                if rest:
                    d.enqueue(b"r" * rest)
                    filling.append(b"r" * rest)
                assert d.stats().buffered_bytes == limit
                assert refusal(d.enqueue, b"x") is tempo.QueueFull
                if drain_after:
                    taken += payloads(drained(d))

            halt_at(position, partial(note_refusal, d, item, outcome), partial(fill, d, filling, taken, drain_after))

            d._check()
            stats = d.stats()
            assert_balanced(stats)
            assert stats.peak_buffered_bytes <= limit
            accepted = [b"first", *filling] + [item] * (outcome == [None])
            assert Counter(taken + payloads(d.stop())) == Counter(accepted), position


# -- Real signals, finalizers and logging --


def seen_once(d: tempo.Dispatcher, accepted: list[bytes], came: list[bytes]) -> None:
    """Each accepted payload came once; the main thread's ("m") in order: a handler may interrupt itself."""
    d._check()
    assert_balanced(d.stats())
    assert Counter(came) == Counter(accepted)
    numbers = [int(item[1:]) for item in came if item[:1] == b"m"]
    assert numbers == sorted(numbers)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
@pytest.mark.parametrize(("limit", "batch_limit"), [(300, 100), (128 * tempo.KiB, 9000), (64 * tempo.KiB, None)])
def test_a_signal_handler_that_enqueues_is_accepted_or_refused_like_any_other(
    limit: int, batch_limit: int | None
) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=batch_limit)
    accepted: list[bytes] = []
    came: list[bytes] = []
    signals = 0
    refused = 0

    def handler(_signum: int, _frame: Any) -> None:
        nonlocal signals, refused
        signals += 1
        item = b"s%d" % signals
        if refusal(d.enqueue, item) is None:  # without a wait: outside of tempo it would be one
            accepted.append(item)
        else:
            refused += 1
        assert_balanced(d.stats())

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for number in range(10_000):
            item = b"m%d" % number
            if refusal(d.enqueue, item) is None:
                accepted.append(item)
            else:
                refused += 1
            if number % 50 == 0:
                d.flush(0)
            with contextlib.suppress(queue.Empty):
                while number % 50 < 2:
                    came += d.get(timeout=0).tolist()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert signals > 10
    assert d.stats().rejected == refused
    came += payloads(drained(d))
    seen_once(d, accepted, came)


@pytest.mark.skipif(not CPYTHON, reason="needs a collector that runs at every allocation")
@pytest.mark.parametrize("by", ["__del__", "weakref"])
@pytest.mark.parametrize(("limit", "batch_limit"), [(300, 100), (128 * tempo.KiB, 9000)])
def test_finalizers_that_enqueue_are_accepted_or_refused_like_any_other(
    by: str, limit: int, batch_limit: int | None
) -> None:
    d = make(max_buffered_bytes=limit, max_batch_bytes=batch_limit)
    accepted: list[bytes] = []
    came: list[bytes] = []
    ends = 0
    references = []

    def at_end(*_: object) -> None:
        nonlocal ends
        ends += 1
        item = b"e%d" % ends
        if refusal(d.enqueue, item) is None:  # without a wait: outside of tempo it would be one
            accepted.append(item)
        assert_balanced(d.stats())

    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()  # so that collecting costs little
    gc.set_threshold(1)
    try:
        for number in range(400):
            if by == "weakref":
                references.append(weakref.ref(Cycle(), at_end))
            else:
                Cycle(at_end)
            item = b"m%d" % number
            if refusal(d.enqueue, item) is None:
                accepted.append(item)
            with contextlib.suppress(queue.Empty):
                if number % 10 == 0:
                    d.flush(0)
                came += d.get(timeout=0).tolist()
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        gc.collect()

    assert ends == 400
    came += payloads(drained(d))
    seen_once(d, accepted, came)


class Enqueuing(logging.Handler):
    """Sends log records to a dispatcher."""

    def __init__(self, d: tempo.Dispatcher) -> None:
        super().__init__()
        self.d = d
        self.refused = 0

    def emit(self, record: logging.LogRecord) -> None:
        if refusal(self.d.enqueue, record.getMessage().encode(), timeout=5) is not None:
            self.refused += 1


@pytest.mark.parametrize("limit", [300, 128 * tempo.KiB])
def test_a_handler_and_an_iterable_may_log_into_the_dispatcher_that_calls_them(limit: int) -> None:
    d = make(max_buffered_bytes=limit, interval=0.001)
    log = logging.Logger("tempo's own")
    sink = Enqueuing(d)
    log.addHandler(sink)
    came: list[bytes] = []

    def handler(batch: tempo.Batch) -> None:
        came.extend(batch.tolist())
        if not batch.tolist()[0].startswith(b"handled"):
            log.warning("handled %d", len(batch))

    def source() -> Iterator[bytes]:
        for number in range(100):
            log.warning("made %d", number)
            yield b"item %d" % number

    d.start(handler)
    assert d.enqueue_many(source(), timeout=LIMIT) == 100
    assert d.flush(LIMIT)
    d.shutdown(LIMIT)

    assert [item for item in came if item.startswith(b"item")] == [b"item %d" % number for number in range(100)]
    stats = d.stats()
    assert_balanced(stats)
    assert stats.rejected == sink.refused
    assert stats.delivered == len(came)


# -- Interrupted waits --


def wait_until_parked(ident: int) -> None:
    """Return when a thread stands still inside tempo."""
    last: tuple[int, int] | None = None
    still = 0

    def parked() -> bool:
        nonlocal last, still
        frame: Any = sys._current_frames().get(ident)
        here = (id(frame), frame.f_lasti) if frame is not None else None
        inside = False
        while frame is not None and not inside:
            inside = frame.f_globals is vars(tempo)
            frame = frame.f_back
        still = still + 1 if inside and here == last else 0
        last = here
        return still >= 20

    wait_until(parked)


@contextlib.contextmanager
def interrupting_the_main_thread() -> Iterator[None]:
    """Send the main thread a KeyboardInterrupt once it waits inside tempo; the block must end by it."""
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        wait_until_parked(main)
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = Worker(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        worker.result()
        signal.signal(signal.SIGINT, before)


def assert_nobody_waits(d: tempo.Dispatcher) -> None:
    stats = d.stats()
    assert (stats.waiting_producers, stats.waiting_consumers) == (0, 0)
    assert_balanced(stats)
    d._check()


signals_needed = pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs pthread_kill")


@signals_needed
@pytest.mark.parametrize("limit", [100, 128 * tempo.KiB])
@pytest.mark.parametrize("many", [False, True], ids=["enqueue", "enqueue_many"])
def test_an_interrupted_wait_for_room_leaves_nothing_behind(limit: int, many: bool) -> None:
    d = make(max_buffered_bytes=limit)
    d.enqueue(bytes(limit))

    with interrupting_the_main_thread():
        if many:
            d.enqueue_many([b"interrupted"], timeout=None)
        else:
            d.enqueue(b"interrupted", timeout=None)

    assert_nobody_waits(d)
    assert assert_it_works(d) == [bytes(limit)]


@signals_needed
@pytest.mark.parametrize("limit", [100, 128 * tempo.KiB])
@pytest.mark.parametrize("content", [[], [b"open"]], ids=["idle", "timer"])
def test_an_interrupted_get_leaves_nothing_behind(limit: int, content: list[bytes]) -> None:
    d = make(max_buffered_bytes=limit)
    d.enqueue_many(content)

    with interrupting_the_main_thread():
        d.get()

    assert_nobody_waits(d)
    assert assert_it_works(d) == content


@signals_needed
@pytest.mark.parametrize("limit", [100, 128 * tempo.KiB])
def test_an_interrupted_flush_leaves_nothing_behind(limit: int) -> None:
    d = make(max_buffered_bytes=limit)
    d.enqueue(b"flushed")

    with interrupting_the_main_thread():
        d.flush()

    assert_nobody_waits(d)
    assert assert_it_works(d) == [b"flushed"]


@signals_needed
@pytest.mark.parametrize("limit", [100, 128 * tempo.KiB])
def test_an_interrupted_shutdown_goes_on_when_it_is_called_again(limit: int) -> None:
    d = make(max_buffered_bytes=limit)
    d.enqueue(b"drained")

    with interrupting_the_main_thread():
        d.shutdown()

    assert_nobody_waits(d)
    assert d.stats().state == "shutting_down"
    assert Worker(lambda: payloads(d)).result() == [b"drained"]
    d.shutdown()
    assert d.stats().state == "stopped"


def raise_in(worker: Worker) -> None:
    """Raise KeyboardInterrupt in a thread, when its wait ends."""
    assert worker.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(KeyboardInterrupt))


@pytest.mark.skipif(not CPYTHON, reason="needs PyThreadState_SetAsyncExc")
@pytest.mark.skipif(sys.gettrace() is not None, reason="traced, CPython 3.11 spins while an exception awaits a thread")
def test_an_exception_raised_in_a_waiting_producer_leaves_nothing_behind() -> None:
    d = make(max_buffered_bytes=100)
    d.enqueue(bytes(100))
    worker = Worker(d.enqueue, b"interrupted", timeout=0.5)
    wait_until(lambda: d.stats().waiting_producers == 1)

    raise_in(worker)

    with pytest.raises((KeyboardInterrupt, tempo.QueueFull)):
        worker.result()
    assert_nobody_waits(d)
    assert assert_it_works(d) == [bytes(100)]


@pytest.mark.skipif(not CPYTHON, reason="needs PyThreadState_SetAsyncExc")
@pytest.mark.skipif(sys.gettrace() is not None, reason="traced, CPython 3.11 spins while an exception awaits a thread")
def test_an_exception_raised_in_a_waiting_consumer_loses_no_batch() -> None:
    d = make(max_buffered_bytes=100)
    worker = Worker(d.get)
    wait_until(lambda: d.stats().waiting_consumers == 1)
    wait_until_parked(worker.ident or 0)

    raise_in(worker)
    d.enqueue(b"for another")  # wakes it

    with pytest.raises(KeyboardInterrupt):
        worker.result()
    assert_nobody_waits(d)
    assert assert_it_works(d) == [b"for another"]


# -- Moments: what comes between two steps, brought about without a tracer


class Moment:
    """A clock that does something once, at its n-th reading: tempo reads the clock in the middle of its work."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do
        self.countdown = 0

    def __call__(self) -> float:
        self.countdown -= 1
        if self.countdown == 0:
            self.do()
        return time.perf_counter()


def with_moment(do: Callable[[tempo.Dispatcher], object], **kwargs: Any) -> tuple[tempo.Dispatcher, Moment]:
    moment = Moment(lambda: do(d))
    with mock.patch("time.monotonic", moment):
        d = make(**kwargs)
    return d, moment


def interrupt(_: object = None) -> None:
    raise KeyboardInterrupt


class Eager(list):  # type: ignore[type-arg]
    """An inbox that lets something happen around an append."""

    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None

    def append(self, item: object) -> None:
        before, self.before = self.before, None
        if before is not None:
            before()
        super().append(item)
        after, self.after = self.after, None
        if after is not None:
            after()


def eager(d: tempo.Dispatcher) -> Eager:
    inbox = Eager(d._state.inbox)
    d._state.inbox = inbox
    return inbox


@contextlib.contextmanager
def after_each_count(do: Callable[[tempo.Dispatcher], object]) -> Iterator[None]:
    """Do something after the inbox was counted and before it is relied on, as a signal handler could."""
    count = tempo.Dispatcher._count_locked

    def count_and(self: tempo.Dispatcher, s: Any) -> None:
        count(self, s)
        do(self)

    with mock.patch.object(tempo.Dispatcher, "_count_locked", count_and):
        yield


@pytest.mark.parametrize("reading", range(1, 12))
@pytest.mark.parametrize("limit", [tempo.KiB, tempo.MiB])
def test_calls_made_at_a_reading_of_the_clock_are_accepted_or_refused(reading: int, limit: int) -> None:
    accepted: list[bytes] = []
    refused: list[bytes] = []

    def nested(d: tempo.Dispatcher) -> None:
        for item in (b"n" * 700, b"m" * 3000, b""):
            stats = d.stats()
            if refusal(d.enqueue, item, timeout=5) is None:
                accepted.append(item)
            else:
                refused.append(item)
                assert stats.buffered_bytes + max(1, len(item)) > limit
        accepted.extend([b"x", b"y"][: d.enqueue_many([b"x", b"y"])])

    d, moment = with_moment(nested, max_buffered_bytes=limit, max_batch_bytes=600)
    moment.countdown = reading
    for item in (b"a" * 100, b"b" * 200):
        d.enqueue(item)
        accepted.append(item)
    came = payloads(drained(d))
    d._check()
    while moment.countdown > 0:
        came += payloads(drained(d))

    came += payloads(drained(d))
    assert Counter(came) == Counter(accepted)
    assert d.stats().rejected == len(refused)


@pytest.mark.parametrize("reading", range(1, 14))
def test_an_interrupt_at_a_reading_of_the_clock_leaves_nothing_behind(reading: int) -> None:
    d, moment = with_moment(interrupt, max_buffered_bytes=tempo.MiB, max_batch_bytes=600)
    d.enqueue(b"a" * 100)
    moment.countdown = reading
    with contextlib.suppress(KeyboardInterrupt):
        while moment.countdown > 0:
            with contextlib.suppress(queue.Empty):
                d.get(timeout=0.01)
            d.flush(0.001)
            with contextlib.suppress(tempo.QueueFull):
                d.enqueue(b"b" * 3000, timeout=0.001)

    d._check()
    stats = d.stats()
    assert (stats.waiting_consumers, stats.waiting_producers) == (0, 0)
    d.enqueue(b"after")
    assert Worker(d.stop).result()[-1].tolist()[-1] == b"after"


@pytest.mark.parametrize("reading", range(1, 7))
def test_an_interrupt_in_a_wait_for_room_leaves_nobody_in_the_queue(reading: int) -> None:
    d, moment = with_moment(interrupt, max_buffered_bytes=100)
    d.enqueue(bytes(100))
    moment.countdown = reading
    with contextlib.suppress(KeyboardInterrupt, tempo.QueueFull):
        d.enqueue(b"b", timeout=0.001)
    moment.countdown = 0

    assert d.stats().waiting_producers == 0
    assert payloads(d.stop()) == [bytes(100)]


def test_flush_and_shutdown_called_in_the_middle_of_a_call_are_done_at_its_end() -> None:
    def nested(d: tempo.Dispatcher) -> None:
        assert d.flush() is False
        with pytest.raises(queue.Empty):
            d.get()
        with pytest.raises(RuntimeError, match="interrupted tempo"):
            d.stop()
        d.shutdown()

    d, moment = with_moment(nested)
    moment.countdown = 1
    d.enqueue(b"a")

    assert d.stats().state == "shutting_down"
    assert payloads(d) == [b"a"]
    assert d.stats().state == "stopped"


def test_a_flush_called_in_the_middle_of_a_call_closes_the_batch() -> None:
    d, moment = with_moment(lambda d: d.flush())
    moment.countdown = 1
    d.enqueue(b"a")
    d.enqueue(b"b")

    assert payloads([d.get(timeout=0)]) == [b"a"]


def test_a_coroutine_collected_in_the_middle_of_a_call_leaves_the_queue() -> None:
    loop = asyncio.new_event_loop()
    d, moment = with_moment(lambda _: coroutine.close())
    coroutine = d.__aiter__().__anext__()

    async def park() -> None:
        coroutine.send(None)

    loop.run_until_complete(park())
    assert d.stats().waiting_consumers == 1
    moment.countdown = 1
    d.enqueue(b"a")
    loop.close()

    assert d.stats().waiting_consumers == 0


@pytest.mark.parametrize("reading", range(1, 5))
def test_an_interrupt_as_a_coroutine_leaves_is_made_good(reading: int) -> None:
    d, moment = with_moment(interrupt)
    d.enqueue(b"a")

    async def consume() -> None:
        iterator = d.__aiter__()
        task = asyncio.ensure_future(iterator.__aiter__().__anext__())
        await asyncio.sleep(0)
        task.cancel()
        moment.countdown = reading
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(consume())
    moment.countdown = 0

    assert d.stats().waiting_consumers == 0
    assert payloads(d.stop()) == [b"a"]


@pytest.mark.parametrize("accepted", [True, False])
def test_a_payload_appended_as_the_credit_is_withdrawn_is_accepted_or_taken_out_again(accepted: bool) -> None:
    d = make()
    d.enqueue(b"a")
    inbox = eager(d)
    by_another = lambda: Worker(d.flush, 0).result()  # noqa: E731 - it withdraws the credit, and gives none
    inbox.after, inbox.before = (by_another, None) if accepted else (None, by_another)
    d.enqueue(b"b")

    assert [batch.tolist() for batch in d.stop()] == ([[b"a", b"b"]] if accepted else [[b"a"], [b"b"]])


def test_a_nested_payload_appended_as_the_credit_is_withdrawn_is_accepted_once() -> None:
    d = make()
    d.enqueue(b"a")
    inbox = eager(d)
    s = d._state

    def section(s: Any) -> None:
        s.places, s.covers = len(inbox) + 1, 512  # as if the section had not yet come to withdrawing them
        inbox.before = lambda: setattr(s, "places", 0)
        inbox[0] = (*inbox[0][:3], 1, *inbox[0][4:])
        d.enqueue(b"b")

    d._locked(s, section)

    assert payloads(d.stop()) == [b"a", b"b"]


@pytest.mark.parametrize("limit", [200, 128 * tempo.KiB])
def test_a_call_between_the_count_and_the_commit_takes_its_room_first(limit: int) -> None:
    d = make(max_buffered_bytes=limit)
    d.enqueue(bytes(limit - 100))
    outcome: list[object] = []

    def once(d: tempo.Dispatcher) -> None:
        if not outcome:
            outcome.append("called")
            outcome.append(refusal(d.enqueue, b"n" * 60))

    with after_each_count(once):
        first = refusal(d.enqueue, b"o" * 60)

    assert (first, outcome[1]) == (tempo.QueueFull, None)
    assert d.stats().buffered_bytes == limit - 40


def test_a_waiting_payload_stays_when_a_nested_call_takes_the_room() -> None:
    d = make(max_buffered_bytes=100, max_batch_bytes=100)
    d.enqueue(bytes(100))
    waiter = Worker(d.enqueue, b"w" * 50, timeout=None)
    wait_until(lambda: d.stats().waiting_producers == 1)
    take = tempo.Dispatcher._take_locked

    def take_and(*args: Any) -> tempo.Batch | None:
        batch = take(*args)
        if batch is not None:
            d.enqueue(b"n" * 60)  # as a signal handler could, before the section comes to serve the waiter
        return batch

    with mock.patch.object(tempo.Dispatcher, "_take_locked", take_and):
        d.get()
    assert d.stats().waiting_producers == 1
    d.flush(0)
    d.get()

    waiter.result()
    assert payloads(d.stop()) == [b"w" * 50]


def test_an_accepted_payload_counts_when_a_signal_ends_the_wait_after_it() -> None:
    d = make(max_buffered_bytes=100, max_batch_bytes=100)
    d.enqueue(bytes(100))

    def park(self: object, pause: float, remaining: float) -> bool:
        Worker(d.get).result()
        raise KeyboardInterrupt

    with mock.patch.object(tempo._Parker, "park", park), pytest.raises(KeyboardInterrupt) as caught:
        d.enqueue_many([b"taken", b"not"], timeout=None)

    assert caught.value.accepted == 1  # type: ignore[attr-defined]
    assert payloads(d.stop()) == [b"taken"]


def short_of_memory(times: int) -> Any:
    """Let the storing of sizes fail a few times."""
    real = tempo.array  # type: ignore[attr-defined]
    left = [times]

    def array(*args: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise MemoryError
        return real(*args)

    return mock.patch.object(tempo, "array", array)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("count", [10, 600, 1500])
def test_without_memory_a_payload_is_refused_and_nothing_is_half_done(times: int, count: int) -> None:
    d = make()
    d.enqueue_many([b"%4d" % i for i in range(count)])
    for i in range(300):
        d.enqueue(b"u%3d" % i)  # most are not counted yet

    with short_of_memory(times), pytest.raises(MemoryError):
        d.enqueue(b"x" * 3000)

    d._check()
    came = payloads(d.stop())
    assert came[: count + 300] == [b"%4d" % i for i in range(count)] + [b"u%3d" % i for i in range(300)]
    assert came[count + 300 :] in ([], [b"x" * 3000])


def test_without_memory_a_nested_payload_is_kept() -> None:
    d, moment = with_moment(lambda d: d.enqueue(b"nested" * 200))
    moment.countdown = 2
    d.enqueue(b"a")
    patch = short_of_memory(2)
    with patch, contextlib.suppress(MemoryError):
        d.enqueue(b"b" * 600)
    d._check()

    came = payloads(d.stop())
    assert b"a" in came and b"nested" * 200 in came


def test_the_handler_goes_on_when_a_batch_could_not_be_built() -> None:
    seen: list[object] = []
    came: list[bytes] = []
    d = make(interval=0.01)
    hook = mock.patch("threading.excepthook", lambda args: seen.append(args.exc_type))
    with hook, mock.patch.object(tempo, "Batch", side_effect=MemoryError):
        d.start(lambda batch: came.extend(batch.tolist()))
        d.enqueue(b"a")
        wait_until(lambda: seen)
    d.shutdown()

    assert (set(seen), came) == ({MemoryError}, [b"a"])


def test_a_batch_whose_runs_were_not_let_go_of_is_not_delivered_again() -> None:
    class Sticky(deque):  # type: ignore[type-arg]
        def popleft(self) -> object:
            raise KeyboardInterrupt

    d = make(max_batch_bytes=100)
    d.enqueue_many([b"%9d" % i for i in range(1000)])
    runs = d._state.runs
    d._state.runs = Sticky(runs)
    taken = 0
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            taken += 1
            d.get()
    d._state.runs = deque(d._state.runs)

    rest = payloads(d.stop())
    assert rest == [b"%9d" % i for i in range(1000)][-len(rest) :]
    assert d.stats().accepted == d.stats().delivered + len(rest)


def test_stop_returns_everything_when_it_is_called_again_after_an_interrupt() -> None:
    class Sore(list):  # type: ignore[type-arg]
        def append(self, item: object) -> None:
            super().append(item)
            raise KeyboardInterrupt

    d = make(max_batch_bytes=4)
    d.enqueue_many([b"aaaa", b"bbbb"])
    d._state.undelivered = [Sore()]
    with pytest.raises(KeyboardInterrupt):
        d.stop()
    d._state.undelivered = [list(d._state.undelivered[0])]

    assert payloads(d.stop()) == [b"aaaa", b"bbbb"]
    assert d.stop() == []


def test_payloads_whose_sizes_do_not_fit_32_bits_stand_beside_others() -> None:
    with mock.patch.object(tempo, "_UINT", 4 * tempo.MiB):
        d = make(max_buffered_bytes=64 * tempo.MiB)
        d.enqueue_many([bytes(2 * tempo.MiB), b"x", bytes(3 * tempo.MiB), bytes(5 * tempo.MiB)])
        d._check()
        assert [len(payload) for payload in payloads(d.stop())] == [2 << 20, 1, 3 << 20, 5 << 20]


def test_an_owner_left_behind_does_not_lock_its_thread_out() -> None:
    d = make()
    d._state.owner = threading.get_ident()

    d.enqueue(b"a")

    assert payloads(d.stop()) == [b"a"]


def test_start_can_be_tried_again_when_no_thread_could_be_started() -> None:
    d = make(interval=0.01)
    came: list[bytes] = []
    no_thread = mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread"))
    with no_thread, pytest.raises(RuntimeError, match="can't start"):
        d.start(lambda batch: came.extend(batch.tolist()))
    d.start(lambda batch: came.extend(batch.tolist()))
    d._spawn(d._state)  # there is one: nothing happens
    d.enqueue(b"a")
    d.shutdown()

    assert came == [b"a"]


def test_a_drain_that_ends_at_the_deadline_is_a_drain() -> None:
    d = make()
    d.shutdown()

    d._locked(d._state, d._give_up_locked)

    assert str(tempo.DrainTimeout([])) == "not drained in time: 0 batches undelivered"


def test_a_condition_would_lose_a_wake_up_from_a_signal_handler() -> None:
    """Why tempo waits on locks: between a Condition's test and its wait, its own thread's notify reaches nobody."""
    condition = threading.Condition()
    work: list[int] = []

    def handler() -> None:
        with condition:
            work.append(1)
            condition.notify()

    with condition:
        nothing = not work
        handler()  # a signal handler, just here
        if nothing:
            assert condition.wait(0.05) is False  # and for ever, without a timeout

    lock = threading.Lock()
    parker = tempo._Parker(lock)
    parker.wake()
    assert parker.park(LIMIT, LIMIT) is False


def test_a_nested_call_that_does_not_fit_is_refused_and_leaves_nothing() -> None:
    d = make(max_buffered_bytes=1000)
    d.enqueue(bytes(990))

    def section(s: Any) -> None:
        assert refusal(d.enqueue, b"n" * 11) is tempo.QueueFull
        assert refusal(d.enqueue, b"n" * 10) is None
        assert refusal(d.enqueue, b"") is tempo.QueueFull
        assert d.stats().rejected == 2

    d._locked(d._state, section)

    stats = d.stats()
    assert (stats.accepted, stats.rejected, stats.rejected_bytes) == (2, 2, 12)
    assert payloads(d.stop()) == [bytes(990), b"n" * 10]


def test_without_memory_to_count_a_nested_payload_it_is_counted_later() -> None:
    d = make()

    def section(s: Any) -> None:
        d.enqueue(b"nested")
        with short_of_memory(1), pytest.raises(MemoryError):
            d._count_locked(s)

    d._locked(d._state, section)

    assert payloads(d.stop()) == [b"nested"]


def test_without_memory_for_the_first_payload_of_a_run_the_packed_one_before_stands() -> None:
    d = make()
    before = [b"%100d" % i for i in range(512)]
    d.enqueue_many(before)
    with short_of_memory(1), pytest.raises(MemoryError):
        d.enqueue(b"x" * 3000)

    d._check()
    assert payloads(d.stop()) == before


def fork_here(d: tempo.Dispatcher) -> None:
    """What a fork does to a dispatcher in the child, without the fork."""
    with mock.patch.object(tempo, "_DISPATCHERS", [d]):
        tempo._after_fork_in_child()


def test_a_payload_appended_as_a_signal_handler_forks_is_the_parents() -> None:
    d = make()
    d.enqueue(b"a")
    eager(d).after = lambda: fork_here(d)

    d.enqueue(b"b")

    assert d.stats().accepted == 0


def test_a_wait_in_which_a_signal_handler_forks_goes_on_in_the_child() -> None:
    d = make(max_buffered_bytes=10)

    def park(self: object, pause: float, remaining: float) -> bool:
        fork_here(d)
        return False

    with mock.patch.object(tempo._Parker, "park", park):
        d.enqueue(b"0123456789")
        d.enqueue(b"child's", timeout=None)
        assert d.flush() is True  # forked: nothing of the child's to wait for

    assert payloads(d.stop()) == []


def test_a_handler_that_forks_does_not_go_on_in_the_child() -> None:
    d = make(interval=0.01)
    came: list[bytes] = []

    def handler(batch: tempo.Batch) -> None:
        came.extend(batch.tolist())
        if len(came) == 1:
            fork_here(d)

    d.start(handler)
    first = d._state.thread
    d.enqueue(b"parent's")
    assert first is not None
    first.join(LIMIT)
    assert not first.is_alive()
    d.enqueue_many([b"child's"])
    d.shutdown()

    assert came == [b"parent's", b"child's"]


def test_what_a_child_accepted_without_a_thread_is_drained_at_exit() -> None:
    d = make()
    came: list[bytes] = []
    d.start(lambda batch: came.extend(batch.tolist()))
    thread, old = d._state.thread, d._state
    fork_here(d)
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("at exit")):
        d.enqueue(b"a")
    with mock.patch.object(tempo, "_DISPATCHERS", [d]):
        tempo._at_exit()

    assert came == [b"a"]
    old.phase = tempo._STOPPED  # the thread of before the fork, which a real child would not have
    for parker in list(old.consumers):
        parker.woken = False
        parker.wake()
    assert thread is not None
    thread.join(LIMIT)


@pytest.mark.parametrize("wait", ["enqueue", "flush", "get"])
def test_an_interrupt_as_a_wait_ends_is_made_good(wait: str) -> None:
    d = make(max_buffered_bytes=100)
    d.enqueue(bytes(100))
    real = tempo.Dispatcher._leave
    left: list[int] = []

    def leave(self: tempo.Dispatcher, s: Any, parker: Any) -> None:
        left.append(1)
        if len(left) == 1:
            raise KeyboardInterrupt
        real(self, s, parker)

    with mock.patch.object(tempo.Dispatcher, "_leave", leave), pytest.raises(KeyboardInterrupt):
        if wait == "enqueue":
            d.enqueue(b"x", timeout=0.001)
        elif wait == "flush":
            d.flush(0.001)
        else:
            d.get(0.001)

    stats = d.stats()
    assert (stats.waiting_producers, stats.waiting_consumers, len(d._state.drainers)) == (0, 0, 0)


def test_the_hooks_see_all_dispatchers_while_another_thread_makes_one() -> None:
    class Growing(list):  # type: ignore[type-arg]
        grown = False

        def __iter__(self) -> Any:
            if not self.grown:
                self.grown = True
                raise RuntimeError("Set changed size during iteration")
            return super().__iter__()

    d = make()
    with mock.patch.object(tempo, "_DISPATCHERS", Growing([d])):
        assert tempo._dispatchers() == [d]


# -- Around a step: what a call meets that comes just there


@contextlib.contextmanager
def around(
    step: str, before: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Do something once, before or after a step of tempo's (the next call of a method), as a signal handler could."""
    real = getattr(tempo.Dispatcher, step)
    calls: list[str] = []

    def first(self: tempo.Dispatcher, *args: Any) -> Any:
        calls.append(step)
        if len(calls) > 1:
            return real(self, *args)
        before()
        result = real(self, *args)
        after()
        return result

    with mock.patch.object(tempo.Dispatcher, step, first):
        yield
    assert calls, f"{step} was not called"


def out_of_memory() -> None:
    raise MemoryError


def pending(d: tempo.Dispatcher, payload: bytes) -> Worker:
    """A thread that has appended a payload beyond the credit, while this one is in a locked section."""
    n = len(d._state.inbox)
    worker = Worker(refusal, d.enqueue, payload)
    wait_until(lambda: len(d._state.inbox) > n)
    return worker


def use_the_credit_up(d: tempo.Dispatcher, unit: bytes) -> None:
    """From another thread, while this one is in a locked section."""
    while len(d._state.inbox) < d._state.places:
        Worker(d.enqueue, unit).result()


def to_the_brim(d: tempo.Dispatcher, limit: int) -> None:
    """A nested call that fills the buffer to the last byte."""
    d.enqueue(b"Y" * (limit - d.stats().buffered_bytes))


BRIM = 128 * tempo.KiB


def assert_exact(d: tempo.Dispatcher) -> None:
    d._check()
    stats = d.stats()
    assert_balanced(stats)
    assert (stats.buffered_bytes, stats.peak_buffered_bytes) == (BRIM, BRIM)


def test_a_nested_call_fills_the_room_that_an_oversize_payload_waits_for() -> None:
    d = make(max_buffered_bytes=BRIM)
    d.enqueue(b"first")

    def section() -> None:
        with around("_store_locked", partial(to_the_brim, d, BRIM)):
            d.stats()

    eager(d).after = lambda: Worker(section).result()
    assert refusal(d.enqueue, b"O" * 3000) is tempo.QueueFull

    assert_exact(d)


def test_a_nested_call_as_credit_is_given_leaves_no_credit_to_a_pending_payload() -> None:
    others: list[Worker] = []

    def nested(d: tempo.Dispatcher) -> None:
        others.append(pending(d, b"P" * 400))
        to_the_brim(d, BRIM)

    d, moment = with_moment(nested, max_buffered_bytes=BRIM)
    d.enqueue(b"first")
    moment.countdown = 1  # the time of the credit
    d.stats()

    assert others[0].result() is tempo.QueueFull
    assert_exact(d)


def test_a_payload_appended_as_credit_is_given_does_not_keep_it_from_being_given() -> None:
    others: list[Worker] = []
    real = tempo.Dispatcher._grant_locked

    class Growing(list):  # type: ignore[type-arg]
        def __setitem__(self, key: Any, value: Any) -> None:
            if not others and isinstance(key, slice):
                others.append(pending(d, b"P" * 400))
            super().__setitem__(key, value)

    d = make(max_buffered_bytes=BRIM)
    d.enqueue(b"first")

    def grant(self: tempo.Dispatcher, s: Any) -> None:
        s.inbox = Growing(s.inbox)
        real(self, s)

    with mock.patch.object(tempo.Dispatcher, "_grant_locked", grant):
        d.stats()

    assert others[0].result() is None
    assert payloads(d.stop()) == [b"first", b"P" * 400]


@pytest.mark.parametrize("own", [b"O" * 3000, b"x"], ids=["oversize", "covered"])
def test_a_payload_that_is_taken_out_moves_no_other_into_the_credit(own: bytes) -> None:
    d = make(max_buffered_bytes=BRIM)
    d.enqueue(b"first")
    others: list[Worker] = []

    def nested() -> None:
        use_the_credit_up(d, b"t")
        others.append(pending(d, b"P" * 400))
        to_the_brim(d, BRIM)

    if len(own) > 1:
        step = around("_late_locked", before=nested)
    else:
        while len(d._state.inbox) < d._state.places:
            d.enqueue(b"u")
        step = around("_grant_locked", after=nested)
    with step:
        refusal(d.enqueue, own)

    assert others[0].result() is tempo.QueueFull
    assert_exact(d)


def test_a_nested_payload_that_is_taken_out_moves_no_other_into_the_credit() -> None:
    d = make(max_buffered_bytes=BRIM)
    d.enqueue(b"first")
    others: list[Worker] = []
    outcomes: list[object] = []

    def deeper() -> None:
        others.append(pending(d, b"P" * 400))
        to_the_brim(d, BRIM)

    def section(s: Any) -> None:
        while len(s.inbox) < s.places - 1:
            d.enqueue(b"u")
        eager(d).after = deeper  # appended in the last place of the credit, too large for it, and not yet taken out
        outcomes.append(refusal(d.enqueue, b"O" * 3000))

    d._locked(d._state, section)

    assert outcomes == [tempo.QueueFull]
    assert others[0].result() is tempo.QueueFull
    assert_exact(d)


def test_what_was_accepted_unseen_is_counted_after_an_exception_in_the_count() -> None:
    d, clock = with_clock(interval=8.0, max_batch_bytes=10_000)
    for _ in range(800):
        d.enqueue(bytes(100))
        clock.now += 0.001
    while d.stats().buffered_bytes >= 10_000:
        d.get(timeout=0)
    d.enqueue(b"one")
    accepted = 801
    while len(d._state.inbox) < d._state.places:  # the credit goes far beyond the end of the open batch
        d.enqueue(b"unseen")
        accepted += 1
    clock.now += 2  # and a new one would not any more

    with around("_store_locked", before=out_of_memory), pytest.raises(MemoryError):
        d.stats()

    rest = len(payloads(d.stop()))
    assert d.stats().delivered + rest == accepted
    d._check()


def test_a_nested_payload_accepted_as_stop_begins_is_among_what_it_returns() -> None:
    d = make()
    d.enqueue(b"a")

    with around("_count_locked", after=lambda: d.enqueue(b"nested")):
        assert payloads(d.stop()) == [b"a", b"nested"]

    assert conserved(d).buffered == 0


@pytest.mark.parametrize("call", ["stop", "shutdown"])
def test_batches_are_not_lost_when_an_interrupt_ends_the_call_that_took_them(call: str) -> None:
    d = make(max_batch_bytes=3)
    d.enqueue_many([b"one", b"two"])
    if call == "shutdown":
        closing = around("_give_up_locked", after=interrupt)
    else:
        closing = around("_stop_locked", after=interrupt)
    with closing, pytest.raises(KeyboardInterrupt):
        getattr(d, call)(*[0] * (call == "shutdown"))

    assert payloads(d.stop()) == [b"one", b"two"]
    assert d.stop() == []


def test_batches_go_to_one_of_those_who_stop() -> None:
    d = make(max_batch_bytes=3)
    d.enqueue_many([b"one", b"two"])
    first: list[list[tempo.Batch]] = []

    with around("_stop_locked", after=lambda: first.append(Worker(tempo._claim, d._state, list).result())):
        assert d.stop() == []

    assert payloads(first[0]) == [b"one", b"two"]


def test_a_lack_of_memory_that_passes_is_not_raised_when_the_payload_was_accepted() -> None:
    d = make()
    with around("_settle_locked", before=out_of_memory):
        d.enqueue(b"abc")

    assert payloads(d.stop()) == [b"abc"]


@pytest.mark.parametrize("kind", [list, iter])
def test_payloads_accepted_before_an_interrupt_are_counted(kind: Callable[[list[bytes]], Any]) -> None:
    d = make()
    items = [b"%d" % i for i in range(500)]
    with around("_settle_locked", before=interrupt), pytest.raises(KeyboardInterrupt) as caught:
        d.enqueue_many(kind(items))

    accepted = d.stats().accepted
    assert caught.value.accepted == accepted > 0  # type: ignore[attr-defined]
    assert payloads(d.stop()) == items[:accepted]


@contextlib.contextmanager
def raising_after_the_append(error: type[BaseException]) -> Iterator[None]:
    """End the next call of enqueue by an exception that comes when its payload was appended."""
    errors = [error]

    def len_or_error(of: Any) -> int:
        if errors:
            raise errors.pop()
        return len(of)

    with mock.patch.object(tempo, "len", len_or_error, create=True), pytest.raises(error):
        yield


@LIMITS
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("size", [10, 90], ids=["covered", "larger than credit covers"])
def test_a_payload_that_was_appended_when_an_interrupt_came_is_taken_out_again(
    limit: int, error: type[BaseException], size: int
) -> None:
    d = make(max_buffered_bytes=limit)
    d._state.small = 20
    with raising_after_the_append(error):
        d.enqueue(bytes(size))

    assert len(d._state.inbox) == 1
    d.enqueue(b"next")
    assert conserved(d).accepted == 1
    assert payloads(d.stop()) == [b"next"]


def test_a_payload_that_credit_covered_when_an_interrupt_came_is_accepted_and_counted() -> None:
    d = make(max_buffered_bytes=LARGE)
    d.enqueue(b"first")
    with raising_after_the_append(KeyboardInterrupt):
        try:
            d.enqueue_many(iter([b"second", b"third"]))
        except KeyboardInterrupt as exc:
            assert exc.accepted == 1  # type: ignore[attr-defined]
            raise

    assert conserved(d).accepted == 2
    assert payloads(d.stop()) == [b"first", b"second"]


def test_a_late_payload_that_another_counted_is_counted_when_an_interrupt_ends_its_call() -> None:
    d = make()
    d.enqueue(b"first")
    while len(d._state.inbox) < d._state.places:
        d.enqueue(b"u")
    before = d.stats().accepted
    while len(d._state.inbox) < d._state.places:
        d.enqueue(b"u")
        before += 1

    def by_others() -> None:
        Worker(d.stats).result()  # its credit covers the late one
        Worker(d.stats).result()
        raise KeyboardInterrupt

    with around("_enqueue", before=by_others), pytest.raises(KeyboardInterrupt) as caught:
        d.enqueue_many(iter([b"late", b"never"]))

    assert caught.value.accepted == 1  # type: ignore[attr-defined]
    assert d.stats().accepted == before + 1
    assert payloads(d.stop())[-1] == b"late"


def test_a_payload_accepted_between_an_interrupt_and_the_leaving_of_the_queue_is_counted() -> None:
    d = full(100)

    with (
        mock.patch.object(tempo._Parker, "park", lambda *_: interrupt()),
        around("_leave", before=lambda: Worker(d.get).result()),
        pytest.raises(KeyboardInterrupt) as caught,
    ):
        d.enqueue_many([b"w" * 50], timeout=None)

    assert caught.value.accepted == 1  # type: ignore[attr-defined]
    assert payloads(d.stop()) == [b"w" * 50]


def test_a_producer_does_not_rest_when_no_lock_can_be_had() -> None:
    d = half_full()

    def no_lock() -> None:
        raise RuntimeError("can't allocate lock")

    d._new_lock = no_lock  # type: ignore[assignment]
    Worker(send, d, b"", 5000).result()

    assert d.stats().accepted == 5009


def rest_once(d: tempo.Dispatcher, ended: threading.Event) -> None:
    """Send until told to end, which comes in a rest."""
    while not ended.is_set():
        d.enqueue(b"r", timeout=None)


class Sore(deque):  # type: ignore[type-arg]
    """A queue that is interrupted as its first is taken out, once."""

    hurt = False

    def popleft(self) -> Any:
        if self and not self.hurt:
            self.hurt = True
            raise KeyboardInterrupt
        return super().popleft()


def less_than_a_turn() -> tempo.Dispatcher:
    """A dispatcher of 1 MiB whose first batch makes room for 10,000 bytes: too few to rouse a resting producer."""
    d = make(max_batch_bytes=1)
    d.enqueue_many([bytes(10_000), bytes(600_000)])
    return d


@pytest.mark.parametrize("queue_of", ["resting", "producers"])
def test_a_producer_that_goes_on_as_an_interrupt_comes_leaves_nobody_to_wait_for(queue_of: str) -> None:
    ended = threading.Event()
    with forever():
        if queue_of == "resting":
            d = half_full()
            first = Worker(rest_once, d, ended)
            resting(d, 1)
            ended.set()
        else:
            d = less_than_a_turn()
            first = waiter(d, bytes(440_000), timeout=1)  # its rest ends with its time
        setattr(d._state, queue_of, Sore(getattr(d._state, queue_of)))
        with pytest.raises(KeyboardInterrupt):
            d.get()
        first.result()

    Worker(send, d, b"", 1200).result()  # rests, and no consumer comes: it looks after itself

    assert not d._state.resting
    d._check()


def test_a_sentinel_that_could_not_be_woken_is_none() -> None:
    real = tempo._Parker.wake
    woken: list[int] = []

    def wake(self: tempo._Parker) -> None:
        woken.append(1)
        if len(woken) == 1:
            raise KeyboardInterrupt
        real(self)

    d = less_than_a_turn()
    first = waiter(d, bytes(440_000))
    with mock.patch.object(tempo._Parker, "wake", wake), pytest.raises(KeyboardInterrupt):
        d.get()  # the first is accepted, is to rest, and to be the sentinel

    first.result()
    assert [len(payload) for payload in payloads(d.stop())] == [600_000, 440_000]


def test_a_coroutines_wake_up_is_made_when_an_interrupt_comes_just_before() -> None:
    d = make(interval=0.01)
    real = tempo._AsyncParker._post
    posts: list[int] = []

    def post(self: Any) -> None:
        posts.append(1)
        if len(posts) == 1:
            raise KeyboardInterrupt
        real(self)

    async def consume() -> list[bytes]:
        task = asyncio.ensure_future(d.__aiter__().__anext__())
        await asyncio.sleep(0)
        wait_until(lambda: d.stats().waiting_consumers == 1)
        with pytest.raises(KeyboardInterrupt):
            d.enqueue(b"one")
        return (await asyncio.wait_for(task, LIMIT)).tolist()

    with mock.patch.object(tempo._AsyncParker, "_post", post):
        assert asyncio.run(consume()) == [b"one"]
    d.stop()


def test_finalizers_in_two_dispatchers_sections_that_enqueue_crosswise_do_not_lock_each_other_out() -> None:
    one, two = make(), make()
    meeting = threading.Barrier(2)

    def cross(mine: tempo.Dispatcher, other: tempo.Dispatcher) -> None:
        def finalizer(s: Any) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(0.2)  # both are in their sections, if they can
            other.enqueue(b"finalizer")

        mine._locked(mine._state, finalizer)

    workers = [Worker(cross, one, two), Worker(cross, two, one)]
    for worker in workers:
        worker.result()

    assert payloads([*one.stop(), *two.stop()]) == [b"finalizer", b"finalizer"]


def test_a_handler_that_is_the_dispatchers_own_method_does_not_wait_for_room() -> None:
    errors: list[type[BaseException]] = []
    d = make(max_buffered_bytes=100, max_batch_bytes=50)
    d.enqueue_many([b"a" * 50, b"b" * 50])
    third = waiter(d, b"c" * 50)  # takes the room that the handler's batch leaves

    d.start(partial(d.enqueue_many, timeout=None), on_error=lambda exc, _: errors.append(type(exc)))
    wait_until(lambda: errors)
    third.result()
    d.shutdown()

    assert errors[0] is tempo.QueueFull
    assert set(errors[1:]) <= {tempo.QueueFull, tempo.ShuttingDown}


@pytest.mark.parametrize("step", ["_settle_locked", "_landed_locked"])
def test_the_handler_gets_each_batch_when_memory_was_lacking_around_it(step: str) -> None:
    came: list[bytes] = []
    seen: list[object] = []
    real = getattr(tempo.Dispatcher, step)
    raised: list[int] = []

    def lacking(self: tempo.Dispatcher, s: Any, *args: Any) -> Any:
        if s.flight_first >= 0 and len(raised) < 2:
            raised.append(1)
            raise MemoryError
        return real(self, s, *args)

    d = make(interval=0.01)
    hook = mock.patch("threading.excepthook", lambda args: seen.append(args.exc_type))
    with hook, mock.patch.object(tempo.Dispatcher, step, lacking):
        d.start(lambda batch: came.extend(batch.tolist()))
        d.enqueue(b"one")
        wait_until(lambda: d.stats().delivered == 1)
        d.enqueue(b"two")
        Worker(d.shutdown).result()

    assert came == [b"one", b"two"]
    assert len(raised) == 2
    assert set(seen) <= {MemoryError}


def test_start_has_happened_when_an_interrupt_ends_it_after_the_thread_began() -> None:
    d = make(interval=0.01)
    came: list[bytes] = []
    real = threading.Thread.start

    def start(self: threading.Thread) -> None:
        real(self)
        raise KeyboardInterrupt

    with mock.patch.object(threading.Thread, "start", start), pytest.raises(KeyboardInterrupt):
        d.start(lambda batch: came.extend(batch.tolist()))
    with pytest.raises(RuntimeError, match="start was called before"):
        d.start(print)
    d.enqueue(b"a")
    d.shutdown()

    assert came == [b"a"]


def test_a_thread_that_begins_after_its_start_was_undone_returns() -> None:
    d = make(interval=0.01)
    came: list[bytes] = []

    Worker(d._consume).result()
    d.start(lambda batch: came.extend(batch.tolist()))
    Worker(d._consume).result()
    d.enqueue(b"a")
    d.shutdown()

    assert came == [b"a"]


def test_the_handler_of_a_start_that_failed_is_never_called() -> None:
    d = make(interval=0.01)
    came: list[bytes] = []
    no_thread = mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread"))
    undoing = around("_disinherit_locked", before=lambda: d.enqueue(b"a"), after=lambda: d.enqueue(b"b"))
    with no_thread, undoing, pytest.raises(RuntimeError, match="can't start"):
        d.start(print)
    d.enqueue(b"c")
    d.start(lambda batch: came.extend(batch.tolist()))
    d.shutdown()

    assert came == [b"a", b"b", b"c"]


def test_shutdown_does_not_join_a_thread_that_has_not_begun() -> None:
    d = make(interval=0.01)
    reached, go_on = threading.Event(), threading.Event()
    real = threading.Thread._set_native_id  # type: ignore[attr-defined]

    def halt(self: threading.Thread) -> None:
        real(self)
        if self.name.startswith("tempo-"):
            reached.set()
            assert go_on.wait(LIMIT)

    with mock.patch.object(threading.Thread, "_set_native_id", halt):
        starting = Worker(d.start, print)
        assert reached.wait(LIMIT)
        try:
            Worker(d.shutdown).result()
        finally:
            go_on.set()
        starting.result()
    assert d.stats().state == "stopped"
    thread = d._state.thread
    assert thread is not None
    thread.join(LIMIT)
    assert not thread.is_alive()


def test_a_batch_taken_as_a_signal_handler_forks_is_the_parents() -> None:
    d = make(max_batch_bytes=3)
    d.enqueue(b"abc")

    with around("_take_locked", after=lambda: fork_here(d)), pytest.raises(queue.Empty):
        d.get(timeout=0)

    assert d.stats().accepted == 0


def test_a_batch_that_a_coroutine_takes_as_a_signal_handler_forks_is_the_parents() -> None:
    d = make(max_batch_bytes=3)
    d.enqueue(b"abc")

    async def consume() -> list[bytes]:
        with around("_take_locked", after=lambda: fork_here(d)):
            task = asyncio.ensure_future(d.__aiter__().__anext__())
            await asyncio.sleep(0)
        d.enqueue(b"new")
        return (await task).tolist()

    assert asyncio.run(consume()) == [b"new"]
    d.stop()


def test_a_nested_call_takes_no_more_places_than_a_credit_has() -> None:
    d = make()
    d.enqueue_many([b"1"] * 300)
    d.flush(0)
    d.get(timeout=0)
    assert d._state.small == 1
    lengths: list[int] = []

    def section(s: Any) -> None:
        d.enqueue(bytes(tempo.MiB // 2))
        lengths.append(len(s.inbox))

    d._locked(d._state, section)

    assert tempo._CREDIT_ITEMS < lengths[0] <= tempo._CREDIT_ITEMS + 3
    assert len(payloads(d.stop())) == 1


def test_a_waiting_producer_that_is_woken_for_nothing_waits_on() -> None:
    d = full(SMALL)
    worker = waiter(d, b"w")
    parker = d._state.producers[0]
    parker.wake()
    wait_until(lambda: d.stats() and not parker.woken)
    assert d.stats().waiting_producers == 1

    d.get()
    worker.result()
    assert payloads(d.stop()) == [b"w"]


def test_a_nested_call_as_pending_payloads_are_read_takes_its_room_first() -> None:
    d = make(max_buffered_bytes=100)
    outcomes: list[object] = []

    class Read(list):  # type: ignore[type-arg]
        def __getitem__(self, key: Any) -> Any:
            item = super().__getitem__(key)
            if isinstance(key, slice) and key.step == -1 and not outcomes:
                outcomes.append(None)
                outcomes.append(refusal(d.enqueue, b"n" * 60))
            return item

    d._state.inbox = Read(d._state.inbox)
    outcomes.append(refusal(d.enqueue, b"o" * 60))

    assert outcomes[1:] == [None, tempo.QueueFull]
    assert payloads(d.stop()) == [b"n" * 60]


def test_credit_stays_within_the_open_batch_while_a_consumer_waits() -> None:
    d = make(max_batch_bytes=5000)
    consumer = Worker(d.get)
    wait_until(lambda: d.stats().waiting_consumers == 1)
    d.enqueue(b"a")
    d._check()
    while consumer.is_alive():
        d.enqueue(b"b" * 100)
        d._check()

    assert 4900 < consumer.result().nbytes <= 5000
    d.stop()


def test_a_handler_that_is_another_dispatchers_method_waits_for_room() -> None:
    one, two = full(100), make(interval=0.01)
    two.start(partial(one.enqueue_many, timeout=None))
    two.enqueue(b"handed on")
    wait_until(lambda: one.stats().waiting_producers == 1)

    one.get()
    two.shutdown()
    assert payloads(one.stop()) == [b"handed on"]
    assert two.stats().failed == 0


def test_a_consumer_that_was_woken_need_not_be_told_so_credit_goes_beyond_the_open_batch() -> None:
    go_on = threading.Event()
    real = tempo._Parker.park

    def park(self: tempo._Parker, pause: float, remaining: float) -> bool:
        over = real(self, pause, remaining)
        assert not parker.armed or go_on.wait(LIMIT)  # it was woken, and is kept from the CPU
        return over

    d, clock = with_clock(interval=8.0, max_batch_bytes=5000)
    with mock.patch.object(tempo._Parker, "park", park):
        consumer = Worker(d.get)
        wait_until(lambda: d.stats().waiting_consumers == 1)
        parker = d._state.consumers[0]
        places = []
        d.enqueue(b"p" * 100)
        wait_until(lambda: parker.armed and not parker.woken)  # its timer is set
        for _ in range(299):
            clock.now += 0.001
            d.enqueue(b"p" * 100)
            d._check()
            places.append((parker.woken, d._state.places))
        go_on.set()
        batch = consumer.result()

    before = [n for woken, n in places if not woken]
    assert (max(before) - 1) * 512 < 5000
    assert max(n for woken, n in places if woken) > 2 * max(before)
    assert len(batch) == 50
    assert d.stats().accepted == 300
    d.stop()


@pytest.mark.parametrize(
    ("sizes", "covered"),
    [
        ([40_000] * 8, 40_000),  # all alike: no payload need take the lock for its size
        ([100] * 300, 100),
        ([100] * 255 + [40_000], 5000),  # a rare one: to cover it would leave few places for the others
    ],
)
def test_credit_covers_what_is_usual(sizes: list[int], covered: int) -> None:
    d = make(max_batch_bytes=320_000)
    d.enqueue_many([bytes(size) for size in sizes])
    d.flush(0)
    d.get()
    d.enqueue(b"first")
    d.enqueue(b"again")

    assert d._state.places > 1
    assert d._state.covers == covered
    d._check()


def test_a_nested_call_does_not_take_for_accepted_what_comes_behind_the_count() -> None:
    d = make(max_buffered_bytes=1100)
    d.enqueue(b"a" * 10)
    d.enqueue(b"b" * 300)  # unseen
    others: list[Worker] = []
    seen: list[tuple[int, object]] = []

    def nested() -> None:
        others.append(pending(d, b"t" * 300))  # the credit is withdrawn: it is not accepted
        seen.append((d.stats().accepted, refusal(d.enqueue, b"N" * 700)))

    with around("_store_locked", before=nested):
        d.flush(0)

    assert seen == [(2, None)]
    assert others[0].result() is tempo.QueueFull
    assert [len(payload) for payload in payloads(d.stop())] == [10, 300, 700]


def test_a_payload_that_comes_as_empty_places_are_taken_back_is_counted() -> None:
    d = make()
    d.enqueue(b"a")

    class Growing(list):  # type: ignore[type-arg]
        grown = False

        def __setitem__(self, key: Any, value: Any) -> None:
            if not self.grown:
                self.grown = True
                super().append(b"unseen")  # by a thread that has looked at the credit before it was withdrawn
            super().__setitem__(key, value)

    d._state.inbox = Growing(d._state.inbox)
    d.flush(0)

    assert payloads(d.stop()) == [b"a", b"unseen"]


def test_a_coroutines_later_wake_up_is_not_taken_for_the_one_that_was_made() -> None:
    d = make()
    s = d._state
    loop = asyncio.new_event_loop()
    parker = tempo._AsyncParker(threading.Lock(), loop, s.outbox)
    posts: list[int] = []

    def post(self: Any) -> None:
        posts.append(1)
        if len(posts) == 1:  # meanwhile: another thread makes it too, the coroutine looks, waits again, and is woken
            s.outbox.popleft()
            parker.reset()
            parker.wake()

    parker.wake()
    with mock.patch.object(tempo._AsyncParker, "_post", post):
        d._post(s)
    loop.close()

    assert len(posts) == 2
    assert not s.outbox


@needs_fork
def test_a_child_forked_by_a_signal_handler_in_a_wait_for_the_lock_goes_on() -> None:
    lines = forking(
        """
        inside, go_on = threading.Event(), threading.Event()
        settle = tempo.Dispatcher._settle_locked

        def hold(self, s):
            if threading.current_thread().name == "holder":
                inside.set()
                go_on.wait(20)
            settle(self, s)

        def handler(*_):
            pids.append(os.fork())
            go_on.set()

        tempo.Dispatcher._settle_locked = hold
        one, other = (tempo.Dispatcher(interval=60, max_buffered_bytes=1000) for _ in range(2))
        pids = []
        signal.signal(signal.SIGALRM, handler)
        holder = threading.Thread(target=one.enqueue, args=(b"x",), name="holder")
        holder.start()
        assert inside.wait(20)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        other.enqueue(b"payload")
        if pids[0] == 0:
            other.enqueue(b"child's")
            print("child", other.stats().accepted, flush=True)
            os._exit(0)
        holder.join(20)
        until(lambda: os.waitpid(pids[0], os.WNOHANG)[0])
        print("parent", other.stats().accepted)
        """
    )

    assert sorted(lines) == ["child 1", "parent 1"]


def test_nested_refusals_are_added_to_those_before_and_let_go_of() -> None:
    d = make(max_buffered_bytes=SMALL)
    d.enqueue(bytes(95))
    for size in (6, 7, 8):
        assert refusal(d.enqueue, bytes(size)) is tempo.QueueFull

    def section(s: Any) -> None:
        assert refusal(d.enqueue, bytes(9)) is tempo.QueueFull
        assert refusal(d.enqueue, bytes(10)) is tempo.QueueFull

    d._locked(d._state, section)

    assert (d.stats().rejected, d.stats().rejected_bytes) == (5, 6 + 7 + 8 + 9 + 10)
    assert not d._state.refused


def test_a_nested_flush_closes_one_batch_and_not_the_next() -> None:
    d = make()
    d.enqueue(b"a")
    d._locked(d._state, lambda s: d.flush())

    d.enqueue(b"b")
    d._locked(d._state, lambda s: None)
    d.enqueue(b"c")

    assert [batch.tolist() for batch in d.stop()] == [[b"a"], [b"b", b"c"]]


def test_coroutines_collected_in_one_section_all_leave_the_queue() -> None:
    loop = asyncio.new_event_loop()
    d = make()
    coroutines = [d.__aiter__().__anext__() for _ in range(3)]

    async def park() -> None:
        for coroutine in coroutines:
            coroutine.send(None)

    loop.run_until_complete(park())
    assert d.stats().waiting_consumers == 3

    def section(s: Any) -> None:
        for coroutine in coroutines:
            coroutine.close()

    d._locked(d._state, section)
    loop.close()

    assert d.stats().waiting_consumers == 0


def test_what_a_nested_call_leaves_to_an_enqueue_that_changes_nothing_else_is_done() -> None:
    loop = asyncio.new_event_loop()
    d = make(max_buffered_bytes=2000)
    coroutine = d.__aiter__().__anext__()

    async def park() -> None:
        coroutine.send(None)

    loop.run_until_complete(park())
    d.enqueue(b"x")
    while len(d._state.inbox) < d._state.places:
        d.enqueue(b"x")

    with around("_grant_locked", after=coroutine.close):
        d.enqueue(b"y")  # beyond the credit: it gives another one, and need not settle
    loop.close()

    assert not d._state.consumers
    d.stop()


def test_a_nested_payload_that_is_taken_out_is_not_counted_and_leaves_no_hole() -> None:
    d = make()

    def section(s: Any) -> None:
        interrupted = mock.patch.object(tempo.Dispatcher, "_enqueue", side_effect=KeyboardInterrupt)
        with interrupted, pytest.raises(KeyboardInterrupt) as caught:
            d.enqueue_many(iter([b"interrupted"]))
        assert caught.value.accepted == 0  # type: ignore[attr-defined]

    d._locked(d._state, section)

    assert len(d._state.inbox) == 1
    for payload in (b"a", b"b", b"c"):
        d.enqueue(payload)
    assert payloads(d.stop()) == [b"a", b"b", b"c"]


def test_a_nested_payload_as_large_as_the_buffer_fits() -> None:
    d = make(max_buffered_bytes=SMALL)

    d._locked(d._state, lambda s: d.enqueue(bytes(SMALL)))

    assert payloads(d.stop()) == [bytes(SMALL)]


def test_a_nested_payload_that_never_fits_is_refused_and_counted() -> None:
    d = make(max_buffered_bytes=SMALL)

    refused: list[Any] = []

    d._locked(d._state, lambda s: refused.append(refusal(d.enqueue, bytearray(SMALL + 1))))

    assert refused == [tempo.PayloadTooLarge]
    assert (d.stats().rejected, d.stats().rejected_bytes) == (1, SMALL + 1)


def test_a_nested_call_at_the_end_of_the_stack_accepts_nothing() -> None:
    d = make()

    def deep() -> None:
        raise RecursionError

    def section(s: Any) -> None:
        interrupted = mock.patch.object(tempo.Dispatcher, "_enqueue", side_effect=KeyboardInterrupt)
        with interrupted, around("_withdraw_nested", before=deep), pytest.raises(RecursionError):
            d.enqueue_many(iter([b"interrupted"]))

    d._locked(d._state, section)

    assert conserved(d).accepted == 0
    assert d.stop() == []


def test_a_nested_payload_that_was_counted_as_its_call_was_interrupted_is_told_as_accepted() -> None:
    d = make(max_buffered_bytes=LARGE)
    d.enqueue(b"a")

    def interrupt(self: tempo.Dispatcher, s: Any, late: list[bytes], timeout: Any) -> None:
        self._count_locked(s)
        raise KeyboardInterrupt

    def section(s: Any) -> None:
        s.places = 0  # so that the call takes the exact way
        with mock.patch.object(tempo.Dispatcher, "_enqueue", interrupt), pytest.raises(KeyboardInterrupt) as caught:
            d.enqueue_many(iter([b"b"]))
        assert caught.value.accepted == 1  # type: ignore[attr-defined]

    d._locked(d._state, section)

    assert payloads(d.stop()) == [b"a", b"b"]


# Neither memory nor stack


def test_an_append_that_finds_no_stack_accepts_nothing() -> None:
    d = make()

    class Deep(list):  # type: ignore[type-arg]
        def append(self, item: object) -> None:
            raise RecursionError

    d._state.inbox = Deep(d._state.inbox)
    with pytest.raises(RecursionError):
        d.enqueue(b"a")

    assert conserved(d).accepted == 0


@pytest.mark.parametrize("step", ["_locked", "_late_locked"])
def test_a_call_that_finds_no_memory_after_it_was_accepted_returns(step: str) -> None:
    d = make(max_buffered_bytes=SMALL)
    with around(step, after=out_of_memory):
        d.enqueue(b"a")

    assert payloads(d.stop()) == [b"a"]


def test_a_payload_is_accepted_where_there_is_no_memory_to_note_that_it_was() -> None:
    d = make(max_buffered_bytes=SMALL)

    class Late(list):  # type: ignore[type-arg]
        def append(self, item: object) -> None:
            raise MemoryError

    d._state.inbox.append(b"a")
    d._locked(d._state, d._late_locked, Late([b"a"]), None)

    assert payloads(d.stop()) == [b"a"]


def test_a_payload_is_accepted_where_there_is_no_memory_for_what_follows_the_commit() -> None:
    d = make(max_buffered_bytes=SMALL)
    with around("_stored_locked", before=out_of_memory):
        d.enqueue(b"a")

    assert conserved(d).accepted == 1
    assert payloads(d.stop()) == [b"a"]


def test_a_consumer_that_finds_no_memory_to_leave_the_queue_is_taken_out_by_the_next_section() -> None:
    d = make()
    interrupted = mock.patch.object(tempo._Parker, "park", side_effect=KeyboardInterrupt)
    with around("_leave_locked", before=out_of_memory), interrupted, pytest.raises(KeyboardInterrupt):
        d.get()
    assert len(d._state.leavers) == 1

    d.flush(timeout=0)
    assert d.stats().waiting_consumers == 0
    assert not d._state.leavers


def test_while_the_interpreter_ends_no_call_waits_for_room_or_for_a_lock() -> None:
    d = make(max_buffered_bytes=SMALL)
    d.enqueue(bytes(SMALL))
    Worker(d._state.lock.acquire).result()  # a daemon thread that is frozen with it
    with mock.patch.object(sys, "is_finalizing", return_value=True):
        refused = refusal(d.enqueue, b"a", timeout=None)

    assert refused is tempo.QueueFull
    assert conserved(d).rejected == 1


def test_a_signal_handler_that_forks_in_a_wait_for_the_lock_has_it_over_the_fork() -> None:
    d = make()
    real = d._ident
    held: list[bool] = []

    def fork() -> int:  # where _locked is called and has no lock yet
        if not held and sys._getframe(1).f_code is tempo._LOCKED_CODE:
            tempo._before_fork()
            held.append(Worker(d._state.lock.acquire, False).result())
            tempo._after_fork()
        return real()

    d._ident = fork
    d.stats()

    assert held == [False]
    assert not tempo._FORKS
    assert Worker(d.stats).result().state == "running"


@pytest.mark.skipif(not CPYTHON, reason="finalizers come with the last reference on CPython alone")
def test_a_finalizer_without_a_frame_of_its_own_is_nested_too() -> None:
    d = make()

    class Last:
        # Called by the interpreter, right from the frame that lets go of it.
        __del__ = staticmethod(partial(d.flush, timeout=0))

    d.enqueue(b"a")
    d._state.calm = Last()  # type: ignore[assignment]
    del Last
    d.stats()  # its section sets calm anew
    d.enqueue(b"b")

    assert [batch.tolist() for batch in d.stop()] == [[b"a"], [b"b"]]


def test_a_parker_of_before_a_fork_is_left_alone() -> None:
    d = make()
    old = d._state
    parker = tempo._Parker(threading.Lock())
    old.consumers.append(parker)
    fork_here(d)
    Worker(old.lock.acquire).result()  # of a thread that the child has not

    Worker(d._leave, old, parker).result()

    assert list(old.consumers) == [parker]


def test_a_fork_waits_for_the_lock_for_a_time() -> None:
    d = make()
    real, waits = d._ident, []

    class Held:
        def acquire(self, blocking: bool, timeout: float) -> bool:
            waits.append((blocking, timeout))
            return False

    def fork() -> int:
        if sys._getframe(1).f_code is tempo._LOCKED_CODE:
            d._ident = real
            tempo._before_fork()
            tempo._after_fork()
        return real()

    d._ident = fork
    with mock.patch.object(tempo, "_LOCKS", {"held": Held()}):
        d.stats()

    assert waits == [(True, tempo._FORK_PATIENCE)]
    assert tempo._FORK_PATIENCE > 0


def test_nested_calls_see_what_was_accepted_before_them() -> None:
    d = make(max_buffered_bytes=LARGE)
    for payload in (b"first", b"", b"xyz", bytes(512)):
        d.enqueue(payload)
    assert len(d._state.inbox) > 3  # accepted unseen

    seen = d._locked(d._state, lambda s: d.stats())

    assert (seen.accepted, seen.accepted_bytes) == (4, 5 + 1 + 3 + 512)
    assert seen == d.stats()


@pytest.mark.parametrize(("first", "fits"), [(30, 10), (50, 20), (30, 11)])
def test_a_call_nested_in_a_nested_one_counts_it_as_accepted_if_it_will_be(first: int, fits: int) -> None:
    d = make(max_buffered_bytes=SMALL)
    d.enqueue(bytes(60))
    d.flush(timeout=0)
    d.get()
    d.enqueue(bytes(60))
    deeper: list[Any] = []

    def section(s: Any) -> None:
        with around("_accepted_before", before=lambda: deeper.append(refusal(d.enqueue, bytes(fits)))):
            deeper.append(refusal(d.enqueue, bytes(first)))

    d._locked(d._state, section)

    goes = 60 + first <= SMALL
    then = 60 + (first if goes else 0) + fits <= SMALL
    assert deeper == [None if then else tempo.QueueFull, None if goes else tempo.QueueFull]
    assert conserved(d).buffered_bytes == 60 + goes * first + then * fits


@pytest.mark.parametrize("call", ["enqueue", "refused", "never fits"])
def test_what_is_nested_in_a_section_that_need_not_settle_is_settled(call: str) -> None:
    d = make(max_buffered_bytes=LARGE, max_batch_bytes=LARGE)
    d.enqueue(b"x")
    while len(d._state.inbox) < d._state.places:
        d.enqueue(b"x")
    nested: dict[str, Callable[[], object]] = {
        "enqueue": lambda: d.enqueue(b"nested"),
        "refused": lambda: refusal(d.enqueue, bytes(LARGE)),
        "never fits": lambda: refusal(d.enqueue, bytearray(LARGE + 1)),
    }
    with around("_grant_locked", after=nested[call]):
        d.enqueue(b"y")  # beyond the credit: it gives another one, and need not settle

    assert not (d._state.mixed or d._state.refused or d._state.left)
    assert d.stats().rejected == (call != "enqueue")
    d.stop()


# The end of the stack

AT_THE_END = {
    "enqueue": lambda d: d.enqueue(bytes(600)),  # larger than credit covers
    "enqueue in turn": lambda d: d.enqueue(b"x"),
    "get": lambda d: d.get(0),
}


@pytest.mark.parametrize("name", list(AT_THE_END))
def test_a_call_at_the_end_of_the_stack_is_made_or_not_made(name: str) -> None:
    limit = sys.getrecursionlimit()
    for spare in range(80):
        d = make(max_buffered_bytes=LARGE, max_batch_bytes=2048)
        d.enqueue_many([bytes(10)] * 700)
        before = d.stats()
        try:
            with_little_stack(spare, partial(AT_THE_END[name], d))
        except RecursionError:
            after = conserved(d)
            assert (after.accepted, after.delivered) == (before.accepted, before.delivered)
        else:
            break
        finally:
            assert sys.getrecursionlimit() == limit
    assert spare < 79
    after = conserved(d)
    assert (after.accepted, after.delivered) != (before.accepted, before.delivered)
    assert sum(map(len, d.stop())) == after.buffered


# Interleavings: calls stopped at a bytecode while others run (`make interleave` walks all of them)

SAMPLE = 40.0  # seconds of random ones


@pytest.fixture
def actors(no_thread_left: None) -> Iterator[None]:
    """End the walk's threads."""
    yield
    soak_schedule.dismiss()


@walkable
@pytest.mark.usefixtures("actors")
def test_a_sample_of_the_interleavings_holds(capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("TEMPO_SEED") or random.randrange(1 << 32))
    with capsys.disabled():
        print(f"\n{SAMPLE:.0f} s of interleavings (TEMPO_SEED={seed} repeats them)", flush=True)
    end = time.monotonic() + SAMPLE
    stopped = 0
    for outcome in soak_walk.sample(tempo, seed):
        assert not isinstance(outcome, soak_walk.Failure), f"seed {seed}, or --replay: {outcome}"
        stopped += outcome
        if time.monotonic() > end:
            break
    assert stopped


@walkable
@pytest.mark.usefixtures("actors")
@pytest.mark.parametrize("name", [twin.name for twin in soak_twins.TWINS])
def test_the_walk_finds_a_broken_twin(name: str) -> None:
    assert soak_twins.find(name, quick=True) is not None


@walkable
@pytest.mark.usefixtures("actors")
def test_the_place_of_a_failure_can_be_walked_again() -> None:
    place = soak_twins.find(soak_twins.TWINS[0].name, quick=True)
    assert place is not None
    plan, stops, order = soak_walk.parse(place)
    outcome = soak_walk.attempt(soak_twins.broken(soak_twins.TWINS[0]), plan, stops, order)
    assert str(outcome) == place
    assert soak_main.main(["interleave", "--replay", place]) == 0  # tempo itself holds there


@pytest.mark.parametrize("place", ["", "enqueue", "enqueue / tickle in 'empty', stopped at (1,), order 0"])
def test_a_place_that_is_none_is_one_line_that_names_it(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        soak_main.main(["interleave", "--replay", place])
    assert caught.value.code == 2
    assert repr(place) in capsys.readouterr().err


@walkable
@pytest.mark.usefixtures("actors")
def test_a_stop_stopped_anywhere_goes_on_when_another_has_claimed_its_batches() -> None:
    plan = soak_walk.Plan(("stop", "stop", "stats"), "one short of a batch", False)
    length = soak_walk.length(tempo, plan)
    runs = 0
    for first in range(length - 60, length, 3):  # from the end of its section on
        for second in range(1, length):
            outcome = soak_walk.attempt(tempo, plan, (first, second))
            assert not isinstance(outcome, soak_walk.Failure), outcome
            runs += 1
            if outcome < 2:
                break
    assert runs > length


# Hostile cases, a sample of each in a process of its own (`make hostile` runs the whole)

soak_hostile.load()


@pytest.mark.parametrize("name", list(HOSTILE))
def test_nothing_hostile_breaks_it(name: str) -> None:
    outcome = soak_hostile.attempt(HOSTILE[name], 0.02)
    if outcome.status == "left out":
        pytest.skip(outcome.note)
    assert outcome.status == "pass", outcome.note


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("print('tried: 1'); raise SystemExit(3)", "exit code 3"),
        ("import sys; print('tried: 1'); print('a word', file=sys.stderr)", "a word"),
        ("print('no word of the outcome')", "exit code 0"),
        ("import threading; threading.Event().wait()", "hung"),
    ],
    ids=["exit-code", "stderr", "no-outcome", "hung"],
)
def test_a_hostile_case_that_goes_wrong_is_told(program: str, why: str) -> None:
    wrong = Case("callers", "wrong", lambda scale: 0, limit=0.1)
    runs = mock.patch.object(soak_hostile, "command", return_value=[sys.executable, "-c", program])
    with runs, mock.patch.object(soak_hostile, "GRACE", 3.0):
        outcome = soak_hostile.attempt(wrong, 1.0)
    assert outcome.status == "fail"
    assert why in outcome.note
    assert soak_hostile.table([outcome])[1].split()[:6] == ["hostile", "callers", "1", "0", "1", "0"]


# Mutants: tempo.py changed in a thousand ways (`make mutants` tries the tests on each)


def test_each_mutant_listed_as_changing_nothing_is_a_line_of_tempo_and_has_a_reason() -> None:
    lines = {line.strip() for line in (ROOT / "tempo.py").read_text(encoding="utf-8").splitlines()}
    listed = soak_mutants.read_list(soak_mutants.LISTED)

    assert listed
    assert [key for key in listed if key[2] not in lines or key[2] == key[3]] == []
    assert [key for key, reason in listed.items() if len(reason) < 20] == []


def test_mutants_are_the_changes_that_cosmic_ray_finds_outside_of_annotations() -> None:
    pytest.importorskip("cosmic_ray")
    found = list(soak_mutants.mutants("def f(a: int, b: int = 2) -> bool:\n    return a < b\n"))

    assert {m.after for m in found} == {"def f(a: int, b: int = 3) -> bool:", "return a <= b"}
    assert all(m.function == "f" and m.source.count("\n") == 2 for m in found)


def test_a_test_that_hangs_with_a_mutant_is_ended_and_named(tmp_path: Path) -> None:
    (tmp_path / "soak").mkdir()
    shutil.copy(ROOT / "soak" / "mutants.py", tmp_path / "soak")
    (tmp_path / "soak" / "__init__.py").touch()
    (tmp_path / "tempo.py").touch()
    (tmp_path / "test_tempo.py").write_text(
        "import threading\ndef test_passes(): pass\ndef test_hangs(): threading.Event().wait()\n"
    )
    took = {"test_tempo.py::test_passes": 0.0, "test_tempo.py::test_hangs": 0.0}
    with mock.patch.object(soak_mutants, "HANG", 1.0):
        report = soak_mutants.run_tests(tmp_path, list(took), took)

    assert report["code"]
    assert (report["at"], report["failed"]) == ("test_tempo.py::test_hangs", [])


@pytest.mark.parametrize("left", ["a late payload", "an entry"])
def test_what_an_exception_left_undone_the_next_section_does(left: str) -> None:
    """Whatever that section is for: here one that does nothing."""
    d = make(max_buffered_bytes=SMALL)
    s = d._state
    entry = tempo._Entry(b"by another")
    if left == "a late payload":  # whose owner was interrupted again as it took it out
        s.inbox.append(payload := b"refused")
        s.orphans.append(payload)
    else:  # that was accepted by a commit, and the flag not yet set
        d._locked(s, lambda s: d._commit_locked(s, [b"x"], [1], 1, 1, [entry]))
    d._locked(s, lambda s: None)

    assert s.orphans == []
    assert entry.accepted is (None if left == "a late payload" else True)
    assert payloads(d.stop()) == ([] if left == "a late payload" else [b"x"])


@pytest.mark.parametrize("full", [False, True])
def test_what_a_nested_call_leaves_is_settled_by_the_section_that_it_interrupted(full: bool) -> None:
    """Also by one that has changed nothing that anybody waits for, and so would not settle."""
    d = make(max_buffered_bytes=SMALL)
    d.enqueue(bytes(SMALL if full else 1))

    def interrupted(s: Any) -> type[BaseException] | None:
        s.calm = True
        return refusal(d.enqueue, b"nested")

    s = d._state
    assert d._locked(s, interrupted) == (tempo.QueueFull if full else None)
    assert (s.mixed, s.left, s.refused) == (False, False, [])
    assert len(s.inbox) == 1
    d.stop()


def test_credit_is_given_again_whatever_has_left_and_beside_a_handler() -> None:
    """Or every payload would take the lock."""
    d = make(max_buffered_bytes=LARGE)
    for _ in range(4):  # more than the buffer holds, in all
        d.enqueue(bytes(LARGE // 2))
        d.flush(timeout=0)
        assert d.get(timeout=0).nbytes == LARGE // 2
    d.enqueue(b"x")
    assert d._state.places > 1
    d.stop()

    with make(max_buffered_bytes=LARGE) as d:
        d.start(lambda batch: None)
        d.enqueue(b"x")
        assert d._state.places > 1


@pytest.mark.parametrize("places", [1, 50])
def test_a_batch_that_begins_unseen_counts_its_interval_from_no_later_than_its_first_payload(places: int) -> None:
    """Also when it is counted because of a nested call, long after that payload came."""
    d, clock = with_clock(max_batch_bytes=1000, max_buffered_bytes=LARGE, interval=60.0)
    s = d._state
    with mock.patch("time.monotonic", clock):
        d.enqueue(b"x" * 900)
        s.pace = (1, clock.now, places * 1.01 / d._unseen)
        d.stats()  # gives credit anew
        assert s.places == 1 + places
        d.enqueue(b"y" * 200)
        assert len(s.inbox) == 2  # unseen
        clock.now += 50
        d._locked(s, lambda s: d.enqueue(b"nested"))
        assert payloads([d.get(timeout=0)]) == [b"x" * 900]
        clock.now += 11
        assert payloads([d.get(timeout=0)]) == [b"y" * 200, b"nested"]


def test_a_batch_that_a_nested_call_begins_is_not_due_at_once() -> None:
    d, clock = with_clock(interval=60.0)
    with mock.patch("time.monotonic", clock):
        d._locked(d._state, lambda s: d.enqueue(b"nested"))
        clock.now += 59
        with pytest.raises(queue.Empty):
            d.get(timeout=0)
        clock.now += 2
        assert payloads([d.get(timeout=0)]) == [b"nested"]


def test_credit_is_not_widened_when_others_fill_it_as_it_is_taken_back() -> None:
    d = make(max_buffered_bytes=LARGE)
    d.enqueue(bytes(LARGE - 600))
    workers: list[Worker] = []

    def others() -> None:
        workers.extend(pending(d, bytes(400)) for _ in range(2))

    with around("_narrow_locked", before=others):
        d.stats()
    assert Counter(worker.result() for worker in workers) == Counter([None, tempo.QueueFull])
    assert d.stats().buffered_bytes == LARGE - 200
    d.stop()


def test_a_nested_call_knows_what_nested_calls_before_it_were_told() -> None:
    d = make(max_buffered_bytes=SMALL)
    d.enqueue(bytes(50))
    d.flush(timeout=0)

    def section(s: Any) -> list[Any]:
        told: list[Any] = [refusal(d.enqueue, bytes(60))]
        batch, _ = d._poll_locked(s, None, False, [None])
        assert batch is not None
        told += [
            len(batch),
            d.stats().accepted,
            d.stats().rejected_bytes,
        ]  # the refused one would fit by now, and is refused all the same
        told += [refusal(d.enqueue, bytes(60)), d.stats().accepted]
        return told

    assert d._locked(d._state, section) == [tempo.QueueFull, 1, 1, 60, None, 2]
    assert [d.stats().accepted, d.stats().rejected] == [2, 1]
    d.stop()


def test_empty_payloads_reach_a_consumer_that_waits() -> None:
    d = make(interval=0.01)
    worker = Worker(d.get)  # without a time after which it would look by itself
    wait_until(lambda: d.stats().waiting_consumers == 1)
    d.enqueue(b"")
    assert payloads([worker.result()]) == [b""]
    d.stop()


def test_a_consumer_that_waits_for_its_time_is_not_woken_before() -> None:
    d = make()
    d.enqueue_many([bytes(100)] * 10)
    d.flush(timeout=0)
    assert len(d.get(timeout=0)) == 10
    d.enqueue(b"not due")
    worker = Worker(d.get, timeout=LIMIT)
    wait_until(lambda: any(parker.armed for parker in list(d._state.consumers)))
    with mock.patch.object(tempo._Parker, "wake") as wake:
        d.stats()
        d.stats()
    assert wake.call_count == 0
    d.flush(timeout=0)
    assert payloads([worker.result()]) == [b"not due"]


@pytest.mark.parametrize("before", [b"", b"x"], ids=["empty", "one byte"])
def test_what_empty_payloads_take_up_is_given_back(before: bytes) -> None:
    """Each takes up one byte of the buffer, so that there is an end to them."""
    d = make(max_buffered_bytes=SMALL)
    for sent in ([before], [b"", b""], [b"", b"y", b""]):
        d.enqueue_many(sent)
        d.flush(timeout=0)
        assert payloads([d.get(timeout=0)]) == sent
        assert d._state.taken.charge == d._state.inbox[0][2]
    d.enqueue(bytes(SMALL))
    d.stop()


def test_a_start_that_is_refused_leaves_the_first_one_as_it_was() -> None:
    got: list[bytes] = []
    with make(interval=0.01) as d:
        d.start(lambda batch: got.extend(batch.tolist()))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="start was called before"):
                d.start(print)
        d.enqueue(b"x")
    assert got == [b"x"]


def test_a_drain_that_ends_as_the_time_does_is_no_timeout() -> None:
    d = make()
    d.enqueue(b"x")
    with around("_wait_delivered", after=lambda: Worker(d.get).result()):
        d.shutdown(timeout=0)
    assert d.stats().state == "stopped"
    assert d.stats().delivered == 1


def test_flush_does_not_wait_for_the_batch_that_begins_behind_what_it_waits_for() -> None:
    entered, leave = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]
    batches = iter(range(2))

    def handler(batch: tempo.Batch) -> None:
        i = next(batches)
        entered[i].set()
        leave[i].wait(LIMIT)

    with make() as d:
        d.start(handler)
        d.enqueue(b"first")
        flush = Worker(d.flush)
        assert entered[0].wait(LIMIT)
        wait_until(lambda: len(d._state.drainers) == 1)
        d.enqueue(b"second")
        d.flush(timeout=0)
        leave[0].set()
        assert entered[1].wait(LIMIT)
        assert flush.result() is True
        leave[1].set()


@pytest.mark.parametrize("more", [0, 1])
def test_a_value_in_an_error_message_is_cut_behind_80_characters(more: int) -> None:
    shown = "str: '" + "x" * (73 + more) + "'"
    cut = shown[:77] + "..." if more else shown
    assert len(cut) == 80
    with pytest.raises(TypeError) as error:
        make().enqueue("x" * (73 + more))  # type: ignore[arg-type]
    assert str(error.value) == f"payload must be a bytes-like object, not {cut}"


@pytest.mark.parametrize("hasty", [False, True])
def test_a_producer_that_was_let_in_rests_unless_it_is_the_main_thread(hasty: bool) -> None:
    d = make(max_buffered_bytes=LARGE)
    s = d._state
    parker = tempo._Parker(d._new_lock())
    parker.entry, parker.hasty = tempo._Entry(b"x"), hasty
    d._locked(s, lambda s: s.producers.append(parker))
    assert parker.entry.accepted
    assert (parker.roused, parker in s.resting) == (hasty, not hasty)
    assert payloads(d.stop()) == [b"x"]


def test_the_last_of_those_that_rest_is_told_to_watch() -> None:
    d = make(max_buffered_bytes=LARGE)
    s = d._state
    parkers = [tempo._Parker(d._new_lock()) for _ in range(2)]
    for parker in parkers:
        parker.entry = tempo._RESTING
    with mock.patch.object(tempo._Parker, "wake", autospec=True) as wake:
        d._locked(s, lambda s: s.resting.extend(parkers))
    assert s.sentinel is parkers[1]
    assert [call.args for call in wake.call_args_list] == [(parkers[1],)]
    d.stop()


def test_a_batch_that_was_taken_is_returned_though_memory_is_short_after_that() -> None:
    d = make()
    d.enqueue(b"x")
    d.flush(timeout=0)
    with around("_locked", after=out_of_memory):
        assert payloads([d.get(timeout=0)]) == [b"x"]
    assert d.stats().delivered == 1


def test_a_cut_that_an_interrupt_keeps_from_the_header_is_undone() -> None:
    d = make()
    d.enqueue(b"x")
    real = tempo._Run.cut

    def cut(run: Any, number: int) -> None:
        real(run, number)
        raise KeyboardInterrupt

    with mock.patch.object(tempo._Run, "cut", cut), pytest.raises(KeyboardInterrupt):
        d.flush(timeout=0)
    d.enqueue(b"y")
    d.flush(timeout=0)
    assert payloads([d.get(timeout=0)]) == [b"x", b"y"]


def test_a_stop_that_is_interrupted_as_it_takes_a_batch_out_is_made_good_by_the_next() -> None:
    d = make(max_batch_bytes=1)
    d.enqueue_many([b"a", b"b", b"c"])
    source, first = inspect.getsourcelines(tempo.Dispatcher._take_locked)
    place = first + next(i for i, line in enumerate(source) if line.strip().startswith("s.taken = now"))
    hits = iter(range(10))

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code is not tempo.Dispatcher._take_locked.__code__:
            return trace if event == "call" else None
        if event == "line" and frame.f_lineno == place and next(hits) == 1:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            d.stop()
    finally:
        sys.settrace(before)
    assert payloads(d.stop()) == [b"a", b"b", b"c"]


@needs_fork
def test_a_fork_that_comes_in_no_wait_for_a_lock_takes_none() -> None:
    d = make()
    tempo._before_fork()
    try:
        assert tempo._FORKS[threading.get_ident()][-1] == []
    finally:
        tempo._after_fork()

    def waiting(s: Any) -> list[Any]:
        tempo._before_fork()
        try:
            return list(tempo._FORKS[threading.get_ident()][-1])
        finally:
            tempo._after_fork()

    assert d._state.lock in d._locked(d._state, waiting)


def test_at_exit_there_is_no_time_beyond_exit_timeout() -> None:
    with make() as d:
        d.start(lambda batch: None, exit_timeout=0.0)
        found = mock.patch.object(tempo, "_dispatchers", return_value=[d])
        with found, mock.patch.object(tempo.Dispatcher, "shutdown") as shutdown:
            tempo._at_exit()
    assert shutdown.call_args.args == (0.0,)


@pytest.mark.parametrize(("size", "typecode"), [(999, "I"), (1000, "Q"), (1001, "Q")])
def test_sizes_that_four_bytes_do_not_hold_take_eight(size: int, typecode: str) -> None:
    """As of 4 GiB; here as of 1,000."""
    d = make(max_buffered_bytes=LARGE)
    with mock.patch.object(tempo, "_UINT", 1000):
        d.enqueue(b"small")
        d.enqueue_many([bytes(size)])
        d.stats()
    assert [run.sizes.typecode for run in d._state.runs] == (["I"] if typecode == "I" else ["I", "Q"])
    assert payloads(d.stop()) == [b"small", bytes(size)]


def test_compare_takes_the_baseline_of_the_machine_that_was_about_as_fast(tmp_path: Path) -> None:
    for name, seconds in (("cpython-3.99", 8e-7), ("cpython-3.99-fast", 3e-7)):
        rows = {"soak_32": {"ratio": 0.5, "spread": 0.01, "control": seconds}, "other": {"ratio": 1.0, "spread": 0.0}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    own = mock.patch.object(soak_bench, "_own_name", return_value="cpython-3.99")
    with mock.patch.object(soak_bench, "FOLDER", tmp_path), own:
        recorded = soak_bench._parse_baselines("auto")
        (named,) = soak_bench._parse_baselines("cpython-3.99-fast")
        with pytest.raises(ValueError, match="no baseline nobody"):
            soak_bench._parse_baselines("nobody")
    figures = {"soak_32": (0.5, 0.01, 6e-7, 3.1e-7)}
    assert soak_bench.nearest(figures, recorded) == named
    assert soak_bench.nearest({"soak_32": (0.5, 0.01, 9e-7, 7e-7)}, recorded).name == "cpython-3.99"
    assert soak_bench.nearest({"other": (1.0, 0.0, 1e-7, 1e-7)}, recorded).name == "cpython-3.99"


# -- Sinks: what consumers put batches into --


def test_the_file_sink_writes_an_event_a_line_and_keeps_newlines_out(tmp_path: Path) -> None:
    sink = soak_file.FileSink(tmp_path / "events")
    sink.deliver(batch_of(b'{"a":1}', b'{\n"a": 2\n}'))
    sink.deliver(batch_of(b""))
    sink.close()
    assert (tmp_path / "events").read_bytes() == b'{"a":1}\n{ "a": 2 }\n\n'


def test_the_file_sink_writes_lines_that_are_terminated_already_as_they_are(tmp_path: Path) -> None:
    sink = soak_file.FileSink(tmp_path / "events", terminated=True)
    sink.deliver(batch_of(b"first\n", b"second\n"))
    sink.close()
    assert (tmp_path / "events").read_bytes() == b"first\nsecond\n"


def test_the_file_sink_begins_a_new_file_before_a_batch_that_is_too_much_and_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "events"
    sink = soak_file.FileSink(path, rotate_bytes=10, keep=2)
    for i in range(5):
        sink.deliver(batch_of(b"%d..." % i, b"."))
    sink.deliver(batch_of(b"longer than the limit"))
    sink.close()
    assert [file.name for file in soak_file.rotated(path)] == ["events.000004", "events.000005"]
    assert [file.read_bytes() for file in soak_file.rotated(path)] == [b"3...\n.\n", b"4...\n.\n"]
    assert path.read_bytes() == b"longer than the limit\n"

    again = soak_file.FileSink(path, rotate_bytes=10)
    again.deliver(batch_of(b"after a restart"))
    again.close()
    assert soak_file.rotated(path)[-1].name == "events.000006"


class Disk:
    """os.write and os.fsync on a disk that takes so many bytes, one a call, and then has so many failures."""

    def __init__(self, room: int, failures: int) -> None:
        self.room, self.failures, self.synced = room, failures, 0
        self.real = os.write

    def write(self, fd: int, data: bytes) -> int:
        if self.room == 0 and self.failures:
            self.failures -= 1
            raise OSError(28, "No space left on device")
        self.room = max(0, self.room - 1)
        return self.real(fd, data[:1])

    def fsync(self, fd: int) -> None:
        self.synced += 1


def test_the_file_sink_goes_on_where_it_was_when_the_disk_has_room_again(tmp_path: Path) -> None:
    disk = Disk(room=4, failures=3)
    sink = soak_file.FileSink(tmp_path / "events", fsync=True)
    with mock.patch.multiple(os, write=disk.write, fsync=disk.fsync), mock.patch("time.sleep"):
        sink.deliver(batch_of(b"first", b"second"))
    sink.close()
    assert (disk.failures, disk.synced) == (0, 1)
    assert (tmp_path / "events").read_bytes() == b"first\nsecond\n"


def test_the_file_sink_takes_half_a_batch_out_again_when_it_gives_up(tmp_path: Path) -> None:
    sink = soak_file.FileSink(tmp_path / "events", patience=0.0)
    sink.deliver(batch_of(b"whole"))
    with mock.patch.object(os, "write", Disk(room=4, failures=1).write), pytest.raises(OSError, match="No space"):
        sink.deliver(batch_of(b"half"))
    sink.deliver(batch_of(b"after"))
    sink.close()
    assert (tmp_path / "events").read_bytes() == b"whole\nafter\n"


def test_the_file_sink_does_not_wait_for_what_will_not_pass(tmp_path: Path) -> None:
    sink = soak_file.FileSink(tmp_path / "events")
    broken = mock.patch.object(os, "write", side_effect=OSError(5, "Input/output error"))
    with broken, mock.patch("time.sleep") as sleep, pytest.raises(OSError, match="Input/output"):
        sink.deliver(batch_of(b"x"))
    sink.close()
    assert sleep.call_count == 0


def test_the_sinks_command_says_that_it_was_interrupted(tmp_path: Path, capsys: Any) -> None:
    real = vars(soak_sinks_command)["drive"]

    def drive(*args: Any) -> Any:
        return replace(real(*args), interrupted=True)

    with mock.patch.object(soak_sinks_command, "drive", drive):
        code = soak_main.main(
            ["sinks", "--only", "null,file", "--duration", "0.2s", "--producers", "2", "--out", str(tmp_path)]
        )
    assert code == 1
    assert capsys.readouterr().out.startswith("INTERRUPTED: 1 of 1 loads well")


@pytest.mark.parametrize(("name", "value"), [("rotate_bytes", 0), ("keep", -1)])
def test_the_file_sink_names_a_limit_that_is_none(name: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1 or None, not {value}"):
        soak_file.FileSink(tmp_path / "events", **{name: value})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nowhere", "is not a sink"),
        ("ftp://127.0.0.1", "is not a sink"),
        ("file:", "names no file"),
        ("redis:", "names no server"),
        ("http://", "names no server"),
        ("file:x#rotate=heavy", "rotate: 'heavy' is not a size"),
        ("file:x#fsync=perhaps", "fsync: 'perhaps' is neither yes nor no"),
        ("file:x#stream=y", "'stream=y' is no option of such a sink"),
        ("redis://127.0.0.1#maxlen", "'maxlen' is no option"),
        ("redis://127.0.0.1#maxlen=0", "maxlen: '0' is out of range"),
        ("nats://127.0.0.1#timeout=-1", "timeout: '-1' is not a number of seconds"),
    ],
)
def test_a_sink_that_is_none_is_named_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as error:
        soak_sinks.parse_sink(text)
    assert repr(text) in str(error.value)


def accepted_and_events() -> tuple[list[soak_census.Account], list[bytes]]:
    """What two producers sent, and the same as one list in which their events alternate."""
    accounts = [soak_census.Account(), soak_census.Account()]
    sources = [soak_payloads.events(None, i, soak_payloads.Sent(None)) for i in range(2)]
    events = [next(source) for _ in range(10) for source in sources]
    for i, event in enumerate(events):
        accounts[i % 2].add(event)
    return accounts, events


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda e: e, {}),
        (lambda e: e[:4] + e[5:], {"lost": 1, "checksum_equal": False}),
        (lambda e: [*e, e[-1]], {"repeated": 1}),
        (lambda e: [e[2], e[1], e[0], *e[3:]], {"out_of_order": 1}),
        (lambda e: [*e[1::2], *e[::2]], {}),  # of two producers: nobody promised that
        (lambda e: [*e, b'{"id":"0009-1000000000"}'], {"strange": 1}),
        (lambda e: [*e, b"?"], {"strange": 1}),
        (lambda e: [*e, e[0].replace(b"1000000000", b"9999999999")], {"strange": 1}),
        (lambda e: [*e, e[0].replace(b"0000-1", b"-001-1")], {"strange": 1}),
        (lambda e: [e[0][:-1], *e[1:]], {"checksum_equal": False}),
    ],
    ids=[
        "equal",
        "lost",
        "repeated",
        "swapped",
        "interleaved",
        "stranger",
        "torn",
        "never sent",
        "negative",
        "changed",
    ],
)
def test_reading_back_finds_what_is_wrong(
    change: Callable[[list[bytes]], list[bytes]], expected: dict[str, object]
) -> None:
    accounts, events = accepted_and_events()
    found = soak_readback.compare(change(events), accounts, None, once=True, ordered=True)
    kinds = {"lost": 0, "repeated": 0, "out_of_order": 0, "strange": 0, "checksum_equal": True}
    assert {kind: getattr(found, kind) for kind in kinds} == {**kinds, **expected}
    assert len(found.problems) == len(expected)


def test_reading_back_lets_a_sink_repeat_that_says_so_and_small_events_count() -> None:
    accounts, events = accepted_and_events()
    assert soak_readback.compare([*events, events[0]], accounts, None, once=False, ordered=True).problems == []

    account = soak_census.Account()
    for event in (b"1", b"2"):
        account.add(event)
    assert soak_readback.compare([b"2", b"1"], [account], 1, once=True, ordered=True).problems == []
    assert len(soak_readback.compare([b"2"], [account], 1, once=True, ordered=True).problems) == 2


@pytest.mark.parametrize("options", [[], ["--bulk", "50"], ["--on-full", "raise", "--max-buffered-bytes", "64KiB"]])
def test_a_soak_into_files_reads_every_event_back(options: list[str], tmp_path: Path) -> None:
    target = f"file:{tmp_path / 'events'}#rotate=100KiB"
    common = ["--duration", "0.3s", "--producers", "4", "--display", "none", "--out", str(tmp_path / "out")]
    done = run_python("-m", "soak", "run", "--sink", target, *common, *options, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "latest.json").read_text())
    assert result["sink"]["events"] == result["accepted"] > 0
    assert result["sink"]["problems"] == []
    assert len(list(tmp_path.glob("events.*"))) > 1


def test_a_soak_into_a_device_says_that_nothing_can_be_read_back(tmp_path: Path) -> None:
    done = run_python(
        "-m", "soak", "run", "--sink", "file:/dev/null", "--duration", "0.2s", "--out", str(tmp_path), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "latest.json").read_text())["sink"]["read"] is False


def test_a_soak_whose_sink_loses_an_event_fails(tmp_path: Path) -> None:
    target = tmp_path / "events"
    real = soak_file.FileSink.write_lines

    def forgetful(self: soak_file.FileSink, lines: list[bytes]) -> None:
        real(self, lines[1:])

    with mock.patch.object(soak_file.FileSink, "write_lines", forgetful):
        code = soak_main.main(
            ["run", "--sink", f"file:{target}", "--duration", "0.2s", "--display", "none", "--out", str(tmp_path)]
        )
    result = json.loads((tmp_path / "latest.json").read_text())
    assert code == 1
    assert result["lost"] > 0
    assert "accepted events are not there" in result["verdict"]["correctness"]["note"]


def test_a_sink_without_its_package_or_server_is_one_line(tmp_path: Path) -> None:
    nobody = soak_servers.free_port()
    block = f"import sys; sys.modules['redis'] = None; sys.argv[1:] = ['run', '--sink', 'redis://127.0.0.1:{nobody}']\n"
    done = run_python("-c", block + "from soak.__main__ import main; sys.exit(main())", cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "needs a package" in line

    pytest.importorskip("redis")
    pytest.importorskip("tenacity")
    done = run_python("-m", "soak", "run", "--sink", f"redis://127.0.0.1:{nobody}", cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert f"'redis://127.0.0.1:{nobody}' cannot be opened" in line


@pytest.mark.parametrize("text", [b"", b"a", b"a\n", b"a\nb", b"a\n" + b"b" * 200_000, b"b" * 200_000])
def test_the_receiver_takes_a_torn_line_out_when_it_starts(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stored"
    path.write_bytes(text)
    soak_receiver.drop_torn(str(path))
    assert path.read_bytes() == text[: text.rfind(b"\n") + 1]


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers requests as it is told, and remembers them."""

    protocol_version = "HTTP/1.1"
    codes: list[int]
    seen: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        self.seen.append((self.headers["Idempotency-Key"], body))
        self.send_response(self.codes.pop(0))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def answering(*codes: int) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A server that answers with these codes; yields its address and what it has seen."""
    seen: list[tuple[str, bytes]] = []
    kind = type("Answering", (Answers,), {"codes": list(codes), "seen": seen})
    with http.server.HTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", seen
        finally:
            server.shutdown()
            thread.join(LIMIT)


@pytest.mark.parametrize("compress", [False, True])
def test_the_http_sink_posts_a_batch_again_under_the_same_key(compress: bool) -> None:
    soak_http = pytest.importorskip("soak.sinks.http", exc_type=ImportError)
    with answering(503, 429, 204, 204) as (url, seen):
        sink = soak_http.HttpSink(url, compress=compress, longest_pause=0.01)
        sink.deliver(batch_of(b"1", b"2"))
        sink.deliver(batch_of(b"3"))
        sink.close()
    assert [body for _, body in seen] == [b"1\n2\n"] * 3 + [b"3\n"]
    assert len({key for key, _ in seen[:3]}) == 1
    assert seen[3][0] != seen[0][0]


def test_the_http_sink_raises_what_will_not_pass() -> None:
    soak_http = pytest.importorskip("soak.sinks.http", exc_type=ImportError)
    with answering(400, 503, 503) as (url, seen):
        sink = soak_http.HttpSink(url, tries=2, longest_pause=0.01)
        with pytest.raises(soak_http.urllib3.exceptions.HTTPError, match="answered 400"):
            sink.deliver(batch_of(b"1"))
        with pytest.raises(soak_http.urllib3.exceptions.HTTPError):
            sink.deliver(batch_of(b"2"))
        sink.close()
    assert [body for _, body in seen] == [b"1\n", b"2\n", b"2\n"]


def test_the_sinks_command_harms_a_server_and_reads_back(tmp_path: Path) -> None:
    pytest.importorskip("urllib3", minversion="2")
    done = run_python(
        *("-m", "soak", "sinks", "--only", "null,http", "--faults", "kill,reset,refuse"),
        *("--duration", "1s", "--producers", "4", "--out", str(tmp_path), "--json", str(tmp_path / "result.json")),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {(row["sink"], row["fault"]): row for row in result["rows"]}
    assert list(rows) == [("null", "none"), *(("http", fault) for fault in ("none", "kill", "reset", "refuse"))]
    for (sink, _), row in rows.items():
        if sink == "http":
            assert row["read"]["lost"] == 0
            assert row["read"]["events"] - row["read"]["repeated"] == row["accepted"] > 0
    assert result["left_out"] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_sinks_command_that_is_told_to_end_ends_its_server(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("urllib3", minversion="2")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    options = ("--only", "http", "--faults", "none", "--duration", "10m", "--producers", "2", "--json", os.devnull)
    with OnTerminal("-m", "soak", "sinks", *options) as terminal:
        terminal.read_until("calibration: ")
        wait_until(lambda: list(tmp_path.glob("tempo-sinks-*/http/data/*")), "the server has begun")
        (folder,) = tmp_path.iterdir()
        terminal.send_signal(number)
        assert terminal.exit_code() == 1, terminal.text
    assert "INTERRUPTED" in terminal.text
    assert not folder.exists()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.exists()]
    assert not any(os.fsencode(folder) in command for command in commands)


def test_the_sinks_command_leaves_a_server_out_that_cannot_be_had(tmp_path: Path) -> None:
    missing = mock.patch.object(soak_servers, "find", side_effect=SetupError("no apt-get here"))
    with missing, mock.patch.object(soak_sinks_command, "ROUNDS", 1):
        code = soak_main.main(
            ["sinks", "--only", "null,nats", "--duration", "0.2s", "--producers", "2", "--out", str(tmp_path)]
        )
    (file,) = tmp_path.glob("sinks-*.json")
    assert code == 0
    assert json.loads(file.read_text())["left_out"] == ["nats: no apt-get here"]


@pytest.mark.parametrize("arguments", [["--only", "kafka"], ["--faults", "fire"], ["--duration", "0s"]])
def test_a_bad_option_of_the_sinks_command_is_one_line(arguments: list[str]) -> None:
    done = run_python("-m", "soak", "sinks", *arguments, cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument {arguments[0]}: " in line


def skip_without(program: str, package: str) -> None:
    """Skip the test when a server is neither installed nor in the cache already."""
    with mock.patch.object(soak_servers, "fetch", side_effect=SetupError("not installed")):
        try:
            soak_servers.find(program, package)
        except SetupError:
            pytest.skip(f"no {program} is here (make soak-sinks fetches it)")


@contextlib.contextmanager
def redis_servers(folder: Path, *options: Sequence[str]) -> Iterator[list[soak_servers.Redis]]:
    """A server for each of these options, ended afterwards."""
    pytest.importorskip("redis", minversion="6.1")  # the first whose RedisCluster has transactions
    pytest.importorskip("tenacity")
    skip_without("redis-server", "redis-server")
    with contextlib.ExitStack() as stack:
        servers = [soak_servers.Redis(folder / f"server {i}") for i in range(len(options))]
        for server, more in zip(servers, options):
            server.more = more
            server.make_folder(small=False)
            stack.callback(server.stop)
            server.start()
        yield servers


def in_stream(client: Any, stream: str) -> list[bytes]:
    """The events that are in a stream."""
    return [fields[b"event"] for _, fields in client.xrange(stream)]


def test_the_redis_sink_trims_its_stream(tmp_path: Path) -> None:
    with redis_servers(tmp_path, ()) as (server,):
        redis = importlib.import_module("redis")
        module = importlib.import_module("soak.sinks.redis")
        events = [b"%04d" % i for i in range(3000)]
        with redis.Redis(port=server.port, socket_timeout=LIMIT) as client:
            sinks = {maxlen: module.RedisSink(client, f"at most {maxlen}", maxlen=maxlen) for maxlen in (500, None)}
            for start in range(0, 3000, 100):
                for sink in sinks.values():
                    sink.deliver(batch_of(*events[start : start + 100]))
            kept = in_stream(client, "at most 500")
            assert kept == events[-len(kept) :]
            assert 500 <= len(kept) < 700  # Redis trims by whole nodes, of 100 entries
            assert in_stream(client, "at most None") == events


def test_the_redis_sink_goes_on_when_a_machine_of_its_cluster_comes_back(tmp_path: Path) -> None:
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-port")
    buses = [soak_servers.free_port() for _ in range(3)]  # where they talk to each other
    with redis_servers(tmp_path, *((*options, str(bus)) for bus in buses)) as servers:
        redis = importlib.import_module("redis")
        module = importlib.import_module("soak.sinks.redis")
        patient = {"socket_timeout": LIMIT, "socket_connect_timeout": LIMIT}
        with contextlib.ExitStack() as stack:
            nodes = [stack.enter_context(redis.Redis(port=server.port, **patient)) for server in servers]
            for i, node in enumerate(nodes):
                node.execute_command("CLUSTER ADDSLOTSRANGE", 16384 * i // 3, 16384 * (i + 1) // 3 - 1)
                node.execute_command("CLUSTER MEET", soak_servers.HOST, servers[0].port, buses[0])

            wait_until(lambda: all(node.cluster("INFO")["cluster_state"] == "ok" for node in nodes))
            cluster = stack.enter_context(redis.RedisCluster(host=soak_servers.HOST, port=servers[0].port, **patient))
            streams = [f"events:{{{i}}}" for i in range(6)]
            assert len({cluster.get_node_from_key(stream).port for stream in streams}) == 3
            sinks = [module.RedisSink(cluster, stream) for stream in streams]
            for i, sink in enumerate(sinks):
                sink.deliver(batch_of(b"%d" % i, b"next"))
            sinks[0]._append(1, [b"0", b"next"])  # the try whose answer was lost
            assert [in_stream(cluster, stream) for stream in streams] == [[b"%d" % i, b"next"] for i in range(6)]

            (away,) = (server for server in servers if server.port == cluster.get_node_from_key(streams[0]).port)
            away.kill()
            tries: list[int] = []
            append = sinks[0]._append

            def counted(*args: Any) -> None:
                tries.append(1)
                append(*args)

            with mock.patch.object(sinks[0], "_append", counted):
                worker = Worker(sinks[0].deliver, batch_of(b"while it was away"))
                wait_until(lambda: len(tries) > 1)
                away.start()
                worker.result()
            assert in_stream(cluster, streams[0]) == [b"0", b"next", b"while it was away"]


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        ("redis.ConnectionError('away')", True),
        ("redis.AuthenticationError('invalid password')", False),
        ("redis.exceptions.ClusterDownError('The cluster is down')", True),
        ("redis.exceptions.MovedError('3999 127.0.0.1:6381')", True),
        ("redis.ResponseError('MISCONF Redis is configured to save')", True),
        ("redis.ResponseError('Command # 1 (XADD a) of pipeline caused error: NOREPLICAS Not enough')", True),
        ("redis.ResponseError('Command # 1 (XADD NOREPLICAS) of pipeline caused error: WRONGTYPE')", False),
        ("redis.RedisClusterException('Redis Cluster cannot be connected. Please')", True),
        ("redis.RedisClusterException('shard_hint is deprecated')", False),
        ("ValueError('MISCONF')", False),
    ],
)
def test_the_redis_sink_tries_again_what_may_pass(error: str, transient: bool) -> None:
    redis = pytest.importorskip("redis")
    pytest.importorskip("tenacity")
    module = importlib.import_module("soak.sinks.redis")
    assert module.is_transient(eval(error, {"redis": redis})) is transient


@pytest.mark.parametrize("kind", ["redis", "postgresql", "nats"])
def test_a_batch_whose_acknowledgement_is_lost_is_in_the_server_once(kind: str, tmp_path: Path) -> None:
    """The connection is reset, again and again, while batches are delivered through a relay."""
    for package in {"redis": ["redis"], "postgresql": ["psycopg"], "nats": ["nats"]}[kind] + ["tenacity"]:
        pytest.importorskip(package)
    program, package = {
        "redis": ("redis-server", "redis-server"),
        "postgresql": ("initdb", "postgresql"),
        "nats": ("nats-server", "nats-server"),
    }[kind]
    skip_without(program, package)
    done = run_python(
        *("-m", "soak", "sinks", "--only", kind, "--faults", "reset", "--duration", "1s", "--producers", "4"),
        *("--max-buffered-bytes", "256KiB"),
        *("--out", str(tmp_path), "--json", str(tmp_path / "result.json")),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(row["fault"], row["read"]["lost"], row["read"]["repeated"]) for row in result["rows"]] == [
        ("none", 0, 0),
        ("reset", 0, 0),
    ]


# -- Types: a project that has copied tempo.py --

TYPED = """\
from __future__ import annotations

import asyncio
from collections.abc import Iterator

import tempo


def handle(batch: tempo.Batch) -> None:
    data: memoryview = batch.data
    first: memoryview = batch[0]
    some: list[bytes] = batch.tolist()[:2]
    views: Iterator[memoryview] = iter(batch)
    print(len(batch), batch.nbytes, data, first, some, next(views))


def failed(error: BaseException, batch: tempo.Batch) -> None:
    print(error, batch.tolist())


async def consume(d: tempo.Dispatcher) -> int:
    total: int = 0
    async for batch in d:
        total += batch.nbytes
    return total


d: tempo.Dispatcher = tempo.Dispatcher(interval=0.25, max_batch_bytes=None, max_buffered_bytes=4 * tempo.MiB)
d.start(handle, on_error=failed)
d.enqueue(b"a", timeout=1.0)
d.enqueue(memoryview(b"a"))
d.enqueue(bytearray(b"a"), timeout=None)
d.enqueue_many([b"b", b"c"])
done: bool = d.flush(timeout=1.0)
stats: tempo.Stats = d.stats()
try:
    d.shutdown(timeout=1.0)
except tempo.DrainTimeout as late:
    left: list[tempo.Batch] = list(late.undelivered)
print(asyncio.run(consume(d)), stats.accepted)
"""


@pytest.mark.parametrize(("checker", "options"), [("mypy", ["--strict"]), ("pyright", [])])
def test_a_typed_project_passes_with_the_vendored_file(checker: str, options: list[str], tmp_path: Path) -> None:
    pytest.importorskip(checker)
    if run_python("-m", checker, "--version", cwd=tmp_path).returncode:
        pytest.skip(f"{checker} cannot be run: it may need the network once")
    shutil.copy(ROOT / "tempo.py", tmp_path)
    (tmp_path / "project.py").write_text(TYPED, encoding="utf-8")
    done = run_python("-m", checker, *options, "project.py", "tempo.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    (tmp_path / "project.py").write_text(TYPED + "d.enqueue('text')\n", encoding="utf-8")
    done = run_python("-m", checker, *options, "project.py", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stdout.count("error") >= 1
