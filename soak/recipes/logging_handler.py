# SPDX-License-Identifier: MIT
"""A logging handler that ships records in batches, and whose ``flush()`` delivers, for functions that must send before
they return, as in a serverless runtime."""

import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

import tempo


class BatchHandler(logging.Handler):
    """Formats each record when it is logged; without room it is dropped, and counted in ``stats().rejected``.

    What ``send`` itself logs is left out: it would come back for ever. A filter does that, since it runs without the
    handler's lock, which ``logging.shutdown()`` holds while it calls flush() and close().
    """

    def __init__(self, send: Callable[[tempo.Batch], object], *, timeout: float = 5.0, **limits: Any) -> None:
        """timeout: seconds that flush() and close() wait; limits: of the dispatcher."""
        super().__init__()
        self.dispatcher = tempo.Dispatcher(**limits)
        self._send, self._timeout, self._sender = send, timeout, 0
        self.addFilter(lambda record: threading.get_ident() != self._sender)
        self.dispatcher.start(self._deliver)

    def _deliver(self, batch: tempo.Batch) -> None:
        self._sender = threading.get_ident()
        self._send(batch)

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a record over; never wait."""
        try:
            self.dispatcher.enqueue(self.format(record).encode())
        except (tempo.QueueFull, tempo.Closed):
            pass
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Send what was logged before this call, and wait until it is sent."""
        if self.dispatcher.stats().state == "running" and not self.dispatcher.flush(self._timeout):
            print(f"log records are not sent after {self._timeout:.0f} s", file=sys.stderr)

    def close(self) -> None:
        """Send what is left."""
        try:
            self.dispatcher.shutdown(timeout=self._timeout)
        except tempo.DrainTimeout as exc:  # an OSError: logging.shutdown() would hide it
            print(f"log records lost: {exc}", file=sys.stderr)
        super().close()
