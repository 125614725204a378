# SPDX-License-Identifier: MIT
"""The ``tune`` command: which limits fit this machine and this payload size.

A bounded number of short probes finds, in this order: how many producers give the highest rate; how long a consumer may
rest after each batch before the rate falls; at which buffer refusals end, when producers send at a steady pace below
that rate; whether a batch limit helps. It recommends twice the smallest buffer without refusals, and never more than an
eighth of the machine's memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import tempo
from soak import cli, environment, heap, interrupts, results
from soak import config as settings
from soak.cli import KIB, MIB, Failure, format_seconds, format_size, say
from soak.config import TELEMETRY, Config
from soak.drive import drive
from soak.load import Load
from soak.payloads import events

PRODUCERS = (1, 4, 16, 32)
DELAYS = ("0", "10us", "100us", "1ms")
BATCH_LIMITS = ("none", "32KiB", "320KiB")
ROUNDS = 2  # each choice is tried so often, in turns: the best counts, since other programs only slow it down
CONFIRM = 2  # how often the recommended settings are tried
NEAR = 0.95  # a rate of so much of the best one is as good: then the smaller number, or the longer rest
WORTH = 1.05  # a batch limit must bring so much
STEADY = 1.25  # the rates of the last probes differ by no more, or the result is provisional
OFFERED = 0.7  # of the highest rate is what paced producers send: at its limit a machine refuses with any buffer
TICK = 0.01  # seconds between the bursts of a paced producer
LEAST_BUFFER, FIRST_BUFFER, MOST_BUFFER = 16 * KIB, 2 * MIB, 1024 * MIB
SHARE_OF_MEMORY = 8

EXAMPLE = """\
examples:
  python3 -m soak tune
  python3 -m soak tune --payload 10KiB --probe 2s

