# SPDX-License-Identifier: MIT
"""The pass under tracemalloc, and the bound for its peak. It is separate because tracing slows every allocation."""

from __future__ import annotations

import gc

from soak.cli import KIB
from soak.config import Config
from soak.drive import Outcome, drive
from soak.load import Load

try:
    import tracemalloc
except ImportError:  # PyPy has none
    TRACED = False
else:
    TRACED = True

FIXED_ALLOWANCE, THREAD_ALLOWANCE = 64 * KIB, 8 * KIB
"""What the harness takes, and for a thread: its objects, frames, counters and event generator."""
PAYLOAD_OVERHEAD = 64  # what a bytes or str object takes in addition to its text


def measure(config: Config, seconds: float) -> tuple[int | None, Outcome]:
    """Run the load on a new dispatcher, traced, into no sink; return the peak in bytes: None without tracemalloc."""
    gc.collect()
    peak = None
    if TRACED:
        tracemalloc.start()
    try:
        outcome = drive(config, seconds, Load(config))
        if TRACED:
            peak = tracemalloc.get_traced_memory()[1]
    finally:
        if TRACED:
            tracemalloc.stop()
    return peak, outcome


def bound(config: Config) -> int:
    """Return the most bytes that the dispatcher, and the batches and payloads of its users, may take.

    The dispatcher: what the contract says. The consumers: a batch each, and one on its way. The producers: the last
    payload and the next one, and with ``bulk`` those of the call.
    """
    small = config.payload_size is not None and config.payload_size < 64
    buffered = config.max_buffered_bytes * 8 if small else config.max_buffered_bytes * 5 // 4
    batches = (config.consumers + 1) * config.largest_batch * (8 if small else 1)
    single = 2 * (config.largest_payload + PAYLOAD_OVERHEAD)
    more = (config.bulk - 1) * (config.mean_payload + PAYLOAD_OVERHEAD)
    return buffered + 256 * KIB + batches + config.producers * (single + more)


def allowance(config: Config) -> int:
    """Return what the harness's threads may take in addition, in bytes."""
    return FIXED_ALLOWANCE + (config.producers + config.consumers) * THREAD_ALLOWANCE
