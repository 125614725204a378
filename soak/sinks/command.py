# SPDX-License-Identifier: MIT
"""The ``sinks`` command: real servers behind the dispatcher, loads with and without faults, every event read back."""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tempo
from soak import cli, environment, interrupts, results
from soak import config as settings
from soak.calibration import calibrate
from soak.cli import format_seconds, say
from soak.config import Config
from soak.debian import SetupError
from soak.drive import drive
from soak.load import Load
from soak.sinks import places, readback, servers

FAULTS = ("kill", "hang", "reset", "full", "refuse")
"""Killed and started again; stopped for a while; connections reset again and again; the disk full; and, of the http
receiver alone, 503 for an answer."""
FAULT_SECONDS = 3.0
"""How long a fault lasts at most: a quarter of the load."""
EVERY = 0.1
"""Seconds from one look at stats() to the next."""

EXAMPLE = """\
examples:
  python3 -m soak sinks
  python3 -m soak sinks --only redis,postgresql --faults none --duration 30s

Servers are those that are installed, or Debian's, fetched into .cache; they run on loopback in a temporary folder. What
cannot be had is left out with a line. A full disk needs a mounted file system, and so root.
"""


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    purpose = "Load each sink's real server, inject faults under load, read everything back and compare."
    add = cli.add_command(commands, "sinks", main, purpose, EXAMPLE)
    add("--duration", type=cli.duration, default="10s", metavar="TIME", help="of each load (%(default)s)")
    for name, known in (("only", (*servers.KINDS,)), ("faults", FAULTS)):
        shown = f"of {', '.join(known)}, or none (%(default)s)"
        add(f"--{name}", type=cli.names(*known), default="all", metavar="NAME,...", help=shown)
    settings.add_settings(add)
    settings.add_outputs(add)


@dataclass
class Row:
    """One load on one sink."""

    sink: str
    fault: str = "none"
    delivered_per_second: float = 0.0
    ratio: float | None = None  # of the rate with no dispatcher
    accepted: int = 0
    read: dict[str, Any] = field(default_factory=dict)  # of readback.ReadBack
    stall_seconds: float = 0.0  # the longest time without a delivery
    recovery_seconds: float | None = None  # from the end of the fault to the next delivery
    peak_buffered_bytes: int = 0
    interrupted: bool = False
    problems: list[str] = field(default_factory=list)

    def cells(self) -> dict[str, str]:
        """Return what it says, by the headings of the table."""
        read = self.read if self.read.get("read") else {}
        return {
            "sink": self.sink,
            "fault": self.fault,
            "events/s": f"{self.delivered_per_second:,.0f}",
            "of bare": "" if self.ratio is None else f"{self.ratio:.3f}",
            "accepted": f"{self.accepted:,}",
            "lost": str(read.get("lost", "")),
            "repeated": str(read.get("repeated", "")),
            "longest stall": format_seconds(self.stall_seconds),
            "went on after": "" if self.recovery_seconds is None else format_seconds(self.recovery_seconds),
        }


