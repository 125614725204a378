# SPDX-License-Identifier: MIT
"""Fork and exit: children under load, multiprocessing, gunicorn, every way out of the interpreter.

From 3.12 on, Python warns (DeprecationWarning) of a fork in a process that has threads. That is what is tried here, so
this one warning is filtered out; all else that appears on stderr fails the case.
"""

from __future__ import annotations

import contextlib
import faulthandler
import http.client
import importlib.util
import json
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any, NamedTuple

import tempo
from soak.hostile import LeftOut, case, times
from soak.hostile.checks import LIMIT, Census, Receiver, Sender, Worker, dice, drained, expect, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
LONG_LIMIT = 60
"""Whole seconds that a child has for what takes milliseconds, on a busy machine."""
AT_ONCE = 3
"""How many programs run at the same time."""


# Forks made here


def can_fork() -> None:
    """Leave the case out where there is no fork."""
    if not hasattr(os, "fork"):
        raise LeftOut("there is no fork here")
    warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)


def fork(work: Callable[[], object]) -> int:
    """Fork; the child does the work and ends, with 0 when it was done. Returns the child's pid."""
    pid = os.fork()
    if pid == 0:
        end_child(work)
    return pid


def limit_child() -> None:
    """In a child: should it hang, it shows where it stands, and dies of its alarm."""
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(LONG_LIMIT)


def end_child(work: Callable[[], object]) -> None:
    """In a child: do the work, and end."""
    code = 1
    try:
        limit_child()
        work()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def reap(pid: int) -> None:
    """Wait for a child; fail when it did not end well."""
    status = os.waitpid(pid, 0)[1]
    expect(status == 0, f"a child ended with status {status}")


def expect_fresh(d: tempo.Dispatcher) -> None:
    """In a child: the dispatcher is empty, and nothing has ever happened to it."""
    stats = d.stats()
    expect(not any(stats[:-1]) and stats.state == "running", stats)


def live(d: tempo.Dispatcher, seed: float, mailbox: Mailbox | None = None) -> None:
    """In a child: enqueue in all ways, drain, shut down, and see that it adds up.

    mailbox: where the handler of a dispatcher that was started puts what it gets.
    """
    rng = random.Random(seed)
    census = Census()
    sender, receiver = census.sender(), census.receiver()
    if mailbox is not None:
        mailbox.receiver = receiver
    for _ in range(rng.randrange(1, 20)):
        expect(sender.try_one(d, rng.randrange(100), rng.choice([0.0, LIMIT])) is None, "no room in a child")
    expect(sender.try_many(d, [rng.randrange(40) for _ in range(rng.randrange(100))]) is None, "no room in a child")
    d._check()
    if mailbox is None and rng.random() < 0.5:
        receiver.take_all(drained(d))
        expect(len(receiver.payloads) == len(sender.accepted), "not drained")
    consumer = Worker(receiver.take_all, d) if mailbox is None else None
    expect(sender.try_one(d, 10, LIMIT) is None, "no room in a child")
    Worker(d.shutdown, LIMIT).result()
    if consumer is not None:
        consumer.result()
    census.verify(d)


def live_afresh(d: tempo.Dispatcher, seed: float, mailbox: Mailbox | None) -> None:
    """In a child: nothing is there, and then live."""
    expect_fresh(d)
    live(d, seed, mailbox)


