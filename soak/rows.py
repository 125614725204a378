# SPDX-License-Identifier: MIT
"""The rows of the benchmark: what is compared with what, in which worker it is measured, and what is aimed at.

A ratio is always taken within one round of one worker process, in which the two sides took turns: absolute times change
from hour to hour on a shared machine, and such ratios change much less.
"""

from __future__ import annotations

from dataclasses import dataclass

from soak.config import Config
from soak.units import KIB, MIB


@dataclass(frozen=True)
class Row:
    """One comparison."""

    name: str
    what: str
    group: str
    subject: str
    control: str | None
    """None: the figure itself, in ``unit``, is what is looked at."""
    target: float | None
    """None: shown, not aimed at."""
    least: bool = False
    """The target is the least: the ratio is control / subject (a share of the control's rate). Else the most."""
    unit: str = "ratio"
    best: bool = True
    """Of a worker's values the best counts on each side; else the median of the ratios."""

    def met(self, value: float) -> bool | None:
        """Return whether ``value`` reaches the target; None when there is none."""
        if self.target is None:
            return None
        return value >= self.target if self.least else value <= self.target


def soak_config(
    producers: int = 32,
    max_batch_bytes: int = 320 * KIB,
    max_buffered_bytes: int = 2 * MIB,
    consumer_delay: float = 10e-6,
    payload: str | int = "telemetry",
) -> Config:
    """The settings of a soak row; the duration is the worker's affair."""
    return Config(
        duration=1.0,
        producers=producers,
        consumers=1,
        payload=payload,
        interval=0.01,
        max_batch_bytes=max_batch_bytes,
        max_buffered_bytes=max_buffered_bytes,
        consumer_delay=consumer_delay,
        on_full="block",
        bulk=1,
        sink="null",
    )


SOAKS: dict[str, tuple[str, Config, float]] = {
    "soak_32": ("32 producers, 320 KiB batches, 2 MiB buffer, 10 us a batch", soak_config(), 0.50),
    "soak_32k": (
        "32 producers, 32 KiB batches, 4 MiB buffer, 10 us a batch",
        soak_config(max_batch_bytes=32 * KIB, max_buffered_bytes=4 * MIB),
        0.32,
    ),
    "soak_slow": (
        "32 producers, 32 KiB batches, 4 MiB buffer, 200 us a batch",
        soak_config(max_batch_bytes=32 * KIB, max_buffered_bytes=4 * MIB, consumer_delay=200e-6),
        0.13,
    ),
    "soak_eager": (
        "32 producers, 320 KiB batches, 4 MiB buffer, no delay",
        soak_config(max_buffered_bytes=4 * MIB, consumer_delay=0.0),
        0.52,
    ),
    "soak_1": ("1 producer, 320 KiB batches, 2 MiB buffer, 10 us a batch", soak_config(producers=1), 0.58),
    "soak_256": ("256 producers, 320 KiB batches, 2 MiB buffer, 10 us a batch", soak_config(producers=256), 0.40),
}
"""By name: what it is, its settings, and the least share of the same producers' rate without a dispatcher."""

BARE = "_bare"
"""Behind a soak's name: its producers with a list append in place of ``enqueue``."""


def _scaling() -> dict[str, tuple[str, Config]]:
    soaks = {}
    for producers in (1, 4, 16, 64, 256):
        soaks[f"producers_{producers}"] = (f"{producers} producers", soak_config(producers=producers))
    for size in (0, 1, 64, KIB, 10 * KIB, 100 * KIB, MIB):
        config = soak_config(payload=size, max_buffered_bytes=max(2 * MIB, 8 * size), producers=8)
        soaks[f"payload_{size}"] = (f"8 producers, payloads of {size} bytes", config)
    for mib in (1, 16, 256, 1024):
        config = soak_config(max_buffered_bytes=mib * MIB, producers=8)
        soaks[f"buffer_{mib}"] = (f"8 producers, a buffer of {mib} MiB", config)
    return soaks


SCALING = _scaling()
"""How the cost grows: by name, what it is and its settings."""

FIRST = "soak_32"
"""The soak whose heap, drain and shutdown are looked at too."""

ROWS: tuple[Row, ...] = (
    Row("enqueue / queue.Queue", "enqueue of 163 bytes : queue.Queue.put", "micro", "enqueue", "queue_put", 0.30),
    Row("enqueue / append", "the same : a method that only appends", "micro", "enqueue", "append", 2.5),
    Row("enqueue / append(*, t)", "the same : with enqueue's signature", "micro", "enqueue", "append_keyword", None),
    Row("way / SimpleQueue", "512 in, one batch out : put, get, join", "micro", "way", "simple_queue_way", 2.0),
    Row("way / queue.Queue", "the same : on queue.Queue", "micro", "way", "queue_way", None),
    Row("enqueue_many / enqueue", "lists of 512 : one by one", "micro", "enqueue_many", "enqueue", 0.30),
    Row("10 KiB / join", "5 MiB of 10 KiB payloads : bytes.join", "micro", "large", "join", 1.5),
    Row("handover / SimpleQueue", "thread to thread : batcher", "handover", "handover", "simple_queue_batcher", 2.0),
    Row("handover / queue.Queue", "thread to thread : batcher", "handover", "handover", "queue_batcher", 0.10),
    Row("handover / QueueListener", "thread to thread : logging", "handover", "handover", "queue_listener", None),
    Row("handover / OpenTelemetry", "thread to thread : spans", "handover", "handover", "opentelemetry", None),
    Row("handover / Kafka", "thread to thread : librdkafka's test broker", "handover", "handover", "kafka", None),
    *(
        Row(name, what + " : bare", name, name, name + BARE, target, least=True, best=False)
        for name, (what, _, target) in SOAKS.items()
    ),
    Row("heap", "peak traced heap of the first soak", "heap", "heap", None, 3.5 * MIB, unit="byte"),
    Row("shutdown", "shutdown(), first soak", FIRST, FIRST + "_shutdown", None, 500e-6, unit="second", best=False),
    Row("drain", "producers' stop to all delivered", FIRST, FIRST + "_drain", None, 3e-3, unit="second", best=False),
    Row("starved", "slowest producer's share, first soak", FIRST, FIRST + "_slowest", None, 0.25, True, "ratio", False),
    Row("flush", "lateness of an interval flush, p99", "flush", "flush_p99", None, 1e-3, unit="second", best=False),
    Row("pi", "events/s, emulated Cortex-A72", "pi", "pi", None, 244_000, True, "1/s", False),
    *(
        Row(name, what + " : bare", "scaling", name, name + BARE, None, least=True, best=False)
        for name, (what, _) in SCALING.items()
    ),
)

DEFAULT_GROUPS = ("micro", "handover", *SOAKS, "heap", "flush")
GROUPS = (*DEFAULT_GROUPS, "pi", "scaling")

assert all(row.group in GROUPS for row in ROWS)
