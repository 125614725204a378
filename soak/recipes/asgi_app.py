# SPDX-License-Identifier: MIT
"""A Starlette or FastAPI application: the lifespan drains what was accepted; a full buffer is answered with 503.

uvicorn may end by a signal, without Python's exit hooks. For FastAPI:
``app = FastAPI(lifespan=lifespan)`` and ``app.post("/track")(track)``.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette  # type: ignore[import-untyped, import-not-found, unused-ignore]
from starlette.requests import Request  # type: ignore[import-untyped, import-not-found, unused-ignore]
from starlette.responses import Response  # type: ignore[import-untyped, import-not-found, unused-ignore]
from starlette.routing import Route  # type: ignore[import-untyped, import-not-found, unused-ignore]

import tempo


def send(batch: tempo.Batch) -> None:
    """Replace this; it runs on tempo's thread, not in the event loop."""
    print(batch.tolist(), flush=True)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Make a dispatcher for the life of the application."""
    async with tempo.Dispatcher(interval=0.25, max_buffered_bytes=4 * tempo.MiB) as events:
        events.start(send)
        app.state.events = events
        yield


async def track(request: Request) -> Response:
    """Accept an event; `aenqueue` in place of `enqueue` waits for room without blocking the loop."""
    try:
        request.app.state.events.enqueue(await request.body())
    except (tempo.QueueFull, tempo.Closed):
        return Response(status_code=503)
    return Response(status_code=202)


app = Starlette(routes=[Route("/track", track, methods=["POST"])], lifespan=lifespan)
