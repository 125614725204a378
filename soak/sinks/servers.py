# SPDX-License-Identifier: MIT
"""Servers for the sinks, on loopback, in temporary folders, and the faults that they can be given.

Installed ones are taken; missing ones are fetched from Debian into the project's cache, and nothing is installed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soak import environment
from soak.cli import say
from soak.debian import SetupError, fetch

CACHE = environment.ROOT / ".cache" / "servers"
HOST = "127.0.0.1"
START = 30.0
"""Seconds that a server may take until it answers."""
ROOM = "4g"
"""What the small disk holds before it is full; it is memory, and takes what is used."""

Command = tuple[list[str], dict[str, str]]
"""What starts a program, and the environment."""


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def find(program: str, package: str) -> tuple[str, dict[str, str]]:
    """Return a program, and the environment to run it with; fetched when it is missing. Raises SetupError."""
    installed = map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))
    found = shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", *installed]))
    if found:
        return found, dict(os.environ)
    root, done = CACHE / package, CACHE / f"{package}.done"
    if not done.exists():
        say(f"sinks: fetching {package} from Debian into {root}")
        shutil.rmtree(root, ignore_errors=True)
        fetch([package], root)
        done.touch()
    for path in sorted([*root.glob(f"usr/**/bin/{program}"), *root.glob(f"usr/sbin/{program}")]):
        libraries = [str(folder) for folder in (*root.glob("lib/*-linux-*"), *root.glob("usr/lib/*-linux-*"))]
        return str(path), {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    raise SetupError(f"Debian's {package} has no {program}")


class SmallDisk:
    """A file system for a server's data that can be full. Mounting it takes root: SetupError otherwise."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mount("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(path))

    def _mount(self, *arguments: str) -> None:
        done = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
        if done.returncode:
            raise SetupError(f"no file system may be mounted here: {done.stderr.strip()}")

    def fill(self) -> None:
        """Let no byte more fit."""
        for _ in range(50):  # it may grow between the two steps
            usage = os.statvfs(self._path)
            used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
            with contextlib.suppress(SetupError):
                return self._mount("-o", f"remount,size={max(used, usage.f_frsize)}", str(self._path))
        raise SetupError(f"{self._path} cannot be made smaller")

    def free(self) -> None:
        """Let everything fit again."""
        self._mount("-o", f"remount,size={ROOM}", str(self._path))


