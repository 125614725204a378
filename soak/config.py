# SPDX-License-Identifier: MIT
"""The settings that all passes of one run share."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from soak import payloads

TELEMETRY = "telemetry"


@dataclass(frozen=True)
class Config:
    """One run's settings, checked. Times in seconds, sizes in bytes."""

    duration: float
    """How long the load itself lasts; the other passes derive their length from it."""
    producers: int
    consumers: int
    payload: str | int
    """``TELEMETRY``, or the size of every payload."""
    interval: float
    max_batch_bytes: int | None
    max_buffered_bytes: int
    consumer_delay: float
    """What a consumer sleeps after each batch."""
    on_full: str
    """``block``: a producer waits for room. ``raise``: the payload is refused, counted and dropped."""
    bulk: int
    """Payloads in one call; 1 is ``enqueue``, more is ``enqueue_many``."""
    sink: str

    @property
    def payload_size(self) -> int | None:
        """The size of every payload, or None for the telemetry mix."""
        return self.payload if isinstance(self.payload, int) else None

    @property
    def largest_payload(self) -> int:
        """The size of the largest payload that a producer sends."""
        return payloads.LARGEST if self.payload_size is None else self.payload_size

    @property
    def mean_payload(self) -> int:
        """The size of the average payload."""
        return payloads.MEAN if self.payload_size is None else self.payload_size

    @property
    def longest_drain(self) -> float:
        """The seconds, a day at most, that consumers may rightly rest until all that is held now is delivered."""
        held = self.max_buffered_bytes + self.producers * self.bulk * self.largest_payload
        seconds = 3 * self.interval + self.consumer_delay * (held // self.largest_batch + 2)
        return min(seconds, 24 * 3600.0)

    @property
    def largest_batch(self) -> int:
        """The most bytes that one batch can have: a payload above the batch limit goes alone."""
        if self.max_batch_bytes is None:
            return self.max_buffered_bytes
        return min(max(self.max_batch_bytes, self.largest_payload), self.max_buffered_bytes)

    def pass_seconds(self, least: float, most: float) -> float:
        """Return how long a pass beside the load lasts: a tenth of the load, within these limits."""
        return min(max(self.duration / 10, least), most)

    def as_json(self) -> dict[str, object]:
        """Return the settings as they stand in the result."""
        return asdict(self)
