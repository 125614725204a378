# SPDX-License-Identifier: MIT
"""The hot loops of producers and consumers, and what the probes among the events tell.

Nothing is done per event but formatting it and handing it over. Producers take their events in rounds, and what a
round took is known from its size and from what was refused, so that even counting costs nothing per event.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from time import perf_counter, perf_counter_ns, sleep

import tempo
from soak.census import Account, send
from soak.config import Config
from soak.payloads import SEQUENCE, SESSION, TIME, Sent, events, probe_finder
from soak.sinks import Place

ROUND = 64
"""The most events between two looks at ``halt``."""
LONG_ROUND = 0.1
"""Seconds."""


def next_round(events_before: int, seconds: float) -> int:
    """Return the size of a producer's next round from the last one, and the time that it took.

    Where the consumers are slow, ROUND events can take minutes, and so would the end of the load.

    >>> next_round(64, 0.002), next_round(16, 0.002), next_round(16, 3.0), next_round(1, 3.0)
    (64, 32, 8, 1)
    """
    return max(1, events_before // 2) if seconds > LONG_ROUND else min(ROUND, events_before * 2)


_BITS = 6
"""A latency's bucket keeps its leading 6 bits: a bucket is at most 1/32 of its value wide."""
MOST_BUCKETS = 200
"""So many are shown; neighbours are added up until it is so."""


class Latencies:
    """A histogram of times with buckets that widen with the value: bounded memory, every probe counts, none is drawn.

    Quantiles are the middle of a bucket, so within 1.6 %; the maximum is exact.
    """

    def __init__(self) -> None:
        self.count = 0
        self.most = 0
        self._buckets: dict[int, int] = {}

    def add(self, nanoseconds: int) -> None:
        """Count one time (a negative one as 0: clocks of two cores may differ by some ns)."""
        nanoseconds = max(nanoseconds, 0)
        shift = max(nanoseconds.bit_length() - _BITS, 0)
        bucket = (shift << _BITS) + (nanoseconds >> shift)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self.count += 1
        self.most = max(self.most, nanoseconds)

    def merge(self, other: Latencies) -> None:
        """Add all that ``other`` counted."""
        for bucket, count in other._buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count
        self.count += other.count
        self.most = max(self.most, other.most)

    def quantile(self, share: float) -> float | None:
        """Return the time in seconds that ``share`` of all did not exceed; None when nothing was counted."""
        remaining = share * self.count
        for bucket in sorted(self._buckets):
            remaining -= self._buckets[bucket]
            if remaining <= 0:
                shift, value = bucket >> _BITS, bucket & (1 << _BITS) - 1
                return min((value + 0.5) * (1 << shift) if shift else value, self.most) / 1e9
        return None

    def as_json(self) -> dict[str, object]:
        """Return the quantiles in seconds, null where nothing was measured, and the distribution."""
        return {
            "p50": self.quantile(0.5),
            "p99": self.quantile(0.99),
            "max": self.most / 1e9 if self.count else None,
            "samples": self.count,
            "buckets": self.buckets(),
        }

    def buckets(self) -> list[tuple[float, int]]:
        """Return pairs (from seconds, count), rising: each bucket ends where the next begins, the last at the maximum.

        Empty ones between the first and the last are among them. There are MOST_BUCKETS at most.
        """
        counts, coarse = self._buckets, 0
        while counts and max(counts) - min(counts) >= MOST_BUCKETS:
            coarse += 1
            counts = {}
            for bucket, count in self._buckets.items():
                counts[bucket >> coarse] = counts.get(bucket >> coarse, 0) + count
        pairs = []
        for bucket in range(min(counts), max(counts) + 1) if counts else ():
            shift, value = bucket << coarse >> _BITS, bucket << coarse & (1 << _BITS) - 1
            if not shift or value >> _BITS - 1:  # without its leading bit, a value has a smaller shift
                pairs.append(((value << shift) / 1e9, counts.get(bucket, 0)))
        return pairs


class Taken:
    """What one consumer received. Written by its thread alone."""

    def __init__(self, producers: int) -> None:
        self.events = 0
        self.nbytes = 0
        self.batches = 0
        self.probes = 0
        self.checksum = 0
        self.out_of_order = 0
        self.latencies = Latencies()
        self._last = [0] * producers

    def add_probe(self, head: bytes, arrived: int) -> None:
        """Count a probe, which came out of the dispatcher at ``arrived`` (ns), and check that it came in order.

        One consumer sees the batches in order, so each producer's probes must rise at every single consumer.
        """
        producer, sequence = int(head[SESSION]), int(head[SEQUENCE])
        self.probes += 1
        self.checksum += zlib.crc32(head)
        if sequence <= self._last[producer]:
            self.out_of_order += 1
        self._last[producer] = sequence
        self.latencies.add(arrived - int(head[TIME]))


