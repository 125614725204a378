# SPDX-License-Identifier: MIT
"""Retries with backoff, and a dead letter for what is given up. Needs tenacity.

    delivery = Delivery(send, dead_letter)
    d.start(delivery.deliver, on_error=delivery.give_up)
    ...
    delivery.close()        # ends the waits between tries
    d.shutdown(timeout=5.0)

While it retries, the next batch waits: order is kept, the buffer fills, and producers wait or see QueueFull.
"""

import sys
import threading
import time
from collections.abc import Callable

import tenacity

import tempo


class Delivery:
    """A handler, ``deliver``, which raises what its last try raised, and its ``on_error``, ``give_up``.

    What another try cannot mend (not in ``transient``) is not tried again.
    """

    def __init__(
        self,
        send: Callable[[tempo.Batch], object],
        dead_letter: Callable[[BaseException, tempo.Batch], object],
        *,
        transient: tuple[type[BaseException], ...] = (OSError,),
        patience: float = 60.0,
        longest_pause: float = 5.0,
        quiet: float = 60.0,
    ) -> None:
        """patience: seconds of tries for one batch; quiet: seconds in which at most one line is printed."""
        self._dead_letter, self._quiet = dead_letter, quiet
        self._printed, self._unprinted = -quiet, 0
        closing = threading.Event()
        self.close = closing.set  # ends the waits: what is then not delivered at the first try is given up
        self.deliver = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(transient),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=longest_pause),
            stop=tenacity.stop_after_delay(patience) | tenacity.stop_when_event_set(closing),
            sleep=tenacity.sleep_using_event(closing),
            reraise=True,
        ).wraps(send)

    def give_up(self, exc: BaseException, batch: tempo.Batch) -> None:
        """Hand over a batch that was not delivered: after the last try, or when the drain at exit ran out of time."""
        self._dead_letter(exc, batch)
        self._unprinted += 1
        if time.monotonic() - self._printed >= self._quiet:
            print(f"{self._unprinted} batches given up, the last because of {exc!r}", file=sys.stderr)
            self._printed, self._unprinted = time.monotonic(), 0
