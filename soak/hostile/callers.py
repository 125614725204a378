# SPDX-License-Identifier: MIT
"""Hostile callers: signal handlers, finalizers, handlers, payload classes, iterables, interrupts, no memory."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib
import io
import logging
import os
import queue
import random
import signal
import sys
import threading
import time
import warnings
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import tempo
from soak.hostile import LeftOut, case, times
from soak.hostile.checks import (
    LIMIT,
    LONG,
    Census,
    Cycle,
    Receiver,
    Sender,
    Worker,
    at_rest,
    balanced,
    dice,
    expect,
    outside,
    wait_until,
)

try:
    import tracemalloc
except ImportError:  # PyPy has none
    TRACED = False
else:
    TRACED = True

# -- Load: what goes on in other threads meanwhile ---------------------------------------------------------------------


ENOUGH = 20.0
"""Seconds at scale 1 after which a slow machine has tried enough, however little that is."""


def rounds(n: int, scale: float) -> Iterator[int]:
    """Numbers from 0, as many as times() says, or fewer on a slow machine."""
    give_up = time.monotonic() + ENOUGH * max(1.0, scale)
    for number in range(times(n, scale)):
        if time.monotonic() > give_up:
            return
        yield number


def total(name: str, scale: float, n: int, attempt: Callable[[random.Random, int], int]) -> int:
    """Call attempt(rng, number) n times; return the sum of how often each tried."""
    rng = dice(name)
    return sum(attempt(rng, number) for number in rounds(n, scale))


def total_uncollected(name: str, scale: float, n: int, attempt: Callable[[random.Random, int], int]) -> int:
    """As total, with the collector at work between the attempts only.

    It calls weakref callbacks (each dead thread has one), and CPython drops an exception that comes in one of these.
    """

    def collected(rng: random.Random, number: int) -> int:
        gc.disable()
        try:
            return attempt(rng, number)
        finally:
            gc.enable()
            gc.collect()

    return total(name, scale, n, collected)


class Shape(NamedTuple):
    """Limits of a dispatcher, and the sizes of payloads that suit them."""

    max_buffered_bytes: int
    max_batch_bytes: int | None
    sizes: tuple[int, ...]


TINY = Shape(300, 100, (12, 20, 20, 40, 90))
MIDDLE = Shape(64 * tempo.KiB, 9000, (20, 100, 100, 400, 400, 3000))
LARGE = Shape(tempo.MiB, None, (20, 200, 200, 600))
SHAPES = (TINY, MIDDLE, LARGE)


def around(rng: random.Random, mean: float) -> float:
    """Seconds, from a hundredth of the mean to a few times it, so that moments of every scale are hit."""
    return mean * rng.choice((0.01, 0.03, 0.1, 0.3, 1.0)) * (0.5 + 2 * rng.random())


class Load:
    """A dispatcher, threads that enqueue, threads that take, and the books on all of it."""

    def __init__(
        self, rng: random.Random, shape: Shape, producers: int = 1, consumers: int = 1, pause: float = 0.0005
    ) -> None:
        sys.setswitchinterval(0.0005)  # more turns, and so more orders of events
        self.rng = rng
        self.shape = shape
        self.pause = pause  # seconds, about, that each thread sleeps now and then
        self.d = tempo.Dispatcher(
            interval=0.002, max_buffered_bytes=shape.max_buffered_bytes, max_batch_bytes=shape.max_batch_bytes
        )
        self.census = Census()
        self.sender = self.census.sender()  # the main thread's
        self.receiver = self.census.receiver()
        self.asynchronous = [self.census.receiver() for _ in range(2)]  # two coroutines
        self.ended = 0  # calls that take a batch, and were ended from outside
        self.halt = threading.Event()
        self.producers = [Worker(self.produce, self.census.sender()) for _ in range(producers)]
        self.consumers = [Worker(self.consume, self.census.receiver()) for _ in range(consumers)]

    def size(self) -> int:
        """Of a payload."""
        return self.rng.choice(self.shape.sizes)

    def sizes(self) -> list[int]:
        """Of some payloads."""
        return [self.size() for _ in range(self.rng.choice((1, 3, 30, 600)))]

    def produce(self, sender: Sender) -> None:
        """What a producer thread does: any call that enqueues, until it is told to halt, or there is no more to do."""
        rng = self.rng
        while not self.halt.is_set():
            timeout = rng.choice((0.0, 0.0005, 0.02))
            if rng.random() < 0.9:
                error = sender.try_one(self.d, self.size(), timeout)
            else:
                error = sender.try_many(self.d, self.sizes(), timeout, rng.random() < 0.5)
            if isinstance(error, tempo.Closed):
                return
            if error is not None or rng.random() < 0.2:
                time.sleep(around(rng, self.pause))

    def consume(self, receiver: Receiver) -> None:
        """What a consumer thread does."""
        for batch in self.d:
            receiver.take(batch)
            if self.rng.random() < 0.3:
                time.sleep(around(self.rng, self.pause))

    def end(self, rejected: int = 0) -> tempo.Stats:
        """Shut down and drain, join all threads, and see whether it adds up; rejected: refusals not in the books."""
        self.halt.set()
        for producer in self.producers:
            producer.result()
        closer = Worker(self.d.shutdown, LIMIT)
        self.receiver.take_all(self.d)
        with contextlib.suppress(tempo.Stopped):  # stopped before
            closer.result()
        for consumer in self.consumers:
            consumer.result()
        return self.census.verify(self.d, self.ended, rejected)


def within(frame: FrameType | None) -> bool:
    """Whether tempo's code is at work in a frame, or in one that called it."""
    while frame is not None:
        if frame.f_globals is vars(tempo):
            return True
        frame = frame.f_back
    return False


# -- Signal handlers that enqueue --------------------------------------------------------------------------------------

RATE = 3000.0  # signals a second


class Signals:
    """A timer signal, RATE times a second, whose handler enqueues, whatever it interrupts in the main thread."""

    def __init__(self, rng: random.Random) -> None:
        if not hasattr(signal, "setitimer"):
            raise LeftOut("no interval timer here")
        self.rng = rng
        self.inside = 0  # signals that interrupted tempo
        self._target: tuple[Load, Sender] | None = None
        self._depth = 0
        self._failures: list[BaseException] = []

    def __enter__(self) -> Signals:
        self._before = signal.signal(signal.SIGALRM, self._handle)
        signal.setitimer(signal.ITIMER_REAL, 1 / RATE, 1 / RATE)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)
        if self._failures:
            raise self._failures[0]

    def aim(self, load: Load | None) -> None:
        """Enqueue into a load's dispatcher from now on; None: do nothing."""
        self._target = None if load is None else (load, load.census.sender(ordered=False))

    def _handle(self, _signum: int, frame: FrameType | None) -> None:
        if self._target is None or self._depth == 3:  # deeper would be the machine's slowness, and not tempo's
            return
        load, sender = self._target
        self._depth += 1
        try:
            self.inside += within(frame)
            # It may wait where another thread makes room; nested in tempo it does not, or it would wait for itself.
            timeout = self.rng.choice((0.0, 0.0, 0.0, None if load.consumers else 0.001))
            if self.rng.random() < 0.8:
                sender.try_one(load.d, load.size(), timeout)
            else:
                sender.try_many(load.d, [load.size(), load.size()], 0.0, self.rng.random() < 0.5)
            balanced(load.d)
        except BaseException as exc:
            self._failures.append(exc)
            raise
        finally:
            self._depth -= 1


def under_signals(
    name: str,
    scale: float,
    act: Callable[[Load], object],
    shapes: tuple[Shape, ...] = SHAPES,
    producers: int = 1,
    consumers: int = 1,
    anew: bool = False,
) -> int:
    """Call act(load) until so many signals came inside of tempo; anew: act ends the load, so each has one anew."""
    goal = times(3000, scale)
    rng = dice(name)
    give_up = time.monotonic() + ENOUGH * max(1.0, scale)
    with Signals(rng) as signals:
        for number, shape in enumerate(shapes, 1):
            while signals.inside * len(shapes) < goal * number:
                load = Load(rng, shape, producers, consumers)
                signals.aim(load)
                while signals.inside * len(shapes) < goal * number and time.monotonic() < give_up:
                    act(load)
                    if anew:
                        break
                signals.aim(None)
                load.end()
                if time.monotonic() > give_up:  # a slow machine
                    break
    expect(signals.inside, "no signal came inside of tempo")
    return signals.inside


