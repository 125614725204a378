# SPDX-License-Identifier: MIT
"""Producers and consumers that are coroutines: backpressure without a thread, a drain at the end, no batch lost.

A consumer that is cancelled loses nothing: the batch stays for the next one. `asyncio.wait_for` around `anext` may be
repeated.
"""

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable

import tempo


async def pipeline(
    sources: list[AsyncIterable[bytes]], send: Callable[[tempo.Batch], Awaitable[object]], dispatcher: tempo.Dispatcher
) -> None:
    """Send all that the sources yield, in batches; return when the last one is sent."""

    async def produce(source: AsyncIterable[bytes]) -> None:
        async for payload in source:
            await dispatcher.aenqueue(payload)  # waits for room; the loop goes on

    async def consume() -> None:
        async for batch in dispatcher:
            await send(batch)

    consumer = asyncio.create_task(consume())
    async with dispatcher:  # leaving it: await dispatcher.ashutdown()
        await asyncio.gather(*(produce(source) for source in sources))
    await consumer
