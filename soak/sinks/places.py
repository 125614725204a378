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
import inspect
import os
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tempo
from soak import cli
from soak.recipes.file_sink import FileSink, rotated

AVAILABLE = "null, file:PATH, http://..., redis://..., postgresql://... or nats://..."
READ = 1000  # events of a server's answer when they are read back
PATIENCE = 600.0
"""Seconds that a sink tries again: faults end before, and a soak that hangs is ended by its own patience."""

Deliver = Callable[[tempo.Batch], object]


class Place:
    """A sink, and what was put into it."""

    once = True  # False: after a fault, an event may be there more often
    readable = True  # False: it cannot be read back
    errors: tuple[type[Exception], ...] = (OSError,)  # and those of its client
    sink: Any = None

    def __init__(self, url: str) -> None:
        self.url = url

    open: Callable[..., None]
    """Connect, and empty the place; takes the options that such a place has. Raises ImportError without its package."""

    @contextlib.contextmanager
    def delivering(self) -> Iterator[Deliver]:
        """Yield what delivers a batch, to one consumer."""
        yield self.sink.deliver

    def close(self) -> None:
        """Let go of the sink; then the place can be read."""
        self.sink.close()

    read: Callable[[], Iterator[bytes]]
    """Yield every event in the place, in its order."""


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"


