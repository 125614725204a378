# SPDX-License-Identifier: MIT
"""Batches into a topic of Kafka. Needs confluent-kafka.

``enable.idempotence`` stores once what librdkafka sends again, and keeps the order. A batch that failed, and that the
caller delivers again, can come twice.
"""

import confluent_kafka  # type: ignore[import-untyped, import-not-found, unused-ignore]

import tempo


class KafkaSink:
    """Produces each event of a batch, and returns when Kafka has acknowledged all of them. One batch at a time."""

    def __init__(self, producer: confluent_kafka.Producer, topic: str, *, timeout: float = 30.0) -> None:
        """producer: made with ``enable.idempotence``; timeout: seconds for one batch."""
        self._producer, self._topic, self._timeout = producer, topic, timeout

    def deliver(self, batch: tempo.Batch, key: bytes | None = None) -> None:
        """Send a batch; ``key`` picks the partition. Raises OSError when Kafka has not all of it."""
        outcomes: list[object] = []  # of each event: None, or an error
        for payload in batch.tolist():
            while True:
                try:
                    self._producer.produce(
                        self._topic, payload, key=key, on_delivery=lambda error, _: outcomes.append(error)
                    )
                    break
                except BufferError:  # librdkafka's own queue is full: let it send
                    self._producer.poll(0.1)
        left = self._producer.flush(self._timeout)
        if left or any(outcomes):
            raise OSError(f"Kafka has not all of {len(batch)} events: {[*filter(None, outcomes)][:1] or 'out of time'}")