@case()
def signals_that_enqueue_into_enqueue_with_room(scale: float) -> int:
    """Both the handler's payloads and those of the call that it interrupts are accepted or refused, and come once."""

    def act(load: Load) -> None:
        for _ in range(50):
            load.sender.try_one(load.d, load.size())

    return under_signals("enqueue with room", scale, act, (MIDDLE, LARGE), consumers=2)


@case()
def signals_that_enqueue_into_enqueue_without_room(scale: float) -> int:
    """As with room: what is refused is not delivered, and what is taken makes room for either."""

    def act(load: Load) -> None:
        for _ in range(50):
            load.sender.try_one(load.d, load.size())
        with contextlib.suppress(queue.Empty):
            load.receiver.take(load.d.get(timeout=0))

    return under_signals("enqueue without room", scale, act, (TINY, MIDDLE), producers=0, consumers=0)


@case()
def signals_that_enqueue_into_enqueue_that_waits(scale: float) -> int:
    """A wait for room goes on after the handler, and ends when there is room or the time is over."""

    def act(load: Load) -> None:
        error = load.sender.try_one(load.d, load.size(), load.rng.choice((None, 0.0005, LIMIT)))
        expect(error is None or isinstance(error, tempo.QueueFull), error)

    return under_signals("enqueue that waits", scale, act, (TINY, MIDDLE), producers=2)


@case()
def signals_that_enqueue_into_enqueue_many_of_a_list(scale: float) -> int:
    """The count that it returns, or `.accepted`, is right, and both come once."""

    def act(load: Load) -> None:
        load.sender.try_many(load.d, load.sizes(), load.rng.choice((0.0, 0.0005, None)))

    return under_signals("enqueue_many of a list", scale, act)


@case()
def signals_that_enqueue_into_enqueue_many_of_a_generator(scale: float) -> int:
    """As of a list; the handler also interrupts the generator."""

    def act(load: Load) -> None:
        load.sender.try_many(load.d, load.sizes(), load.rng.choice((0.0, 0.0005, None)), listed=False)

    return under_signals("enqueue_many of a generator", scale, act)


@case()
def signals_that_enqueue_into_get(scale: float) -> int:
    """A get that does not wait returns a batch or raises Empty; the handler's payloads come in a later one."""

    def act(load: Load) -> None:
        with contextlib.suppress(queue.Empty):
            load.receiver.take(load.d.get(timeout=0))

    return under_signals("get", scale, act, producers=2, consumers=0)


@case()
def signals_that_enqueue_into_get_that_waits(scale: float) -> int:
    """A get that waits returns a batch, perhaps the handler's, or raises Empty when its time is over."""

    def act(load: Load) -> None:
        with contextlib.suppress(queue.Empty):
            load.receiver.take(load.d.get(timeout=load.rng.choice((None, 0.0005, LIMIT))))

    return under_signals("get that waits", scale, act, producers=1, consumers=1)


@case()
def signals_that_enqueue_into_flush(scale: float) -> int:
    """A flush that returns True has delivered all that was accepted before it, the handler's payloads too."""

    def act(load: Load) -> None:
        load.sender.try_one(load.d, load.size())
        before = load.d.stats().accepted
        if load.d.flush(load.rng.choice((None, 0.0, 0.001, LIMIT))):
            expect(load.d.stats().delivered >= before, "flushed", before, load.d.stats())

    return under_signals("flush", scale, act)


@case()
def signals_that_enqueue_into_shutdown(scale: float) -> int:
    """It drains or raises DrainTimeout; the handler's payload is drained too, or refused, with the right error."""

    def act(load: Load) -> None:
        load.sender.try_many(load.d, [load.size() for _ in range(300)])
        back = load.census.receiver(back=True)
        try:
            load.d.shutdown(load.rng.choice((None, 0.0, 0.0005, 0.005)))
        except tempo.DrainTimeout as exc:
            back.take_all(exc.undelivered)
        expect(load.d.stats().state == "stopped")

    return under_signals("shutdown", scale / 3, act, anew=True)


@case()
def signals_that_enqueue_into_stop(scale: float) -> int:
    """It returns all that was not delivered, the handler's payloads too; later ones are refused."""

    def act(load: Load) -> None:
        load.sender.try_many(load.d, [load.size() for _ in range(3000)])
        load.census.receiver(back=True).take_all(load.d.stop())
        expect(load.d.stop() == [] and load.d.stats().state == "stopped")

    return under_signals("stop", scale / 3, act, anew=True)


@case()
def signals_that_enqueue_into_stats(scale: float) -> int:
    """They balance at every moment."""
    return under_signals("stats", scale, lambda load: balanced(load.d))


@case()
def signals_that_enqueue_into_iteration(scale: float) -> int:
    """The loop goes on: it ends with shutdown, when it has seen all that was accepted."""

    def act(load: Load) -> None:
        receiver = load.census.receiver()
        for number, batch in enumerate(load.d):
            receiver.take(batch)
            if number == 100:
                load.d.shutdown(0)  # from the body: it does not wait, and the loop goes on to the end
        expect(load.d.stats().state == "stopped")

    return under_signals("iteration", scale / 2, act, producers=2, consumers=0, anew=True)


@case()
def signals_that_enqueue_into_async_iteration(scale: float) -> int:
    """As iteration, with two coroutines; the handler interrupts the event loop at work, and its wait."""

    async def loop(load: Load, receiver: Receiver) -> None:
        async for batch in load.d:
            receiver.take(batch)
            if load.rng.random() < 0.02:
                load.d.shutdown(0)

    async def both(load: Load) -> None:
        await asyncio.gather(*(loop(load, receiver) for receiver in load.asynchronous))

    def act(load: Load) -> None:
        asyncio.run(asyncio.wait_for(both(load), LIMIT))
        expect(load.d.stats().state == "stopped")

    return under_signals("async iteration", scale / 2, act, producers=1, consumers=0, anew=True)


def once(rng: random.Random, handle: Callable[[FrameType | None], object], work: Callable[[], object]) -> None:
    """Run work(), and handle() once, by a signal at a random moment; return when both are over.

    False from handle: it is to be called once more. The signal repeats, because CPython handles one that came just
    before a wait only after the wait; but handle() is not called again.
    """
    came = False

    def handler(_signum: int, frame: FrameType | None) -> None:
        nonlocal came
        if not came:
            came = handle(frame) is not False
            if not came:
                signal.setitimer(signal.ITIMER_REAL, 0.00002, 0.1)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, around(rng, 0.0003), 0.1)
    try:
        work()
        wait_until(lambda: came)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@case()
def one_signal_that_wakes_the_call_it_interrupts(scale: float) -> int:
    """Nobody else is there: a get or a coroutine gets the handler's payload, and enqueue the room that it makes."""
    if not hasattr(signal, "setitimer"):
        raise LeftOut("no interval timer here")
    rng = dice("one signal")
    tried = 0
    loop = asyncio.new_event_loop()
    for limit in (100, 64 * tempo.KiB):
        d = tempo.Dispatcher(interval=LIMIT, max_buffered_bytes=limit, max_batch_bytes=1)
        iterator = d.__aiter__()
        came: list[tempo.Batch] = []

        async def ask(iterator: Any = iterator) -> tempo.Batch:
            batch: tempo.Batch = await asyncio.wait_for(iterator.__anext__(), LIMIT)
            return batch

        def give(_: FrameType | None, d: tempo.Dispatcher = d) -> None:
            d.enqueue(b"from the handler")

        def take(_: FrameType | None, d: tempo.Dispatcher = d, came: list[tempo.Batch] = came) -> bool:
            try:
                came.append(d.get(timeout=0))
            except queue.Empty:  # it interrupted a locked section
                return False
            return True

        for _ in rounds(800, scale):
            once(rng, give, lambda d=d, came=came: came.append(d.get(timeout=LIMIT)))  # type: ignore[misc]
            expect(came.pop().tolist() == [b"from the handler"])
            once(rng, give, lambda ask=ask, came=came: came.append(loop.run_until_complete(ask())))  # type: ignore[misc]
            expect(came.pop().tolist() == [b"from the handler"])
            d.enqueue(bytes(limit))
            once(rng, take, lambda d=d: d.enqueue(b"waits", timeout=LIMIT))  # type: ignore[misc]
            expect(came.pop().tolist() == [bytes(limit)])
            expect(d.get(timeout=0).tolist() == [b"waits"])
            tried += 3
        at_rest(d)
    loop.close()
    return tried


