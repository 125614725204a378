# SPDX-License-Identifier: MIT
"""The pass in which every single event is checked: each accepted one delivered once, whole, and in order.

Memory stays small: of each producer only the last sequence is kept. Sequences that strictly rise cannot repeat, equal
counts then leave no room for a loss, and equal sums of CRC-32 mean the same events with the same content; an event that
was refused and delivered all the same would upset both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from zlib import crc32

import tempo
from soak.config import Config
from soak.drive import Outcome, drive
from soak.payloads import IDENTITY_SIZE, SEQUENCE, SESSION, Sent, events, identity_start


@dataclass
class Account:
    """One side's events: a producer's accepted ones, or those that one consumer received."""

    events: int = 0
    nbytes: int = 0
    checksum: int = 0
    refused: int = 0

    def add(self, payload: bytes) -> None:
        """Count one event."""
        self.events += 1
        self.nbytes += len(payload)
        self.checksum += crc32(payload)


def send(
    config: Config,
    source: Iterator[bytes],
    sent: Sent,
    dispatcher: tempo.Dispatcher,
    halt: list[bool],
    account: Account,
) -> None:
    """Send what ``source`` yields as the load does, until ``halt`` holds something, and account for each event."""
    timeout = None if config.on_full == "block" else 0.0
    if config.bulk > 1:
        while not halt and (payloads := list(islice(source, config.bulk))):
            taken = len(payloads)
            try:
                dispatcher.enqueue_many(payloads, timeout=timeout)
            except tempo.QueueFull as full:
                taken = full.accepted
            for payload in payloads[:taken]:
                account.add(payload)
            if taken < len(payloads):
                _refused(payloads[taken:], sent, account)
        return
    enqueue, add = dispatcher.enqueue, account.add
    for payload in source:
        if halt:
            sent.take_back(payload)
            return
        try:
            enqueue(payload, timeout=timeout)
        except tempo.QueueFull:
            _refused([payload], sent, account)
        else:
            add(payload)


def _refused(payloads: list[bytes], sent: Sent, account: Account) -> None:
    """Count what was refused, and let a consumer have the CPU."""
    account.refused += len(payloads)
    for payload in payloads:
        sent.take_back(payload)
    time.sleep(0)


class Census:
    """The work of the census pass."""

    def __init__(self, config: Config, each: int | None = None) -> None:
        """each: how many events a producer sends; None: until it is halted."""
        self._config = config
        self._each = each
        self._identity = config.payload_size is None or config.payload_size >= IDENTITY_SIZE
        self.accepted = [Account() for _ in range(config.producers)]
        self.received = [Account() for _ in range(config.consumers)]
        self.out_of_order = [0] * config.consumers
        self.repeated = [0] * config.consumers

    def produce(self, index: int, dispatcher: tempo.Dispatcher, halt: list[bool]) -> None:
        """Send as the load does, and account for each event that was accepted."""
        sent = Sent(self._config.payload_size)
        source = islice(events(self._config.payload_size, index, sent), self._each)
        send(self._config, source, sent, dispatcher, halt, self.accepted[index])

    def consume(self, index: int, dispatcher: tempo.Dispatcher) -> None:
        """Take each batch apart. A batch at odds with itself is an AssertionError, whatever the counts say."""
        account = self.received[index]
        start = identity_start(self._config.payload_size)
        session, place = (slice(part.start + start, part.stop + start) for part in (SESSION, SEQUENCE))
        last = [0] * self._config.producers
        for batch in dispatcher:
            payloads = batch.tolist()
            if not 0 < len(payloads) == len(batch) or b"".join(payloads) != batch.data:
                raise AssertionError(f"a batch of {len(batch)} events does not hold what its data holds")
            if batch.nbytes != batch.data.nbytes or batch[-1] != payloads[-1]:
                raise AssertionError(f"a batch of {len(batch)} events is at odds with itself")
            for payload in payloads:
                account.add(payload)
                if self._identity:
                    producer, sequence = int(payload[session]), int(payload[place])
                    if sequence <= last[producer]:
                        self.out_of_order[index] += sequence < last[producer]
                        self.repeated[index] += sequence == last[producer]
                    last[producer] = sequence
            if self._config.consumer_delay:
                time.sleep(self._config.consumer_delay)

    def result(self, outcome: Outcome) -> CensusResult:
        """Add both sides up, once the threads have ended."""
        sent, received = _total(self.accepted), _total(self.received)
        problems = list(outcome.problems)
        if received.nbytes != sent.nbytes:
            problems.append(f"{sent.nbytes} bytes accepted, {received.nbytes} delivered")
        if received.checksum != sent.checksum:
            problems.append("the checksums of what was accepted and what was delivered differ")
        if sum(self.repeated) or sum(self.out_of_order):
            problems.append(f"{sum(self.repeated)} events repeated, {sum(self.out_of_order)} out of order")
        return CensusResult(
            accepted=sent.events,
            delivered=received.events,
            refused=sent.refused,
            checksum_equal=received.checksum == sent.checksum,
            out_of_order=sum(self.out_of_order),
            repeated=sum(self.repeated),
            identities_checked=self._identity,
            seconds=outcome.load_seconds,
            problems=problems,
        )


def _total(accounts: list[Account]) -> Account:
    return Account(
        sum(account.events for account in accounts),
        sum(account.nbytes for account in accounts),
        sum(account.checksum for account in accounts),
        sum(account.refused for account in accounts),
    )


@dataclass
class CensusResult:
    """What the census found; the fields are those of the result file."""

    accepted: int
    delivered: int
    refused: int
    checksum_equal: bool
    out_of_order: int
    repeated: int
    identities_checked: bool
    """False when payloads are too small to carry an identity: then counts and checksums alone speak."""
    seconds: float
    problems: list[str]

    @property
    def lost(self) -> int:
        """Events accepted and not delivered."""
        return max(0, self.accepted - self.delivered)

    @property
    def duplicated(self) -> int:
        """Events delivered more often than accepted."""
        return max(0, self.delivered - self.accepted)


def take(config: Config, seconds: float, each: int | None = None, every: float = 1.0) -> tuple[CensusResult, Outcome]:
    """Run the census on a new dispatcher, into no sink, until the time is over or each producer has sent ``each``.

    every: after how many seconds to look whether that is so.
    """
    census = Census(config, each)
    outcome = drive(config, seconds, census, every=every)
    return census.result(outcome), outcome
