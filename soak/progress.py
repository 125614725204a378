# SPDX-License-Identifier: MIT
"""What a run shows while it lasts, and samples in a JSONL file that survives a crash.

On a terminal, where rich is installed, a live display; elsewhere a plain line on stderr every five seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import tempo
from soak import environment
from soak.config import Config
from soak.units import format_seconds, format_size

SAMPLE_SECONDS = 1.0
LINE_SECONDS = 5.0


def say(line: str) -> None:
    """Print one plain line on stderr, at once. Where that is full or closed, there is nowhere left to say so."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class Stream:
    """A JSONL file, each line on the disk before ``write`` returns. After a failure it is closed and stays so."""

    def __init__(self, path: Path) -> None:
        """Create the file, which must not be there yet. Raises OSError."""
        self.path = path
        self.error: OSError | None = None
        self._file: FileIO | None = FileIO(path, "x")

    def write(self, line: dict[str, object]) -> None:
        """Append one line; keep an OSError in ``error`` instead of raising it, because the load goes on without."""
        if self._file is None:
            return
        text = memoryview(json.dumps(line).encode() + b"\n")
        try:
            while text:
                text = text[self._file.write(text) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self.error = error
            self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


class Monitor:
    """Turns the dispatcher's snapshots into samples and lines. A context manager, for as long as the load lasts."""

    def __init__(self, config: Config, stream: Stream | None, seconds: float | None = None) -> None:
        """seconds: how long the load lasts, when that is not as configured."""
        self._seconds = config.duration if seconds is None else seconds
        self.every = max(0.01, min(SAMPLE_SECONDS, self._seconds / 20))
        self._line_every = min(LINE_SECONDS, self._seconds / 4)
        self._line_due = self._line_every
        self._limit = config.max_buffered_bytes
        self._stream = stream
        # (elapsed, delivered) at the last sample and at the last line: the rates are those in between.
        self._sampled = (0.0, 0)
        self._shown = (0.0, 0)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Show no more."""

    def sample(self, elapsed: float, stats: tempo.Stats) -> None:
        """Take one snapshot, ``elapsed`` seconds after the load began."""
        rss = environment.current_rss()
        rate = _rate(self._sampled, (elapsed, stats.delivered))
        if self._stream is not None:
            self._stream.write(
                {
                    "type": "sample",
                    "elapsed": round(elapsed, 6),
                    "delivered_per_second": rate,
                    "accepted": stats.accepted,
                    "delivered": stats.delivered,
                    "rejected": stats.rejected,
                    "buffered": stats.buffered,
                    "buffered_bytes": stats.buffered_bytes,
                    "buffered_share": stats.buffered_bytes / self._limit,
                    "batches": stats.batches,
                    "waiting_producers": stats.waiting_producers,
                    "rss_bytes": rss,
                }
            )
        self._sampled = (elapsed, stats.delivered)
        with contextlib.suppress(OSError):  # a terminal that is gone: the load goes on without
            self._show(elapsed, stats, rss, rate)

    def _show(self, elapsed: float, stats: tempo.Stats, rss: int | None, rate: float) -> None:
        """Print a line when it is time for one; its rate is that since the last line."""
        if elapsed < self._line_due:
            return
        self._line_due = max(self._line_due + self._line_every, elapsed)
        rate = _rate(self._shown, (elapsed, stats.delivered))
        self._shown = (elapsed, stats.delivered)
        say(
            f"[{elapsed:7.1f} s] {rate:>11,.0f}/s  accepted {stats.accepted:,}  delivered {stats.delivered:,}"
            f"  buffer {100 * stats.buffered_bytes / self._limit:3.0f} %  refused {stats.rejected:,}"
            f"  RSS {'?' if rss is None else format_size(rss)}"
        )


class LiveMonitor(Monitor):
    """A monitor that shows the last snapshot in place, with rich."""

    def __init__(self, config: Config, stream: Stream | None, seconds: float | None, heap: int | None) -> None:
        """heap: the traced peak (bytes) of the pass before, which the load itself cannot measure.

        Raises ImportError without rich.
        """
        super().__init__(config, stream, seconds)
        self.every = min(self.every, 0.5)
        self._heap = heap
        self._progress: Any = importlib.import_module("rich.progress_bar")
        self._table: Any = importlib.import_module("rich.table")
        console = importlib.import_module("rich.console").Console(stderr=True)
        self._live: Any = importlib.import_module("rich.live").Live(console=console, auto_refresh=False)

    def __enter__(self) -> LiveMonitor:
        self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Leave the last display where it is."""
        with contextlib.suppress(OSError):
            self._live.__exit__(kind, exc, tb)

    def _show(self, elapsed: float, stats: tempo.Stats, rss: int | None, rate: float) -> None:
        left = max(0.0, self._seconds - elapsed)
        share = stats.buffered_bytes / self._limit
        table = self._table.Table.grid(padding=(0, 2))
        bar = self._progress.ProgressBar
        heap = "not measured" if self._heap is None else format_size(self._heap)
        refused = "[red]" if stats.rejected else ""
        for name, value, picture in (
            ("rate", f"[bold]{rate:,.0f}[/bold] events/s", ""),
            ("delivered", f"{stats.delivered:,}", f"in {stats.batches:,} batches"),
            (
                "buffer",
                f"{100 * share:.0f} % of {format_size(self._limit)}",
                bar(total=1.0, completed=min(1.0, share), width=30),
            ),
            ("memory", f"{'?' if rss is None else format_size(rss)} resident", f"heap at most {heap} (traced pass)"),
            ("refused", f"{refused}{stats.rejected:,}", f"{stats.waiting_producers} producers wait for room"),
            (
                "time left",
                format_seconds(left) if left >= 1 else "0 s",
                bar(total=self._seconds, completed=min(elapsed, self._seconds), width=30),
            ),
        ):
            table.add_row(name, value, picture)
        self._live.update(table, refresh=True)


DISPLAYS = ("auto", "live", "plain", "none")


class SilentMonitor(Monitor):
    """A monitor that shows nothing: its samples go to the stream alone."""

    def _show(self, elapsed: float, stats: tempo.Stats, rss: int | None, rate: float) -> None:
        pass


def open_monitor(
    display: str, config: Config, stream: Stream | None, seconds: float | None = None, heap: int | None = None
) -> Monitor:
    """Return the monitor that --display asks for; ``auto`` is live on a terminal where rich is installed.

    Where a live one was asked for and cannot be had, a line says so and it is a plain one.
    """
    if display == "none":
        return SilentMonitor(config, stream, seconds)
    if display == "live" or (display == "auto" and sys.stderr.isatty()):
        try:
            return LiveMonitor(config, stream, seconds, heap)
        except ImportError:
            say("no live display: rich is not installed")
    return Monitor(config, stream, seconds)


def _rate(before: tuple[float, int], now: tuple[float, int]) -> float:
    seconds = now[0] - before[0]
    return round((now[1] - before[1]) / seconds, 1) if seconds > 0 else 0.0
