# SPDX-License-Identifier: MIT
"""The ``tune`` command: which limits fit this machine and this payload size.

A bounded number of short probes finds out, in this order: how many producers give the highest rate; how long a consumer
may rest after each batch before the rate falls; at which buffer refusals end, when producers send at a steady pace
below that rate; whether a batch limit helps. What it recommends is twice the smallest buffer without refusals, and
never more than an eighth of the machine's memory.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import tempo
from soak import environment, heap, interrupts, settings, units
from soak.config import TELEMETRY, Config
from soak.drive import drive
from soak.load import Load
from soak.options import complain, converter, parse_path
from soak.payloads import events
from soak.progress import say
from soak.units import format_seconds, format_size, parse_duration, parse_size

PRODUCERS = (1, 4, 16, 32)
DELAYS = ("0", "10us", "100us", "1ms")
BATCH_LIMITS = ("none", "32KiB", "320KiB")
FIRST_LIMIT = "320KiB"
"""Until the batch limit's turn comes: without one, a full buffer waits for the interval."""
ROUNDS = 2
"""How often each choice is tried, in turns with the others: the best counts, for other programs only slow it down."""
CONFIRM = 2
"""How often the recommended settings are tried."""
NEAR = 0.95
"""A rate of so much of the best one is as good: then the smaller number, or the longer rest."""
WORTH = 1.05
"""A batch limit must bring so much to be recommended."""
STEADY = 1.25
"""The rates of the last probes differ by no more, or the result is provisional."""
OFFERED = 0.7
"""Of the highest rate: what paced producers send, for a machine at its limit refuses with any buffer."""
TICK = 0.01
"""Seconds between the bursts of a paced producer."""
SPARE = 2
"""The recommended buffer over the smallest healthy one."""
LEAST_BUFFER = 16 * units.KIB
FIRST_BUFFER = 2 * units.MIB
MOST_BUFFER = 1024 * units.MIB
SHARE_OF_MEMORY = 8
OUT = Path("soak/out")
"""Where `run`, too, looks unless it is told else."""

EXAMPLE = """\
examples:
  python3 -m soak tune
  python3 -m soak tune --payload 10KiB --probe 2s

On a terminal it asks for the payload size when none is given. Its settings are what `run` then takes by itself.
exit code: 0 there are settings (calibrated or provisional), 1 there are none or they cannot be written, 2 a bad option,
130 interrupted
"""


class Probe(NamedTuple):
    """What one short run came to."""

    rate: float  # delivered events a second
    refused: int
    p99: float | None  # seconds from enqueue to delivery
    problem: str | None

    @property
    def healthy(self) -> bool:
        """Whether nothing was refused and nothing went wrong."""
        return not self.refused and self.problem is None


class Edge(NamedTuple):
    """Where refusals begin. Bytes."""

    healthy: int | None  # the smallest buffer without refusals; None: there is none
    refusing: int | None  # the largest one with refusals below that; None: none refuses


class Found(NamedTuple):
    """What tune found out."""

    config: Config
    edge: Edge
    rate: float  # observed with the recommended settings, delivered events a second
    gain: float  # of the recommended batch limit over none
    provisional: list[str]  # why it is


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="which limits fit this machine and payload size; run then uses them",
        description="Probe this machine, recommend limits, and write them where `run` finds them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main, parser=parser)
    settings.add_settings(parser, {"payload": TELEMETRY, "interval": settings.DEFAULTS["interval"]})
    add = parser.add_argument
    add(
        "--probe",
        type=converter(parse_duration),
        default="1s",
        metavar="TIME",
        help="how long each probe lasts, 40 of them at most (%(default)s)",
    )
    add(
        "--out",
        type=converter(parse_path),
        default=OUT,
        metavar="DIR",
        help="folder of the settings (%(default)s)",
    )


