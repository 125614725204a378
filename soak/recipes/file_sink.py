# SPDX-License-Identifier: MIT
"""Batches into a file, an event a line. Needs the standard library alone."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from pathlib import Path

import tempo

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a write that may succeed later."""


class FileSink:
    """Appends each batch in one write, newline-delimited: NDJSON, when each payload is a JSON text. A newline within a
    payload becomes a space, which changes nothing between the tokens of a JSON text.

    While the disk is full, the write is tried again for ``patience`` seconds; then what there is of the batch is taken
    out of the file again and OSError raised. So the file never holds a batch twice, and only whole ones, unless the
    process is killed in the middle of a write: then the last line may be torn. With ``fsync`` a batch is on the disk
    when ``deliver`` returns, otherwise in the system's hands.

    ``rotate_bytes``: a batch that would take the file over this size begins a new one; the old one is renamed to
    PATH.000001, PATH.000002 and so on. ``keep``: the oldest of these beyond so many are deleted.

    Any thread may call it; one batch is written at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        rotate_bytes: int | None = None,
        keep: int | None = None,
        fsync: bool = False,
        patience: float = 60.0,
    ) -> None:
        """Open the file for appending. Raises OSError."""
        self.path = Path(path)
        self._rotate_bytes, self._keep, self._fsync, self._patience = rotate_bytes, keep, fsync, patience
        self._lock = threading.Lock()
        self._fd = self._open()

    def _open(self) -> int:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._regular = self.path.is_file()
        self._size = os.fstat(fd).st_size
        return fd

    def deliver(self, batch: tempo.Batch) -> None:
        """Append a batch. Raises OSError when it cannot; nothing of the batch is in the file then."""
        lines = batch.tolist()
        text = b"\n".join([*lines, b""])
        if text.count(b"\n") != len(lines):
            text = b"\n".join([*(line.replace(b"\n", b" ") for line in lines), b""])
        with self._lock:
            if self._rotate_bytes is not None and self._size and self._size + len(text) > self._rotate_bytes:
                self._rotate()
            self._append(memoryview(text))

    def _append(self, text: memoryview) -> None:
        deadline, pause, done = time.monotonic() + self._patience, 0.05, 0
        try:
            while done < len(text):
                try:
                    done += os.write(self._fd, text[done:])
                    pause = 0.05
                except OSError as error:
                    if not self._regular or error.errno not in FULL or time.monotonic() >= deadline:
                        raise
                    time.sleep(pause)
                    pause = min(2 * pause, 1.0)
            if self._fsync:
                os.fsync(self._fd)
        except BaseException:
            if self._regular:
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(text)

    def _rotate(self) -> None:
        """Begin a new file. The new one is opened before the old one is let go: a failure leaves all as it was."""
        old, before = rotated(self.path), self._fd
        number = int(old[-1].suffix[1:]) + 1 if old else 1
        aside = self.path.with_name(f"{self.path.name}.{number:06d}")
        os.rename(self.path, aside)
        try:
            self._fd = self._open()
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
    found = [file for file in current.parent.iterdir() if name.fullmatch(file.name)]
    return sorted(found, key=lambda file: int(file.suffix[1:]))
