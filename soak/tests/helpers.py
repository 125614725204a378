# SPDX-License-Identifier: MIT
"""What the tests of the harness share: dispatchers, batches, threads whose outcome is seen, child processes."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import http.client
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import tempo

ROOT = Path(__file__).resolve().parents[2]
REPEAT = float(os.environ.get("REPEAT", "1"))
"""Multiplies the rounds of the tests that draw."""
LONG = 3600.0
"""Seconds: an interval that never ends within a test."""
LIMIT = 30.0 * max(1.0, REPEAT)
"""Seconds that a test waits for something that must come."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
"""Of child processes: tempo can be imported, and nothing is left in the checkout."""


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
        time.sleep(0.001)


class Gate:
    """A handler that stays in its first batch until it may leave; keeps what it was given."""

    def __init__(self) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()
        self.came: list[bytes] = []

    def __call__(self, batch: tempo.Batch) -> None:
        self.entered.set()
        self.leave.wait(LIMIT)
        self.came += batch.tolist()


class Worker(threading.Thread):
    """A daemon thread, started at once. ``result`` joins it and returns, or raises, what came of its work."""

    def __init__(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(daemon=True)
        self._work = functools.partial(work, *args, **kwargs)
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as exc:
            self._error = exc

    def result(self, limit: float = LIMIT) -> Any:
        """Return or raise what the work did; fail when it does not end."""
        self.join(limit)
        if self.is_alive():
            faulthandler.dump_traceback()
            raise AssertionError(f"{self._work} is stuck")
        if self._error is not None:
            raise self._error
        return self._value


def run_python(*args: str, cwd: Path = ROOT, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run an interpreter; the caller looks at the outcome."""
    command = [sys.executable, *args]
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )


class Ended(NamedTuple):
    """A child process that has ended."""

    code: int
    out: str
    err: str


class Child:
    """A program under way, in a process group of its own, which ends with the ``with`` block."""

    def __init__(self, folder: Path, *command: str, **more: Any) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**ENVIRONMENT, "HOME": str(folder), "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **more,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own children too: they hold the pipes
            print(*self.process.communicate(), sep="\n")  # for the test that has failed

    def end(self, number: int = 0, limit: float = LIMIT) -> Ended:
        """Send a signal, if any, and wait for the end; a child that hangs is killed, a Python with its stacks."""
        if number:
            self.process.send_signal(number)
        try:
            out, err = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGABRT)
            out, err = self.process.communicate(timeout=LIMIT)
            err = f"hangs: {err}"
        return Ended(self.process.returncode, out, err)


@contextlib.contextmanager
def served(folder: Path, *command: str) -> Iterator[tuple[Child, int]]:
    """Run a server on a socket that takes connections already ({fd}); yield it, and its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        parts = [part.format(fd=listener.fileno()) for part in command]
        server, port = Child(folder, *parts, pass_fds=[listener.fileno()]), listener.getsockname()[1]
    # Closed here, so that who connects when the server has ended is refused.
    with server:
        yield server, port


def find_uwsgi() -> str:
    """Return its path, or skip the test."""
    found = shutil.which("uwsgi") or shutil.which("uwsgi", path=Path(sys.executable).parent)
    return found or pytest.skip("uwsgi is not installed")


def ask(port: int, path: str, body: bytes | None = None) -> tuple[int, str]:
    """Send one request; return the status and the answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)) as connection:
        connection.request("GET" if body is None else "POST", path, body)
        response = connection.getresponse()
        return response.status, response.read().decode()


class OnTerminal:
    """A Python process on a pseudo-terminal. A context manager, which ends the process."""

    def __init__(self, *args: str, **variables: str) -> None:
        self.text, self._end = "", time.monotonic() + LIMIT
        self._master, slave = os.openpty()
        environment = {**ENVIRONMENT, "TERM": "xterm", **variables}
        streams: Any = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, *args], cwd=ROOT, env=environment, start_new_session=True, **streams
        )
        os.close(slave)

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LIMIT)
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

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Press Ctrl-C, or send a signal that no key is for."""
        if number == signal.SIGINT:
            os.write(self._master, b"\x03")
        else:
            self.process.send_signal(number)

    def exit_code(self) -> int:
        """Wait for the end."""
        while self._read():
            pass
        return self.process.wait(LIMIT)