def main(options: argparse.Namespace) -> int:
    """Find settings, write and tell them; return the exit code."""
    if not hasattr(options, "payload"):
        options.payload = ask() if sys.stdin.isatty() and sys.stderr.isatty() else TELEMETRY
    place = environment.describe()
    first = Config(
        duration=options.probe,
        producers=1,
        consumers=1,
        payload=options.payload,
        interval=getattr(options, "interval", parse_duration(settings.DEFAULTS["interval"])),
        max_batch_bytes=parse_size(FIRST_LIMIT),
        max_buffered_bytes=FIRST_BUFFER,
        consumer_delay=0.0,
        on_full="block",
        bulk=1,
        sink="null",
    )
    most = largest_buffer(first, place["memory_bytes"])
    if 2 * first.largest_payload > most:
        complain(
            f"a buffer for two payloads of {format_size(first.largest_payload)} takes more than an eighth of this"
            f" machine's memory ({format_size(most)}): there is nothing to recommend"
        )
        return 1
    first = replace(first, max_buffered_bytes=max(min(FIRST_BUFFER, most), 2 * first.largest_payload))
    try:
        with interrupts.kept():
            found = tune(first, options.probe, most, place["memory_bytes"] is not None)
    except (KeyboardInterrupt, RuntimeError) as error:
        complain(f"no settings: {error}" if str(error) else "interrupted: there are no settings")
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    lines = show(found, place["memory_bytes"])
    try:
        made = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        path = settings.write(options.out, as_texts(found.config), place, not found.provisional, made)
    except OSError as error:
        complain(f"cannot write {str(options.out / settings.FILE)!r}: {error.strerror or error}")
        print("\n".join(lines), flush=True)
        return 1
    user = "`make soak`" if options.out == OUT else f"a run with --out {options.out}"
    print("\n".join([*lines, f"written       {path}: {user} uses them from now on"]), flush=True)
    return 0


def ask(read: Callable[[], str] = sys.stdin.readline, tries: int = 3) -> str | int:
    """Ask on the terminal for a payload size; an empty answer, or too many bad ones, is the default."""
    for _ in range(tries):
        print(f"payload size, such as 10KiB, or {TELEMETRY} [{TELEMETRY}]: ", end="", file=sys.stderr, flush=True)
        answer = read().strip()
        if not answer:
            break
        try:
            return settings.parse_payload(answer)
        except ValueError as error:
            say(str(error))
    return TELEMETRY


def largest_buffer(config: Config, memory: object) -> int:
    """Return the largest buffer, in bytes, with which a run's bound is an eighth of the memory at most.

    The bound is what the heap of `run` is held against. Where the memory is not known it is taken for 512 MiB.
    """
    share = (memory if isinstance(memory, int) else 512 * units.MIB) // SHARE_OF_MEMORY
    size = min(MOST_BUFFER, share)
    while size > 1 and heap.bound(replace(config, max_buffered_bytes=size, producers=max(PRODUCERS))) > share:
        size = size * 3 // 4
    return size


def tune(first: Config, seconds: float, most: int, memory_known: bool) -> Found:
    """Probe, from the first settings on. Raises RuntimeError when a probe goes wrong, whatever the settings."""
    why = [] if memory_known else ["this machine does not tell how much memory it has"]

    config, rate = _longest_rest(_most_producers(first, seconds), seconds)
    offered = OFFERED * rate
    least = min(max(LEAST_BUFFER, power_of_two(2 * config.largest_payload)), most)
    edge = find_edge(
        lambda size: paced(replace(config, max_buffered_bytes=size), seconds, offered).healthy, least, most
    )
    if edge.healthy is None:
        why.append(f"refused at {offered:,.0f} events/s with every buffer up to {format_size(most)}")
    elif edge.refusing is None:
        why.append(f"no edge: the smallest buffer tried, {format_size(edge.healthy)}, refused nothing")
    config = replace(config, max_buffered_bytes=min(most, SPARE * (edge.healthy or most)))
    config, gain = _best_batch_limit(config, seconds)

    rates = [observe(config, seconds).rate for _ in range(CONFIRM)]
    if max(rates) > STEADY * min(rates):
        why.append(f"the rate is not steady: {min(rates):,.0f} to {max(rates):,.0f} events/s")
    refused = sum(not paced(config, seconds, offered).healthy for _ in range(CONFIRM))
    if refused:
        why.append(f"refusals in {refused} of {CONFIRM} probes with the recommended buffer")
    return Found(config, edge, sum(rates) / len(rates), gain, why)


