# SPDX-License-Identifier: MIT
"""Other worlds: gevent, asyncio and cancellation, sub-interpreters, tracers, little stack, interpreter options."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import faulthandler
import gc
import importlib
import itertools
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, NamedTuple

import tempo
from soak.hostile import LeftOut, case, times
from soak.hostile.checks import (
    LIMIT,
    LONG,
    Census,
    Receiver,
    Sender,
    Worker,
    at_rest,
    dice,
    drained,
    expect,
    goes_on,
    wait_until,
)

ROOT = str(Path(__file__).resolve().parent.parent.parent)
CANCELLED = asyncio.CancelledError


# -- What is done in several worlds ------------------------------------------------------------------------------------


def send(sender: Sender, d: tempo.Dispatcher, count: int, timeout: float | None) -> None:
    """Enqueue one by one and several at once, until the dispatcher is closed."""
    for n in range(count):
        if n % 8 == 7:
            error = sender.try_many(d, [3, 0, 40], timeout, listed=n % 16 == 15)
        else:
            error = sender.try_one(d, n % 50, timeout)
        if isinstance(error, tempo.Closed):
            return
        if n % 16 == 0 or error is not None:
            time.sleep(0)


def pulled(each: int, timeout: float | None, batch: int | None, buffer: int) -> int:
    """Producers and consumers in threads of their own, a flush, and a shutdown; return how many payloads came out."""
    census = Census()
    d = tempo.Dispatcher(interval=0.002, max_batch_bytes=batch, max_buffered_bytes=buffer)
    consumers = [Worker(census.receiver().take_all, d) for _ in range(2)]
    producers = [Worker(send, census.sender(), d, each, timeout) for _ in range(3)]
    for worker in producers:
        worker.result()
    expect(d.flush(LIMIT), "flush")
    d.shutdown(LIMIT)
    for worker in consumers:
        worker.result()
    return census.verify(d).delivered


def pushed(each: int, timeout: float | None, batch: int | None, buffer: int) -> int:
    """The same in push mode; the handler raises now and then."""
    census = Census()
    receiver = census.receiver()
    errors: list[BaseException] = []

    def handler(found: tempo.Batch) -> None:
        receiver.take(found)
        if receiver.batches % 5 == 0:
            raise OSError("as it happens")

    d = tempo.Dispatcher(interval=0.002, max_batch_bytes=batch, max_buffered_bytes=buffer)
    d.start(handler, on_error=lambda exc, _: errors.append(exc))
    producers = [Worker(send, census.sender(), d, each, timeout) for _ in range(3)]
    for worker in producers:
        worker.result()
    expect(d.flush(LIMIT), "flush")
    d.shutdown(LIMIT)
    expect(not [t for t in threading.enumerate() if t.name == f"tempo-{id(d):x}"], "the handler's thread is left")
    expect(len(errors) == receiver.batches // 5, len(errors), receiver.batches)
    return census.verify(d).delivered


def stopped(each: int, batch: int | None, buffer: int) -> int:
    """Stop it under the feet of waiting producers and of a consumer."""
    census = Census()
    receiver = census.receiver()
    d = tempo.Dispatcher(interval=0.002, max_batch_bytes=batch, max_buffered_bytes=buffer)
    producers = [Worker(send, census.sender(), d, each, None) for _ in range(3)]
    consumer = Worker(receiver.take_all, itertools.islice(d, 5))
    consumer.result()
    census.receiver(back=True).take_all(d.stop())
    for worker in producers:
        worker.result()
    expect(not d.stop(), "stopped twice")
    census.verify(d)
    return receiver.batches


def seen_waiting() -> int:
    """While a thread waits in any way, this one goes on, sees it, and ends the wait. Return how many ways."""

    def filled() -> tempo.Dispatcher:
        d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=8)
        d.enqueue(b"12345678")
        return d

    def over(d: tempo.Dispatcher, *came: bytes) -> None:
        expect([item for batch in d.stop() for item in batch.tolist()] == list(came))
        at_rest(d)

    d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=8)
    consumer = Worker(d.get)
    wait_until(lambda: d.stats().waiting_consumers == 1, "get")
    d.enqueue(b"a")
    d.flush(0)  # True, if the consumer is quick
    expect(consumer.result().tolist() == [b"a"])
    over(d)

    d = filled()
    producer = Worker(d.enqueue, b"b", timeout=None)
    wait_until(lambda: d.stats().waiting_producers == 1, "enqueue")
    d.flush(0)
    expect(d.get(0).tolist() == [b"12345678"])
    producer.result()
    over(d, b"b")

    d = filled()
    flusher = Worker(d.flush, LIMIT)
    wait_until(lambda: d._state.drainers, "flush")
    expect(d.get(0).nbytes == 8)
    expect(flusher.result() is True)
    over(d)

    d = filled()
    closer = Worker(d.shutdown, LIMIT)
    wait_until(lambda: d._state.drainers, "shutdown")
    expect(d.get(0).nbytes == 8)
    closer.result()
    over(d)

    d = filled()
    consumer = Worker(d.get, 0.02)  # its timer, and nobody else, ends this
    expect(isinstance(d.get(LIMIT), tempo.Batch) if d.flush(0) else True)
    with contextlib.suppress(queue.Empty):
        consumer.result()
    drained(d)
    over(d)

    d = tempo.Dispatcher(interval=0.01, max_buffered_bytes=8)
    d.enqueue(b"due")
    expect(Worker(d.get, LIMIT).result().tolist() == [b"due"])  # the consumer is the timer
    over(d)

    gate, in_hand = threading.Event(), threading.Event()

    def handler(_: object) -> None:
        in_hand.set()
        gate.wait(LIMIT)

    d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=8)
    d.start(handler)
    d.enqueue(b"pushed")
    expect(in_hand.wait(LIMIT))
    closer = Worker(d.shutdown, LIMIT)
    wait_until(lambda: d.stats().state == "shutting_down", "the handler's return")
    expect(d.stats().in_flight == 1)
    gate.set()
    closer.result()
    over(d)
    return 7


def ordinary(scale: float) -> int:
    """All of the above, as a program would use it."""
    each = times(400, scale)
    tried = seen_waiting()
    for timeout, batch, buffer in ((0, 64, 300), (None, 64, 300), (None, None, 1 << 17), (0.001, 500, 1 << 17)):
        tried += pulled(each, timeout, batch, buffer)
        tried += pushed(each, timeout, batch, buffer)
    return tried + stopped(max(50, each), 64, 300)


def in_child(script: str, *options: str, arguments: tuple[str, ...] = (), **environ: str) -> str:
    """Run a script in an interpreter of its own, which must end well and say nothing on stderr; return its output."""
    head = f"import sys; sys.path.insert(0, {ROOT!r})\n"
    child = subprocess.run(
        [sys.executable, *options, "-X", "utf8", "-c", head + script, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environ},
    )
    expect(
        child.returncode == 0 and not child.stderr,
        options,
        child.returncode,
        child.stdout[-3000:],
        child.stderr[-3000:],
    )
    return child.stdout


# -- gevent ------------------------------------------------------------------------------------------------------------


def gevent_imported() -> Any:
    """gevent, if it is there."""
    try:
        return importlib.import_module("gevent")
    except ImportError as error:
        raise LeftOut(f"gevent cannot be imported: {error}") from None


def gevent_ordinary(scale: float) -> int:
    """The ordinary day in greenlets, while another one ticks; the process is patched."""
    gevent = importlib.import_module("gevent")
    ticks = [0]

    def tick() -> None:
        while True:
            gevent.sleep(0.001)
            ticks[0] += 1

    def in_greenlet() -> bool:
        return isinstance(gevent.getcurrent(), gevent.Greenlet)

    expect(Worker(in_greenlet).result(), "not patched")
    ticking = gevent.spawn(tick)
    tried = ordinary(scale)
    expect(ticks[0] > 0 and not ticking.dead, "the hub stood still")
    ticking.kill()
    expect(threading.active_count() == 1, threading.enumerate())
    return tried


GEVENT_ORDINARY = """
import gevent.monkey
gevent.monkey.patch_all()
from soak.hostile import worlds
print(worlds.gevent_ordinary(float(sys.argv[1])))
"""


@case(limit=300)
def gevent_before_the_import(scale: float) -> int:
    """Callers in greenlets of a process that was patched before anything else: as threads, and the hub goes on."""
    gevent_imported()
    return int(in_child(GEVENT_ORDINARY, arguments=(str(5 * scale),)).split()[-1])


@case(limit=300)
def gevent_after_the_import(scale: float) -> int:
    """The same where tempo was imported, and used, before the patching: dispatchers made later wait in greenlets."""
    gevent_imported()
    used = "import tempo; tempo.Dispatcher(interval=1, max_buffered_bytes=1).enqueue(b'x')\n"
    return int(in_child(used + GEVENT_ORDINARY, arguments=(str(5 * scale),)).split()[-1])


@case(limit=300)
def gevent_ends_a_wait(scale: float) -> int:
    """Greenlets killed, or out of time, while they wait: nothing lost or left behind, and `.accepted` is right."""
    gevent = gevent_imported()
    importlib.import_module("gevent.monkey").patch_all()
    rng = dice("gevent_ends_a_wait")
    ends = (gevent.Timeout, gevent.GreenletExit)
    tried = 0
    for _ in range(times(60, scale)):
        census = Census()
        buffer = rng.choice([100, 1000, 1 << 16])
        d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=buffer, max_batch_bytes=rng.choice([None, 50, 1000]))

        def produce(sender: Sender, d: tempo.Dispatcher = d, buffer: int = buffer) -> None:
            for _ in range(200):
                with contextlib.suppress(gevent.Timeout), gevent.Timeout(rng.choice([0.0001, 0.001, 0.01])):
                    sender.try_many(d, [rng.randrange(buffer // 4) for _ in range(rng.randrange(1, 4))], None)

        def consume(receiver: Receiver, d: tempo.Dispatcher = d) -> None:
            while True:
                try:
                    with gevent.Timeout(rng.choice([0.0001, 0.001])):
                        batch = d.get()
                    receiver.take(batch)
                except gevent.Timeout:
                    continue
                except tempo.Stopped:
                    return

        producers = [gevent.spawn(produce, census.sender()) for _ in range(4)]
        consumers = [gevent.spawn(consume, census.receiver()) for _ in range(3)]
        for victim in rng.sample(producers, 2):
            gevent.sleep(0.001 * rng.random())
            victim.kill()
            tried += 1
        consumers[0].kill()
        gevent.joinall(producers, timeout=LIMIT)
        expect(all(g.dead and (g.exception is None or isinstance(g.exception, ends)) for g in producers), producers)
        d.shutdown(LIMIT)
        gevent.joinall(consumers, timeout=LIMIT, raise_error=True)
        expect(all(g.dead for g in consumers))
        for sender in census.senders:  # what a call had not accepted when it was ended is not accepted any more
            expect(not set(sender.unsure) & {p for r in census.receivers for p in r.payloads}, "`.accepted` is wrong")
        tried += census.verify(d).delivered
    return tried


@case(limit=300)
def gevent_forks(scale: float) -> int:
    """A fork copies the greenlets too, the handler's among them: the child's handler still runs once at a time."""
    gevent_imported()
    script = """if True:
        import gevent.monkey; gevent.monkey.patch_all()
        import os, traceback
        from soak.hostile.checks import Census, expect, wait_until
        import tempo
        for waits in (True, False):
            running, most, census = [], [], Census()
            sender, receiver = census.sender(), census.receiver()
            def handler(batch):
                running.append(batch)
                most.append(len(running))
                receiver.take(batch)
                gevent.sleep(0.002)
                running.remove(batch)
            d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=1 << 16, max_batch_bytes=8)
            d.start(handler)
            if waits:
                wait_until(lambda: d.stats().waiting_consumers)
            else:
                sender.try_one(d)
                wait_until(lambda: running)
            pid = os.fork()
            if pid == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # threading cannot forget a thread that it has forgotten
                try:
                    census = Census()
                    sender, receiver = census.sender(), census.receiver()
                    running.clear()
                    most.clear()
                    d._check()
                    for _ in range(5):
                        sender.try_many(d, [4, 8, 0])
                        gevent.sleep(0.001)
                        d._check()
                    expect(d.flush(30))
                    expect(not running, "flush came before the handler was done")
                    d.shutdown(30)
                    census.verify(d)
                    expect(max(most) == 1, most)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc(file=sys.stdout)
                    sys.stdout.flush()
                os._exit(1)
            expect(os.waitpid(pid, 0)[1] == 0, "the child")
            sender.try_many(d, [4, 8, 0])
            d.shutdown(30)
            census.verify(d)
    """
    n = times(10, scale)
    for _ in range(n):
        in_child(script)
    return 2 * n


@case(limit=300)
def gevent_after_the_fork(scale: float) -> int:
    """Dispatchers of before, in a child that is patched, as gunicorn's gevent workers are: they wait in greenlets.

    Also where the patched child forks again, and where start() is the first call; finalizers switch to other greenlets.
    """
    gevent_imported()
    script = """if True:
        import gc, os, threading, traceback
        from soak.hostile.checks import Census, expect
        import tempo
        takes = Census().receiver()
        limits = {"interval": 0.001, "max_buffered_bytes": 100, "max_batch_bytes": 50}
        pushing, pulling, started = (tempo.Dispatcher(**limits) for _ in range(3))
        for d in (pushing, pulling):
            d.enqueue(b"the parent's")
        pushing.start(lambda batch: takes.take(batch))
        def fork():
            pid = os.fork()
            if pid:
                os._exit(os.waitpid(pid, 0)[1] != 0)
        fork()
        try:
            import gevent, gevent.monkey
            gevent.monkey.patch_all()
            if sys.argv[1] == "twice":
                fork()
            ticks = [0]
            def tick():
                while True:
                    gevent.sleep(0.001)
                    ticks[0] += 1
            ticking = gevent.spawn(tick)
            class Switches:
                def __init__(self):
                    self.me = self
                def __del__(self):
                    gevent.sleep(0)
            gc.set_threshold(17)
            for d in (pulling, pushing, started):
                census = Census()
                takes = census.receiver()
                if d is started:
                    d.start(lambda batch: takes.take(batch))
                def consume():
                    for batch in d:
                        takes.take(batch)
                def produce(sender):
                    for _ in range(50):
                        Switches()
                        sender.try_many(d, [4, 30, 8], None)
                at_work = [gevent.spawn(consume)] if d is pulling else []
                at_work += [gevent.spawn(produce, census.sender()) for _ in range(4)]
                gevent.joinall(at_work[-4:], timeout=30, raise_error=True)
                expect(all(g.dead for g in at_work[-4:]), "a producer waits for ever")
                expect(type(d._state.lock) is type(threading.RLock()), "the lock is not a patched one")
                expect(d.flush(30))
                d.shutdown(30)
                gevent.joinall(at_work, timeout=30, raise_error=True)
                d._check()
                print(census.verify(d).delivered)
            expect(ticks[0] and not ticking.dead, "the hub stood still")
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
        os._exit(1)
    """
    tried = 0
    for i in range(times(10, scale)):
        came = [int(line) for line in in_child(script, arguments=("once" if i % 2 else "twice",)).split()]
        expect(came == [600, 600, 600], came)
        tried += sum(came)
    return tried


@case(limit=300)
def gevent_at_exit(scale: float) -> int:
    """A program in greenlets that ends without a shutdown: what was accepted is handled before it is gone."""
    gevent_imported()
    script = """if True:
        import gevent.monkey; gevent.monkey.patch_all()
        import tempo
        d = tempo.Dispatcher(interval=60, max_buffered_bytes=1 << 20)
        def handler(batch):
            gevent.sleep(0.001)
            print(len(batch), flush=True)
        d.start(handler)
        d.enqueue_many([b"x"] * 1000)
        if sys.argv[1] == "yes":
            gevent.sleep(0.001)  # the handler's greenlet has begun
        d.enqueue(b"y")
    """
    n = times(10, scale)
    for i in range(n):
        out = in_child(script, arguments=("yes" if i % 2 else "no",))
        expect(sum(map(int, out.split())) == 1001, out)
    return n


# -- asyncio, by hand --------------------------------------------------------------------------------------------------


class HandFuture:
    """A future that is awaited by one coroutine, stepped by hand."""

    def __init__(self) -> None:
        self.ready = False

    def done(self) -> bool:
        """As a future's."""
        return self.ready

    def set_result(self, _: object) -> None:
        """As a future's."""
        expect(not self.ready, "woken twice")
        self.ready = True

    def __await__(self) -> Generator[HandFuture, None, None]:
        yield self
        expect(self.ready, "resumed too early")


