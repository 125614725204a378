# SPDX-License-Identifier: MIT
"""What a run shows while it lasts, and its samples, a JSONL file that survives a crash."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from io import FileIO
from pathlib import Path
from typing import Any

import tempo
from soak import environment
from soak.cli import format_seconds, format_size, say
from soak.config import Config

DISPLAYS = ("auto", "live", "plain", "none")


class Stream:
    """A JSONL file; each line is on the disk before ``write`` returns. After a failure it is closed and stays so."""

    def __init__(self, path: Path) -> None:
        """Create the file. Raises OSError, also when it exists."""
        self.path = path
        self.error: OSError | None = None
        self._file = FileIO(path, "x")

    def write(self, line: dict[str, object]) -> None:
        """Append one line; keep an OSError in ``error``, because the load goes on."""
        if self.error is not None:
            return
        text = memoryview(json.dumps(line).encode() + b"\n")
        try:
            while text:
                text = text[self._file.write(text) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self.error = error

    def close(self) -> None:
        self._file.close()


class Monitor:
    """Turns the dispatcher's snapshots into samples and lines. A context manager for the length of the load."""

    def __init__(
        self, show: str, config: Config, stream: Stream | None, seconds: float, heap: int | None = None
    ) -> None:
        """show: of DISPLAYS; auto is live on a terminal, and live without rich is plain. heap: of the traced pass."""
        self._config, self._stream, self._seconds, self._heap = config, stream, seconds, heap
        self._sampled = (0.0, 0)  # (elapsed, delivered) at the last sample: the rate is that since then
        self._live: Any = None
        if show == "live" or (show == "auto" and sys.stderr.isatty()):
            try:
                console = importlib.import_module("rich.console").Console(stderr=True)
                self._live = importlib.import_module("rich.live").Live(console=console, auto_refresh=False)
            except ImportError:
                say("no live display: rich is not installed")
        self.every = max(0.01, min(0.5 if self._live else 1.0, seconds / 20))
        self._line_every = self._line_due = float("inf") if show == "none" else min(5.0, seconds / 4)

    def __enter__(self) -> Monitor:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the last display where it is."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.__exit__(*error)

    def sample(self, elapsed: float, stats: tempo.Stats) -> None:
        """Take one snapshot, ``elapsed`` seconds after the load began."""
        rss = environment.current_rss()
        share = stats.buffered_bytes / self._config.max_buffered_bytes
        seconds = elapsed - self._sampled[0]
        rate = round((stats.delivered - self._sampled[1]) / seconds, 1) if seconds > 0 else 0.0
        self._sampled = (elapsed, stats.delivered)
        names = ("accepted", "delivered", "rejected", "buffered", "buffered_bytes", "batches", "waiting_producers")
        figures = {name: getattr(stats, name) for name in names}
        head = {"type": "sample", "elapsed": round(elapsed, 6), "delivered_per_second": rate}
        if self._stream is not None:
            self._stream.write({**head, **figures, "buffered_share": share, "rss_bytes": rss})
        if self._live is not None:
            with contextlib.suppress(OSError):  # a terminal that is gone: the load goes on
                self._live.update(self._table(elapsed, stats, rss, rate, share), refresh=True)
        elif elapsed >= self._line_due:
            self._line_due = max(self._line_due + self._line_every, elapsed)
            say(
                f"[{elapsed:7.1f} s] {rate:>11,.0f}/s  accepted {stats.accepted:,}  delivered {stats.delivered:,}"
                f"  buffer {share:4.0%}  refused {stats.rejected:,}  RSS {format_size(rss)}"
            )

    def _table(self, elapsed: float, stats: tempo.Stats, rss: int | None, rate: float, share: float) -> Any:
        table = importlib.import_module("rich.table").Table.grid(padding=(0, 2))
        bar = importlib.import_module("rich.progress_bar").ProgressBar
        left, limit = max(0.0, self._seconds - elapsed), format_size(self._config.max_buffered_bytes)
        table.add_row("rate", f"[bold]{rate:,.0f}[/bold] events/s", "")
        table.add_row("delivered", f"{stats.delivered:,}", f"in {stats.batches:,} batches")
        table.add_row("buffer", f"{share:.0%} of {limit}", bar(total=1.0, completed=share, width=30))
        table.add_row("memory", f"{format_size(rss)} resident", f"peak heap {format_size(self._heap)} (traced pass)")
        table.add_row("refused", f"{stats.rejected:,}", f"{stats.waiting_producers} producers wait for room")
        table.add_row("time left", format_seconds(left) if left >= 1 else "0 s", bar(self._seconds, elapsed, 30))
        return table
