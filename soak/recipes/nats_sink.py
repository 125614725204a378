# SPDX-License-Identifier: MIT
"""Batches into a stream of NATS JetStream, from asyncio: ``async for batch in d: await sink.deliver(batch)``.

Needs nats-py and tenacity.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable

import nats.errors
import tenacity
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import Header, PubAck

import tempo


class NatsSink:
    """Publishes each event to a subject, a batch without waiting in between, and then awaits all acknowledgements.

    Once and in order, within the stream's duplicate window (two minutes by default): after ``timeout`` seconds without
    all of them it makes a new connection and publishes the rest again, under the same ``Nats-Msg-Id``. A batch given up
    after ``patience`` seconds, and delivered again, can come twice. For one event loop; one batch at a time.
    """

    def __init__(
        self, connect: Callable[[], Awaitable[Client]], subject: str, *, timeout: float = 5.0, patience: float = 60.0
    ) -> None:
        """connect: with ``allow_reconnect=False``: otherwise the client sends what it still has of a lost connection,
        out of order. The subject must belong to a stream."""
        self._connect, self._subject, self._timeout = connect, subject, timeout
        self._client: Client | None = None
        self._jetstream: JetStreamContext | None = None
        self._retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((nats.errors.Error, OSError)),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=2.0),
            stop=tenacity.stop_after_delay(patience),
            reraise=True,
        )

    async def deliver(self, batch: tempo.Batch) -> None:
        """Publish a batch; return when the server has all of it. Raises nats.errors.Error, OSError."""
        name = uuid.uuid4().hex
        await self._retrying(self._publish, {f"{name}-{i}": payload for i, payload in enumerate(batch.tolist())})

    async def _publish(self, left: dict[str, bytes]) -> None:
        """Publish what is left of a batch, by Nats-Msg-Id, and take out what is acknowledged."""
        if self._jetstream is None:
            self._client = await self._connect()
            self._jetstream = self._client.jetstream(publish_async_max_pending=100_000)
        publish = self._jetstream.publish_async
        waiting: dict[asyncio.Future[PubAck], str] = {}
        try:
            for key, payload in left.items():
                headers = {Header.MSG_ID.value: key}
                waiting[await publish(self._subject, payload, wait_stall=self._timeout, headers=headers)] = key
            await asyncio.wait(waiting, timeout=self._timeout)
            problem = None
            for future, key in waiting.items():
                if future.done() and (problem := future.exception()) is None:
                    del left[key]
            if left:
                raise OSError(f"{len(left)} events of a batch were not acknowledged") from problem
        except BaseException:
            for future in waiting:
                future.cancel()
            await self.close()
            raise

    async def close(self) -> None:
        client, self._client, self._jetstream = self._client, None, None
        if client is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await asyncio.wait_for(client.close(), self._timeout)
