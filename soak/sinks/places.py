# SPDX-License-Identifier: MIT
"""Where consumers put batches: nowhere, into a file, or to a server.

A place is a sink of ``soak/recipes`` that is emptied first (whatever its file, stream or table held is gone) and read
back at the end. Behind ``http://...#`` stands the file in which the server stores what it is sent, if that can be read
here. A client package is imported only when its place is used.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
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


@dataclass
class Place:
    """A sink, and what was put into it."""

    sink: Any
    read: Callable[[], Iterator[bytes]] | None  # yields every event in the place, in its order; None: cannot be read
    once: bool = True  # False: after a fault, an event may be there more often

    def delivering(self) -> AbstractContextManager[Deliver]:
        """Return what delivers a batch, to one consumer."""
        return nullcontext(self.sink.deliver)

    def close(self) -> None:
        """Let go of the sink; then the place can be read."""
        self.sink.close()


Open = Callable[[str, str], Place]


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, rotated or not, without their ends; a torn one comes with a ``?`` before it."""
    for part in (*rotated(path), path):
        with open(part, "rb") as file:
            for line in file:
                yield line[:-1] if line.endswith(b"\n") else b"?" + line


def open_file(url: str, _: str) -> Place:
    """A file, emptied first, and what it was rotated to."""
    path = Path(url.partition(":")[2])
    path.touch()
    regular = path.is_file()
    for old in (*rotated(path), *([path] if regular else [])):
        old.unlink()
    sink = FileSink(path, rotate_bytes=ROTATE if regular else None, patience=PATIENCE)
    return Place(sink, partial(lines, path) if regular else None)


def open_http(url: str, stored: str) -> Place:
    """An endpoint that stores what it is sent as lines in a file."""
    from soak.recipes.http_sink import HttpSink  # noqa: PLC0415

    sink = HttpSink(url, timeout=TIMEOUT, tries=10_000, longest_pause=1.0)
    if stored:
        os.truncate(stored, 0)  # the receiver appends
    return Place(sink, partial(lines, Path(stored)) if stored else None, once=False)


def open_redis(url: str, _: str) -> Place:
    """A stream, deleted first."""
    import redis  # noqa: PLC0415

    from soak.recipes.redis_sink import RedisSink  # noqa: PLC0415

    client: Any = redis.Redis.from_url(url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)
    client.delete(NAME)

    def read() -> Iterator[bytes]:
        last = b"-"
        while entries := client.xrange(NAME, last, count=READ):
            yield from (fields[b"event"] for _, fields in entries)
            last = b"(" + entries[-1][0]

    return Place(RedisSink(client, NAME, maxlen=None, patience=PATIENCE), read)


def open_postgresql(url: str, _: str) -> Place:
    """A table, emptied first."""
    import psycopg  # noqa: PLC0415

    from soak.recipes.postgresql_sink import PostgresSink  # noqa: PLC0415

    sink = PostgresSink(url, NAME, patience=PATIENCE)
    sink.create_tables()
    with psycopg.connect(url) as connection:
        connection.execute(f'TRUNCATE "{NAME}"')

    def read() -> Iterator[bytes]:
        with psycopg.connect(url) as connection:
            cursor = connection.cursor("soak")  # a server-side one
            cursor.itersize = READ
            for (event,) in cursor.execute(f'SELECT event FROM "{NAME}" ORDER BY id'):
                yield event.encode()

    return Place(sink, read)


class NatsPlace(Place):
    """Each consumer is an event loop with a connection, which ends with the consumer."""

    @contextmanager
    def delivering(self) -> Iterator[Deliver]:
        loop, sink = asyncio.new_event_loop(), self.sink()
        try:
            yield lambda batch: loop.run_until_complete(sink.deliver(batch))
            loop.run_until_complete(sink.close())
        finally:
            loop.close()

    def close(self) -> None:
        pass


def open_nats(url: str, _: str) -> Place:
    """A JetStream stream on the disk, deleted first."""
    import nats  # noqa: PLC0415
    from nats.js.errors import NotFoundError  # noqa: PLC0415

    from soak.recipes.nats_sink import NatsSink  # noqa: PLC0415

    async def quiet(_: Exception) -> None:
        """Replace the client's default, which prints each error."""

    connect = partial(nats.connect, url, error_cb=quiet, allow_reconnect=False, connect_timeout=2)

    async def make() -> None:
        async with await connect() as client:
            with suppress(NotFoundError):
                await client.jetstream().delete_stream(NAME)
            await client.jetstream().add_stream(name=NAME, subjects=[NAME])

    async def read() -> list[bytes]:
        async with await connect() as client:
            there = (await client.jetstream().stream_info(NAME)).state.messages
            messages = await client.jetstream().subscribe(NAME, ordered_consumer=True)
            return [(await messages.next_msg(10)).data for _ in range(there)]

    asyncio.run(make())
    sink = partial(NatsSink, connect, NAME, timeout=TIMEOUT, patience=PATIENCE)
    return NatsPlace(sink, lambda: iter(asyncio.run(read())))


_OTHERS = {"https": open_http, "rediss": open_redis, "postgresql": open_postgresql, "nats": open_nats}
KINDS: Mapping[str, Open] = {"file": open_file, "http": open_http, "redis": open_redis, **_OTHERS}
"""What opens and empties a place, of its address and what stands behind the ``#``."""


def parse(text: str) -> str:
    """Return ``text`` when it names a sink; otherwise raise ArgumentTypeError with what there is."""
    scheme, _, rest = text.partition(":")
    if text != "null" and (scheme not in KINDS or ("#" in text and KINDS[scheme] is not open_http)):
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
    try:
        return KINDS[url.partition(":")[0]](url, stored)
    except (OSError, ImportError):
        raise
    except Exception as error:  # each client has its own
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error
