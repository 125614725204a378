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
from collections.abc import Callable, Iterable, Iterator

import tempo

RECORD_OVERHEAD = 16  # bytes that a record counts in addition to its own: what SQLite takes for a row
AT_ONCE = 256 * tempo.KiB  # how much of the file ``replay`` sends in one call, or one record, if that is larger
_APPLICATION = 0x74706F73  # SQLite's application_id: says that a file is a spool


class SpoolError(tempo.Error):
    """The file cannot be used. `.rest` are the records that are not in it, and remain with the caller."""

    def __init__(self, message: str, rest: list[bytes] | None = None) -> None:
        super().__init__(message)
        self.rest = rest or []


class SpoolFull(SpoolError):
    """There is no room in the file, or on the disk."""


class Spool:
    """A bounded first-in-first-out file of records, for any thread, but not for signal handlers and finalizers. One
    process at a time has the file; a forked child opens its own.

    max_bytes: of records, each counted with RECORD_OVERHEAD more. SQLite's log comes in addition, some MiB.

    Raises: ValueError: a bad max_bytes. SpoolError: the file cannot be opened, is no spool, or is in use.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be > 0, not {max_bytes}")
        self.path = os.path.abspath(path)  # chdir changes nothing, and no name means something else to SQLite
        self.max_bytes = max_bytes
        self._process = os.getpid()
        self._replaying = threading.Lock()
        self._lock = threading.RLock()  # covers everything below
        self._closed = False
        self._held: tuple[int, int] | None = None  # records in the file and what they count; None: to be counted
        with contextlib.ExitStack() as undo:
            try:
                # An open transaction is a lock that ends with the process, however that ends; no child inherits it.
                self._owner = sqlite3.connect(f"{self.path}-owner", timeout=0, check_same_thread=False)
                undo.callback(self._owner.close)
                self._owner.execute("BEGIN EXCLUSIVE")
                self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
                undo.callback(self._db.close)
                self._prepare()
            except sqlite3.Error as exc:
                why = "in use by another Spool" if "locked" in str(exc) else str(exc)
                raise SpoolError(f"cannot open {self.path}: {why}") from exc
            undo.pop_all()

    def _prepare(self) -> None:
        """Make a new file a spool, or see that it is one."""
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        if application != _APPLICATION and self._db.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
            raise SpoolError(f"cannot open {self.path}: it is a database, but no spool")
        for statement in (
            "PRAGMA journal_mode=WAL",
            "PRAGMA synchronous=NORMAL",
            f"PRAGMA journal_size_limit={4 * tempo.MiB}",
            "BEGIN IMMEDIATE",  # a process killed in between leaves an empty file
            "CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY, data BLOB NOT NULL)",
            f"PRAGMA application_id={_APPLICATION}",
            "COMMIT",
        ):
            self._db.execute(statement)

    def put(self, records: Iterable[bytes | memoryview]) -> int:
        """Take all records (a batch), in order, or none; return how many. On return they are in the file.

        Raises: SpoolFull, SpoolError: nothing was taken; `.rest` are the records.
        """
        owned = _own(records)
        charge = _charge(owned)
        with self._section(owned):
            held = self._totals()[1]
            if held + charge > self.max_bytes:
                taken = f"{held} of {self.max_bytes} bytes are taken in {self.path}"
                raise SpoolFull(f"no room for {charge} bytes: {taken}", owned)
            if owned:
                with self._change(len(owned), charge):
                    self._db.executemany("INSERT INTO records (data) VALUES (?)", [(record,) for record in owned])
        return len(owned)

    def enqueue(self, dispatcher: tempo.Dispatcher, payload: bytes, timeout: float | None = 0.0) -> bool:
        """Do as `enqueue_many`; return whether the dispatcher accepted the record."""
        return self.enqueue_many(dispatcher, [payload], timeout) == 1

    def enqueue_many(self, dispatcher: tempo.Dispatcher, payloads: Iterable[bytes], timeout: float | None = 0.0) -> int:
        """Give records to the dispatcher, and take into the file those that it refuses; return how many it accepted.

        Raises: PayloadTooLarge, and what `put` raises, with `.accepted`: so many were accepted by the dispatcher, and
            none of the others was taken.
        """
        records = _own(payloads)
        try:
            return dispatcher.enqueue_many(records, timeout=timeout)
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
            rows: list[tuple[int, bytes]] = []
            nbytes = 0
            with self._section():
                for row in self._db.execute("SELECT id, data FROM records ORDER BY id"):
                    nbytes += len(row[1])
                    if rows and nbytes > AT_ONCE:
                        break
                    rows.append(row)
            if rows:
                records = [data for _, data in rows]
                send(records)
                with self._section(), self._change(-len(rows), -_charge(records)):
                    self._db.execute("DELETE FROM records WHERE id <= ?", (rows[-1][0],))
            return len(rows)
        finally:
            self._replaying.release()

    def __len__(self) -> int:
        """How many records the file holds."""
        with self._section():
            return self._totals()[0]

    @property
    def nbytes(self) -> int:
        """How much of `max_bytes` is taken."""
        with self._section():
            return self._totals()[1]

    def close(self) -> None:
        """Close the file; what it holds is for whoever opens it next. Idempotent. In a forked child: nothing."""
        if not self._closed and self._process == os.getpid():
            with self._section():
                self._closed = True
                self._db.close()
                self._owner.close()

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _section(self, rest: list[bytes] | None = None) -> Iterator[None]:
        """Hold the lock; turn SQLite's errors into SpoolError. rest: the records that then remain with the caller."""
        if self._process != os.getpid():  # asked first: the lock may be held by a thread that is not here
            raise SpoolError(f"{self.path} was opened in process {self._process}: let a child open its own", rest)
        with self._lock:
            if self._closed or self._db.in_transaction:
                why = "is closed" if self._closed else "was called by what interrupted it"
                raise SpoolError(f"{self.path} {why}", rest)
            try:
                yield
            except sqlite3.Error as exc:
                kind = SpoolFull if "full" in str(exc) else SpoolError  # error codes came with 3.11
                raise kind(f"{self.path}: {exc}", rest) from exc

    def _totals(self) -> tuple[int, int]:
        """Lock held. Return how many records the file holds, and what they count."""
        if self._held is None:
            query = "SELECT count(*), coalesce(sum(length(data)), 0) FROM records"
            count, nbytes = self._db.execute(query).fetchone()
            self._held = count, nbytes + count * RECORD_OVERHEAD
        return self._held

    @contextlib.contextmanager
    def _change(self, records: int, nbytes: int) -> Iterator[None]:
        """Lock held. One transaction, all of it or nothing, whatever ends it: so many records, so many bytes more."""
        (count, held), self._held = self._totals(), None
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield
        self._held = count + records, held + nbytes


def _charge(records: list[bytes]) -> int:
    return sum(map(len, records)) + len(records) * RECORD_OVERHEAD


def _own(records: Iterable[bytes | memoryview]) -> list[bytes]:
    """Return the records as bytes: themselves, or copies. Raises TypeError, which never shows one."""
    if isinstance(records, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"an iterable of records is wanted, not {type(records).__name__}")
    return [record if type(record) is bytes else memoryview(record).tobytes() for record in records]
