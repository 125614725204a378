# SPDX-License-Identifier: MIT
"""The ``sinks`` command: real servers behind the dispatcher, under load and under faults, and every event read back."""

from __future__ import annotations

import argparse
import gc
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tempo
from soak import environment, handover, heap, interrupts, micro, results, settings
from soak.calibration import calibrate
from soak.config import Config
from soak.debian import SetupError
from soak.drive import Outcome, drive
from soak.load import Load
from soak.options import converter
from soak.progress import say
from soak.sinks import open_sink, readback, servers
from soak.sinks.file import FileSink
from soak.units import format_seconds, format_size, parse_duration

try:
    import tracemalloc
except ImportError:  # PyPy has none
    TRACED = False
else:
    TRACED = True

SINKS = ("null", "file", *servers.KINDS)
FAULTS = ("kill", "hang", "reset", "full", "refuse")
"""Killed and started again; stopped for a while; connections reset again and again; the disk full; and, of the http
receiver alone, 503 for an answer."""
FAULT_SECONDS = 3.0
"""How long a fault lasts at most: a quarter of the load."""
EVERY = 0.1
"""Seconds from one look at stats() to the next."""
ROUNDS = 7
"""Of the comparison with a hand-rolled batcher."""

EXAMPLE = """\
examples:
  python3 -m soak sinks
  python3 -m soak sinks --only redis,postgresql --faults none --duration 30s

Servers are those that are installed, or Debian's, fetched into .cache; they run on loopback in a temporary folder. What
cannot be had is left out with a line. A full disk needs a file system of its own, and so root.
exit code: 0 every accepted event was read back, 1 not so, or a result cannot be written, 2 a bad option
"""


def _names(known: Sequence[str], text: str) -> tuple[str, ...]:
    if text in ("all", "none"):
        return tuple(known) if text == "all" else ()
    chosen = tuple(text.split(","))
    for name in chosen:
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}")
    return chosen


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sinks",
        help="Redis, PostgreSQL, NATS, HTTP and files behind it, with faults, every event read back",
        description="Load each sink's real server, harm it under load, read everything back and compare.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main, parser=parser)
    add = parser.add_argument
    add("--duration", type=converter(parse_duration), default="10s", metavar="TIME", help="of each load (%(default)s)")
    add(
        "--only",
        type=converter(lambda text: _names(SINKS, text)),
        default="all",
        metavar="SINKS",
        help=f"of {','.join(SINKS)} (%(default)s)",
    )
    add(
        "--faults",
        type=converter(lambda text: _names(FAULTS, text)),
        default="all",
        metavar="FAULTS",
        help=f"of {','.join(FAULTS)}, or none (%(default)s)",
    )
    settings.add_settings(parser)
    settings.add_outputs(parser)


@dataclass
class Row:
    """One load on one sink."""

    sink: str
    fault: str
    delivered_per_second: float = 0.0
    ratio: float | None = None
    """Of the rate with no dispatcher."""
    accepted: int = 0
    read: dict[str, Any] = field(default_factory=dict)
    """Of readback.ReadBack."""
    in_sink: float = 0.0
    """Share of the load that the consumers spent in deliver."""
    client_cpu: float = 0.0
    """Share of the load that the client's code worked, of one core."""
    server_cpu: float | None = None
    """Share of the load that the server worked, of one core."""
    stall_seconds: float = 0.0
    """The longest time without a delivery."""
    recovery_seconds: float | None = None
    """From the end of the fault to the next delivery."""
    peak_buffered_bytes: int = 0
    held_bytes: int | None = None
    """What tempo and its producers held while the fault lasted (tracemalloc)."""
    interrupted: bool = False
    problems: list[str] = field(default_factory=list)