class Mailbox:
    """The handler of a dispatcher in push mode: keeps what it gets, apart from what a forked child gets."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver

    def __call__(self, batch: tempo.Batch) -> None:
        self.receiver.take(batch)


def produce(d: tempo.Dispatcher, sender: Sender, over: threading.Event, seed: float) -> None:
    """Enqueue in all ways until it is over."""
    rng = random.Random(seed)
    while not over.is_set():
        way = rng.randrange(16)
        if way == 0:
            sender.try_many(d, [rng.randrange(200) for _ in range(rng.randrange(50))], LIMIT)
        elif way == 1:
            sender.try_one(d, rng.randrange(200))
        else:
            sender.try_one(d, rng.randrange(200), LIMIT)


def consume(d: tempo.Dispatcher, receiver: Receiver) -> None:
    """Take batches until there are no more; with a pause after each, so that the buffer is full."""
    for batch in d:
        receiver.take(batch)
        time.sleep(0.002)


def fork_often(n: int, seed: float, child: Callable[[float], object]) -> None:
    """Fork n times at random moments, and wait for each child."""
    rng = random.Random(seed)
    for _ in range(n):
        time.sleep(0.002 * rng.random())
        number = rng.random()
        reap(fork(partial(child, number)))


@case(limit=300)
def forks_under_load(scale: float) -> int:
    """Eight producers and two consumers, or a handler; one or three threads fork: both sides lose nothing."""
    can_fork()
    rng = dice("forks_under_load")
    n, done, number = times(1000, scale), 0, 0
    while done < n:
        share = min(25, n - done)
        forks_in_one_round(share, 3 if number & 2 else 1, bool(number & 1), rng)
        done += share
        number += 1
    return done


def forks_in_one_round(n: int, forkers: int, push: bool, rng: random.Random) -> None:
    """Fork n times, under load."""
    limit = rng.choice([2 * tempo.KiB, 64 * tempo.KiB, 256 * tempo.KiB])
    batch = rng.choice([None, 1000, 8 * tempo.KiB])
    d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=max(limit, 8 * tempo.KiB), max_batch_bytes=batch)
    idle = tempo.Dispatcher(interval=60, max_buffered_bytes=8 * tempo.KiB)
    idle.enqueue(b"the parent's")
    census = Census()
    over = threading.Event()
    producers = [Worker(produce, d, census.sender(), over, rng.random()) for _ in range(8)]
    mailbox = None
    consumers = []
    if push:
        mailbox = Mailbox(census.receiver())
        d.start(mailbox)
    else:
        consumers = [Worker(consume, d, census.receiver()) for _ in range(2)]

    def child(seed: float) -> None:
        expect_fresh(idle)
        if seed < 0.1:  # a child forks too, with a thread of its own at work
            expect_fresh(d)
            d.enqueue(b"the child's")
            holder = Worker(live, idle, seed)
            reap(fork(lambda: live_afresh(d, seed, mailbox)))
            holder.result()
        else:
            live_afresh(d, seed, mailbox)
            live(idle, seed)

    shares = [n // forkers + (i < n % forkers) for i in range(forkers)]
    threads = [Worker(fork_often, share, rng.random(), child) for share in shares]
    for thread in threads:
        thread.result(LONG_LIMIT + n)
    over.set()
    for thread in producers:
        thread.result()
    d.shutdown(LIMIT)
    for thread in consumers:
        thread.result()
    census.verify(d)
    expect([b.tolist() for b in drained(idle)] == [[b"the parent's"]], "the parent lost what it had")


class ForkingHandler(Mailbox):
    """Forks at every batch, and more than that in the child: it enqueues there, returns, or raises."""

    def __init__(self, d: tempo.Dispatcher, receiver: Receiver, wanted: int, rng: random.Random) -> None:
        super().__init__(receiver)
        self.d = d
        self.rng = rng
        self.parent = os.getpid()
        self.wanted = wanted
        self.pids: list[int] = []
        self.reaped = 0
        self.over = threading.Event()

    def __call__(self, batch: tempo.Batch) -> None:
        super().__call__(batch)
        if os.getpid() != self.parent or len(self.pids) >= self.wanted:
            return
        way, seed = self.rng.randrange(4), self.rng.random()
        pid = os.fork()
        if pid:
            self.pids.append(pid)
            if len(self.pids) == self.wanted:
                self.over.set()
            if len(self.pids) - self.reaped > 2:
                reap(self.pids[self.reaped])
                self.reaped += 1
        elif way == 0:
            end_child(lambda: live_afresh(self.d, seed, self))
        elif way == 1:
            end_child(self.wait_for_one)
        else:  # this thread goes on, and ends; another one looks at the dispatcher
            expect_fresh(self.d)
            threading.Thread(target=end_child, args=(lambda: live(self.d, seed, self),)).start()
            if way == 2:
                raise ValueError("in the child")

    def wait_for_one(self) -> None:
        """In a child, in the handler: the handler is called in another thread meanwhile."""
        came = threading.Event()
        self.receiver = Receiver()
        take = self.receiver.take

        def note(batch: tempo.Batch) -> None:
            take(batch)
            came.set()

        self.receiver.take = note  # type: ignore[method-assign]
        self.d.enqueue(b"the child's", timeout=None)
        self.d.flush(timeout=0)
        expect(came.wait(LIMIT), "the handler was not called in the child")
        expect(self.receiver.payloads == [b"the child's"], self.receiver.payloads)


@case(limit=90)
def forks_inside_a_handler(scale: float) -> int:
    """The handler forks; the child goes on in it, returns from it, or raises: both sides lose nothing."""
    can_fork()
    rng = dice("forks_inside_a_handler")
    n, done = times(300, scale), 0
    while done < n:
        share = min(50, n - done)
        d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=16 * tempo.KiB, max_batch_bytes=2000)
        census = Census()
        errors: list[BaseException] = []
        handler = ForkingHandler(d, census.receiver(), share, rng)
        d.start(handler, on_error=lambda exc, batch: errors.append(exc))  # noqa: B023 - used within this round
        producers = [Worker(produce, d, census.sender(), handler.over, rng.random()) for _ in range(4)]
        for thread in producers:
            thread.result(LONG_LIMIT + share)
        d.shutdown(LIMIT)
        census.verify(d)
        expect(not errors, errors)
        for pid in handler.pids[handler.reaped :]:
            reap(pid)
        done += share
    return done


class ForkingSignal:
    """A signal handler that forks when it is time to, and has one child at a time.

    The child lives in the handler and ends; or, `goes_on`, it returns from it and lives when the call that it
    interrupted has ended.
    """

    def __init__(self, wanted: int, rng: random.Random) -> None:
        self.rng = rng
        self.parent = os.getpid()
        self.wanted = wanted
        self.made = 0
        self.child = 0  # the pid of the one that is alive
        self.busy = False
        self.goes_on = False  # in a child: it has returned from the handler
        self.d = self.idle = tempo.Dispatcher(interval=60, max_buffered_bytes=64 * tempo.KiB)
        self.mailbox: Mailbox | None = None
        self.other_side: Callable[[], object] | None = None  # in a child: what the interrupted call may wait for
        self.helper: Worker | None = None
        self.returned = threading.Event()

    def help(self) -> None:
        """In a child: be the other side until the interrupted call has returned."""
        while self.other_side is not None and not self.returned.wait(0.001):
            self.other_side()

    def __call__(self, *_: object) -> None:
        if not self.busy:  # Python calls hooks around a fork, and a signal may come there
            self.busy = True
            self.fork()
            self.busy = False

    def fork(self) -> None:
        """Fork, if it is time to."""
        if os.getpid() != self.parent or self.made >= self.wanted:
            return
        if self.child:
            pid, status = os.waitpid(self.child, os.WNOHANG)
            if not pid:
                return
            self.child = 0
            expect(status == 0, f"a child ended with status {status}")
        self.made += 1
        goes_on, seed = self.rng.random() < 0.5, self.rng.random()
        pid = os.fork()
        if pid:
            self.child = pid
            return
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        limit_child()
        if goes_on:
            self.goes_on = True
            if self.other_side is not None:
                self.helper = Worker(self.help)
        else:
            end_child(lambda: self.live_here(seed))

    def live_here(self, seed: float) -> None:
        """In a child, in the handler: whatever it interrupted, this thread and another can use the dispatchers."""
        expect_fresh(self.d)
        expect_fresh(self.idle)
        self.idle.enqueue(b"here")
        expect([batch.tolist() for batch in drained(self.idle)] == [[b"here"]], "lost in a child")
        if self.d is self.idle:
            return
        if seed < 0.5:
            Worker(live, self.d, seed, self.mailbox).result()
        elif self.mailbox is None:
            self.d.enqueue(b"there", timeout=None)
            expect([batch.tolist() for batch in drained(self.d)] == [[b"there"]], "lost in a child")

    def live_on(self) -> None:
        """In a child, after the interrupted call has ended there: it may have left something of its own."""
        self.returned.set()
        if self.helper is not None:
            self.helper.result()
        expect_fresh(self.idle)
        live(self.idle, 0.25)
        if self.d.stats().state == "running" and self.mailbox is None:
            drained(self.d)
            d = self.d
            census = Census()
            sender, receiver = census.sender(), census.receiver()
            before = d.stats()
            expect(sender.try_many(d, [10] * 100) is None, "no room in a child")
            receiver.take_all(drained(d))
            expect(receiver.payloads == sender.accepted, "lost in a child")
            after = d.stats()
            expect(after.accepted - before.accepted == after.delivered - before.delivered == 100, before, after)
            d._check()
        self.d.shutdown(LIMIT)

    def interrupt(self, call: Callable[[], object]) -> None:
        """Make calls while the signal comes 200 times a second, until it has forked often enough."""
        signal.signal(signal.SIGALRM, self)
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        try:
            while self.made < self.wanted:
                try:
                    call()
                except BaseException as exc:
                    if self.goes_on:
                        end_child(partial(raise_again, exc))
                    raise
                if self.goes_on:
                    end_child(self.live_on)
        finally:
            if os.getpid() == self.parent:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
        reap(self.child)


def raise_again(error: BaseException) -> None:
    """Raise it."""
    raise error


INTERRUPTED = ("enqueue", "waiting", "many", "get", "flush", "stats", "shutdown", "push")


@case(limit=180)
def forks_by_a_signal_handler(scale: float) -> int:
    """A signal forks 200 times a second in enqueue, get, flush, shutdown: both sides go on, and lose nothing."""
    can_fork()
    if not hasattr(signal, "setitimer"):
        raise LeftOut("there is no setitimer here")
    rng = dice("forks_by_a_signal_handler")
    n = times(40, scale)
    for way in INTERRUPTED:
        forking = ForkingSignal(n, rng)
        if way == "shutdown":
            forks_in_shutdown(forking)
        elif way == "get":
            forks_in_get(forking)
        else:
            forks_in_producers_calls(forking, way)
    return n * len(INTERRUPTED)


def forks_in_producers_calls(forking: ForkingSignal, way: str) -> None:
    """Interrupt what a producer calls; another thread, or a handler, consumes."""
    rng = forking.rng
    limit = 2000 if way == "waiting" else 64 * tempo.KiB
    d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=max(limit, 8 * tempo.KiB), max_batch_bytes=1000)
    census = Census()
    sender = census.sender()
    consumer = None
    if way == "push":
        forking.mailbox = Mailbox(census.receiver())
        d.start(forking.mailbox)
    else:
        consumer = Worker(consume, d, census.receiver())
    forking.d = d
    if way == "flush":
        forking.other_side = lambda: drained(d)
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            d._check()

    lookers = [Worker(look) for _ in range(3)] if way == "stats" else []  # so that calls wait for the lock

    def call() -> None:
        if way == "many":
            sender.try_many(d, [rng.randrange(100) for _ in range(300)], None, listed=rng.random() < 0.5)
        elif way == "flush":
            sender.try_one(d, 50, None)
            expect(d.flush(), "not flushed")
        elif way == "stats":
            sender.try_one(d, 50)
            for _ in range(20):
                stats = d.stats()
                expect(stats.accepted == stats.delivered + stats.in_flight + stats.buffered, stats)
        else:
            sender.try_one(d, rng.randrange(100), 0.0 if way == "enqueue" else None)
            if way == "push" and rng.random() < 0.01:
                expect(d.flush(), "not flushed")

    forking.interrupt(call)
    over.set()
    for thread in lookers:
        thread.result()
    d.shutdown(LIMIT)
    if consumer is not None:
        consumer.result()
    census.verify(d)


def forks_in_get(forking: ForkingSignal) -> None:
    """Interrupt a consumer; other threads produce."""
    d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=16 * tempo.KiB, max_batch_bytes=1000)
    census = Census()
    receiver = census.receiver()
    over = threading.Event()
    producers = [Worker(produce, d, census.sender(), over, forking.rng.random()) for _ in range(2)]
    forking.d = d

    forking.other_side = lambda: d.enqueue(b"fed", timeout=None)

    def call() -> None:
        with contextlib.suppress(queue.Empty):
            receiver.take(d.get(timeout=forking.rng.choice([0.0, None])))

    forking.interrupt(call)
    over.set()
    rest = Worker(receiver.take_all, d)
    for thread in producers:
        thread.result()
    d.shutdown(LIMIT)
    rest.result()
    census.verify(d)


def forks_in_shutdown(forking: ForkingSignal) -> None:
    """Interrupt the life of short-lived dispatchers, the making and the shutdown included."""
    jobs: queue.SimpleQueue[tuple[tempo.Dispatcher, Receiver] | None] = queue.SimpleQueue()

    def work() -> None:  # one thread for all: a fork inside Thread.start hangs the child, without tempo too
        while True:
            job = jobs.get()
            if job is None:
                return
            consume(*job)

    consumer = Worker(work)
    ended: list[tuple[tempo.Dispatcher, Census]] = []

    def call() -> None:
        d = tempo.Dispatcher(interval=60, max_buffered_bytes=8 * tempo.KiB, max_batch_bytes=500)
        census = Census()
        sender = census.sender()
        if os.getpid() == forking.parent:
            jobs.put((d, census.receiver()))
        forking.d = d
        sender.try_many(d, [50] * 40)
        if os.getpid() != forking.parent:
            return  # nobody consumes
        d.shutdown()
        forking.d = forking.idle
        ended.append((d, census))

    forking.interrupt(call)
    jobs.put(None)
    consumer.result()
    for d, census in ended:
        census.verify(d)


# Programs of their own


class Ended(NamedTuple):
    """What came of a program."""

    code: int
    out: str
    err: str


def start(folder: str, source: str, *options: str) -> subprocess.Popen[str]:
    """Start a program from a file of its own in a folder."""
    path = Path(folder, "program.py")
    path.write_text(source, encoding="utf-8")
    command = [sys.executable, "-X", "utf8", "-X", "faulthandler", "-W", "ignore::DeprecationWarning", str(path)]
    return subprocess.Popen(
        [*command, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), folder)), "EVENTS": folder},
    )


def finish(program: subprocess.Popen[str], *what: object) -> Ended:
    """Wait for a program to end; fail when it hangs, and show where its threads stand."""
    try:
        out, err = program.communicate(timeout=LONG_LIMIT)
    except subprocess.TimeoutExpired:
        program.send_signal(signal.SIGABRT)
        try:
            told: object = program.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired as late:  # a child of its own has hung too; that ends by its alarm
            told = late.stdout, late.stderr
        raise AssertionError("a program hung", *what, told) from None
    return Ended(program.returncode, out, err)


def lines(path: Path) -> list[str]:
    """The lines of a file; none when there is no such file."""
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def events(path: Path) -> dict[str, list[int]]:
    """What a file has of each producer: lines are a producer's name and a number."""
    found: dict[str, list[int]] = {}
    for line in lines(path):
        name, number = line.split()
        found.setdefault(name, []).append(int(number))
    return found


