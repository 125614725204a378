# SPDX-License-Identifier: MIT
"""What practitioners reported of other batchers, each kept as a test with the value that is right.

The situations, numbered, and where each is tested: here if it needs no more than a program.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from urllib.parse import quote_from_bytes

import pytest

import tempo
from soak.tests.helpers import ENVIRONMENT, LIMIT, LONG, ROOT, Gate, make, run_python

HERE, SPECIFICATION = "soak/tests/test_field.py", "test_tempo.py"
RECIPES, WORLDS = "soak/tests/test_recipes.py", "soak/tests/test_worlds.py"
TESTS = {
    1: (SPECIFICATION, "full_buffer_is_due_where_a_payload_waits_or_was_refused"),
    2: (HERE, "500_coroutines_wait_for_room_while_the_consumer_needs_the_default_executor"),
    3: (WORLDS, "uwsgi_delivers_what_each_worker_accepted"),
    4: (HERE, "what_is_not_delivered_at_exit_is_told"),
    5: (HERE, "a_blocking_with_in_an_event_loop_raises_and_names_what_to_use"),
    6: (SPECIFICATION, "handler_that_returns_an_awaitable_has_failed"),
    7: (SPECIFICATION, "handler_that_raises_fails_its_batch_is_reported_and_goes_on"),
    8: (RECIPES, "the_executor_recipe_sends_all_before_the_executor_is_closed"),
    9: (RECIPES, "requests_are_within_every_limit_of_the_service"),
    10: (SPECIFICATION, "with_left_by_an_exception_waits_exit_timeout_at_most"),
    11: (HERE, "started_dispatchers_that_are_dropped_live_until_shutdown_as_documented"),
    12: (RECIPES, "the_celery_recipe_drains_each_process_of_the_pool"),
    13: (SPECIFICATION, "refusal_by_a_full_buffer_takes_no_lock"),
    14: (SPECIFICATION, "clock_that_is_frozen_or_jumps_stops_no_interval"),
    15: (RECIPES, "a_logging_handlers_flush_delivers_each_record_as_it_was_when_it_was_logged"),
    16: (HERE, "what_a_drain_leaves_names_what_the_handler_still_has"),
    17: (RECIPES, "retries_are_in_order_and_what_is_given_up_goes_to_the_dead_letter"),
    18: (WORLDS, "sub_interpreters_have_pull_mode_and_push_mode_where_threads_are_allowed"),
    19: (HERE, "the_installed_wheel_does_not_claim_to_be_typed"),
    20: (HERE, "clients_that_want_bytes_get_them_by_tolist_as_documented"),
    21: (HERE, "the_threads_of_two_handlers_can_be_told_apart"),
    22: (RECIPES, "the_sigterm_recipe_delivers_all_through_a_second_sigterm"),
    23: (SPECIFICATION, "task_in_wait_for_loses_no_batch_at_a_timeout"),
    24: (WORLDS, "green_threads_patched_before_or_after_the_import"),
    25: (HERE, "batches_go_through_a_process_pool"),
    26: (SPECIFICATION, "task_in_a_loop_that_no_longer_runs_holds_up_nobody"),
    27: (HERE, "a_process_that_was_stopped_for_a_while_goes_on"),
}


@pytest.mark.parametrize("number", range(1, 28))
def test_each_situation_is_a_test(number: int) -> None:
    file, name = TESTS[number]
    assert re.search(rf"(?m)^def test_{name}\(", (ROOT / file).read_text(encoding="utf-8")), f"{file}: no {name}"


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


def test_a_blocking_with_in_an_event_loop_raises_and_names_what_to_use() -> None:
    """a2aproject/a2a-python#720: it would block the loop that its own consumer needs, for ever."""

    async def main() -> None:
        with pytest.raises(RuntimeError, match="ashutdown"), make() as d:
            d.enqueue(b"x")
        d.stop()

    asyncio.run(main())


def test_started_dispatchers_that_are_dropped_live_until_shutdown_as_documented() -> None:
    """mem0ai/mem0#3376: 500 dropped, 501 threads. To end them would lose what they have accepted."""
    program = f"""
import gc, os, tempo, threading
for _ in range(20):
    d = tempo.Dispatcher(interval={LONG}, max_buffered_bytes=100)
    d.start(lambda batch: os.write(1, batch.data))
    d.enqueue(b"accepted,")
del d
gc.collect()
print(threading.active_count(), flush=True)
"""
    assert run_python("-c", program).stdout == "21\n" + "accepted," * 20
    assert "lives until `shutdown`" in str(tempo.Dispatcher.start.__doc__)


def test_what_a_drain_leaves_names_what_the_handler_still_has() -> None:
    """aio-libs/aiokafka#1101: "0 batches undelivered", while the sink hung with one."""
    gate, d = Gate(), make(interval=0.001)
    d.start(gate)
    d.enqueue(b"1")
    assert gate.entered.wait(LIMIT)
    with pytest.raises(tempo.DrainTimeout, match=r"1 payloads? still with the handler"):
        d.shutdown(timeout=0.01)
    gate.leave.set()


def test_the_installed_wheel_does_not_claim_to_be_typed() -> None:
    """launchdarkly/python-server-sdk#165: to a type checker an installed single module is untyped."""
    assert "Typing ::" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_clients_that_want_bytes_get_them_by_tolist_as_documented() -> None:
    """boto/boto3#3423: a client that rejects views."""
    d = make()
    d.enqueue_many([b"a b", b"c d"])
    (batch,) = d.stop()
    with pytest.raises(TypeError):
        quote_from_bytes(batch[0])  # type: ignore[arg-type]
    assert [quote_from_bytes(payload) for payload in batch.tolist()] == ["a%20b", "c%20d"]
    assert "tolist()" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert memoryview(batch[0].obj).nbytes == batch.nbytes  # and a view keeps its whole batch


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
