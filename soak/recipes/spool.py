# SPDX-License-Identifier: MIT
"""A durable fallback for tempo: records that find no room, or cannot be delivered, wait in a local SQLite file.

    spool = Spool("events.spool", max_bytes=256 * tempo.MiB)

    def handler(batch):
        send(batch.tolist())                # raises when it could not
        spool.replay(send)                  # it could: some of what waits in the file goes, too

    d.start(handler, on_error=lambda exc, batch: spool.put(batch))
    spool.enqueue(d, b"event")              # into the dispatcher, or into the file where that is full
    ...
    try:
        d.shutdown(timeout=5.0)
    except tempo.DrainTimeout as exc:
        for batch in exc.undelivered:       # likewise what stop() returns
            spool.put(batch)

**At least once**: what the file has taken leaves it when ``send`` returned. The last records may be sent again after
a kill, and a batch whose handler then fails in ``replay``. What is only in the dispatcher's memory is lost with the
process; a loss of power can take the file's last records too (``PRAGMA synchronous=FULL`` prevents that). What goes
through the file comes later. Call ``replay`` at the start, too, and when nothing else is sent.
"""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import tempo

AT_ONCE = 256 * tempo.KiB  # how much of the file ``replay`` sends in one call, or one record, if that is larger
_SETUP = f"""
    PRAGMA journal_mode=WAL;
    PRAGMA synchronous=NORMAL;
    PRAGMA journal_size_limit={4 * tempo.MiB};
    CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
"""


class SpoolError(tempo.Error):
    """The file cannot be used. `.rest` are the records that are not in it, and remain with the caller."""

    rest: Sequence[bytes] = ()


class SpoolFull(SpoolError):
    """There is no room in the file, or on the disk."""


class Spool:
    """A bounded first-in-first-out file of records, for any thread, but not for signal handlers and finalizers. One
    process at a time has the file; a forked child opens its own.

    max_bytes: of the file, in pages of 4 KiB, two at least. SQLite's log comes in addition, some MiB.

    Raises: ValueError: a bad max_bytes. SpoolError: the file cannot be opened, is no spool, or is in use.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be > 0, not {max_bytes}")
        self.path = os.path.abspath(path)  # chdir changes nothing, and no name means something else to SQLite
        self.max_bytes = max_bytes
        self._process = os.getpid()
        self._replaying = threading.Lock()
        self._lock = threading.RLock()  # covers the connection
        with contextlib.ExitStack() as opened:
            try:
                # An open transaction is a lock that ends with the process, however that ends; no child inherits it.
                owner = sqlite3.connect(f"{self.path}-owner", timeout=0, check_same_thread=False)
                opened.callback(owner.close)
                owner.execute("BEGIN EXCLUSIVE")
                self._db = sqlite3.connect(self.path, isolation_level="IMMEDIATE", check_same_thread=False)
                opened.callback(self._db.close)
                if self._ask("SELECT count(*) FROM sqlite_master WHERE name <> 'records'"):
                    raise SpoolError(f"cannot open {self.path}: it is a database, but no spool")
                self._db.executescript(_SETUP)
                self._db.execute(f"PRAGMA max_page_count={max_bytes // self._ask('PRAGMA page_size') or 1}")
            except sqlite3.Error as exc:
                why = "in use by another Spool" if "locked" in str(exc) else str(exc)
                raise SpoolError(f"cannot open {self.path}: {why}") from exc
            self._opened = opened.pop_all()

    def put(self, records: Iterable[bytes | memoryview]) -> int:
        """Take all records (a batch), in order, or none; return how many. On return they are in the file.

        Raises: SpoolFull, SpoolError: nothing was taken; `.rest` are the records.
        """
        owned = [memoryview(record).tobytes() for record in records]
        try:
            with self._transaction():
                self._db.executemany("INSERT INTO records (data) VALUES (?)", zip(owned))
        except SpoolError as exc:
            exc.rest = owned
            raise
        return len(owned)

    def enqueue(self, dispatcher: tempo.Dispatcher, payload: bytes, timeout: float | None = 0.0) -> bool:
        """Do as `enqueue_many`; return whether the dispatcher accepted the record."""
        return self.enqueue_many(dispatcher, [payload], timeout) == 1

    def enqueue_many(self, dispatcher: tempo.Dispatcher, payloads: Iterable[bytes], timeout: float | None = 0.0) -> int:
        """Give records to the dispatcher, and take into the file those that it refuses; return how many it accepted.

        Raises: PayloadTooLarge, and what `put` raises, with `.accepted`: so many were accepted by the dispatcher, and
            none of the others was taken.
        """
        records = list(payloads)
        try:
            return dispatcher.enqueue_many(records, timeout)
        except (tempo.QueueFull, tempo.Closed) as exc:
            accepted = exc.accepted
        try:
            self.put(records[accepted:])
        except SpoolError as exc:
            exc.accepted = accepted
            raise
        return accepted

    def replay(self, send: Callable[[list[bytes]], object]) -> int:
        """Send the oldest records, AT_ONCE bytes at most; return how many: 0 when none waits, or while another replays.

        Raises: what `send` raises: all stay in the file. SpoolError: they could not be deleted, and will be sent again.
        """
        if not self._replaying.acquire(blocking=False):
            return 0
        try:
            records: list[bytes] = []
            last = nbytes = 0
            with self._transaction():
                for number, data in self._db.execute("SELECT id, data FROM records ORDER BY id"):
                    nbytes += len(data)
                    if records and nbytes > AT_ONCE:
                        break
                    records.append(data)
                    last = number
            if records:
                send(records)
                with self._transaction():
                    self._db.execute("DELETE FROM records WHERE id <= ?", (last,))
            return len(records)
        finally:
            self._replaying.release()

    def __len__(self) -> int:
        """How many records the file holds."""
        with self._transaction():  # first in, first out: there are no gaps
            return self._ask("SELECT coalesce((SELECT max(id) FROM records) - (SELECT min(id) FROM records) + 1, 0)")

    @property
    def nbytes(self) -> int:
        """How much of `max_bytes` is taken."""
        with self._transaction():
            used = self._ask("PRAGMA page_count") - self._ask("PRAGMA freelist_count")
            return used * self._ask("PRAGMA page_size")

    def close(self) -> None:
        """Close the file; what it holds is for whoever opens it next. Idempotent. In a forked child: nothing."""
        if self._process == os.getpid():
            with self._lock:
                self._opened.close()

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, query: str) -> int:
        (answer,) = self._db.execute(query).fetchone()
        return int(answer)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Hold the lock; all of it or nothing, whatever ends it. Turn SQLite's errors into SpoolError."""
        if self._process != os.getpid():  # asked first: the lock may be held by a thread that is not here
            raise SpoolError(f"{self.path} was opened in process {self._process}: let a child open its own")
        with self._lock:
            try:
                if self._db.in_transaction:
                    raise SpoolError(f"{self.path} was called by what interrupted it")
                with self._db:
                    yield
            except sqlite3.Error as exc:
                kind = SpoolFull if "full" in str(exc) else SpoolError  # error codes came with 3.11
                raise kind(f"{self.path}: {exc}") from exc
