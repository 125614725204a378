# SPDX-License-Identifier: MIT
"""What the same producers reach on this machine with no dispatcher: the yardstick that a rate is divided by.

Absolute rates change from machine to machine and from hour to hour; a rate over a calibration of the same run compares.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice

from soak import interrupts
from soak.config import Config
from soak.crew import PATIENCE, Crew, join
from soak.load import ROUND
from soak.payloads import Sent, events

MOST_KEPT = 4 * ROUND


@dataclass(frozen=True)
class Calibration:
    """What came of it. ``interrupted``: the first interrupt cut it short; the rate is of the time until then."""

    events_per_second: float
    interrupted: bool


def calibrate(config: Config, seconds: float) -> Calibration:
    """Let all producers format and append to lists of their own for ``seconds``.

    Raises RuntimeError when the threads cannot be started, or fail.
    """
    crew = Crew()
    # Events that a producer's list holds before it is emptied: all lists together no more than the buffer would.
    kept_events = max(1, min(MOST_KEPT, config.max_buffered_bytes // config.producers // max(1, config.mean_payload)))
    size = min(ROUND, kept_events)
    halt: list[bool] = []
    made = [0] * config.producers

    def produce(index: int) -> None:
        source = events(config.payload_size, index, Sent(config.payload_size))
        kept: list[bytes] = []
        append = kept.append
        while not halt:
            for payload in islice(source, size):
                append(payload)
            made[index] += size
            if len(kept) >= kept_events:
                kept.clear()

    def produce_bulk(index: int) -> None:
        source = events(config.payload_size, index, Sent(config.payload_size))
        kept: list[bytes] = []
        while not halt:
            payloads = list(islice(source, config.bulk))
            kept.extend(payloads)
            made[index] += config.bulk
            if len(kept) >= kept_events:
                kept.clear()

    work = produce if config.bulk == 1 else produce_bulk
    threads = []
    interrupted = False
    started = time.perf_counter()
    try:
        for index in range(config.producers):
            threads.append(crew.start(f"calibration {index}", work, index))
        started = time.perf_counter()
        crew.go.set()
        interrupts.wait(crew.trouble, seconds)
    except interrupts.Interrupted:
        interrupted = True
    finally:
        halt.append(True)
        crew.go.set()
        late = join(threads, PATIENCE)
    elapsed = time.perf_counter() - started
    if late or crew.problems:
        raise RuntimeError("calibration: " + (crew.problems[0] if crew.problems else f"{late[0]} did not end"))
    return Calibration(sum(made) / elapsed, interrupted)
