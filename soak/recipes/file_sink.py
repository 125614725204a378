# SPDX-License-Identifier: MIT
"""Batches into a file, an event a line. This file can be copied into a project as it is."""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
import time
from pathlib import Path

import tempo

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a write that may succeed later."""
PAUSES = (0.05, 1.0)
"""Seconds between tries while the disk is full: the first, doubled each time, up to the second."""


class FileSink:
    """Appends each batch in one write, newline-delimited: NDJSON, when each payload is a JSON text.

    A newline within a payload becomes a space: between the tokens of a JSON text that changes nothing, and within its
    strings there is none. Other payloads must be without newlines. With ``terminated``, payloads are lines already,
    each with its newline, and the batch is written as it lies in memory, without a copy.

    While the disk is full, the write is tried again, for ``patience`` seconds in all; then what there is of the batch
    is taken out of the file again and OSError raised. So the file never holds a batch twice, and only whole ones,
    unless the process is killed in the middle of a write: then the last line may be torn. With ``fsync`` a batch is on
    the disk when ``deliver`` returns, without it in the system's hands.

    ``rotate_bytes``: a batch that would take the file over this size begins a new one; the old one is renamed to
    PATH.000001, PATH.000002 and so on, rising. ``keep``: the oldest of these beyond so many are deleted.

    Any thread may call it; one batch is written at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        rotate_bytes: int | None = None,
        keep: int | None = None,
        fsync: bool = False,
        terminated: bool = False,
        patience: float = 60.0,
    ) -> None:
        """Open the file for appending. Raises ValueError for limits below 1, OSError when it cannot be opened."""
        for name, value in (("rotate_bytes", rotate_bytes), ("keep", keep)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, not {value!r}")
        self.path = Path(path)
        self._rotate_bytes, self._keep, self._fsync, self._patience = rotate_bytes, keep, fsync, patience
        self._terminated = terminated
        self._lock = threading.Lock()
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        status = os.fstat(self._fd)
        self._regular = stat.S_ISREG(status.st_mode)
        self._size = status.st_size if self._regular else 0

    def deliver(self, batch: tempo.Batch) -> None:
        """Append a batch. Raises OSError when it cannot; nothing of the batch is in the file then."""
        if self._terminated:
            self.write(batch.data)
        else:
            self.write_lines(batch.tolist())

    def write_lines(self, lines: list[bytes]) -> None:
        """Append lines that have no newline yet, as a batch; the list is the sink's from then on."""
        events = len(lines)
        lines.append(b"")
        text = b"\n".join(lines)
        if text.count(b"\n") != events:
            text = b"\n".join([line.replace(b"\n", b" ") for line in lines])
        self.write(memoryview(text))

    def write(self, text: memoryview) -> None:
        """Append bytes as they are, as a batch."""
        with self._lock:
            if self._rotate_bytes is not None and self._size > 0 and self._size + len(text) > self._rotate_bytes:
                self._rotate()
            self._append(text)

    def _append(self, text: memoryview) -> None:
        deadline = time.monotonic() + self._patience
        pause = PAUSES[0]
        done = 0
        try:
            while done < len(text):
                try:
                    done += os.write(self._fd, text[done:])
                    pause = PAUSES[0]
                except OSError as error:
                    if not self._regular or error.errno not in FULL or time.monotonic() >= deadline:
                        raise
                    time.sleep(pause)
                    pause = min(2 * pause, PAUSES[1])
            if self._fsync:
                os.fsync(self._fd)
        except BaseException:
            if self._regular:
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(text)

    def _rotate(self) -> None:
        """Begin a new file. The new one is opened before the old one is let go: a failure leaves all as it was."""
        old = rotated(self.path)
        number = int(old[-1].suffix[1:]) + 1 if old else 1
        aside = self.path.with_name(f"{self.path.name}.{number:06d}")
        os.rename(self.path, aside)
        before = self._fd
        try:
            self._open()
        except OSError:
            os.rename(aside, self.path)
            raise
        os.close(before)
        for path in rotated(self.path)[: -self._keep] if self._keep is not None else ():
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def rotated(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files that were full, the oldest first."""
    current = Path(path)
    name = re.compile(re.escape(current.name) + r"\.\d{6,}")
    found = [beside for beside in current.parent.iterdir() if name.fullmatch(beside.name)]
    return sorted(found, key=lambda beside: int(beside.suffix[1:]))