# -- Finalizers and weakref callbacks that enqueue ---------------------------------------------------------------------


@contextlib.contextmanager
def collecting() -> Iterator[None]:
    """Collect at every allocation that the collector sees."""
    if sys.implementation.name != "cpython":
        raise LeftOut("needs a collector that runs at every allocation")
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()  # so that collecting costs little
    gc.set_threshold(1, 1000, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        gc.collect()


class Ends:
    """What finalizers do: enqueue into one of some dispatchers, and look at it."""

    def __init__(self, loads: list[Load]) -> None:
        self.loads = loads
        self.senders = [load.census.sender(ordered=False) for load in loads]
        self.inside = 0  # of those that came, in tempo
        self.failures: list[BaseException] = []
        self._due: list[None] = []  # one for each that is to come; a list counts right in several threads
        self._references: deque[Any] = deque(maxlen=10_000)

    def __call__(self, *_: object) -> None:
        self._due.pop()
        try:
            self.inside += within(sys._getframe(1))
            place = random.randrange(len(self.loads))
            load, sender = self.loads[place], self.senders[place]
            if random.random() < 0.8:
                sender.try_one(load.d, load.size(), random.choice((0.0, 0.0005)))
            else:
                sender.try_many(load.d, [load.size(), load.size()], 0.0, random.random() < 0.5)
            balanced(load.d)
        except BaseException as exc:
            self.failures.append(exc)

    def waste(self, weak: bool) -> None:
        """Make garbage at whose end this is called, unless there is much: one thread at a time can collect."""
        if len(self._due) > 20:
            return
        self._due.append(None)
        if weak:
            self._references.append(weakref.ref(Cycle(), self))
        else:
            Cycle(self)


def any_call(load: Load, sender: Sender, receiver: Receiver) -> None:
    """Make one call, any of those that do not end the dispatcher, and that end by themselves."""
    d, rng = load.d, load.rng
    call = rng.randrange(10)
    if call < 5:
        sender.try_one(d, load.size(), rng.choice((0.0, 0.0, 0.0005)))
    elif call < 7:
        sender.try_many(d, [load.size() for _ in range(rng.choice((1, 3, 30)))], 0.0, call == 5)
    elif call == 7:
        with contextlib.suppress(queue.Empty, tempo.Stopped):
            receiver.take(d.get(timeout=rng.choice((0.0, 0.0005))))
    elif call == 8:
        d.flush(rng.choice((0.0, 0.0005)))
    else:
        balanced(d)


def finalizing(name: str, scale: float, weak: bool, shape: Shape, consumers: int, dispatchers: int = 1) -> int:
    """Make calls in this thread and in another, and garbage all the time, until so many ends came inside of tempo."""
    rng = dice(name)
    goal = times(1000, scale)
    give_up = time.monotonic() + ENOUGH * max(1.0, scale)
    loads = [Load(rng, shape, producers=0, consumers=consumers) for _ in range(dispatchers)]
    ends = Ends(loads)

    def work(senders: list[Sender], receivers: list[Receiver]) -> None:
        while ends.inside < goal and time.monotonic() < give_up:
            ends.waste(weak)
            place = rng.randrange(len(loads))
            any_call(loads[place], senders[place], receivers[place])

    with collecting():
        other = Worker(work, [load.census.sender() for load in loads], [load.census.receiver() for load in loads])
        work([load.sender for load in loads], [load.receiver for load in loads])
        other.result()
    if ends.failures:
        raise ends.failures[0]
    expect(ends.inside, "no finalizer ran inside of tempo")
    for load in loads:
        load.end()
    return ends.inside


@case()
def finalizers_that_enqueue_with_room(scale: float) -> int:
    """The collector runs them at every allocation in tempo; each payload is accepted or refused like any other."""
    return finalizing("finalizers with room", scale, False, MIDDLE, consumers=1)


@case()
def finalizers_that_enqueue_without_room(scale: float) -> int:
    """As with room; most are refused."""
    return finalizing("finalizers without room", scale, False, TINY, consumers=0)


@case()
def weakref_callbacks_that_enqueue_with_room(scale: float) -> int:
    """As finalizers."""
    return finalizing("weakref callbacks with room", scale, True, LARGE, consumers=1)


@case()
def weakref_callbacks_that_enqueue_without_room(scale: float) -> int:
    """As finalizers."""
    return finalizing("weakref callbacks without room", scale, True, TINY, consumers=0)


@case()
def finalizers_that_enqueue_into_another_dispatcher(scale: float) -> int:
    """Two threads in two dispatchers, whose finalizers call the other one: neither waits for the other for ever."""
    return finalizing("finalizers of two", scale, False, MIDDLE, consumers=1, dispatchers=2)


# -- Handlers ----------------------------------------------------------------------------------------------------------


class Push:
    """A load whose consumer is a handler."""

    def __init__(self, rng: random.Random, shape: Shape, producers: int = 2) -> None:
        self.load = Load(rng, shape, producers, consumers=0)
        self.d = self.load.d
        self.inner = self.load.census.sender()  # the handler's
        self.receiver = self.load.receiver
        self.back = self.load.census.receiver(back=True)
        self.failed = 0  # payloads of batches whose handler raised
        self.reported: list[BaseException] = []  # to on_error
        self.hooked: list[type[BaseException]] = []  # to threading.excepthook

    def end(self) -> tempo.Stats:
        """Join all threads, and see whether it adds up."""
        self.load.halt.set()
        for producer in self.load.producers:
            producer.result()
        with contextlib.suppress(tempo.Stopped):  # the handler has called stop
            self.d.shutdown(LIMIT)
        thread = self.d._state.thread
        expect(thread is not None)
        if thread is not None:
            thread.join(LIMIT)
            expect(not thread.is_alive(), "the handler's thread does not end")
        s = self.load.census.verify(self.d)
        expect(s.failed == self.failed, "failed", self.failed, s)
        return s


@contextlib.contextmanager
def hooked(hook: Callable[[type[BaseException]], object]) -> Iterator[None]:
    """Give what would be told on stderr to a hook."""
    before = threading.excepthook
    threading.excepthook = lambda args: hook(args.exc_type)
    try:
        yield
    finally:
        threading.excepthook = before


def pushing(name: str, scale: float, n: int, handler: Callable[[Push, tempo.Batch], None], ends: bool = False) -> int:
    """Rounds of a load whose handler takes each batch and then calls handler(push, batch); ends: that ends the round.

    Returns how many batches were handled.
    """

    def attempt(rng: random.Random, _: int) -> int:
        push = Push(rng, rng.choice(SHAPES))
        goal = rng.choice((1, 5, 20))

        def handle(batch: tempo.Batch) -> None:
            outside()
            push.receiver.take(batch)
            handler(push, batch)

        push.d.start(handle, on_error=lambda exc, _: push.reported.append(exc))
        wait_until(lambda: push.receiver.batches >= goal or push.d.stats().state != "running")
        if not ends:
            expect(push.d.stats().state == "running")
            push.d.flush(rng.choice((0.0, LIMIT)))
        push.end()
        if push.reported:
            raise push.reported[0]
        return push.receiver.batches

    return total(name, scale, n, attempt)


@case()
def a_handler_that_enqueues(scale: float) -> int:
    """What it enqueues comes to it again; without room it is told so at once, whatever the timeout, and never waits."""

    def handler(push: Push, _: tempo.Batch) -> None:
        rng = push.load.rng
        if len(push.inner.accepted) < 2000:  # or the drain would have no end
            for _again in range(rng.choice((0, 1, 2))):
                push.inner.try_one(push.d, push.load.size(), rng.choice((0.0, None, LIMIT)))
            if rng.random() < 0.2:
                push.inner.try_many(push.d, push.load.sizes(), None, rng.random() < 0.5)
            expect(set(push.inner.refusals) <= {tempo.QueueFull, tempo.ShuttingDown}, push.inner.refusals)

    return pushing("a handler that enqueues", scale, 150, handler)


@case()
def a_handler_that_flushes(scale: float) -> int:
    """It does not wait for itself: the batch that it has is not delivered yet, so the answer is False."""

    def handler(push: Push, _: tempo.Batch) -> None:
        if len(push.inner.accepted) < 100:
            push.inner.try_one(push.d, push.load.size())
        expect(push.d.flush(push.load.rng.choice((None, 0.0, LIMIT))) is False, "its own batch is not delivered")

    return pushing("a handler that flushes", scale, 150, handler)


@case()
def a_handler_that_shuts_down(scale: float) -> int:
    """It does not wait for itself; what was accepted is drained all the same, and another's shutdown waits for that."""

    def handler(push: Push, _: tempo.Batch) -> None:
        if push.load.rng.random() < 0.2:
            push.d.shutdown(push.load.rng.choice((None, 0.0, LIMIT)))
            expect(isinstance(push.inner.try_one(push.d, 0, None), tempo.Closed))
        expect(not push.d.stats().discarded)

    return pushing("a handler that shuts down", scale, 200, handler, ends=True)


@case()
def a_handler_that_stops(scale: float) -> int:
    """The batches that it gets are those that were not delivered; its own counts as delivered; its thread ends."""

    def handler(push: Push, _: tempo.Batch) -> None:
        if push.load.rng.random() < 0.2:
            push.back.take_all(push.d.stop())
            expect(push.d.stop() == [])
            expect(type(push.inner.try_one(push.d, 0, None)) is tempo.Stopped)

    return pushing("a handler that stops", scale, 200, handler, ends=True)


@case()
def a_handler_that_calls_back_lets_its_batch_go(scale: float) -> int:
    """When it has returned, nothing holds the batch, whatever it called meanwhile."""
    size = tempo.MiB
    other = tempo.Dispatcher(interval=LONG, max_buffered_bytes=1)
    other.enqueue(b"")

    def attempt(rng: random.Random, _: int) -> int:
        d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=2 * size, max_batch_bytes=size)
        calls: list[Callable[[], object]] = [
            d.flush,
            d.stats,
            lambda: d.enqueue_many(iter([]), timeout=None),
            lambda: other.enqueue(b"", timeout=0.0001),
            lambda: other.flush(0.0001),
        ]
        call = rng.choice(calls)

        def handler(_: tempo.Batch) -> None:
            with contextlib.suppress(tempo.QueueFull):
                call()

        d.start(handler)
        before = tracemalloc.get_traced_memory()[0]
        d.enqueue(bytes(size))
        expect(d.flush(LIMIT))
        wait_until(lambda: d.stats().waiting_consumers)
        held = tracemalloc.get_traced_memory()[0] - before
        expect(held < size // 2, "held", held, calls.index(call))
        d.shutdown(LIMIT)
        return 1

    if not TRACED:
        raise LeftOut("needs tracemalloc")
    tracemalloc.start()
    return total("a handler that calls back", scale, 300, attempt)


class Own(BaseException):
    """An exception that tempo cannot know."""


RAISED: tuple[type[BaseException], ...] = (
    SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, MemoryError, RecursionError, ValueError, Own,
    asyncio.CancelledError, queue.Empty, tempo.Stopped, tempo.ShuttingDown,
)  # fmt: skip


def raising(name: str, scale: float, on_error: Callable[[Push, BaseException], None] | None, hook_raises: bool) -> int:
    """Rounds of a load whose handler raises anything; returns how often."""

    def attempt(rng: random.Random, _: int) -> int:
        push = Push(rng, rng.choice(SHAPES))
        raised: list[BaseException] = []

        def handle(batch: tempo.Batch) -> None:
            push.receiver.take(batch)
            if rng.random() < 0.7:
                push.failed += len(batch)
                raised.append(rng.choice(RAISED)("raised by the handler"))
                raise raised[-1]

        def report(exc: BaseException, batch: tempo.Batch) -> None:
            push.reported.append(exc)
            outside()
            expect(exc is raised[-1] and push.d.stats().in_flight == len(batch), "it is told of another batch")
            if on_error is not None:
                on_error(push, exc)

        def hook(kind: type[BaseException]) -> None:
            push.hooked.append(kind)
            if hook_raises:
                raise rng.choice(RAISED)("raised by the hook")

        with hooked(hook):
            push.d.start(handle, on_error=None if on_error is None else report)
            wait_until(lambda: len(raised) >= 5)
            push.end()
        expect(AssertionError not in push.hooked, "a check in on_error failed", push.hooked)
        if on_error is None:
            expect(push.hooked == [type(exc) for exc in raised], "hooked", push.hooked, raised)
        else:
            expect(push.reported == raised, "reported", push.reported, raised)
            expect(len(push.hooked) == len(raised), "what on_error raised is not told", push.hooked)
        return len(raised)

    return total(name, scale, 150, attempt)


@case()
def a_handler_that_raises(scale: float) -> int:
    """SystemExit, KeyboardInterrupt, anything: the batch counts as failed, the default hook is told, the next comes."""
    return raising("a handler that raises", scale, None, hook_raises=False)


@case()
def an_on_error_that_raises(scale: float) -> int:
    """It is told of each failure, once; what it raises ends nothing, and nor does a hook that raises then."""

    def on_error(push: Push, exc: BaseException) -> None:
        raise push.load.rng.choice(RAISED)("raised by on_error") from exc

    return raising("an on_error that raises", scale, on_error, hook_raises=True)


@case()
def a_handler_that_hangs(scale: float) -> int:
    """shutdown ends when its time is over, and hands back all but the batch that the handler has, exactly."""

    def attempt(rng: random.Random, _: int) -> int:
        push = Push(rng, rng.choice(SHAPES), producers=rng.choice((0, 2)))
        d, load = push.d, push.load
        let_go, hangs = threading.Event(), threading.Event()
        after = rng.choice((0, 3))

        def handle(batch: tempo.Batch) -> None:
            push.receiver.take(batch)
            if push.receiver.batches > after:
                hangs.set()
                expect(let_go.wait(LIMIT))

        d.start(handle, on_error=lambda exc, _: push.reported.append(exc))
        while not hangs.is_set():
            load.sender.try_one(d, load.size())
        for _ in range(rng.choice((0, 1, 400))):
            load.sender.try_one(d, load.size())
        expect(d.flush(rng.choice((0.0, 0.002))) is False, "flushed, though the handler hangs")
        aside = load.census.receiver()
        with contextlib.suppress(queue.Empty):
            aside.take(d.get(timeout=0))  # a consumer beside the handler takes the next one
        closers = [Worker(d.shutdown, rng.choice((0.0, 0.002, 0.02))) for _ in range(rng.choice((1, 3)))]
        outcomes: list[BaseException] = []
        for closer in closers:
            try:
                closer.result()
            except (tempo.DrainTimeout, tempo.Stopped) as exc:
                outcomes.append(exc)
        timed_out = [exc for exc in outcomes if isinstance(exc, tempo.DrainTimeout)]
        expect(len(timed_out) == 1, "one runs out of time and stops; the others are told, or come later", outcomes)
        s = balanced(d)
        expect(s.state == "stopped" and s.in_flight and not s.buffered, s)
        push.back.take_all(timed_out[0].undelivered)
        expect(d.stop() == [])
        let_go.set()
        push.end()
        if push.reported:
            raise push.reported[0]
        return 1

    return total("a handler that hangs", scale, 200, attempt)


# -- Payload classes ---------------------------------------------------------------------------------------------------


def foreign(*_: object, **__: object) -> Any:
    """What an overridden method does that tempo has no reason to call."""
    outside()
    raise Own("foreign code")


def unshown(_: object) -> str:
    """What `repr` does, which an error message may ask."""
    outside()
    raise ValueError("not to be shown")


NAMES = ("eq", "ne", "lt", "le", "gt", "ge", "hash", "iter", "getitem", "contains", "add", "bytes", "str")
LIES: dict[str, Callable[..., Any]] = {"__repr__": unshown, **{f"__{name}__": foreign for name in NAMES}}


def sly(base: type, **methods: object) -> Any:
    """A subclass that will not be compared, hashed, looped over or shown, with some methods of its own."""
    return type(f"Sly{base.__name__}", (base,), {**LIES, **{f"__{name}__": do for name, do in methods.items()}})


def saying(answer: Any) -> Callable[[object], Any]:
    """A method that gives an answer, where foreign code may run."""

    def say(_: object) -> Any:
        outside()
        return answer

    return say


def giving(item: bytes, give: Callable[[bytes], Any], base: type = object) -> Any:
    """An object that gives its buffer by `__buffer__` (from CPython 3.12 on), and does something before and after."""

    def buffer(_: object, __: int) -> Any:
        outside()
        return give(item)

    def release(_: object, view: memoryview) -> None:
        outside()
        view.release()

    return sly(base, buffer=buffer, release_buffer=release)()


PYTHON_BUFFERS = sys.version_info >= (3, 12)
Long = sly(bytes, len=saying(1 << 40))
Short = sly(bytearray, len=saying(0))
Posing = sly(bytes, **{"class": property(saying(bytes))})
Words = sly(array, len=foreign)
WRAPS: list[Callable[[bytes], Any]] = [
    Long,
    Short,
    Posing,
    memoryview,
    lambda item: Words("B", item),
    lambda item: (ctypes.c_ubyte * len(item)).from_buffer_copy(item),
    lambda item: memoryview(b"x" + item + b"x")[1:-1],
    lambda item: memoryview(bytearray(item)).cast("b"),
    lambda item: io.BytesIO(item).getbuffer(),
]
if PYTHON_BUFFERS:
    WRAPS += [lambda item: giving(item, memoryview), lambda item: giving(item, memoryview, bytes)]


class Sheet(ctypes.Structure):
    """A C structure: a buffer without a length."""

    _fields_ = (("first", ctypes.c_uint16), ("second", ctypes.c_uint32))


def any_enqueue(load: Load, sender: Sender, n: int, timeouts: tuple[float | None, ...] = (0.0, 0.001)) -> None:
    """Make n calls of enqueue, and of enqueue_many with a list and a generator."""
    for _ in range(n):
        timeout = load.rng.choice(timeouts)
        if load.rng.random() < 0.7:
            sender.try_one(load.d, load.size(), timeout)
        else:
            sender.try_many(load.d, load.sizes()[:50], timeout, load.rng.random() < 0.5)


@case()
def payloads_whose_class_lies(scale: float) -> int:
    """What their buffer holds is what is delivered; `__len__`, `__eq__` and the like have no say, nor a lock held."""

    def attempt(rng: random.Random, _: int) -> int:
        load = Load(rng, rng.choice(SHAPES), producers=0)
        other = load.census.sender()
        load.sender.wrap = other.wrap = lambda item: rng.choice(WRAPS)(item)  # noqa: PLW0108 - a choice for each
        worker = Worker(any_enqueue, load, other, 100)
        any_enqueue(load, load.sender, 100)
        worker.result()
        return load.end().accepted

    for item in (Sheet(1, 2), ctypes.c_uint64(7), memoryview(bytes(12)).cast("B", (3, 4)), array("Q", [1, 2])):
        d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=1000)
        d.enqueue(item)
        d.enqueue_many([item, b"", item])
        expect(d.stop()[0].tolist() == [bytes(item), bytes(item), b"", bytes(item)], item)
    return total("payloads whose class lies", scale, 60, attempt)