def main(options: argparse.Namespace) -> int:
    """Load each sink; return the exit code."""
    place = environment.describe()
    config = settings.config_from(options, options.duration)
    files = results.Files(options.out, options.json, kind="sinks")
    rows: list[Row] = []
    left_out: list[str] = []
    peers: dict[str, list[float]] = {}
    with interrupts.kept(), tempfile.TemporaryDirectory(prefix="tempo-sinks-") as text:
        before = calibrate(config, config.pass_seconds(1.0, 3.0))
        say(f"calibration: {before.events_per_second:,.0f} events/s with no dispatcher")
        folder = Path(text)
        folder.chmod(0o711)  # PostgreSQL's user passes through
        try:
            if before.interrupted:
                raise interrupts.Interrupted
            for name in options.only:
                with closing(_loads(name, options.faults, config, folder, left_out)) as loads:
                    for row in loads:
                        row.ratio = row.delivered_per_second / before.events_per_second
                        rows.append(row)
                        say(_line(row))
                        if row.interrupted:
                            raise interrupts.Interrupted
            peers = _beside(folder, options.only)
            interrupted = interrupts.take()
        except interrupts.Interrupted:
            interrupted = True
    result = {
        "started": files.started,
        "interrupted": interrupted,
        "config": config.as_json(),
        "environment": place,
        "calibration": before.events_per_second,
        "rows": [vars(row) for row in rows],
        "left_out": left_out,
        "queue_batcher_over_tempo": peers,
    }
    unwritten = files.finish(result)
    results.tell(_summary(rows, left_out, peers, files.written, interrupted), unwritten)
    return 1 if not files.well or interrupted or not rows or any(row.problems for row in rows) else 0


# -- The loads ---------------------------------------------------------------------------------------------------------


def _loads(
    name: str, faults: Sequence[str], config: Config, folder: Path, left_out: list[str]
) -> Generator[Row, None, None]:
    """Yield the rows of one sink: without a fault, and with each."""
    if name == "null":
        yield _load(Row(name, "none"), "null", config)
        return
    if name == "file":
        disk = servers.SmallDisk.mount(_made(folder / "file"))
        try:
            target = f"file:{folder / 'file' / 'events.ndjson'}#rotate=64MiB"
            yield _load(Row(name, "none"), target, config)
            if "full" in faults and disk is not None:
                yield _load(Row(name, "full"), target, config, _Fault(disk.fill, disk.free))
            elif "full" in faults:
                left_out.append("file, full disk: no file system of its own may be mounted here")
        finally:
            if disk is not None:
                disk.unmount()
        return
    started = False
    try:
        with servers.running(name, folder / name, "full" in faults) as server:
            yield _load(Row(name, "none"), server.url(server.port), config, server=server)
            started = True
            for fault in faults:
                if fault == "refuse" and name != "http":
                    continue
                if fault == "full" and server.disk is None:
                    left_out.append(f"{name}, full disk: no file system of its own may be mounted here")
                    continue
                with ExitStack() as stack:
                    port = server.port
                    relay: servers.Relay | None = None
                    if fault == "reset":
                        relay = servers.Relay(_made(folder / f"{name}-relay"), server.port)
                        stack.callback(relay.stop)
                        relay.start()
                        port = relay.port
                    yield _load(Row(name, fault), server.url(port), config, _fault(fault, server, relay), server)
    except (SetupError, ImportError, OSError) as error:
        if started:
            yield Row(name, "", problems=[f"{type(error).__name__}: {error}"])
            return
        left_out.append(f"{name}: {error}")
        say(f"sinks: {name} is left out: {error}")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@dataclass
class _Fault:
    """What begins and ends it; ``again`` is called meanwhile."""

    begin: Callable[[], object]
    end: Callable[[], object]
    again: Callable[[], object] | None = None


def _fault(name: str, server: servers.Server, relay: servers.Relay | None) -> _Fault:
    if name == "kill":
        return _Fault(server.kill, server.start)
    if name == "hang":
        return _Fault(lambda: server.signal(signal.SIGSTOP), lambda: server.signal(signal.SIGCONT))
    if name == "refuse":
        return _Fault(*[lambda: server.signal(signal.SIGUSR1)] * 2)
    if name == "reset":
        assert relay is not None
        reset = relay.signal
        return _Fault(lambda: reset(signal.SIGUSR1), lambda: reset(signal.SIGUSR1), lambda: reset(signal.SIGUSR1))
    disk = server.disk
    assert disk is not None

    def free() -> None:
        disk.free()
        if server.alive() and not server.forgives:
            server.kill()
        if not server.alive():
            server.start()

    return _Fault(disk.fill, free)


