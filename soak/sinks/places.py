# SPDX-License-Identifier: MIT
"""Where consumers put batches: nowhere, into a file, or to a server.

A place is a sink of ``soak/recipes`` that is emptied first (whatever its file, stream or table held is gone) and read
back at the end. Its options stand behind a ``#``: ``redis://localhost:6379/0#stream=events&maxlen=1000000``. A client
package is imported only when its place is used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tempo
from soak import cli
from soak.recipes.file_sink import FileSink, rotated

AVAILABLE = "null, file:PATH, http://..., redis://..., postgresql://... or nats://..."
READ = 1000
"""Events of a server's answer when they are read back."""
PATIENCE = 600.0
"""Seconds that a sink tries again: faults end before, and a soak that hangs is ended by its own patience."""

Note = Callable[[tempo.Batch], None]


class Place:
    """A sink, and what was put into it. Its errors are OSError and those of its client (``errors``)."""

    options: Mapping[str, Callable[[str], Any]] = {}
    once = True  # False: after a fault, an event may be there more often
    errors: tuple[type[Exception], ...] = ()

    def __init__(self, url: str, chosen: Mapping[str, Any]) -> None:
        self.url, self.chosen = url, dict(chosen)
        self.sink: Any = None
        self.seconds = 0.0  # within deliver, of all consumers together
        self._adding = threading.Lock()

    def option(self, name: str, usual: Any = None) -> Any:
        """Return what was chosen."""
        return self.chosen.get(name, usual)

    def open(self) -> None:
        """Connect, and empty the place. Raises ImportError without its package."""
        raise NotImplementedError

    def consume(self, dispatcher: tempo.Dispatcher, note: Note, rest: float) -> None:
        """Receive until the dispatcher is drained: note each batch, deliver it, rest so many seconds."""
        for batch in dispatcher:
            note(batch)
            started = time.perf_counter()
            self.sink.deliver(batch)
            self.took(started)
            if rest:
                time.sleep(rest)
            del batch

    def took(self, started: float) -> None:
        """Add up what a delivery took."""
        with self._adding:
            self.seconds += time.perf_counter() - started

    def close(self) -> None:
        """Let go of the sink; then the place can be read."""
        self.sink.close()

    def read(self) -> Iterator[bytes] | None:
        """Return every event in the place, in its order. None: it cannot be read back."""
        raise NotImplementedError


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file without their ends; one without an end is torn, and comes with a ``?`` before it."""
    with open(path, "rb") as file:
        for line in file:
            yield line[:-1] if line.endswith(b"\n") else b"?" + line


class FilePlace(Place):
    """A file, emptied first, and what it was rotated to."""

    options = {"rotate": cli.size, "keep": cli.count(10**9), "fsync": _yes}  # noqa: RUF012

    def open(self) -> None:
        self._path = Path(self.url.partition(":")[2])
        self._path.touch()
        for path in (*rotated(self._path), *([self._path] if self._path.is_file() else [])):
            path.unlink()
        rotate, keep, fsync = self.option("rotate"), self.option("keep"), self.option("fsync", False)
        self.sink = FileSink(self._path, rotate_bytes=rotate, keep=keep, fsync=fsync, patience=PATIENCE)

    def read(self) -> Iterator[bytes] | None:
        if not self._path.is_file() or "keep" in self.chosen:  # a device, or what was deleted
            return None
        return (line for path in (*rotated(self._path), self._path) for line in lines(path))


class HttpPlace(Place):
    """An endpoint that stores what it is sent as lines in the file ``stored``, if that can be read here."""

    options = {"gzip": _yes, "stored": Path, "timeout": cli.duration}  # noqa: RUF012
    once = False

    def open(self) -> None:
        from soak.recipes.http_sink import HttpSink  # noqa: PLC0415

        compress, timeout = self.option("gzip", False), self.option("timeout", 10.0)
        self.sink = HttpSink(self.url, compress=compress, timeout=timeout, tries=10_000, longest_pause=1.0)
        if "stored" in self.chosen:
            os.truncate(self.chosen["stored"], 0)  # the receiver appends

    def read(self) -> Iterator[bytes] | None:
        return lines(self.chosen["stored"]) if "stored" in self.chosen else None


class RedisPlace(Place):
    """A stream, deleted first."""

    options = {"stream": str, "maxlen": cli.count(10**15), "timeout": cli.duration}  # noqa: RUF012

    def open(self) -> None:
        import redis  # noqa: PLC0415

        from soak.recipes.redis_sink import RedisSink  # noqa: PLC0415

        self.errors = (redis.RedisError, ValueError)
        self._stream, timeout = self.option("stream", "tempo-soak"), self.option("timeout", 10.0)
        self._client: Any = redis.Redis.from_url(self.url, socket_timeout=timeout, socket_connect_timeout=timeout)
        self.sink = RedisSink(self._client, self._stream, maxlen=self.option("maxlen"), patience=PATIENCE)
        self._client.delete(self._stream)

    def read(self) -> Iterator[bytes] | None:
        return None if "maxlen" in self.chosen else self._read()

    def _read(self) -> Iterator[bytes]:
        last = b"-"
        while entries := self._client.xrange(self._stream, last, count=READ):
            yield from (fields[b"event"] for _, fields in entries)
            last = b"(" + entries[-1][0]


class PostgresPlace(Place):
    """A table, emptied first."""

    options = {"table": str}  # noqa: RUF012

    def open(self) -> None:
        import psycopg  # noqa: PLC0415
        from psycopg import sql  # noqa: PLC0415

        from soak.recipes.postgresql_sink import PostgresSink  # noqa: PLC0415

        self.errors = (psycopg.Error,)
        table = self.option("table", "tempo_soak")
        self._name = sql.Identifier(table)
        self.sink = PostgresSink(self.url, table, patience=PATIENCE)
        self.sink.create_tables()
        with psycopg.connect(self.url) as connection:
            connection.execute(sql.SQL("TRUNCATE {}").format(self._name))

    def read(self) -> Iterator[bytes] | None:
        return self._read()

    def _read(self) -> Iterator[bytes]:
        import psycopg  # noqa: PLC0415
        from psycopg import sql  # noqa: PLC0415

        with psycopg.connect(self.url) as connection:
            cursor = connection.cursor("soak")  # a server-side one
            cursor.itersize = READ
            for (event,) in cursor.execute(sql.SQL("SELECT event FROM {} ORDER BY id").format(self._name)):
                yield event.encode()


class NatsPlace(Place):
    """A JetStream stream on the disk, deleted first. Each consumer is an event loop with its own connection."""

    options = {"stream": str, "subject": str, "timeout": cli.duration}  # noqa: RUF012

    def open(self) -> None:
        import nats.errors  # noqa: PLC0415

        self.errors = (nats.errors.Error, asyncio.TimeoutError)
        self._stream, self._subject = self.option("stream", "TEMPO-SOAK"), self.option("subject", "tempo.soak")
        asyncio.run(self._make())

    async def _connect(self) -> Any:
        import nats  # noqa: PLC0415

        async def quiet(_: Exception) -> None:
            """Replace the client's default, which prints each error."""

        return await nats.connect(self.url, error_cb=quiet, allow_reconnect=False, connect_timeout=2)

    @contextlib.asynccontextmanager
    async def _jetstream(self) -> AsyncIterator[Any]:
        client = await self._connect()
        try:
            yield client.jetstream()
        finally:
            await client.close()

    async def _make(self) -> None:
        from nats.js.errors import NotFoundError  # noqa: PLC0415

        async with self._jetstream() as jetstream:
            with contextlib.suppress(NotFoundError):
                await jetstream.delete_stream(self._stream)
            await jetstream.add_stream(name=self._stream, subjects=[self._subject])

    def consume(self, dispatcher: tempo.Dispatcher, note: Note, rest: float) -> None:
        asyncio.run(self._consume(dispatcher, note, rest))

    async def _consume(self, dispatcher: tempo.Dispatcher, note: Note, rest: float) -> None:
        from soak.recipes.nats_sink import NatsSink  # noqa: PLC0415

        sink = NatsSink(self._connect, self._subject, timeout=self.option("timeout", 10.0), patience=PATIENCE)
        async for batch in dispatcher:
            note(batch)
            started = time.perf_counter()
            await sink.deliver(batch)
            self.took(started)
            if rest:
                await asyncio.sleep(rest)
        await sink.close()

    def close(self) -> None:
        """Each consumer has closed its connection."""

    def read(self) -> Iterator[bytes] | None:
        return iter(asyncio.run(self._read()))

    async def _read(self) -> list[bytes]:
        from nats.js.api import AckPolicy, ConsumerConfig  # noqa: PLC0415

        events: list[bytes] = []
        async with self._jetstream() as jetstream:
            wanted = (await jetstream.stream_info(self._stream)).state.messages
            subscription = await jetstream.pull_subscribe(
                self._subject, stream=self._stream, config=ConsumerConfig(ack_policy=AckPolicy.NONE)
            )
            while len(events) < wanted:
                messages = await subscription.fetch(min(wanted - len(events), READ), timeout=10)
                events += [message.data for message in messages]
        return events