class HandTimer:
    """What call_later returns."""

    def __init__(self, fire: Callable[[], object]) -> None:
        self.fire = fire
        self.cancelled = False

    def cancel(self) -> None:
        """As a handle's."""
        self.cancelled = True


class HandLoop:
    """An event loop that does nothing by itself."""

    def __init__(self) -> None:
        self.closed = False
        self.posted: deque[Callable[[], object]] = deque()
        self.timers: list[HandTimer] = []

    def create_future(self) -> HandFuture:
        """As a loop's."""
        return HandFuture()

    def is_closed(self) -> bool:
        """As a loop's."""
        return self.closed

    def call_soon_threadsafe(self, work: Callable[[], object]) -> None:
        """As a loop's."""
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.posted.append(work)

    def call_later(self, _: float, work: Callable[[], object]) -> HandTimer:
        """As a loop's."""
        self.timers.append(HandTimer(work))
        return self.timers[-1]

    def turn(self, timers: bool) -> None:
        """Do what was posted, or what timers are due, as an open loop would."""
        if self.closed:
            return
        if timers:
            due, self.timers = self.timers, []
            for timer in due:
                if not timer.cancelled:
                    timer.fire()
        else:
            while self.posted:
                self.posted.popleft()()


class HandTask:
    """A coroutine that waits for the next batch in a loop of its own, stepped by hand."""

    def __init__(self, d: tempo.Dispatcher) -> None:
        self.loop = HandLoop()
        self.batches = d.__aiter__()
        self.got: list[tempo.Batch] = []
        self.next: Coroutine[Any, Any, tempo.Batch] | None = None
        self.awaited: HandFuture | None = None

    def can_step(self) -> bool:
        """Whether the loop would run it now: it is not waiting, or was woken."""
        return not self.loop.closed and (self.awaited is None or self.awaited.ready)

    def _run(self, step: Callable[..., Any], *args: object) -> None:
        asyncio._set_running_loop(self.loop)  # type: ignore[arg-type]
        try:
            self.awaited = step(*args)
        except StopIteration as result:
            self.got.append(result.value)
            self.next = self.awaited = None
        except (StopAsyncIteration, CANCELLED, KeyError):
            self.next = self.awaited = None
        finally:
            asyncio._set_running_loop(None)

    def step(self) -> None:
        """Go on to the next suspension, or to the end of the wait."""
        if self.next is None:
            self.next = self.batches.__anext__()
        self._run(self.next.send, None)

    def throw(self, kind: type[BaseException]) -> None:
        """Cancel it where it waits; whatever else is thrown there does the same."""
        if self.next is not None:
            self._run(self.next.throw, kind())

    def close(self) -> None:
        """End it as the garbage collector does."""
        if self.next is not None:
            self.next.close()
        self.next = self.awaited = None


