# SPDX-License-Identifier: MIT
"""What the tests of the harness share: dispatchers, batches, threads whose outcome is seen, child processes."""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import importlib.util
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tempo

ROOT = Path(__file__).resolve().parents[2]
LONG = 3600.0
"""Seconds: an interval that never ends within a test."""
LIMIT = 30.0
"""Seconds that a test waits for something that must come."""


def make(**kwargs: Any) -> tempo.Dispatcher:
    """Return a dispatcher with roomy defaults."""
    return tempo.Dispatcher(**{"interval": LONG, "max_buffered_bytes": tempo.MiB, **kwargs})


def batch_of(*payloads: bytes) -> tempo.Batch:
    """Return one batch with these payloads."""
    d = make()
    d.enqueue_many(payloads)
    (batch,) = d.stop()
    return batch


def wait_until(condition: Callable[[], object], what: str = "it") -> None:
    """Return when condition() is true; fail after LIMIT seconds."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.002)


class Worker(threading.Thread):
    """A daemon thread, started at once. ``result`` joins it and returns, or raises, what came of its work."""

    def __init__(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(daemon=True)
        self._call = (work, args, kwargs)
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        work, args, kwargs = self._call
        try:
            self._value = work(*args, **kwargs)
        except BaseException as exc:
            self._error = exc

    def result(self) -> Any:
        """Return or raise what the work did; fail when it does not end."""
        self.join(LIMIT)
        if self.is_alive():
            faulthandler.dump_traceback()
            raise AssertionError(f"{self._call[0]} is stuck")
        if self._error is not None:
            raise self._error
        return self._value


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
"""Of child processes: tempo can be imported, and nothing is left in the checkout."""


def run_python(*args: str, cwd: Path = ROOT, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run an interpreter; the caller looks at the outcome."""
    command = [sys.executable, *args]
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )


def skip_what_is_not_installed(source: str) -> None:
    """Skip the test when a source imports a package that is not there."""
    for statement in ast.parse(source).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            module = statement.module if isinstance(statement, ast.ImportFrom) else statement.names[0].name
            name = str(module).partition(".")[0]
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed")


class OnTerminal:
    """A process on a pseudo-terminal. A context manager, which ends the process."""

    def __init__(self, *args: str, **variables: str) -> None:
        self.text = ""
        self._end = time.monotonic() + LIMIT
        self._master, slave = os.openpty()
        self._process = subprocess.Popen(
            [sys.executable, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env={**ENVIRONMENT, "TERM": "xterm", **variables},
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
        """Send a signal that no key is for."""
        self._process.send_signal(number)

    def exit_code(self) -> int:
        """Wait for the end."""
        while self._read():
            pass
        return self._process.wait(LIMIT)
