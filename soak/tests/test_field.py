# SPDX-License-Identifier: MIT
"""What practitioners reported of other batchers, as it happened to them: the situations that need a whole program.

Those of one call are in test_tempo.py (a full buffer with an idle consumer, coroutine handlers, frozen clocks, with
left by an exception, coroutines whose loop is gone); forks, sub-interpreters and green threads in test_worlds.py;
limits of records, Celery, uWSGI, a second SIGTERM, `handler.flush()`, executors at exit and a traceback a batch in
test_recipes.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

import tempo
from soak.tests.helpers import ENVIRONMENT, LIMIT, LONG, make, run_python


def test_500_coroutines_wait_for_room_while_the_consumer_needs_the_default_executor() -> None:
    """python/cpython#112169: threads that wait for room fill the executor, and the consumer never gets one."""

    async def main() -> int:
        d = make(interval=0.001, max_buffered_bytes=100)
        received = 0

        async def consume() -> None:
            nonlocal received
            async for batch in d:
                received += await asyncio.to_thread(len, batch)

        consumer = asyncio.create_task(consume())
        await asyncio.gather(*(d.aenqueue(b"%09d" % i) for i in range(500)))
        await d.ashutdown()
        await consumer
        return received

    assert asyncio.run(asyncio.wait_for(main(), LIMIT)) == 500


def test_a_blocking_with_in_an_event_loop_raises_and_names_what_to_use() -> None:
    """a2aproject/a2a-python#720: it would block the loop that its own consumer needs, for ever."""

    async def main() -> None:
        with pytest.raises(RuntimeError, match="ashutdown"), make() as d:
            d.enqueue(b"x")
        d.stop()

    asyncio.run(main())


def test_the_threads_of_two_handlers_can_be_told_apart() -> None:
    """open-telemetry/opentelemetry-python PR #2186."""

    def ship_clicks(batch: tempo.Batch) -> None:
        """A handler."""

    with make() as d:
        d.start(ship_clicks)
        assert any("ship_clicks" in thread.name for thread in threading.enumerate())


def test_batches_go_through_a_process_pool() -> None:
    """python/cpython#79492: a memoryview cannot be pickled."""
    d = make(max_batch_bytes=10)
    d.enqueue_many([b"%05d" % i for i in range(10)])
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = list(pool.map(tempo.Batch.tolist, d.stop()))
    assert [payload for batch in found for payload in batch] == [b"%05d" % i for i in range(10)]


def test_what_a_drain_leaves_names_what_the_handler_still_has() -> None:
    """aio-libs/aiokafka#1101: "0 batches undelivered", while the sink hung with one."""
    entered, leave = threading.Event(), threading.Event()

    def send(batch: tempo.Batch) -> None:
        entered.set()
        leave.wait(LIMIT)

    d = make(interval=0.001)
    d.start(send)
    d.enqueue(b"1")
    assert entered.wait(LIMIT)
    with pytest.raises(tempo.DrainTimeout, match=r"1 payloads? still with the handler"):
        d.shutdown(timeout=0.01)
    leave.set()


def test_what_is_not_delivered_at_exit_is_told() -> None:
    """googleapis/python-logging#3: 190 of 200 lost without a word, exit code 0."""
    program = f"""
import tempo, time
d = tempo.Dispatcher(interval={LONG}, max_batch_bytes=1, max_buffered_bytes=1000)
d.start(lambda batch: time.sleep(60), exit_timeout=0.1)
d.enqueue_many([b"1"] * 10)
"""
    (line,) = run_python("-c", program).stderr.splitlines()
    assert "9 payloads" in line or "10 payloads" in line


STOPPED = """
import sys, tempo
d = tempo.Dispatcher(interval=0.01, max_buffered_bytes=100)
d.start(lambda batch: print(*[payload.decode() for payload in batch.tolist()], flush=True))
for line in sys.stdin.buffer:
    d.enqueue(line.strip(), timeout=30)
d.shutdown(30)
"""


def test_a_process_that_was_stopped_for_a_while_goes_on() -> None:
    """twisted/twisted#2424: timers that are overdue after SIGCONT."""
    command = [sys.executable, "-c", STOPPED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"".join(b"%d\n" % i for i in range(100)))
        process.stdin.flush()
        assert process.stdout.read(1)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.5)  # many intervals
        os.kill(process.pid, signal.SIGCONT)
        process.stdin.write(b"".join(b"%d\n" % i for i in range(100, 200)))
        process.stdin.close()
        text = b"0" + process.stdout.read()
        assert process.wait(LIMIT) == 0
    assert [int(number) for number in text.split()] == list(range(200))