class HandWorld:
    """One dispatcher, and two tasks each in a loop of its own; every letter is one step."""

    LETTERS = "abABxycCefpqtugsz"

    def __init__(self, interval: float, batch: int | None) -> None:
        self.census = Census()
        self.sender = self.census.sender()
        self.back = self.census.receiver(back=True)
        self.getter = self.census.receiver()
        self.d = tempo.Dispatcher(interval=interval, max_buffered_bytes=1 << 16, max_batch_bytes=batch)
        self.tasks = [HandTask(self.d) for _ in range(2)]

    def do(self, letter: str) -> bool:
        """Do one step; False: it means nothing here."""
        a, b = self.tasks
        task = b if letter in "bByCqu" else a
        if letter in "ab":
            if not task.can_step():
                return False
            task.step()
        elif letter in "ABxy":
            if task.next is None:
                return False
            if letter in "xy":
                task.close()
            else:
                task.throw(CANCELLED)
        elif letter in "cC":
            if task.loop.closed:
                return False
            task.loop.closed = True
        elif letter in "pq":
            if not task.loop.posted:
                return False
            task.loop.turn(False)
        elif letter in "tu":
            if not task.loop.timers:
                return False
            task.loop.turn(True)
        elif letter == "e":
            self.sender.try_one(self.d)
        elif letter == "f":
            self.d.flush(0)
        elif letter == "g":
            with contextlib.suppress(queue.Empty, tempo.Stopped):
                self.getter.take(self.d.get(0))
        elif letter == "s":
            try:
                self.d.shutdown(0)
            except tempo.DrainTimeout as error:
                self.back.take_all(error.undelivered)
            except tempo.Stopped:
                pass
        elif letter == "z":
            self.back.take_all(self.d.stop())
        return True

    def over(self, how: str) -> None:
        """See that whoever waits is told of what is there; then end all, and count."""
        d = self.d
        self.sender.try_one(d)
        d.flush(0)
        while True:
            for task in self.tasks:
                task.loop.turn(False)
            alive = [task for task in self.tasks if not task.loop.closed and task.next is not None]
            if not d.stats().buffered or not alive:
                break
            able = [task for task in alive if task.can_step()]
            expect(able, "nobody was told of a batch", how, d.stats())
            able[0].step()
        d.stop() if d.stats().state == "stopped" else self.back.take_all(d.stop())
        for task in self.tasks:
            task.loop.turn(False)
            if not task.loop.closed and task.next is not None:
                expect(task.can_step(), "it was not told of the stop", how)
                task.step()
                expect(task.next is None, "it waits for a stopped dispatcher", how)
            task.close()
            self.census.receiver().take_all(task.got)
        self.census.verify(d)


