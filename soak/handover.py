# SPDX-License-Identifier: MIT
"""From a producer's thread to a consumer's: tempo beside hand-rolled batchers and the batchers of well-known packages.

Each subject hands over COUNT payloads of 163 bytes and returns seconds per payload, from the first one until the
consumer's side has seen the last. What the packages do with a payload differs (a span has attributes, a record is
formatted, Kafka has a protocol), so these figures show what a user of each pays, not who is cleverer.
"""

from __future__ import annotations

import importlib
import logging
import logging.handlers
import queue
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

import tempo
from soak.crew import PATIENCE, join
from soak.micro import PAYLOADS, SIZE, Subject
from soak.units import KIB, MIB

COUNT = 100_000
SOURCE = (PAYLOADS * (COUNT // len(PAYLOADS) + 1))[:COUNT]
SLOW_COUNT = 20_000
"""For packages that take some microseconds a payload."""
BATCH = 64 * KIB


def _timed(produce: Callable[[], object], consume: Callable[[], object]) -> float:
    """Run the consumer on a thread of its own, and the producer on another; return the seconds until both end."""
    threads = [threading.Thread(target=work, daemon=True) for work in (consume, produce)]
    started = perf_counter()
    for thread in threads:
        thread.start()
    late = join(threads, PATIENCE)
    seconds = perf_counter() - started
    assert not late, f"{late[0]} did not end within {PATIENCE:.0f} s"
    return seconds


Lines = Callable[[list[bytes]], object]
"""Takes a batch as the list of its payloads."""
Data = Callable[[memoryview], object]
"""Takes a batch as one buffer."""


def tempo_handover(lines: Lines | None = None, data: Data | None = None) -> float:
    """tempo, in a buffer of 2 MiB, the producer waiting for room; lines or data: where each batch goes."""
    dispatcher = tempo.Dispatcher(interval=0.01, max_batch_bytes=BATCH, max_buffered_bytes=2 * MIB)
    received = [0]

    def produce() -> None:
        enqueue = dispatcher.enqueue
        for payload in SOURCE:
            enqueue(payload, timeout=None)
        dispatcher.shutdown()

    def consume() -> None:
        for batch in dispatcher:
            received[0] += batch.data.nbytes
            if lines is not None:
                lines(batch.tolist())
            elif data is not None:
                data(batch.data)

    seconds = _timed(produce, consume)
    assert received[0] == COUNT * SIZE
    return seconds / COUNT


def _batcher(target: Any, lines: Lines | None = None, data: Data | None = None) -> float:
    """The batcher that people write: a thread that takes from a queue until a batch is full or the queue is empty."""
    received = [0]

    def produce() -> None:
        put = target.put
        for payload in SOURCE:
            put(payload)
        put(None)

    def consume() -> None:
        get, get_nowait = target.get, target.get_nowait
        ended = False
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
            received[0] += size
            if lines is not None:
                lines(parts)
                continue
            joined = b"".join(parts)
            if data is not None:
                data(memoryview(joined))

    seconds = _timed(produce, consume)
    assert received[0] == COUNT * SIZE
    return seconds / COUNT


def simple_queue_batcher() -> float:
    """A hand-rolled batcher on ``queue.SimpleQueue``, unbounded."""
    return _batcher(queue.SimpleQueue())


def queue_batcher(lines: Lines | None = None, data: Data | None = None) -> float:
    """A hand-rolled batcher on ``queue.Queue``, unbounded."""
    return _batcher(queue.Queue(), lines, data)


def queue_listener() -> float:
    """``logging.handlers.QueueListener``: records into a queue, a thread hands each to a handler."""
    count = SLOW_COUNT
    received = [0]

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            received[0] += len(record.msg)

    target: queue.Queue[Any] = queue.Queue()
    listener = logging.handlers.QueueListener(target, Counting())
    handler = logging.handlers.QueueHandler(target)
    text = "x" * SIZE
    record = logging.LogRecord("soak", logging.INFO, __file__, 1, text, None, None)
    listener.start()
    started = perf_counter()
    for _ in range(count):
        handler.enqueue(record)
    listener.stop()
    seconds = perf_counter() - started
    assert received[0] == count * SIZE
    return seconds / count


def opentelemetry_batch_span_processor() -> Subject:
    """OpenTelemetry's ``BatchSpanProcessor`` with an exporter that counts. Raises ImportError when not installed."""
    trace = importlib.import_module("opentelemetry.sdk.trace")
    export = importlib.import_module("opentelemetry.sdk.trace.export")

    def measure() -> float:
        count = SLOW_COUNT
        received = [0]

        class Counting(export.SpanExporter):  # type: ignore[misc, name-defined]
            def export(self, spans: Any) -> Any:
                received[0] += len(spans)
                return export.SpanExportResult.SUCCESS

        span: Any = trace.TracerProvider().get_tracer("soak").start_span("event", attributes={"text": "x" * SIZE})
        span.end()
        processor = export.BatchSpanProcessor(Counting(), max_queue_size=count, max_export_batch_size=512)
        started = perf_counter()
        for _ in range(count):
            processor.on_end(span)
        processor.force_flush()
        seconds = perf_counter() - started
        processor.shutdown()
        assert received[0] == count, f"{received[0]} of {count} spans exported"
        return seconds / count

    return measure


def kafka_producer() -> Subject:
    """confluent-kafka's producer, to the test broker that librdkafka runs inside this very process.

    That broker stores nothing and no network is crossed: it bounds what Kafka costs from below. Raises ImportError when
    the package is not installed.
    """
    kafka = importlib.import_module("confluent_kafka")

    def measure() -> float:
        count = SLOW_COUNT
        received = [0]

        def delivered(error: Any, message: Any) -> None:
            assert error is None, error
            received[0] += len(message.value())

        producer = kafka.Producer(
            {
                "bootstrap.servers": "ignored.invalid:9092",
                "test.mock.num.brokers": 1,
                "queue.buffering.max.messages": 2 * count,
                "linger.ms": 5,
                "log_level": 0,
            }
        )
        # The first delivery waits for the broker to come up and the topic to be made: not counted.
        producer.produce("soak", PAYLOADS[0], on_delivery=delivered)
        producer.flush(PATIENCE)
        received[0] = 0
        started = perf_counter()
        for payload in SOURCE[:count]:
            producer.produce("soak", payload, on_delivery=delivered)
            producer.poll(0)
        producer.flush(PATIENCE)
        seconds = perf_counter() - started
        assert received[0] == count * SIZE, f"{received[0]} of {count * SIZE} bytes delivered"
        return seconds / count

    return measure


def subjects() -> dict[str, Subject]:
    """Those that need nothing but the standard library."""
    return {
        "handover": tempo_handover,
        "simple_queue_batcher": simple_queue_batcher,
        "queue_batcher": queue_batcher,
        "queue_listener": queue_listener,
    }


PEERS: dict[str, tuple[str, Callable[[], Subject]]] = {
    "opentelemetry": ("opentelemetry-sdk", opentelemetry_batch_span_processor),
    "kafka": ("confluent-kafka", kafka_producer),
}
"""Subjects that need a package: its name on PyPI, and what makes the subject."""
