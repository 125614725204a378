# SPDX-License-Identifier: MIT
"""A durable fallback for tempo: records that find no room, or cannot be delivered, wait in a local SQLite file.

Copy this file beside tempo.py; it needs the standard library and tempo, nothing of this harness.

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

The contract is **at least once**. What the file has taken stays in it until `done` reports a batch with it: that the
dispatcher accepted it does not suffice, nor that a consumer received it, for it is safe nowhere yet. So a process that
is killed at any point loses nothing of it, and what was sent but not yet reported is sent again by the next process.
What is in the dispatcher's memory alone, because it found room, is lost with the process.

Records are told apart by their bytes: of equal ones it does not matter which is in the file and which in memory only,
as long as their number is right.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import tempo

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

__all__ = ["IN_FLIGHT_BYTES", "RECORD_OVERHEAD", "Spool", "SpoolError", "SpoolFull"]

RECORD_OVERHEAD = 16
"""Bytes that a record counts beside its own: what SQLite takes for a row."""
IN_FLIGHT_BYTES = 256 * tempo.KiB
"""How much of the file is in a dispatcher at a time at most, counted so; or one record, if that is larger. These are in
memory twice: in the dispatcher, and in the spool, which waits for them to be reported."""

_APPLICATION = 0x74706F73  # SQLite's application_id: says that a file is a spool
_LOOK = 0.02  # seconds after which replay looks again whether the dispatcher has room
_WAL_BYTES = 4 * tempo.MiB  # to which SQLite cuts its log, once it is written back


class SpoolError(tempo.Error):
    """The file cannot be used. `.rest` are the records that are not in it, and still the caller's."""

    def __init__(self, message: str, rest: list[bytes] | None = None) -> None:
        super().__init__(message)
        self.rest = rest or []


class SpoolFull(SpoolError):
    """There is no room in the file, or on the disk."""