KINDS: Mapping[str, type[Place]] = {
    "file": FilePlace,
    "http": HttpPlace,
    "https": HttpPlace,
    "redis": RedisPlace,
    "rediss": RedisPlace,
    "postgresql": PostgresPlace,
    "nats": NatsPlace,
}


def parse(text: str) -> str:
    """Return ``text`` when it names a sink; otherwise raise ArgumentTypeError with what there is."""
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
    try:
        place.open()
    except Exception as error:
        if isinstance(error, (OSError, ImportError)) or not isinstance(error, place.errors):
            raise
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error
    return place


def _split(text: str) -> tuple[type[Place], str, dict[str, Any]]:
    url, _, tail = text.partition("#")
    scheme, colon, rest = url.partition(":")
    why = ""
    if not colon or scheme not in KINDS:
        why = f"is not a sink (available: {AVAILABLE})"
    elif not rest.strip("/") or "\0" in rest:
        why = "names no file" if scheme == "file" else f"names no server, as {scheme}://127.0.0.1 does"
    if why:
        raise argparse.ArgumentTypeError(f"{text!r} {why}")
    kind, options = KINDS[scheme], {}
    for part in filter(None, tail.split("&")):
        name, equals, value = part.partition("=")
        if name not in kind.options or not equals or not value:
            known = ", ".join(f"{name}=..." for name in kind.options)
            raise argparse.ArgumentTypeError(f"{text!r}: {part!r} is no option of such a sink ({known})")
        try:
            options[name] = kind.options[name](urllib.parse.unquote(value))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {name}: {error}") from None
    return kind, url, options