def raiser(kind: type[BaseException]) -> Callable[[object], Any]:
    """A function that raises."""

    def give(_: object) -> Any:
        raise kind("raised by a payload")

    return give


@case()
def payloads_that_are_none(scale: float) -> int:
    """What is not bytes-like, or raises, ends the call; what came before it is accepted, and nothing else."""
    released = memoryview(b"released")
    released.release()
    bad: list[tuple[Any, type[BaseException]]] = [
        *((item, TypeError) for item in ("text", None, 5, [b"list"], sly(object)(), sly(str)(), bytes)),
        (memoryview(b"not contiguous")[::2], TypeError),
        (memoryview(b"not contiguous")[::-1], TypeError),
        (memoryview(bytes(12)).cast("B", (3, 4))[::2], TypeError),
        (released, ValueError),
    ]
    if PYTHON_BUFFERS:
        bad += [(giving(b"", raiser(kind)), kind) for kind in (ValueError, KeyboardInterrupt, SystemExit, Own)]
        bad += [(giving(b"", give), TypeError) for give in (saying(b"no view"), raiser(TypeError))]
        bad += [(giving(b"abcdef", lambda item: memoryview(item)[::2]), TypeError)]

    def refused(call: Callable[[], object], kind: type[BaseException]) -> int:
        try:
            call()
        except kind as exc:
            return getattr(exc, "accepted", 0)
        raise AssertionError("accepted")

    def attempt(rng: random.Random, _: int) -> int:
        load = Load(rng, rng.choice((MIDDLE, LARGE)), producers=0)
        for item, kind in bad:
            before = [load.sender.make(load.size()) for _ in range(rng.choice((0, 1, 30)))]
            accepted = refused(partial(load.d.enqueue_many, [*before, item, b"behind it"], timeout=LIMIT), kind)
            expect(accepted == len(before), "accepted", accepted, len(before), kind)
            load.sender.accepted += before
            expect(refused(partial(load.d.enqueue, item), kind) == 0)
        expect(load.end().rejected == 0)
        return 2 * len(bad)

    return total("payloads that are none", scale, 100, attempt)


