# SPDX-License-Identifier: MIT
"""States of a dispatcher, calls to interleave in them, and what must hold whatever the order of their bytecodes."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Coroutine, Iterable, Iterator
from functools import partialmethod
from typing import Any, NamedTuple

from soak.interleave.schedule import Actor, Loop, Schedule

INTERVAL = 0.5  # seconds of the schedule's clock; less than LOOK_UP, which would hide a timer that nobody set
LOOK_UP = 1.0  # seconds after which a waiting thread looks anyway
SIZE = 500  # bytes of a payload: credit covers it from the beginning
MORE = 4 * SIZE  # bytes of one for which there may be no room while there is some for others
WAITS = {"take all", "atake all", "wait"}  # calls that wait for a batch

# Limits of buffer and batch, and what was accepted after the consumer began to wait, in payloads; calls under way.
STATES: dict[str, tuple[int, int | None, int, list[str]]] = {
    "empty": (64, None, 0, []),
    "open batch with credit": (64, None, 3, []),
    "one short of a batch": (64, 16, 15, []),
    "closed batch": (64, 16, 18, []),
    "one short of the buffer": (16, None, 15, []),
    "full, one waits": (16, None, 16, ["enqueue more"]),
    "full batches, two wait": (16, 4, 16, ["enqueue more", "enqueue more"]),
    "shutting down": (64, 4, 6, ["shutdown"]),
}


class Offer(NamedTuple):  # what became of a payload that a call was given
    data: bytes
    error: Any  # None: it was accepted
    ended: float  # when the call did
    before: int  # offers on record when it began


def names(payloads: Iterable[bytes]) -> list[tuple[bytes, int]]:
    return [(data[:1], int(data[1:].rstrip(b"."))) for data in payloads]


class Scene:
    """One dispatcher, the calls made to it, and the record of what came of them."""

    def __init__(self, schedule: Schedule, name: str, consumer: str, nested: bool) -> None:
        """consumer: the call of one who takes batches from the beginning. nested: a call is made within another."""
        self.schedule, self.consumer, self.nested = schedule, consumer, nested
        self.tempo: Any = schedule.module
        self.offers: list[Offer] = []
        self.unsure: set[bytes] = set()  # payloads of an interrupted call
        self.received: list[tuple[float, list[bytes]]] = []
        self.handed_back: list[Any] = []  # batches
        self.interrupted = False
        self.taking = 0  # calls of get
        self.closing, self.closed = "", False  # "shutdown" or "stop", once called; and it refuses all from then on
        room, batch, fill, calls = STATES[name]
        self.limit, self.batch = room * SIZE, batch and batch * SIZE
        self.d = self.tempo.Dispatcher(interval=INTERVAL, max_buffered_bytes=self.limit, max_batch_bytes=self.batch)
        if consumer:
            self.begin(consumer)
            schedule.settle()
        for _ in range(fill):
            self.enqueue("f")
        for call in calls:
            schedule.run(self.begin(call))
        if not self.closing:  # a consumer would make an end of it
            schedule.settle()
        self.took, self.closed = False, bool(self.closing)  # took: something has left since the state was set up

    def begin(self, call: str) -> Actor:
        producer = chr(ord("A") + len(self.schedule.actors))
        return Actor(self.schedule, call, lambda: self.make(call, producer))

    def make(self, call: str, producer: str) -> None:
        """Make a call: the method of that name."""
        getattr(self, call.replace(" ", "_"))(producer)

    def waiting(self) -> set[str]:
        return {actor.name for actor in self.schedule.actors if actor.state == "blocked"}

    def hidden(self) -> int:
        """Return how many calls may have a batch which is not on record yet: calls of get that do not wait."""
        return self.taking - sum(a.state == "blocked" and a.name in ("take all", "wait") for a in self.schedule.actors)

    def offer(self, producer: str, sizes: list[int], call: Callable[[list[bytes]], object]) -> None:
        """Make a call that offers payloads, and put on record what came of it."""
        number = sum(offer.data.startswith(producer.encode()) for offer in self.offers)
        payloads = [f"{producer}{number + i}".encode().ljust(size, b".") for i, size in enumerate(sizes)]
        before, closed, accepted = len(self.offers), self.closed, len(payloads)
        error: Any = None
        try:
            call(payloads)
        except self.tempo.Error as raised:
            error, accepted = raised, getattr(raised, "accepted", 0)
        except KeyboardInterrupt:
            self.unsure.update(payloads)
            raise
        if isinstance(error, self.tempo.QueueFull) and not self.nested:  # else credit counts as used
            assert error.buffered_bytes + error.needed > error.max_buffered_bytes, f"refused, and it fits: {error}"
        assert not closed or not accepted, f"accepted after {self.closing}"
        ends = [None] * accepted + [error] * (len(payloads) - accepted)
        self.offers += [Offer(data, end, self.schedule.now, before) for data, end in zip(payloads, ends)]

    def enqueue(self, producer: str, timeout: float | None = 0.0, size: int = SIZE) -> None:
        self.offer(producer, [size], lambda payloads: self.d.enqueue(payloads[0], timeout))

    enqueue_waiting = partialmethod(enqueue, timeout=None)
    enqueue_more = partialmethod(enqueue, timeout=None, size=MORE)

    def enqueue_two(self, producer: str) -> None:
        """Offer one that may be too large for what is free, and one that may fit: they must not change places."""
        self.enqueue(producer, size=MORE)
        self.enqueue(producer)

    def enqueue_many(self, producer: str) -> None:
        self.offer(producer, [SIZE] * 3, self.d.enqueue_many)

    def aenqueue(self, producer: str) -> None:
        self.offer(producer, [SIZE], lambda payloads: self.in_a_loop(self.d.aenqueue(payloads[0])))

    def in_a_loop(self, work: Coroutine[Any, Any, object]) -> None:
        with contextlib.closing(Loop(self.schedule)) as loop:
            loop.run_until_complete(work)

    def get(self, producer: str, timeout: float | None = 0.0, loop: Iterator[Any] | None = None) -> bool:
        """Take a batch, perhaps as a loop does; return whether there may be more."""
        self.took, self.taking, batch = True, self.taking + 1, []
        try:
            batch = (next(loop) if loop else self.d.get(timeout)).tolist()
            self.received.append((self.schedule.now, batch))
        except (queue.Empty, self.tempo.Stopped, StopIteration) as end:
            assert timeout is not None if isinstance(end, queue.Empty) else self.closing, f"get raised {end!r}"
        self.taking -= 1  # not after an interrupt, which may have lost a batch
        return bool(batch)

    wait = partialmethod(get, timeout=None)

    def take_all(self, producer: str) -> None:
        loop = iter(self.d)
        while self.get(producer, None, loop):
            pass

    def atake_all(self, producer: str) -> None:
        async def take() -> None:
            async for batch in self.d:
                self.received.append((self.schedule.now, batch.tolist()))

        self.in_a_loop(take())
        assert self.closing, "the end, and nobody has stopped it"

    def flush(self, producer: str) -> None:
        before, done = self.accepted(), self.d.flush()
        assert done or self.closing == "stop", "flush gave up"
        assert not done or self.hidden() or before <= self.out(), "flush returned before all was delivered"

    def shutdown(self, producer: str) -> None:
        self.closing = self.closing or "shutdown"
        try:
            self.d.shutdown()
            assert self.hidden() or self.d.stats().buffered == 0, "shutdown returned before all was delivered"
        except self.tempo.Stopped:
            assert self.closing == "stop", "shutdown raised Stopped, and nobody has stopped it"
        self.closed = True

    def stop(self, producer: str = "") -> None:
        self.took, self.closing = True, "stop"
        self.handed_back += self.d.stop()
        self.closed = True

    def stats(self, producer: str = "") -> Any:
        t = self.d.stats()
        assert t.accepted == t.delivered + t.in_flight + t.buffered + t.discarded, f"out of balance: {t}"
        assert 0 <= t.buffered_bytes <= t.peak_buffered_bytes <= self.limit, f"out of bounds: {t}"
        return t

    def interrupt(self, producer: str) -> None:
        """Do what Ctrl-C does."""
        self.interrupted = True
        raise KeyboardInterrupt

    def nudge(self) -> None:
        """Do what lets a call that waits go on: put in a payload, and make room."""
        self.enqueue("n")
        self.d.flush(0)
        while self.get(""):
            self.d.flush(0)

    def accepted(self) -> set[bytes]:
        return {offer.data for offer in self.offers if offer.error is None}

    def out(self) -> set[bytes]:
        return {data for _, batch in self.received for data in batch}

    def check(self) -> None:
        """Let all go on until none can; look; let the interval pass; take out what is there; stop."""
        self.schedule.settle(LOOK_UP if self.nested else 0)  # a nested call may wake a thread before it waits
        self.look()
        self.schedule.settle(INTERVAL)
        t = self.look()
        assert not self.waiting() & WAITS or not t.buffered, f"a consumer waits, and the interval is over: {t}"
        if self.consumer:  # it needed nobody's help
            at = {data: when for when, batch in self.received for data in batch}
            allowed = INTERVAL + (LOOK_UP if self.nested and self.consumer == "take all" else 0)
            late = [offer.data for offer in self.offers if at.get(offer.data, 0) > offer.ended + allowed]
            assert not late, f"later than the interval: {names(late)}"
        if self.interrupted:  # is it as good as before?
            for _ in range(3):
                self.enqueue("i")
            if self.closing:
                self.stop()
        more = True
        while more or self.d.stats().buffered:
            self.d.flush(0)
            more = self.get("")
            self.schedule.settle()
        assert not self.closing or self.d.stats().state == "stopped", "drained, and not stopped"
        waiting = [a.name for a in self.schedule.actors if a.state != "ended" and (self.closing or a.name not in WAITS)]
        assert not waiting, f"all is taken, and {waiting} wait"
        self.stop()
        self.schedule.settle()
        assert all(actor.state == "ended" for actor in self.schedule.actors), "stopped, and somebody waits"
        self.look()
        self.census()

    def look(self) -> Any:
        """Look at those who wait, and at the books, while no call is going on."""
        for actor in self.schedule.actors:
            assert isinstance(actor.error, KeyboardInterrupt | None), f"{actor.name} raised {actor.error!r}"
        full = [offer for offer in self.offers if isinstance(offer.error, self.tempo.QueueFull)]
        if self.waiting() & WAITS:  # by the record: to ask the dispatcher might help it
            there = sum(map(len, self.accepted() - self.out()))
            assert self.hidden() or there < (self.batch or self.limit + 1), f"{there} bytes are there for who waits"
            assert self.waiting() <= WAITS, f"a consumer waits, and so do others: {self.waiting()}"
            for offer in full:
                due = {before.data for before in self.offers[: offer.before] if before.error is None}
                assert self.hidden() or due <= self.out(), "a consumer waits, and a payload was refused"
        t = self.stats()
        assert t.state != "stopped" or t.buffered == 0 or self.interrupted, f"stopped, and not empty: {t}"
        room = self.limit - t.buffered_bytes
        assert not t.waiting_producers or room < MORE, f"a producer waits for room that is there: {t}"
        assert t.buffered or not self.waiting() & {"flush", "shutdown"}, f"all is delivered, and who drains waits: {t}"
        if not self.took and not self.nested:  # then the room has only become less, and must be used up
            assert all(len(offer.data) > room for offer in full), f"refused what fits: {t}"
        return t

    def census(self) -> None:
        """Check that accepted payloads came out once, in order for each producer, no others did, and all is counted."""
        out = [data for _, batch in self.received for data in batch]
        back = [data for batch in self.handed_back for data in batch.tolist()]
        came, accepted, t = out + back, self.accepted(), self.d.stats()
        gone = t.delivered - len(out)  # payloads of a batch that was on its way out of an interrupted call
        assert gone == 0 or self.hidden(), f"{len(out)} were delivered: {t}"
        assert len(came) == len(set(came)), f"repeated: {names(came)}"
        assert len(accepted - set(came)) <= gone, f"lost: {names(accepted - set(came))}"
        assert set(came) <= accepted | self.unsure, f"refused, and delivered: {names(set(came) - accepted)}"
        if len([actor for actor in self.schedule.actors if actor.name in WAITS | {"get"}]) < 2:  # else in any order
            for some in (out, back):
                by_producer = sorted(names(some), key=lambda name: name[0])
                assert by_producer == sorted(by_producer), f"out of order: {names(some)}"
        refused = len({id(offer.error) for offer in self.offers if offer.error is not None})
        assert 0 <= t.accepted - len(accepted) <= len(self.unsure), f"{len(accepted)} were accepted: {t}"
        assert 0 <= t.rejected - refused <= len(self.unsure), f"{refused} were refused: {t}"
        left = (t.buffered, t.waiting_producers, t.waiting_consumers)
        assert (*left, t.discarded) == (0, 0, 0, len(back)), f"left behind, or handed back and not counted: {t}"
