# SPDX-License-Identifier: MIT
"""What the same producers reach on this machine without a dispatcher: the yardstick that a rate is divided by.

Absolute rates change from machine to machine and from hour to hour; a rate over a calibration of the same run compares.
"""

from __future__ import annotations

from itertools import islice

import tempo
from soak.cli import Failure
from soak.config import Config
from soak.drive import drive
from soak.load import ROUND, Load
from soak.payloads import events


class Bare(Load):
    """Producers that append their events to lists. The dispatcher is left alone."""

    def produce(self, index: int, dispatcher: tempo.Dispatcher, halt: list[bool]) -> None:
        config, made = self.config, self.accounts[index]
        source = events(config.payload_size, index, self.sent[index])
        # What the list holds before it is emptied: all lists together no more than the buffer would.
        share = config.max_buffered_bytes // config.producers // max(1, config.mean_payload)
        most = max(1, min(4 * ROUND, share))
        kept: list[bytes] = []
        append, size = kept.append, min(ROUND, most)
        while not halt:
            if config.bulk > 1:
                kept.extend(list(islice(source, config.bulk)))
                made.events += config.bulk
            else:
                for payload in islice(source, size):
                    append(payload)
                made.events += size
            if len(kept) >= most:
                kept.clear()


def calibrate(config: Config, seconds: float) -> float:
    """Return how many events a second the producers make, until an interrupt if one comes. Raises Failure."""
    load = Bare(config)
    outcome = drive(config, seconds, load)
    if outcome.problems:
        raise Failure(f"calibration: {outcome.problems[0]}")
    return sum(load.accepted) / outcome.load_seconds