@case()
def payloads_that_enqueue_when_they_end(scale: float) -> int:
    """A `__del__` may enqueue into the dispatcher that copied its payload: no lock is held then."""
    if sys.implementation.name != "cpython":
        raise LeftOut("payloads end with their last reference on CPython alone")

    def attempt(rng: random.Random, _: int) -> int:
        load = Load(rng, rng.choice(SHAPES), producers=0)
        other, last = load.census.sender(), load.census.sender(ordered=False)
        ended: list[BaseException | None] = []

        def end(_: object) -> None:
            failure = None
            try:
                outside()
                last.try_one(load.d, load.size(), rng.choice((0.0, 0.0005)))
            except BaseException as exc:
                failure = exc
            ended.append(failure)

        kinds = [sly(base, **{"del": end}) for base in (bytes, bytearray)]
        load.sender.wrap = other.wrap = lambda item: rng.choice(kinds)(item)  # noqa: PLW0108 - a choice for each
        worker = Worker(any_enqueue, load, other, 30)
        any_enqueue(load, load.sender, 30)
        worker.result()
        for failure in filter(None, ended):
            raise failure
        load.end()
        return len(ended)

    tried = total("payloads that enqueue when they end", scale, 60, attempt)
    expect(tried, "none ended")
    return tried


@case()
def payloads_whose_buffer_calls_back(scale: float) -> int:
    """A `__buffer__` may call the dispatcher that asks for it; it does not wait for itself, and holds nobody up."""
    if not PYTHON_BUFFERS:
        raise LeftOut("no __buffer__ in Python before 3.12")

    def attempt(rng: random.Random, _: int) -> int:
        load = Load(rng, rng.choice(SHAPES))
        inner = load.census.sender()
        blocked, let_go = threading.Event(), threading.Event()

        def back(item: bytes) -> memoryview:
            if rng.random() < 0.1:
                load.d.flush(None)  # without a wait: it is inside
            inner.try_one(load.d, load.size(), rng.choice((0.0, None)))
            balanced(load.d)
            return memoryview(item)

        def block(item: bytes) -> memoryview:
            blocked.set()
            expect(let_go.wait(LIMIT))
            return memoryview(item)

        load.sender.wrap = lambda item: giving(item, back)
        any_enqueue(load, load.sender, 30, (0.0, 0.001, None))
        load.sender.wrap = bytes
        worker = Worker(load.d.enqueue, giving(b"refused", block))
        expect(blocked.wait(LIMIT))
        any_enqueue(load, load.sender, 10, (0.0, None))
        expect(load.d.flush(LIMIT))
        load.halt.set()
        load.d.shutdown(LIMIT)
        let_go.set()
        with contextlib.suppress(tempo.Stopped):
            worker.result()
            raise AssertionError("accepted after the end")
        load.end(rejected=1)
        return len(inner.accepted)

    return total("payloads whose buffer calls back", scale, 60, attempt)


# -- Iterables ---------------------------------------------------------------------------------------------------------


class Sealed(Exception):
    """An exception that nothing can be noted on."""

    @property
    def accepted(self) -> int:
        """Not to be set."""
        return -1