class Server:
    """A server process, its data in ``folder/data``. A context manager that starts and ends it."""

    faults: tuple[str, ...] = ("kill", "hang", "reset", "full")
    forgives = True  # False: after a full disk it works again only after a restart
    user: str | None = None  # whom it runs as; None: this one

    def __init__(self, folder: Path, small: bool = False) -> None:
        """small: its data on a disk that can be full, if that may be."""
        self.folder, self.data = folder, folder / "data"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "log.txt"
        self.data.mkdir(parents=True)
        self.disk: SmallDisk | None = None
        if small:
            with contextlib.suppress(SetupError, OSError):
                self.disk = SmallDisk(self.data)
        if self.user is not None:
            for path in (self.folder, self.data):
                shutil.chown(path, self.user)

    def url(self, port: int) -> str:
        """Return what names the sink, when the server is reached at a port."""
        raise NotImplementedError

    def command(self) -> Command:
        """Return what starts it."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what it needs before its first start."""

    def answers(self) -> bool:
        """Return whether it is ready, once it takes connections."""
        return True

    def run(self, command: list[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a program as the server's user, in its folder; its output goes to the log."""
        with open(self._log, "ab") as log:
            streams: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            return subprocess.Popen(command, env=variables, cwd=self.folder, user=self.user, **streams)

    def start(self) -> None:
        """Start it, and wait until it answers. Raises SetupError."""
        command, variables = self.command()
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            if not self.alive():  # what a killed one has left (shared memory, a port) can take a moment to go
                self._process = self.run(command, variables)
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 1.0):
                if self.answers():
                    return
            time.sleep(0.1)
        text = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["no word"]
        raise SetupError(f"{command[0]} does not answer: {text[0]} (see {self._log})")

    def alive(self) -> bool:
        """Return whether its process runs."""
        return self._process is not None and self._process.poll() is None

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
        elif fault == "full" and self.disk is not None:
            self.disk.fill()
        else:
            self.signal(signal.SIGSTOP if fault == "hang" else signal.SIGUSR1)

    def heal(self, fault: str) -> None:
        """End a fault. Raises SetupError when the server does not come back."""
        if fault == "full" and self.disk is not None:
            self.disk.free()
            if not self.forgives:
                self.kill()
        if fault in ("kill", "full") and not self.alive():
            self.start()
        elif fault in ("hang", "reset", "refuse"):
            self.signal(signal.SIGCONT if fault == "hang" else signal.SIGUSR1)

    def __enter__(self) -> Server:
        try:
            self.prepare()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self.disk is not None:
            subprocess.run(["umount", "-l", str(self.data)], check=False, stderr=subprocess.DEVNULL)


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield int(child)
            yield from _descendants(int(child))


class Null(Server):
    """No server: batches are dropped."""

    faults: tuple[str, ...] = ()

    def start(self) -> None:
        """Nothing is to be started."""

    def url(self, port: int) -> str:
        return "null"


class File(Null):
    """No server: a file."""

    faults = ("full",)

    def url(self, port: int) -> str:
        return f"file:{self.data / 'events.ndjson'}#rotate=64MiB"


class Redis(Server):
    """redis-server; every command is in its file, and in the system's hands, before it answers."""

    more: tuple[str, ...] = ()  # further words of its command line

    def command(self) -> Command:
        program, variables = find("redis-server", "redis-server")
        options = {"port": self.port, "bind": HOST, "dir": self.data, "appendonly": "yes", "save": ""}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        return [program, *words, "--loglevel", "warning", *self.more], variables

    def answers(self) -> bool:
        with socket.create_connection((HOST, self.port), 5.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")

    def url(self, port: int) -> str:
        return f"redis://{HOST}:{port}/0#timeout=2s"


class Postgres(Server):
    """postgres with its defaults: what is committed is on the disk."""

    user = "nobody" if hasattr(os, "geteuid") and os.geteuid() == 0 else None  # it refuses to run as root

    def prepare(self) -> None:
        program, variables = find("initdb", "postgresql")
        options = ["--username=tempo", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        if code := self.run([program, "-D", str(self.data / "pg"), *options], variables).wait():
            raise SetupError(f"{program} failed with exit code {code} (see {self._log})")

    def command(self) -> Command:
        program, variables = find("postgres", "postgresql")
        options = {"listen_addresses": HOST, "unix_socket_directories": "", "log_min_messages": "fatal", "jit": "off"}
        given = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        return [program, "-D", str(self.data / "pg"), "-p", str(self.port), *given], variables

    def answers(self) -> bool:
        import psycopg  # noqa: PLC0415

        with contextlib.suppress(psycopg.Error):
            psycopg.connect(self.url(self.port)).close()
            return True
        return False

    def url(self, port: int) -> str:
        return f"postgresql://tempo@{HOST}:{port}/postgres?connect_timeout=5&tcp_user_timeout=5000"


class Nats(Server):
    """nats-server with JetStream on the disk."""

    forgives = False  # it has then disabled JetStream

    def command(self) -> Command:
        program, variables = find("nats-server", "nats-server")
        return [program, "-a", HOST, "-p", str(self.port), "-js", "-sd", str(self.data)], variables

    def url(self, port: int) -> str:
        return f"nats://{HOST}:{port}#timeout=2s"


class Relay(Server):
    """Between a sink and its server, whose port is ``to``; SIGUSR1 resets all connections."""

    to = 0

    def command(self) -> Command:
        words = ["soak.sinks.relay", str(self.port), str(self.to)]
        return [sys.executable, "-m", *words], {**os.environ, "PYTHONPATH": str(environment.ROOT)}


class Http(Server):
    """The receiver."""

    faults = (*Server.faults, "refuse")

    def command(self) -> Command:
        words = ["soak.sinks.receiver", str(self.port), str(self.data / "stored.ndjson")]
        return [sys.executable, "-m", *words], {**os.environ, "PYTHONPATH": str(environment.ROOT)}

    def url(self, port: int) -> str:
        return f"http://{HOST}:{port}/events#timeout=2s&stored={self.data / 'stored.ndjson'}"


KINDS: dict[str, type[Server]] = {
    "null": Null,
    "file": File,
    "http": Http,
    "redis": Redis,
    "postgresql": Postgres,
    "nats": Nats,
}
