# SPDX-License-Identifier: MIT
"""Where consumers put batches: nowhere, into a file, or to a server.

What a project can copy is in the modules beside this one, one sink each: file, http, redis, postgresql, nats. Here is
what the soak needs around them: a place is a sink that is emptied first (whatever a file, stream or table of its name
held before is gone) and read back at the end. Options of a place
stand behind a ``#``, as in ``redis://localhost:6379/0#stream=events&maxlen=1000000``. A client package is imported
only when its place is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
import threading
import time
import urllib.parse
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tempo
from soak.sinks.file import FileSink, rotated
from soak.units import parse_count, parse_size

AVAILABLE = "null, file:PATH, http://..., redis://..., postgresql://... or nats://..."
READ = 10_000
"""Events of a server's answer when they are read back."""
PATIENCE = 600.0
"""Seconds that a sink tries again: faults end before, and a soak that hangs is ended by its own patience."""

Note = Callable[[tempo.Batch], None]


class Place:
    """A sink, and what was put into it."""

    options: Mapping[str, Callable[[str], Any]] = {}
    """What may stand behind the ``#``, and its parser."""
    once = True
    """False: after a fault, an event may be there more often."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url = url
        self.chosen = dict(options)
        self.seconds = 0.0
        """Within deliver, of all consumers together."""
        self.cpu_seconds = 0.0
        """The same, of these threads' own work."""
        self._adding = threading.Lock()

    def open(self) -> None:
        """Connect, and empty the place. Raises OSError when it cannot, ImportError without its package."""
        raise NotImplementedError

    def deliver(self, batch: tempo.Batch) -> None:
        """Put every event of a batch into the place."""
        raise NotImplementedError

    def consume(self, dispatcher: tempo.Dispatcher, note: Note, rest: float) -> None:
        """Receive until the dispatcher is drained: note each batch, deliver it, rest so many seconds."""
        for batch in dispatcher:
            note(batch)
            started, worked = time.perf_counter(), time.thread_time()
            self.deliver(batch)
            self.took(started, worked)
            if rest:
                time.sleep(rest)
            del batch

    def took(self, started: float, worked: float) -> None:
        """Add up what a delivery took that began at these times."""
        seconds, cpu_seconds = time.perf_counter() - started, time.thread_time() - worked
        with self._adding:
            self.seconds += seconds
            self.cpu_seconds += cpu_seconds

    def close(self) -> None:
        """Let go of the sink; the place itself can be read then."""
        raise NotImplementedError

    def read(self) -> Iterator[bytes] | None:
        """Yield every event in the place, in its order. None: it cannot be read back."""
        raise NotImplementedError

    def nbytes(self) -> int | None:
        """Return what the events take on the other side, in bytes; None when it does not tell."""
        return None


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"{text!r} is neither yes nor no")
    return text == "yes"


def _name(text: str) -> str:
    if not text:
        raise ValueError(f"{text!r} is no name")
    return text


def _seconds(text: str) -> float:
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) is None or not float(text):
        raise ValueError(f"{text!r} is not a number of seconds above 0")
    return float(text)


def _maxlen(text: str) -> int:
    return parse_count(text, most=10**15)


@contextlib.contextmanager
def _as_oserror(*errors: type[BaseException]) -> Iterator[None]:
    """Raise the errors of a client as what every caller of a place knows."""
    try:
        yield
    except errors as error:
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error


