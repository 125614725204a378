# SPDX-License-Identifier: MIT
"""Celery's prefork pool: its processes end without Python's exit hooks, so a signal of Celery's drains.

celery --app celery_app worker --pool prefork
"""

import os
from typing import Any

import celery  # type: ignore[import-untyped, import-not-found, unused-ignore]
from celery.signals import worker_process_shutdown  # type: ignore[import-untyped, import-not-found, unused-ignore]

import tempo


def send(batch: tempo.Batch) -> None:
    """Replace this."""
    print(batch.tolist(), flush=True)


events = tempo.Dispatcher(interval=0.25, max_buffered_bytes=4 * tempo.MiB)
events.start(send)
app = celery.Celery("celery_app", broker=os.environ.get("BROKER", "amqp://"))


@app.task(ignore_result=True)  # type: ignore[untyped-decorator, misc, unused-ignore]
def work(number: int) -> None:
    """A task that tells what it does."""
    events.enqueue(b"task %d" % number, timeout=1.0)


@worker_process_shutdown.connect  # type: ignore[untyped-decorator, misc, unused-ignore]
def drain(**_: Any) -> None:
    """Deliver what this process of the pool has accepted."""
    events.shutdown(timeout=10.0)
