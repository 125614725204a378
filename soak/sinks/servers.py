# SPDX-License-Identifier: MIT
"""Servers for the sinks, on loopback, in a folder of their own; and what can happen to a server.

Installed ones are taken; what is missing is fetched from Debian into the project's cache, and nothing is installed.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from soak import environment
from soak.debian import SetupError, fetch
from soak.progress import say

CACHE = environment.ROOT / ".cache" / "servers"
"""Removed by ``make clean``."""
HOST = "127.0.0.1"
START = 30.0
"""Seconds that a server may take until it answers."""
ROOM = "4g"
"""What the small disk holds before it is full; it is memory, and takes what is used."""


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def find(program: str, package: str) -> tuple[str, dict[str, str]]:
    """Return a program, and the environment to run it with; fetched when it is not there. Raises SetupError."""
    places = os.pathsep.join(
        [os.environ.get("PATH", ""), "/usr/sbin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))]
    )
    found = shutil.which(program, path=places)
    if found:
        return found, dict(os.environ)
    root = CACHE / package
    if not (CACHE / f"{package}.done").exists():
        say(f"sinks: fetching {package} from Debian into {root}")
        shutil.rmtree(root, ignore_errors=True)
        fetch([package], root)
        (CACHE / f"{package}.done").touch()
    for path in sorted([*root.glob(f"usr/**/bin/{program}"), *root.glob(f"usr/sbin/{program}")]):
        libraries = [str(folder) for folder in (*root.glob("lib/*-linux-*"), *root.glob("usr/lib/*-linux-*"))]
        return str(path), {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    raise SetupError(f"Debian's {package} has no {program}")


class Server:
    """A server process, its data in ``folder/data``. ``stop`` it in any case."""

    forgives = True
    """False: after a full disk, it works again only when it is started anew."""

    def __init__(self, folder: Path, user: str | None = None) -> None:
        """user: whom it runs as; None for this process's."""
        self.folder, self.data = folder, folder / "data"
        self.port = free_port()
        self.user = user
        self.disk: SmallDisk | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "log.txt"

    def url(self, port: int) -> str:
        """Return what names the sink, when the server is reached at a port."""
        raise NotImplementedError

    def command(self) -> tuple[list[str], dict[str, str]]:
        """Return what starts it, and the environment."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what the server needs before its first start."""

    def make_folder(self, small: bool) -> None:
        """Make the folder of the data, on a small disk if that is wanted and may be had here."""
        self.data.mkdir(parents=True)
        if small:
            self.disk = SmallDisk.mount(self.data)
        if self.user is not None:
            import pwd  # noqa: PLC0415 - not on Windows

            account = pwd.getpwnam(self.user)
            for path in (self.folder, self.data):
                os.chown(path, account.pw_uid, account.pw_gid)

    def run(self, command: list[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a program of the server's, as its user, in its folder; what it says goes to the log."""
        with open(self._log, "ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=variables,
                cwd=self.folder,
                user=self.user,
                start_new_session=True,
            )

    def start(self) -> None:
        """Start it, and wait until it answers. Raises SetupError."""
        command, variables = self.command()
        deadline = time.monotonic() + START
        while True:
            self._process = self.run(command, variables)
            while self._process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 1.0):
                    if self.answers():
                        return
                if time.monotonic() > deadline:
                    raise SetupError(f"{command[0]} does not answer (see {self._log})")
                time.sleep(0.05)
            # What a killed one has left (shared memory, a port) can take a moment to go.
            if time.monotonic() > deadline:
                text = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["no word"]
                raise SetupError(f"{command[0]} ended with exit code {self._process.returncode}: {text[0]}")
            time.sleep(0.2)

    def answers(self) -> bool:
        """Return whether it is ready, once it takes connections."""
        return True

    def alive(self) -> bool:
        """Return whether its process runs."""
        return self._process is not None and self._process.poll() is None

    def pids(self) -> list[int]:
        """Return the process and all that it started, by their parents."""
        return [] if self._process is None else [self._process.pid, *_descendants(self._process.pid)]

    def signal(self, number: int) -> None:
        """Send all of them a signal."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End it without a chance to do anything."""
        self.signal(signal.SIGSTOP)  # so that none starts another one
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(START)

    def stop(self) -> None:
        """End it, and let go of the small disk."""
        self.kill()
        if self.disk is not None:
            self.disk.unmount()

    def cpu_seconds(self) -> float:
        """Return what its processes have worked, in seconds; of those that have ended, what was waited for."""
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield int(child)
            yield from _descendants(int(child))


class SmallDisk:
    """A file system of its own for a server's data, which can be full."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @staticmethod
    def mount(path: Path) -> SmallDisk | None:
        """Mount one; None where that may not be done."""
        done = _mount("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(path))
        return SmallDisk(path) if done else None

    def fill(self) -> None:
        """Let no byte more fit."""
        for _ in range(50):  # it may grow between the two steps
            usage = os.statvfs(self._path)
            used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
            if _mount("-o", f"remount,size={max(used, usage.f_frsize)}", str(self._path)):
                return
        raise SetupError(f"{self._path} cannot be made smaller")

    def free(self) -> None:
        """Let everything fit again."""
        if not _mount("-o", f"remount,size={ROOM}", str(self._path)):
            raise SetupError(f"{self._path} cannot be made larger")

    def unmount(self) -> None:
        """Let it go."""
        subprocess.run(["umount", "-l", str(self._path)], check=False, stderr=subprocess.DEVNULL)


def _mount(*arguments: str) -> bool:
    try:
        done = subprocess.run(["mount", *arguments], check=False, capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


class Redis(Server):
    """redis-server; every command is in its file, and in the system's hands, before it answers."""

    more: Sequence[str] = ()
    """Further words of its command line."""

    def command(self) -> tuple[list[str], dict[str, str]]:
        program, variables = find("redis-server", "redis-server")
        options = {
            "port": self.port,
            "bind": HOST,
            "dir": self.data,
            "appendonly": "yes",
            "save": "",
            "loglevel": "warning",
        }
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        return [program, *words, *self.more], variables

    def answers(self) -> bool:
        with socket.create_connection((HOST, self.port), 5.0) as connection:
            connection.settimeout(5.0)
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")

    def url(self, port: int) -> str:
        return f"redis://{HOST}:{port}/0#timeout=2"


class Postgres(Server):
    """postgres with its defaults: what is committed is on the disk."""

    def prepare(self) -> None:
        program, variables = find("initdb", "postgresql")
        options = ["--username=tempo", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        code = self.run([program, "-D", str(self.data / "pg"), *options], variables).wait()
        if code:
            raise SetupError(f"{program} failed with exit code {code} (see {self._log})")

    def command(self) -> tuple[list[str], dict[str, str]]:
        program, variables = find("postgres", "postgresql")
        options = {"listen_addresses": HOST, "unix_socket_directories": "", "log_min_messages": "fatal", "jit": "off"}
        given = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        return [program, "-D", str(self.data / "pg"), "-p", str(self.port), *given], variables

    def answers(self) -> bool:
        import psycopg  # noqa: PLC0415

        try:
            psycopg.connect(f"postgresql://tempo@{HOST}:{self.port}/postgres", connect_timeout=5).close()
        except psycopg.Error:
            return False
        return True

    def url(self, port: int) -> str:
        return f"postgresql://tempo@{HOST}:{port}/postgres?connect_timeout=5&tcp_user_timeout=5000"


class Nats(Server):
    """nats-server with JetStream on the disk."""

    forgives = False  # it has then disabled JetStream

    def command(self) -> tuple[list[str], dict[str, str]]:
        program, variables = find("nats-server", "nats-server")
        return [program, "-a", HOST, "-p", str(self.port), "-js", "-sd", str(self.data)], variables

    def url(self, port: int) -> str:
        return f"nats://{HOST}:{port}#timeout=2"


class Http(Server):
    """The receiver beside this module."""

    def command(self) -> tuple[list[str], dict[str, str]]:
        variables = {**os.environ, "PYTHONPATH": str(environment.ROOT)}
        return [
            sys.executable,
            "-m",
            "soak.sinks.receiver",
            str(self.port),
            str(self.data / "stored.ndjson"),
        ], variables

    def url(self, port: int) -> str:
        return f"http://{HOST}:{port}/events#timeout=2&stored={self.data / 'stored.ndjson'}"


class Relay(Server):
    """Between a sink and its server; SIGUSR1 resets all connections."""

    def __init__(self, folder: Path, to: int) -> None:
        super().__init__(folder)
        self._to = to

    def command(self) -> tuple[list[str], dict[str, str]]:
        variables = {**os.environ, "PYTHONPATH": str(environment.ROOT)}
        return [sys.executable, "-m", "soak.sinks.relay", str(self.port), str(self._to)], variables


KINDS: dict[str, Callable[..., Server]] = {"http": Http, "redis": Redis, "postgresql": Postgres, "nats": Nats}


@contextlib.contextmanager
def running(kind: str, folder: Path, small: bool) -> Iterator[Server]:
    """Run a server of a kind; small: its data on a disk that can be full, if that may be. Raises SetupError."""
    # PostgreSQL refuses to run as root.
    user = "nobody" if kind == "postgresql" and os.geteuid() == 0 else None
    server = KINDS[kind](folder, user)
    try:
        server.make_folder(small)
        server.prepare()
        server.start()
        yield server
    finally:
        server.stop()