@case(limit=300)
def asyncio_stepped_through_every_order(scale: float) -> int:
    """Every order of four steps (cancel, close a loop, ...) of two coroutines: nothing lost, nobody forgotten."""
    settings = [(LONG, None), (1e-9, 4)]
    orders = itertools.product(settings, ("", "ab"), itertools.product(HandWorld.LETTERS, repeat=4))
    rng = dice("asyncio_stepped_through_every_order")
    tried = 0
    for setting, first, letters in orders:
        if rng.random() < scale:
            world = HandWorld(*setting)
            if all(world.do(letter) for letter in (*first, *letters)):
                world.over(f"{setting} {first}{''.join(letters)}")
                tried += 1
    return tried


@case(limit=300)
def asyncio_stepped_at_random(scale: float) -> int:
    """Long orders of the same steps, also with other exceptions thrown into the wait."""
    rng = dice("asyncio_stepped_at_random")
    tried = 0
    for _ in range(times(15000, scale)):
        world = HandWorld(rng.choice([LONG, 1e-9]), rng.choice([None, 4, 12]))
        done = ""
        for _ in range(rng.randrange(40)):
            letter = rng.choice("abababABxyeeeefpqtugg" if rng.random() < 0.95 else HandWorld.LETTERS)
            if letter in "AB" and rng.random() < 0.3:
                world.tasks["AB".index(letter)].throw(KeyError)
            if world.do(letter):
                done += letter
        world.over(done)
        tried += len(done)
    return tried


# -- asyncio, in loops -------------------------------------------------------------------------------------------------


def run_loop(work: Coroutine[Any, Any, Any], quiet: bool = False) -> Any:
    """As asyncio.run; quiet: what the loop has to tell of tasks that are left waiting is kept to itself."""
    loop = asyncio.new_event_loop()
    if quiet:
        loop.set_exception_handler(lambda *_: None)
    try:
        return loop.run_until_complete(asyncio.wait_for(work, LIMIT))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


async def receive(d: tempo.Dispatcher, receiver: Receiver) -> None:
    """Take batches until the dispatcher ends, or the task is cancelled."""
    async for batch in d:
        receiver.take(batch)


async def receive_in_time(d: tempo.Dispatcher, receiver: Receiver, rng: random.Random) -> None:
    """The same, each wait with a timeout."""
    batches = d.__aiter__()
    while True:
        try:
            receiver.take(await asyncio.wait_for(batches.__anext__(), rng.choice([0, 0.0001, 0.001])))
        except asyncio.TimeoutError:
            continue
        except StopAsyncIteration:
            return