# multiprocessing

STARTED = """
import os
import tempo

folder = os.environ["EVENTS"]
imported_in = os.getpid()

def deliver(batch):
    with open(os.path.join(folder, "%d.events" % os.getpid()), "ab") as file:
        file.write(b"".join(payload + b"\\n" for payload in batch.tolist()))

d = tempo.Dispatcher(interval=0.01, max_buffered_bytes=64 * tempo.KiB, max_batch_bytes=1000)
d.start(deliver, exit_timeout=60.0)
"""

MULTIPROCESSING = """
import json, multiprocessing, os, sys, threading
from concurrent.futures import ProcessPoolExecutor
from started import d, folder, imported_in

method, tasks = sys.argv[1], int(sys.argv[2])

def send(name, n=200):
    for i in range(n):
        d.enqueue(b"%s %d" % (name.encode(), i), timeout=60.0)

def work(name):
    assert (imported_in == os.getpid()) == (method == "spawn")
    send(name)
    assert d.flush(60.0)
    return name, os.getpid()

def process(name, way):
    assert d.stats().accepted == 0
    send(name)
    if way == "shutdown":
        d.shutdown(60.0)
    elif way == "flush":
        assert d.flush(60.0)
    # else: by the interpreter's exit, which a forked child of multiprocessing has not

def main():
    done = {}
    over = threading.Event()
    counts = [0, 0]

    def load(k):
        while not over.is_set():
            d.enqueue(b"parent%d %d" % (k, counts[k]), timeout=60.0)
            counts[k] += 1
            over.wait(0.0001)

    threads = [threading.Thread(target=load, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["started"])
    ways = ["shutdown", "flush", "exit"] if method == "spawn" else ["shutdown", "flush"]
    children = []
    for i in range(min(6, tasks)):
        children.append(context.Process(target=process, args=("process%d" % i, ways[i % len(ways)])))
        children[-1].start()
    for i, child in enumerate(children):
        child.join(60.0)
        assert child.exitcode == 0, child.exitcode
        done["process%d" % i] = child.pid
    with context.Pool(2) as pool:
        done.update(pool.map(work, ["pool%d" % i for i in range(tasks)], chunksize=1))
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        done.update(pool.map(work, ["executor%d" % i for i in range(tasks)]))
    over.set()
    for thread in threads:
        thread.join(60.0)
    with open(os.path.join(folder, "done.json"), "w") as file:
        json.dump({"done": done, "parent": os.getpid(), "counts": counts}, file)

if __name__ == "__main__":
    main()
"""


