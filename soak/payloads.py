# SPDX-License-Identifier: MIT
"""What producers send. Every payload is formatted as text per event and then encoded, as an application would.

Each event names its producer and its place in that producer's sequence (``0007-1000001234``), so that a receiver can
tell what is missing, repeated or out of order. Numbers keep their width (sequences start at 1e9): payloads of one kind
have one size, the identity has a fixed place, and the mix has an exact mean of 163 bytes.

The first event of each ``STRIDE`` is a *probe*: after its identity it carries ``~``, which no other payload holds, and
the time at which it was made. A consumer finds probes in a batch at C speed. Events of a fixed size below
``PROBED_SIZE`` have no room for a probe, and below ``IDENTITY_SIZE`` none for an identity.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, count, cycle, islice, repeat
from operator import mod
from time import perf_counter_ns

PAGE = (
    '{"id":"%s-%d","event":"page_view","url":"https://shop.example/catalogue/garden/lanterns?sort=price&page=3",'
    '"referrer":"https://search.example/results?q=lantern+for+the+garden","title":"Garden lanterns - page 3 of 12",'
    '"viewport":[1440,900],"language":"en","agent":"Mozilla/5.0 (X11; Linux aarch64) Browser/131.0","render_ms":%d,'
    '"transfer_kib":412,"consent":["needed","stats"],"trial":"B"}'
)
FORM = (
    '{"id":"%s-%d","event":"form_input","form":"checkout.delivery","field":"street_and_number","step":2,"of":4,'
    '"filled_by":"keyboard","value_length":9,"corrections":1,"valid":true,"hint_shown":false,"focus_ms":%d,'
    '"remaining":"town"}'
)
CLICK = (
    '{"id":"%s-%d","event":"click","target":"button#to-basket","label":"Add","at":[%d,412],"button":0,'
    '"modifiers":[],"path":"/candle"}'
)
SCROLL = (
    '{"id":"%s-%d","event":"scroll","top_px":%d,"height_px":5120,"direction":"down","by":"wheel","path":"/lanterns"}'
)
HEARTBEAT = (
    '{"id":"%s-%d","event":"heartbeat","visible":true,"idle_ms":%d,"online":true,"queue":0,"battery":0.8,"tabs":2}'
)
PROBE = (
    '{"id":"%s-%d~%019d","event":"probe","visible":true,"online":true,"note":"the part behind the tilde is the clock '
    'in ns when this was made."}'
)

# Twenty events: one page view, four form inputs, clicks, scrolls and heartbeats five each. 163 bytes on average.
MIX = (*(PAGE, CLICK, SCROLL, HEARTBEAT), *(FORM, CLICK, SCROLL, HEARTBEAT) * 4)

STRIDE = 1024  # a probe and the search for it cost several times what another event does
FIGURES = tuple(range(256, 512)) * (STRIDE // 256)
"""Three digits an event: a coordinate, a time, a distance. Made once, so that each producer holds next to nothing."""
MARK = b"~"
FIRST_SEQUENCE = 1_000_000_000
LARGEST, MEAN = 398, 163  # bytes, in the telemetry mix

# A probe's head: the identity (producer, dash, sequence), the mark, the time.
SESSION = slice(0, 4)
SEQUENCE = slice(5, 15)
IDENTITY_SIZE = 15
TIME = slice(16, 35)
PROBED_SIZE = 35


def _start(size: int | None) -> int:
    """Return where the identity starts in each payload: behind ``{"id":"`` in telemetry."""
    return 7 if size is None else 0


def identity_of(payload: bytes, size: int | None) -> tuple[int, int]:
    """Return the producer and the sequence of an event. Raises ValueError when it has none."""
    head = payload[_start(size) : _start(size) + IDENTITY_SIZE]
    return int(head[SESSION]), int(head[SEQUENCE])


class Sent:
    """The probes of one producer that were accepted: how many, and the sum of the CRC-32 of their heads.

    A sum does not depend on the order in which several consumers add up, so both ends can be compared.
    """

    def __init__(self, size: int | None) -> None:
        self.probes = 0
        self.checksum = 0
        start = _start(size)
        self._head = slice(start, start + PROBED_SIZE)
        self._mark = slice(start + IDENTITY_SIZE, start + IDENTITY_SIZE + 1)

    def add(self, probe: bytes) -> bytes:
        """Count a probe that is about to be sent; return it."""
        self.probes += 1
        self.checksum += zlib.crc32(probe[self._head])
        return probe

    def take_back(self, payload: bytes) -> None:
        """Uncount ``payload``, which was refused, if it is a probe."""
        if payload[self._mark] == MARK:
            self.probes -= 1
            self.checksum -= zlib.crc32(payload[self._head])


def events(size: int | None, producer: int, sent: Sent) -> Iterator[bytes]:
    """Return the endless events of one producer: of ``size`` bytes each, or the telemetry mix for None.

    sent: counts the probes. An iterator, because taking the next event costs less than calling a function.
    """
    session = f"{producer:04d}"
    return chain.from_iterable(_telemetry(session, sent)) if size is None else _sized(session, size, sent)


def _telemetry(session: str, sent: Sent) -> Iterator[Iterable[bytes]]:
    """Yield probes and what follows them. Each event is formatted when asked for; map() only saves a Python loop."""
    templates = cycle(MIX)
    for first in count(FIRST_SEQUENCE, STRIDE):
        yield (sent.add((PROBE % (session, first, perf_counter_ns())).encode()),)
        fields = zip(repeat(session), range(first + 1, first + STRIDE), FIGURES)
        yield map(str.encode, map(mod, islice(templates, STRIDE - 1), fields))


def _sized(session: str, size: int, sent: Sent) -> Iterator[bytes]:
    """Yield events; of small ones only the identity's last characters are left, down to none."""
    # No template here: % would look at each character of a large filler, where an f-string copies it at once.
    filler, probe_filler = _filler(size - IDENTITY_SIZE), _filler(size - PROBED_SIZE)
    missing, probed = max(0, IDENTITY_SIZE - size), int(size >= PROBED_SIZE)
    for first in count(FIRST_SEQUENCE, STRIDE):
        if probed:
            yield sent.add(f"{session}-{first}~{perf_counter_ns():019d}{probe_filler}".encode())
        for sequence in range(first + probed, first + STRIDE):
            yield f"{session}-{sequence}{filler}"[missing:].encode()


@lru_cache(maxsize=4)
def _filler(size: int) -> str:
    """Return ``size`` characters (none when negative) that hold neither a probe's mark nor a line's end.

    All producers share one text, which would otherwise be most of what the harness holds.
    """
    text = " the quick brown fox jumps over the lazy dog 0123456789"
    return "".join(islice(cycle(text), max(0, size)))


def find_probes(data: memoryview) -> list[bytes]:
    """Return the heads of all probes in a batch's data: some 10 GB/s."""
    owner = data.obj  # usually one whole bytes object: no copy
    text = owner if type(owner) is bytes and len(owner) == data.nbytes else bytes(data)
    found = []
    at = text.find(MARK)
    while at >= 0:
        found.append(text[at - IDENTITY_SIZE : at + PROBED_SIZE - IDENTITY_SIZE])
        at = text.find(MARK, at + 1)
    return found
