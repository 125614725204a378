# SPDX-License-Identifier: MIT
"""States of a dispatcher, calls to interleave in them, and what must hold whatever the order of their bytecodes."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from soak.interleave.schedule import Actor, Schedule

INTERVAL = 10.0  # seconds of the schedule's clock
SMALL, LARGE = 8, 8 * 1024  # bytes of a payload, where producers do not rest, and where they do


class Broken(AssertionError):
    """Something that must hold does not."""


def must(condition: object, what: str) -> None:
    if not condition:
        raise Broken(what)


class Payload(NamedTuple):
    """What became of a payload that a call was given."""

    data: bytes
    accepted: bool
    at: float  # by the schedule's clock, when the call ended
    error: Exception | None


class Scene:
    """One dispatcher, the calls made to it, and the record of what came of them."""

    def __init__(self, module: ModuleType, state: str, consumer: bool, private: bool = True) -> None:
        self.module = module
        self.schedule = Schedule(module, private)
        self.offered: list[Payload] = []
        self.received: list[tuple[float, list[bytes]]] = []
        self.handed_back: list[bytes] = []
        self.taking = 0  # calls that may have taken a batch which they have not recorded yet
        self.closing = ""  # "shutdown" or "stop", once it was called
        self.closed = False  # one of them has come so far that nothing is accepted any more
        self.numbers: dict[str, int] = {}
        self.calls: list[tuple[str, Actor]] = []
        self.took = False  # something has left since the state was set up
        settings = STATES[state]
        self.size: int = settings.size
        self.limit = settings.payloads * self.size
        self.batch = self.limit + 1 if settings.batch is None else settings.batch * self.size
        self.d = module.Dispatcher(
            interval=INTERVAL,
            max_buffered_bytes=self.limit,
            max_batch_bytes=None if settings.batch is None else self.batch,
        )
        self.schedule.adopt(self.d)
        if settings.primed:
            self.fill(2)
            self.call_flush(0)
            self.call_get()
        self.consumer = consumer
        if consumer:
            self.begin("consumer")
            self.schedule.settle(time_passes=False)
        self.fill(settings.fill)
        for call in settings.calls:
            self.schedule.run(self.begin(call))
        if not self.closing:  # a consumer would make an end of it
            self.schedule.settle(time_passes=False)
        self.took = False
        self.closed = bool(self.closing)

    # -- Setting up --------------------------------------------------------------------------------------------------

    def fill(self, n: int) -> None:
        for _ in range(n):
            self.call_enqueue("f")

    def begin(self, call: str, counts: bool = False) -> Actor:
        """Make an actor for a call."""
        producer = chr(ord("A") + len(self.calls))
        actor = self.schedule.actor(lambda: CALLS[call](self, producer), counts)
        self.calls.append((call, actor))
        return actor

    # -- Calls, each in its actor's thread, recorded -----------------------------------------------------------------

    def payload(self, producer: str, size: int = 0) -> bytes:
        number = self.numbers[producer] = self.numbers.get(producer, -1) + 1
        return f"{producer}{number}".encode().ljust(size or self.size, b".")

    def offer(self, data: bytes, error: Exception | None = None) -> None:
        self.offered.append(Payload(data, error is None, self.schedule.now, error))

    def call_enqueue(self, producer: str, timeout: float | None = 0.0, size: int = 0) -> None:
        data = self.payload(producer, size)
        closed = self.closed
        try:
            self.d.enqueue(data, timeout=timeout)
        except self.module.Error as error:
            self.refused(data, error)
        else:
            must(not closed, f"{producer}: accepted after {self.closing}")
            self.offer(data)

    def call_enqueue_many(self, producer: str) -> None:
        many = [self.payload(producer) for _ in range(3)]
        closed = self.closed
        try:
            n = self.d.enqueue_many(many)
        except self.module.Error as error:
            n = error.accepted
            self.refused(many[n], error)
            for data in many[n + 1 :]:
                self.offer(data, error)
        must(not closed or not n, f"{producer}: accepted after {self.closing}")
        for data in many[:n]:
            self.offer(data)

    def refused(self, data: bytes, error: Any) -> None:
        self.offer(data, error)
        if isinstance(error, self.module.QueueFull):
            must(error.buffered_bytes + error.needed > error.max_buffered_bytes, f"refused, and it fits: {error}")

    def receive(self, batch: Any) -> None:
        self.received.append((self.schedule.now, batch.tolist()))

    def call_get(self, timeout: float | None = 0) -> bool:
        """Return whether there may be more."""
        self.taking += 1
        self.took = True
        try:
            self.receive(self.d.get(timeout))
        except queue.Empty:
            must(timeout is not None, "get without a timeout ran out of time")
            return False
        except self.module.Stopped:
            must(self.closing, "Stopped, and nobody has stopped it")
            return False
        finally:
            self.taking -= 1
        return True

    def call_consume(self) -> None:
        while self.call_get(None):
            pass

    def call_flush(self, timeout: float | None = None) -> None:
        before = {p.data for p in self.offered if p.accepted}
        if self.d.flush(timeout):
            out = {data for _, batch in self.received for data in batch}
            must(self.taking or before <= out, "flush returned before all was delivered")
        else:
            must(timeout is not None or self.closing == "stop", "flush gave up")

    def call_shutdown(self) -> None:
        self.closing = self.closing or "shutdown"
        try:
            self.d.shutdown()
        except self.module.Stopped:
            must(self.closing == "stop", "shutdown: Stopped, and nobody has stopped it")
        else:
            self.closed = True
            must(self.taking or self.d.stats().buffered == 0, "shutdown returned before all was delivered")

    def call_stop(self) -> None:
        self.closing = "stop"
        self.took = True
        for batch in self.d.stop():
            self.handed_back += batch.tolist()
        self.closed = True

    def call_stats(self) -> None:
        t = self.d.stats()
        must(t.accepted == t.delivered + t.in_flight + t.buffered + t.discarded, f"out of balance: {t}")
        must(0 <= t.buffered_bytes <= t.peak_buffered_bytes <= self.limit, f"out of bounds: {t}")

    def call_nudge(self) -> None:
        """What lets a call that waits go on: room, or a batch."""
        if not any(p.accepted for p in self.offered[-1:]):
            self.call_enqueue("n")
        self.call_flush(0)
        while self.call_get():
            self.call_flush(0)

    # -- What must hold when all have gone on as far as they can -----------------------------------------------------

    def check(self) -> None:
        """Let all go on until none can, look, empty the dispatcher, and look again. Raises Broken."""
        self.schedule.settle(time_passes=False)
        if any(call in ("consumer", "wait") and actor.state == "blocked" for call, actor in self.calls):
            # By the record: to ask the dispatcher would help it.
            out = sum(len(data) for _, batch in self.received for data in batch)
            there = sum(len(p.data) for p in self.offered if p.accepted) - out
            must(there < self.batch, f"{there} bytes are more than a batch, and a consumer waits")
        self.schedule.settle()
        self.errors()
        self.d._check()
        t = self.d.stats()
        accepted = [p for p in self.offered if p.accepted]
        must(t.accepted == t.delivered + t.buffered + t.discarded, f"out of balance: {t}")
        must(t.buffered_bytes <= t.peak_buffered_bytes <= self.limit, f"over the limit: {t}")
        waiting = [call for call, actor in self.calls if actor.state == "blocked"]
        if {"consumer", "wait"} & set(waiting):
            must(not t.buffered, f"a consumer waits, and {t.buffered} are there for it")
            must(
                not {"enqueue waiting", "enqueue more", "flush", "shutdown"} & set(waiting),
                f"a consumer waits, and so do {waiting}",
            )
        if {"enqueue waiting", "enqueue more"} & set(waiting):
            needed = self.d._state.producers[0].entry.charge
            must(t.buffered_bytes + needed > self.limit, f"waits for room that is there: {needed} bytes, {t}")
        if t.buffered == 0:
            must(not {"flush", "shutdown"} & set(waiting), f"all is delivered, and {waiting} wait")
        if not self.took:  # then the room has only become less, and must be used up
            full = [len(p.data) for p in self.offered if isinstance(p.error, self.module.QueueFull)]
            must(t.buffered_bytes + min(full, default=self.limit + 1) > self.limit, f"refused what fits: {t}")
        must(all(p.error is None or self.closing or isinstance(p.error, self.module.QueueFull) for p in self.offered),
             "Closed, and nobody has closed it")  # fmt: skip
        if self.consumer:  # it needed nobody's help
            at = {data: when for when, batch in self.received for data in batch}
            late = [p for p in accepted if p.data in at and at[p.data] > p.at + INTERVAL]
            must(not late, f"later than the interval: {late}")
        self.empty()
        self.census()

    def empty(self) -> None:
        """Take out what is there, until every call has ended."""
        for _ in range(1000):
            self.call_flush(0)
            more = self.call_get()
            self.schedule.settle()
            if not more and not self.d.stats().buffered:
                break
        waiting = [call for call, actor in self.calls if actor.state == "blocked" and call not in ("consumer", "wait")]
        must(not waiting, f"all is taken, and {waiting} wait")
        must(not self.closing or not any(actor.state == "blocked" for _, actor in self.calls), "waits after the end")
        if self.closing == "shutdown":
            must(self.d.stats().state == "stopped", "drained, and not stopped")
        self.call_stop()
        self.schedule.settle()
        must(all(actor.state == "idle" for _, actor in self.calls), "stopped, and somebody waits")
        self.errors()
        self.d._check()

    def errors(self) -> None:
        for call, actor in self.calls:
            if actor.error is not None:
                raise Broken(f"{call} raised {actor.error!r}") from actor.error

    def census(self) -> None:
        """Every accepted payload came out once, no refused one did, in order for each producer; all is counted."""
        out = [data for _, batch in self.received for data in batch]
        came = out + self.handed_back
        accepted = {p.data for p in self.offered if p.accepted}
        must(len(came) == len(set(came)), "repeated")
        must(accepted <= set(came), f"lost: {sorted(accepted - set(came))}")
        must(set(came) <= accepted, f"refused, and delivered: {sorted(set(came) - accepted)}")
        for some in (out, self.handed_back):
            last: dict[bytes, int] = {}
            for data in some if self.ordered else ():
                producer, number = data[:1], int(data[1:].rstrip(b"."))
                must(last.get(producer, -1) < number, f"out of order: {some}")
                last[producer] = number
        t = self.d.stats()
        must(t.accepted == len(accepted), f"{len(accepted)} were accepted: {t}")
        must(t.rejected == self.rejections(), f"{self.rejections()} were refused: {t}")
        must(t.delivered == len(out) and t.discarded == len(self.handed_back), f"{len(out)} were delivered: {t}")
        must((t.buffered, t.waiting_producers, t.waiting_consumers) == (0, 0, 0), f"left behind: {t}")

    @property
    def ordered(self) -> bool:
        """Whether batches were recorded in the order in which they were taken: not when two consumers were at it."""
        return sum(call in ("consumer", "wait", "get") for call, _ in self.calls) < 2

    def rejections(self) -> int:
        return len({id(p.error) for p in self.offered if p.error is not None})


CALLS: dict[str, Callable[[Scene, str], object]] = {
    "enqueue": lambda scene, producer: scene.call_enqueue(producer),
    "enqueue waiting": lambda scene, producer: scene.call_enqueue(producer, None),
    "enqueue more": lambda scene, producer: scene.call_enqueue(producer, None, 4 * scene.size),
    "enqueue_many": lambda scene, producer: scene.call_enqueue_many(producer),
    "get": lambda scene, producer: scene.call_get(),
    "flush": lambda scene, producer: scene.call_flush(),
    "shutdown": lambda scene, producer: scene.call_shutdown(),
    "stop": lambda scene, producer: scene.call_stop(),
    "stats": lambda scene, producer: scene.call_stats(),
    "wait": lambda scene, producer: scene.call_get(None),
    "consumer": lambda scene, producer: scene.call_consume(),
    "nudge": lambda scene, producer: scene.call_nudge(),
}
"""What an actor does, by name."""


class State(NamedTuple):
    """A dispatcher to interleave calls on: how large it is, and what has happened to it."""

    payloads: int  # that it has room for
    fill: int  # payloads that are in it, put there when the consumer has begun to wait, if there is one
    batch: int | None = None  # payloads of a full one
    primed: bool = True  # it has seen how large payloads are
    size: int = SMALL
    calls: Sequence[str] = ()  # that are under way then


STATES = {
    "empty": State(100, 0, primed=False),
    "plenty of room": State(100, 3),
    "one short of a batch": State(100, 4, batch=5),
    "one short of the buffer": State(6, 5),
    "full, one waits": State(6, 6, calls=("enqueue more",)),
    "full batch, two wait": State(6, 6, batch=6, calls=("enqueue more", "enqueue more")),
    "shutting down": State(100, 3, batch=2, calls=("shutdown",)),
    # Not primed, so that the payloads are larger than credit covers: each call takes the exact way.
    "half full, producers rest": State(8, 4, primed=False, size=LARGE),
}
DEEP_STATES = ("empty", "plenty of room", "one short of a batch", "one short of the buffer", "full, one waits")
"""Those in which three calls are interleaved."""

PRODUCERS = ("enqueue", "enqueue waiting", "enqueue_many")
OTHERS = ("get", "flush", "shutdown", "stop", "wait")
PAIRS: Sequence[tuple[str, str]] = (
    *((a, b) for a in PRODUCERS for b in ("enqueue", "enqueue_many", "get", "flush", "shutdown", "stop", "stats")),
    *((a, b) for a in OTHERS for b in (*PRODUCERS, *OTHERS, "stats")),
)
TRIPLES: Sequence[tuple[str, str, str]] = (
    ("enqueue", "enqueue", "get"),
    ("enqueue", "enqueue", "wait"),
    ("enqueue", "shutdown", "wait"),
    ("shutdown", "enqueue", "wait"),
)