class FilePlace(Place):
    """A file, emptied first, and what it was rotated to."""

    options = {"rotate": parse_size, "keep": _maxlen, "fsync": _yes}  # noqa: RUF012

    def open(self) -> None:
        self._path = Path(self.url.partition(":")[2])
        with open(self._path, "ab") as existing:
            self._regular = stat.S_ISREG(os.fstat(existing.fileno()).st_mode)
            if self._regular:
                existing.truncate(0)
        for path in rotated(self._path):
            path.unlink()
        self._sink = FileSink(
            self._path,
            rotate_bytes=self.chosen.get("rotate"),
            keep=self.chosen.get("keep"),
            fsync=self.chosen.get("fsync", False),
            patience=PATIENCE,
        )

    def deliver(self, batch: tempo.Batch) -> None:
        self._sink.deliver(batch)

    def close(self) -> None:
        self._sink.close()

    def read(self) -> Iterator[bytes] | None:
        # A device or a pipe cannot be read back, nor what was deleted.
        if not self._regular or "keep" in self.chosen:
            return None
        return (line for path in self._files() for line in read_lines(path))

    def _files(self) -> list[Path]:
        return [*rotated(self._path), self._path]

    def nbytes(self) -> int | None:
        return sum(path.stat().st_size for path in self._files()) if self._regular else None


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file without their ends; one without an end is torn, and comes with a ``?`` before it."""
    with open(path, "rb") as file:
        for line in file:
            yield line[:-1] if line.endswith(b"\n") else b"?" + line


class HttpPlace(Place):
    """An endpoint that stores what it is sent as lines in the file ``stored``, if that can be read here."""

    options = {"gzip": _yes, "stored": Path, "timeout": _seconds}  # noqa: RUF012
    once = False

    def open(self) -> None:
        from soak.sinks.http import HttpSink  # noqa: PLC0415

        self._sink = HttpSink(
            self.url,
            compress=self.chosen.get("gzip", False),
            timeout=self.chosen.get("timeout", 10.0),
            tries=10_000,
            longest_pause=1.0,
        )
        if "stored" in self.chosen:
            with open(self.chosen["stored"], "r+b") as file:  # the receiver appends
                file.truncate()

    def deliver(self, batch: tempo.Batch) -> None:
        self._sink.deliver(batch)

    def close(self) -> None:
        self._sink.close()

    def read(self) -> Iterator[bytes] | None:
        return read_lines(self.chosen["stored"]) if "stored" in self.chosen else None

    def nbytes(self) -> int | None:
        return self.chosen["stored"].stat().st_size if "stored" in self.chosen else None


class RedisPlace(Place):
    """A stream, deleted first."""

    options = {"stream": _name, "maxlen": _maxlen, "timeout": _seconds}  # noqa: RUF012

    def open(self) -> None:
        import redis  # noqa: PLC0415

        from soak.sinks.redis import RedisSink  # noqa: PLC0415

        self._stream = self.chosen.get("stream", "tempo-soak")
        timeout = self.chosen.get("timeout", 10.0)
        with _as_oserror(redis.RedisError, ValueError):
            self._client = redis.Redis.from_url(self.url, socket_timeout=timeout, socket_connect_timeout=timeout)
            self._client.delete(self._stream)
        self._sink = RedisSink(self._client, self._stream, maxlen=self.chosen.get("maxlen"), patience=PATIENCE)

    def deliver(self, batch: tempo.Batch) -> None:
        self._sink.deliver(batch)

    def close(self) -> None:
        self._sink.close()

    def read(self) -> Iterator[bytes] | None:
        return None if "maxlen" in self.chosen else self._read()

    def _read(self) -> Iterator[bytes]:
        """Read as a consumer group does, which is how many machines would share the work."""
        import redis  # noqa: PLC0415

        group = "soak"
        with _as_oserror(redis.RedisError):
            if not self._client.exists(self._stream):
                return
            self._client.xgroup_create(self._stream, group, id="0")
            while True:
                answer: Any = self._client.xreadgroup(group, "reader", {self._stream: ">"}, count=READ)
                if not answer:
                    break
                entries = answer[0][1] if isinstance(answer, list) else next(iter(answer.values()))[0]
                self._client.xack(self._stream, group, *(name for name, _ in entries))
                for _, fields in entries:
                    yield fields[b"event"]

    def nbytes(self) -> int | None:
        import redis  # noqa: PLC0415

        with _as_oserror(redis.RedisError):
            size: Any = self._client.memory_usage(self._stream)
        return None if size is None else int(size)


class PostgresPlace(Place):
    """A table, emptied first."""

    options = {"table": _name, "column": _name}  # noqa: RUF012

    def open(self) -> None:
        import psycopg  # noqa: PLC0415
        from psycopg import sql  # noqa: PLC0415

        from soak.sinks.postgresql import PostgresSink  # noqa: PLC0415

        self._table = self.chosen.get("table", "tempo_soak")
        self._column = sql.Identifier(self.chosen.get("column", "event"))
        with _as_oserror(psycopg.Error):
            self._sink = PostgresSink(
                self.url, self._table, column=self.chosen.get("column", "event"), patience=PATIENCE
            )
            self._sink.create_tables()
            with psycopg.connect(self.url) as connection:
                connection.execute(sql.SQL("TRUNCATE {}").format(sql.Identifier(self._table)))

    def deliver(self, batch: tempo.Batch) -> None:
        self._sink.deliver(batch)

    def close(self) -> None:
        self._sink.close()

    def read(self) -> Iterator[bytes] | None:
        return self._read()

    def _read(self) -> Iterator[bytes]:
        import psycopg  # noqa: PLC0415
        from psycopg import sql  # noqa: PLC0415

        query = sql.SQL("SELECT {} FROM {} ORDER BY id").format(self._column, sql.Identifier(self._table))
        with _as_oserror(psycopg.Error), psycopg.connect(self.url) as connection:
            cursor = connection.cursor("soak")  # a server-side one
            cursor.itersize = READ
            for (event,) in cursor.execute(query):
                yield event.encode()

    def nbytes(self) -> int | None:
        import psycopg  # noqa: PLC0415

        with _as_oserror(psycopg.Error), psycopg.connect(self.url) as connection:
            row = connection.execute("SELECT pg_total_relation_size(%s::regclass)", (self._table,)).fetchone()
        return None if row is None else int(row[0])


class NatsPlace(Place):
    """A JetStream stream on the disk, deleted first. Each consumer is an event loop with a connection of its own."""

    options = {"stream": _name, "subject": _name, "timeout": _seconds}  # noqa: RUF012

    def open(self) -> None:
        self._stream = self.chosen.get("stream", "TEMPO-SOAK")
        self._subject = self.chosen.get("subject", "tempo.soak")
        asyncio.run(self._make())

    async def _connect(self) -> Any:
        import nats  # noqa: PLC0415

        async def quiet(_: Exception) -> None:
            """The client's default prints each error."""

        return await nats.connect(self.url, error_cb=quiet, allow_reconnect=False, connect_timeout=2)

    @contextlib.asynccontextmanager
    async def _connected(self) -> Any:
        import nats.errors  # noqa: PLC0415

        with _as_oserror(nats.errors.Error, asyncio.TimeoutError):
            client = await self._connect()
            try:
                yield client.jetstream()
            finally:
                await client.close()

    async def _make(self) -> None:
        from nats.js.api import StorageType, StreamConfig  # noqa: PLC0415
        from nats.js.errors import NotFoundError  # noqa: PLC0415

        async with self._connected() as jetstream:
            with contextlib.suppress(NotFoundError):
                await jetstream.delete_stream(self._stream)
            config = StreamConfig(name=self._stream, subjects=[self._subject], storage=StorageType.FILE)
            await jetstream.add_stream(config)

    def consume(self, dispatcher: tempo.Dispatcher, note: Note, rest: float) -> None:
        asyncio.run(self._consume(dispatcher, note, rest))

    async def _consume(self, dispatcher: tempo.Dispatcher, note: Note, rest: float) -> None:
        from soak.sinks.nats import NatsSink  # noqa: PLC0415

        timeout = self.chosen.get("timeout", 10.0)
        sink = NatsSink(self._connect, self._subject, timeout=timeout, patience=PATIENCE)
        async for batch in dispatcher:
            note(batch)
            started, worked = time.perf_counter(), time.thread_time()
            await sink.deliver(batch)
            self.took(started, worked)
            if rest:
                await asyncio.sleep(rest)
        await sink.close()

    def close(self) -> None:
        """There is nothing to let go of: each consumer has closed its connection."""

    def read(self) -> Iterator[bytes] | None:
        return self._read()

    def _read(self) -> Iterator[bytes]:
        loop, chunks = asyncio.new_event_loop(), self._chunks()
        try:
            while chunk := loop.run_until_complete(chunks.__anext__()):
                yield from chunk
        finally:
            loop.run_until_complete(chunks.aclose())
            loop.close()

    async def _chunks(self) -> AsyncGenerator[list[bytes], None]:
        from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy  # noqa: PLC0415

        async with self._connected() as jetstream:
            left = (await jetstream.stream_info(self._stream)).state.messages
            config = ConsumerConfig(ack_policy=AckPolicy.NONE, deliver_policy=DeliverPolicy.ALL)
            subscription = await jetstream.pull_subscribe(self._subject, stream=self._stream, config=config)
            while left > 0:
                messages = await subscription.fetch(min(left, 1000), timeout=10)
                left -= len(messages)
                yield [message.data for message in messages]
        yield []

    def nbytes(self) -> int | None:
        async def ask() -> int:
            async with self._connected() as jetstream:
                return int((await jetstream.stream_info(self._stream)).state.bytes)

        return asyncio.run(ask())


