# SPDX-License-Identifier: MIT
"""Where consumers put batches: nowhere, or newline-delimited into a file."""

from __future__ import annotations

import os
import stat
import threading
from typing import Protocol

import tempo

_AVAILABLE = "null or file:PATH"
_PLANNED = ("http", "https", "redis", "postgresql")


class Sink(Protocol):
    """A place for batches. Consumers call ``deliver`` from several threads."""

    def deliver(self, batch: tempo.Batch) -> None:
        """Put every event of ``batch`` into the place, once. Raises OSError when it cannot."""

    def finish(self, delivered: int) -> str | None:
        """Close, and read back whether ``delivered`` events arrived. Return a problem in one line, or None."""


def parse_sink(text: str) -> str:
    """Return ``text`` when it names a sink that there is; raise ValueError with what there is otherwise."""
    scheme, colon, path = text.partition(":")
    if text == "null" or (scheme == "file" and path and "\0" not in path):
        return text
    if scheme == "file":
        raise ValueError(f"{text!r} names no file (available: {_AVAILABLE})")
    if colon and scheme in _PLANNED:
        raise ValueError(f"{text!r}: sinks of the kind {scheme} are not built yet (available: {_AVAILABLE})")
    raise ValueError(f"{text!r} is not a sink (available: {_AVAILABLE})")


def open_sink(text: str) -> Sink | None:
    """Return the sink of a checked ``text``, empty; None for the null sink. Raises OSError when it cannot be opened."""
    return None if text == "null" else FileSink(text.partition(":")[2])


class FileSink:
    """Appends each batch to a file in one write, each event followed by a newline."""

    def __init__(self, path: str) -> None:
        self._path = path
        # Held over a write: a write that the system cuts short is continued, and nobody else's may come in between.
        self._lock = threading.Lock()
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by finish()
        self._regular = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        if self._regular:
            self._file.truncate(0)

    def deliver(self, batch: tempo.Batch) -> None:
        """Append a batch."""
        lines = batch.tolist()
        lines.append(b"")
        text = memoryview(b"\n".join(lines))
        with self._lock:
            while text:
                text = text[self._file.write(text) or 0 :]

    def finish(self, delivered: int) -> str | None:
        """Close the file and count its lines. A device or a pipe cannot be read back."""
        self._file.close()
        if not self._regular:
            return None
        lines = 0
        with open(self._path, "rb", buffering=0) as file:
            while block := file.read(1 << 20):
                lines += block.count(b"\n")
        return None if lines == delivered else f"sink {self._path} holds {lines} lines of {delivered} delivered events"