async def receive_together(d: tempo.Dispatcher, receivers: list[Receiver], rng: random.Random) -> None:
    """The same by several tasks, one of which fails: all are cancelled, and begin anew."""

    async def fail() -> None:
        for _ in range(rng.randrange(8)):
            await asyncio.sleep(0)
        raise KeyError

    while d.stats().state == "running":
        jobs = [receive(d, receiver) for receiver in receivers]
        if hasattr(asyncio, "TaskGroup") and rng.random() < 0.5:
            try:
                async with asyncio.TaskGroup() as group:
                    for job in (*jobs, fail()):
                        group.create_task(job)
            except Exception as error:  # an ExceptionGroup; the name is not known everywhere
                expect(all(isinstance(exc, KeyError) for exc in getattr(error, "exceptions", [error])), error)
        else:
            together = asyncio.gather(*jobs, fail())
            with contextlib.suppress(KeyError):
                await together
            await end([task for task in asyncio.all_tasks() if task.get_coro() in jobs])


async def receive_by_generator(d: tempo.Dispatcher, receiver: Receiver, rng: random.Random) -> None:
    """The same by asynchronous generators that are closed, or dropped, at any point."""

    async def generate() -> AsyncIterator[tempo.Batch]:
        async for batch in d:
            receiver.take(batch)
            yield batch

    while d.stats().state == "running":
        generator = generate()
        try:
            for _ in range(rng.randrange(5)):
                await asyncio.wait_for(generator.__anext__(), 0.001)
        except (asyncio.TimeoutError, StopAsyncIteration):
            pass
        if rng.random() < 0.5:
            await generator.aclose()  # type: ignore[attr-defined]
        del generator


