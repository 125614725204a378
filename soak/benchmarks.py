# SPDX-License-Identifier: MIT
"""What is measured: tempo, and what people use in its place. A script of pyperf's:

    python3 -m soak.benchmarks --groups calls -o result.json     (what else there is: --help)

Each subject returns the seconds that its work took, after it has checked that the work was done. For tempo the work
includes counting payloads, packing them and closing batches. Packages do different things with a payload (a span has
attributes, a record is formatted, Kafka has a protocol): the figures show what a user of each pays.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import inspect
import logging.handlers
import os
import queue
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import tempo
from soak.calibration import calibrate
from soak.cli import KIB, MIB, duration, names
from soak.config import config_from
from soak.drive import PATIENCE, drive
from soak.load import Load
from soak.payloads import MEAN as SIZE

CHUNK = 512
LARGE = 10 * KIB
PAYLOADS = [b"%08d" % i + bytes(SIZE - 8) for i in range(CHUNK)] * 8
"""512 distinct ones, 100 KiB, eight times: as warm in the processor's caches as payloads that were just made."""
BLOCKS = [os.urandom(LARGE) for _ in range(CHUNK)]
CALLS, COUNT, SLOW_COUNT = len(PAYLOADS), 100_000, 20_000
SOURCE = (PAYLOADS * (COUNT // CALLS + 1))[:COUNT]
BATCH = 64 * KIB
FULL_COUNT, FULL_ROOM = 5_000, 64
"""Payloads, and how many of them a buffer holds that is full while its consumer is idle."""

Subject = Callable[[], float]
Made = TypeVar("Made", bound=Callable[..., Any])
GROUPS: dict[str, tuple[int, dict[str, Subject]]] = {}
"""By group: how many payloads go through, and the subjects by name."""
PACKAGES = {"opentelemetry": "opentelemetry.sdk", "kafka": "confluent_kafka", "janus": "janus"}
"""Subjects that need one."""


def subject(group: str, count: int, **more: Any) -> Callable[[Made], Made]:
    """Register a function, or a coroutine function, as a subject; for each name in ``more``, with that argument."""

    def register(function: Made) -> Made:
        call: Any = function
        if inspect.iscoroutinefunction(function):
            call = lambda *args: asyncio.run(function(*args))  # noqa: E731
        found: dict[str, Subject] = {name: partial(call, argument) for name, argument in more.items()}
        GROUPS.setdefault(group, (count, {}))[1].update(found or {function.__name__: call})
        return function

    return register


def roomy(**limits: Any) -> tempo.Dispatcher:
    """A dispatcher that takes all payloads; batches close by size."""
    return tempo.Dispatcher(**{"interval": 60, "max_batch_bytes": 320 * KIB, "max_buffered_bytes": 2 * MIB, **limits})


# Calls, on one thread.


def timed(call: Callable[[Any], object], source: Sequence[object] = PAYLOADS) -> float:
    """Return what calling it with each payload takes."""
    started = perf_counter()
    for payload in source:
        call(payload)
    return perf_counter() - started


def timed_refusals(call: Callable[[bytes], object], error: type[Exception]) -> float:
    """Return what calling it with each payload takes, when each call must raise."""
    count = 0
    started = perf_counter()
    for payload in PAYLOADS:
        try:
            call(payload)
        except error:
            count += 1
    seconds = perf_counter() - started
    assert count == CALLS
    return seconds


@subject("calls", CALLS)
def enqueue() -> float:
    """``enqueue``: payloads are counted and packed, and batches close."""
    dispatcher = roomy()
    seconds = timed(dispatcher.enqueue)
    assert sum(map(len, dispatcher.stop())) == CALLS
    return seconds


@subject("calls", CALLS)
def enqueue_many() -> float:
    """``enqueue_many`` of lists of 512."""
    dispatcher = roomy()
    seconds = timed(dispatcher.enqueue_many, [PAYLOADS[i : i + CHUNK] for i in range(0, CALLS, CHUNK)])
    assert sum(map(len, dispatcher.stop())) == CALLS
    return seconds


@subject("calls", CALLS)
def queue_put() -> float:
    """``queue.Queue.put``, unbounded."""
    target: queue.Queue[bytes] = queue.Queue()
    seconds = timed(target.put)
    assert target.qsize() == CALLS
    return seconds


@subject("calls", CALLS)
def refusal() -> float:
    """``enqueue`` into a full buffer: ``QueueFull`` each time."""
    dispatcher = roomy(max_buffered_bytes=SIZE)
    dispatcher.enqueue(PAYLOADS[0])
    seconds = timed_refusals(dispatcher.enqueue, tempo.QueueFull)
    dispatcher.stop()
    return seconds


@subject("calls", CALLS)
def queue_full() -> float:
    """``queue.Queue.put_nowait`` into a full queue: ``queue.Full`` each time."""
    target: queue.Queue[bytes] = queue.Queue(1)
    target.put(PAYLOADS[0])
    return timed_refusals(target.put_nowait, queue.Full)


def whole_way(
    put: Callable[[bytes], object], take: Callable[[], memoryview], source: Sequence[bytes] = PAYLOADS
) -> float:
    """512 payloads in, then taken as one packed batch, over and over."""
    last = memoryview(b"")
    started = perf_counter()
    for first in range(0, len(source), CHUNK):
        for payload in source[first : first + CHUNK]:
            put(payload)
        last = take()
    seconds = perf_counter() - started
    sent = source[-CHUNK:]  # not compared whole: a view is compared byte by byte
    assert (last.nbytes, bytes(last[-SIZE:])) == (sum(map(len, sent)), sent[-1][-SIZE:])
    return seconds


@subject("calls", CALLS)
def way() -> float:
    dispatcher = roomy(max_batch_bytes=CHUNK * SIZE)
    return whole_way(dispatcher.enqueue, lambda: dispatcher.get().data)


@subject("calls", CALLS, queue_way=queue.Queue, simple_queue_way=queue.SimpleQueue)
def queue_way(kind: Callable[[], Any]) -> float:
    """The whole way through a queue: put, get, join."""
    target = kind()
    return whole_way(target.put, lambda: memoryview(b"".join([target.get() for _ in range(CHUNK)])))


def large() -> float:
    """10 KiB payloads, 5 MiB of them, enqueued and taken as one batch; for ``instructions`` alone."""
    dispatcher = roomy(max_batch_bytes=5 * MIB, max_buffered_bytes=16 * MIB)
    return whole_way(dispatcher.enqueue, lambda: dispatcher.get().data, BLOCKS)


# From producers' threads to a consumer's: from the first call until the consumer has seen the last payload.


def in_threads(
    produce: Callable[[list[bytes]], object],
    finish: Callable[[], object],
    consume: Callable[[], int],
    count: int,
    producers: int,
) -> float:
    """Return the seconds until all have ended; ``consume`` returns how many bytes came."""
    share = SOURCE[: count // producers]
    with ThreadPoolExecutor(producers + 1) as pool:
        started = perf_counter()
        received = pool.submit(consume)
        for done in [pool.submit(produce, share) for _ in range(producers)]:
            done.result()
        finish()
        nbytes = received.result()
        seconds = perf_counter() - started
    assert nbytes == count * SIZE
    return seconds


@subject("threads", COUNT)
def handover(count: int = COUNT, producers: int = 1, **limits: Any) -> float:
    """tempo; a producer waits for room."""
    dispatcher = roomy(**{"interval": 0.01, "max_batch_bytes": BATCH, **limits})

    def produce(source: list[bytes]) -> None:
        enqueue = dispatcher.enqueue
        for payload in source:
            enqueue(payload, None)

    consume = partial(sum, (taken.data.nbytes for taken in dispatcher))
    return in_threads(produce, dispatcher.shutdown, consume, count, producers)


@subject("threads", COUNT, queue_batcher=queue.Queue, simple_queue_batcher=queue.SimpleQueue)
def batcher(kind: Callable[[], Any], count: int = COUNT, producers: int = 1) -> float:
    """The batcher that people write: a thread that takes from a queue until a batch is full or the queue is empty."""
    target = kind()

    def consume() -> int:
        get, get_nowait = target.get, target.get_nowait
        received, ended = 0, False
        while not ended:
            payload = get()
            parts, size = [], 0
            while payload is not None:
                parts.append(payload)
                size += len(payload)
                if size >= BATCH:
                    break
                try:
                    payload = get_nowait()
                except queue.Empty:
                    break
            else:
                ended = True
            received += len(b"".join(parts))
        return received

    return in_threads(partial(timed, target.put), partial(target.put, None), consume, count, producers)


PRODUCERS = (1, 2, 4, 8)
BATCHERS: dict[str, Callable[..., float]] = {
    "tempo": handover,
    "queue": partial(batcher, queue.Queue),
    "simple_queue": partial(batcher, queue.SimpleQueue),
}
GROUPS["producers"] = (
    COUNT,
    {f"{name}_{number}": partial(call, producers=number) for name, call in BATCHERS.items() for number in PRODUCERS},
)


# A buffer that is full long before its interval is over, and a consumer that waits; a bounded queue of the same size.
@subject("full", FULL_COUNT)
def full_buffer() -> float:
    return handover(FULL_COUNT, interval=0.05, max_buffered_bytes=FULL_ROOM * SIZE, max_batch_bytes=None)


@subject("full", FULL_COUNT)
def full_queue() -> float:
    return batcher(partial(queue.Queue, FULL_ROOM), FULL_COUNT)


def sent_by(send: Callable[[bytes], object], finish: Callable[[], object], received: list[int], each: int) -> float:
    """Return what it takes until a peer has sent SLOW_COUNT payloads and ``received`` has ``each`` for every one."""
    started = perf_counter()
    for payload in SOURCE[:SLOW_COUNT]:
        send(payload)
    finish()
    seconds = perf_counter() - started
    assert sum(received) == SLOW_COUNT * each, f"{sum(received)} of {SLOW_COUNT * each} received"
    return seconds


@subject("peers", SLOW_COUNT)
def queue_listener() -> float:
    """``logging.handlers.QueueListener``: records into a queue, a thread hands each to a handler."""
    received: list[int] = []

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            received.append(len(record.msg))

    target: queue.Queue[Any] = queue.Queue()
    listener = logging.handlers.QueueListener(target, Counting())
    handler = logging.handlers.QueueHandler(target)
    record = logging.LogRecord("soak", logging.INFO, __file__, 1, "x" * SIZE, None, None)
    listener.start()
    return sent_by(lambda _: handler.enqueue(record), listener.stop, received, SIZE)


@subject("peers", SLOW_COUNT)
def opentelemetry() -> float:
    """OpenTelemetry's ``BatchSpanProcessor`` with an exporter that counts."""
    trace = importlib.import_module("opentelemetry.sdk.trace")
    export = importlib.import_module("opentelemetry.sdk.trace.export")
    received: list[int] = []

    class Counting(export.SpanExporter):  # type: ignore[misc, name-defined]
        def export(self, spans: Any) -> Any:
            received.append(len(spans))
            return export.SpanExportResult.SUCCESS

    span = trace.TracerProvider().get_tracer("soak").start_span("event", attributes={"text": "x" * SIZE})
    span.end()
    processor = export.BatchSpanProcessor(Counting(), max_queue_size=SLOW_COUNT, max_export_batch_size=512)
    try:
        return sent_by(lambda _: processor.on_end(span), processor.force_flush, received, 1)
    finally:
        processor.shutdown()


@subject("peers", SLOW_COUNT)
def kafka() -> float:
    """confluent-kafka's producer, to librdkafka's test broker in this process, which stores nothing: at least that."""
    received: list[int] = []

    def delivered(error: Any, message: Any) -> None:
        assert error is None, error
        received.append(len(message.value()))

    settings = {"bootstrap.servers": "ignored.invalid:9092", "test.mock.num.brokers": 1, "linger.ms": 5, "log_level": 0}
    settings["queue.buffering.max.messages"] = 2 * SLOW_COUNT
    producer = importlib.import_module("confluent_kafka").Producer(settings)

    def send(payload: bytes) -> None:
        producer.produce("soak", payload, on_delivery=delivered)
        producer.poll(0)

    # The first delivery waits for the broker to come up and the topic to be made: not counted.
    send(PAYLOADS[0])
    producer.flush(PATIENCE)
    received.clear()
    return sent_by(send, partial(producer.flush, PATIENCE), received, SIZE)


# From one coroutine to another, in one event loop.


async def in_loop(produce: Awaitable[None], consume: Awaitable[int]) -> float:
    """Return what it takes until both have ended; ``consume`` returns how many bytes came."""
    started = perf_counter()
    _, received = await asyncio.gather(produce, consume)
    seconds = perf_counter() - started
    assert received == SLOW_COUNT * SIZE
    return seconds


@subject("coroutines", SLOW_COUNT)
async def coroutines() -> float:
    """tempo: ``aenqueue`` and ``async for``."""
    dispatcher = roomy(interval=0.01, max_batch_bytes=BATCH)

    async def produce() -> None:
        for payload in SOURCE[:SLOW_COUNT]:
            await dispatcher.aenqueue(payload)
        await dispatcher.ashutdown()

    async def consume() -> int:
        return sum([batch.data.nbytes async for batch in dispatcher])

    return await in_loop(produce(), consume())


@subject("coroutines", SLOW_COUNT, asyncio_queue="asyncio", janus="janus")
async def loop_queue(module: str) -> float:
    """A batcher on a bounded ``asyncio.Queue``, or on one that threads can use as well (janus)."""
    made = importlib.import_module(module).Queue(2 * MIB // SIZE)
    target = made if module == "asyncio" else made.async_q

    async def produce() -> None:
        for payload in SOURCE[:SLOW_COUNT]:
            await target.put(payload)

    async def consume() -> int:
        received = 0
        while received < SLOW_COUNT * SIZE:
            parts = [await target.get()]
            while not target.empty() and len(parts) < BATCH // SIZE:
                parts.append(target.get_nowait())
            received += len(b"".join(parts))
        return received

    return await in_loop(produce(), consume())


# The soak's load, and its producers without a dispatcher: seconds an event.

SETTINGS: dict[str, dict[str, int]] = {  # what is not the default of ``run``
    "soak_32": {},
    "soak_32k": {"max_batch_bytes": 32 * KIB, "max_buffered_bytes": 4 * MIB},
    "soak_1": {"producers": 1},
    "soak_256": {"producers": 256},
}
SOAKS = {name: config_from(argparse.Namespace(**settings), 1.0) for name, settings in SETTINGS.items()}


def soak(name: str, seconds: float) -> float:
    """The load of one second (or what --duration says), every event accounted for."""
    load = Load(SOAKS[name])
    outcome = drive(SOAKS[name], seconds, load)
    assert not outcome.problems, outcome.problems[0]
    assert load.delivered == sum(load.accepted) > 0
    assert not load.refused
    assert not sum(taken.out_of_order for taken in load.taken)
    return outcome.seconds / load.delivered


def bare(name: str, seconds: float) -> float:
    """What its producers reach with a list append in place of ``enqueue``."""
    return 1 / calibrate(SOAKS[name], seconds)


def main() -> None:
    import pyperf  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: PLC0415 - the subjects are used without it

    def hand_on(command: list[str], options: argparse.Namespace) -> None:
        command += ["--groups", ",".join(options.groups), "--duration", f"{options.duration * 1e9:.0f}ns"]

    module = ("-m", "soak.benchmarks")
    runner = pyperf.Runner(processes=1, values=3, warmups=1, loops=1, program_args=module, add_cmdline_args=hand_on)
    add = runner.argparser.add_argument
    add("--groups", type=names(*GROUPS, "soaks"), default="all", help=f"of {', '.join(GROUPS)}, soaks, or all")
    add("--duration", type=duration, default="1s", help="how long a soak lasts (%(default)s)")
    options = runner.parse_args()
    for group in options.groups:
        count, subjects = GROUPS.get(group, (1, {}))
        if group == "soaks":
            subjects = {name: partial(soak, name, options.duration) for name in SOAKS}
            subjects |= {f"{name}_bare": partial(bare, name, options.duration) for name in SOAKS}
        for name, call in sorted(subjects.items()):
            if available(name):
                runner.bench_time_func(name, lambda _, call=call: call(), inner_loops=count)
            elif not options.worker:
                print(f"{name} is left out: {PACKAGES[name]} is not installed", file=sys.stderr, flush=True)


def available(name: str) -> bool:
    """Return whether the package that a subject needs can be imported."""
    try:
        importlib.import_module(PACKAGES.get(name, "tempo"))
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    main()
