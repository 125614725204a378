# SPDX-License-Identifier: MIT
"""A WSGI application under gunicorn or uWSGI: each worker process batches what it is sent, and drains at its exit.

gunicorn needs no hook. ``exit_timeout`` must be shorter than ``--graceful-timeout`` (30 s), after which it kills. A
gevent worker must not enqueue before it is patched, as in ``post_fork``.

    gunicorn --preload --workers 4 wsgi_app:app

uWSGI needs ``--enable-threads``, since without it no Python thread runs between requests, and
``--py-call-uwsgi-fork-hooks`` to run Python's fork hooks; without that flag tempo notices the fork by the process id,
at a worker's next call. ``--die-on-term`` lets SIGTERM end it, in place of a reload; a worker that is in a request then
runs no exit hook, so stop the traffic first.

    uwsgi --http-socket :8000 --master --processes 4 --enable-threads --py-call-uwsgi-fork-hooks --die-on-term \
          --module wsgi_app:app
"""

from collections.abc import Callable
from typing import Any

import tempo


def send(batch: tempo.Batch) -> None:
    """Replace this."""
    print(batch.tolist(), flush=True)


events = tempo.Dispatcher(interval=0.25, max_buffered_bytes=4 * tempo.MiB)
events.start(send, exit_timeout=10.0)


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Accept an event, or say that there is no room."""
    try:
        events.enqueue(environ["PATH_INFO"].encode(), timeout=0.1)
        status = "202 Accepted"
    except tempo.QueueFull:
        status = "503 Service Unavailable"
    start_response(status, [("Content-Length", "0")])
    return []
