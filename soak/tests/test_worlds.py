# SPDX-License-Identifier: MIT
"""tempo in the worlds where its users meet it: forks, servers, exits, signals, finalizers, interrupts, event loops.

Everything hostile runs in a child process with a time limit, by the public API alone. A child is either a short program
or a function of this module (`in_child`); it fails by an exception, a hang, or a word on stderr. gunicorn and Celery's
prefork pool are in test_recipes.py; what one call at a time can show is in test_tempo.py.

    python3 -m pytest soak/tests/test_worlds.py              # about a minute and a half
    REPEAT=20 python3 -m pytest soak/tests/test_worlds.py    # twenty times the rounds
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import itertools
import multiprocessing
import os
import queue
import random
import signal
import sys
import threading
import time
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import tempo
from soak.tests import mixed
from soak.tests.helpers import LIMIT, REPEAT, ROOT, Child, Ended, Worker, ask, find_uwsgi, served, wait_until

RATE = 3000.0
"""Signals a second."""

pytestmark = pytest.mark.slow


def rounds(n: int) -> int:
    return max(1, round(n * REPEAT))


# Children -------------------------------------------------------------------------------------------------------------

GOOD = Ended(0, "", "")
PYTHON = (sys.executable, "-X", "faulthandler")


def program(folder: Path, source: str, *arguments: object) -> Child:
    """Start a Python program of these lines."""
    path = folder / "program.py"
    path.write_text(source, encoding="utf-8")
    return Child(folder, *PYTHON, str(path), *map(str, arguments))


def in_child(folder: Path, scenario: Callable[..., object], *arguments: object) -> None:
    """Run a function of this module in a child, which must end well and say nothing."""
    call = f"import soak.tests.test_worlds as w; w.{scenario.__name__}(*{arguments!r})"
    with Child(folder, *PYTHON, "-c", call) as child:
        ended = child.end(limit=2 * LIMIT)
        assert ended == GOOD, ended.err[-3000:]


# The census -----------------------------------------------------------------------------------------------------------


class Sender:
    """Makes payloads that nobody else makes; its books say which were accepted.

    A payload whose call a foreign exception ended is `unsure`: it may have been accepted.
    """

    def __init__(self, name: int, ordered: bool = True) -> None:
        self.name = name
        self.ordered = ordered  # one thread makes its calls, one after the other
        self.numbers = itertools.count()
        self.accepted: list[bytes] = []
        self.unsure: set[bytes] = set()
        self.refused = 0

    def make(self, size: int = 0) -> bytes:
        return b"%d.%d." % (self.name, next(self.numbers)) + b"." * size

    @contextlib.contextmanager
    def offering(self, items: list[bytes]) -> Iterator[None]:
        """Put on record what comes of a call that offers these."""
        self.unsure.update(items)
        try:
            yield
            self.accepted += items
        except tempo.Error as error:
            self.accepted += items[: getattr(error, "accepted", 0)]
            self.refused += 1
        self.unsure.difference_update(items)

    def send(self, d: tempo.Dispatcher, size: int = 0, timeout: float | None = 0.0) -> None:
        item = self.make(size)
        with self.offering([item]):
            d.enqueue(item, timeout)

    def send_many(self, d: tempo.Dispatcher, n: int, timeout: float | None = 0.0) -> None:
        items = [self.make() for _ in range(n)]
        with self.offering(items):
            d.enqueue_many(items, timeout)

    async def asend(self, d: tempo.Dispatcher, timeout: float | None = None) -> None:
        item = self.make()
        with self.offering([item]):
            await d.aenqueue(item, timeout)


class Receiver:
    """Keeps what one consumer took, or what was handed back."""

    def __init__(self, back: bool = False) -> None:
        self.back = back
        self.batches: list[list[bytes]] = []  # one append a batch, so that an interrupt leaves nothing half noted

    def take(self, batch: tempo.Batch) -> None:
        items = batch.tolist()
        assert items and b"".join(items) == bytes(batch.data), "a batch at odds with itself"
        self.batches.append(items)

    def take_all(self, batches: Any) -> None:
        for batch in batches:
            self.take(batch)

    def payloads(self) -> list[bytes]:
        return [item for batch in self.batches for item in batch]


class Census:
    """All who send to one dispatcher and all who receive from it."""

    def __init__(self) -> None:
        self.senders: list[Sender] = []
        self.receivers: list[Receiver] = []

    def sender(self, ordered: bool = True) -> Sender:
        self.senders.append(Sender(len(self.senders), ordered))
        return self.senders[-1]

    def receiver(self, back: bool = False) -> Receiver:
        self.receivers.append(Receiver(back))
        return self.receivers[-1]

    def verify(self, d: tempo.Dispatcher, interrupted: int = 0) -> None:
        """Check that what was accepted came once, in order, and nothing more, and that stats() says so.

        All threads have ended, and all was taken out. interrupted: how many calls that take a batch were ended by an
        exception; each may have lost one on its way out, and stats() must then say so.
        """
        s = balanced(d)
        assert (s.buffered, s.in_flight, s.waiting_producers, s.waiting_consumers) == (0, 0, 0, 0), s
        accepted = {item for sender in self.senders for item in sender.accepted}
        unsure = {item for sender in self.senders for item in sender.unsure} - accepted
        came = Counter(item for receiver in self.receivers for item in receiver.payloads())
        assert max(came.values(), default=1) == 1, f"repeated: {came.most_common(3)}"
        assert came.keys() <= accepted | unsure, f"refused, and delivered: {list(came.keys() - accepted - unsure)[:3]}"
        back = sum(len(receiver.payloads()) for receiver in self.receivers if receiver.back)
        assert back == s.discarded, f"{back} were handed back: {s}"
        batches = s.batches - sum(len(receiver.batches) for receiver in self.receivers if not receiver.back)
        assert 0 <= batches <= interrupted, f"{batches} batches lost in {interrupted} interrupted calls: {s}"
        gone = s.delivered - (len(came) - back)  # payloads of these batches
        assert gone >= batches and (gone > 0) == (batches > 0), f"{gone} payloads in {batches} lost batches: {s}"
        lost = accepted - came.keys()
        assert len(lost) <= gone, f"lost: {len(lost)} of {len(accepted)}, such as {sorted(lost)[:3]}; {s}"
        assert len(accepted) <= s.accepted <= len(accepted) + len(unsure), f"{len(accepted)} were accepted: {s}"
        refused = sum(sender.refused for sender in self.senders)
        assert refused <= s.rejected <= refused + len(unsure), f"{refused} were refused: {s}"
        for receiver in self.receivers:
            last: dict[int, int] = {}
            for item in receiver.payloads():
                name, number = map(int, item.split(b".", 2)[:2])
                if self.senders[name].ordered:
                    assert number > last.get(name, -1), f"out of order: {item!r}"
                    last[name] = number


def balanced(d: tempo.Dispatcher) -> tempo.Stats:
    """Return the stats, which balance in payloads and in bytes."""
    s = d.stats()
    assert s.accepted == s.delivered + s.in_flight + s.buffered + s.discarded, s
    total = s.delivered_bytes + s.in_flight_bytes + s.buffered_bytes + s.discarded_bytes
    assert s.accepted_bytes == total and s.buffered_bytes <= s.peak_buffered_bytes, s
    return s


class Load:
    """A dispatcher, threads that enqueue, threads that take, and the census of all of it."""

    def __init__(self, seed: object, producers: int = 1, consumers: int = 1, buffer: int = 2000) -> None:
        sys.setswitchinterval(0.0005)  # more turns, and so more orders of events
        self.chance = random.Random(str(seed))
        self.d = tempo.Dispatcher(interval=0.002, max_buffered_bytes=buffer, max_batch_bytes=buffer // 4)
        self.census = Census()
        self.halt = threading.Event()
        self.receivers = [self.census.receiver() for _ in range(consumers)]
        self.producers = [Worker(self.produce, self.census.sender()) for _ in range(producers)]
        self.consumers = [Worker(receiver.take_all, self.d) for receiver in self.receivers]

    def produce(self, sender: Sender) -> None:
        while not self.halt.is_set():
            if self.chance.random() < 0.8:
                sender.send(self.d, self.chance.choice((0, 10, 50, 300)), self.chance.choice((0.0, 0.001, 0.02)))
            else:
                sender.send_many(self.d, self.chance.choice((1, 5, 100)), self.chance.choice((0.0, 0.02)))
            if self.chance.random() < 0.3:
                time.sleep(0.0003)

    def end(self, interrupted: int = 0) -> None:
        """Drain, join all threads, and verify."""
        self.halt.set()
        for producer in self.producers:
            producer.result()
        closer = Worker(self.d.shutdown, LIMIT)
        self.census.receiver().take_all(self.d)
        for worker in (closer, *self.consumers):
            worker.result()
        self.census.verify(self.d, interrupted)


# Signals, finalizers and interrupts, in every call --------------------------------------------------------------------


class Calls:
    """Every public call, each made once by the method of its name, for a load's main thread."""

    def __init__(self, load: Load) -> None:
        self.load, self.d = load, load.d
        self.sender = load.census.sender()
        self.receiver = load.census.receiver()
        self.iterator = iter(self.d)

    def enqueue(self) -> None:
        self.sender.send(self.d, 20)

    def enqueue_waiting(self) -> None:
        self.sender.send(self.d, 300, 0.01)

    def enqueue_many(self) -> None:
        self.sender.send_many(self.d, 30, 0.01)

    def aenqueue(self) -> None:
        asyncio.run(self.sender.asend(self.d, 0.01))

    def get(self) -> None:
        with contextlib.suppress(queue.Empty):
            self.receiver.take(self.d.get(0.002))

    def iterate(self) -> None:
        self.receiver.take(next(self.iterator))

    def aiterate(self) -> None:
        async def one() -> None:
            self.receiver.take(await anext(aiter(self.d)))

        asyncio.run(one())

    def flush(self) -> None:
        self.d.flush(0.02)

    def stats(self) -> None:
        balanced(self.d)

    def lifetime(self) -> None:
        """Start, flush, shutdown and stop, on a dispatcher that lives for this call."""
        d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=1000)
        try:
            d.start(lambda batch: None)
            d.enqueue(b"one")
            d.flush(1)
            d.shutdown(5)
        finally:
            d.stop()