@case()
def iterables_that_raise(scale: float) -> int:
    """What they raise passes through, `.accepted` says how many came before, and these are delivered."""
    raised: tuple[type[BaseException], ...] = (*RAISED, Sealed)
    kinds = [kind for kind in raised if not issubclass(kind, (tempo.Error, StopIteration))]

    def attempt(rng: random.Random, _: int) -> int:
        load = Load(rng, rng.choice(SHAPES))

        def sizes(n: int, kind: type[BaseException]) -> Iterator[int]:
            for _ in range(n):
                outside()
                yield load.size()
            raise kind("raised by the iterable")

        for _ in range(30):
            n, kind = rng.choice((0, 1, 10, 100)), rng.choice(kinds)
            before = len(load.sender.accepted)
            try:
                load.sender.try_many(load.d, sizes(n, kind), LIMIT, listed=False)
                raise RuntimeError("it did not pass through")
            except kind as exc:
                if isinstance(exc, Sealed):  # the caller cannot be told; all of them were accepted
                    load.sender.accepted += load.sender.groups.pop()
                else:
                    accepted = getattr(exc, "accepted", None)
                    expect(accepted == n, "accepted", accepted, n)
            expect(len(load.sender.accepted) == before + n)
        load.end()
        return 30

    return total("iterables that raise", scale, 40, attempt)


@case()
def iterables_that_reenter(scale: float) -> int:
    """They may call the dispatcher that reads them, whatever they call: nothing waits for itself."""

    def attempt(rng: random.Random, number: int) -> int:
        load = Load(rng, SHAPES[number % 3], producers=rng.choice((0, 1)))
        inner = load.census.sender()

        def sizes(depth: int = 0) -> Iterator[int]:
            for _ in range(rng.choice((0, 3, 30))):
                outside()
                call = rng.randrange(5)
                if call == 0:
                    inner.try_one(load.d, load.size(), rng.choice((0.0, None, LIMIT)))
                elif call == 1:
                    load.d.flush(rng.choice((None, LIMIT)))
                elif call == 2 and depth < 2:
                    load.census.sender().try_many(load.d, sizes(depth + 1), None, listed=False)
                else:
                    any_call(load, inner, load.receiver)
                yield load.size()
            if rng.random() < 0.02:
                load.d.shutdown(rng.choice((None, LIMIT)))

        for _ in range(30):
            load.sender.try_many(load.d, sizes(), rng.choice((0.0, 0.001, None)), listed=False)
        load.end()
        return len(inner.accepted)

    return total("iterables that reenter", scale, 60, attempt)


@case()
def iterables_that_block(scale: float) -> int:
    """While one blocks, all others go on, to the end; the call that reads it is told then, with the right count."""

    def attempt(rng: random.Random, _: int) -> int:
        load = Load(rng, rng.choice(SHAPES))
        blocked, let_go = threading.Semaphore(0), threading.Event()
        senders = [load.census.sender() for _ in range(3)]

        def sizes() -> Iterator[int]:
            for _ in range(5):
                yield load.size()
            blocked.release()
            expect(let_go.wait(LIMIT))
            yield 10

        workers = [Worker(sender.try_many, load.d, sizes(), LIMIT, listed=False) for sender in senders]
        for _ in range(3):
            expect(blocked.acquire(timeout=LIMIT))
        any_enqueue(load, load.sender, 10, (0.0, 0.001, None))
        expect(load.d.flush(LIMIT))
        with contextlib.suppress(queue.Empty):
            load.receiver.take(load.d.get(timeout=0))
        load.halt.set()
        if rng.random() < 0.5:
            load.census.receiver(back=True).take_all(load.d.stop())
        else:
            load.d.shutdown(LIMIT)
        let_go.set()
        for worker, sender in zip(workers, senders):
            expect(type(worker.result()) is tempo.Stopped and len(sender.accepted) == 5)
        load.end()
        return len(senders)

    return total("iterables that block", scale, 150, attempt)


@case()
def lists_that_lie(scale: float) -> int:
    """A list's or tuple's own class says what it yields, but none of its code runs with the lock held."""

    def attempt(rng: random.Random, _: int) -> int:
        load = Load(rng, rng.choice((MIDDLE, LARGE)), producers=0)

        def item(self: Any, place: Any) -> Any:
            outside()
            found = super(type(self), self).__getitem__(place)
            return type(self)(found) if isinstance(place, slice) else found

        def length(self: Any) -> Any:
            outside()
            return max(0, super(type(self), self).__len__() + rng.choice((0, 0, 1, -1)))

        def loop(self: Any) -> Any:
            outside()
            return super(type(self), self).__iter__()

        for base in (list, tuple):
            kind: Any = type("Sly", (base,), {"__getitem__": item, "__len__": length, "__iter__": loop})
            sent = [load.sender.make(load.size()) for _ in range(rng.choice((1, 30, 600, 1200)))]
            accepted = load.d.enqueue_many(kind(sent), timeout=LIMIT)
            expect(accepted <= len(sent), "more than there are", accepted, len(sent))
            load.d._check()
            load.sender.accepted += sent[:accepted]
        load.end()
        return 2

    return total("lists that lie", scale, 100, attempt)


# -- KeyboardInterrupt in every wait -----------------------------------------------------------------------------------


def safe_blocks() -> None:
    """Leave the case out where an interrupt may come between any two bytecodes, as that of a block and of its exit."""
    if sys.version_info < (3, 10):
        raise LeftOut("CPython 3.9 leaves a with block without its exit when an interrupt comes between (bpo-29988)")


def interrupted(
    rng: random.Random, work: Callable[[], object], where: Callable[[FrameType | None], bool] = lambda _: True
) -> bool:
    """Run work() with one KeyboardInterrupt at a random moment, in it or after it; return whether it was in it.

    where: whether a frame may be interrupted. The signal repeats, because CPython handles one that came just before a
    wait only after the wait; it raises once.
    """
    if not hasattr(signal, "setitimer"):
        raise LeftOut("no interval timer here")
    safe_blocks()
    came = over = False

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        if not came and (over or where(frame)):
            came = True
            signal.default_int_handler(signum, frame)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, around(rng, 0.0005), 0.005)
        work()
        over = True
        wait_until(lambda: came)
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return not over


def interrupting(
    name: str,
    scale: float,
    act: Callable[[Load], object],
    shapes: tuple[Shape, ...] = SHAPES,
    takes: int = 0,
    where: Callable[[FrameType | None], bool] = lambda _: True,
    after: Callable[[], object] = lambda: None,
) -> int:
    """Interrupt act(load), over and over, and see that what is left behind works; takes: calls that take batches."""

    def attempt(rng: random.Random, number: int) -> int:
        load = Load(rng, shapes[number % len(shapes)], producers=rng.choice((0, 1)))
        tried = 0
        for _ in range(40):
            for _ in range(rng.choice((0, 1, 5))):
                load.sender.try_one(load.d, load.size())
            tried += interrupted(rng, lambda: act(load), where)
            after()
            load.ended += takes
            expect(load.d.flush(LIMIT), "a wake-up is lost")
        s = balanced(load.d)
        expect(load.producers or not s.waiting_producers, s)
        expect(s.waiting_consumers <= len(load.consumers), s)
        load.end()
        return tried

    return total_uncollected(name, scale, 40, attempt)


@case()
def interrupts_in_get(scale: float) -> int:
    """The next consumer takes the batch, or sees to the timer; at most the batch just taken is lost to the caller."""
    return interrupting("interrupts in get", scale, lambda load: load.receiver.take(load.d.get()), takes=1)


@case()
def interrupts_in_iteration(scale: float) -> int:
    """As in get; and the thread is no longer in the body of the loop: its flush waits."""
    return interrupting("interrupts in iteration", scale, lambda load: load.receiver.take_all(load.d), takes=1)


def waiting(load: Load) -> None:
    """Enqueue with a wait, until interrupted."""
    while True:
        load.sender.try_one(load.d, load.size(), None)


@case()
def interrupts_in_a_wait_for_room(scale: float) -> int:
    """The payload is accepted or not, and nobody stands in the queue that has gone."""
    return interrupting("interrupts in a wait for room", scale, waiting, (TINY, MIDDLE))


def waiting_many(load: Load) -> None:
    """As waiting, with many at a time."""
    while True:
        load.sender.try_many(load.d, load.sizes(), None, load.rng.random() < 0.5)


@case()
def interrupts_in_a_wait_for_room_for_many(scale: float) -> int:
    """As for one; `.accepted` payloads were accepted for certain, and of the rest none but the next ones."""
    return interrupting("interrupts in a wait for room for many", scale, waiting_many, (TINY, MIDDLE))