class _Watch:
    """Looks at the load now and then: how long nothing was delivered, and what came after the fault."""

    def __init__(self) -> None:
        self.stall = self.now = 0.0
        self.recovered: float | None = None
        self.ended: float | None = None
        """When the fault ended."""
        self._delivered = self._moved = 0.0

    def sample(self, elapsed: float, stats: tempo.Stats) -> None:
        """Take a look."""
        self.now = elapsed
        if stats.delivered != self._delivered:
            self._delivered, self._moved = stats.delivered, elapsed
            if self.ended is not None and self.recovered is None:
                self.recovered = max(0.0, elapsed - self.ended)
        self.stall = max(self.stall, elapsed - self._moved)


def _load(
    row: Row, target: str, config: Config, fault: _Fault | None = None, server: servers.Server | None = None
) -> Row:
    """Load one sink, harm it meanwhile, read it back."""
    try:
        place = open_sink(target)
    except OSError as error:
        row.problems.append(f"cannot be opened: {error}")
        return row
    load, watch = Load(config, place), _Watch()
    worked = server.cpu_seconds() if server is not None else 0.0
    with nullcontext() if fault is None else _harming(fault, config.duration, watch, row):
        outcome = drive(config, config.duration, load, watch.sample, EVERY)
    seconds = outcome.load_seconds + (outcome.drain_seconds or 0.0)
    if server is not None and fault is None and seconds:
        row.server_cpu = (server.cpu_seconds() - worked) / seconds
    row.problems += outcome.problems
    row.interrupted = outcome.interrupted
    row.accepted = sum(load.accepted)
    row.delivered_per_second = sum(taken.events for taken in load.taken) / seconds if seconds else 0.0
    row.stall_seconds, row.recovery_seconds = watch.stall, watch.recovered
    _hold(row, outcome, config)
    if place is not None:
        row.in_sink = place.seconds / seconds / config.consumers
        row.client_cpu = place.cpu_seconds / seconds
        found = readback.of_place(place, load.accounts, config)
        row.problems += found.problems
        row.read = vars(found)
    return row


def _hold(row: Row, outcome: Outcome, config: Config) -> None:
    """Hold the load against its bounds."""
    if outcome.stats is not None:
        row.peak_buffered_bytes = outcome.stats.peak_buffered_bytes
        if row.peak_buffered_bytes > config.max_buffered_bytes:
            row.problems.append(f"{row.peak_buffered_bytes} bytes were buffered")
    bound = heap.bound(config)
    if row.held_bytes is not None and row.held_bytes > bound:
        row.problems.append(f"{row.held_bytes} bytes were held during the fault, more than {bound}")


@contextmanager
def _harming(fault: _Fault, duration: float, watch: _Watch, row: Row) -> Iterator[None]:
    """Begin the fault when a quarter of the load is over, and end it after another, on a thread of its own."""
    over = threading.Event()
    lasts = min(FAULT_SECONDS, duration / 4)

    def harm() -> None:
        try:
            if over.wait(duration / 4):
                return
            fault.begin()
            until = time.monotonic() + lasts
            while (left := until - time.monotonic()) > 0 and not over.wait(min(left, lasts / 10)):
                if fault.again is not None:
                    fault.again()
            row.held_bytes = _held()
            fault.end()
            watch.ended = watch.now
        except Exception as error:
            row.problems.append(f"the fault: {type(error).__name__}: {error}")

    thread = threading.Thread(target=harm, name="fault", daemon=True)
    if TRACED:
        tracemalloc.start()
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(servers.START + 30)
        if TRACED:
            tracemalloc.stop()
        if watch.ended is None:
            row.problems.append("the load was over before the fault")