def multiprocess(method: str, scale: float) -> int:
    """Run the program; every event came once, in order, in the process in which it was accepted."""
    import multiprocessing  # noqa: PLC0415 - only these cases need it

    if method not in multiprocessing.get_all_start_methods():
        raise LeftOut(f"multiprocessing cannot {method} here")
    rounds, tried = times(4, scale), 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "started.py").write_text(STARTED, encoding="utf-8")
            tasks = times(20, min(1.0, 5 * scale))
            ended = finish(start(folder, MULTIPROCESSING, method, str(tasks)), method)
            expect(ended == Ended(0, "", ""), ended)
            result = json.loads(Path(folder, "done.json").read_text(encoding="utf-8"))
            expect(len(result["done"]) == min(6, tasks) + 2 * tasks, result)
            wanted: dict[int, dict[str, list[int]]] = {}
            for name, pid in result["done"].items():
                wanted.setdefault(pid, {})[name] = list(range(200))
            wanted[result["parent"]] = {f"parent{k}": list(range(n)) for k, n in enumerate(result["counts"]) if n}
            found = {int(path.stem): events(path) for path in Path(folder).glob("*.events")}
            expect(found == wanted, "not each once, in order, where it was accepted", summary(found), summary(wanted))
            tried += len(result["done"])
    return tried


def summary(found: dict[int, dict[str, list[int]]]) -> dict[int, dict[str, tuple[int, int]]]:
    """How many events there are of each producer, and how many different ones, per process."""
    return {pid: {name: (len(all_), len(set(all_))) for name, all_ in each.items()} for pid, each in found.items()}


@case(limit=90)
def multiprocessing_with_fork(scale: float) -> int:
    """Process, Pool and ProcessPoolExecutor by fork, threads at work: each process delivers its own events."""
    return multiprocess("fork", scale)


@case(limit=90)
def multiprocessing_with_forkserver(scale: float) -> int:
    """The same by forkserver, in which the dispatcher was started already."""
    return multiprocess("forkserver", scale)


@case(limit=90)
def multiprocessing_with_spawn(scale: float) -> int:
    """The same by spawn, where a child may leave the drain to its exit."""
    return multiprocess("spawn", scale)


# gunicorn

APP = """
d.enqueue(b"master")

def app(environ, start_response):
    d.enqueue(environ["PATH_INFO"][1:].encode(), timeout=10.0)
    body = b"%d" % os.getpid()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
"""