class Load:
    """The work of the load pass; the heap pass runs the same. Results may be read once the threads have ended.

    With a place to put batches into, every event is also accounted for, to be held against what is read back from it.
    """

    def __init__(self, config: Config, place: Place | None = None, probes: bool = True) -> None:
        """probes: False to send none and look for none, which is for finding out what they cost."""
        self._config = config
        self._place = place
        self._probes = probes
        self._find = probe_finder(config.payload_size) if probes else None
        # A slot a producer, so that no two threads write to the same one.
        self.accepted = [0] * config.producers
        self.refused = [0] * config.producers
        self.sent = [Sent(config.payload_size) for _ in range(config.producers)]
        self.accounts = [Account() for _ in range(config.producers if place is not None else 0)]
        self.taken = [Taken(config.producers) for _ in range(config.consumers)]

    def latencies(self) -> Latencies:
        """Return what all consumers' probes tell, once the threads have ended."""
        merged = Latencies()
        for taken in self.taken:
            merged.merge(taken.latencies)
        return merged

    def produce(self, index: int, dispatcher: tempo.Dispatcher, halt: list[bool]) -> None:
        """Format and send until ``halt`` holds something. A thread that raises leaves its count a round behind."""
        if self.accounts:
            self._produce_accounted(index, dispatcher, halt)
        elif self._config.bulk > 1:
            self._produce_bulk(index, dispatcher, halt)
        elif self._config.on_full == "block":
            self._produce_blocking(index, dispatcher, halt)
        else:
            self._produce_raising(index, dispatcher, halt)

    def source(self, index: int) -> Iterator[bytes]:
        """Return a producer's events, endless."""
        size = self._config.payload_size
        return events(size, index, self.sent[index] if self._probes else None)

    def _produce_accounted(self, index: int, dispatcher: tempo.Dispatcher, halt: list[bool]) -> None:
        sent, account = self.sent[index], self.accounts[index]
        try:
            send(self._config, self.source(index), sent, dispatcher, halt, account)
        finally:
            self.accepted[index], self.refused[index] = account.events, account.refused

    def _produce_blocking(self, index: int, dispatcher: tempo.Dispatcher, halt: list[bool]) -> None:
        source = self.source(index)
        enqueue = dispatcher.enqueue
        accepted = self.accepted
        size, then = 1, perf_counter()
        while not halt:
            for payload in islice(source, size):
                enqueue(payload, timeout=None)
            accepted[index] += size
            now = perf_counter()
            size, then = next_round(size, now - then), now

    def _produce_raising(self, index: int, dispatcher: tempo.Dispatcher, halt: list[bool]) -> None:
        sent = self.sent[index]
        source = self.source(index)
        enqueue = dispatcher.enqueue
        accepted = self.accepted
        while not halt:
            refused = 0
            for payload in islice(source, ROUND):
                try:
                    enqueue(payload)
                except tempo.QueueFull:
                    refused += 1
                    sent.take_back(payload)
                    # Refused work is dropped, but not at the full speed of an empty loop: let a consumer have the CPU.
                    sleep(0)
            self.refused[index] += refused
            accepted[index] += ROUND - refused  # no call waits, so every round is short

    def _produce_bulk(self, index: int, dispatcher: tempo.Dispatcher, halt: list[bool]) -> None:
        sent = self.sent[index]
        source = self.source(index)
        enqueue_many = dispatcher.enqueue_many
        bulk = self._config.bulk
        timeout = None if self._config.on_full == "block" else 0.0
        while not halt:
            payloads = list(islice(source, bulk))
            try:
                enqueue_many(payloads, timeout=timeout)
            except tempo.QueueFull as full:
                for payload in payloads[full.accepted :]:
                    sent.take_back(payload)
                self.accepted[index] += full.accepted
                self.refused[index] += bulk - full.accepted
                sleep(0)
            else:
                self.accepted[index] += bulk
            del payloads  # before the next ones are made

    def consume(self, index: int, dispatcher: tempo.Dispatcher) -> None:
        """Receive, count, look for probes, put into the place, rest."""
        taken = self.taken[index]
        if self._place is not None:
            self._place.consume(dispatcher, partial(self.note, taken), self._config.consumer_delay)
            return
        note, delay = self.note, self._config.consumer_delay
        for batch in dispatcher:
            note(taken, batch)
            if delay:
                sleep(delay)
            # Wait for the next batch with empty hands: the heap measured is to be the dispatcher's.
            del batch

    def note(self, taken: Taken, batch: tempo.Batch) -> None:
        """Count a batch, and the probes in it."""
        arrived = perf_counter_ns()
        taken.batches += 1
        taken.events += len(batch)
        taken.nbytes += batch.nbytes
        if self._find is not None:
            for head in self._find(batch.data):
                taken.add_probe(head, arrived)
