# SPDX-License-Identifier: MIT
"""What came out on the other side of a sink, compared with what the dispatcher had accepted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

from soak.config import Config
from soak.drive import describe
from soak.load import Account
from soak.payloads import FIRST_SEQUENCE, IDENTITY_SIZE, identity_of
from soak.sinks.places import Place


@dataclass
class ReadBack:
    """What was found, in events unless said otherwise."""

    read: bool = True  # False: such a place cannot be read back
    events: int = 0
    lost: int = 0  # accepted, and not there
    repeated: int = 0  # there once more than accepted
    out_of_order: int = 0  # first seen behind a later one of the same producer
    strange: int = 0  # not what any producer sent
    checksum_equal: bool = True  # the sums of the CRC-32 of all accepted, and of all that are there, each counted once
    problems: list[str] = field(default_factory=list)


def read_back(place: Place, accepted: Sequence[Account], config: Config) -> ReadBack:
    """Close a place, read it and compare."""
    try:
        place.close()
        if place.read is None:
            return ReadBack(read=False)
        return compare(place.read(), accepted, config.payload_size, once=place.once, ordered=config.consumers == 1)
    except Exception as error:  # each client has its own
        return ReadBack(read=False, problems=[f"read back: {describe(error)}"])


def compare(
    events: Iterable[bytes], accepted: Sequence[Account], size: int | None, *, once: bool, ordered: bool
) -> ReadBack:
    """Compare events with what was accepted; size: of each payload, None for telemetry.

    once: whether a repeated event is a problem; ordered: whether a producer's events must be in order.
    """
    found = ReadBack()
    checksum = distinct = 0
    expected = sum(account.events for account in accepted)
    identities = size is None or size >= IDENTITY_SIZE
    seen = [bytearray(account.events + account.refused) for account in accepted]  # a byte an event: was it there
    last = [-1] * len(accepted)
    for payload in events:
        found.events += 1
        if identities:
            try:
                producer, sequence = identity_of(payload, size)
            except ValueError:
                producer = -1
            if not 0 <= producer < len(accepted) or not 0 <= (place := sequence - FIRST_SEQUENCE) < len(seen[producer]):
                found.strange += 1
                continue
            if seen[producer][place]:
                found.repeated += 1
                continue
            seen[producer][place] = 1
            found.out_of_order += place < last[producer]
            last[producer] = max(place, last[producer])
        distinct += 1
        checksum += crc32(payload)
    found.lost = max(0, expected - distinct)
    found.repeated += max(0, distinct - expected)
    found.checksum_equal = checksum == sum(account.checksum for account in accepted)
    for wrong, text in (
        (found.lost, f"{found.lost} of {expected} accepted events are not there"),
        (found.strange, f"{found.strange} events are there that nobody sent"),
        (found.repeated if once else 0, f"{found.repeated} events are there repeatedly"),
        (found.out_of_order if ordered else 0, f"{found.out_of_order} events are there out of order"),
        (not found.checksum_equal, "the checksums of what was accepted and of what is there differ"),
    ):
        if wrong:
            found.problems.append(f"read back: {text}")
    return found