def _most_producers(config: Config, seconds: float) -> Config:
    tried = _rates("producers", {str(n): replace(config, producers=n) for n in PRODUCERS}, seconds)
    fewest = next(text for text, rate in tried.items() if rate >= NEAR * max(tried.values()))
    return replace(config, producers=int(fewest))


def _longest_rest(config: Config, seconds: float) -> tuple[Config, float]:
    choices = {text: replace(config, consumer_delay=parse_duration(text, zero=True)) for text in DELAYS}
    tried = _rates("rest after a batch", choices, seconds)
    longest = [text for text, rate in tried.items() if rate >= NEAR * max(tried.values())][-1]
    return choices[longest], tried[longest]


def _best_batch_limit(config: Config, seconds: float) -> tuple[Config, float]:
    """Return the settings with the batch limit to recommend, and its rate over that without one."""
    limits = {text: None if text == "none" else parse_size(text) for text in BATCH_LIMITS}
    choices = {
        text: replace(config, max_batch_bytes=limit)
        for text, limit in limits.items()
        if limit is None or limit <= config.max_buffered_bytes
    }
    tried = _rates("batch limit", choices, seconds)
    best = max(tried, key=tried.__getitem__)
    gain = tried[best] / tried["none"] if tried["none"] else 1.0
    return (choices[best], gain) if gain >= WORTH else (choices["none"], 1.0)