@case()
def interrupts_in_flush(scale: float) -> int:
    """The batch is closed or not; what waited is gone."""

    def act(load: Load) -> None:
        while True:
            load.sender.try_one(load.d, load.size())
            load.d.flush()

    return interrupting("interrupts in flush", scale, act)


def closing(name: str, scale: float, act: Callable[[Load], object]) -> int:
    """Interrupt act(load), which shuts down, and see that calling shutdown again drains."""

    def one(rng: random.Random) -> int:
        load = Load(rng, rng.choice(SHAPES), producers=1)
        tried = 0
        for _ in range(rng.choice((0, 1, 100))):
            load.sender.try_one(load.d, load.size())
        for _ in range(rng.choice((1, 3))):
            tried += interrupted(rng, lambda: act(load))
        if load.d.stats().state == "running":
            load.sender.try_one(load.d)
        load.d.shutdown(LIMIT)
        expect(load.d.stats().state == "stopped")
        load.end()
        return tried

    return total_uncollected(name, scale, 40, lambda rng, _: sum(one(rng) for _ in range(20)))


@case()
def interrupts_in_shutdown(scale: float) -> int:
    """Work is refused from some moment on, or not; called again, it drains, and nothing is lost."""
    return closing("interrupts in shutdown", scale, lambda load: load.d.shutdown())


@case()
def interrupts_in_a_with_exit(scale: float) -> int:
    """As in shutdown."""

    def act(load: Load) -> None:
        with load.d:
            load.sender.try_one(load.d, load.size(), None)

    return closing("interrupts in a with exit", scale, act)


@case()
def interrupts_in_async_iteration(scale: float) -> int:
    """The coroutine is no longer waited for: others get what it was woken for."""

    async def loop(load: Load, receiver: Receiver) -> None:
        async for batch in load.d:
            receiver.take(batch)

    async def both(load: Load) -> None:
        await asyncio.gather(*(loop(load, receiver) for receiver in load.asynchronous))

    def act(load: Load) -> None:
        events.run_until_complete(both(load))

    def where(frame: FrameType | None) -> bool:  # elsewhere asyncio may be left half done
        return frame is not None and (frame.f_globals is vars(tempo) or frame.f_code.co_name == "select")

    def end_tasks() -> None:
        while tasks := asyncio.all_tasks(events):
            for task in tasks:
                task.cancel()
            with contextlib.suppress(KeyboardInterrupt):  # the same, in a task that waited for the interrupted one
                events.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        for _ in range(2):  # what is still to be called
            events.run_until_complete(asyncio.sleep(0))

    def after() -> None:
        end_tasks()
        gc.collect()  # until a task's cycle is collected, this thread is in the body of its loop

    events = asyncio.new_event_loop()
    logging.disable()  # asyncio tells of tasks that ended by an interrupt
    warnings.simplefilter("ignore")  # of coroutines that were not begun, too
    if hasattr(gc, "freeze"):  # not on PyPy
        gc.freeze()  # so that collecting costs little
    tried = interrupting("interrupts in async iteration", scale / 2, act, takes=2, where=where, after=after)
    events.close()
    return tried


# -- Exceptions from another thread ------------------------------------------------------------------------------------


class Killed(BaseException):
    """Raised in a thread by another one."""


def kill(worker: Worker, kind: type[BaseException] = Killed) -> None:
    """Raise an exception in a thread, at the next moment at which the interpreter looks."""
    expect(ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(kind)) == 1)


def killable() -> None:
    """Leave the case out where no exception can be raised in another thread."""
    if sys.implementation.name != "cpython":
        raise LeftOut("needs PyThreadState_SetAsyncExc")
    safe_blocks()


def ended(worker: Worker, kind: type[BaseException] = Killed) -> None:
    """Join a thread that was killed."""
    with contextlib.suppress(kind):
        worker.result()
        raise AssertionError("it ended by itself")


@case()
def producers_killed_at_any_point(scale: float) -> int:
    """What a killed one had enqueued comes once; of the call that it was killed in, all, a part or nothing."""
    killable()

    def work(load: Load, sender: Sender) -> None:
        while True:
            any_enqueue(load, sender, 1, (0.0, 0.0005, 0.02, None))

    def attempt(rng: random.Random, number: int) -> int:
        load = Load(rng, SHAPES[number % 3], producers=rng.choice((0, 1)))
        senders = [load.census.sender() for _ in range(2)]
        workers = [Worker(work, load, sender) for sender in senders]
        for _ in range(20):
            time.sleep(around(rng, 0.002))
            victim = rng.randrange(2)
            kill(workers[victim])
            ended(workers[victim])
            workers[victim] = Worker(work, load, senders[victim])
            load.sender.try_one(load.d, load.size(), None)
        for worker in workers:
            kill(worker)
            ended(worker)
        expect(load.d.flush(LIMIT), "a wake-up is lost")
        load.end()
        return 22

    return total_uncollected("producers killed", scale, 40, attempt)


@case()
def resting_producers_interrupted(scale: float) -> int:
    """A producer that was held back after its payload was accepted, and is interrupted then, has left the queue."""
    killable()

    def work(load: Load, sender: Sender) -> None:
        while True:
            sender.try_one(load.d, 400, None)

    def attempt(rng: random.Random, _: int) -> int:
        load = Load(rng, MIDDLE, producers=0, pause=0.002)
        senders = [load.census.sender() for _ in range(4)]
        workers = [Worker(work, load, sender) for sender in senders]
        for _ in range(20):
            wait_until(lambda: load.d._state.resting)
            time.sleep(around(rng, 0.0005))
            victim = rng.randrange(4)
            kill(workers[victim], KeyboardInterrupt)
            ended(workers[victim], KeyboardInterrupt)
            workers[victim] = Worker(work, load, senders[victim])
        for worker in workers:
            kill(worker, KeyboardInterrupt)
            ended(worker, KeyboardInterrupt)
        expect(load.d.flush(LIMIT), "a wake-up is lost")
        load.end()
        return 24

    return total_uncollected("resting producers", scale, 40, attempt)


@case()
def consumers_killed_at_any_point(scale: float) -> int:
    """At most the batch that a killed one had just taken is gone with it; others take the rest, and are the timer."""
    killable()

    def work(load: Load, receiver: Receiver) -> None:
        while True:
            if load.rng.random() < 0.5:
                for batch in load.d:
                    receiver.take(batch)
            else:
                with contextlib.suppress(queue.Empty):
                    receiver.take(load.d.get(timeout=load.rng.choice((0.0, 0.0005, 0.02, None))))

    def put_out(load: Load, worker: Worker) -> None:
        kill(worker)
        while worker.is_alive():  # a wait ends when there is something to take
            load.sender.try_one(load.d, load.size())
            worker.join(0.0005)
        ended(worker)
        load.ended += 1

    def attempt(rng: random.Random, number: int) -> int:
        load = Load(rng, SHAPES[number % 3], producers=rng.choice((0, 1)), consumers=rng.choice((0, 1)))
        receivers = [load.census.receiver() for _ in range(2)]
        workers = [Worker(work, load, receiver) for receiver in receivers]
        for _ in range(20):
            time.sleep(around(rng, 0.002))
            load.sender.try_one(load.d, load.size())
            victim = rng.randrange(2)
            put_out(load, workers[victim])
            expect(load.d.flush(LIMIT), "a wake-up is lost")
            workers[victim] = Worker(work, load, receivers[victim])
        for worker in workers:
            put_out(load, worker)
        load.end()
        return 22

    return total_uncollected("consumers killed", scale, 40, attempt)


# -- No memory ---------------------------------------------------------------------------------------------------------


