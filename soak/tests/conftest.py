# SPDX-License-Identifier: MIT
"""Fixtures of the harness's tests."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from unittest import mock

import pytest

from soak.config import Config
from soak.tests.helpers import wait_until

# Terminals, signals and forks: the harness runs on Windows, its tests do not.
collect_ignore_glob = ["test_*.py"] if os.name == "nt" else []


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_not_ignored() -> Iterator[None]:
    """Heed SIGINT, which a script's background jobs ignore; child processes inherit it."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """Fail a test that leaves a thread behind."""
    before = set(threading.enumerate())
    yield
    wait_until(lambda: set(threading.enumerate()) <= before, "the end of all threads")


@pytest.fixture
def short_passes() -> Iterator[None]:
    """Let the passes other than the load be short."""
    with mock.patch.object(Config, "pass_seconds", return_value=0.1):
        yield