async def end(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended: a wait_for of old may swallow a cancellation."""
    for task in tasks:
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        expect(task.cancelled() or task.exception() is None, task)


async def cancel_at_random(d: tempo.Dispatcher, census: Census, rng: random.Random) -> None:
    """Consumers of all kinds, cancelled again and again, until the dispatcher ends."""
    kinds: list[Callable[[], Coroutine[Any, Any, None]]] = [
        lambda: receive(d, census.receiver()),
        lambda: receive_in_time(d, census.receiver(), rng),
        lambda: receive_together(d, [census.receiver(), census.receiver()], rng),
        lambda: receive_by_generator(d, census.receiver(), rng),
    ]
    tasks: list[asyncio.Task[None]] = []
    while d.stats().state == "running":
        if len(tasks) < 4:
            tasks.append(asyncio.ensure_future(rng.choice(kinds)()))
        if rng.random() < 0.3:
            await end([tasks.pop(rng.randrange(len(tasks)))])
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        await asyncio.sleep(rng.choice([0, 0.0002]))
    await end(tasks[1:])
    if tasks:
        tasks[0].cancel()  # while it may be waiting for a batch of the drain
    await receive(d, census.receiver())
    await end(tasks)


@case(limit=300)
def asyncio_cancelled_at_random(scale: float) -> int:
    """Several loops in several threads on one dispatcher, cancellations in all of them: nothing lost, no one stuck."""
    rng = dice("asyncio_cancelled_at_random")
    tried = 0
    for i in range(times(30, scale)):
        census = Census()
        batch = rng.choice([None, 50, 500])
        d = tempo.Dispatcher(interval=rng.choice([0.0005, 0.003]), max_buffered_bytes=2000, max_batch_bytes=batch)
        consumers = [
            Worker(lambda d=d, c=census, seed=seed: run_loop(cancel_at_random(d, c, random.Random(seed))))
            for seed in [rng.random() for _ in range(rng.randrange(1, 4))]
        ]
        if i % 2:
            consumers.append(Worker(census.receiver().take_all, d))
        producers = [Worker(send, census.sender(), d, 200, rng.choice([0, None])) for _ in range(2)]
        for worker in producers:
            worker.result()
        d.shutdown(LIMIT)
        for worker in consumers:
            worker.result()
        tried += census.verify(d).delivered
    return tried


@case(limit=300)
def asyncio_loops_that_end_while_a_task_waits(scale: float) -> int:
    """A loop stopped, closed, or collected with a task waiting in it: others get the batches, now and by interval."""
    rng = dice("asyncio_loops_that_end_while_a_task_waits")

    def leave_waiting(d: tempo.Dispatcher, receiver: Receiver, close: bool) -> tuple[Any, Any]:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)
        task = loop.create_task(receive(d, receiver))
        while not any(getattr(parker, "_loop", None) is loop for parker in list(d._state.consumers)):
            loop.call_soon(loop.stop)
            loop.run_forever()
        if close:
            loop.close()
        return loop, task

    n = times(500, scale)
    for i in range(n):
        census = Census()
        sender, other = census.sender(), census.receiver()
        d = tempo.Dispatcher(interval=0.001 if i % 2 else LONG, max_buffered_bytes=1000, max_batch_bytes=None)
        ends = [rng.random() < 0.7 for _ in range(rng.randrange(1, 4))]
        if rng.random() < 0.5:
            sender.try_one(d)
        left = [Worker(leave_waiting, d, census.receiver(), close).result() for close in ends]
        waiting = Worker(d.get, LIMIT)
        wait_until(lambda w=waiting, d=d: not w.is_alive() or any(p.sure for p in list(d._state.consumers)))  # type: ignore[misc]
        sender.try_one(d)
        if not i % 2:
            d.flush(0)
        other.take(waiting.result())
        sender.try_one(d)
        for loop, task in left:
            if not loop.is_closed():
                task.cancel()
                with contextlib.suppress(CANCELLED):
                    loop.run_until_complete(task)
                loop.close()
        left = []
        if i % 4 < 2:
            gc.collect()
        other.take_all(drained(d))
        census.verify(d)
        goes_on(d)
    return n


@case(limit=120)
def asyncio_waits_that_were_cancelled(scale: float) -> int:
    """flush and shutdown wait again in a thread whose coroutine was cancelled, whoever keeps what it raised."""

    def take_when_waited_for(d: tempo.Dispatcher, receiver: Receiver) -> None:
        wait_until(lambda: d._state.drainers)
        receiver.take_all(drained(d))

    async def keep(d: tempo.Dispatcher, receiver: Receiver, kept: list[BaseException]) -> None:
        try:
            await receive(d, receiver)
        except CANCELLED as exc:
            kept.append(exc)  # its traceback holds the frames, and these the iterator

    async def cancelled(d: tempo.Dispatcher, receiver: Receiver) -> list[BaseException]:
        kept: list[BaseException] = []
        tasks = [asyncio.ensure_future(keep(d, receiver, kept)) for _ in range(2)]
        while d.stats().waiting_consumers < 2:
            await asyncio.sleep(0)
        await end(tasks)
        return kept

    n = times(100, scale)
    for _ in range(n):
        census = Census()
        sender, receiver = census.sender(), census.receiver()
        d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=1000)
        kept = run_loop(cancelled(d, receiver))
        expect(len(kept) == 2, kept)
        for wait in (lambda d=d: expect(d.flush(LIMIT), "flush"), lambda d=d: d.shutdown(LIMIT)):
            sender.try_one(d)
            taking = Worker(take_when_waited_for, d, receiver)
            wait()
            expect(d.stats().buffered == 0, "it did not wait")
            taking.result()
        census.verify(d)
    return n


# -- Sub-interpreters --------------------------------------------------------------------------------------------------


class Interpreters(NamedTuple):
    """One way to make interpreters within this process."""

    create: Callable[[], Any]
    run: Callable[[Any, str], None]
    destroy: Callable[[Any], None]


def interpreters() -> dict[str, Interpreters]:
    """All ways that this version has; own: each has a GIL of its own, or is otherwise set apart."""

    def load(name: str) -> Any:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
        return None

    found = {}
    public, low, old = load("concurrent.interpreters"), load("_interpreters"), load("_xxsubinterpreters")
    if public is not None:
        found["public"] = Interpreters(public.create, lambda i, script: i.exec(script), lambda i: i.close())
    if low is not None:

        def run(i: Any, script: str) -> None:
            failure = low.exec(i, script)
            expect(failure is None, getattr(failure, "formatted", failure), getattr(failure, "errdisplay", ""))

        found["own"] = Interpreters(lambda: low.create("isolated"), run, low.destroy)
        found["shared"] = Interpreters(lambda: low.create("legacy"), run, low.destroy)
    elif old is not None:
        try:
            old.destroy(old.create(isolated=False))
            found["own"] = Interpreters(lambda: old.create(isolated=True), old.run_string, old.destroy)
            found["shared"] = Interpreters(lambda: old.create(isolated=False), old.run_string, old.destroy)
        except TypeError:  # there is one kind only
            found["shared"] = Interpreters(old.create, old.run_string, old.destroy)
    if not found:
        raise LeftOut("this interpreter has no others within it")
    return found


INSIDE = """
import os, queue, sys, threading
sys.path.insert(0, ROOT)
import tempo

def expect(condition, *what):
    if not condition:
        raise AssertionError(*what)

def made(**limits):
    return tempo.Dispatcher(interval=60, max_buffered_bytes=1 << 16, **limits)

def threaded(work):
    try:
        thread = threading.Thread(target=work)
        thread.start()
    except RuntimeError:  # this kind of interpreter has no threads
        return work()
    thread.join(30)
    expect(not thread.is_alive(), "stuck")

d = made(max_batch_bytes=512)
items = [b"%d" % n for n in range(2000)]
threaded(lambda: [d.enqueue(item) for item in items[:1500]])
expect(d.enqueue_many(items[1500:]) == 500)
try:
    d.enqueue(bytes(1 << 16))
except tempo.QueueFull:
    pass
else:
    expect(False, "it did not fit")
came = []
def take():
    try:
        while True:
            came.extend(d.get(0).tolist())
    except queue.Empty:
        pass
d.flush(0)
threaded(take)
expect(came == items, len(came))
d.shutdown(30)
d._check()
expect(d.stats()[:4] == (2000, 6890, 2000, 6890) and d.stats().state == "stopped", d.stats())

def handler(batch):
    os.write(OUT, b"." * len(batch))

d = made()
try:
    d.start(handler)
except RuntimeError as error:  # no thread, or no daemon thread: nothing has changed, and it can be tried again
    expect(not isinstance(error, tempo.Error), error)
    try:
        d.start(handler)
    except RuntimeError as again:
        expect(str(again) == str(error), again)
    d.enqueue_many([b"x"] * 7)
    d.flush(0)
    handler(d.get(0))
else:
    d.enqueue_many([b"x"] * 7)
    if SHUT:
        d.shutdown(30)
        expect("tempo-" not in str(threading.enumerate()), threading.enumerate())
d._check()
"""


def interpreted(kind: Interpreters, shut: bool) -> None:
    """Make an interpreter, use tempo in it, and destroy it: what its handler had to do is done then."""
    out, into = os.pipe()
    try:
        i = kind.create()
        try:
            kind.run(i, f"ROOT, OUT, SHUT = {ROOT!r}, {into}, {shut}\n{INSIDE}")
        finally:
            kind.destroy(i)
        expect(os.read(out, 100) == b"." * 7, "the handler did not get it")
    finally:
        os.close(out)
        os.close(into)


def importable(kind: Interpreters) -> bool:
    """Whether what tempo imports can be imported there."""
    i = kind.create()
    try:
        kind.run(i, "import array, atexit, queue, threading, weakref, _bisect")
    except Exception as error:
        expect("ImportError" in str(error), error)
        return False
    finally:
        kind.destroy(i)
    return True


def each_interpreter(tried: Callable[[Interpreters], int]) -> int:
    """Do it with every kind of interpreter that can import what tempo needs."""
    kinds = [kind for kind in interpreters().values() if importable(kind)]
    if not kinds:
        raise LeftOut("what tempo imports cannot be imported in sub-interpreters of this version")
    return sum(map(tried, kinds))


@case(limit=300)
def sub_interpreters_one_after_another(scale: float) -> int:
    """tempo imported, used, shut down or not, in interpreters that are made and destroyed; the main one's goes on."""
    n = times(60, scale)

    def some(kind: Interpreters) -> int:
        for i in range(n):
            # Before 3.12 an interpreter cannot be destroyed while a thread of its own runs, whatever that does.
            interpreted(kind, shut=i % 2 == 0 or sys.version_info < (3, 12))
            goes_on(d)
        return n

    d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=1000)
    tried = each_interpreter(some)
    at_rest(d)
    return tried


