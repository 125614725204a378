# SPDX-License-Identifier: MIT
"""Batches into a table of PostgreSQL. Needs psycopg (3) and tenacity."""

import threading
import uuid

import psycopg
import tenacity
from psycopg import sql

import tempo

TABLES = (
    "CREATE TABLE IF NOT EXISTS {table} (id bigint GENERATED ALWAYS AS IDENTITY, event text NOT NULL)",
    "CREATE TABLE IF NOT EXISTS {sources} (source uuid PRIMARY KEY, number bigint NOT NULL)",
)
COPY = "COPY {table} (event) FROM STDIN"
RAISE = """INSERT INTO {sources} AS s (source, number) VALUES (%s, %s)
    ON CONFLICT (source) DO UPDATE SET number = excluded.number WHERE s.number < excluded.number"""


class PostgresSink:
    """Copies each batch into a table (COPY), in a transaction, an event a row. Any thread may call it.

    Once: the transaction also raises the sink's number in a second table, TABLE_sources, and a batch that is tried
    again is left out when its number is there already. A batch given up after ``patience`` seconds, and delivered
    again, can come twice. Payloads must be UTF-8 without NUL; with one that is not, the whole batch raises.
    """

    def __init__(self, conninfo: str, table: str = "tempo_events", *, patience: float = 60.0) -> None:
        """conninfo: should have ``connect_timeout`` and ``tcp_user_timeout``, for a server that is gone silently."""
        self._conninfo = conninfo
        self._names = {"table": sql.Identifier(table), "sources": sql.Identifier(f"{table}_sources")}
        self._source, self._number = uuid.uuid4(), 0
        self._connection: psycopg.Connection | None = None
        self._lock = threading.Lock()
        self._retrying = tenacity.Retrying(
            # No connection, a full disk, a server that starts or stops.
            retry=tenacity.retry_if_exception_type((psycopg.OperationalError, psycopg.InterfaceError)),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=2.0),
            stop=tenacity.stop_after_delay(patience),
            reraise=True,
        )

    def create_tables(self) -> None:
        """Make both tables where they are missing. Raises psycopg.Error."""
        with psycopg.connect(self._conninfo) as connection:
            for text in TABLES:
                connection.execute(sql.SQL(text).format(**self._names))

    def deliver(self, batch: tempo.Batch) -> None:
        """Copy a batch; return when it is committed. Raises psycopg.Error; UnicodeDecodeError before any copying."""
        rows = [payload.decode() for payload in batch.tolist()]
        with self._lock:
            self._number += 1
            self._retrying(self._copy_in, self._number, rows)

    def _copy_in(self, number: int, rows: list[str]) -> None:
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(self._conninfo)
        try:
            with self._connection.transaction(), self._connection.cursor() as cursor:
                cursor.execute(sql.SQL(RAISE).format(**self._names), (self._source, number))
                if not cursor.rowcount:
                    return  # an earlier try had arrived
                with cursor.copy(sql.SQL(COPY).format(**self._names)) as copy:
                    for row in rows:
                        copy.write_row((row,))
        except BaseException:
            self._connection.close()  # whatever it was: the state of a new connection is known
            raise

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
