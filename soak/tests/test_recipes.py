# SPDX-License-Identifier: MIT
"""The recipes: each does what it says, on the real thing."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib
import logging
import random
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tempo
from soak.recipes import asyncio_pipeline, executor_sink, record_limits, when_full
from soak.recipes.logging_handler import BatchHandler
from soak.sinks import servers
from soak.tests.helpers import (
    LIMIT,
    LONG,
    ROOT,
    Child,
    Gate,
    OnTerminal,
    Worker,
    ask,
    batch_of,
    find_uwsgi,
    make,
    run_python,
    served,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("no_thread_left")


def printed(text: str) -> list[bytes]:
    """The payloads of the batches that a recipe printed, wherever they stand."""
    return [payload for batch in re.findall(r"\[b'[^]]*\]", text) for payload in ast.literal_eval(batch)]


def payloads(batches: list[tempo.Batch]) -> list[bytes]:
    return [payload for batch in batches for payload in batch.tolist()]


# logging.


@contextlib.contextmanager
def logger(send: Callable[[tempo.Batch], Any], **limits: Any) -> Iterator[tuple[logging.Logger, BatchHandler]]:
    """A logger that ships by the handler of the recipe."""
    handler = BatchHandler(send, **{"interval": LONG, "max_buffered_bytes": tempo.MiB, **limits})
    log = logging.Logger("app")
    log.addHandler(handler)
    try:
        yield log, handler
    finally:
        handler.close()


def test_a_logging_handlers_flush_delivers_each_record_as_it_was_when_it_was_logged() -> None:
    came: list[bytes] = []
    with logger(lambda batch: came.extend(batch.tolist())) as (log, handler):
        changing = [1]
        log.error("%s", changing)
        changing.append(2)
        for worker in [Worker(log.error, "from thread %d", i) for i in range(8)]:
            worker.result()
        handler.flush()
        assert came[0] == b"[1]"
        assert sorted(came[1:]) == [b"from thread %d" % i for i in range(8)]


def test_a_logging_handler_drops_and_counts_what_finds_no_room_and_what_comes_after_the_end() -> None:
    gate = Gate()
    with logger(gate, max_buffered_bytes=6, max_batch_bytes=3) as (log, handler):
        log.error("in")
        flushing = Worker(handler.flush)
        assert gate.entered.wait(LIMIT)
        for i in range(3):
            log.error("%03d", i)
        gate.leave.set()
        flushing.result()
    log.error("too late")
    assert gate.came == [b"in", b"000", b"001"]
    assert handler.dispatcher.stats().rejected == 2


def test_a_logging_handler_goes_on_when_a_record_cannot_be_formatted_and_when_sending_logs(capsys: Any) -> None:
    came: list[bytes] = []

    def send(batch: tempo.Batch) -> None:
        came.extend(batch.tolist())
        log.error("sent %d", len(batch))

    with logger(send) as (log, handler):
        log.error("%d", "no number")
        log.error("on")
        handler.acquire()  # as logging.shutdown() does
        handler.flush()
        handler.release()
        assert came == [b"on"]
    assert "no number" in capsys.readouterr().err


# Web servers, and Celery.


def as_module(name: str, folder: Path, *changes: tuple[str, str]) -> None:
    """Copy a recipe as app_module.py, with an interval that does not end before the program does."""
    source = (ROOT / "soak" / "recipes" / f"{name}.py").read_text(encoding="utf-8")
    for old, new in (("interval=0.25", "interval=3600"), *changes):
        source, found = re.subn(old, new, source)
        assert found == 1, old
    (folder / "app_module.py").write_text(source, encoding="utf-8")


def delivered(server: Child) -> list[bytes]:
    """End a server; return what it delivered."""
    ended = server.end(signal.SIGTERM)
    assert "Traceback" not in ended.err, ended.err
    return printed(ended.out + ended.err)  # uWSGI and Celery turn the one into the other


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
def test_the_asgi_recipe_drains_when_uvicorn_ends_and_answers_503_without_room(framework: str, tmp_path: Path) -> None:
    for package in ("uvicorn", "starlette", framework):
        pytest.importorskip(package)
    app = 'import fastapi\n\napp = fastapi.FastAPI(lifespan=lifespan)\napp.post("/track")(track)\n'
    limits = ("max_buffered_bytes=4 \\* tempo.MiB", "max_buffered_bytes=100, max_batch_bytes=None")
    as_module("asgi_app", tmp_path, limits, *([("(?m)^app = .*$", app)] if framework == "fastapi" else []))
    command = (sys.executable, "-m", "uvicorn", "--fd", "{fd}", "--no-access-log", "app_module:app")
    with served(tmp_path, *command) as (server, port):
        assert [ask(port, "/track", b"event %d" % i)[0] for i in range(10)] == [202] * 10
        assert ask(port, "/track", bytes(50))[0] == 503
        assert delivered(server) == [b"event %d" % i for i in range(10)]


@pytest.mark.slow
@pytest.mark.parametrize("server_name", ["sync", "gthread --preload", "gevent --preload", "gevent", "uwsgi"])
def test_the_wsgi_recipe_drains_each_worker(tmp_path: Path, server_name: str) -> None:
    kind, *preload = server_name.split()
    as_module("wsgi_app", tmp_path)
    stats = servers.free_port()
    if kind == "uwsgi":
        flags = "--master --processes 2 --enable-threads --py-call-uwsgi-fork-hooks --die-on-term --need-app"
        options = f"--http-socket fd://{{fd}} {flags} --module app_module:app --stats 127.0.0.1:{stats} --stats-http"
        command = [find_uwsgi(), *options.split()]
    else:
        for package in ("gunicorn", "gevent")[: 1 + (kind == "gevent")]:
            pytest.importorskip(package)
        options = f"--bind fd://{{fd}} --workers 2 --threads 2 --worker-class {kind}"
        command = [sys.executable, "-m", "gunicorn", *options.split(), *preload, "app_module:app"]
    # A worker that is told to end while it is still being set up may not hear it; a busy one of uWSGI does not drain.
    hook = "import os\ndef post_worker_init(worker):\n    open(f'{os.getpid()}.ready', 'w').close()\n"
    (tmp_path / "gunicorn.conf.py").write_text(hook, encoding="utf-8")
    with served(tmp_path, *command) as (server, port):
        clients = [Worker(ask, port, f"/event-{i:02d}") for i in range(40)]
        assert [client.result()[0] for client in clients] == [202] * 40
        if kind == "uwsgi":
            wait_until(lambda: ask(stats, "/")[1].count('"status":"idle"') == 2, "both workers' rest")
        else:
            wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == 2, "both workers")
        assert sorted(delivered(server)) == [b"/event-%02d" % i for i in range(40)]


@pytest.mark.slow
def test_the_celery_recipe_drains_each_process_of_the_pool(tmp_path: Path) -> None:
    pytest.importorskip("celery")
    (tmp_path / "queue").mkdir()
    folders = dict.fromkeys(("data_folder_in", "data_folder_out", "control_folder"), "queue")
    broker = f'"filesystem://"\n)\napp.conf.update(broker_transport_options={folders}'
    done = "timeout=1.0)\n    open(f'done.{number}', 'w').close()"
    as_module("celery_app", tmp_path, (r'os.environ.get\("BROKER", "amqp://"\)', broker), (r"timeout=1.0\)", done))
    send = "from app_module import work\nfor number in range(20): work.delay(number)"
    assert run_python("-c", send, cwd=tmp_path).returncode == 0
    options = "--app app_module worker --pool prefork --concurrency 2 --without-gossip --without-mingle"
    with Child(tmp_path, sys.executable, "-m", "celery", *options.split()) as worker:
        wait_until(lambda: len(list(tmp_path.glob("done.*"))) == 20 or worker.process.poll() is not None, "every task")
        assert sorted(delivered(worker)) == sorted(b"task %d" % i for i in range(20))


# asyncio, executors, SIGTERM.


def test_the_asyncio_recipe_delivers_all_in_order_through_a_small_buffer() -> None:
    came: list[bytes] = []

    async def source(name: int) -> AsyncIterator[bytes]:
        for i in range(100):
            yield b"%d-%02d" % (name, i)

    async def send(batch: tempo.Batch) -> None:
        await asyncio.sleep(0)
        came.extend(batch.tolist())

    pipeline = asyncio_pipeline.pipeline([source(name) for name in range(5)], send, make(max_buffered_bytes=30))
    asyncio.run(asyncio.wait_for(pipeline, LIMIT))
    assert sorted(came, key=lambda payload: payload[:1]) == [b"%d-%02d" % (i // 100, i % 100) for i in range(500)]


def test_the_executor_recipe_sends_all_before_the_executor_is_closed() -> None:
    came: list[bytes] = []
    with executor_sink.pooled(came.append, interval=LONG, max_buffered_bytes=tempo.MiB) as d:
        d.enqueue_many([b"%d" % i for i in range(100)])
    assert sorted(came) == sorted(b"%d" % i for i in range(100))


SERVICE = """
import time, tempo
from soak.recipes import sigterm

