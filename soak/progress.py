# SPDX-License-Identifier: MIT
"""What a run shows while it lasts: a line on stderr now and then, and samples in a JSONL file that survives a crash."""

from __future__ import annotations

import json
import os
import sys
from io import FileIO
from pathlib import Path

import tempo
from soak import environment
from soak.config import Config
from soak.units import format_size

SAMPLE_SECONDS = 1.0
LINE_SECONDS = 5.0


def say(line: str) -> None:
    """Print one plain line on stderr, at once."""
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
    """Turns the dispatcher's snapshots into samples and lines."""

    def __init__(self, config: Config, stream: Stream | None) -> None:
        self.every = max(0.01, min(SAMPLE_SECONDS, config.duration / 20))
        self._line_every = min(LINE_SECONDS, config.duration / 4)
        self._line_due = self._line_every
        self._limit = config.max_buffered_bytes
        self._stream = stream
        # (elapsed, delivered) at the last sample and at the last line: the rates are those in between.
        self._sampled = (0.0, 0)
        self._shown = (0.0, 0)

    def sample(self, elapsed: float, stats: tempo.Stats) -> None:
        """Take one snapshot, ``elapsed`` seconds after the load began."""
        rss = environment.current_rss()
        if self._stream is not None:
            self._stream.write(
                {
                    "type": "sample",
                    "elapsed": round(elapsed, 6),
                    "delivered_per_second": _rate(self._sampled, (elapsed, stats.delivered)),
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
        if elapsed >= self._line_due:
            self._line_due = max(self._line_due + self._line_every, elapsed)
            self._show(elapsed, stats, rss)

    def _show(self, elapsed: float, stats: tempo.Stats, rss: int | None) -> None:
        rate = _rate(self._shown, (elapsed, stats.delivered))
        self._shown = (elapsed, stats.delivered)
        say(
            f"[{elapsed:7.1f} s] {rate:>11,.0f}/s  accepted {stats.accepted:,}  delivered {stats.delivered:,}"
            f"  buffer {100 * stats.buffered_bytes / self._limit:3.0f} %  refused {stats.rejected:,}"
            f"  RSS {'?' if rss is None else format_size(rss)}"
        )


def _rate(before: tuple[float, int], now: tuple[float, int]) -> float:
    seconds = now[0] - before[0]
    return round((now[1] - before[1]) / seconds, 1) if seconds > 0 else 0.0
