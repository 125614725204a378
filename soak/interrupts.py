# SPDX-License-Identifier: MIT
"""Ctrl-C while a command runs, without a result lost, a thread left or a terminal spoilt.

Python raises KeyboardInterrupt wherever the main thread happens to be: in the middle of a drain, of a line that is
written, of a display that is drawn. While a command has entered ``kept()``, the first one is raised only where it is
welcome, in a wait that it may end; elsewhere it is pending until the next such wait, or until somebody takes note of
it. A second one is raised at once, wherever that is: whoever presses twice does not want to wait.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_seen = 0
_pending = False
_welcome = False
# Touched by the main thread alone: signal handlers run there, too.


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep the first interrupt for the waits below. Does nothing where SIGINT is ignored or somebody else's."""
    global _seen, _pending
    on_main = threading.current_thread() is threading.main_thread()
    if not on_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _seen, _pending = 0, False
    signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _seen, _pending = 0, False


def _note(number: int, frame: FrameType | None) -> None:
    global _seen, _pending  # noqa: PLW0603
    _seen += 1
    if _welcome or _seen > 1:
        raise KeyboardInterrupt
    _pending = True


def take() -> bool:
    """Return whether an interrupt is pending; it is not any more."""
    global _pending
    was, _pending = _pending, False
    return was


def wait(event: threading.Event, seconds: float) -> bool:
    """Wait for the event, as ``event.wait`` does. Raises KeyboardInterrupt when one comes, or is pending."""
    global _welcome  # noqa: PLW0603
    if threading.current_thread() is not threading.main_thread():
        return event.wait(seconds)
    _welcome = True  # before the look at what is pending, so that none slips through in between
    try:
        if take():
            raise KeyboardInterrupt
        return event.wait(seconds)
    finally:
        _welcome = False