class Clients:
    """Threads that send requests, and know which process answered which."""

    def __init__(self, port: int, n: int, keep: bool) -> None:
        self.port = port
        self.keep = keep  # connections are used again
        self.n = n
        self.numbers = count()
        self.answered: dict[str, str] = {}  # by which process
        self.unsure: set[str] = set()
        self.over = threading.Event()  # the server ends: requests may fail
        self.lock = threading.Lock()
        self.threads = [Worker(self.ask_all) for _ in range(4)]

    def ask_all(self) -> None:
        """Send requests until all are sent and two workers at least have answered, or the server is gone."""
        connection = None
        end = time.monotonic() + LIMIT
        try:
            while True:
                with self.lock:
                    number = next(self.numbers)
                    if number >= self.n and len(set(self.answered.values())) > 1:
                        return
                expect(number < self.n or time.monotonic() < end, "one worker answers alone")
                name = f"event-{number}"
                if connection is None:
                    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG_LIMIT)
                response = None
                try:
                    connection.request("GET", f"/{name}")
                    response = connection.getresponse()
                    body = response.read().decode()
                    if response.status != 200 or not body.isdigit():
                        raise http.client.HTTPException(response.status, body)
                except (OSError, http.client.HTTPException) as error:
                    with self.lock:
                        self.unsure.add(name)
                    if self.keep and not self.over.is_set() and response is None:  # a worker that is replaced
                        connection.close()
                        connection = None
                        continue
                    # At SIGINT gunicorn raises SystemExit in the application, and may answer what it has answered.
                    expect(self.over.is_set(), "a request failed", error)
                    return
                with self.lock:
                    self.answered[name] = body
                if not self.keep or response.will_close or number % 8 == 0:
                    connection.close()
                    connection = None
        finally:
            if connection is not None:
                connection.close()


def serve(kind: list[str], n: int, ending: signal.Signals, early: bool, keep: bool) -> int:
    """Run gunicorn, send requests, end it; early: while requests are under way. Returns how many were answered."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        Path(folder, "application.py").write_text(STARTED + APP, encoding="utf-8")
        log = Path(folder, "log")
        options = ["--preload", "--workers", "4", "--bind", f"fd://{listener.fileno()}", "--error-logfile", str(log)]
        master = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *options, *kind, "application:app"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "EVENTS": folder},
            pass_fds=[listener.fileno()],
        )
        try:
            port = listener.getsockname()[1]
            clients = Clients(port, n, keep)
            listener.close()  # so that who connects when the master has ended is refused
            if early:
                wait_for_answers(clients, n // 2)
            else:
                for thread in clients.threads:
                    thread.result(LONG_LIMIT)
            clients.over.set()
            master.send_signal(ending)
            out, err = master.communicate(timeout=LONG_LIMIT)
            for thread in clients.threads:
                thread.result(LONG_LIMIT)
        finally:
            if master.poll() is None:
                master.kill()  # the workers see that, and end
                master.communicate()
        told = log.read_text(encoding="utf-8")
        expect((master.returncode, out, err) == (0, "", ""), master.returncode, out, err, told[-4000:])
        if not early:  # else what SIGINT has interrupted may be told there
            expect("Traceback" not in told and "tempo" not in told, told[-4000:])
        came: Counter[str] = Counter()
        for path in Path(folder).glob("*.events"):
            for name in lines(path):
                came[name] += 1
                right = str(master.pid) if name == "master" else clients.answered.get(name, path.stem)
                expect(path.stem == right, name, "was accepted in", right, "and came out in", path.stem)
        expect(came.pop("master") == 1, "the master's own event did not come once")
        expect(max(came.values(), default=1) == 1, "repeated", came.most_common(5))
        lost = clients.answered.keys() - came.keys()
        expect(not lost, "lost", len(lost), sorted(lost)[:5], told[-4000:])
        expect(came.keys() <= clients.answered.keys() | clients.unsure, "came from nowhere")
        return len(clients.answered)


def wait_for_answers(clients: Clients, n: int) -> None:
    """Return when n requests were answered."""
    wait_until(lambda: len(clients.answered) >= n, "requests are not answered")


def gunicorn(kind: list[str], scale: float, keep: bool) -> int:
    """Run gunicorn with a kind of workers: ended at rest; under load, gently or not; with workers that are replaced."""
    can_fork()
    if importlib.util.find_spec("gunicorn") is None:
        raise LeftOut("gunicorn is not installed")
    n = times(2000, scale)
    tried = serve(kind, n, signal.SIGTERM, False, keep)
    if scale >= 0.1:
        tried += serve(kind, n, signal.SIGTERM, True, keep)
        tried += serve(kind, n, signal.SIGINT, True, keep)
        often = ["--max-requests", str(max(1, n // 20)), "--max-requests-jitter", str(n // 40)]
        tried += serve([*kind, *often], n, signal.SIGTERM, False, keep)
    return tried


@case(limit=120)
def gunicorn_with_sync_workers(scale: float) -> int:
    """A dispatcher started before gunicorn forks: each worker delivers all that it accepted, also when it ends."""
    return gunicorn(["--worker-class", "sync"], scale, keep=False)


@case(limit=120)
def gunicorn_with_gthread_workers(scale: float) -> int:
    """The same with threads in the workers, and connections that are kept alive."""
    return gunicorn(["--worker-class", "gthread", "--threads", "4"], scale, keep=True)


# Exit of the interpreter


def recipe() -> str:
    """The README's recipe for SIGTERM, with this program's handler and limit put into its places."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"(?ms)^## SIGTERM\n.*?^```python\n(.*?)^```", text)
    expect(found, "the README has no recipe for SIGTERM")
    source = found.group(1) if found else ""
    for old, new in (("lambda batch: None", "handler, on_error=on_error"), ("exit_timeout=5.0", "exit_timeout=limit")):
        expect(source.count(old) == 1, "the recipe has changed", source)
        source = source.replace(old, new)
    expect('d.enqueue(b"event")' in source, "the recipe has changed", source)
    return source.replace('d.enqueue(b"event")', 'd.enqueue(b"event 0")')