On a terminal it asks for the payload size when none is given. `run` then takes its settings by itself.
"""


class Edge(NamedTuple):
    healthy: int | None  # the smallest buffer tried without refusals, in bytes; None: each had some
    refusing: int | None  # the largest one below that, which had some


class Found(NamedTuple):
    config: Config
    edge: Edge
    rate: float  # observed with the recommended settings, delivered events a second
    gain: float  # of the recommended batch limit over none
    provisional: list[str]  # why it is


def add_parser(commands: Any) -> None:
    purpose = "Probe this machine, recommend limits, and write them where `run` finds them."
    add = cli.add_command(commands, "tune", main, purpose, EXAMPLE)
    settings.add_settings(add, "payload", "interval")
    add("--probe", type=cli.duration, default="1s", metavar="TIME", help="of each of at most 44 probes (%(default)s)")
    add("--out", type=cli.path, default="soak/out", metavar="DIR", help="folder of the settings (%(default)s)")


def main(options: argparse.Namespace) -> int:
    if not hasattr(options, "payload") and sys.stdin.isatty() and sys.stderr.isatty():
        options.payload = ask()
    place = environment.describe()
    memory = place["memory_bytes"]
    usual = {"producers": "1", "consumer_delay": "0", "max_buffered_bytes": str(MOST_BUFFER)}
    first = settings.config_from(options, options.probe, **usual)
    most = largest_buffer(first, memory)
    if 2 * first.largest_payload > most:
        two = f"two payloads of {format_size(first.largest_payload)}"
        raise Failure(f"nothing to recommend: a buffer for {two} takes over an eighth of the memory")
    first = replace(first, max_buffered_bytes=max(min(FIRST_BUFFER, most), 2 * first.largest_payload))
    with interrupts.kept():
        found = tune(first, options.probe, most, memory is not None)
    lines = show(found, memory)
    path = options.out / settings.FILE
    written = results.write(path, settings.as_file(found.config, place, not found.provisional, results.now()))
    if written:
        lines.append(f"written       {path}: a run with this --out uses them from now on")
    print("\n".join(lines), flush=True)
    return 0 if written else 1


def ask() -> str | int:
    """Ask on the terminal for a payload size until the answer is one; an empty answer is the default."""
    while True:
        print(f"payload size, such as 10KiB, or {TELEMETRY} [{TELEMETRY}]: ", end="", file=sys.stderr, flush=True)
        try:
            return settings.payload(sys.stdin.readline().strip() or TELEMETRY)
        except argparse.ArgumentTypeError as error:
            say(str(error))


def largest_buffer(config: Config, memory: object) -> int:
    """Return the largest buffer whose bound for the heap is an eighth of the memory (unknown: of 512 MiB) at most."""
    share = (memory if isinstance(memory, int) else 512 * MIB) // SHARE_OF_MEMORY
    buffer = min(MOST_BUFFER, share)
    most = replace(config, max_batch_bytes=None, producers=max(PRODUCERS))  # no limit of a batch may be recommended
    while buffer > 1 and heap.bound(replace(most, max_buffered_bytes=buffer)) > share:
        buffer = buffer * 3 // 4
    return buffer


def tune(first: Config, seconds: float, most: int, memory_known: bool) -> Found:
    """Probe, beginning with the first settings. Raises Failure when a probe goes wrong."""
    why = [] if memory_known else ["this machine does not tell how much memory it has"]

    tried = _rates("producers", {n: replace(first, producers=n) for n in PRODUCERS}, seconds)
    config = replace(first, producers=next(n for n, rate in tried.items() if rate >= NEAR * max(tried.values())))
    delays = {text: replace(config, consumer_delay=cli.duration_or_zero(text)) for text in DELAYS}
    tried = _rates("rest after a batch", delays, seconds)
    longest = [text for text, rate in tried.items() if rate >= NEAR * max(tried.values())][-1]
    config, offered = delays[longest], OFFERED * tried[longest]

    def healthy(buffer: int) -> bool:
        """Send so many events a second from all producers together: is none refused?"""
        load = Paced(replace(config, max_buffered_bytes=buffer, on_full="raise"), offered)
        observe(load, seconds)
        return not load.refused

    least = min(max(LEAST_BUFFER, 1 << (2 * config.largest_payload).bit_length()), most)
    edge = find_edge(healthy, least, most)
    if edge.healthy is None:
        why.append(f"refused at {offered:,.0f} events/s with every buffer up to {format_size(most)}")
    elif edge.refusing is None:
        why.append(f"no edge: the smallest buffer tried, {format_size(edge.healthy)}, refused nothing")
    config = replace(config, max_buffered_bytes=min(most, 2 * (edge.healthy or most)))

    limits = {text: replace(config, max_batch_bytes=cli.size_or_none(text)) for text in BATCH_LIMITS}
    fitting = {text: one for text, one in limits.items() if (one.max_batch_bytes or 0) <= config.max_buffered_bytes}
    tried = _rates("batch limit", fitting, seconds)
    best = max(tried, key=tried.__getitem__)
    gain = tried[best] / tried["none"] if tried["none"] else 1.0
    config, gain = (limits[best], gain) if gain >= WORTH else (limits["none"], 1.0)

    rates = [observe(Load(config), seconds) for _ in range(CONFIRM)]
    if max(rates) > STEADY * min(rates):
        why.append(f"the rate is not steady: {min(rates):,.0f} to {max(rates):,.0f} events/s")
    if refused := sum(not healthy(config.max_buffered_bytes) for _ in range(CONFIRM)):
        why.append(f"refusals in {refused} of {CONFIRM} probes with the recommended buffer")
    return Found(config, edge, sum(rates) / len(rates), gain, why)


def _rates(what: str, choices: Mapping[Any, Config], seconds: float) -> dict[Any, float]:
    """Return the rate of each choice, the best of some rounds in turns, and tell them."""
    best = dict.fromkeys(choices, 0.0)
    for _ in range(ROUNDS):
        for text, config in choices.items():
            best[text] = max(best[text], observe(Load(config), seconds))
    say(f"{what}: " + ", ".join(f"{text} {rate:,.0f}/s" for text, rate in best.items()))
    return best


def find_edge(healthy: Callable[[int], bool], least: int, most: int) -> Edge:
    """Double the buffer until two probes in a row are healthy.

    >>> find_edge(lambda size: size >= 3000, 16, 1 << 20), find_edge(lambda size: False, 16, 60)
    (Edge(healthy=4096, refusing=2048), Edge(healthy=None, refusing=60))
    """
    size, refusing = least, None
    while refusing != most:
        well = healthy(size) and healthy(size)
        say(f"buffer {format_size(size)}: {'healthy' if well else 'refusals'}")
        if well:
            return Edge(size, refusing)
        refusing, size = size, min(most, 2 * size)
    return Edge(None, refusing)


def observe(load: Load, seconds: float) -> float:
    """Return the rate of a load. Raises Failure when it goes wrong."""
    outcome = drive(load.config, seconds, load)
    if interrupts.seen():
        raise KeyboardInterrupt
    if outcome.problems:
        raise Failure(f"no settings: {outcome.problems[0]}")
    return load.delivered / outcome.seconds


class Paced(Load):
    """Producers that send a burst at each tick, evenly staggered; one that is late sends what it owes at once."""

    def __init__(self, config: Config, offered: float) -> None:
        super().__init__(config)
        self._tick = max(TICK, config.producers / offered)  # at least one event a tick
        self._burst = max(1, round(offered / config.producers * self._tick))

    def produce(self, index: int, dispatcher: tempo.Dispatcher, halt: list[bool]) -> None:
        """Send bursts until ``halt`` holds something."""
        account, sent = self.accounts[index], self.sent[index]
        source = events(self.config.payload_size, index, sent)
        due = time.perf_counter() + self._tick * index / self.config.producers
        while not halt:
            time.sleep(max(0.0, due - time.perf_counter()))
            due += self._tick
            for payload in islice(source, self._burst):
                try:
                    dispatcher.enqueue(payload)
                    account.events += 1
                except tempo.QueueFull:
                    account.refused += 1
                    sent.take_back(payload)


def show(found: Found, memory: object) -> list[str]:
    config, edge = found.config, found.edge
    per_second = found.rate * max(1, config.mean_payload)
    bound = heap.bound(config)
    share = f", {bound / memory:.2%} of {format_size(memory)}" if isinstance(memory, int) else ""
    begin = "" if edge.refusing is None else f"refusals with {format_size(edge.refusing)}, "
    begin += "with every buffer" if edge.healthy is None else f"none with {format_size(edge.healthy)}"
    limit = "none" if config.max_batch_bytes is None else format_size(config.max_batch_bytes)
    helps = f"it brings {found.gain - 1:.0%}" if found.gain > 1 else "one does not help"
    return [
        f"{'PROVISIONAL' if found.provisional else 'CALIBRATED'}: max_buffered_bytes"
        f" {format_size(config.max_buffered_bytes)}, max_batch_bytes {limit},"
        f" {config.producers} producers, {format_seconds(config.consumer_delay)} rest after a batch",
        *(f"  because     {reason}" for reason in found.provisional),
        f"rate          {found.rate:,.0f} events/s observed, {format_size(per_second)}/s",
        f"edge          at {OFFERED:.0%} of that: {begin}",
        f"headroom      {format_seconds(config.max_buffered_bytes / per_second)} at that rate, when no consumer comes",
        f"memory        {format_size(bound)} at most for all that tempo holds{share}",
        f"batch limit   {limit}: {helps}",
    ]