def send(batch):
    print(batch.tolist(), flush=True)
    time.sleep(0.02)

sigterm.install()
d = tempo.Dispatcher(interval=60, max_batch_bytes=1, max_buffered_bytes=1000)
d.start(send, exit_timeout=30.0)
for i in range(50):
    d.enqueue(b"%02d" % i)
print("ready", flush=True)
time.sleep(600)
"""


def test_the_sigterm_recipe_delivers_all_through_a_second_sigterm() -> None:
    with OnTerminal("-c", SERVICE) as service:
        for words in ("ready", "[b'10']"):
            service.read_until(words)
            service.interrupt(signal.SIGTERM)
        assert service.exit_code() == 0, service.text
    assert printed(service.text) == [b"%02d" % i for i in range(50)]


# Limits of a request.

LIMITS = {name: getattr(record_limits, name) for name in ("KINESIS", "CLOUDWATCH", "SQS", "UDP")}


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(LIMITS)), st.randoms(use_true_random=False))
def test_requests_are_within_every_limit_of_the_service(name: str, dice: random.Random) -> None:
    limits = LIMITS[name]
    sizes = [0, 1, limits.framing, limits.largest // 3, limits.largest - 1, limits.largest]
    sent = [bytes(dice.choice(sizes[: dice.choice([2, 6])])) for _ in range(dice.randrange(2 * limits.records + 2))]
    sent = sent[: 40 * tempo.MiB // (1 + max(map(len, sent), default=0))]
    found = list(record_limits.requests(sent, limits))
    assert [payload for request in found for payload in request] == sent
    for request, following in zip(found, [*found[1:], None]):
        nbytes = sum(map(len, request)) + limits.framing * len(request)
        assert 0 < len(request) <= limits.records and nbytes <= limits.nbytes
        if following is not None:  # and no request is closed early
            full = len(request) == limits.records or nbytes + len(following[0]) + limits.framing > limits.nbytes
            assert full


@pytest.mark.parametrize("name", LIMITS)
def test_a_dispatcher_for_a_service_makes_requests_and_what_never_fits_is_refused(name: str) -> None:
    limits = LIMITS[name]
    largest, larger = bytes(limits.largest), bytes(limits.largest + 1)
    assert record_limits.fits(largest, limits) and len(list(record_limits.requests([largest], limits))) == 1
    assert not record_limits.fits(larger, limits)
    with pytest.raises(ValueError, match="is over Limits"):
        list(record_limits.requests([larger], limits))
    d = record_limits.dispatcher(limits, interval=LONG, max_buffered_bytes=16 * tempo.MiB)
    d.enqueue_many([bytes(max(64, limits.framing))] * 25_000)
    batches = d.stop()
    assert len(batches) > 1
    assert all(len(list(record_limits.requests(batch.tolist(), limits))) == 1 for batch in batches)


def test_lines_are_made_datagrams_that_need_no_fragments() -> None:
    lines = [b"metric.%d:%d|c" % (i % 7, i) for i in range(1000)]
    datagrams = list(record_limits.datagrams(batch_of(*lines)))
    assert max(map(len, datagrams)) <= 1432 and len(datagrams) < 20
    assert b"\n".join(datagrams).split(b"\n") == lines


# Full buffers.


def test_drop_oldest_keeps_the_newest_and_counts_what_it_drops() -> None:
    d = make(max_buffered_bytes=100, max_batch_bytes=10)
    recipe = when_full.DropOldest(d)
    for i in range(1000):
        recipe.enqueue(b"%05d" % i)
    kept = payloads(d.stop())
    assert kept == [b"%05d" % i for i in range(1000 - len(kept), 1000)]
    assert 18 <= len(kept) <= 20 and recipe.dropped == 1000 - len(kept)
    with pytest.raises(tempo.Stopped):
        recipe.enqueue(b"late")


def test_sample_lets_one_in_so_many_wait_and_counts_the_others() -> None:
    d = make(max_buffered_bytes=10)
    recipe = when_full.Sample(d, every=5, timeout=LIMIT)
    assert recipe.enqueue(bytes(10))
    first = Worker(recipe.enqueue, b"waits")
    wait_until(lambda: d.stats().waiting_producers == 1)
    assert [recipe.enqueue(b"%d" % i) for i in range(4)] == [False] * 4
    d.get()
    assert first.result() is True
    assert (recipe.dropped, payloads(d.stop())) == (4, [b"waits"])


# Retries.


@pytest.mark.parametrize(
    ("outcomes", "tries", "given_up"),
    [
        ([OSError, OSError, OSError, None, None], [b"1"] * 4 + [b"2"], []),
        ([ValueError, None], [b"1", b"2"], [b"1"]),
        (OSError, None, [b"1", b"2"]),
    ],
    ids=["until it succeeds", "not what cannot be mended", "not for ever"],
)
def test_retries_are_in_order_and_what_is_given_up_goes_to_the_dead_letter(
    outcomes: Any, tries: list[bytes] | None, given_up: list[bytes], capsys: Any
) -> None:
    pytest.importorskip("tenacity")
    recipe = importlib.import_module("soak.recipes.retry")
    sent: list[bytes] = []
    letters: list[bytes] = []
    fate = mock.Mock(side_effect=outcomes)

    def send(batch: tempo.Batch) -> None:
        sent.extend(batch.tolist())
        fate()

    letter = lambda exc, batch: letters.extend(batch.tolist())  # noqa: E731
    delivery = recipe.Delivery(send, letter, patience=0.05, longest_pause=0.002)
    with make(max_batch_bytes=1) as d:
        d.start(delivery.deliver, on_error=delivery.give_up)
        d.enqueue_many([b"1", b"2"])
        assert d.flush(LIMIT)
    assert letters == given_up
    assert sent == (tries or sorted(sent))
    assert len(capsys.readouterr().err.splitlines()) == bool(given_up)  # one line, however many batches


# Metrics, and Kafka.


def test_stats_are_prometheus_metrics() -> None:
    prometheus = pytest.importorskip("prometheus_client")
    recipe = importlib.import_module("soak.recipes.metrics")
    d, registry = make(), prometheus.CollectorRegistry()
    registry.register(recipe.PrometheusCollector({"clicks": d}))
    d.enqueue_many([b"123", b"4"])
    text = prometheus.generate_latest(registry).decode()
    assert 'tempo_accepted_total{dispatcher="clicks"} 2.0' in text
    assert 'tempo_buffered_bytes{dispatcher="clicks"} 4.0' in text
    d.stop()


def test_stats_are_opentelemetry_metrics() -> None:
    metrics = pytest.importorskip("opentelemetry.sdk.metrics")
    reader = importlib.import_module("opentelemetry.sdk.metrics.export").InMemoryMetricReader()
    recipe = importlib.import_module("soak.recipes.metrics")
    d, provider = make(), metrics.MeterProvider([reader])
    recipe.observe(provider.get_meter("app"), "clicks", d)
    d.enqueue_many([b"123", b"4"])
    (resource,) = reader.get_metrics_data().resource_metrics
    found = {metric.name: metric.data.data_points[0] for scope in resource.scope_metrics for metric in scope.metrics}
    assert (found["tempo.accepted"].value, found["tempo.buffered_bytes"].value) == (2, 4)
    assert dict(found["tempo.buffered"].attributes) == {"dispatcher": "clicks"}
    provider.shutdown()
    d.stop()


@pytest.mark.slow
def test_the_kafka_sink_returns_when_the_broker_has_all_and_raises_when_it_has_not() -> None:
    kafka = pytest.importorskip("confluent_kafka")
    recipe = importlib.import_module("soak.recipes.kafka_sink")
    local = {"bootstrap.servers": "ignored.invalid:9092", "test.mock.num.brokers": 1, "log_level": 0}
    few = {"queue.buffering.max.messages": 10}  # fewer than a batch has
    producer = kafka.Producer({**local, **few, "enable.idempotence": True})
    events = [b"event %d" % i for i in range(100)]
    recipe.KafkaSink(producer, "events").deliver(batch_of(*events))
    (broker,) = producer.list_topics(timeout=10).brokers.values()
    address = f"{broker.host}:{broker.port}"
    consumer = kafka.Consumer({"bootstrap.servers": address, "group.id": "check", "log_level": 0})
    partitions = producer.list_topics("events", timeout=10).topics["events"].partitions
    consumer.assign([kafka.TopicPartition("events", number, kafka.OFFSET_BEGINNING) for number in partitions])
    came = [consumer.poll(LIMIT).value() for _ in events]
    consumer.close()
    assert sorted(came) == sorted(events)

    nobody = kafka.Producer({"bootstrap.servers": "127.0.0.1:9", "log_level": 0, "message.timeout.ms": 100})
    with pytest.raises(Exception, match="Kafka has not all of 1 events"):
        recipe.KafkaSink(nobody, "events").deliver(batch_of(b"event"))
