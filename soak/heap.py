# SPDX-License-Identifier: MIT
"""The pass under tracemalloc, and the bound that its peak is held against.

A pass of its own, because tracing makes every allocation several times slower.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

from soak.config import Config
from soak.drive import Outcome, drive
from soak.load import Load
from soak.units import KIB

try:
    import tracemalloc
except ImportError:  # PyPy has none
    TRACED = False
else:
    TRACED = True

FIXED_ALLOWANCE = 64 * KIB
THREAD_ALLOWANCE = 8 * KIB
"""A thread's objects, its frames, its counters and its event generator."""
PAYLOAD_OVERHEAD = 64
"""What a bytes or str object takes beside its text."""


@dataclass
class Heap:
    """What the pass came to, in bytes."""

    peak: int | None
    """None: this interpreter has no tracemalloc."""
    peak_buffered: int
    """The dispatcher's fullest buffer: says whether the bound was put to the test."""
    outcome: Outcome


def measure(config: Config, seconds: float) -> Heap:
    """Run the load on a new dispatcher, traced, into no sink."""
    gc.collect()
    if not TRACED:
        outcome = drive(config, seconds, Load(config))
        return Heap(None, outcome.stats.peak_buffered_bytes if outcome.stats is not None else 0, outcome)
    tracemalloc.start()
    try:
        outcome = drive(config, seconds, Load(config))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return Heap(peak, outcome.stats.peak_buffered_bytes if outcome.stats is not None else 0, outcome)


def bound(config: Config) -> int:
    """Return the most that the dispatcher, and the batches and payloads in its users' hands may take, in bytes.

    The dispatcher: 1.25 times the buffer limit and 256 KiB. The consumers: a batch each, and one on its way. Payloads
    below 64 bytes are outweighed by their bookkeeping: 8 times. The producers: the last payload and the next one, and
    with ``bulk`` those of the call.
    """
    small = config.payload_size is not None and config.payload_size < 64
    buffered = config.max_buffered_bytes * 8 if small else config.max_buffered_bytes * 5 // 4
    batches = (config.consumers + 1) * config.largest_batch * (8 if small else 1)
    single = 2 * (config.largest_payload + PAYLOAD_OVERHEAD)
    more = (config.bulk - 1) * (config.mean_payload + PAYLOAD_OVERHEAD)
    return buffered + 256 * KIB + batches + config.producers * (single + more)


def allowance(config: Config) -> int:
    """Return what the harness's threads may take on top, in bytes."""
    return FIXED_ALLOWANCE + (config.producers + config.consumers) * THREAD_ALLOWANCE
