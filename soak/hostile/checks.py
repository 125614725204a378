# SPDX-License-Identifier: MIT
"""What cases of all families check with: what was accepted, what came out, whether it balances, who still runs."""

from __future__ import annotations

import faulthandler
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import tempo

LONG = 3600.0
"""Seconds: an interval that never ends within a case."""
LIMIT = 30.0
"""Seconds that a case waits for something that must come."""


def expect(condition: object, *what: object) -> None:
    """Raise AssertionError unless condition is true; an assert that `python -O` does not remove."""
    if not condition:
        raise AssertionError(*what)


def wait_until(condition: Callable[[], object], *what: object) -> None:
    """Return when condition() is true; fail when that takes longer than LIMIT."""
    end = time.monotonic() + LIMIT
    while not condition():
        expect(time.monotonic() < end, "it did not come", *what)
        time.sleep(0.0005)


def dice(name: str) -> random.Random:
    """A source of randomness; its seed is printed, so that what it brought about can be looked at again."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"{name}: seed {seed}", flush=True)
    return random.Random(seed)


class Worker(threading.Thread):
    """A daemon thread, started at once, whose outcome is looked at: `result` joins it, and returns or raises that."""

    def __init__(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(daemon=True)
        self._work, self._args, self._kwargs = work, args, kwargs
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Do the work; keep what came of it."""
        try:
            self._value = self._work(*self._args, **self._kwargs)
        except BaseException as exc:
            self._error = exc

    def result(self, limit: float = LIMIT) -> Any:
        """Return or raise what the work did; fail when it does not end."""
        self.join(limit)
        if self.is_alive():
            faulthandler.dump_traceback()
            raise AssertionError(f"{self._work} is stuck")
        if self._error is not None:
            raise self._error
        return self._value


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, at_end: Callable[[], object] | None = None) -> None:
        self.me = self
        self.at_end = at_end

    def __del__(self) -> None:
        if self.at_end is not None:
            self.at_end()


def balanced(d: tempo.Dispatcher) -> tempo.Stats:
    """The stats, which balance in payloads and in bytes. May be called from anywhere, as stats may."""
    s = d.stats()
    expect(s.accepted == s.delivered + s.in_flight + s.buffered + s.discarded, s)
    expect(s.accepted_bytes == s.delivered_bytes + s.in_flight_bytes + s.buffered_bytes + s.discarded_bytes, s)
    expect(min(s[:-1]) >= 0 and s.failed <= s.delivered and s.failed_bytes <= s.delivered_bytes, s)
    expect(s.buffered_bytes <= s.peak_buffered_bytes, s)
    return s


def at_rest(d: tempo.Dispatcher) -> tempo.Stats:
    """The stats of a dispatcher in which no call is under way: they balance, all invariants hold, nobody waits."""
    s = balanced(d)
    expect((s.waiting_producers, s.waiting_consumers) == (0, 0), s)
    state = d._state
    expect(not (state.producers or state.resting or state.consumers or state.drainers), "left in a queue", s)
    expect(state.owner == 0, "left in a section", s)
    d._check()
    return s


def outside() -> None:
    """Fail when this thread holds tempo's lock: foreign code must not run there."""
    held = [lock._is_owned() for lock in list(tempo._LOCKS.values())]
    expect(not any(held), "foreign code runs with the lock held")


def drained(d: tempo.Dispatcher) -> list[tempo.Batch]:
    """Everything that is buffered, without a wait; the dispatcher goes on."""
    d.flush(0)
    batches = []
    while True:
        try:
            batches.append(d.get(timeout=0))
        except (queue.Empty, tempo.Stopped):
            return batches


def goes_on(d: tempo.Dispatcher) -> None:
    """See one payload through an empty dispatcher, in this thread and in another."""

    def once() -> None:
        d.enqueue(b"one more")
        d.flush(0)
        expect(d.get(timeout=LIMIT).tolist() == [b"one more"])

    once()
    Worker(once).result()


class Sender:
    """One producer: makes payloads that nobody else makes, and keeps the books on which of them were accepted.

    A payload whose call was ended by a foreign exception, at any point, stays unsure: it may have been accepted.
    """

    def __init__(self, number: int, ordered: bool) -> None:
        self.number = number
        self.ordered = ordered  # False: its calls nest, or several threads make them
        self.wrap: Callable[[bytes], Any] = bytes  # what it really enqueues: an object whose buffer holds the payload
        self._numbers = count(1)
        self.accepted: list[bytes] = []
        self.unsure: set[bytes] = set()
        self.groups: list[list[bytes]] = []  # unsure payloads of one call each: a prefix of them may have been accepted
        self.refusals: list[type[tempo.Error]] = []  # calls that one of tempo's errors ended

    def make(self, size: int = 0) -> bytes:
        """A payload of at least `size` bytes."""
        return (b"%d.%d." % (self.number, next(self._numbers))).ljust(size, b".")

    def try_one(self, d: tempo.Dispatcher, size: int = 0, timeout: float | None = 0.0) -> tempo.Error | None:
        """Enqueue one payload; return what refused it."""
        item = self.make(size)
        self.unsure.add(item)
        try:
            d.enqueue(self.wrap(item), timeout=timeout)
            self.accepted.append(item)
        except tempo.Error as error:
            self.refusals.append(type(error))
            self.unsure.discard(item)
            return error
        self.unsure.discard(item)
        return None

    def try_many(
        self, d: tempo.Dispatcher, sizes: Iterable[int], timeout: float | None = 0.0, listed: bool = True
    ) -> tempo.Error | None:
        """Enqueue payloads by one call, from a list or else a generator; return what refused one of them.

        What the sizes raise, and what else ends the call, passes through.
        """
        items: list[bytes] = []

        def source() -> Iterator[Any]:
            for size in sizes:
                item = self.make(size)
                self.unsure.add(item)
                items.append(item)
                yield self.wrap(item)

        payloads = list(source()) if listed else source()
        try:
            accepted = d.enqueue_many(payloads, timeout=timeout)
            self.accepted += items
        except tempo.Error as error:
            self.refusals.append(type(error))
            self.accepted += items[: error.accepted]
            self.unsure.difference_update(items)
            return error
        except BaseException as exc:
            known = getattr(exc, "accepted", 0)
            self.accepted += items[:known]
            self.unsure.difference_update(items[:known])
            self.groups.append(items[known:])
            raise
        self.unsure.difference_update(items)
        expect(accepted == len(items), "enqueue_many", accepted, len(items))
        return None


