# SPDX-License-Identifier: MIT
"""Ctrl-C, or SIGTERM, while a command runs: no result is lost, no thread left, no terminal left in a bad state.

Python raises KeyboardInterrupt wherever the main thread happens to be: in a drain, in a line that is written, even in
``Event.wait()``, whose lock is then held for ever. Within ``kept()`` the first one is only noted: ``seen()`` tells, and
the waits that it may end look for it several times a second, and raise ``Interrupted`` once. A second one is raised at
once, as KeyboardInterrupt: whoever presses twice wants neither to wait nor a result.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

GLANCE = 0.1  # seconds after which a wait looks for an interrupt

# Touched by the main thread alone: signal handlers run there, too.
_seen = 0
_pending = False


class Interrupted(KeyboardInterrupt):
    """The first interrupt, in a wait that it may end."""


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep the first interrupt, or SIGTERM, for the waits below; not where it is ignored or has another handler."""
    global _seen, _pending
    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    on_main = threading.current_thread() is threading.main_thread()
    ours = [number for number, handler in usual.items() if on_main and signal.getsignal(number) is handler]
    for number in ours:
        signal.signal(number, _note)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, usual[number])
        if ours:
            _seen, _pending = 0, False


def _note(*_: object) -> None:
    global _seen, _pending  # noqa: PLW0603
    _seen += 1
    if _seen > 1:
        raise KeyboardInterrupt
    _pending = True


def seen() -> bool:
    return _seen > 0


def wait(event: threading.Event, seconds: float) -> bool:
    """Wait, in the main thread, as ``event.wait`` does. Raises Interrupted once, when the first interrupt has come."""
    global _pending  # noqa: PLW0603
    deadline = time.monotonic() + seconds
    while True:
        if _pending:
            _pending = False
            raise Interrupted
        left = deadline - time.monotonic()
        if event.wait(min(GLANCE, max(0.0, left))):
            return True
        if left <= GLANCE:
            return False
