# SPDX-License-Identifier: MIT
"""The hot loops of producers and consumers, and what the probes among the events tell.

Nothing is done per event but formatting it and handing it over. Producers take their events in rounds; a round's size
and its refusals say how many were accepted, so that even counting costs nothing per event.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from time import perf_counter, perf_counter_ns, sleep
from typing import TYPE_CHECKING

import tempo
from soak.config import Config
from soak.payloads import SEQUENCE, SESSION, TIME, Sent, events, find_probes

if TYPE_CHECKING:
    from soak.sinks.places import Place

ROUND = 64  # the most events between two looks at ``halt``
LONG_ROUND = 0.1  # seconds after which a round is halved: with slow consumers ROUND events can take minutes


class Latencies(Counter[float]):
    """Counts of times in nanoseconds, each rounded to three digits: memory is bounded, and every probe counts."""

    def add(self, nanoseconds: int) -> None:
        """Count one time (a negative one as 0: the clocks of two cores may differ by some ns)."""
        self[float(f"{max(nanoseconds, 0):.3g}")] += 1

    def quantile(self, share: float) -> float | None:
        """Return the time in seconds that ``share`` of all did not exceed; None when nothing was counted."""
        remaining = share * self.total()
        for nanoseconds in sorted(self):
            remaining -= self[nanoseconds]
            if remaining <= 0:
                return nanoseconds / 1e9
        return None

    def as_json(self) -> dict[str, object]:
        """Return the quantiles in seconds, null where nothing was measured."""
        shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        return {**{name: self.quantile(share) for name, share in shares.items()}, "samples": self.total()}


@dataclass
class Account:
    """One side's events: a producer's accepted ones, or those that one consumer received."""

    events: int = 0
    nbytes: int = 0
    checksum: int = 0
    refused: int = 0
    out_of_order: int = 0  # or repeated

    def add(self, payload: bytes) -> None:
        self.events += 1
        self.nbytes += len(payload)
        self.checksum += zlib.crc32(payload)


class Taken:
    """What one consumer received. Written by its thread alone."""

    def __init__(self, producers: int) -> None:
        self.events = self.nbytes = self.batches = 0
        self.probes = self.checksum = self.out_of_order = 0
        self.latencies = Latencies()
        self._last = [0] * producers

    def add(self, batch: tempo.Batch) -> None:
        """Count a batch, and the probes in it: at one consumer, each producer's sequence must rise."""
        arrived = perf_counter_ns()
        self.batches += 1
        self.events += len(batch)
        self.nbytes += batch.nbytes
        for head in find_probes(batch.data):
            producer, sequence = int(head[SESSION]), int(head[SEQUENCE])
            self.probes += 1
            self.checksum += zlib.crc32(head)
            self.out_of_order += sequence <= self._last[producer]
            self._last[producer] = sequence
            self.latencies.add(arrived - int(head[TIME]))


class Load:
    """The work of the load pass and of the heap pass. Results may be read once the threads have ended.

    With a place to put batches into, every event is accounted for, to be compared with what is read back from it.
    """

    def __init__(self, config: Config, place: Place | None = None, each: int | None = None) -> None:
        """each: how many events a producer sends; None: until it is halted."""
        self.config = config
        self._place, self._each = place, each
        self._checked = place is not None
        # One a thread, so that no two write to the same one.
        self.sent = [Sent(config.payload_size) for _ in range(config.producers)]
        self.accounts = [Account() for _ in range(config.producers)]
        self.taken = [Taken(config.producers) for _ in range(config.consumers)]

    @property
    def accepted(self) -> list[int]:
        """How many events of each producer were accepted."""
        return [account.events for account in self.accounts]

    @property
    def refused(self) -> int:
        return sum(account.refused for account in self.accounts)

    @property
    def delivered(self) -> int:
        return sum(taken.events for taken in self.taken)

    def produce(self, index: int, dispatcher: tempo.Dispatcher, halt: list[bool]) -> None:
        """Format and send until ``halt`` holds something. A thread that raises leaves its count a round behind."""
        config, account, sent = self.config, self.accounts[index], self.sent[index]
        source = islice(events(config.payload_size, index, sent), self._each)
        if config.on_full == "block" and config.bulk == 1 and not self._checked:
            self._send_fast(account, source, dispatcher, halt)
        else:
            self._send(account, sent, source, dispatcher, halt)

    @staticmethod
    def _send_fast(account: Account, source: Iterator[bytes], dispatcher: tempo.Dispatcher, halt: list[bool]) -> None:
        enqueue, size, then = dispatcher.enqueue, 1, perf_counter()
        while not halt:
            for payload in islice(source, size):
                enqueue(payload, None)
            account.events += size
            now = perf_counter()
            size = max(1, size // 2) if now - then > LONG_ROUND else min(ROUND, size * 2)
            then = now

    def _send(
        self, account: Account, sent: Sent, source: Iterator[bytes], dispatcher: tempo.Dispatcher, halt: list[bool]
    ) -> None:
        bulk, timeout = self.config.bulk, None if self.config.on_full == "block" else 0.0
        while not halt and (payloads := list(islice(source, bulk))):
            taken = len(payloads)
            try:
                if bulk == 1:
                    dispatcher.enqueue(payloads[0], timeout)
                else:
                    dispatcher.enqueue_many(payloads, timeout)
            except tempo.QueueFull as full:
                taken = full.accepted if bulk > 1 else 0
                account.refused += len(payloads) - taken
                for payload in payloads[taken:]:
                    sent.take_back(payload)
                sleep(0)  # let a consumer have the CPU
            if self._checked:
                for payload in payloads[:taken]:
                    account.add(payload)
            else:
                account.events += taken
            del payloads  # before the next ones are made

    def consume(self, index: int, dispatcher: tempo.Dispatcher) -> None:
        """Receive, count, look for probes, put into the place, rest."""
        taken, delay = self.taken[index], self.config.consumer_delay
        with nullcontext() if self._place is None else self._place.delivering() as deliver:
            for batch in dispatcher:
                taken.add(batch)
                if deliver is not None:
                    deliver(batch)
                if delay:
                    sleep(delay)
                # Wait for the next batch with empty hands: the heap measured is to be the dispatcher's.
                del batch
