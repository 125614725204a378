# SPDX-License-Identifier: MIT
"""What to do when the buffer is full, other than to refuse: drop the oldest, or keep a sample. (To a file: see spool.)

Both count in ``dropped`` what they drop.
"""

import contextlib
import itertools
import queue

import tempo


class DropOldest:
    """Makes room by taking the oldest batch out: with ``max_batch_bytes`` well below the buffer, as little as needed.
    stats() counts what is taken out as delivered."""

    def __init__(self, dispatcher: tempo.Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.dropped = 0

    def enqueue(self, payload: bytes) -> None:
        """Accept the payload. Raises PayloadTooLarge, Closed."""
        while True:
            try:
                return self.dispatcher.enqueue(payload)
            except tempo.QueueFull:
                with contextlib.suppress(queue.Empty):
                    self.dropped += len(self.dispatcher.get(timeout=0))


class Sample:
    """While the buffer is full, lets one payload in ``every`` wait for room, and drops the others."""

    def __init__(self, dispatcher: tempo.Dispatcher, every: int = 10, timeout: float = 1.0) -> None:
        self.dispatcher = dispatcher
        self.dropped = 0
        self._every, self._timeout = every, timeout
        self._full = itertools.count()  # its next() is atomic

    def enqueue(self, payload: bytes) -> bool:
        """Accept the payload, or drop it; return whether it was accepted. Raises PayloadTooLarge, Closed."""
        with contextlib.suppress(tempo.QueueFull):
            self.dispatcher.enqueue(payload)
            return True
        with contextlib.suppress(tempo.QueueFull):
            if next(self._full) % self._every == 0:
                self.dispatcher.enqueue(payload, timeout=self._timeout)
                return True
        self.dropped += 1
        return False