class Spool:
    """A bounded first-in-first-out file of records. All methods may be called from any thread.

    Args:
        path: the file; made when there is none. SQLite keeps its log in files beside it, `-owner` tells that it is in
            use: one process at a time. In a forked child it is of no use; let the child open a file of its own.
        max_bytes: how many bytes of records it holds at most, each counted with RECORD_OVERHEAD more. The log comes on
            top: some MiB, or what the largest call of `put` had. Records of a little over 2 KiB make the file twice as
            large, because of SQLite's pages of 4 KiB; most others by a fifth at most. Deleted records leave their place
            to new ones; the file itself does not shrink.
        synchronous: "NORMAL": what was taken survives that the process is killed (`kill -9`, out of memory), but the
            last records may be missing after a loss of power. "FULL": they survive that too, as far as the disk keeps
            what it says; each call waits for the disk, which takes milliseconds.

    Not for signal handlers and finalizers: the spool waits for its lock and for the disk.

    Raises:
        TypeError, ValueError: a bad argument. SpoolError: the file cannot be opened, is none, or is in use.

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
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path must be a str or os.PathLike, not {_show(path)}")
        if not isinstance(os.fspath(path), str) or not os.fspath(path) or "\0" in os.fspath(path):
            raise ValueError(f"path must name a file, not {path!r}")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise TypeError(f"max_bytes must be an int, not {_show(max_bytes)}")
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be > 0, not {max_bytes}")
        if synchronous not in ("NORMAL", "FULL"):
            raise ValueError(f"synchronous must be 'NORMAL' or 'FULL', not {synchronous!r}")
        # Fixed after init. The path is absolute because of chdir, and of names that mean something else to SQLite.
        self.path = os.path.abspath(path)
        self.max_bytes = max_bytes
        self._process = os.getpid()
        # Covers all below, and the connection. An RLock, so that a call from inside is an error and no deadlock. The
        # condition is for replay, which waits for room in flight: done and keep make it, and notify.
        self._lock = threading.RLock()
        self._landed = threading.Condition(self._lock)
        self._inside = False
        self._closed = False
        # Records that replay gave to a dispatcher and that nobody has reported yet: rows by their bytes, oldest first.
        self._flight: dict[bytes, deque[int]] = {}
        self._flying: dict[int, int] = {}  # their rows, and what each counts
        self._kept = 0  # how often keep was called
        self._count = self._bytes = 0  # what the file holds
        self._stale = True  # these two may be wrong: a change is under way, or was interrupted
        with contextlib.ExitStack() as undo:
            try:
                # An open transaction is a lock that ends with the process, however that ends; no child inherits it.
                owner = self.path + "-owner"
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
        db.execute(f"PRAGMA journal_size_limit={_WAL_BYTES}")
        with self._change():  # all or nothing: a process killed in between leaves an empty file
            db.execute("CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY, data BLOB NOT NULL)")
            db.execute(f"PRAGMA application_id={_APPLICATION}")

    # -- Into the file -----------------------------------------------------------------------------------------------

    def put(self, records: Iterable[Buffer]) -> int:
        """Take all records, in order, or none; return how many. On return they are in the file.

        Raises:
            SpoolFull: they do not fit, or the disk is full. SpoolError: the file failed. Nothing was taken; `.rest` are
                the records. TypeError: records is not iterable, or a record is not bytes-like; nothing was taken.
        """
        owned = _own("records", records)
        with self._section(owned):
            self._insert(owned)
        return len(owned)

    def keep(self, batches: Iterable[tempo.Batch]) -> int:
        """Take batches that were not delivered; return how many records were new to the file.

        For `on_error`, `DrainTimeout.undelivered` and what `stop()` returns. Records that came from the file are in it
        still: they stay at their place, and the next `replay` gives them to a dispatcher again. The others are put
        behind all that is there.

        Raises:
            As `put`, and `.rest` has the new ones only; those that came from the file are safe in any case.
        """
        records = [record for batch in _batches(batches) for record in batch.tolist()]
        with self._section(records):
            fresh = [record for record in records if self._land(record) is None]
            self._kept += 1
            self._landed.notify_all()
            self._insert(fresh)
        return len(fresh)

    def enqueue(self, dispatcher: tempo.Dispatcher, payload: Buffer, *, timeout: float | None = 0.0) -> bool:
        """Give a record to the dispatcher, or take it into the file when that is full or closed; True: the dispatcher.

        A record that goes to the file comes out after those that the dispatcher accepts meanwhile.

        Raises: what `dispatcher.enqueue` raises else (PayloadTooLarge among it), and what `put` raises.
        """
        try:
            dispatcher.enqueue(payload, timeout=timeout)
        except (tempo.QueueFull, tempo.Closed):
            self.put([payload])
            return False
        return True

    def enqueue_many(
        self, dispatcher: tempo.Dispatcher, payloads: Iterable[Buffer], *, timeout: float | None = 0.0
    ) -> int:
        """Give records to the dispatcher, and take into the file those that it refuses; return how many it accepted.

        Raises: what `dispatcher.enqueue_many` raises else, and what `put` raises, with `.accepted` likewise: so many
            were accepted by the dispatcher, none of the others was taken.
        """
        records = _own("payloads", payloads)
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

    def replay(self, dispatcher: tempo.Dispatcher, *, timeout: float | None = 0.0) -> int:
        """Give waiting records to the dispatcher, in order, as many as it has room for; return how many.

        At most IN_FLIGHT_BYTES are in flight: given, and neither reported by `done` nor kept by `keep`. They stay in
        the file. What is never reported, because its consumer forgot it, is replayed when the file is opened anew.

        With a timeout (None: for ever) it goes on as room comes, until all is given, for so many seconds; it returns
        early when something is kept, since then what is behind the dispatcher fails. Not with a timeout in a handler,
        which would wait for itself.

        Raises:
            PayloadTooLarge: the first record can never fit; ShuttingDown, Stopped: the dispatcher is closed. What was
                not given before stays in the file. SpoolError: the file cannot be read. TypeError, ValueError: a bad
                timeout.
        """
        deadline = _deadline(timeout)
        kept = self._kept
        given = 0
        while True:
            now = self._give(dispatcher)
            given += now
            with self._lock:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self._kept != kept or self._count == len(self._flying):
                    return given
                if not now:  # room in flight is told; room in the dispatcher is not
                    self._landed.wait(min(remaining, _LOOK))

    def _give(self, dispatcher: tempo.Dispatcher) -> int:
        """As replay, without a wait."""
        with self._section():
            rows: list[tuple[int, bytes]] = []
            flying = sum(self._flying.values())
            cursor = self._db.execute("SELECT id, data FROM records ORDER BY id")
            for row, data in cursor:
                if row not in self._flying:
                    flying += _charge(data)
                    if flying > IN_FLIGHT_BYTES and (rows or self._flying):
                        break
                    rows.append((row, data))
            cursor.close()
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

    def done(self, records: Iterable[Buffer]) -> int:
        """Report records (a batch) as delivered; delete those that came from the file, and return how many.

        Cheap when none of them did. Call it when they are safe where they went, not before.

        Raises:
            SpoolError: they could not be deleted, and will be delivered again. TypeError: not bytes-like records.
        """
        owned = records.tolist() if isinstance(records, tempo.Batch) else _own("records", records)
        with self._section():
            if not self._flight:
                return 0
            landed = list(filter(None, map(self._land, owned)))
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
        """Close the file; what it holds is for whoever opens it next. May be called again. In a forked child: nothing.

        Raises: SpoolError: the file failed.
        """
        if not self._closed and self._process == os.getpid():
            with self._section():
                self._closed = True
                self._landed.notify_all()
                self._db.close()
                self._owner.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- Inside ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _section(self, rest: list[bytes] | None = None) -> Iterator[None]:
        """Hold the lock; turn SQLite's errors into SpoolError. rest: the records that are then the caller's."""
        if self._process != os.getpid():  # asked first: the lock may be held by a thread that is not here
            raise SpoolError(f"{self.path} was opened in process {self._process}: let a child open its own", rest)
        with self._lock:
            if self._closed:
                raise SpoolError(f"{self.path} is closed", rest)
            if self._inside:
                raise SpoolError("called by a signal handler or finalizer that interrupted the spool", rest)
            self._inside = True
            try:
                if self._stale:
                    self._measure()
                yield
            except sqlite3.Error as exc:
                raise _failure(self.path, exc, rest) from exc
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
        if self._bytes + charge > self.max_bytes:
            raise SpoolFull(
                f"no room for {charge} bytes: {self._bytes} of {self.max_bytes} bytes are taken in {self.path}", records
            )
        if records:
            try:
                with self._change():
                    self._db.executemany("INSERT INTO records (data) VALUES (?)", [(record,) for record in records])
                    self._count += len(records)
                    self._bytes += charge
            except sqlite3.Error as exc:
                raise _failure(self.path, exc, records) from exc

    def _land(self, record: bytes) -> tuple[int, int] | None:
        """Lock held. If a row with this record is in flight, it is no more: return the row, and what it counts."""
        rows = self._flight.get(record)
        if rows is None:
            return None
        row = rows.popleft()
        if not rows:
            del self._flight[record]
        return row, self._flying.pop(row)


def _charge(record: bytes) -> int:
    return max(1, len(record)) + RECORD_OVERHEAD


def _failure(path: str, exc: sqlite3.Error, rest: list[bytes] | None) -> SpoolError:
    kind = SpoolFull if "full" in str(exc) else SpoolError  # error codes came with 3.11
    return kind(f"{path}: {exc}", rest)


def _deadline(timeout: float | None) -> float:
    if timeout is None:
        return float("inf")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds, not {_show(timeout)}")
    if not timeout >= 0:
        raise ValueError(f"timeout must be >= 0 seconds, not {timeout!r}")
    return time.monotonic() + timeout


def _own(name: str, records: Any) -> list[bytes]:
    """The records as bytes: themselves, or copies."""
    if isinstance(records, (str, bytes, bytearray, memoryview)) or not isinstance(records, Iterable):
        raise TypeError(f"{name} must be an iterable of bytes-like objects, not {_show(records)}")
    owned = []
    for i, record in enumerate(records):
        try:
            owned.append(record if type(record) is bytes else memoryview(record).tobytes())
        except TypeError:
            raise TypeError(f"{name}[{i}] must be a bytes-like object, not {_show(record)}") from None
    return owned


def _batches(batches: Any) -> list[tempo.Batch]:
    if isinstance(batches, tempo.Batch) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of tempo.Batch, not {_show(batches)}")
    found = list(batches)
    for i, batch in enumerate(found):
        if not isinstance(batch, tempo.Batch):
            raise TypeError(f"batches[{i}] must be a tempo.Batch, not {_show(batch)}")
    return found


def _show(value: object) -> str:
    """A value for an error message, with its type, cut to a line's length."""
    text = f"{type(value).__name__}: {value!r}"
    return text if len(text) <= 80 else text[:77] + "..."