def _held() -> int | None:
    """Return the bytes allocated by tempo and by what makes the events: the buffer, and what producers hold."""
    if not TRACED:
        return None
    own = [tracemalloc.Filter(True, f"*/{name}") for name in ("tempo.py", "soak/payloads.py")]
    gc.collect()  # exceptions of clients hold the batch that they were raised with
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(own).traces)


# -- Beside a hand-rolled batcher --------------------------------------------------------------------------------------


def _beside(folder: Path, chosen: Sequence[str]) -> dict[str, list[float]]:
    """Return how many times longer a batcher on queue.Queue takes than tempo, with the null and the file sink.

    To the file sink as lines, which it has to put together, and as bytes that it only has to write.
    """
    ratios: dict[str, list[float]] = {}
    wanted = [name for name in ("null", "file, lines", "file, bytes") if name.partition(",")[0] in chosen]
    for name in wanted * ROUNDS:
        seconds = {}
        for subject in (handover.tempo_handover, handover.queue_batcher):
            if name == "null":
                seconds[subject] = subject()
                continue
            path = folder / "beside"
            sink = FileSink(path)
            lines = name == "file, lines"
            seconds[subject] = subject(lines=sink.write_lines) if lines else subject(data=sink.write)
            sink.close()
            size = handover.COUNT * (micro.SIZE + lines)
            assert path.stat().st_size == size, f"{path.stat().st_size} bytes of {size}"
            path.unlink()
        ratios.setdefault(name, []).append(seconds[handover.queue_batcher] / seconds[handover.tempo_handover])
    return ratios


# -- For people --------------------------------------------------------------------------------------------------------


def _line(row: Row) -> str:
    words = [f"{row.sink}, {'no fault' if row.fault == 'none' else row.fault}: {row.delivered_per_second:,.0f}/s"]
    if row.read.get("read"):
        words.append(f"{row.read['lost']} lost, {row.read['repeated']} repeated of {row.accepted:,}")
    elif row.read:
        words.append("not read back")
    if row.recovery_seconds is not None:
        words.append(f"went on {format_seconds(row.recovery_seconds)} after the fault")
    words += [f"PROBLEM: {problem}" for problem in row.problems]
    return "; ".join(words)


def _summary(
    rows: Sequence[Row],
    left_out: Sequence[str],
    peers: dict[str, list[float]],
    written: Sequence[Path],
    interrupted: bool,
) -> str:
    """Return a table in Markdown, and what else there is to say."""
    failed = [row for row in rows if row.problems]
    word = "FAIL" if failed or not rows else "INTERRUPTED" if interrupted else "PASS"
    lines = [f"{word}: {len(rows) - len(failed)} of {len(rows)} loads well"]
    lines += [
        "",
        "| sink | fault | events/s | of bare | accepted | lost | repeated | bytes there | in deliver | client CPU"
        " | server CPU | longest stall | went on after |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        read = row.read if row.read.get("read") else {}
        there = row.read.get("nbytes")
        cells = [
            row.sink,
            row.fault,
            f"{row.delivered_per_second:,.0f}",
            "" if row.ratio is None else f"{row.ratio:.3f}",
            f"{row.accepted:,}",
            read.get("lost", ""),
            read.get("repeated", ""),
            "" if there is None else format_size(there),
            f"{row.in_sink:.0%}" if row.read else "",
            f"{row.client_cpu:.0%}" if row.read else "",
            "" if row.server_cpu is None else f"{row.server_cpu:.0%}",
            format_seconds(row.stall_seconds),
            "" if row.recovery_seconds is None else format_seconds(row.recovery_seconds),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append("")
    for name, ratios in peers.items():
        lines.append(
            f"{name}: a batcher on queue.Queue takes {statistics.median(ratios):.1f} times as long as tempo"
            f" ({min(ratios):.1f} to {max(ratios):.1f}, {len(ratios)} rounds)"
        )
    lines += [f"left out: {text}" for text in left_out]
    lines += [f"{row.sink}, {row.fault}: {problem}" for row in failed for problem in row.problems]
    lines.append(f"written: {', '.join(map(str, written)) or 'nothing'}")
    return "\n".join(lines)