EXIT = """
import atexit, gc, json, os, signal, sys, threading, time

o = json.loads(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
out = os.open("delivered", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
log = os.open("accepted", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
d = None

def send(d, name, n, timeout=None):
    try:
        d.enqueue(b"%s %d" % (name, n), timeout=timeout)
    except (tempo.Closed, tempo.QueueFull) as exc:
        return type(exc)
    os.write(log, b"%s %d\\n" % (name, n))

def hook():
    for n in range(3):
        if send(d, b"hook", n, o["patience"]):
            break

if o["hook"] == "after":
    atexit.register(hook)  # called after tempo's

import tempo

if o["hook"] == "before":
    atexit.register(hook)

def write(batch):
    os.write(out, b"".join(payload + b"\\n" for payload in batch.tolist()))
"""

ENDING = """
def end():
    if o["ending"] == "sys.exit":
        sys.exit(3)
    if o["ending"] == "error":
        raise ValueError("mine")
    if o["ending"] in ("SIGTERM", "SIGINT"):
        os.write(1, b"ready\\n")
        n = 0
        while True:  # each for a while: a signal that comes just before a wait begins is seen after it
            if o["doing"] == "enqueue":
                if send(d, b"main", n, o["patience"]) is None:
                    n += 1
            elif o["doing"] == "flush":
                d.flush(o["patience"])
            elif o["doing"] == "shutdown":
                try:
                    d.shutdown(o["patience"])
                except tempo.Error:
                    time.sleep(0.02)
            elif o["doing"] == "stats":
                d.stats()
            else:
                time.sleep(0.02)

time.sleep(o["delay"])
end()
"""

PUSH = """
entered = threading.Event()

def handler(batch):
    if o["handler"] in ("hangs", "spins"):
        entered.set()
        while True:
            if o["handler"] == "hangs":
                threading.Event().wait()
    write(batch)
    if o["handler"] == "raises":
        raise ValueError("the handler's")
    if o["handler"] == "slow":
        time.sleep(0.001)

def on_error(exc, batch):
    assert str(exc) == "the handler's"

limit = 0.1 if o["handler"] in ("hangs", "spins") else o["limit"]

def make():
    d = tempo.Dispatcher(interval=o["interval"], max_buffered_bytes=o["buffer"], max_batch_bytes=500)
    d.start(handler, on_error=on_error, exit_timeout=limit)
    return d

def in_thread(go_on):
    local = threading.local()
    local.d = make()
    for n in range(20):
        send(local.d, b"thread", n, o["patience"])
    made.set()
    if go_on:
        threading.Event().wait()

def produce(name, count, timeout):
    for n in range(count):
        if send(d, name, n, timeout):
            break

if o["ending"] == "SIGTERM":
    exec(RECIPE)
else:
    d = make()
if o["holder"].startswith("local"):
    made = threading.Event()
    thread = threading.Thread(target=in_thread, args=(o["holder"] == "local",), daemon=True)
    thread.start()
    made.wait()
    if o["holder"] == "local of the ended":
        thread.join()
elif o["holder"] == "cycle":
    box = [make()]
    box.append(box)
    for n in range(20):
        send(box[0], b"cycle", n, o["patience"])
    del box
for n in range(5):
    send(d, b"before", n, o["patience"])
if o["producers"] == "daemon":
    for k in range(3):
        threading.Thread(target=produce, args=(b"daemon%d" % k, 1 << 40, None), daemon=True).start()
elif o["producers"] == "blocked":
    for k in range(3):
        threading.Thread(target=produce, args=(b"blocked%d" % k, 400, o["patience"])).start()
"""


def exit_once(source: str, options: dict[str, Any], lossless: bool) -> None:
    """Let a program end; its exit code is right, nothing but its own error is on stderr, nothing accepted is lost."""
    told = json.dumps(options)
    with tempfile.TemporaryDirectory() as folder:
        program = start(folder, source, told)
        if options["ending"] in ("SIGTERM", "SIGINT"):
            assert program.stdout is not None
            if program.stdout.readline() == "ready\n":
                time.sleep(options["delay"])
                program.send_signal(getattr(signal, options["ending"]))
        ended = finish(program, told)
        expect_ending(ended, options["ending"], told)
        accepted, delivered = events(Path(folder, "accepted")), events(Path(folder, "delivered"))
        for name in accepted.keys() | delivered.keys() if lossless else ():
            n, came = len(accepted.get(name, ())), delivered.get(name, [])
            expect(came == list(range(len(came))), "repeated, or out of order", told, name, came[:9])
            # A call may be ended, or its thread, when its payload is accepted and that is not yet written down.
            sure = name.startswith(("blocked", "hook", "before", "thread", "cycle"))
            expect(n <= len(came) <= n + (not sure), "lost", told, name, n, len(came))
        taken = options["ending"] not in ("SIGTERM", "SIGINT") or options["doing"] != "shutdown"
        if lossless and taken and options["hook"] == "before":
            expect(len(delivered.get("hook", ())) == 3, "what a hook has enqueued before tempo's is lost", told)
        if lossless and options["hook"] == "after":
            expect("hook" not in accepted, "taken after the drain", told)


def expect_ending(ended: Ended, ending: str, *what: object) -> None:
    """Expect the exit code of an ending, and on stderr nothing but what the interpreter says of it."""
    code = {"sys.exit": 3, "error": 1, "SIGINT": -signal.SIGINT}.get(ending, 0)
    expect(ended.code == code, "exit code", ended, *what)
    if ending not in ("error", "SIGINT"):
        expect(ended.err == "", ended.err, *what)
        return
    told = ended.err.splitlines()
    last = "ValueError: mine" if ending == "error" else "KeyboardInterrupt"
    expect(told and told[0] == "Traceback (most recent call last):" and told[-1] == last, ended.err, *what)
    if ending == "error":
        expect(all(line.startswith("  ") for line in told[1:-1]), ended.err, *what)
    else:  # it may have come where one of tempo's own exceptions was handled
        expect(not re.search("Exception ignored|Exception in thread|Fatal", ended.err), ended.err, *what)