@case(limit=300)
def sub_interpreters_at_the_same_time(scale: float) -> int:
    """The same in several threads at once, while the main interpreter is at work too."""
    n = times(25, scale)

    def some(kind: Interpreters) -> int:
        def several() -> None:
            for _ in range(n):
                interpreted(kind, shut=True)

        threads = [Worker(several) for _ in range(3)]
        while any(thread.is_alive() for thread in threads):
            pulled(50, None, 64, 300)
        for thread in threads:
            thread.result()
        return 3 * n

    return each_interpreter(some)


# -- Tracers, little stack, options ------------------------------------------------------------------------------------


@case(limit=300)
def traced(scale: float) -> int:
    """settrace and setprofile, also with functions that call stats and enqueue at any line inside tempo."""
    rng = dice("traced")
    inside = vars(tempo)
    tried = 0

    def day(install: Callable[[Any], None], share: float, act: str) -> None:
        census = Census()
        mine = threading.local()
        d = tempo.Dispatcher(interval=0.002, max_batch_bytes=rng.choice([None, 64, 400]), max_buffered_bytes=2000)

        def tracer(frame: Any, *_: object) -> Any:
            if frame.f_globals is not inside:
                return None
            frame.f_trace_opcodes = True
            if act != "look" and rng.random() < share:
                mine.acts = getattr(mine, "acts", 0) + 1
                if mine.acts > 200:  # a section ends when the calls that interrupt it do
                    return tracer
                if act == "stats":
                    d.stats()
                else:
                    if not hasattr(mine, "sender"):
                        mine.sender = census.sender(ordered=False)
                    mine.sender.try_one(d, rng.randrange(100), timeout=LIMIT if d._nested(d._state) else 0)
            return tracer

        def traced_thread(work: Callable[..., object], *args: object) -> None:
            install(tracer)
            try:
                work(*args)
            finally:
                install(None)

        consumers = [Worker(traced_thread, census.receiver().take_all, d) for _ in range(2)]
        producers = [Worker(traced_thread, send, census.sender(), d, 150, timeout) for timeout in (0.0, None, 0.01)]
        for worker in producers:
            worker.result()
        traced_thread(d.flush, LIMIT)
        traced_thread(d.shutdown, LIMIT)
        for worker in consumers:
            worker.result()
        census.verify(d)

    for _ in range(times(12, scale)):
        for act in ("look", "stats", "enqueue"):
            day(sys.settrace, 0.01, act)
            day(sys.setprofile, 0.1, act)
            tried += 2
    return tried


def with_little_stack(spare: int, call: Callable[[], object]) -> None:
    """Call something where the stack is good for so many calls more; for about as many where depth is not counted."""

    def descend(left: int) -> None:
        if left:
            descend(left - 1)
        else:
            call()

    depth, frame = 0, sys._getframe().f_back
    while frame is not None:
        depth += 1
        frame = frame.f_back
    limit = sys.getrecursionlimit()
    gc.disable()  # or what a collection calls complains of the little stack too
    sys.setrecursionlimit(depth + 53 + spare)
    try:
        descend(50)
    finally:
        sys.setrecursionlimit(limit)
        gc.enable()


class Shallow:
    """A dispatcher in some state, and the callers that wait in it."""

    STATES = (
        "empty", "open", "closed", "many", "full", "producer waits", "consumer waits", "task waits", "pushed",
        "shutting down",
    )  # fmt: skip

    def __init__(self, state: str) -> None:
        self.state = state
        self.census = Census()
        self.sender, self.receiver = self.census.sender(), self.census.receiver()
        self.back = self.census.receiver(back=True)
        self.waiting: list[Worker] = []
        self.taken: list[tempo.Batch] = []  # where there is little stack, and so not looked at yet
        self.taken_back: list[tempo.Batch] = []
        limit = 40 if state in ("full", "producer waits") else 1 << 16
        self.d = d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=limit, max_batch_bytes=2048)
        self.task, self.other, self.body = HandTask(d), HandTask(d), iter(d)
        if state in ("open", "closed", "shutting down"):
            self.sender.try_many(d, [5, 0, 9])
        if state == "closed":
            d.flush(0)
        if state == "many":
            self.sender.try_many(d, [10] * 700)
            for size in (0, 40, 600, 3):
                self.sender.try_one(d, size)
        if limit == 40:
            self.sender.try_one(d, 40)
        if state == "producer waits":
            self.waiting.append(Worker(self.census.sender().try_one, d, 10, None))
            wait_until(lambda: d.stats().waiting_producers)
        if state == "consumer waits":
            self.waiting.append(Worker(self.census.receiver().take_all, d))
            wait_until(lambda: d.stats().waiting_consumers)
        if state == "task waits":
            self.other.step()
        if state == "pushed":
            d.start(self.receiver.take)
            wait_until(lambda: d.stats().waiting_consumers)
        if state == "shutting down":
            self.waiting.append(Worker(d.shutdown, LIMIT))
            wait_until(lambda: d.stats().state == "shutting_down")

    def calls(self) -> dict[str, Callable[[], object]]:
        """What is tried where there is little stack."""
        d = self.d

        def mutable() -> None:
            self.sender.wrap = bytearray
            try:
                self.sender.try_one(d, 7)
            finally:
                self.sender.wrap = bytes

        return {
            "enqueue": lambda: self.sender.try_one(d, 7),
            "enqueue a mutable one": mutable,
            "enqueue a large one": lambda: self.sender.try_one(d, 5000),
            "enqueue_many": lambda: self.sender.try_many(d, [7] * 600),
            "enqueue_many of a generator": lambda: self.sender.try_many(d, [7] * 5, listed=False),
            "get": lambda: self.taken.append(d.get(0)),
            "__next__": lambda: self.taken.append(next(self.body)) if self.state in ("closed", "many") else None,
            "__anext__": self.task.step,
            "enqueue and wait": lambda: self.sender.try_one(d, 7, 0.001),
            "get and wait": lambda: self.taken.append(d.get(0.001)),
            "flush and wait": lambda: d.flush(0.001),
            "flush": lambda: d.flush(0),
            "stop": lambda: self.taken_back.extend(d.stop()),
            "stats": d.stats,
            "repr": lambda: repr(d),
            "start": lambda: d.start(self.receiver.take),
        }

    def over(self, how: str) -> None:
        """All goes on as if the call had not been, or all of it; then the end."""
        d = self.d
        self.task.close()
        if self.other.next is not None:
            self.sender.try_one(d)
            d.flush(0)
            self.other.loop.turn(False)
            expect(self.other.can_step(), "the task was not told", how)
            self.other.step()
            self.other.close()
        self.receiver.take_all(self.taken + self.task.got + self.other.got)
        self.back.take_all(self.taken_back)
        d._check()  # counts what is there
        expect(len(d._state.inbox) == 1, "left in the inbox", how)
        goes = self.sender.try_one(d) is None
        if goes:
            d.flush(0)
        if d.stats().state == "shutting_down":
            self.receiver.take_all(d)
        if goes and d.stats().waiting_consumers:
            wait_until(lambda: not d.stats().buffered, "nobody was told of a batch", how)
        if d._push is not None:
            d.flush(LIMIT)
        self.back.take_all(d.stop())
        for worker in self.waiting:
            with contextlib.suppress(tempo.Stopped):
                worker.result()
        if d._state.thread is not None:
            d._state.thread.join(LIMIT)
        refused = {item for sender in self.census.senders for item in sender.unsure}
        came = {item for receiver in self.census.receivers for item in receiver.payloads}
        expect(not refused & came, "accepted by a call that raised", how, refused & came)


