# SPDX-License-Identifier: MIT
"""All calls mixed, by eight producers and a handler or one to four consumers, with random limits and sizes, in rounds.

    python3 -m soak.tests.mixed --seconds 3600        # for instance on a build without a GIL
    python3 -m soak.tests.mixed --flushers 4          # who waits how long while four threads call flush(0) in a loop

Each round ends by shutdown, ashutdown or stop, in the midst of the load or after it. Then what was accepted must have
come out once, and nothing else, in the order of its producer if there was one consumer. Exit code 1 if not.
"""

import argparse
import asyncio
import contextlib
import gc
import queue
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from random import Random
from typing import Any

import tempo
from soak.tests.helpers import Worker

LIMIT = 100.0
"""Seconds without progress after which a call that must end is a failure."""


def offer(d: tempo.Dispatcher, name: int, chance: Random, size: int, accepted: list[bytes]) -> None:
    """Offer payloads by every call there is until the dispatcher is closed, or all are offered."""

    async def one_by_one(timeout: float | None) -> None:
        for item in items:
            await d.aenqueue(item, timeout)
            accepted.append(item)

    ways = chance.choice([["one"], ["many"], ["one", "many"], ["coroutine"]])
    numbers = iter(range(chance.choice([50, 500, 3000])))
    while items := [b"%d:%d:" % (name, i) for i in islice(numbers, chance.choice([1, 3, 40, 700]))]:
        items = [item + bytes(chance.randint(0, size)) for item in items]
        way, timeout = chance.choice(ways), chance.choice([0, None, 0.02])
        with contextlib.suppress(tempo.QueueFull, tempo.PayloadTooLarge):
            if way == "coroutine":
                asyncio.run(one_by_one(timeout))
            elif way == "many":
                try:
                    d.enqueue_many(items, timeout)
                except tempo.Error as error:
                    del items[error.accepted :]
                    raise
                finally:
                    accepted += items
            else:
                for item in items:
                    d.enqueue(item, timeout)
                    accepted.append(item)


def take(d: tempo.Dispatcher, way: str, chance: Random, batches: list[list[bytes]]) -> None:
    """Take batches until there will never be another."""

    async def take_all() -> None:
        async for batch in d:
            batches.append(batch.tolist())

    if way == "async for":
        asyncio.run(take_all())
    while way == "get":
        with contextlib.suppress(queue.Empty):
            batches.append(d.get(chance.choice([None, 0.001, 0.05])).tolist())
    for batch in d:
        batches.append(batch.tolist())


def meddle(d: tempo.Dispatcher, limit: int) -> None:
    """Flush, and look whether the books balance, until the dispatcher is stopped."""
    while (s := d.stats()).state != "stopped":
        assert s.accepted == s.delivered + s.in_flight + s.buffered + s.discarded, s
        assert 0 <= s.buffered_bytes <= s.peak_buffered_bytes <= limit, s
        d.flush(0)


def finish(d: tempo.Dispatcher, worker: Worker) -> None:
    """Wait for a worker as long as something is accepted or delivered: a busy machine is slow, and not stuck."""
    before = None
    while worker.is_alive() and (now := d.stats()[:4]) != before:
        before = now
        worker.join(LIMIT)
    if worker.is_alive():
        print(d.stats(), file=sys.stderr)
    worker.result(0)