KINDS: Mapping[str, type[Place]] = {
    "file": FilePlace,
    "http": HttpPlace,
    "https": HttpPlace,
    "redis": RedisPlace,
    "rediss": RedisPlace,
    "postgresql": PostgresPlace,
    "nats": NatsPlace,
}


def parse_sink(text: str) -> str:
    """Return ``text`` when it names a sink that there is; raise ValueError with what there is otherwise."""
    if text != "null":
        _split(text)
    return text


def open_sink(text: str) -> Place | None:
    """Return the open and empty place of a checked ``text``; None for the null sink.

    Raises OSError when it cannot be opened, ImportError when its client package is missing.
    """
    if text == "null":
        return None
    kind, url, options = _split(text)
    place = kind(url, options)
    place.open()
    return place


def _split(text: str) -> tuple[type[Place], str, dict[str, Any]]:
    url, _, tail = text.partition("#")
    scheme, colon, rest = url.partition(":")
    if not colon or scheme not in KINDS:
        raise ValueError(f"{text!r} is not a sink (available: {AVAILABLE})")
    if scheme == "file" and (not rest or "\0" in rest):
        raise ValueError(f"{text!r} names no file (available: {AVAILABLE})")
    if scheme != "file" and (not rest.startswith("//") or not rest.strip("/")):
        raise ValueError(f"{text!r} names no server, as {scheme}://127.0.0.1 does")
    kind = KINDS[scheme]
    options = {}
    for part in filter(None, tail.split("&")):
        name, equals, value = part.partition("=")
        if name not in kind.options or not equals:
            known = ", ".join(f"{name}=..." for name in kind.options)
            raise ValueError(f"{text!r}: {part!r} is no option of such a sink ({known})")
        try:
            options[name] = kind.options[name](urllib.parse.unquote(value))
        except ValueError as error:
            raise ValueError(f"{text!r}: {name}: {error}") from None
    return kind, url, options
