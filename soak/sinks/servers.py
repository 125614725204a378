# SPDX-License-Identifier: MIT
"""Servers for the sinks, on loopback, in temporary folders, and the faults that they can be given.

Installed ones are taken; missing ones are fetched from Debian into the project's cache, and nothing is installed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from soak import environment
from soak.debian import SetupError, fetch

CACHE = environment.ROOT / ".cache" / "servers"
HOST = "127.0.0.1"
START = 30.0  # seconds that a server may take until it answers
ROOM = "4g"  # what the small disk holds before it is full; it is memory, and takes what is used


class Kind(NamedTuple):
    """A server: what names its sink, and what starts it; {port} and {data} are filled in."""

    url: str = ""
    command: str = ""  # empty: there is no process
    package: str = ""  # Debian's; empty: this interpreter is started
    prepare: str = ""  # run once before
    ready: str = ""  # succeeds when it answers; empty: it does when it takes connections
    faults: tuple[str, ...] = ("kill", "hang", "reset", "full")
    forgives: bool = True  # False: after a full disk it works again only after a restart
    as_root: bool = True  # False: it refuses to run as root


KINDS = {
    "null": Kind("null", faults=()),
    "file": Kind("file:{data}/events.ndjson", faults=("full",)),
    "http": Kind(
        "http://127.0.0.1:{port}/events#{data}/stored.ndjson",
        "-m soak.sinks.receiver {port} {data}/stored.ndjson",
        faults=("kill", "hang", "reset", "full", "refuse"),
    ),
    # Every command is in its file, and in the system's hands, before it answers.
    "redis": Kind(
        "redis://127.0.0.1:{port}/0",
        "redis-server --port {port} --bind 127.0.0.1 --dir {data} --appendonly yes --save '' --loglevel warning",
        "redis-server",
    ),
    # With its defaults: what is committed is on the disk.
    "postgresql": Kind(
        "postgresql://tempo@127.0.0.1:{port}/postgres?connect_timeout=5&tcp_user_timeout=5000",
        "postgres -D {data}/pg -p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        " -c log_min_messages=fatal -c jit=off",
        "postgresql",
        "initdb -D {data}/pg --username=tempo --auth=trust --encoding=UTF8 --locale=C --no-sync",
        "pg_isready -q -h 127.0.0.1 -p {port}",
        as_root=False,
    ),
    # JetStream on the disk; a full one disables it.
    "nats": Kind(
        "nats://127.0.0.1:{port}",
        "nats-server -a 127.0.0.1 -p {port} -js -sd {data}",
        "nats-server",
        forgives=False,
    ),
}


def relay(to: int) -> Kind:
    """Return what stands between a sink and its server's port; SIGUSR1 resets all connections."""
    return Kind(command=f"-m soak.sinks.relay {{port}} {to}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def find(program: str, package: str) -> tuple[str, dict[str, str]]:
    """Return a program, and the environment to run it with; fetched when it is missing. Raises SetupError."""
    installed = map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))
    found = shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", *installed]))
    if found:
        return found, dict(os.environ)
    root = CACHE / package
    fetch([package], root)
    for path in sorted([*root.glob(f"usr/**/bin/{program}"), *root.glob(f"usr/sbin/{program}")]):
        libraries = [str(folder) for folder in (*root.glob("lib/*-linux-*"), *root.glob("usr/lib/*-linux-*"))]
        return str(path), {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    raise SetupError(f"Debian's {package} has no {program}")


def mount(path: Path, *options: str) -> None:
    """Mount a small file system, or change it. Raises SetupError: it takes root."""
    done = subprocess.run(["mount", *options, str(path)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"no file system may be mounted here: {done.stderr.strip()}")


class Server:
    """A server process, its data in ``folder/data``. A context manager that starts and ends it."""

    def __init__(self, kind: Kind, folder: Path, small: bool = False) -> None:
        """small: its data on a disk that can be full, if that may be."""
        self.kind, self.folder, self.data, self.port = kind, folder, folder / "data", free_port()
        self._user = "nobody" if not kind.as_root and os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "log.txt"
        self.data.mkdir(parents=True)
        self.small = False
        if small:
            with contextlib.suppress(SetupError, OSError):
                mount(self.data, "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs")
                self.small = True
        if self._user is not None:
            for path in (self.folder, self.data):
                shutil.chown(path, self._user)

    def url(self, port: int) -> str:
        """Return what names the sink, when the server is reached at a port."""
        return self.kind.url.format(port=port, data=self.data)

    def _run(self, text: str) -> subprocess.Popen[bytes]:
        """Start a program as the server's user, in its folder; its output goes to the log. Raises SetupError."""
        words = [word.format(port=self.port, data=self.data) for word in shlex.split(text)]
        variables = {**os.environ, "PYTHONPATH": str(environment.ROOT)}
        if self.kind.package:
            words[0], variables = find(words[0], self.kind.package)
        else:
            words.insert(0, sys.executable)
        with open(self._log, "ab") as log:
            streams: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            return subprocess.Popen(words, env=variables, cwd=self.folder, user=self._user, **streams)

    def start(self) -> None:
        """Start it if it does not run, and wait until it answers. Raises SetupError.

        Again and again: what a killed one has left (shared memory, a port) can take a moment to go.
        """
        deadline = time.monotonic() + START
        while self.kind.command:
            if self._process is None or self._process.poll() is not None:
                self._process = self._run(self.kind.command)
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 1.0):
                if not self.kind.ready or self._run(self.kind.ready).wait() == 0:
                    return
            if time.monotonic() > deadline:
                text = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["no word"]
                raise SetupError(f"{self.kind.command.split()[0]} does not answer: {text[0]} (see {self._log})")
            time.sleep(0.1)

    def signal(self, number: int) -> None:
        """Send a signal to the process and all that it started."""
        for pid in [] if self._process is None else [self._process.pid, *_descendants(self._process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End it without a chance to do anything."""
        self.signal(signal.SIGSTOP)  # so that none starts another one
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(START)

    def harm(self, fault: str) -> None:
        """Begin a fault; ``reset`` comes again and again."""
        if fault == "kill":
            self.kill()
        elif fault == "full":
            for _ in range(50):  # it may grow between the two steps
                usage = os.statvfs(self.data)
                used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
                with contextlib.suppress(SetupError):
                    return mount(self.data, "-o", f"remount,size={max(used, usage.f_frsize)}")
            raise SetupError(f"{self.data} cannot be made smaller")
        else:
            self.signal(signal.SIGSTOP if fault == "hang" else signal.SIGUSR1)

    def heal(self, fault: str) -> None:
        """End a fault. Raises SetupError when the server does not come back."""
        if fault == "full":
            mount(self.data, "-o", f"remount,size={ROOM}")
            if not self.kind.forgives:
                self.kill()
        elif fault != "kill":
            self.signal(signal.SIGCONT if fault == "hang" else signal.SIGUSR1)
        self.start()

    def __enter__(self) -> Server:
        try:
            if self.kind.prepare and (code := self._run(self.kind.prepare).wait()):
                raise SetupError(f"{self.kind.prepare.split()[0]} failed with exit code {code} (see {self._log})")
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self.small:
            subprocess.run(["umount", "-l", str(self.data)], check=False, stderr=subprocess.DEVNULL)


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield int(child)
            yield from _descendants(int(child))
