# SPDX-License-Identifier: MIT
"""States of a dispatcher, calls to interleave in them, and what must hold whatever the order of their bytecodes."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Coroutine, Iterable
from functools import partialmethod
from typing import Any, NamedTuple

from soak.interleave.schedule import Actor, Loop, Schedule

INTERVAL = 0.5  # seconds of the schedule's clock; less than LOOK_UP, which would hide a timer that nobody set
LOOK_UP = 1.0  # seconds after which a waiting thread looks anyway
SIZE = 500  # bytes of a payload: credit covers it from the beginning
MORE = 4 * SIZE  # bytes of one for which there may be no room while there is some for others


class State(NamedTuple):
    room: int  # payloads
    batch: int | None  # payloads of a full batch
    fill: int  # payloads that were accepted, after a consumer began to wait if there is one
    calls: tuple[str, ...] = ()  # that are under way


STATES = {
    "empty": State(64, None, 0),
    "open batch with credit": State(64, None, 3),
    "one short of a batch": State(64, 16, 15),
    "closed batch": State(64, 16, 18),
    "one short of the buffer": State(16, None, 15),
    "full, one waits": State(16, None, 16, ("enqueue more",)),
    "full batches, two wait": State(16, 4, 16, ("enqueue more", "enqueue more")),
    "shutting down": State(64, 4, 6, ("shutdown",)),
}
WAITS = ("take all", "atake all", "wait")
PRODUCERS = ("enqueue", "enqueue waiting", "enqueue more", "aenqueue")


class Offer(NamedTuple):
    """What became of a payload that a call was given."""

    data: bytes
    error: Any  # None: it was accepted
    ended: float  # when the call did
    before: int  # offers on record when it began


def brief(payloads: Iterable[bytes]) -> list[bytes]:
    return [data.rstrip(b".") for data in payloads]


class Scene:
    """One dispatcher, the calls made to it, and the record of what came of them."""

    def __init__(self, schedule: Schedule, name: str, consumer: str, nested: bool) -> None:
        """consumer: the call of one who takes batches from the beginning. nested: a call is made within another."""
        self.schedule = schedule
        self.tempo: Any = schedule.module
        self.offers: list[Offer] = []
        self.unsure: set[bytes] = set()  # payloads of an interrupted call
        self.received: list[tuple[float, list[bytes]]] = []
        self.handed_back: list[Any] = []  # batches
        self.taking = 0  # calls that may have a batch which is not on record yet
        self.took = False  # something has left since the state was set up
        self.closing = ""  # "shutdown" or "stop", once that was called
        self.closed = False  # that went so far that nothing is accepted any more
        self.calls: list[tuple[str, Actor]] = []
        self.nested, self.consumer = nested, consumer
        state = STATES[name]
        self.limit = state.room * SIZE
        self.batch = state.batch * SIZE if state.batch else None
        make = self.tempo.Dispatcher
        self.d = make(interval=INTERVAL, max_buffered_bytes=self.limit, max_batch_bytes=self.batch)
        if consumer:
            self.begin(consumer)
            schedule.settle()
        for _ in range(state.fill):
            self.enqueue("f")
        for call in state.calls:
            schedule.run(self.begin(call))
        if not self.closing:  # a consumer would make an end of it
            schedule.settle()
        self.took, self.closed = False, bool(self.closing)

    def begin(self, call: str) -> Actor:
        """Make an actor for a call."""
        producer = chr(ord("A") + len(self.calls))
        actor = Actor(self.schedule, lambda: self.make(call, producer))
        self.calls.append((call, actor))
        return actor

    def make(self, call: str, producer: str) -> None:
        """Make a call: the method of that name."""
        getattr(self, call.replace(" ", "_"))(producer)

    def waiting(self, *names: str) -> list[str]:
        """Return those calls of these names that wait."""
        return [call for call, actor in self.calls if actor.state == "blocked" and call in names]

    # -- Calls, each in its actor's thread, on record ----------------------------------------------------------------

    def offer(self, producer: str, sizes: list[int], call: Callable[[list[bytes]], object]) -> None:
        """Make a call that offers payloads, and put on record what came of it."""
        number = sum(offer.data.startswith(producer.encode()) for offer in self.offers)
        payloads = [f"{producer}{number + i}".encode().ljust(size, b".") for i, size in enumerate(sizes)]
        before, closed = len(self.offers), self.closed
        error: Any = None
        accepted = len(payloads)
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
        for i, data in enumerate(payloads):
            self.offers.append(Offer(data, error if i >= accepted else None, self.schedule.now, before))

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

    def get(self, producer: str, timeout: float | None = 0.0) -> bool:
        """Take a batch; return whether there may be more."""
        self.took = True
        self.taking += 1
        try:
            self.received.append((self.schedule.now, self.d.get(timeout).tolist()))
        except queue.Empty:
            assert timeout is not None, "get without a timeout ran out of time"
            return False
        except self.tempo.Stopped:
            assert self.closing, "Stopped, and nobody has stopped it"
            return False
        except KeyboardInterrupt:
            self.taking += 1  # for good: it may be lost
            raise
        finally:
            self.taking -= 1
        return True

    wait = partialmethod(get, timeout=None)

    def take_all(self, producer: str) -> None:
        while self.get(producer, None):
            pass

    def atake_all(self, producer: str) -> None:
        async def take() -> None:
            async for batch in self.d:
                self.received.append((self.schedule.now, batch.tolist()))

        self.in_a_loop(take())
        assert self.closing, "the end, and nobody has stopped it"

    def flush(self, producer: str) -> None:
        before = self.accepted()
        if self.d.flush():
            assert self.taking or before <= self.out(), "flush returned before all was delivered"
        else:
            assert self.closing == "stop", "flush gave up"

    def shutdown(self, producer: str) -> None:
        self.closing = self.closing or "shutdown"
        try:
            self.d.shutdown()
            assert self.taking or self.d.stats().buffered == 0, "shutdown returned before all was delivered"
        except self.tempo.Stopped:
            assert self.closing == "stop", "shutdown raised Stopped, and nobody has stopped it"
        self.closed = True

    def stop(self, producer: str) -> None:
        self.took, self.closing = True, "stop"
        self.handed_back += self.d.stop()
        self.closed = True

    def stats(self, producer: str) -> Any:
        t = self.d.stats()
        assert t.accepted == t.delivered + t.in_flight + t.buffered + t.discarded, f"out of balance: {t}"
        assert 0 <= t.buffered_bytes <= t.peak_buffered_bytes <= self.limit, f"out of bounds: {t}"
        return t

    def interrupt(self, producer: str) -> None:
        """Do what Ctrl-C does."""
        raise KeyboardInterrupt

    def nudge(self) -> None:
        """Do what lets a call that waits go on: put in a payload, and make room."""
        self.enqueue("n")
        self.d.flush(0)
        while self.get(""):
            self.d.flush(0)

    # -- What must hold when all have gone on as far as they can -----------------------------------------------------

    def accepted(self) -> set[bytes]:
        return {offer.data for offer in self.offers if offer.error is None}

    def out(self) -> set[bytes]:
        return {data for _, batch in self.received for data in batch}

    def interrupted(self) -> bool:
        return any(actor.error for _, actor in self.calls)

    def check(self) -> None:
        """Let all go on until none can; look; let the interval pass; take out what is there; stop."""
        self.schedule.settle(LOOK_UP if self.nested else 0)  # a nested call may wake a thread before it waits
        self.look()
        self.schedule.settle(INTERVAL)
        t = self.look()
        assert not self.waiting(*WAITS) or not t.buffered, f"a consumer waits, and the interval is over: {t}"
        if self.consumer:  # it needed nobody's help
            at = {data: when for when, batch in self.received for data in batch}
            allowed = INTERVAL + (LOOK_UP if self.nested and self.consumer == "take all" else 0)
            late = [offer.data for offer in self.offers if at.get(offer.data, 0) > offer.ended + allowed]
            assert not late, f"later than the interval: {brief(late)}"
        if self.interrupted():  # is it as good as before?
            for _ in range(3):
                self.enqueue("i")
            if self.closing:
                self.stop("")
        more = True
        while more or self.d.stats().buffered:
            self.d.flush(0)
            more = self.get("")
            self.schedule.settle()
        assert not self.closing or self.d.stats().state == "stopped", "drained, and not stopped"
        waiting = [call for call, actor in self.calls if actor.state != "ended" and (self.closing or call not in WAITS)]
        assert not waiting, f"all is taken, and {waiting} wait"
        self.stop("")
        self.schedule.settle()
        assert all(actor.state == "ended" for _, actor in self.calls), "stopped, and somebody waits"
        self.look()
        self.census()

    def look(self) -> Any:
        """Look at those who wait, and at the books, while no call is going on."""
        for call, actor in self.calls:
            if actor.error is not None and not isinstance(actor.error, KeyboardInterrupt):
                raise AssertionError(f"{call} raised {actor.error!r}") from actor.error
        full = [offer for offer in self.offers if isinstance(offer.error, self.tempo.QueueFull)]
        if self.waiting(*WAITS):  # by the record: to ask the dispatcher might help it
            there = sum(map(len, self.accepted() - self.out()))
            assert self.taking or there < (self.batch or self.limit + 1), f"{there} bytes are there for who waits"
            others = self.waiting(*PRODUCERS, "flush", "shutdown")
            assert not others, f"a consumer waits, and so do {others}"
            for offer in full:
                due = {before.data for before in self.offers[: offer.before] if before.error is None}
                assert self.taking or due <= self.out(), "a consumer waits, and a payload was refused"
        self.d._check()
        t = self.stats("")
        assert t.state != "stopped" or t.buffered == 0 or self.interrupted(), f"stopped, and not empty: {t}"
        if t.waiting_producers:
            assert t.buffered_bytes + MORE > self.limit, f"a producer waits for room that is there: {t}"
        if t.buffered == 0:
            assert not self.waiting("flush", "shutdown"), f"all is delivered, and who drains waits: {t}"
        if not self.took and not self.nested:  # then the room has only become less, and must be used up
            assert all(t.buffered_bytes + len(offer.data) > self.limit for offer in full), f"refused what fits: {t}"
        return t

    def census(self) -> None:
        """Check that accepted payloads came out once, in order for each producer, no others did, and all is counted."""
        out = [data for _, batch in self.received for data in batch]
        back = [data for batch in self.handed_back for data in batch.tolist()]
        came, accepted, t = out + back, self.accepted(), self.d.stats()
        gone = t.delivered - len(out)  # payloads of a batch that was on its way out of an interrupted call
        assert gone == 0 or self.taking, f"{len(out)} were delivered: {t}"
        assert len(came) == len(set(came)), f"repeated: {brief(came)}"
        assert len(accepted - set(came)) <= gone, f"lost: {brief(accepted - set(came))}"
        assert set(came) <= accepted | self.unsure, f"refused, and delivered: {brief(set(came) - accepted)}"
        if sum(call in (*WAITS, "get") for call, _ in self.calls) < 2:  # else they are on record in any order
            for some in (out, back):
                for producer in {data[:1] for data in some}:
                    numbers = [int(data[1:].rstrip(b".")) for data in some if data[:1] == producer]
                    assert numbers == sorted(numbers), f"out of order: {brief(some)}"
        refused = len({id(offer.error) for offer in self.offers if offer.error is not None})
        assert 0 <= t.accepted - len(accepted) <= len(self.unsure), f"{len(accepted)} were accepted: {t}"
        assert 0 <= t.rejected - refused <= len(self.unsure), f"{refused} were refused: {t}"
        assert t.discarded == len(back), f"{len(back)} were handed back: {t}"
        assert (t.buffered, t.waiting_producers, t.waiting_consumers) == (0, 0, 0), f"left behind: {t}"
