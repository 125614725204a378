# SPDX-License-Identifier: MIT
"""Services that limit a request by records, by bytes, and count a framing for each record.

``dispatcher(KINESIS)`` closes batches so that they fit into one request; ``requests(payloads, KINESIS)`` splits by the
exact limits. ``fits(payload, KINESIS)`` is for the producer: what never fits is refused there.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import tempo


class Limits(NamedTuple):
    """Of one request; ``framing``: bytes that count for each record in addition; ``largest``: a record, without it."""

    records: int
    nbytes: int
    framing: int
    largest: int


# PutRecords, where a partition key counts, and has 256 bytes at most; PutLogEvents; SendMessageBatch; and lines in a
# datagram that needs no fragments on Ethernet, joined by newlines: one less than there are lines.
KINESIS = Limits(500, 5 * tempo.MiB, 256, tempo.MiB - 256)
CLOUDWATCH = Limits(10_000, 1_048_576, 26, 256 * tempo.KiB - 26)
SQS = Limits(10, 256 * tempo.KiB, 0, 256 * tempo.KiB)
UDP = Limits(1432, 1432 + 1, 1, 1432)


def fits(payload: bytes, limits: Limits) -> bool:
    """Return whether a payload can be sent at all."""
    return len(payload) <= limits.largest


def dispatcher(limits: Limits, **more: Any) -> tempo.Dispatcher:
    """Return a dispatcher whose batches fit into a request, if payloads are no smaller than the framing."""
    most = limits.nbytes - limits.framing * min(limits.records, limits.nbytes // (2 * limits.framing or 1))
    return tempo.Dispatcher(max_batch_items=limits.records, max_batch_bytes=most, **more)


def requests(payloads: Iterable[bytes], limits: Limits) -> Iterator[list[bytes]]:
    """Yield lists of payloads, each within all limits. Raises ValueError for a payload that never fits."""
    request: list[bytes] = []
    nbytes = 0
    for payload in payloads:
        if not fits(payload, limits):
            raise ValueError(f"a record of {len(payload)} bytes is over {limits}")
        charge = len(payload) + limits.framing
        if len(request) == limits.records or nbytes + charge > limits.nbytes:
            yield request
            request, nbytes = [], 0
        request.append(payload)
        nbytes += charge
    if request:
        yield request


def datagrams(batch: tempo.Batch) -> Iterator[bytes]:
    """Yield a batch's lines as datagrams for ``socket.send``; no line may have a newline."""
    return map(b"\n".join, requests(batch.tolist(), UDP))