def main(options: argparse.Namespace) -> int:
    """Load each sink; return the exit code."""
    config = settings.config_from(options, options.duration)
    files = results.Files(options.out, options.json, kind="sinks")
    rows: list[Row] = []
    left_out: list[str] = []
    with interrupts.kept(), tempfile.TemporaryDirectory(prefix="tempo-sinks-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user passes through
        bare, interrupted = calibrate(config, config.pass_seconds(1.0, 3.0))
        say(f"calibration: {bare:,.0f} events/s with no dispatcher")
        for name in options.only:
            if interrupted:
                break
            with closing(_loads(name, options.faults, config, Path(folder), left_out)) as loads:
                for row in loads:
                    row.ratio = row.delivered_per_second / bare
                    rows.append(row)
                    say(", ".join([*(f"{head} {cell}" for head, cell in row.cells().items() if cell), *row.problems]))
                    interrupted |= row.interrupted or interrupts.take()
                    if interrupted:
                        break
        result = {
            "started": files.started,
            "interrupted": interrupted,
            "config": asdict(config),
            "environment": environment.describe(),
            "calibration": bare,
            "rows": [asdict(row) for row in rows],
            "left_out": left_out,
        }
        files.finish(result, _summary(rows, left_out, interrupted))
    return 1 if not files.well or interrupted or not rows or any(row.problems for row in rows) else 0


def _loads(name: str, faults: Sequence[str], config: Config, folder: Path, left_out: list[str]) -> Any:
    """Yield the rows of one sink: without a fault, and with each."""
    started = False
    try:
        kind = servers.KINDS[name]
        with servers.Server(kind, folder / name, small="full" in faults) as server:
            yield _load(Row(name), server.url(server.port), config)
            started = True
            for fault in (one for one in faults if one in kind.faults):
                if fault == "full" and server.disk is None:
                    left_out.append(f"{name}, full disk: no file system may be mounted here")
                    continue
                with ExitStack() as stack:
                    harmed = server
                    if fault == "reset":
                        harmed = servers.Server(servers.RELAY, folder / f"{name}-relay", to=server.port)
                        stack.enter_context(harmed)
                    yield _load(Row(name, fault), server.url(harmed.port), config, harmed)
    except (SetupError, ImportError, OSError) as error:
        if started:
            yield Row(name, "", problems=[f"{type(error).__name__}: {error}"])
        else:
            left_out.append(f"{name}: {error}")
            say(f"sinks: {name} is left out: {error}")


class Watch:
    """Looks at the load now and then: how long nothing was delivered, and when it went on after the fault."""

    def __init__(self) -> None:
        self.stall = self.now = 0.0
        self.recovered: float | None = None
        self.ended: float | None = None  # when the fault ended
        self._delivered = self._moved = 0.0

    def sample(self, elapsed: float, stats: tempo.Stats) -> None:
        """Take a look."""
        self.now = elapsed
        if stats.delivered != self._delivered:
            self._delivered, self._moved = stats.delivered, elapsed
            if self.ended is not None and self.recovered is None:
                self.recovered = max(0.0, elapsed - self.ended)
        self.stall = max(self.stall, elapsed - self._moved)


def _load(row: Row, target: str, config: Config, harmed: servers.Server | None = None) -> Row:
    """Load one sink, inject the fault meanwhile, read everything back."""
    try:
        place = places.open_sink(target)
    except OSError as error:
        row.problems.append(f"cannot be opened: {error}")
        return row
    load, watch = Load(config, place), Watch()
    with nullcontext() if harmed is None else _injected(row, harmed, config.duration, watch):
        outcome = drive(config, config.duration, load, watch.sample, EVERY)
    row.problems += outcome.problems
    row.interrupted = outcome.interrupted
    row.accepted = sum(load.accepted)
    row.delivered_per_second = load.delivered / outcome.seconds
    row.stall_seconds, row.recovery_seconds = watch.stall, watch.recovered
    if outcome.stats is not None:
        row.peak_buffered_bytes = outcome.stats.peak_buffered_bytes
    if row.peak_buffered_bytes > config.max_buffered_bytes:
        row.problems.append(f"{row.peak_buffered_bytes} bytes were buffered, more than {config.max_buffered_bytes}")
    if place is not None:
        found = readback.read_back(place, load.accounts, config)
        row.problems += found.problems
        row.read = vars(found)
    return row


@contextmanager
def _injected(row: Row, harmed: servers.Server, duration: float, watch: Watch) -> Iterator[None]:
    """Begin the fault when a quarter of the load is over, and end it after another, on its own thread."""
    over = threading.Event()
    lasts = min(FAULT_SECONDS, duration / 4)

    def inject() -> None:
        try:
            if over.wait(duration / 4):
                return
            harmed.harm(row.fault)
            until = time.monotonic() + lasts
            while (left := until - time.monotonic()) > 0 and not over.wait(min(left, lasts / 10)):
                if row.fault == "reset":
                    harmed.harm(row.fault)
            harmed.heal(row.fault)
            watch.ended = watch.now
        except Exception as error:
            row.problems.append(f"the fault: {type(error).__name__}: {error}")

    thread = threading.Thread(target=inject, name="fault", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(servers.START + 30)
        if watch.ended is None:
            row.problems.append("the load was over before the fault")


def _summary(rows: Sequence[Row], left_out: Sequence[str], interrupted: bool) -> list[str]:
    """Return a table in Markdown, and what else there is to say."""
    failed = [row for row in rows if row.problems]
    word = "FAIL" if failed or not rows else "INTERRUPTED" if interrupted else "PASS"
    lines = [f"{word}: {len(rows) - len(failed)} of {len(rows)} loads well", ""]
    headings = list(Row("").cells())
    table = [headings, ["---"] * len(headings), *(list(row.cells().values()) for row in rows)]
    lines += [f"| {' | '.join(cells)} |" for cells in table]
    lines += ["", *(f"left out: {text}" for text in left_out)]
    return lines + [f"{row.sink}, {row.fault}: {problem}" for row in failed for problem in row.problems]
