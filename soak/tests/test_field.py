# SPDX-License-Identifier: MIT
"""What practitioners reported of other batchers, each kept as a test with the value that is right.

The situations, numbered, and where each is tested: here if no other test has it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from urllib.parse import quote_from_bytes

import pytest

from soak.tests.helpers import ENVIRONMENT, LIMIT, ROOT, make

HERE, SPECIFICATION = "soak/tests/test_field.py", "test_tempo.py"
RECIPES, WORLDS = "soak/tests/test_recipes.py", "soak/tests/test_worlds.py"
TESTS = {
    1: (SPECIFICATION, "full_buffer_is_due_where_a_payload_waits_or_was_refused"),
    2: (SPECIFICATION, "aenqueue_waits_without_a_thread_and_cancelled_leaves_nothing_behind"),
    3: (WORLDS, "uwsgi_delivers_what_each_worker_accepted"),
    4: (SPECIFICATION, "exit"),
    5: (SPECIFICATION, "shutdown_that_would_block_its_own_event_loop_for_ever_is_refused"),
    6: (SPECIFICATION, "handler_that_returns_an_awaitable_has_failed"),
    7: (SPECIFICATION, "handler_that_raises_fails_its_batch_is_reported_and_goes_on"),
    8: (RECIPES, "the_executor_recipe_sends_all_before_the_executor_is_closed"),
    9: (RECIPES, "requests_are_within_every_limit_of_the_service"),
    10: (SPECIFICATION, "with_left_by_an_exception_waits_exit_timeout_at_most"),
    11: (SPECIFICATION, "exit"),
    12: (RECIPES, "the_celery_recipe_drains_each_process_of_the_pool"),
    13: (SPECIFICATION, "refusal_by_a_full_buffer_takes_no_lock"),
    14: (SPECIFICATION, "clock_that_is_replaced_after_the_import_stops_no_interval"),
    15: (RECIPES, "a_logging_handlers_flush_delivers_each_record_as_it_was_when_it_was_logged"),
    16: (SPECIFICATION, "shutdown_out_of_time_hands_back_what_is_left_and_says_how_much"),
    17: (RECIPES, "retries_are_in_order_and_what_is_given_up_goes_to_the_dead_letter"),
    18: (WORLDS, "sub_interpreters_have_pull_mode_and_push_mode_where_threads_are_allowed"),
    19: (HERE, "the_installed_wheel_does_not_claim_to_be_typed"),
    20: (HERE, "clients_that_want_bytes_get_them_by_tolist_as_documented"),
    21: (SPECIFICATION, "start_calls_the_handler_on_one_daemon_thread_named_after_it"),
    22: (RECIPES, "the_sigterm_recipe_delivers_all_through_a_second_sigterm"),
    23: (SPECIFICATION, "task_in_wait_for_loses_no_batch_at_a_timeout"),
    24: (WORLDS, "green_threads_patched_before_or_after_the_import"),
    25: (SPECIFICATION, "batch_is_an_immutable_sequence_of_read_only_views_in_order"),
    26: (SPECIFICATION, "task_in_a_loop_that_no_longer_runs_holds_up_nobody"),
    27: (HERE, "a_process_that_was_stopped_for_a_while_goes_on"),
}


@pytest.mark.parametrize("number", range(1, 28))
def test_each_situation_is_a_test(number: int) -> None:
    file, name = TESTS[number]
    assert re.search(rf"(?m)^def test_{name}\(", (ROOT / file).read_text(encoding="utf-8")), f"{file}: no {name}"


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