def run_all(attempts: Iterator[Callable[[], None]]) -> None:
    """Run them all, some at the same time; the first failure is raised."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = [pool.submit(attempt) for attempt in attempts]
        try:
            for future in running:
                future.result()
        finally:
            for future in running:
                future.cancel()


def choose(rng: random.Random, n: int, first: tuple[str, ...], *others: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """n combinations, each as often as all others as far as n goes, and with each of `first` equally often."""
    rows = []
    for chosen in first:
        rest = list(product(*others))
        rng.shuffle(rest)
        share = -(-n // len(first))
        rows.append([(chosen, *rest[i % len(rest)]) for i in range(share)])
    return [row for column in zip(*rows) for row in column][:n]


ENDINGS = ("the end", "SIGTERM", "sys.exit", "SIGINT", "error")
HOOKS = ("none", "before", "after")  # the user's, called before or after tempo's
DOING = ("enqueue", "flush", "stats", "shutdown", "sleep")  # when a signal comes
HANDLERS = ("works", "hangs", "raises", "spins", "slow")


@case(limit=180)
def exits_in_push_mode(scale: float) -> int:
    """However the interpreter ends: what was accepted is delivered, a handler that hangs is given up, all is silent."""
    rng = dice("exits_in_push_mode")
    source = f"{EXIT}\nRECIPE = {recipe()!r}\n{PUSH}\n{ENDING}"
    names = ("ending", "handler", "holder", "producers", "hook")
    holders = ("global", "cycle", "local", "local of the ended")
    chosen = choose(rng, times(400, scale), ENDINGS, HANDLERS, holders, ("main", "daemon", "blocked"), HOOKS)

    def attempts() -> Iterator[Callable[[], None]]:
        for row in chosen:
            options = {
                **dict(zip(names, row)),
                "doing": rng.choice(DOING),
                "delay": rng.choice([0.0, 0.02 * rng.random()]),
                "interval": rng.choice([0.001, 60]),
                "buffer": rng.choice([1000, 64 * tempo.KiB]),
                "limit": rng.choice([60.0, float("inf")]),
            }
            lossless = options["handler"] not in ("hangs", "spins")
            options["patience"] = 60.0 if lossless else 0.05
            yield partial(exit_once, source, options, lossless)

    run_all(attempts())
    return len(chosen)


PULL = """
if o["consumer"] == "asyncio":
    import asyncio  # not in the thread: an eval there, at the wrong moment, changes the exit code of a SIGINT

def make():
    return tempo.Dispatcher(interval=0.001, max_buffered_bytes=o["buffer"], max_batch_bytes=500)

def consume(d, kind):
    if kind == "iterate":
        for batch in d:
            write(batch)
    elif kind == "asyncio":
        async def take():
            async for batch in d:
                write(batch)
        async def take_all():
            await asyncio.gather(take(), take())
        asyncio.run(take_all())
    while kind in ("get", "poll"):
        try:
            write(d.get(timeout=None if kind == "get" else 0.001))
        except tempo.queue.Empty:
            pass
        except tempo.Stopped:
            return

def produce(d, name, daemon):
    n = 0
    while daemon or n < 300:
        if send(d, name, n, None if n % 8 else 0.0) is not tempo.QueueFull:
            n += 1

def look(d):
    while True:
        d.stats()

d = make()
if o["holder"] == "local":
    held = threading.local()
    held.d = d
elif o["holder"] == "cycle":
    held = [d]
    held.append(held)
consumer = threading.Thread(target=consume, args=(d, o["consumer"]), daemon=True)
consumer.start()
threading.Thread(target=consume, args=(d, "iterate"), daemon=True).start()
idle = make()
threading.Thread(target=consume, args=(idle, o["consumer"]), daemon=True).start()
if o["producers"] != "main":
    for k in range(3):
        name = b"%s%d" % (o["producers"].encode(), k)
        daemon = o["producers"] == "daemon"
        threading.Thread(target=produce, args=(d, name, daemon), daemon=daemon).start()
    threading.Thread(target=look, args=(d,), daemon=True).start()
for n in range(5):
    send(d, b"before", n, None)
if o["holder"] != "global":
    idle = None
    held = None
"""


@case(limit=120)
def exits_in_pull_mode(scale: float) -> int:
    """Daemon consumers in a loop, in get, in asyncio, producers at work: the interpreter ends, at once, in silence."""
    rng = dice("exits_in_pull_mode")
    source = f"{EXIT}\n{PULL}\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n{ENDING}"
    names = ("ending", "consumer", "holder", "producers", "hook")
    consumers = ("iterate", "asyncio", "get", "poll")
    chosen = choose(
        rng, times(200, scale), ENDINGS, consumers, ("global", "cycle", "local"), ("daemon", "main", "blocked"), HOOKS
    )

    def attempts() -> Iterator[Callable[[], None]]:
        for row in chosen:
            options = {
                **dict(zip(names, row)),
                "doing": rng.choice(DOING),
                "delay": rng.choice([0.0, 0.02 * rng.random()]),
                "buffer": rng.choice([2000, 64 * tempo.KiB]),
                "patience": 1.0,
            }
            yield partial(exit_once, source, options, False)

    run_all(attempts())
    return len(chosen)


FINALIZERS = """
class Finalizer:
    def __init__(self, calls):
        self.calls = calls
        self.me = [self]  # a cycle: the last collection finds it

    def __del__(self):
        for call in self.calls:
            try:
                call()
            except (tempo.Error, tempo.queue.Empty):
                pass
            os.write(out, b"call 0\\n")

def produce(d):
    while True:
        try:
            d.enqueue(b"x" * 100, timeout=None)
        except tempo.Error:
            pass

def consume(d):
    for batch in d:
        pass

def look(d):
    while True:
        d.stats()

d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=o["buffer"], max_batch_bytes=1000)
idle = tempo.Dispatcher(interval=60, max_buffered_bytes=1000)
if o["mode"] == "push":
    d.start(lambda batch: None)
elif o["mode"] == "pull":
    threading.Thread(target=consume, args=(d,), daemon=True).start()
for work in (produce, produce, look, look):
    threading.Thread(target=work, args=(d,), daemon=True).start()
