# SPDX-License-Identifier: MIT
"""``stats()`` as metrics, read when they are scraped: for prometheus_client, and for OpenTelemetry."""

from collections.abc import Iterator
from typing import Any

import tempo

COUNTERS = ("accepted", "delivered", "failed", "rejected", "discarded", "batches")
GAUGES = ("buffered", "buffered_bytes", "in_flight", "peak_buffered_bytes", "waiting_producers", "waiting_consumers")


class PrometheusCollector:
    """``prometheus_client.REGISTRY.register(PrometheusCollector({"clicks": dispatcher}))``."""

    def __init__(self, dispatchers: dict[str, tempo.Dispatcher]) -> None:
        self._dispatchers = dispatchers

    def collect(self) -> Iterator[Any]:
        """Yield a family for each figure, with a sample for each dispatcher."""
        from prometheus_client import core  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: PLC0415

        snapshots = {name: dispatcher.stats() for name, dispatcher in self._dispatchers.items()}
        for kind, figures in ((core.CounterMetricFamily, COUNTERS), (core.GaugeMetricFamily, GAUGES)):
            for figure in figures:
                family = kind(f"tempo_{figure}", f"{figure} of a tempo dispatcher", labels=["dispatcher"])
                for name, stats in snapshots.items():
                    family.add_metric([name], getattr(stats, figure))
                yield family


def observe(meter: Any, name: str, dispatcher: tempo.Dispatcher) -> None:
    """Make OpenTelemetry's instruments for a dispatcher; meter: an ``opentelemetry.metrics.Meter``."""
    from opentelemetry.metrics import Observation  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: PLC0415

    def reader(figure: str) -> Any:
        return lambda _: [Observation(getattr(dispatcher.stats(), figure), {"dispatcher": name})]

    for figure in COUNTERS:
        meter.create_observable_counter(f"tempo.{figure}", [reader(figure)])
    for figure in GAUGES:
        meter.create_observable_gauge(f"tempo.{figure}", [reader(figure)])
