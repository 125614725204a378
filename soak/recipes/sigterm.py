# SPDX-License-Identifier: MIT
"""A service's end: SIGTERM unwinds the program, tempo drains at exit, and a second SIGTERM does not cut that short.

Process managers send SIGTERM again, or to the whole group, while the drain is under way; after a grace period they send
SIGKILL: ``exit_timeout`` must be shorter.
"""

import signal
import sys
from types import FrameType


def end(number: int, _: FrameType | None) -> None:
    """Exit, once."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def install() -> None:
    """Let SIGTERM end the program in that way. To be called in the main thread."""
    signal.signal(signal.SIGTERM, end)