payload = b"late"
timeout = {"wait": None, "limit": 0.01, "no": 0.0}[o["patience"]]
for one in (d, idle):
    calls = [
        lambda one=one: one.enqueue(payload, timeout=timeout),
        lambda one=one: one.enqueue_many([payload] * 1000, timeout=timeout),
        lambda one=one: one.stats(),
        lambda one=one: repr(one),
        lambda one=one: one.flush(timeout),
        lambda one=one: one.get(timeout=0.0),
        lambda one=one: one.shutdown(timeout),
        lambda one=one: one.stop(),
    ]
    gc.disable()
    Finalizer(calls)
time.sleep(o["delay"])
"""


@case(limit=120)
def finalizers_at_exit(scale: float) -> int:
    """Daemon threads are frozen as they call; then finalizers call: no deadlock, and nothing on stderr."""
    if sys.implementation.name != "cpython":
        raise LeftOut("finalizers run at exit on CPython alone")
    rng = dice("finalizers_at_exit")
    rows = choose(rng, times(100, scale), ("pull", "push", "nobody"), ("no", "wait", "limit"), (2000, 65536))

    def once(options: dict[str, Any]) -> None:
        told = json.dumps(options)
        with tempfile.TemporaryDirectory() as folder:
            ended = finish(start(folder, f"{EXIT}\n{FINALIZERS}", told), told)
            expect(ended == Ended(0, "", ""), ended, told)
            expect(events(Path(folder, "delivered")) == {"call": [0] * 16}, "not all calls were made", told)

    def attempts() -> Iterator[Callable[[], None]]:
        for mode, patience, buffer in rows:
            delay = 0.03 * rng.random()
            options = {"mode": mode, "patience": patience, "buffer": buffer, "delay": delay, "hook": "none"}
            yield partial(once, options)

    run_all(attempts())
    return len(rows)


CHILDREN = """
limit = float(o["limit"])
parent = os.getpid()

def deliver(batch):
    with open("%d.delivered" % os.getpid(), "ab") as file:
        file.write(b"".join(payload + b"\\n" for payload in batch.tolist()))

def send_from_hook():
    if os.getpid() != parent:
        d.enqueue(b"hook 0")
        d.enqueue_many([b"hook 1", b"hook 2"])

def fork_in_hook():
    if os.getpid() == parent:
        try:
            pid = os.fork()
        except RuntimeError:  # 3.12
            os.write(1, b"no fork")
            return
        if pid == 0:
            signal.alarm(60)
            d.enqueue(b"hook 0")
            d.enqueue(b"hook 1")
            d.enqueue(b"hook 2")
        else:
            assert os.waitpid(pid, 0)[1] == 0

d = tempo.Dispatcher(interval=60, max_buffered_bytes=64 * tempo.KiB, max_batch_bytes=500)
d.start(deliver, exit_timeout=limit)
slow = tempo.Dispatcher(interval=60, max_buffered_bytes=64 * tempo.KiB, max_batch_bytes=1)
slow.start(lambda batch: (time.sleep(0.05), write(batch)), exit_timeout=0.2)
if o["first"] == "hook":
    atexit.register(send_from_hook)
elif o["first"] == "hook that forks":
    atexit.register(fork_in_hook)
for n in range(50):
    d.enqueue(b"parent %d" % n)

def no_thread(self):
    raise RuntimeError("can't start new thread")

def end_as_told():
    signal.alarm(60)
    if o["first"] == "no thread":
        threading.Thread.start = no_thread
        for n in range(100):
            slow.enqueue(b"slow %d" % n)
    if o["first"] in ("main", "no thread"):
        for n in range(50):
            d.enqueue(b"child %d" % n)
    elif o["first"] == "thread":
        def work():
            for n in range(50):
                d.enqueue(b"child %d" % n)
        threading.Thread(target=work).start()
    if o["ending"] == "sys.exit":
        sys.exit(0)
    if o["ending"] == "SIGTERM":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

if o["first"] != "hook that forks":
    pid = os.fork()
    if pid == 0:
        end_as_told()
    else:
        for n in range(50, 80):
            d.enqueue(b"parent %d" % n)
        assert os.waitpid(pid, 0)[1] == 0
"""


@case(limit=120)
def exits_of_forked_children(scale: float) -> int:
    """A child that ends as a program does drains its own; the handler's thread may be missing, or not to be had."""
    can_fork()
    rng = dice("exits_of_forked_children")
    endings = ("the end", "sys.exit", "SIGTERM")
    firsts = ("main", "no thread", "thread", "hook", "hook that forks", "never")
    rows = choose(rng, times(100, scale), firsts, endings, ("60", "inf"))

    def once(options: dict[str, Any]) -> None:
        told = json.dumps(options)
        with tempfile.TemporaryDirectory() as folder:
            program = start(folder, f"{EXIT}\n{CHILDREN}", told)
            ended = finish(program, told)
            forked = ended.out != "no fork"
            expect(ended == Ended(0, "" if forked else "no fork", ""), ended, told)
            found = {int(path.stem): events(path) for path in Path(folder).glob("*.delivered")}
            mine = found.pop(program.pid, {})
            wanted = {"parent": list(range(80 if options["first"] != "hook that forks" else 50))}
            expect(mine == wanted, "the parent's", mine, told)
            theirs = {
                "main": [{"child": list(range(50))}],
                "no thread": [{"child": list(range(50))}],
                "thread": [{"child": list(range(50))}],
                "hook": [{"hook": [0, 1, 2]}],
                "hook that forks": [{"hook": [0, 1, 2]}] if forked else [],
                "never": [],
            }
            slow = events(Path(folder, "delivered")).get("slow", [])
            expect(slow == list(range(len(slow))) and len(slow) < 100, "drained beyond exit_timeout", len(slow), told)
            expect(list(found.values()) == theirs[options["first"]], "the child's", found, told)

    def attempts() -> Iterator[Callable[[], None]]:
        for first, ending, limit in rows:
            options = {"first": first, "ending": ending, "limit": limit, "hook": "none"}
            yield partial(once, options)

    run_all(attempts())
    return len(rows)
