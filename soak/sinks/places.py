# SPDX-License-Identifier: MIT
"""Where consumers put batches: nowhere, into a file, or to a server.

A place is a sink of ``soak/recipes`` that is emptied first (whatever its file, stream or table held is gone) and read
back at the end. Behind ``http://...#`` stands the file in which the server stores what it is sent, if that can be read
here. A client package is imported only when its place is used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tempo
from soak import cli
from soak.recipes.file_sink import FileSink, rotated

AVAILABLE = "null, file:PATH, http://..., redis://..., postgresql://... or nats://..."
READ = 1000  # events of a server's answer when they are read back
TIMEOUT = 2.0  # seconds that a server may take for an answer; then the sink tries again
PATIENCE = 600.0
"""Seconds that a sink tries again: faults end before, and a soak that hangs is ended by its own patience."""
NAME = "tempo-soak"  # of the stream or table
ROTATE = 64 * cli.MIB

Deliver = Callable[[tempo.Batch], object]


class Place:
    """A sink, and what was put into it."""

    once = True  # False: after a fault, an event may be there more often
    readable = True  # False: it cannot be read back
    errors: tuple[type[Exception], ...] = (OSError,)  # and those of its client
    sink: Any = None

    def __init__(self, url: str, stored: str) -> None:
        self.url, self._stored = url, Path(stored) if stored else None

    open: Callable[[], None]
    """Connect, and empty the place. Raises ImportError without its package."""

    @contextlib.contextmanager
    def delivering(self) -> Iterator[Deliver]:
        """Yield what delivers a batch, to one consumer."""
        yield self.sink.deliver

    def close(self) -> None:
        """Let go of the sink; then the place can be read."""
        self.sink.close()

    read: Callable[[], Iterator[bytes]]
    """Yield every event in the place, in its order."""


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file without their ends; one without an end is torn, and comes with a ``?`` before it."""
    with open(path, "rb") as file:
        for line in file:
            yield line[:-1] if line.endswith(b"\n") else b"?" + line


class FilePlace(Place):
    """A file, emptied first, and what it was rotated to."""

    def open(self) -> None:
        self._path = Path(self.url.partition(":")[2])
        self._path.touch()
        self.readable = self._path.is_file()
        for path in (*rotated(self._path), *([self._path] if self.readable else [])):
            path.unlink()
        self.sink = FileSink(self._path, rotate_bytes=ROTATE if self.readable else None, patience=PATIENCE)

    def read(self) -> Iterator[bytes]:
        return (line for path in (*rotated(self._path), self._path) for line in lines(path))


class HttpPlace(Place):
    """An endpoint that stores what it is sent as lines in a file."""

    once = False

    def open(self) -> None:
        from soak.recipes.http_sink import HttpSink  # noqa: PLC0415

        self.sink = HttpSink(self.url, timeout=TIMEOUT, tries=10_000, longest_pause=1.0)
        self.readable = self._stored is not None
        if self._stored is not None:
            os.truncate(self._stored, 0)  # the receiver appends

    def read(self) -> Iterator[bytes]:
        return lines(self._stored or Path())


class RedisPlace(Place):
    """A stream, deleted first."""

    def open(self) -> None:
        import redis  # noqa: PLC0415

        from soak.recipes.redis_sink import RedisSink  # noqa: PLC0415

        self.errors = (OSError, redis.RedisError, ValueError)
        self._client: Any = redis.Redis.from_url(self.url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)
        self.sink = RedisSink(self._client, NAME, maxlen=None, patience=PATIENCE)
        self._client.delete(NAME)

    def read(self) -> Iterator[bytes]:
        last = b"-"
        while entries := self._client.xrange(NAME, last, count=READ):
            yield from (fields[b"event"] for _, fields in entries)
            last = b"(" + entries[-1][0]


class PostgresPlace(Place):
    """A table, emptied first."""

    def open(self) -> None:
        import psycopg  # noqa: PLC0415

        from soak.recipes.postgresql_sink import PostgresSink  # noqa: PLC0415

        self.errors = (OSError, psycopg.Error)
        self._connect = partial(psycopg.connect, self.url)
        self.sink = PostgresSink(self.url, NAME, patience=PATIENCE)
        self.sink.create_tables()
        with self._connect() as connection:
            connection.execute(f'TRUNCATE "{NAME}"')

    def read(self) -> Iterator[bytes]:
        with self._connect() as connection:
            cursor = connection.cursor("soak")  # a server-side one
            cursor.itersize = READ
            for (event,) in cursor.execute(f'SELECT event FROM "{NAME}" ORDER BY id'):
                yield event.encode()


class NatsPlace(Place):
    """A JetStream stream on the disk, deleted first. Each consumer is an event loop with its own connection."""

    def open(self) -> None:
        import nats.errors  # noqa: PLC0415

        from soak.recipes.nats_sink import NatsSink  # noqa: PLC0415

        self.errors = (OSError, nats.errors.Error, asyncio.TimeoutError)
        self._connect = partial(nats.connect, self.url, error_cb=_quiet, allow_reconnect=False, connect_timeout=2)
        self._new_sink = partial(NatsSink, self._connect, NAME, timeout=TIMEOUT, patience=PATIENCE)
        asyncio.run(self._make())

    async def _make(self) -> None:
        from nats.js.errors import NotFoundError  # noqa: PLC0415

        async with await self._connect() as client:
            with contextlib.suppress(NotFoundError):
                await client.jetstream().delete_stream(NAME)
            await client.jetstream().add_stream(name=NAME, subjects=[NAME])

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
            there = (await jetstream.stream_info(NAME)).state.messages
            messages = await jetstream.subscribe(NAME, ordered_consumer=True)
            return [(await messages.next_msg(10)).data for _ in range(there)]


async def _quiet(_: Exception) -> None:
    """Replace the default of the NATS client, which prints each error."""


_OTHERS = {"https": HttpPlace, "rediss": RedisPlace, "postgresql": PostgresPlace, "nats": NatsPlace}
KINDS: Mapping[str, type[Place]] = {"file": FilePlace, "http": HttpPlace, "redis": RedisPlace, **_OTHERS}


def parse(text: str) -> str:
    """Return ``text`` when it names a sink; otherwise raise ArgumentTypeError with what there is."""
    scheme, _, rest = text.partition(":")
    if text != "null" and (scheme not in KINDS or ("#" in text and KINDS[scheme] is not HttpPlace)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a sink (available: {AVAILABLE})")
    if text != "null" and (not rest.strip("/") or "\0" in rest):
        raise argparse.ArgumentTypeError(f"{text!r} names no {'file' if scheme == 'file' else 'server'}")
    return text


def open_sink(text: str) -> Place | None:
    """Return the open and empty place of a checked ``text``; None for the null sink.

    Raises OSError when it cannot be opened, ImportError when its client package is missing.
    """
    if text == "null":
        return None
    url, _, stored = text.partition("#")
    place = KINDS[url.partition(":")[0]](url, stored)
    try:
        place.open()
    except OSError:
        raise
    except place.errors as error:
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error
    return place