@case(limit=300)
def recursion_errors(scale: float) -> int:
    """Every call in every state at every depth near the recursion limit: all of it is done, or nothing."""
    rng = dice("recursion_errors")
    tried = 0
    for state in Shallow.STATES:
        for name in Shallow("empty").calls():
            for spare in itertools.count(1):
                expect(spare < 500, "it never succeeds", state, name)
                if scale < 1 and rng.random() > max(scale, 0.2) and spare < 20:
                    continue
                world = Shallow(state)
                call = world.calls()[name]
                tried += 1
                try:
                    with_little_stack(spare, call)
                except (queue.Empty, tempo.Error, RuntimeError) as error:
                    enough = not isinstance(error, RecursionError)
                else:
                    enough = True
                world.over(f"{name}, {state}, {spare} calls before the limit")
                world.census.verify(world.d)
                if enough:
                    break
    return tried


@case(limit=120)
def stacks_dumped_meanwhile(scale: float) -> int:
    """faulthandler writes every thread's stack, asked by a signal that no Python code handles, again and again."""
    if not hasattr(faulthandler, "register"):
        raise LeftOut("faulthandler registers no signals here")
    done = threading.Event()

    def dump() -> int:
        n = 0
        while not done.wait(0.0005):
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            faulthandler.dump_traceback(sink)
            n += 1
        return n

    with open(os.devnull, "w") as sink:
        faulthandler.register(signal.SIGUSR1, sink)
        dumping = Worker(dump)
        ordinary(5 * scale)
        done.set()
        tried: int = dumping.result()
        faulthandler.unregister(signal.SIGUSR1)
    return tried


@case(limit=300)
def interpreter_options(scale: float) -> int:
    """Under -O, -OO, -X dev, -I -S, -W error and their like: the same day as ever."""
    script = "from soak.hostile import worlds; print(worlds.ordinary(float(sys.argv[1])))"
    ways: list[list[str]] = [
        ["-O"],
        ["-OO"],
        ["-I", "-S"],
        ["-E", "-s", "-B"],
        ["-bb", "-W", "error"],
        ["-X", "dev"],
        ["-X", "dev", "-O", "-I"],
        ["-X", "tracemalloc=5"],
    ]
    chosen = dice("interpreter_options").sample(ways, times(len(ways), min(1.0, max(5 * scale, 0.25))))
    tried = sum(int(in_child(script, *way, arguments=(str(scale),)).split()[-1]) for way in chosen)
    if scale >= 0.05:
        tried += int(in_child(script, arguments=(str(scale),), PYTHONMALLOC="debug").split()[-1])
    return tried


@case(limit=120)
def contexts(scale: float) -> int:
    """contextvars: each caller and handler sees its own, and none is kept alive by a dispatcher."""

    class Value:
        pass

    here: contextvars.ContextVar[Any] = contextvars.ContextVar("here", default=None)

    def within(work: Callable[..., object], *args: Any) -> weakref.ref[Value]:
        value = Value()

        def run() -> None:
            here.set(value)
            work(*args)
            expect(here.get() is value, "another context")

        contextvars.copy_context().run(run)
        return weakref.ref(value)

    async def waiting(d: tempo.Dispatcher, receiver: Receiver) -> None:
        value = Value()
        left.append(weakref.ref(value))
        here.set(value)
        async for batch in d:
            expect(here.get() is value, "another context")
            receiver.take(batch)

    def looped(d: tempo.Dispatcher, sender: Sender, receiver: Receiver) -> None:
        async def main() -> None:
            tasks = [asyncio.ensure_future(waiting(d, receiver)) for _ in range(3)]
            for n in range(2):
                while d.stats().waiting_consumers < 3:
                    await asyncio.sleep(0)
                if n == 0:
                    sender.try_one(d)
                    d.flush(0)
                    while d.stats().buffered:
                        await asyncio.sleep(0)
            await end(tasks)

        run_loop(main())

    n = times(300, scale)
    for _ in range(n):
        census = Census()
        sender, receiver = census.sender(), census.receiver()
        d = tempo.Dispatcher(interval=LONG, max_buffered_bytes=1000)
        left: list[weakref.ref[Value]] = []
        left.append(within(sender.try_one, d))
        left.append(within(d.flush, 0))
        left.append(within(lambda d=d, r=receiver: r.take(d.get())))
        left.append(within(looped, d, sender, census.receiver()))
        seen: list[object] = []
        handled = census.receiver()

        def handler(batch: tempo.Batch, seen: list[object] = seen, handled: Receiver = handled) -> None:
            handled.take(batch)
            seen.append(here.get())
            here.set(batch)  # the next call sees it, as threads go

        d.start(handler)
        left.append(within(sender.try_many, d, [1, 2, 3]))
        expect(d.flush(LIMIT))
        expect(seen == [None], "the handler saw a producer's context", seen)
        for _ in range(3):  # more than one is for PyPy
            gc.collect()
        expect(not [ref for ref in left if ref() is not None], "a context is kept alive")
        d.shutdown(LIMIT)
        census.verify(d)
    return n