_AMOUNTS: Any = {"rotate": cli.size, "keep": cli.count(10**9), "maxlen": cli.count(10**15), "timeout": cli.duration}
_TEXTS: Any = {"fsync": _yes, "gzip": _yes, "stored": Path, "table": str, "stream": str, "subject": str}
OPTIONS: Mapping[str, Callable[[str], Any]] = {**_AMOUNTS, **_TEXTS}
"""Their types; which of them a place has, its ``open`` says."""


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file without their ends; one without an end is torn, and comes with a ``?`` before it."""
    with open(path, "rb") as file:
        for line in file:
            yield line[:-1] if line.endswith(b"\n") else b"?" + line


class FilePlace(Place):
    """A file, emptied first, and what it was rotated to."""

    def open(self, rotate: int | None = None, keep: int | None = None, fsync: bool = False) -> None:
        self._path = Path(self.url.partition(":")[2])
        self._path.touch()
        self.readable = self._path.is_file() and keep is None
        for path in (*rotated(self._path), *([self._path] if self._path.is_file() else [])):
            path.unlink()
        self.sink = FileSink(self._path, rotate_bytes=rotate, keep=keep, fsync=fsync, patience=PATIENCE)

    def read(self) -> Iterator[bytes]:
        return (line for path in (*rotated(self._path), self._path) for line in lines(path))


class HttpPlace(Place):
    """An endpoint that stores what it is sent as lines in the file ``stored``, if that can be read here."""

    once = False

    def open(self, gzip: bool = False, stored: Path | None = None, timeout: float = 10.0) -> None:
        from soak.recipes.http_sink import HttpSink  # noqa: PLC0415

        self.sink = HttpSink(self.url, compress=gzip, timeout=timeout, tries=10_000, longest_pause=1.0)
        self._stored, self.readable = stored or Path(), stored is not None
        if stored is not None:
            os.truncate(stored, 0)  # the receiver appends

    def read(self) -> Iterator[bytes]:
        return lines(self._stored)


class RedisPlace(Place):
    """A stream, deleted first."""

    def open(self, stream: str = "tempo-soak", maxlen: int | None = None, timeout: float = 10.0) -> None:
        import redis  # noqa: PLC0415

        from soak.recipes.redis_sink import RedisSink  # noqa: PLC0415

        self.errors = (OSError, redis.RedisError, ValueError)
        self._stream, self.readable = stream, maxlen is None
        self._client: Any = redis.Redis.from_url(self.url, socket_timeout=timeout, socket_connect_timeout=timeout)
        self.sink = RedisSink(self._client, stream, maxlen=maxlen, patience=PATIENCE)
        self._client.delete(stream)

    def read(self) -> Iterator[bytes]:
        last = b"-"
        while entries := self._client.xrange(self._stream, last, count=READ):
            yield from (fields[b"event"] for _, fields in entries)
            last = b"(" + entries[-1][0]


class PostgresPlace(Place):
    """A table, emptied first."""

    def open(self, table: str = "tempo_soak") -> None:
        import psycopg  # noqa: PLC0415

        from soak.recipes.postgresql_sink import PostgresSink  # noqa: PLC0415

        self.errors = (OSError, psycopg.Error)
        self._connect = partial(psycopg.connect, self.url)
        self._name = psycopg.sql.Identifier(table)
        self._select = psycopg.sql.SQL("SELECT event FROM {} ORDER BY id").format(self._name)
        self.sink = PostgresSink(self.url, table, patience=PATIENCE)
        self.sink.create_tables()
        with self._connect() as connection:
            connection.execute(psycopg.sql.SQL("TRUNCATE {}").format(self._name))

    def read(self) -> Iterator[bytes]:
        with self._connect() as connection:
            cursor = connection.cursor("soak")  # a server-side one
            cursor.itersize = READ
            for (event,) in cursor.execute(self._select):
                yield event.encode()


class NatsPlace(Place):
    """A JetStream stream on the disk, deleted first. Each consumer is an event loop with its own connection."""

    def open(self, stream: str = "TEMPO-SOAK", subject: str = "tempo.soak", timeout: float = 10.0) -> None:
        import nats.errors  # noqa: PLC0415

        from soak.recipes.nats_sink import NatsSink  # noqa: PLC0415

        self.errors = (OSError, nats.errors.Error, asyncio.TimeoutError)
        self._stream, self._subject = stream, subject
        self._connect = partial(nats.connect, self.url, error_cb=_quiet, allow_reconnect=False, connect_timeout=2)
        self._new_sink = partial(NatsSink, self._connect, subject, timeout=timeout, patience=PATIENCE)
        asyncio.run(self._make())

    async def _make(self) -> None:
        from nats.js.errors import NotFoundError  # noqa: PLC0415

        async with await self._connect() as client:
            with contextlib.suppress(NotFoundError):
                await client.jetstream().delete_stream(self._stream)
            await client.jetstream().add_stream(name=self._stream, subjects=[self._subject])

    @contextlib.contextmanager
    def delivering(self) -> Iterator[Deliver]:
        loop, sink = asyncio.new_event_loop(), self._new_sink()
        try:
            yield lambda batch: loop.run_until_complete(sink.deliver(batch))
            loop.run_until_complete(sink.close())
        finally:
            loop.close()

    def close(self) -> None:
        """Each consumer has closed its connection."""

    def read(self) -> Iterator[bytes]:
        return iter(asyncio.run(self._read()))

    async def _read(self) -> list[bytes]:
        async with await self._connect() as client:
            jetstream = client.jetstream()
            there = (await jetstream.stream_info(self._stream)).state.messages
            messages = await jetstream.subscribe(self._subject, ordered_consumer=True)
            return [(await messages.next_msg(10)).data for _ in range(there)]


async def _quiet(_: Exception) -> None:
    """Replace the default of the NATS client, which prints each error."""


_OTHERS = {"https": HttpPlace, "rediss": RedisPlace, "postgresql": PostgresPlace, "nats": NatsPlace}
KINDS: Mapping[str, type[Place]] = {"file": FilePlace, "http": HttpPlace, "redis": RedisPlace, **_OTHERS}


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
    place, options = _split(text)
    try:
        place.open(**options)
    except OSError:
        raise
    except place.errors as error:
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error
    return place


def _split(text: str) -> tuple[Place, dict[str, Any]]:
    url, _, tail = text.partition("#")
    scheme, colon, rest = url.partition(":")
    why = ""
    if not colon or scheme not in KINDS:
        why = f"is not a sink (available: {AVAILABLE})"
    elif not rest.strip("/") or "\0" in rest:
        why = "names no file" if scheme == "file" else f"names no server, as {scheme}://127.0.0.1 does"
    if why:
        raise argparse.ArgumentTypeError(f"{text!r} {why}")
    place, options = KINDS[scheme](url), {}
    known = inspect.signature(place.open).parameters
    for part in filter(None, tail.split("&")):
        name, _, value = part.partition("=")
        if name not in known or not value:
            raise argparse.ArgumentTypeError(f"{text!r}: {part!r} is no option of such a sink ({', '.join(known)})")
        try:
            options[name] = OPTIONS[name](urllib.parse.unquote(value))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {name}: {error}") from None
    return place, options
