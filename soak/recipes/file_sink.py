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

    While the disk is full, the write is tried again for ``patience`` seconds; then what there is of the batch is taken
    out of the file again and OSError raised. With ``fsync`` a batch is on the disk when ``deliver`` returns. A batch
    that would take the file over ``rotate_bytes`` begins a new one; the old one is renamed to PATH.000001 and so on.
    """

    def __init__(
        self, path: str | Path, *, rotate_bytes: int | None = None, fsync: bool = False, patience: float = 60.0
    ) -> None:
        """Open the file for appending. Raises OSError."""
        self.path = Path(path)
        self._rotate_bytes, self._fsync, self._patience = rotate_bytes, fsync, patience
        self._lock = threading.Lock()
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._regular = self.path.is_file()

    def deliver(self, batch: tempo.Batch) -> None:
        """Append a batch. Raises OSError when it cannot; nothing of the batch is in the file then."""
        text = b"".join(payload.replace(b"\n", b" ") + b"\n" for payload in batch.tolist())
        with self._lock:
            size = os.fstat(self._file.fileno()).st_size
            if self._rotate_bytes is not None and size and size + len(text) > self._rotate_bytes:
                self._rotate()
                size = 0
            try:
                self._append(memoryview(text))
            except BaseException:
                if self._regular:
                    self._file.truncate(size)
                raise

    def _append(self, text: memoryview) -> None:
        deadline = time.monotonic() + self._patience
        while text:
            try:
                text = text[os.write(self._file.fileno(), text) :]
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                if not (full and self._regular) or time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)
        if self._fsync:
            os.fsync(self._file.fileno())

    def _rotate(self) -> None:
        """Begin a new file. It is opened under another name first: a failure leaves all as it was."""
        old, new = rotated(self.path), self.path.with_name(f"{self.path.name}.new")
        number, full = int(old[-1].suffix[1:]) + 1 if old else 1, self._file
        self._file = open(new, "ab", buffering=0)  # noqa: SIM115
        full.close()
        self.path.rename(self.path.with_name(f"{self.path.name}.{number:06d}"))
        new.rename(self.path)

    def close(self) -> None:
        self._file.close()


def rotated(path: str | Path) -> list[Path]:
    """Return the files that were full, the oldest first."""
    current = Path(path)
    return sorted(current.parent.glob(glob.escape(current.name) + "." + "[0-9]" * 6))