CALLS = [name for name in vars(Calls) if not name.startswith("_")]
TAKE = ("get", "iterate")
ASYNC = ("aenqueue", "aiterate")  # asyncio itself loses a callback when an interrupt comes as it is scheduled


@contextlib.contextmanager
def storm(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Have a signal handler called RATE times a second, in the main thread."""
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1 / RATE, 1 / RATE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def within(frame: FrameType | None, test: Callable[[FrameType], bool]) -> bool:
    """Whether the test holds for a frame or one that called it."""
    while frame is not None and not test(frame):
        frame = frame.f_back
    return frame is not None


def inside_tempo(frame: FrameType | None) -> bool:
    return within(frame, lambda frame: frame.f_globals is vars(tempo))


def starts_thread(frame: FrameType | None) -> bool:
    """Whether a thread is being started: in that, CPython may turn an interrupt into a RuntimeError."""
    return within(frame, lambda frame: frame.f_code is threading.Thread.start.__code__)


def signals(call: str, seconds: float) -> None:
    """A signal handler enqueues and asks for stats, whatever it interrupts."""
    load = Load(call)
    calls = Calls(load)
    nested = load.census.sender()
    inside = 0
    busy = False

    def handler(_: int, frame: FrameType | None) -> None:
        nonlocal inside, busy
        if busy:  # a signal came during the handler
            return
        busy = True
        inside += inside_tempo(frame)
        nested.send(load.d, load.chance.choice((0, 0, 300)), load.chance.choice((0.0, 0.001, None)))
        if load.chance.random() < 0.1:
            nested.send_many(load.d, 3)
            load.d.stats()
        busy = False

    end = time.monotonic() + seconds
    with storm(handler):
        while time.monotonic() < end or not inside:
            getattr(calls, call)()
    load.end()
    assert nested.accepted, "the signal handler's payloads were never accepted"


@pytest.mark.parametrize("call", CALLS)
def test_signal_handlers_may_enqueue_whatever_call_they_interrupt(call: str, tmp_path: Path) -> None:
    in_child(tmp_path, signals, call, REPEAT)


def finalizers(call: str, n: int) -> None:
    """Finalizers enqueue, and the collector runs at nearly every allocation, inside tempo too."""
    load = Load(call)
    calls = Calls(load)
    nested = load.census.sender(ordered=False)
    left = 0

    class Garbage:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            nonlocal left
            nested.send(load.d)
            if left > 0:
                left -= 1
                Garbage()

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    for _ in range(n):
        left = 50
        Garbage()
        getattr(calls, call)()
    gc.set_threshold(*thresholds)
    gc.collect()
    load.end()
    assert nested.accepted, "the finalizers' payloads were never accepted"


@pytest.mark.parametrize("call", CALLS)
def test_finalizers_may_enqueue_at_any_allocation_within_any_call(call: str, tmp_path: Path) -> None:
    in_child(tmp_path, finalizers, call, rounds(200))


def interrupts(call: str, seconds: float) -> None:
    """KeyboardInterrupt comes out of any point of a call; what was accepted before and after comes out once."""
    gc.disable()  # an exception in a weakref callback, which the collector calls, is printed and dropped
    load = Load(call, consumers=1 if call in TAKE else 2)
    calls = Calls(load)
    armed = False
    interrupted = 0

    def handler(_: int, frame: FrameType | None) -> None:
        nonlocal armed
        if armed and inside_tempo(frame) and not starts_thread(frame) and load.chance.random() < 0.5:
            armed = False
            raise KeyboardInterrupt

    end = time.monotonic() + seconds
    with storm(handler):
        while time.monotonic() < end or not interrupted:
            armed = True
            try:
                getattr(calls, call)()
            except KeyboardInterrupt:
                interrupted += 1
            armed = False
    gc.enable()
    load.end(interrupted if call in TAKE else 0)


@pytest.mark.parametrize("call", [call for call in CALLS if call not in ASYNC])
def test_keyboard_interrupt_in_any_call_loses_nothing_that_was_accepted(call: str, tmp_path: Path) -> None:
    in_child(tmp_path, interrupts, call, REPEAT)


# Forks ----------------------------------------------------------------------------------------------------------------


def end_child(work: Callable[[], object]) -> None:
    """In a forked child: do the work, and end with exit code 0, or say on stderr what went wrong."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        work()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def fork(work: Callable[[], object]) -> int:
    """Fork a child that does the work."""
    pid = os.fork()
    if pid == 0:
        end_child(work)
    return pid


def reap(pid: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "a forked child failed, or hung"


class Mailbox:
    """A handler that keeps what it gets by process."""

    def __init__(self) -> None:
        self.by_process: dict[int, Receiver] = {}

    def __call__(self, batch: tempo.Batch) -> None:
        self.by_process.setdefault(os.getpid(), Receiver()).take(batch)

    def mine(self) -> list[bytes]:
        return self.by_process.get(os.getpid(), Receiver()).payloads()


def use_in_child(d: tempo.Dispatcher, mailbox: Mailbox | None) -> None:
    """Check that a forked child has a running, empty dispatcher, and that it delivers the child's payloads alone."""
    s = balanced(d)
    assert (s.accepted, s.buffered, s.in_flight, s.waiting_producers, s.state) == (0, 0, 0, 0, "running"), s
    mine = [b"child %d" % n for n in range(5)]
    for item in mine:
        d.enqueue(item, timeout=10)
    if mailbox is None:
        taken = Receiver()
        d.flush(0)
        while sum(map(len, taken.batches)) < len(mine):
            taken.take(d.get(10))
        assert taken.payloads() == mine, taken.payloads()
    else:
        wait_until(lambda: len(mailbox.mine()) == len(mine), "the child's delivery")
        assert mailbox.mine() == mine, mailbox.mine()
    d.shutdown(10)  # which does not wait in a handler
    wait_until(lambda: d.stats().state == "stopped", "the end of the drain")
    assert d.stats().delivered == len(mine), d.stats()


def forks_under_load(push: bool, n: int) -> None:
    """Eight threads fork while others enqueue and take."""
    load = Load(push, producers=3, consumers=0 if push else 2, buffer=20_000)
    mailbox = Mailbox() if push else None
    if mailbox is not None:
        load.d.start(mailbox)

    def forks() -> None:
        for _ in range(n):
            reap(fork(lambda: use_in_child(load.d, mailbox)))

    for forker in [Worker(forks) for _ in range(8)]:
        forker.result()
    if mailbox is None:
        load.end()
    else:
        load.halt.set()
        for producer in load.producers:
            producer.result()
        load.d.shutdown(LIMIT)
        load.census.receivers += mailbox.by_process.values()
        load.census.verify(load.d)


@pytest.mark.parametrize("push", [False, True])
def test_forks_of_eight_threads_under_load_give_fresh_dispatchers(push: bool, tmp_path: Path) -> None:
    in_child(tmp_path, forks_under_load, push, rounds(8))


def forks_in_a_handler(n: int) -> None:
    """A batch handler forks; the child goes on with the dispatcher that called it."""
    d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=1000)
    mailbox = Mailbox()
    parent = os.getpid()

    def handler(batch: tempo.Batch) -> None:
        mailbox(batch)
        if os.getpid() == parent:
            reap(fork(lambda: use_in_child(d, mailbox)))

    d.start(handler)
    for i in range(n):
        d.enqueue(b"%d" % i)
        assert d.flush(LIMIT)
    d.shutdown(LIMIT)
    assert mailbox.mine() == [b"%d" % i for i in range(n)]


def test_fork_in_a_handler_gives_the_child_a_working_dispatcher(tmp_path: Path) -> None:
    in_child(tmp_path, forks_in_a_handler, rounds(30))


# Worlds that fork for us: each process writes what it delivers into a file of its own ---------------------------------

EVENTS = """
import os, sys, threading, time, tempo

def deliver(batch):
    with open(f"{os.getpid()}.events", "ab") as file:
        file.write(b"".join(item + b"\\n" for item in batch.tolist()))

d = tempo.Dispatcher(interval=0.05, max_buffered_bytes=tempo.MiB)
d.start(deliver)
"""


def delivered(folder: Path) -> dict[str, list[str]]:
    """Return by process what was delivered."""
    return {path.stem: path.read_text("utf-8").split() for path in folder.glob("*.events")}


MULTIPROCESSING = """
import multiprocessing

def work(name):
    for i in range(100):
        d.enqueue(b"%d.%d" % (name, i), timeout=10)
    assert d.flush(20)
    return os.getpid()

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    d.enqueue(b"parent", timeout=10)
    processes = [context.Process(target=work, args=(name,)) for name in range(2)]
    for process in processes:
        process.start()
    with context.Pool(2) as pool:
        pids = pool.map(work, range(2, 8), chunksize=1)
        pool.close()
        pool.join()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0, process.exitcode
    assert os.getpid() not in pids
"""


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_multiprocessing_delivers_in_every_process(method: str, tmp_path: Path) -> None:
    with program(tmp_path, EVENTS + MULTIPROCESSING, method) as child:
        assert child.end() == GOOD
        found = delivered(tmp_path)
        came = Counter(itertools.chain(*found.values()))
        assert came == Counter({"parent": 1, **{f"{name}.{i}": 1 for name in range(8) for i in range(100)}})
        assert found[str(child.process.pid)] == ["parent"]


WSGI = """
time.sleep(0.1)  # the handler's thread waits then, and does not ask for the GIL

def app(environ, start_response):
    d.enqueue(environ["PATH_INFO"][1:].encode(), timeout=10)
    answer = b"%d" % os.getpid()
    start_response("202 Accepted", [("Content-Length", str(len(answer)))])
    return [answer]
"""


def test_uwsgi_delivers_what_each_worker_accepted(tmp_path: Path) -> None:
    """By default uWSGI forks without Python's hooks; the flags that make it run them are in the recipe.

    Then the master must be quiet: a fork while another thread asks for the GIL hangs, in CPython itself.
    """
    (tmp_path / "application.py").write_text(EVENTS + WSGI, encoding="utf-8")
    options = "--http-socket=fd://{fd} --master --processes=2 --die-on-term --module=application:app --disable-logging"
    answered: dict[str, str] = {}  # which process answered each request

    def client(number: int) -> None:
        for i in range(number, rounds(400), 4):
            status, answered[f"e{i}"] = ask(port, f"/e{i}")
            assert status == 202

    with served(tmp_path, find_uwsgi(), *options.split()) as (server, port):
        for worker in [Worker(client, number) for number in range(4)]:
            worker.result()
        # Without --enable-threads its workers run no exit hook.
        wait_until(lambda: answered.keys() <= {*itertools.chain(*delivered(tmp_path).values())}, "every event")
        ended = server.end(signal.SIGTERM)
        log = ended.out + ended.err
        found = delivered(tmp_path)
        came = Counter(itertools.chain(*found.values()))
        assert came == Counter(dict.fromkeys(answered, 1)), (len(came), len(answered), log[-3000:])
        wrong = [event for pid, events in found.items() for event in events if answered[event] != pid]
        assert not wrong and "Traceback" not in log, (wrong[:5], log[-3000:])


# Exits of the interpreter ---------------------------------------------------------------------------------------------

EXIT = """
import atexit, sys, threading, time, tempo

accepted = open("accepted", "ab", buffering=0)
came = open("delivered", "ab", buffering=0)

def handler(batch):
    time.sleep(0.005)
    came.write(b"".join(item + b"\\n" for item in batch.tolist()))

def late():
    time.sleep(0.1)
    for i in range(50):
        try:
            d.enqueue(b"late %d" % i)
        except tempo.Closed:
            return
        accepted.write(b"late %d\\n" % i)

d = tempo.Dispatcher(interval=60, max_buffered_bytes=10_000, max_batch_items=10)
d.start(handler, exit_timeout=30)
for i in range(100):
    d.enqueue(b"%d" % i)
    accepted.write(b"%d\\n" % i)
if sys.argv[1] == "atexit":
    atexit.register(late)
else:
    threading.Thread(target=late).start()
"""


@pytest.mark.parametrize("who", ["atexit", "a thread"])
def test_exit_delivers_what_is_accepted_after_the_end_of_the_program(who: str, tmp_path: Path) -> None:
    with program(tmp_path, EXIT, who) as child:
        assert child.end() == GOOD
    accepted, came = [(tmp_path / name).read_text("utf-8").splitlines() for name in ("accepted", "delivered")]
    assert sorted(came) == sorted(accepted) and len(accepted) >= 100, (len(came), len(accepted))


# gevent and eventlet --------------------------------------------------------------------------------------------------

GREEN = """
import sys

world, when = sys.argv[1:]
if when == "after":
    import tempo
if world == "gevent":
    import gevent.monkey
    gevent.monkey.patch_all()
    from gevent import spawn
else:
    import warnings
    warnings.simplefilter("ignore")  # eventlet calls itself deprecated
    import eventlet
    eventlet.monkey_patch()
    from eventlet import spawn
import os, queue, threading, time
import tempo

ticks = 0

def tick():
    global ticks
    while True:
        time.sleep(0.001)
        ticks += 1

spawn(tick)
came = []

def handler(batch):
    time.sleep(0.002)
    came.extend(batch.tolist())

def produce(d, name):
    for i in range(300):
        d.enqueue(b"%d.%d" % (name, i), timeout=None)

def run(push):
    came.clear()
    d = tempo.Dispatcher(interval=0.005, max_buffered_bytes=200, max_batch_items=20)
    if push:
        d.start(handler)
        consumers = []
    else:
        consumers = [threading.Thread(target=lambda: [handler(batch) for batch in d]) for _ in range(2)]
    producers = [threading.Thread(target=produce, args=(d, name)) for name in range(4)]
    for thread in consumers + producers:
        thread.start()
    before = ticks
    for thread in producers:
        thread.join(30)
    assert ticks > before, "a wait blocks all greenlets"
    d.shutdown(30)
    for thread in consumers:
        thread.join(30)
    assert sorted(came) == sorted(b"%d.%d" % (name, i) for name in range(4) for i in range(300)), len(came)
    assert d.stats().accepted == d.stats().delivered == 1200, d.stats()

run(True)
run(False)

d = tempo.Dispatcher(interval=60, max_buffered_bytes=10)
d.enqueue(b"0123456789")
waits = spawn(d.enqueue, b"killed", None)
while not d.stats().waiting_producers:
    time.sleep(0.001)
waits.kill()
while d.stats().waiting_producers:
    time.sleep(0.001)
later = threading.Thread(target=d.enqueue, args=(b"later",), kwargs={"timeout": 10})
later.start()
assert d.get(10).tolist() == [b"0123456789"]
later.join(30)
d.flush(0)
assert d.get(10).tolist() == [b"later"]
try:
    d.get(0.01)
except queue.Empty:
    pass

at_exit = tempo.Dispatcher(interval=60, max_buffered_bytes=1000)
at_exit.start(lambda batch: os.write(1, batch.data))
at_exit.enqueue(b"at exit")
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("world", ["gevent", "eventlet"])
def test_green_threads_patched_before_or_after_the_import(world: str, when: str, tmp_path: Path) -> None:
    pytest.importorskip(world)
    with program(tmp_path, GREEN, world, when) as child:
        ended = child.end()
    assert ended == Ended(0, "at exit", ""), ended.err[-3000:]


# asyncio --------------------------------------------------------------------------------------------------------------


def cancellations(n: int) -> None:
    """Tasks that wait for room or for a batch are cancelled at random; what was accepted comes out once."""
    chance = random.Random("cancellations")
    d = tempo.Dispatcher(interval=0.002, max_buffered_bytes=300, max_batch_bytes=60)
    census = Census()

    async def send(sender: Sender) -> None:
        for _ in range(20):
            with contextlib.suppress(asyncio.CancelledError, asyncio.TimeoutError):
                await asyncio.wait_for(sender.asend(d), chance.choice((0.0, 0.001, 0.02, 10)))

    async def receive(receiver: Receiver) -> None:
        batches = aiter(d)
        while True:
            try:
                receiver.take(await asyncio.wait_for(anext(batches), chance.choice((0.0, 0.0005, 0.01))))
            except StopAsyncIteration:
                return
            except asyncio.TimeoutError:
                pass

    async def main() -> None:
        consumers = [asyncio.create_task(receive(census.receiver())) for _ in range(2)]
        for _ in range(n):
            senders = [asyncio.create_task(send(census.sender())) for _ in range(10)]
            for _ in range(10):
                await asyncio.sleep(0.001)
                chance.choice(senders).cancel()
            await asyncio.gather(*senders, return_exceptions=True)
            assert await d.aflush(LIMIT)
        await d.ashutdown(LIMIT)
        await asyncio.gather(*consumers)

    asyncio.run(main())
    census.verify(d)


def test_asyncio_cancellations_lose_nothing(tmp_path: Path) -> None:
    in_child(tmp_path, cancellations, rounds(20))


# All calls, in threads and loops --------------------------------------------------------------------------------------


def test_all_calls_mixed_lose_repeat_and_reorder_nothing() -> None:
    chance = random.Random()
    for _ in range(rounds(5)):
        mixed.play(chance)


def test_flushes_in_a_loop_let_producers_and_consumers_come_to_the_end() -> None:
    assert set(mixed.longest_waits(rounds(1), flushers=2)) == {"producer", "consumer", "flusher"}


# Sub-interpreters -----------------------------------------------------------------------------------------------------

INSIDE = """
import sys
sys.path.insert(0, ROOT)
import tempo
d = tempo.Dispatcher(interval=60, max_buffered_bytes=1000, max_batch_items=10)
assert d.enqueue_many([b"%d" % i for i in range(100)]) == 100
came = []
for _ in range(10):
    came += d.get(10).tolist()
assert came == [b"%d" % i for i in range(100)], came
d.shutdown(10)
d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=1000)
try:
    d.start(came.append)