class Receiver:
    """One consumer: takes batches apart, and keeps what was in them."""

    def __init__(self, back: bool = False) -> None:
        self.back = back  # what it takes was handed back, by stop or as `.undelivered`
        self._taken: list[list[bytes]] = []  # of each batch; one list, so that an interrupt leaves nothing half noted

    def take(self, batch: tempo.Batch) -> None:
        """Keep a batch's payloads; fail when the batch is at odds with itself."""
        items = batch.tolist()
        expect(0 < len(items) == len(batch) and b"".join(items) == bytes(batch.data), "a batch at odds with itself")
        self._taken.append(items)

    def take_all(self, batches: Iterable[tempo.Batch]) -> None:
        """As take, for several: a dispatcher (until it ends), what stop returned, `.undelivered`."""
        for batch in batches:
            self.take(batch)

    @property
    def batches(self) -> int:
        """How many it took."""
        return len(self._taken)

    @property
    def payloads(self) -> list[bytes]:
        """All payloads, in the order in which they came."""
        return [item for batch in self._taken for item in batch]


class Census:
    """All who send to one dispatcher, all who receive from it, and whether it adds up."""

    def __init__(self) -> None:
        self.senders: list[Sender] = []
        self.receivers: list[Receiver] = []

    def sender(self, ordered: bool = True) -> Sender:
        """One more producer; ordered: one thread makes its calls, one after the other."""
        self.senders.append(Sender(len(self.senders), ordered))
        return self.senders[-1]

    def receiver(self, back: bool = False) -> Receiver:
        """One more consumer; or, back, one who takes what stop or DrainTimeout hands back."""
        self.receivers.append(Receiver(back))
        return self.receivers[-1]

    def verify(self, d: tempo.Dispatcher, ended: int = 0, rejected: int = 0) -> tempo.Stats:
        """Check, once all threads have ended and all is taken out: accepted came once, refused not at all, in order.

        ended: how many calls that take a batch were ended by an exception from outside; each may have lost one batch
        to its caller, and then the dispatcher's own counts must say so. rejected: calls refused that no sender made.
        """
        s = at_rest(d)
        expect(s.buffered == s.in_flight == 0, s)
        accepted = Counter(item for sender in self.senders for item in sender.accepted)
        unsure = Counter({item for sender in self.senders for item in sender.unsure} - accepted.keys())
        came = Counter(item for receiver in self.receivers for item in receiver.payloads)
        twice = [item for item, n in came.items() if n > 1]
        expect(not twice, "repeated", twice[:5])
        strange = [item for item in came if item not in accepted and item not in unsure]
        expect(not strange, "came, though it was refused or not sent", strange[:5])
        back = sum(len(receiver.payloads) for receiver in self.receivers if receiver.back)
        expect(back == s.discarded, "handed back", back, s)
        lost = s.batches - sum(receiver.batches for receiver in self.receivers if not receiver.back)
        expect(0 <= lost <= ended, "batches lost", lost, ended, s)
        gone = s.delivered - (len(came) - back)  # payloads in these
        expect(gone >= lost and (lost > 0) == (gone > 0), "payloads lost", gone, lost, s)
        missing = [item for item in accepted if item not in came]
        expect(len(missing) <= gone, "lost", len(missing), gone, missing[:5], s)
        least = sum(accepted.values())
        expect(least <= s.accepted <= least + len(unsure), "accepted", least, len(unsure), s)
        refused = rejected + sum(len(sender.refusals) for sender in self.senders)
        expect(refused <= s.rejected <= refused + len(unsure), "refused", refused, len(unsure), s)
        for sender in self.senders:
            for group in sender.groups:
                there = [item in came for item in group]
                expect(gone or there == sorted(there, reverse=True), "not a prefix", group[:5])
        for receiver in self.receivers:
            self._verify_order(receiver)
        return s

    def _verify_order(self, receiver: Receiver) -> None:
        last = [0] * len(self.senders)
        for item in receiver.payloads:
            sender, number = map(int, item[:32].split(b".", 2)[:2])
            if self.senders[sender].ordered:
                expect(number > last[sender], "out of order", item, last[sender])
                last[sender] = number
