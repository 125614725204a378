# SPDX-License-Identifier: MIT
"""What the same producers reach on this machine without a dispatcher: the yardstick that a rate is divided by.

Absolute rates change from machine to machine and from hour to hour; a rate over a calibration of the same run compares.
"""

from __future__ import annotations

import time
from itertools import islice

from soak import interrupts
from soak.cli import Failure
from soak.config import Config
from soak.drive import PATIENCE, Crew, join
from soak.load import ROUND
from soak.payloads import Sent, events


def calibrate(config: Config, seconds: float) -> float:
    """Let all producers format events and append them to lists; return events a second, of the time until an interrupt
    if one comes. Raises Failure when a thread fails."""
    crew, halt = Crew(), list[bool]()
    # Events that a producer's list holds before it is emptied: all lists together no more than the buffer would.
    most = max(1, min(4 * ROUND, config.max_buffered_bytes // config.producers // max(1, config.mean_payload)))
    made = [0] * config.producers

    def produce(index: int) -> None:
        source = events(config.payload_size, index, Sent(config.payload_size))
        kept: list[bytes] = []
        append, size = kept.append, min(ROUND, most)
        while not halt:
            if config.bulk > 1:
                kept.extend(list(islice(source, config.bulk)))
                made[index] += config.bulk
            else:
                for payload in islice(source, size):
                    append(payload)
                made[index] += size
            if len(kept) >= most:
                kept.clear()

    threads = []
    try:
        for index in range(config.producers):
            threads.append(crew.start(f"calibration {index}", produce, index))
        started = time.perf_counter()
        crew.go.set()
        interrupts.wait(crew.trouble, seconds)
    except interrupts.Interrupted:
        pass
    finally:
        halt.append(True)
        crew.go.set()
        late = join(threads, PATIENCE)
    elapsed = time.perf_counter() - started
    if late or crew.problems:
        raise Failure("calibration: " + (crew.problems[0] if crew.problems else f"{late[0]} did not end"))
    return sum(made) / elapsed
