# SPDX-License-Identifier: MIT
"""The pass in which every event is checked: each accepted one delivered once, whole, and in order.

Memory stays small: of each producer only the last sequence is kept. Sequences that strictly rise cannot repeat, equal
counts then leave no room for a loss, and equal sums of CRC-32 mean equal content.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import tempo
from soak.config import Config
from soak.drive import Outcome, drive
from soak.load import Account, Load
from soak.payloads import IDENTITY_SIZE, identity_of


class Census(Load):
    """The work of the census pass."""

    def __init__(self, config: Config, each: int | None = None) -> None:
        super().__init__(config, each=each)
        self._checked = True
        self.identities = config.payload_size is None or config.payload_size >= IDENTITY_SIZE
        self.received = [Account() for _ in range(config.consumers)]

    def consume(self, index: int, dispatcher: tempo.Dispatcher) -> None:
        """Take each batch apart. A batch at odds with itself is an AssertionError."""
        account = self.received[index]
        last = [0] * self.config.producers
        for batch in dispatcher:
            payloads = batch.tolist()
            if not 0 < len(payloads) == len(batch) or b"".join(payloads) != batch.data:
                raise AssertionError(f"a batch of {len(batch)} events does not hold what its data holds")
            if batch.nbytes != batch.data.nbytes or batch[-1] != payloads[-1]:
                raise AssertionError(f"a batch of {len(batch)} events is at odds with itself")
            for payload in payloads:
                account.add(payload)
                if self.identities:
                    producer, sequence = identity_of(payload, self.config.payload_size)
                    account.out_of_order += sequence <= last[producer]
                    last[producer] = sequence
            if self.config.consumer_delay:
                time.sleep(self.config.consumer_delay)


@dataclass
class CensusResult:
    """What the census found; the fields are those of the result file."""

    accepted: int
    delivered: int
    refused: int
    out_of_order: int  # or repeated
    checksum_equal: bool
    identities_checked: bool
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

    @property
    def remarks(self) -> list[str]:
        """What could not be checked."""
        return [] if self.identities_checked else ["payloads too small to carry an identity: order not checked"]


def take(config: Config, seconds: float, each: int | None = None, every: float = 1.0) -> tuple[CensusResult, Outcome]:
    """Run the census, into no sink, until the time is over or each producer has sent ``each`` (asked ``every`` s)."""
    census = Census(config, each)
    outcome = drive(config, seconds, census, every=every)
    sent, received = (
        [sum(figures) for figures in zip(*(vars(account).values() for account in accounts))]
        for accounts in (census.accounts, census.received)
    )
    (accepted, sent_bytes, sent_sum, refused, _), (delivered, came_bytes, came_sum, _, disordered) = sent, received
    problems = list(outcome.problems)
    if sent_bytes != came_bytes:
        problems.append(f"{sent_bytes} bytes accepted, {came_bytes} delivered")
    if sent_sum != came_sum:
        problems.append("the checksums of what was accepted and what was delivered differ")
    if disordered:
        problems.append(f"{disordered} events out of order or repeated")
    found = (accepted, delivered, refused, disordered, sent_sum == came_sum, census.identities)
    return CensusResult(*found, outcome.load_seconds, problems), outcome
