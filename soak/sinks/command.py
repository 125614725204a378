# SPDX-License-Identifier: MIT
"""The ``sinks`` command: real servers behind the dispatcher, loads with and without faults, every event read back."""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soak import cli, environment, interrupts, results
from soak import config as settings
from soak.calibration import calibrate
from soak.cli import say
from soak.config import Config
from soak.debian import SetupError
from soak.drive import describe, drive
from soak.load import Load
from soak.sinks import places, readback, servers

FAULTS = ("kill", "hang", "reset", "full", "refuse")
"""Killed and started again; stopped for a while; connections reset again and again; the disk full; and, of the http
receiver alone, 503 for an answer."""
FAULT_SECONDS = 3.0  # how long a fault lasts at most: a quarter of the load

EXAMPLE = """\
examples:
  python3 -m soak sinks
  python3 -m soak sinks --only redis,postgresql --faults none --duration 30s

Servers are those that are installed, or Debian's, fetched into .cache; they run on loopback in a temporary folder. What
cannot be had is left out with a line. A full disk needs a mounted file system, and so root.
"""


def add_parser(commands: Any) -> None:
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
    ratio: float = 0.0  # of the rate with no dispatcher
    accepted: int = 0
    read: dict[str, Any] = field(default_factory=dict)  # of readback.ReadBack
    peak_buffered_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def load(self, target: str, config: Config, harmed: servers.Server | None = None) -> Row:
        """Load one sink, inject the fault meanwhile, read everything back."""
        try:
            place = places.open_sink(target)
        except OSError as error:
            self.problems.append(f"cannot be opened: {error}")
            return self
        load, over = Load(config, place), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            fault = pool.submit(self._inject, harmed, config.duration / 4, over)
            try:
                outcome = drive(config, config.duration, load)
            finally:
                over.set()
        if (failure := fault.exception()) is not None:
            self.problems.append(f"the fault: {describe(failure)}")
        self.problems += outcome.problems
        self.accepted = sum(load.accepted)
        self.delivered_per_second = load.delivered / outcome.seconds
        self.peak_buffered_bytes = outcome.stats.peak_buffered_bytes if outcome.stats else 0
        if self.peak_buffered_bytes > config.max_buffered_bytes:
            self.problems.append(f"{self.peak_buffered_bytes} bytes buffered, limit {config.max_buffered_bytes}")
        if place is not None:
            found = readback.read_back(place, load.accounts, config)
            self.problems += found.problems
            self.read = vars(found)
        return self

    def _inject(self, harmed: servers.Server | None, quarter: float, over: threading.Event) -> None:
        """Begin the fault after a quarter of the load, and end it after another."""
        if harmed is None:
            return
        if over.wait(quarter):
            raise RuntimeError("the load was over before it")
        for number in range(10):
            if number == 0 or self.fault == "reset":
                harmed.harm(self.fault)
            over.wait(min(FAULT_SECONDS, quarter) / 10)
        harmed.heal(self.fault)

    def __str__(self) -> str:
        rate = f"{self.delivered_per_second:>11,.0f} events/s, {self.ratio:.3f} of bare, {self.accepted:,} accepted"
        found = [f", {self.read[name]} {name}" for name in ("lost", "repeated") if self.read.get("read")]
        return "".join([f"{self.sink:<11} {self.fault:<7}", rate, *found, *(f"; {one}" for one in self.problems)])


def main(options: argparse.Namespace) -> int:
    config = settings.config_from(options, options.duration)
    files = results.Files(options.out, options.json, kind="sinks")
    rows: list[Row] = []
    left_out: list[str] = []
    with interrupts.kept(), tempfile.TemporaryDirectory(prefix="tempo-sinks-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user passes through
        bare = calibrate(config, config.pass_seconds(1.0, 3.0))
        say(f"calibration: {bare:,.0f} events/s with no dispatcher")
        with closing(_loads(options, config, Path(folder), left_out)) as loads:
            while not interrupts.seen() and (row := next(loads, None)) is not None:
                row.ratio = row.delivered_per_second / bare
                rows.append(row)
                say(str(row))
        interrupted = interrupts.seen()
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


def _loads(
    options: argparse.Namespace, config: Config, folder: Path, left_out: list[str]
) -> Generator[Row, None, None]:
    """Yield the rows of each sink: without a fault, and with each."""
    for name in options.only:
        started, kind = False, servers.KINDS[name]
        try:
            with servers.Server(kind, folder / name, small="full" in options.faults) as server:
                yield Row(name).load(server.url(server.port), config)
                started = True
                for fault in (one for one in options.faults if one in kind.faults):
                    if fault == "full" and not server.small:
                        left_out.append(f"{name}, full disk: no file system may be mounted here")
                    elif fault == "reset":
                        with servers.Server(servers.relay(server.port), folder / f"{name}-relay") as relay:
                            yield Row(name, fault).load(server.url(relay.port), config, relay)
                    else:
                        yield Row(name, fault).load(server.url(server.port), config, server)
        except (SetupError, ImportError, OSError) as error:
            if started:
                yield Row(name, "", problems=[f"{type(error).__name__}: {error}"])
            else:
                left_out.append(f"{name}: {error}")
                say(f"sinks: {name} is left out: {error}")


def _summary(rows: Sequence[Row], left_out: Sequence[str], interrupted: bool) -> list[str]:
    well = sum(not row.problems for row in rows)
    word = "FAIL" if well < max(1, len(rows)) else "INTERRUPTED" if interrupted else "PASS"
    head = f"{word}: {well} of {len(rows)} loads well"
    return [head, *map(str, rows), *(f"left out: {text}" for text in left_out)]
