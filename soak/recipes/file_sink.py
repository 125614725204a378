# SPDX-License-Identifier: MIT
"""Batches into a file, an event a line. Needs the standard library alone."""

import errno
import glob
import os
import threading
import time
from pathlib import Path

import tempo


class FileSink:
    """Appends each batch, an event a line; a newline within a payload becomes a space. Any thread may call it.

    The file is open only while a batch is written: whoever renames it gets a new one. While the disk is full, the write
    is tried again for ``patience`` seconds; then what there is of the batch is taken out of the file again and OSError
    raised. With ``fsync`` a batch is on the disk when ``deliver`` returns. A batch that would take the file over
    ``rotate_bytes`` begins a new one; the old one is renamed to PATH.000001 and so on.
    """

    def __init__(
        self, path: str | Path, *, rotate_bytes: int | None = None, fsync: bool = False, patience: float = 60.0
    ) -> None:
        self.path = Path(path)
        self._rotate_bytes, self._fsync, self._patience = rotate_bytes, fsync, patience
        self._lock = threading.Lock()
        open(self.path, "ab").close()  # raises OSError now rather than with the first batch

    def deliver(self, batch: tempo.Batch) -> None:
        """Append a batch. Raises OSError when it cannot; nothing of the batch is in the file then."""
        text = b"".join(payload.replace(b"\n", b" ") + b"\n" for payload in batch.tolist())
        with self._lock:
            size = self.path.stat().st_size if self.path.exists() else 0
            if self._rotate_bytes is not None and size and size + len(text) > self._rotate_bytes:
                self._rotate()
            with open(self.path, "ab", buffering=0) as file:
                size, regular = os.fstat(file.fileno()).st_size, self.path.is_file()
                try:
                    self._append(file.fileno(), memoryview(text), self._patience if regular else 0.0)
                except BaseException:
                    if regular:
                        file.truncate(size)
                    raise

    def _append(self, fd: int, text: memoryview, patience: float) -> None:
        deadline = time.monotonic() + patience
        while text:
            try:
                text = text[os.write(fd, text) :]
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)
        if self._fsync:
            os.fsync(fd)

    def _rotate(self) -> None:
        old = rotated(self.path)
        number = int(old[-1].suffix[1:]) + 1 if old else 1
        self.path.rename(self.path.with_name(f"{self.path.name}.{number:06d}"))

    def close(self) -> None:
        """Do nothing: no file is open."""


def rotated(path: str | Path) -> list[Path]:
    """Return the files that were full, the oldest first."""
    current = Path(path)
    return sorted(current.parent.glob(glob.escape(current.name) + "." + "[0-9]" * 6))