def _rates(what: str, choices: Mapping[str, Config], seconds: float) -> dict[str, float]:
    """Return the rate of each choice, the best of some rounds in turns, and tell them."""
    best = dict.fromkeys(choices, 0.0)
    for _ in range(ROUNDS):
        for text, config in choices.items():
            best[text] = max(best[text], observe(config, seconds).rate)
    say(f"{what}: " + ", ".join(f"{text} {rate:,.0f}/s" for text, rate in best.items()))
    return best


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is no less.

    >>> power_of_two(1), power_of_two(1000), power_of_two(1024)
    (1, 1024, 1024)
    """
    return 1 << max(0, size - 1).bit_length()


def find_edge(healthy: Callable[[int], bool], least: int, most: int) -> Edge:
    """Search among ``least`` times 2, 4, 8 ... and ``most``; whether a size is healthy is asked twice before it counts.

    At most 2 * (log2(number of sizes) + 1) probes: 12 from 16 KiB to 1 GiB.

    >>> find_edge(lambda size: size >= 3000, 16, 1 << 20), find_edge(lambda size: True, 16, 64)
    (Edge(healthy=4096, refusing=2048), Edge(healthy=16, refusing=None))
    >>> find_edge(lambda size: False, 16, 64)
    Edge(healthy=None, refusing=64)
    """
    steps = max(0, math.ceil(math.log2(most / least))) if most > least else 0
    sizes = [min(most, least << step) for step in range(steps + 1)]
    low, high = 0, len(sizes)  # below low all refuse, from high on none does
    while low < high:
        middle = (low + high) // 2
        if healthy(sizes[middle]) and healthy(sizes[middle]):
            high = middle
        else:
            low = middle + 1
        say(f"buffer {format_size(sizes[middle])}: {'healthy' if high == middle else 'refusals'}")
    return Edge(sizes[high] if high < len(sizes) else None, sizes[high - 1] if high else None)


def observe(config: Config, seconds: float) -> Probe:
    """Load as much as goes, for some seconds; producers wait for room. Raises RuntimeError when it goes wrong."""
    probe = _probe(config, seconds, Load(config))
    if probe.problem is not None:
        raise RuntimeError(probe.problem)
    return probe


def paced(config: Config, seconds: float, offered: float) -> Probe:
    """Send at a steady pace, ``offered`` events a second from all producers together; what is refused is dropped."""
    config = replace(config, on_full="raise")
    return _probe(config, seconds, Paced(config, offered))


def _probe(config: Config, seconds: float, load: Load) -> Probe:
    outcome = drive(config, seconds, load)
    if outcome.interrupted:
        raise KeyboardInterrupt
    taken = sum(one.events for one in load.taken)
    latencies = load.latencies()
    time_taken = outcome.load_seconds + (outcome.drain_seconds or 0.0)
    problem = outcome.problems[0] if outcome.problems else None
    return Probe(taken / time_taken, sum(load.refused), latencies.quantile(0.99), problem)


class Paced(Load):
    """Producers that send a burst at each tick, evenly staggered; one that is late sends what it owes at once."""

    def __init__(self, config: Config, offered: float) -> None:
        super().__init__(config)
        self._tick = max(TICK, config.producers / offered)  # at least one event a tick
        self._burst = max(1, round(offered / config.producers * self._tick))

    def produce(self, index: int, dispatcher: tempo.Dispatcher, halt: list[bool]) -> None:
        """Send bursts until ``halt`` holds something."""
        sent = self.sent[index]
        source = events(self._config.payload_size, index, sent)
        enqueue = dispatcher.enqueue
        due = time.perf_counter() + self._tick * index / self._config.producers
        while not halt:
            time.sleep(max(0.0, due - time.perf_counter()))
            due += self._tick
            refused = 0
            for payload in islice(source, self._burst):
                try:
                    enqueue(payload)
                except tempo.QueueFull:
                    refused += 1
                    sent.take_back(payload)
            self.refused[index] += refused
            self.accepted[index] += self._burst - refused


def show(found: Found, memory: object) -> list[str]:
    """Return what was found out, for people."""
    config, edge = found.config, found.edge
    per_second = found.rate * max(1, config.mean_payload)
    total = heap.bound(config)
    share = f", {100 * total / memory:.2g} % of {format_size(memory)}" if isinstance(memory, int) else ""
    if edge.healthy is None:
        begin = f"refusals with every buffer up to {format_size(edge.refusing or 0)}"
    elif edge.refusing is None:
        begin = f"no refusals with {format_size(edge.healthy)}, the smallest tried"
    else:
        begin = f"refusals with {format_size(edge.refusing)}, none with {format_size(edge.healthy)}"
    limit = "none" if config.max_batch_bytes is None else format_size(config.max_batch_bytes)
    helps = f"it brings {100 * (found.gain - 1):.0f} %" if found.gain > 1 else "one does not help"
    kind = "PROVISIONAL" if found.provisional else "CALIBRATED"
    lines = [
        f"{kind}: max_buffered_bytes {format_size(config.max_buffered_bytes)}, max_batch_bytes {limit},"
        f" {config.producers} producers, {format_seconds(config.consumer_delay)} rest after a batch",
        *(f"  because     {reason}" for reason in found.provisional),
        f"rate          {found.rate:,.0f} events/s observed, {format_size(per_second)}/s",
        f"edge          at {OFFERED:.0%} of that: {begin}",
        f"headroom      {format_seconds(config.max_buffered_bytes / per_second)} at the observed rate, when no consumer"
        " comes",
        f"memory        {format_size(total)} at most for all that tempo holds{share}",
        f"batch limit   {limit}: {helps}",
    ]
    return lines


def as_texts(config: Config) -> dict[str, str]:
    """Return the settings as options would give them."""
    return {
        "payload": str(config.payload),
        "producers": str(config.producers),
        "interval": _seconds_text(config.interval),
        "consumer_delay": _seconds_text(config.consumer_delay),
        "max_batch_bytes": "none" if config.max_batch_bytes is None else str(config.max_batch_bytes),
        "max_buffered_bytes": str(config.max_buffered_bytes),
    }


def _seconds_text(seconds: float) -> str:
    return f"{round(seconds * 1e9)}ns"