class Subject:
    """A dispatcher with content, one call on it, and what the call took and gave: to be made without memory."""

    def __init__(self, shape: Shape, rng: random.Random, room: bool) -> None:
        self.d = tempo.Dispatcher(
            interval=LONG, max_buffered_bytes=shape.max_buffered_bytes, max_batch_bytes=shape.max_batch_bytes
        )
        self.before: list[bytes] = []
        for number in range(rng.choice((0, 1, 3, 300)) if room else 5000):
            item = (b"%d" % number).ljust(rng.choice(shape.sizes), b".")
            try:
                self.d.enqueue(item)
            except tempo.QueueFull:
                break
            self.before.append(item)
            if rng.random() < 0.02:
                self.d.flush(0)
        self.new: list[bytes] = []  # of the call, in order
        self.took: Sequence[tempo.Batch] = ()
        size = rng.choice(shape.sizes)
        self.items = [(b"new %d" % number).ljust(size, b".") for number in range(rng.choice((1, 30, 600)))]

    def enqueue(self) -> None:
        """One payload."""
        self.new = self.items[:1]
        self.d.enqueue(self.items[0])

    def enqueue_a_copy(self) -> None:
        """One that is to be copied."""
        self.new = self.items[:1]
        self.d.enqueue(bytearray(self.items[0]))

    def enqueue_with_a_wait(self) -> None:
        """One, with a wait for room."""
        self.new = self.items[:1]
        self.d.enqueue(self.items[0], timeout=0.0001)

    def enqueue_many(self) -> None:
        """A list."""
        self.new = self.items
        self.d.enqueue_many(self.items)

    def enqueue_one_by_one(self) -> None:
        """An iterator."""
        self.new = self.items
        self.d.enqueue_many(iter(self.items))

    def get(self) -> None:
        """Take a batch."""
        with contextlib.suppress(queue.Empty):
            self.took = (self.d.get(timeout=0),)

    def get_with_a_wait(self) -> None:
        """Wait for a batch."""
        with contextlib.suppress(queue.Empty):
            self.took = (self.d.get(timeout=0.0001),)

    def flush(self) -> None:
        """Close the open batch, and wait."""
        self.d.flush(0.0001)

    def stats(self) -> None:
        """Look at it."""
        self.d.stats()

    def stop(self) -> None:
        """Stop."""
        self.took = self.d.stop()

    def shutdown(self) -> None:
        """Shut down, with nobody to drain."""
        self.d.shutdown(0.0001)


CALLS = [name for name in vars(Subject) if not name.startswith("_")]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Throw away what is written to stderr: CPython tells of generators that it could not close without memory."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@case()
def calls_without_memory(scale: float) -> int:
    """Some allocation of a call fails, or a few: the batch is kept or the call refused, and later calls work."""
    try:
        testing = importlib.import_module("_testcapi")
        fail, heal = testing.set_nomemory, testing.remove_mem_hooks
    except (ImportError, AttributeError, OSError):  # PyPy's builds it, where its source is
        raise LeftOut("needs _testcapi.set_nomemory") from None
    if sys.version_info >= (3, 12):
        raise LeftOut("CPython itself crashes without memory from 3.12 on, in generators for one")

    tempo_functions = {name for name in vars(tempo.Dispatcher) if name != "enqueue"}

    def starved(call: Callable[[], object], start: int, stop: int) -> None:
        fail(start, stop)
        try:
            call()
        finally:
            heal()

    def attempt(rng: random.Random, _: int) -> int:
        shape, room = rng.choice(((TINY, True), (TINY, False), (MIDDLE, True), (MIDDLE, False), (LARGE, True)))
        name, start, width = rng.choice(CALLS), rng.randrange(140), rng.choice((1, 1, 2))
        subject = Subject(shape, rng, room)
        many = name in ("enqueue_many", "enqueue_one_by_one")
        where = (name, start, width, shape, room)
        raised: BaseException | None = None
        try:
            starved(getattr(subject, name), start, start + width)
        except tempo.Error as exc:
            raised = exc
            subject.took = getattr(exc, "undelivered", ())
        except (MemoryError, RuntimeError, SystemError) as exc:  # no lock; SystemError: CPython's own faults
            raised = exc
        d = subject.d
        d.stats()  # a section, which makes good what the call could not
        at_rest(d)
        came = [item for batch in (*subject.took, *d.stop()) for item in batch.tolist()]
        there = len(subject.before)
        if name == "shutdown" and not came and isinstance(raised, MemoryError):
            return 1  # instead of the DrainTimeout that had the batches: to raise it needs memory
        expect(came[:there] == subject.before, "lost", where, raised, there, len(came), d.stats())
        new = came[there:]
        expect(new == subject.new[: len(new)], "strange", where, raised)
        if raised is None:
            expect(new == subject.new, "refused, and not told", where)
        elif width == 1 and not isinstance(raised, SystemError) and innermost(raised) in tempo_functions:
            # In enqueue itself it may come between the append and the try. Elsewhere the exception had no memory.
            told = getattr(raised, "accepted", None) if many else 0
            expect(told in (len(new), None), "accepted, and not told", where, innermost(raised), len(new), told)
        if isinstance(raised, MemoryError):  # CPython has one that it uses again, with all that was noted on it
            vars(raised.with_traceback(None)).clear()
            return 1
        return 0

    with silence():
        tried = total("calls without memory", scale, 3000, attempt)
    expect(tried, "no allocation failed")
    return tried


def innermost(exc: BaseException) -> str:
    """Name of the function that an exception comes from."""
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_code.co_name


def without_reserves(name: str, scale: float) -> None:
    """Begin the case anew, with a glibc that gives large blocks back, and reserves nothing for threads."""
    wanted = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(128 * tempo.KiB)}
    if sys.platform == "linux" and not wanted.items() <= os.environ.items():
        arguments = ["-X", "utf8", "-m", "soak", "hostile", "--case", name, "--scale", str(scale)]
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, **wanted})


@contextlib.contextmanager
def limited(room: int) -> Iterator[None]:
    """Leave this process so many bytes of address space, and no more."""
    gc.collect()  # or there would be more after a while
    try:
        resource = importlib.import_module("resource")
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        raise LeftOut("needs a limit of address space, and /proc") from None
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@case()
def large_batches_without_memory(scale: float) -> int:
    """No room for a batch, or a copy: it is kept, or refused, and comes when there is room again."""
    size = tempo.MiB

    def attempt(rng: random.Random, _: int) -> int:
        load = Load(rng, Shape(24 * size, rng.choice((6, 12)) * size, ()), producers=0, consumers=0)
        d, sender, failed = load.d, load.sender, 0
        for _ in range(rng.choice((10, 20))):
            sender.try_one(d, size)
        items = [sender.make(2 * size) for _ in range(6)]
        copies = [bytearray(item) for item in items]
        batches = []
        with limited(rng.choice((1, 1, 3, 8)) * size):
            for _ in range(20):
                call = rng.randrange(4)
                try:
                    if call == 0:
                        batches.append(d.get(timeout=0))
                    elif call == 1 and items:
                        d.enqueue(copies[0])
                        sender.accepted.append(items.pop(0))
                        del copies[0]
                    elif call == 2:
                        d.flush(0)
                    else:
                        balanced(d)
                except MemoryError:
                    failed += 1
                except tempo.QueueFull:
                    sender.refusals.append(tempo.QueueFull)
                except queue.Empty:
                    pass
        load.receiver.take_all(batches)
        load.end()
        return failed

    without_reserves("large_batches_without_memory", scale)
    tried = total("large batches without memory", scale, 25, attempt)
    expect(tried or scale < 0.5, "nothing failed")
    return tried


@case()
def a_handler_without_memory(scale: float) -> int:
    """Where there is no room for its batch, its thread tells so, goes on, and has it when there is."""
    if sys.implementation.name == "pypy":
        raise LeftOut("PyPy's own Thread.start() waits for ever for a thread that had no memory to begin with")

    def attempt(rng: random.Random, _: int) -> int:
        push = Push(rng, Shape(24 * tempo.MiB, 12 * tempo.MiB, ()), producers=0)
        batches: list[tempo.Batch] = []
        items = [push.load.sender.make(tempo.MiB) for _ in range(12)]
        with hooked(push.hooked.append):
            with limited(rng.choice((1, 3, 6, 9)) * tempo.MiB):
                try:
                    push.d.start(batches.append)
                except RuntimeError:  # no room for its stack
                    push.hooked.append(MemoryError)
                push.load.sender.accepted += items[: push.d.enqueue_many(items)]
                wait_until(lambda: push.hooked or batches)
            if push.d._push is None:
                push.d.start(batches.append)
            expect(push.d.flush(LIMIT))
            push.receiver.take_all(batches)
            push.end()
        expect(set(push.hooked) <= {MemoryError}, push.hooked)
        return len(push.hooked)

    without_reserves("a_handler_without_memory", scale)
    tried = total("a handler without memory", scale, 40, attempt)
    expect(tried or scale < 0.5, "nothing failed")
    return tried
