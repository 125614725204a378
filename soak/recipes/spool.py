# SPDX-License-Identifier: MIT
"""A durable fallback for tempo: records that find no room, or cannot be delivered, wait in a local SQLite file.

    spool = Spool("events.spool", max_bytes=256 * tempo.MiB)

    def handler(batch):
        send(batch.data)                    # raises when it could not
        spool.done(batch)                   # safe where it went: what of it is in the file leaves the file

    d.start(handler, on_error=lambda exc, batch: spool.keep([batch]))
    spool.enqueue(d, b"event")              # into the dispatcher, or into the file where that is full
    spool.replay(d)                         # now and then: what waits in the file goes to the dispatcher
    ...
    try:
        d.shutdown(timeout=5.0)
    except tempo.DrainTimeout as exc:
        spool.keep(exc.undelivered)         # likewise what stop() returns

The contract is **at least once**. What the file has taken remains in it until `done` reports a batch with it. So a
process that is killed at any point loses nothing of it, and the next process sends again what was sent but not yet
reported. What is only in the dispatcher's memory is lost with the process. Records are told apart by their bytes: of
equal ones it does not matter which is in the file, as long as their number is right.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator

import tempo

RECORD_OVERHEAD = 16
"""Bytes that a record counts in addition to its own: what SQLite takes for a row."""
IN_FLIGHT_BYTES = 256 * tempo.KiB
"""How much of the file is in a dispatcher at a time at most, counted so; or one record, if that is larger."""

_APPLICATION = 0x74706F73  # SQLite's application_id: says that a file is a spool
_LOOK = 0.02  # seconds after which replay looks again whether the dispatcher has room
_LOG_BYTES = 4 * tempo.MiB  # to which SQLite cuts its write-ahead log


class SpoolError(tempo.Error):
    """The file cannot be used. `.rest` are the records that are not in it, and remain with the caller."""

    def __init__(self, message: str, rest: list[bytes] | None = None) -> None:
        super().__init__(message)
        self.rest = rest or []


class SpoolFull(SpoolError):
    """There is no room in the file, or on the disk."""


class Spool:
    """A bounded first-in-first-out file of records. All methods may be called from any thread, but not from signal
    handlers and finalizers. One process at a time has the file; a forked child opens its own.

    max_bytes: of records, each counted with RECORD_OVERHEAD more; SQLite's log comes in addition, some MiB. Deleted
        records leave their place to new ones; the file itself does not shrink.
    synchronous: "NORMAL": what was taken survives the end of the process (`kill -9`), but the last records may be
        missing after a loss of power. "FULL": they survive that too; each call waits for the disk.

    Raises: ValueError: a bad argument. SpoolError: the file cannot be opened, is no spool, or is in use.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> d = tempo.Dispatcher(interval=0.01, max_buffered_bytes=4)
    >>> spool = Spool(os.path.join(folder.name, "spool"), max_bytes=tempo.MiB)
    >>> [spool.enqueue(d, record) for record in (b"one", b"two")]
    [True, False]
    >>> spool
    <Spool 1 records, 19 of 1048576 bytes>
    >>> d.get(timeout=5).tolist(), spool.replay(d)
    ([b'one'], 1)
    >>> batch = d.get(timeout=5)
    >>> batch.tolist(), len(spool), spool.done(batch), len(spool)
    ([b'two'], 1, 1, 0)
    >>> spool.close()
    >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int, synchronous: str = "NORMAL") -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be > 0, not {max_bytes}")
        if synchronous not in ("NORMAL", "FULL"):
            raise ValueError(f"synchronous must be 'NORMAL' or 'FULL', not {synchronous!r}")
        self.path = os.path.abspath(path)  # chdir changes nothing, and no name means something else to SQLite
        self.max_bytes = max_bytes
        self._process = os.getpid()
        # Covers everything below, and the connection. The condition is for replay, which waits for room in flight:
        # done and keep make it, and notify.
        self._lock = threading.RLock()
        self._landed = threading.Condition(self._lock)
        self._inside = self._closed = False
        # Records that replay gave to a dispatcher and that nobody has reported yet: rows by their bytes, oldest first.
        self._flight: dict[bytes, deque[int]] = {}
        self._flying: dict[int, int] = {}  # their rows, and what each counts
        self._kept = 0  # how often keep was called
        self._count = self._bytes = 0  # what the file holds
        self._stale = True  # these two may be wrong: a change is under way, or was interrupted
        with contextlib.ExitStack() as undo:
            try:
                # An open transaction is a lock that ends with the process, however that ends; no child inherits it.
                owner = f"{self.path}-owner"
                self._owner = sqlite3.connect(owner, timeout=0, isolation_level=None, check_same_thread=False)
                undo.callback(self._owner.close)
                self._owner.execute("BEGIN EXCLUSIVE")
                self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
                undo.callback(self._db.close)
                self._prepare(synchronous)
                self._measure()
            except sqlite3.Error as exc:
                why = "in use by another Spool" if "locked" in str(exc) else str(exc)
                raise SpoolError(f"cannot open {self.path}: {why}") from exc
            undo.pop_all()

    def _prepare(self, synchronous: str) -> None:
        """Make a new file a spool, or see that it is one."""
        db = self._db
        (application,) = db.execute("PRAGMA application_id").fetchone()
        if application != _APPLICATION and db.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
            raise SpoolError(f"cannot open {self.path}: it is a database, but no spool")
        if db.execute("PRAGMA journal_mode=WAL").fetchone() != ("wal",):
            raise SpoolError(f"cannot open {self.path}: no write-ahead log can be had there")
        db.execute(f"PRAGMA synchronous={synchronous}")
        db.execute(f"PRAGMA journal_size_limit={_LOG_BYTES}")
        with self._change():  # all or nothing: a process killed in between leaves an empty file
            db.execute("CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY, data BLOB NOT NULL)")
            db.execute(f"PRAGMA application_id={_APPLICATION}")

    # -- Into the file -----------------------------------------------------------------------------------------------

    def put(self, records: Iterable[bytes]) -> int:
        """Take all records, in order, or none; return how many. On return they are in the file.

        Raises: SpoolFull, SpoolError: nothing was taken; `.rest` are the records.
        """
        owned = _own(records)
        with self._section(owned):
            self._insert(owned)
        return len(owned)

    def keep(self, batches: Iterable[tempo.Batch]) -> int:
        """Take batches that were not delivered; return how many records were new to the file.

        Records that came from the file are still in it: they stay at their place, and the next `replay` gives them to a
        dispatcher again. The others are put behind all that is there.

        Raises: as `put`; `.rest` has the new ones only.
        """
        records = [record for batch in batches for record in batch.tolist()]
        with self._section(records):
            fresh = [record for record in records if self._land(record) is None]
            self._kept += 1
            self._landed.notify_all()
            self._insert(fresh)
        return len(fresh)

    def enqueue(self, dispatcher: tempo.Dispatcher, payload: bytes, timeout: float | None = 0.0) -> bool:
        """Give a record to the dispatcher, or take it into the file when that is full or closed; True: the dispatcher.

        A record that goes to the file comes out after those that the dispatcher accepts meanwhile.

        Raises: PayloadTooLarge, and what `put` raises.
        """
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

    # -- Out of the file ---------------------------------------------------------------------------------------------

    def replay(self, dispatcher: tempo.Dispatcher, timeout: float = 0.0) -> int:
        """Give waiting records to the dispatcher, in order, as many as it has room for; return how many.

        At most IN_FLIGHT_BYTES are in flight: given, and neither reported by `done` nor kept by `keep`. They stay in
        the file. What is never reported is replayed when the file is opened again.

        With a timeout it goes on as room comes, for so many seconds; it returns early when something is kept, since
        then what comes after the dispatcher fails. Not with a timeout in a handler, which would wait for itself.

        Raises: PayloadTooLarge: the first record can never fit. Closed: the dispatcher is. SpoolError. What was not
            given before stays in the file.
        """
        deadline = time.monotonic() + timeout
        kept = self._kept
        given = 0
        while True:
            now = self._give(dispatcher)
            given += now
            with self._lock:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self._kept != kept or self._count == len(self._flying):
                    return given
                if not now:  # room in flight notifies; room in the dispatcher does not
                    self._landed.wait(min(remaining, _LOOK))

    def _give(self, dispatcher: tempo.Dispatcher) -> int:
        with self._section():
            rows: list[tuple[int, bytes]] = []
            flying = sum(self._flying.values())
            for row, data in self._db.execute("SELECT id, data FROM records ORDER BY id"):
                if row not in self._flying:
                    flying += _charge(data)
                    if flying > IN_FLIGHT_BYTES and (rows or self._flying):
                        break
                    rows.append((row, data))
            # This does not wait, and whoever reports one of these records waits until this section ends. So what is
            # noted as in flight has been accepted; noted before, a row that is then refused could be deleted for an
            # equal record that was not in the file.
            accepted = 0
            try:
                accepted = dispatcher.enqueue_many([data for _, data in rows])
            except BaseException as exc:
                accepted = getattr(exc, "accepted", 0)
                if not isinstance(exc, tempo.QueueFull):
                    raise
            finally:
                for row, data in rows[:accepted]:
                    self._flight.setdefault(data, deque()).append(row)
                    self._flying[row] = _charge(data)
            return accepted

    def done(self, records: Iterable[bytes | memoryview]) -> int:
        """Report records (a batch) as delivered; delete those that came from the file, and return how many.

        Cheap when none of them did. Call it when they are safe where they went, not before.

        Raises: SpoolError: they could not be deleted, and will be delivered again.
        """
        owned = _own(records)
        with self._section():
            landed = list(filter(None, map(self._land, owned))) if self._flight else []
            self._landed.notify_all()
            if landed:
                with self._change():
                    self._db.executemany("DELETE FROM records WHERE id = ?", [(row,) for row, _ in landed])
                    self._count -= len(landed)
                    self._bytes -= sum(charge for _, charge in landed)
            return len(landed)

    # -- State -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many records the file holds, those in flight included."""
        with self._section():
            return self._count

    @property
    def nbytes(self) -> int:
        """How much of `max_bytes` is taken."""
        with self._section():
            return self._bytes

    def __repr__(self) -> str:
        if self._closed or self._process != os.getpid():
            return f"<Spool {self.path!r}, not open here>"
        return f"<Spool {len(self)} records, {self.nbytes} of {self.max_bytes} bytes>"

    def close(self) -> None:
        """Close the file; what it holds is for whoever opens it next. Idempotent. In a forked child: nothing."""
        if not self._closed and self._process == os.getpid():
            with self._section():
                self._closed = True
                self._landed.notify_all()
                self._db.close()
                self._owner.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- Inside ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _section(self, rest: list[bytes] | None = None) -> Iterator[None]:
        """Hold the lock; turn SQLite's errors into SpoolError. rest: the records that then remain with the caller."""
        if self._process != os.getpid():  # asked first: the lock may be held by a thread that is not here
            raise SpoolError(f"{self.path} was opened in process {self._process}: let a child open its own", rest)
        with self._lock:
            if self._closed or self._inside:
                why = "is closed" if self._closed else "was called by what interrupted it"
                raise SpoolError(f"{self.path} {why}", rest)
            self._inside = True
            try:
                if self._stale:
                    self._measure()
                yield
            except sqlite3.Error as exc:
                kind = SpoolFull if "full" in str(exc) else SpoolError  # error codes came with 3.11
                raise kind(f"{self.path}: {exc}", rest) from exc
            finally:
                self._inside = False

    def _measure(self) -> None:
        """Lock held. Count what the file holds."""
        if self._db.in_transaction:  # of a change that was interrupted as it began
            self._db.execute("ROLLBACK")
        query = "SELECT count(*), coalesce(sum(max(1, length(data))), 0) FROM records"
        count, nbytes = self._db.execute(query).fetchone()
        self._count, self._bytes = count, nbytes + count * RECORD_OVERHEAD
        self._stale = False

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """Lock held. One transaction: all of it or nothing, whatever ends it; the body changes the counts too."""
        self._stale = True
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._stale = False

    def _insert(self, records: list[bytes]) -> None:
        """Lock held. Take all records or none."""
        charge = sum(map(_charge, records))
        taken = f"{self._bytes} of {self.max_bytes} bytes are taken in {self.path}"
        if self._bytes + charge > self.max_bytes:
            raise SpoolFull(f"no room for {charge} bytes: {taken}", records)
        if not records:
            return
        try:
            with self._change():
                self._db.executemany("INSERT INTO records (data) VALUES (?)", [(record,) for record in records])
                self._count += len(records)
                self._bytes += charge
        except sqlite3.Error as exc:
            kind = SpoolFull if "full" in str(exc) else SpoolError
            raise kind(f"{self.path}: {exc}", records) from exc

    def _land(self, record: bytes) -> tuple[int, int] | None:
        """Lock held. If a row with this record is in flight, it no longer is: return the row, and what it counts."""
        rows = self._flight.get(record)
        if rows is None:
            return None
        row = rows.popleft()
        if not rows:
            del self._flight[record]
        return row, self._flying.pop(row)


def _charge(record: bytes) -> int:
    return max(1, len(record)) + RECORD_OVERHEAD


def _own(records: Iterable[bytes | memoryview]) -> list[bytes]:
    """Return the records as bytes: themselves, or copies. Raises TypeError, which never shows one."""
    if isinstance(records, tempo.Batch):
        return records.tolist()
    if isinstance(records, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"an iterable of records is wanted, not {type(records).__name__}")
    return [record if type(record) is bytes else memoryview(record).tobytes() for record in records]