except RuntimeError as error:
    assert "pull mode" in str(error), error
else:
    d.enqueue(b"pushed")
    assert d.flush(10) and came[-1].tolist() == [b"pushed"]
    d.shutdown(10)
"""


def sub_interpreter(kind: str, n: int) -> None:
    low: Any = importlib.import_module("_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters")
    for _ in range(n):
        if sys.version_info >= (3, 13):
            interpreter = low.create(kind)
            failure = low.exec(interpreter, INSIDE.replace("ROOT", repr(str(ROOT))))
            assert failure is None, failure.formatted
        else:
            interpreter = low.create(isolated=kind == "isolated")
            low.run_string(interpreter, INSIDE.replace("ROOT", repr(str(ROOT))))
        low.destroy(interpreter)


@pytest.mark.skipif(
    sys.version_info < (3, 12) or sys.implementation.name != "cpython", reason="before 3.12 these share their state"
)
@pytest.mark.parametrize("kind", ["isolated", "legacy"])
def test_sub_interpreters_have_pull_mode_and_push_mode_where_threads_are_allowed(kind: str, tmp_path: Path) -> None:
    in_child(tmp_path, sub_interpreter, kind, rounds(3))


# Dispatchers that are dropped -----------------------------------------------------------------------------------------


def dropped(push: bool, n: int) -> None:
    """Dispatchers are made, used and dropped: no memory and no thread stays."""

    def once() -> weakref.ref[tempo.Dispatcher]:
        d = tempo.Dispatcher(interval=60, max_buffered_bytes=10_000)
        if push:
            d.start(lambda batch: None)
        d.enqueue_many([b"x" * 50] * 100)
        if push:
            d.shutdown(LIMIT)
        else:
            d.flush(0)
            assert len(d.get(0)) == 100
        return weakref.ref(d)

    for _ in range(50):
        once()
    threads = threading.active_count()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    alive = [ref for ref in [once() for _ in range(n)] if ref() is not None]
    gc.collect()
    assert not any(ref() for ref in alive), "a dropped dispatcher stays"
    del alive
    grown = tracemalloc.get_traced_memory()[0] - before
    assert grown < 50_000, f"{grown} bytes stay of {n} dispatchers"
    assert threading.active_count() <= threads


@pytest.mark.parametrize("push, n", [(False, 5000), (True, 500)])
def test_dropped_dispatchers_leave_no_memory_and_no_thread(push: bool, n: int, tmp_path: Path) -> None:
    in_child(tmp_path, dropped, push, rounds(n))