def play(chance: Random) -> tuple[int, float]:
    """Play a round; return how many events were accepted, and the seconds that its end took."""
    limit = chance.choice([500, 2000, 20_000, 200_000, 2_000_000])
    most_bytes, most_items = chance.choice([None, 1, 100, 1000, 30_000]), chance.choice([None, None, 1, 10, 500])
    limits: dict[str, Any] = {"max_buffered_bytes": limit, "max_batch_bytes": most_bytes, "max_batch_items": most_items}
    d = tempo.Dispatcher(interval=chance.choice([0.001, 0.01, 0.2]), **limits)
    size, consumers = chance.choice([0, 8, 40, 163, 400, 2000]), chance.choice([0, 1, 1, 2, 3, 4])
    accepted: list[list[bytes]] = [[] for _ in range(8)]
    batches: list[list[bytes]] = []

    def worker(work: Callable[..., object], *args: object) -> Worker:
        def until_closed() -> None:
            with contextlib.suppress(tempo.Closed):
                work(d, *args)

        return Worker(until_closed)

    if not consumers:
        d.start(lambda batch: batches.append(batch.tolist()))
    producers = [worker(offer, k, Random(chance.random()), size, mine) for k, mine in enumerate(accepted)]
    ways = [chance.choice(["for", "get", "async for"]) for _ in range(consumers)]
    others = [worker(take, way, Random(chance.random()), batches) for way in ways]
    others += [worker(meddle, limit)] if chance.random() < 0.5 else []
    if chance.random() < 0.5:
        time.sleep(chance.random() * 0.05)
    else:
        for producer in producers:
            finish(d, producer)
    began = time.monotonic()
    end = chance.choice(["shutdown", "ashutdown", "stop"])
    if end == "ashutdown":
        asyncio.run(d.ashutdown(LIMIT))
    left = d.stop() if end == "stop" else []
    d.shutdown(LIMIT)
    seconds = time.monotonic() - began
    for each in (*producers, *others):
        each.result(LIMIT)
    while d.stats().in_flight:
        assert time.monotonic() - began < LIMIT, "the handler does not return"
        time.sleep(0.001)

    out = [item for batch in (*batches, *(batch.tolist() for batch in left)) for item in batch]
    total, s = sum(map(len, accepted)), d.stats()
    assert Counter(out) == sum(map(Counter, accepted), Counter()), f"{total} accepted, {len(out)} came out"
    assert (s.accepted, s.state) == (total, "stopped"), s
    for k, mine in enumerate(accepted if consumers <= 1 else ()):
        assert [item for item in out if item.startswith(b"%d:" % k)] == mine, f"out of order: producer {k}"
    for batch in batches:
        assert len(batch) <= (most_items or len(batch)), f"{len(batch)} payloads in a batch"
        assert len(batch) == 1 or sum(map(len, batch)) <= (most_bytes or limit), f"{batch} in a batch"
    return total, seconds


def longest_waits(seconds: float, flushers: int) -> dict[str, float]:
    """Return the longest time, in seconds, that a producer, a consumer and a flusher waited for their turn."""
    d = tempo.Dispatcher(interval=0.05, max_batch_bytes=32 * tempo.KiB, max_buffered_bytes=tempo.MiB)
    end, waits, counts = time.monotonic() + seconds, dict[str, float](), [0, 0]  # accepted, delivered

    def timed(who: str, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = call()
        waits[who] = max(waits.get(who, 0.0), time.monotonic() - began)
        return result

    def produce() -> None:
        while time.monotonic() < end:
            timed("producer", lambda: d.enqueue(bytes(163), None))
            counts[0] += 1
            time.sleep(0.001 if counts[0] % 50 == 0 else 0)
        d.shutdown(LIMIT)

    def consume() -> None:
        with contextlib.suppress(tempo.Stopped):
            while True:
                counts[1] += len(timed("consumer", d.get))

    def flush() -> None:
        while d.stats().state == "running":
            timed("flusher", lambda: d.flush(0))

    for each in [Worker(work) for work in (produce, consume, *[flush] * flushers)]:
        each.result(seconds + LIMIT)
    assert counts[0] == counts[1], counts
    return waits


def main() -> None:
    parser = argparse.ArgumentParser(description="All calls of tempo mixed, round after round.")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="for so long (%(default)g)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9, metavar="S", help="of the draws")
    parser.add_argument("--flushers", type=int, metavar="N", help="instead: N threads that call flush(0) in a loop")
    options = parser.parse_args()
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    print(f"Python {sys.version.split()[0]} {'with' if gil else 'without'} a GIL, seed {options.seed}", flush=True)
    if options.flushers is not None:
        waits = longest_waits(options.seconds, options.flushers)
        text = ", ".join(f"{who} {seconds:.3f} s" for who, seconds in sorted(waits.items()))
        print(f"{options.flushers} flushers for {options.seconds:g} s, nothing lost; longest waits: {text}")
        return
    chance, end, ends, events = Random(options.seed), time.monotonic() + options.seconds, [0.0], 0
    while time.monotonic() < end:
        accepted, seconds = play(chance)
        events += accepted
        ends.append(seconds)
        gc.collect()  # CPython 3.13.5 without a GIL hardly does by itself (gh-142048); a task that raised is a cycle
    print(f"{len(ends) - 1:,} rounds, {events:,} events, nothing lost, repeated or out of order; ", end="")
    print(f"slowest end {max(ends):.2f} s")


if __name__ == "__main__":
    main()
